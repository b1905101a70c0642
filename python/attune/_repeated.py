"""Forward calls of torch tensors that come again, as nearly all of a program's do.

The first call of some shapes, strides, dtypes, device, mask and options goes the long way of _call.py. Once it has
succeeded the library keeps its description, and the next one hands over addresses alone. The library checks every call
as it always does: time on the host is all that differs.
"""

from __future__ import annotations

import ctypes
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
        size = ctypes.c_size_t()
        _library.check(library.attune_forward_call_workspace_bytes(self._handle, size))
        self._workspace_bytes = size.value
        torch = sys.modules["torch"]
        self._workspace = torch.Size((size.value,)), (1,), torch.uint8, output.device

    def __del__(self) -> None:
        self._destroy(self._handle)

    def run(self, query: Any, key: Any, value: Any, bias: Any, generator: Any) -> Tuple[Any, Any]:
        seed, offset = _random.state_of(generator, query) if self._drops else (0, 0)
        output = self._allocated(self._output)
        lse = None if self._lse is None else self._allocated(self._lse)
        workspace = None if self._workspace_bytes == 0 else self._allocated(self._workspace)
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
            0 if workspace is None else workspace.data_ptr(),
            self._workspace_bytes,
        )
        status = self._run(self._handle, memory)
        if status != 0:
            _library.check(status)
        return output, lse

    def _allocated(self, layout: Layout) -> Any:
        shape, strides, dtype, device = layout
        return self._allocate(shape, strides, dtype=dtype, device=device)


_Table = Dict[Hashable, _Kept]
_kept: _Table = {}  # but for those of packed sequences, which live as long as their mask


def forward(inputs: Inputs, with_lse: bool, generator: Any) -> Tuple[Any, Any]:
    """Output and LSE, by Attune's choice of a kernel."""
    try:
        described = _described(inputs, with_lse)
    except (RuntimeError, TypeError, ValueError):
        described = None  # a sparse tensor has no strides, say; the long way says what is wrong
    if described is None:
        return inputs.call().forward(with_lse, generator)
    description, bias, table = described
    kept = table.get(description)
    if kept is not None:
        return kept.run(inputs.query, inputs.key, inputs.value, bias, generator)
    call = inputs.call()
    results = call.forward(with_lse, generator)
    if len(table) >= _MOST:
        table.clear()
    table[description] = _Kept(call, *results)
    return results


def _described(inputs: Inputs, with_lse: bool) -> Optional[Tuple[Hashable, Any, _Table]]:
    """All of a call but its memory, the tensor of its bias, and where the call is kept. Nothing for calls of other
    frameworks, and for packed sequences on the CPU, whose tables are lists that may change."""
    query, key, value = inputs.query, inputs.key, inputs.value
    if not (is_torch_tensor(query) and is_torch_tensor(key) and is_torch_tensor(value)):
        return None
    mask, bias, table = inputs.attn_bias, None, _kept
    if isinstance(mask, AttentionBias):
        blocks, bias = mask._blocks, mask._dense
        if blocks is not None:
            if not query.is_cuda:
                return None
            table = mask._kept_calls
        mask = type(mask), mask._window, blocks  # a table is equal to itself alone
    elif mask is not None:
        mask, bias = None, mask
    if not (bias is None or is_torch_tensor(bias)):
        return None
    if query.is_neg() or key.is_neg() or value.is_neg() or (bias is not None and bias.is_neg()):
        return None  # what is run is a copy
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
    return description, bias, table


def _layout(tensor: Any) -> Layout:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device
