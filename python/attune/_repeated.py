"""Forward calls of torch tensors that come again, as nearly all of a program's do.

The first call of some shapes, strides, dtypes, device, mask and options goes the long way of _call.py. Once it has
succeeded the library keeps its description, and the next one hands over addresses alone. The library checks every call
as it always does: time on the host is all that differs.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Dict, Hashable, Optional, Tuple

from attune import _library, _random, _tensor
from attune._tensor import is_torch_tensor
from attune.ops.fmha._bias import AttentionBias

if TYPE_CHECKING:
    from attune._call import Call
    from attune.ops.fmha.common import Inputs

Layout = Tuple[Any, Any, Any, Any]  # shape, strides, dtype, device

_MOST = 1024  # calls that are kept; before one more, all are forgotten


class _Kept:
    """A call without its tensors. Nothing of it changes, so threads may share it."""

    def __init__(self, call: Call, output: Any, lse: Any):
        library = _library.library()
        self._handle = call.described(output, lse)
        self._run, self._destroy = library.attune_forward_call_run, library.attune_forward_call_destroy
        self._drops = call.drops
        self._allocate = sys.modules["torch"].empty_strided  # in half of empty's time
        self._stream = _tensor.stream_of(output.device)
        self._output = _layout(output)
        self._lse = None if lse is None else _layout(lse)

    def __del__(self) -> None:
        self._destroy(self._handle)

    def run(self, query: Any, key: Any, value: Any, bias: Any, generator: Any) -> Tuple[Any, Any]:
        seed, offset = _random.state_of(generator, query) if self._drops else (0, 0)
        output = self._allocated(self._output)
        lse = None if self._lse is None else self._allocated(self._lse)
        memory = _library.FORWARD_MEMORY.pack(
            _library.FORWARD_MEMORY.size,
            query.data_ptr(),
            key.data_ptr(),
            value.data_ptr(),
            output.data_ptr(),
            0 if lse is None else lse.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            self._stream(),
            seed,
            offset,
        )
        status = self._run(self._handle, memory)
        if status != 0:
            _library.check(status)
        return output, lse

    def _allocated(self, layout: Layout) -> Any:
        shape, strides, dtype, device = layout
        return self._allocate(shape, strides, dtype=dtype, device=device)


_kept: Dict[Hashable, _Kept] = {}


def forward(inputs: Inputs, with_lse: bool, generator: Any) -> Tuple[Any, Any]:
    """Output and LSE, by Attune's choice of a kernel."""
    try:
        description, bias = _described(inputs, with_lse)
    except (RuntimeError, TypeError, ValueError):
        description = None  # a sparse tensor has no strides, say; the long way says what is wrong
    if description is None:
        return inputs.call().forward(with_lse, generator)
    kept = _kept.get(description)
    if kept is not None:
        return kept.run(inputs.query, inputs.key, inputs.value, bias, generator)
    call = inputs.call()
    results = call.forward(with_lse, generator)
    if len(_kept) >= _MOST:
        _kept.clear()
    _kept[description] = _Kept(call, *results)
    return results


def _described(inputs: Inputs, with_lse: bool) -> Tuple[Optional[Hashable], Any]:
    """All of a call but its memory, and the tensor of its bias. Not described are calls of other frameworks and of packed
    sequences: whoever makes a mask for each call, which is usual there, would fill the table in vain."""
    query, key, value, mask, bias = inputs.query, inputs.key, inputs.value, inputs.attn_bias, None
    if not (is_torch_tensor(query) and is_torch_tensor(key) and is_torch_tensor(value)):
        return None, None
    if isinstance(mask, AttentionBias):
        if mask._blocks is not None:
            return None, None
        bias, mask = mask._dense, (type(mask), mask._window)
    elif mask is not None:
        bias, mask = mask, None
    if not (bias is None or is_torch_tensor(bias)):
        return None, None
    if query.is_neg() or key.is_neg() or value.is_neg() or (bias is not None and bias.is_neg()):
        return None, None  # what is run is a copy
    scale, dtype = inputs.scale, inputs.output_dtype
    description = (
        _library.library(),
        with_lse,
        mask,
        None if bias is None else _layout(bias),
        float(inputs.p),
        None if scale is None else float(scale),
        None if dtype is None else _tensor.dtype_name(dtype),
        inputs.is_partial,
        _layout(query),
        _layout(key),
        _layout(value),
    )
    return description, bias


def _layout(tensor: Any) -> Layout:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device
