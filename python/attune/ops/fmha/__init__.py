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

A query that sees no key gets output 0 and log-sum-exp -inf, and gradients 0.

Functions that do not say otherwise are differentiable, once, for torch tensors: with respect to query, key and value, and to
a bias tensor that is added, alone or on top of a mask. Only the gradients that are asked for are computed. A broadcast
bias gets a gradient of its own shape, summed over what it was broadcast over. torch.use_deterministic_algorithms(True)
makes gradients the same in every run.

Errors: ValueError for arguments that make no sense and for a forced operator that cannot run them, NotImplementedError for
what no kernel does.
"""

from __future__ import annotations

import sys
from typing import Any, Optional, Sequence, Tuple, Type, Union

from attune import _merge, _tensor
from attune._call import Backward, Wanted
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
from attune.ops.fmha._bias import taken_apart
from attune.ops.fmha.attn_bias import AttentionBias, BlockDiagonalMask, LowerTriangularMask
from attune.ops.fmha.common import (
    AttentionBwOpBase,
    AttentionFwOpBase,
    AttentionOp,
    AttentionOpBase,
    AttentionOpDispatch,
    Inputs,
    run_backward,
    run_forward,
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
ALL_BW_OPS = [flash.BwOp, cutlass.BwOp, small_k.BwOp, ck.BwOp, mma.BwOp, simt.BwOp, cpu.BwOp]

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
    """Attention of `query` over `key` and `value`: [B, Mq, H, Kv], or [B, Mq, Kv] or [B, Mq, G, H, Kv] as the query."""
    inputs = Inputs(query, key, value, attn_bias, p, scale, output_dtype)
    return _differentiable(inputs, op, generator, with_lse=False)[0]


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
    return run_forward(inputs, _operators(op)[0], False, generator)[0]


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
    return run_forward(inputs, _operators(op)[0], True, generator)


def memory_efficient_attention_backward(
    grad: Any,
    output: Any,
    lse: Any,
    query: Any,
    key: Any,
    value: Any,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: Optional[float] = None,
    *,
    op: Optional[Type[AttentionBwOpBase]] = None,
    grad_lse: Any = None,
    bias_gradient: bool = False,
    deterministic: bool = False,
    generator: Any = None,
) -> Tuple[Any, ...]:
    """Gradients of query, key and value, of their shapes and dtypes, outside autograd.

    `output` and `lse` are what memory_efficient_attention_forward_requires_grad or memory_efficient_attention_partial gave
    for the same arguments, and `grad` is the gradient of the output: of its shape and dtype, with any strides. An LSE of
    other producers may be longer than Mq, have [sequences, H, longest] for packed sequences, and mark queries that see no
    key by -inf or +inf.

    grad_lse       the gradient of the LSE, where that was used, too
    bias_gradient  appends the gradient of the bias tensor, of its shape and dtype
    deterministic  the same bits in every run; docs/semantics.md has the cost
    generator      with p > 0, in the state in which forward's was: attune.Generator(seed, offset), or a copy
    """
    b = Backward(grad, output, lse, grad_lse, Wanted(bias=bias_gradient), deterministic, generator)
    gradients = run_backward(Inputs(query, key, value, attn_bias, p, scale), _backward_operator(op), b)
    return tuple(gradients if bias_gradient else gradients[:3])


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
    several what attention over all of their keys would have given. p must be 0. Both results may be used in any way and
    differentiated."""
    if p != 0:
        raise NotImplementedError(
            f"p={p}: dropout is not supported in partial attention, since the parts would not know of each other's "
            "keys"
        )
    inputs = Inputs(query, key, value, attn_bias, p, scale, output_dtype, is_partial=True)
    return _differentiable(inputs, op, None, with_lse=True)


