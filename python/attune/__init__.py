"""Attune: memory-efficient attention, compiled for the exact problem at first use.

    import attune.ops as aops

    y = aops.memory_efficient_attention(q, k, v, attn_bias=aops.LowerTriangularMask())

NumPy arrays and CPU tensors run on the CPU, CUDA tensors on their GPU in the current stream. Errors: ValueError for a
call that makes no sense, NotImplementedError for one that no kernel does, EnvironmentFailure for a machine that lacks
something, RuntimeError for a defect of Attune.
"""

from __future__ import annotations

import ctypes
import json
from typing import Any, Dict, NamedTuple, Optional

__version__ = "0.1.0"

from attune import _library, ops
from attune._call import Call
from attune._library import EnvironmentFailure

__all__ = ["Counters", "EnvironmentFailure", "counters", "explain", "last_kernel", "ops", "prepare"]


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
    """The candidate that the calling thread's last attention call ran, "mma_128x64x4"; empty before the first."""
    return _library.library().attune_last_kernel().decode()


def explain(
    query: Any,
    key: Any,
    value: Any,
    attn_bias: Any = None,
    scale: Optional[float] = None,
    *,
    with_lse: bool = False,
) -> Dict[str, Any]:
    """Which kernel the same call would run and why: family, candidate, spec, key, compiler, whether it is loaded,
    cached or absent, and the reasons against the other families."""
    call = Call(query, key, value, attn_bias, scale)
    text = ctypes.c_void_p()
    _library.check(_library.library().attune_explain(*call.inputs, with_lse, *call.settings, text))
    try:
        return json.loads(ctypes.string_at(text))
    finally:
        _library.library().attune_free(text)


def prepare(
    query: Any,
    key: Any,
    value: Any,
    attn_bias: Any = None,
    scale: Optional[float] = None,
    *,
    with_lse: bool = False,
) -> None:
    """Compiles and loads the kernel that the same call would use, without touching the tensors' data."""
    call = Call(query, key, value, attn_bias, scale)
    _library.check(_library.library().attune_prepare(*call.inputs, with_lse, *call.settings))
