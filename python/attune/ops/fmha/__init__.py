"""Memory-efficient attention: softmax(scale * query key^T + attn_bias) value without the matrix in memory."""

from __future__ import annotations

import sys
from typing import Any, Optional, Tuple

from attune import _tensor
from attune._call import Call
from attune.ops.fmha import attn_bias
from attune.ops.fmha.attn_bias import AttentionBias

__all__ = [
    "AttentionBias",
    "attn_bias",
    "memory_efficient_attention",
    "memory_efficient_attention_forward",
    "memory_efficient_attention_forward_requires_grad",
]


def memory_efficient_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_bias: Optional[AttentionBias] = None,
    p: float = 0.0,
    scale: Optional[float] = None,
    *,
    op: Any = None,
    output_dtype: Any = None,
) -> Any:
    """Attention of `query` over `key` and `value`.

    query [B, Mq, H, K], key [B, Mkv, H, K], value [B, Mkv, H, Kv], or all 3-D [B, M, K] for one head: NumPy arrays,
    torch tensors (CPU, or CUDA on the current stream) or objects with DLPack, of float32, float16 or bfloat16, with
    any strides whose last is 1. `scale` defaults to K ** -0.5. Returns [B, Mq, H, Kv] (or [B, Mq, Kv]) in the query's
    framework and dtype; a query that sees no key gets 0.

    This version computes the forward pass only: p must be 0, `op` and `output_dtype` left alone, and tensors that
    require grad are refused (NotImplementedError) rather than silently detached. Arguments that make no sense raise
    ValueError.
    """
    _refuse_grad(query, key, value)
    return _forward(query, key, value, attn_bias, p, scale, op, output_dtype, with_lse=False)[0]


def memory_efficient_attention_forward(
    query: Any,
    key: Any,
    value: Any,
    attn_bias: Optional[AttentionBias] = None,
    p: float = 0.0,
    scale: Optional[float] = None,
    *,
    op: Any = None,
    output_dtype: Any = None,
) -> Any:
    """The output of memory_efficient_attention, outside autograd: the result never requires grad."""
    return _forward(query, key, value, attn_bias, p, scale, op, output_dtype, with_lse=False)[0]


def memory_efficient_attention_forward_requires_grad(
    query: Any,
    key: Any,
    value: Any,
    attn_bias: Optional[AttentionBias] = None,
    p: float = 0.0,
    scale: Optional[float] = None,
    *,
    op: Any = None,
    output_dtype: Any = None,
) -> Tuple[Any, Any]:
    """The output and the log-sum-exp that a backward pass needs, outside autograd.

    The second is float32 [B, H, Mq]: ln of the sum of exp(scale * query.key) over the visible keys; -inf where a
    query sees none.
    """
    return _forward(query, key, value, attn_bias, p, scale, op, output_dtype, with_lse=True)


def _forward(query, key, value, attn_bias, p, scale, op, output_dtype, with_lse):
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"Invalid dropout probability: p={p}")
    if p != 0.0:
        raise NotImplementedError(f"p={p}: dropout is not supported in this version; pass p=0")
    if op is not None and op != (None, None):
        raise NotImplementedError(
            "op: choosing an operator is not supported in this version; leave op=None, and see "
            "attune.explain() for what runs and why"
        )
    call = Call(query, key, value, attn_bias, scale)
    if output_dtype is not None and _tensor.dtype_name(output_dtype) != call.query.dtype:
        raise NotImplementedError(
            f"output_dtype={_tensor.dtype_name(output_dtype)} with {call.query.dtype} inputs: a "
            "custom output dtype is not supported in this version"
        )
    return call.forward(with_lse)


def _refuse_grad(*tensors: Any) -> None:
    if not any(_tensor.is_torch_tensor(tensor) and tensor.requires_grad for tensor in tensors):
        return
    if sys.modules["torch"].is_grad_enabled():
        raise NotImplementedError(
            "gradients are not supported in this version; call it under torch.no_grad(), or use "
            "memory_efficient_attention_forward on detached tensors"
        )