def merge_attentions(
    attn_split: Union[Any, Sequence[Any]],
    lse_split: Union[Any, Sequence[Any]],
    write_lse: bool = True,
    output_dtype: Any = None,
) -> Tuple[Any, Optional[Any]]:
    """Combines attention over disjoint sets of keys: out = sum_i out_i exp(lse_i) / sum_i exp(lse_i) and lse = ln sum_i
    exp(lse_i), in one kernel. https://arxiv.org/abs/2402.05099 has the derivation.

    attn_split: a list of [B, M, H, K], [B, M, K] or [B, M, G, H, K], or one tensor [chunks, ...] of them; of one dtype, the
    last stride 1. lse_split: a list of float32 [B, H, M], [B, 1, M] or [B, G, H, M], or one tensor [chunks, ...]; longer
    than M is allowed. Lists and tensors may be mixed. A chunk whose lse is -inf counts for nothing, whatever its values.

    Returns the output, in the chunks' dtype unless `output_dtype` says otherwise, and the lse, None without `write_lse`. Both
    are differentiable, but `write_lse` must then be true.
    """
    if _records(*_merge.listed(attn_split), *_merge.listed(lse_split)):
        if not write_lse:
            raise ValueError("write_lse should be true if inputs require gradients.")
        from attune.ops.fmha import _autograd

        return _autograd.merge(attn_split, lse_split, output_dtype)
    return _merge.merge(attn_split, lse_split, write_lse, output_dtype)


def merge_attentions_backward(
    grad: Any,
    output: Any,
    lse: Any,
    attn_split: Union[Any, Sequence[Any]],
    lse_split: Union[Any, Sequence[Any]],
    *,
    grad_lse: Any = None,
) -> Tuple[Any, Any]:
    """Gradients of attn_split and lse_split, lists or stacked as these are, outside autograd.

    `output` and `lse` are what merge_attentions made of them; `grad` is the gradient of the output, of its shape and dtype,
    with any strides, and `grad_lse` that of the lse, where it was used. The gradient of an lse has M entries, even where
    the lse is longer. Chunks whose lse is -inf get 0.
    """
    return _merge.merge_backward(grad, output, lse, attn_split, lse_split, grad_lse)


def _differentiable(inputs: Inputs, op: _Op, generator: Any, with_lse: bool) -> Tuple[Any, Any]:
    """Output and LSE, recorded by autograd where it has to."""
    forward_op, backward_op = _operators(op)
    _, dense = taken_apart(inputs.attn_bias)
    if not _records(inputs.query, inputs.key, inputs.value, dense, inputs.scale):
        return run_forward(inputs, forward_op, with_lse, generator)
    from attune.ops.fmha import _autograd

    return _autograd.attention(inputs, forward_op, backward_op, generator)


def _records(*tensors: Any) -> bool:
    """Does torch's autograd record what happens to these?"""
    for tensor in tensors:
        if getattr(tensor, "requires_grad", False) and _tensor.is_torch_tensor(tensor):
            return sys.modules["torch"].is_grad_enabled()
    return False


def _operators(op: _Op) -> Tuple[Optional[Type[AttentionFwOpBase]], Optional[Type[AttentionBwOpBase]]]:
    """The forward and the backward operator that an `op` names."""
    forward_op, backward_op = op if isinstance(op, tuple) and len(op) == 2 else (op, None)
    if not (forward_op is None or _is_operator(forward_op, AttentionFwOpBase)):
        raise TypeError(
            f"op: expected a forward operator such as attune.ops.fmha.cutlass.FwOp, or a pair of a forward and a "
            f"backward one, got {op!r}"
        )
    return forward_op, _backward_operator(backward_op)


def _backward_operator(op: Any) -> Optional[Type[AttentionBwOpBase]]:
    if op is None or _is_operator(op, AttentionBwOpBase):
        return op
    raise TypeError(f"op: expected a backward operator such as attune.ops.fmha.cutlass.BwOp, got {op!r}")


def _is_operator(op: Any, base: Type[AttentionOpBase]) -> bool:
    return isinstance(op, type) and issubclass(op, base)
