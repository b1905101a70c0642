"""Memory-efficient attention: softmax(scale * query key^T + attn_bias) value without the matrix in memory.

Tensors are NumPy arrays, torch tensors (on the CPU, or on a GPU in its current stream) or objects with DLPack, all of
float32, float16 or bfloat16, with any strides whose last is 1:

    query [B, Mq, H, K], key [B, Mkv, H, K], value [B, Mkv, H, Kv]; or [B, M, K] for one head; or [B, M, G, H, K]

key and value may have fewer heads than query, as long as their number divides H (query head h uses key head
h // (H // Hkv)), and in 5-D an extent of 1 broadcasts over G or H. Nothing has to be expanded. Results come in the query's
framework and on its device.

Arguments that all functions share:

attn_bias   None, a mask of attune.ops.fmha.attn_bias, or a tensor: additive (float32, float16 or bfloat16) or boolean (true
            is visible), of shape [B or 1, H or 1, Mq or 1, Mkv], [B or 1, Mq or 1, Mkv] or [Mq or 1, Mkv]
p           probability, 0 to 1, that a weight of the softmax is dropped; the others are scaled by 1 / (1 - p)
scale       factor of query * key; K ** -0.5 by default
op          an operator to force, or a pair of a forward and a backward one, each None for Attune's choice
output_dtype  of the output; the query's by default
generator   where dropout's random numbers come from: an attune.Generator, a torch.Generator of the CPU or a
            numpy.random.Generator. By default torch's CPU generator for torch tensors, so that torch.manual_seed
            reproduces a call, and attune's own for others (attune.manual_seed)

A query that sees no key gets output 0 and log-sum-exp -inf. Errors: ValueError for arguments that make no sense and for a
forced operator that cannot run them, NotImplementedError for what no kernel does.
"""

from __future__ import annotations

import sys
from typing import Any, Optional, Sequence, Tuple, Type, Union

from attune import _merge, _tensor
from attune.ops.fmha import (
    attn_bias,
    ck,
    ck_decoder,
    cpu,
    cutlass,
    decoder,
    flash,
    mma,
    simt,
    sm90,
    small_k,
    triton_splitk,
)
from attune.ops.fmha.attn_bias import AttentionBias, BlockDiagonalMask, LowerTriangularMask
from attune.ops.fmha.common import (
    AttentionBwOpBase,
    AttentionFwOpBase,
    AttentionOp,
    AttentionOpBase,
    AttentionOpDispatch,
    Inputs,
)

ALL_FW_OPS = [
    flash.FwOp,
    cutlass.FwOp,
    small_k.FwOp,
    decoder.FwOp,
    triton_splitk.FwOp,
    ck.FwOp,
    ck_decoder.FwOp,
    sm90.FwOp,
    mma.FwOp,
    simt.FwOp,
    cpu.FwOp,
]
ALL_BW_OPS = [flash.BwOp, cutlass.BwOp, small_k.BwOp, ck.BwOp]

MemoryEfficientAttentionOp = (small_k.FwOp, small_k.BwOp)
MemoryEfficientAttentionCutlassOp = (cutlass.FwOp, cutlass.BwOp)
MemoryEfficientAttentionCutlassFwdFlashBwOp = (cutlass.FwOp, flash.BwOp)
MemoryEfficientAttentionFlashAttentionOp = (flash.FwOp, flash.BwOp)
MemoryEfficientAttentionCkOp = (ck.FwOp, ck.BwOp)
MemoryEfficientAttentionCkDecoderOp = (ck_decoder.FwOp, ck.BwOp)

_Op = Union[AttentionOp, Type[AttentionFwOpBase], None]


def memory_efficient_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: Optional[float] = None,
    *,
    op: _Op = None,
    output_dtype: Any = None,
    generator: Any = None,
) -> Any:
    """Attention of `query` over `key` and `value`: [B, Mq, H, Kv], or [B, Mq, Kv] or [B, Mq, G, H, Kv] as the query.

    This version computes the forward pass only: tensors that require grad are refused (NotImplementedError) rather than
    silently detached.
    """
    _refuse_grad(query, key, value, attn_bias, getattr(attn_bias, "_dense", None))
    inputs = Inputs(query, key, value, attn_bias, p, scale, output_dtype)
    return _forward(inputs, op, generator, with_lse=False)[0]


