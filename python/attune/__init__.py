"""Attune: memory-efficient attention, compiled for the exact problem at first use.

    import attune.ops as aops

    y = aops.memory_efficient_attention(q, k, v, attn_bias=aops.LowerTriangularMask())

NumPy arrays and CPU tensors run on the CPU, CUDA tensors on their GPU in the current stream. Errors: ValueError for a
call that makes no sense, NotImplementedError for one that no kernel does, EnvironmentFailure for a machine that lacks
something, RuntimeError for a defect of Attune.
"""

from __future__ import annotations

from typing import Any, Dict, NamedTuple, Optional

__version__ = "0.1.0"

from attune import _library, ops
from attune._call import Call, Wanted
from attune._library import EnvironmentFailure
from attune._random import Generator, manual_seed

__all__ = [
    "Counters",
    "EnvironmentFailure",
    "Generator",
    "counters",
    "explain",
    "explain_backward",
    "last_kernel",
    "manual_seed",
    "ops",
    "prepare",
    "prepare_backward",
]


class Counters(NamedTuple):
    """What Attune did in this process."""

    compiles: int  # kernels that a compiler built
    loads: int  # images loaded
    launches: int  # kernels run
    cache_hits: int  # entries found on disk
    cache_misses: int  # entries not found on disk
    cache_defects: int  # entries refused and quarantined
    cache_stores: int  # entries written


def counters() -> Counters:
    """The counters of this process."""
    c = _library.Counters()
    _library.check(_library.library().attune_get_counters(c))
    return Counters(*(getattr(c, name) for name in Counters._fields))


def last_kernel() -> str:
    """The candidate that the calling thread's last call ran, "mma_128x64x4"; of a backward call the one for key and value.
    Empty before the first. Autograd runs the gradients of CUDA tensors in threads of its own."""
    return _library.library().attune_last_kernel().decode()


def explain(
    query: Any,
    key: Any,
    value: Any,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: Optional[float] = None,
    *,
    output_dtype: Any = None,
    with_lse: bool = False,
) -> Dict[str, Any]:
    """Which kernel the same call would run and why: family, candidate, spec, key, compiler, whether it is loaded,
    cached or absent, the reasons against the other families, and "tuned", if `attune bench --tune` measured it.
    """
    return Call(query, key, value, attn_bias, p, scale, output_dtype).explain(with_lse)


def prepare(
    query: Any,
    key: Any,
    value: Any,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: Optional[float] = None,
    *,
    output_dtype: Any = None,
    with_lse: bool = False,
) -> None:
    """Compiles and loads the kernel that the same call would use, without touching the tensors' data."""
    Call(query, key, value, attn_bias, p, scale, output_dtype).prepare(with_lse)


def explain_backward(
    query: Any,
    key: Any,
    value: Any,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: Optional[float] = None,
    *,
    output_dtype: Any = None,
    bias_gradient: bool = False,
    deterministic: bool = False,
) -> Dict[str, Any]:
    """The kernels that the gradients of the same call would run, in order, "kernels", each as `explain` has it, and the bytes
    of scratch memory, "workspace_bytes". Memory for the results is allocated and freed."""
    call = Call(query, key, value, attn_bias, p, scale, output_dtype)
    return call.explain_backward(Wanted(bias=bias_gradient), deterministic)


def prepare_backward(
    query: Any,
    key: Any,
    value: Any,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: Optional[float] = None,
    *,
    output_dtype: Any = None,
    bias_gradient: bool = False,
    deterministic: bool = False,
) -> None:
    """Compiles and loads the kernels that the gradients of the same call would use, without touching the tensors' data."""
    call = Call(query, key, value, attn_bias, p, scale, output_dtype)
    call.prepare_backward(Wanted(bias=bias_gradient), deterministic)
