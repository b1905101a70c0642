"""Attention and merges as torch's autograd knows them. Imported when a torch tensor requires grad: torch is here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, List, Optional, Sequence, Tuple, Type

import torch
from torch.autograd.function import once_differentiable

from attune import _merge, _random, _tensor
from attune._call import Backward, Wanted
from attune._numbers import real
from attune.ops.fmha._bias import put_together, taken_apart
from attune.ops.fmha.common import (
    AttentionBwOpBase,
    AttentionFwOpBase,
    Inputs,
    run_backward,
    run_forward,
)


def attention(
    inputs: Inputs,
    forward_op: Optional[Type[AttentionFwOpBase]],
    backward_op: Optional[Type[AttentionBwOpBase]],
    generator: Any,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Output and LSE, both differentiable."""
    for name in ("query", "key", "value"):
        _check_torch(name, getattr(inputs, name))
    if getattr(inputs.scale, "requires_grad", False):
        raise NotImplementedError(
            "scale: it requires grad, but has no gradient here; multiply query by it and pass scale=1"
        )
    if backward_op is not None:
        backward_op.check(inputs)  # now: inside backward, nobody would know whose call it was
    mask, dense = taken_apart(inputs.attn_bias)
    if not _tensor.is_torch_tensor(dense):  # no tensor, or one that autograd knows nothing of
        mask, dense = inputs.attn_bias, None
    state = _random.state_of(generator, inputs.query) if real("p", inputs.p) > 0 else (0, 0)
    settings = inputs.of(None, None, None, mask)
    call = _Call(settings, forward_op, backward_op, state)
    return _Attention.apply(inputs.query, inputs.key, inputs.value, dense, call)


@dataclass
class _Call:
    """An attention call without the tensors that autograd saves."""

    settings: Inputs
    forward_op: Optional[Type[AttentionFwOpBase]]
    backward_op: Optional[Type[AttentionBwOpBase]]
    state: Tuple[int, int]  # of dropout

    def inputs(self, query: Any, key: Any, value: Any, dense: Any) -> Inputs:
        return self.settings.of(query, key, value, put_together(self.settings.attn_bias, dense))

    def generator(self) -> Optional[_random.Generator]:
        """For one pass, which drops what the others drop, if it drops."""
        return _random.Generator(*self.state) if self.settings.p > 0 else None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, dense, call):
        inputs = call.inputs(query, key, value, dense)
        output, lse = run_forward(inputs, call.forward_op, True, call.generator())
        ctx.call = call
        ctx.save_for_backward(query, key, value, dense, output, lse)
        ctx.set_materialize_grads(False)
        return output, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, grad_lse):
        *inputs, output, lse = ctx.saved_tensors
        if grad is None:  # the LSE alone was used
            grad = _zero_like(output)
        wanted = Wanted(*ctx.needs_input_grad[:4])
        b = Backward(grad, output, lse, grad_lse, wanted, generator=ctx.call.generator())
        return (*run_backward(ctx.call.inputs(*inputs), ctx.call.backward_op, b), None)


def merge(attn: Any, lse: Any, output_dtype: Any) -> Tuple[torch.Tensor, torch.Tensor]:
    """Output and LSE, both differentiable."""
    for name, chunks in ("attn_split", attn), ("lse_split", lse):
        for tensor in _merge.listed(chunks):
            _check_torch(name, tensor)
    stacked = _merge.is_stacked(attn), _merge.is_stacked(lse)
    tensors = *_merge.listed(attn), *_merge.listed(lse)
    return _Merge.apply(output_dtype, stacked, len(_merge.listed(attn)), *tensors)


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(ctx, output_dtype, stacked, count, *tensors):
        ctx.stacked, ctx.count = stacked, count
        output, lse = _merge.merge(*_as_given(ctx, tensors), True, output_dtype)
        ctx.save_for_backward(output, lse, *tensors)
        ctx.set_materialize_grads(False)
        return output, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, grad_lse):
        output, lse, *tensors = ctx.saved_tensors
        if grad is None:
            grad = _zero_like(output)
        grad_attn, grad_attn_lse = _merge.merge_backward(
            grad, output, lse, *_as_given(ctx, tensors), grad_lse
        )
        gradients = *_merge.listed(grad_attn), *_merge.listed(grad_attn_lse)
        return (None, None, None, *map(_padded_to, gradients, tensors))


def _as_given(ctx: Any, tensors: Sequence[torch.Tensor]) -> List[Any]:
    """attn_split and lse_split."""
    parts = tensors[: ctx.count], tensors[ctx.count :]
    return [part[0] if stacked else part for part, stacked in zip(parts, ctx.stacked)]


def _zero_like(tensor: torch.Tensor) -> torch.Tensor:
    """A gradient of 0 that takes no memory."""
    return tensor.new_zeros(()).expand_as(tensor)


def _padded_to(gradient: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """An LSE may be longer than its chunk: nothing depends on the rest."""
    missing = tensor.shape[-1] - gradient.shape[-1]
    return torch.nn.functional.pad(gradient, (0, missing)) if missing else gradient


def _check_torch(name: str, tensor: Any) -> None:
    if not _tensor.is_torch_tensor(tensor):
        raise TypeError(
            f"{name}: expected a torch tensor, since another argument requires grad, got {type(tensor).__name__}"
        )