def memory_efficient_attention_forward(
    query: Any,
    key: Any,
    value: Any,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: Optional[float] = None,
    *,
    op: _Op = None,
    output_dtype: Any = None,
    generator: Any = None,
) -> Any:
    """The output of memory_efficient_attention, outside autograd: the result never requires grad."""
    inputs = Inputs(query, key, value, attn_bias, p, scale, output_dtype)
    return _forward(inputs, op, generator, with_lse=False)[0]


def memory_efficient_attention_forward_requires_grad(
    query: Any,
    key: Any,
    value: Any,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: Optional[float] = None,
    *,
    op: _Op = None,
    output_dtype: Any = None,
    generator: Any = None,
) -> Tuple[Any, Any]:
    """The output and the log-sum-exp that a backward pass needs, outside autograd.

    The second is float32 [B, H, Mq] or [B, G, H, Mq]: ln of the sum of exp(score) over the visible keys, whatever is
    dropped; -inf where a query sees none. With packed sequences [1, H, all query rows].
    """
    inputs = Inputs(query, key, value, attn_bias, p, scale, output_dtype)
    return _forward(inputs, op, generator, with_lse=True)


def memory_efficient_attention_partial(
    query: Any,
    key: Any,
    value: Any,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: Optional[float] = None,
    *,
    op: _Op = None,
    output_dtype: Any = None,
) -> Tuple[Any, Any]:
    """Attention over some of the keys: the output, in float32 by default, and the log-sum-exp. merge_attentions makes of
    several what attention over all of their keys would have given. p must be 0."""
    if p != 0:
        raise NotImplementedError(
            f"p={p}: dropout is not supported in partial attention, since the parts would not know of each other's "
            "keys"
        )
    _refuse_grad(query, key, value, attn_bias, getattr(attn_bias, "_dense", None))
    inputs = Inputs(query, key, value, attn_bias, p, scale, output_dtype, is_partial=True)
    return _forward(inputs, op, None, with_lse=True)


def merge_attentions(
    attn_split: Union[Any, Sequence[Any]],
    lse_split: Union[Any, Sequence[Any]],
    write_lse: bool = True,
    output_dtype: Any = None,
) -> Tuple[Any, Optional[Any]]:
    """Combines attention over disjoint sets of keys: out = sum_i out_i exp(lse_i) / sum_i exp(lse_i) and lse = ln sum_i
    exp(lse_i), in one kernel. https://arxiv.org/abs/2402.05099 has the derivation.

    attn_split: a list of [B, M, H, K] or [B, M, G, H, K], or one tensor [chunks, ...] of them; of one dtype, the last
    stride 1. lse_split: a list of float32 [B, H, M] or [B, G, H, M], or one tensor [chunks, ...]; longer than M is
    allowed. Lists and tensors may be mixed. A chunk whose lse is -inf counts for nothing, whatever its values.

    Returns the output, in the chunks' dtype unless `output_dtype` says otherwise, and the lse, None without `write_lse`.
    """
    for chunks in (attn_split, lse_split):
        _refuse_grad(*(chunks if isinstance(chunks, (list, tuple)) else [chunks]))
    return _merge.merge(attn_split, lse_split, write_lse, output_dtype)


def _forward(inputs: Inputs, op: _Op, generator: Any, with_lse: bool) -> Tuple[Any, Any]:
    forward_op = op[0] if isinstance(op, tuple) and len(op) == 2 else op
    if forward_op is None:
        return inputs.call().forward(with_lse, generator)
    if not (isinstance(forward_op, type) and issubclass(forward_op, AttentionFwOpBase)):
        raise TypeError(
            f"op: expected a forward operator such as attune.ops.fmha.cutlass.FwOp, or a pair of a forward and a "
            f"backward one, got {op!r}"
        )
    return forward_op.forward(inputs, with_lse, generator)


def _refuse_grad(*tensors: Any) -> None:
    if not any(_tensor.is_torch_tensor(tensor) and tensor.requires_grad for tensor in tensors):
        return
    if sys.modules["torch"].is_grad_enabled():
        raise NotImplementedError(
            "gradients are not supported in this version; call it under torch.no_grad(), or use "
            "memory_efficient_attention_forward on detached tensors"
        )
