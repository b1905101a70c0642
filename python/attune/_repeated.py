"""Calls of torch tensors that come again, as nearly all of a program's do: forward and backward passes.

The first call of some shapes, strides, dtypes, device, mask and options goes the long way of _call.py. Once it has
succeeded the library keeps its description, and the next one hands over addresses alone. The library checks every call
as it always does: time on the host is all that differs.
"""

from __future__ import annotations

import ctypes
import struct
import sys
from typing import TYPE_CHECKING, Any, Dict, Hashable, List, Optional, Tuple

from attune import _library, _random, _tensor
from attune._tensor import is_torch_tensor
from attune.ops.fmha._bias import AttentionBias

if TYPE_CHECKING:
    from attune._call import Backward, BackwardPass, Call
    from attune.ops.fmha.common import Inputs

Layout = Tuple[Any, Any, Any, Any]  # shape, strides, dtype, device

_MOST = 1024  # calls that are kept; before one more, all are forgotten


class _Kept:
    """A call without its tensors. Nothing of it changes, so threads may share it."""

    def __init__(self, kind: str, handle: ctypes.c_void_p, drops: bool, device: Any):
        """`kind` is the library's name for such calls."""
        torch, library = sys.modules["torch"], _library.library()
        self._handle, self._drops = handle, drops
        self._run = getattr(library, f"attune_{kind}_call_run")
        self._destroy = getattr(library, f"attune_{kind}_call_destroy")
        self._allocate = torch.empty_strided  # in half of empty's time
        self._stream = _tensor.stream_of(device)
        size = ctypes.c_size_t()
        _library.check(getattr(library, f"attune_{kind}_call_workspace_bytes")(handle, size))
        self._workspace_bytes = size.value if device.type == "cuda" else 0  # elsewhere the library allocates
        self._workspace = torch.Size((size.value,)), (1,), torch.uint8, device

    def __del__(self) -> None:
        self._destroy(self._handle)

    def _allocated(self, layout: Layout) -> Any:
        shape, strides, dtype, device = layout
        return self._allocate(shape, strides, dtype=dtype, device=device)

    def _run_with(self, memory: struct.Struct, addresses: Tuple[int, ...], query: Any, generator: Any) -> None:
        """`memory` is the library's struct, which begins with its size and these addresses."""
        seed, offset = _random.state_of(generator, query) if self._drops else (0, 0)
        workspace = None if self._workspace_bytes == 0 else self._allocated(self._workspace)
        rest = self._stream(), seed, offset, _address(workspace), self._workspace_bytes
        status = self._run(self._handle, memory.pack(memory.size, *addresses, *rest))
        if status != 0:
            _library.check(status)


class _KeptForward(_Kept):
    def __init__(self, call: Call, output: Any, lse: Any):
        super().__init__("forward", call.described(output, lse), call.drops, output.device)
        self._output = _layout(output)
        self._lse = None if lse is None else _layout(lse)

    def run(self, query: Any, key: Any, value: Any, bias: Any, generator: Any) -> Tuple[Any, Any]:
        output = self._allocated(self._output)
        lse = None if self._lse is None else self._allocated(self._lse)
        addresses = (
            query.data_ptr(),
            key.data_ptr(),
            value.data_ptr(),
            output.data_ptr(),
            _address(lse),
            _address(bias),
        )
        self._run_with(_library.FORWARD_MEMORY, addresses, query, generator)
        return output, lse


class _KeptBackward(_Kept):
    def __init__(self, call: Call, backward_pass: BackwardPass, gradients: List[Any]):
        super().__init__("backward", backward_pass.described(), call.drops, call.query.value.device)
        self._gradients = [None if gradient is None else _layout(gradient) for gradient in gradients]

    def run(self, inputs: Inputs, bias: Any, b: Backward) -> List[Any]:
        gradients = [None if layout is None else self._allocated(layout) for layout in self._gradients]
        addresses = (
            b.grad.data_ptr(),
            b.output.data_ptr(),
            b.lse.data_ptr(),
            inputs.query.data_ptr(),
            inputs.key.data_ptr(),
            inputs.value.data_ptr(),
            *map(_address, gradients),
            _address(bias),
            _address(b.grad_lse),
        )
        self._run_with(_library.BACKWARD_MEMORY, addresses, inputs.query, b.generator)
        return gradients


_Table = Dict[Hashable, Any]
_kept: _Table = {}  # but for those of packed sequences, which live as long as their mask


def forward(inputs: Inputs, with_lse: bool, generator: Any) -> Tuple[Any, Any]:
    """Output and LSE, by Attune's choice of a kernel."""
    described = _described(inputs, with_lse)
    if described is None:
        return inputs.call().forward(with_lse, generator)
    description, bias, table = described
    kept = table.get(description)
    if kept is not None:
        return kept.run(inputs.query, inputs.key, inputs.value, bias, generator)
    call = inputs.call()
    results = call.forward(with_lse, generator)
    _keep(table, description, _KeptForward(call, *results))
    return results


def backward(inputs: Inputs, b: Backward) -> List[Any]:
    """Gradients of query, key, value and the bias tensor, None where not wanted, by Attune's choice of kernels."""
    given = (b.grad, b.output, b.lse) if b.grad_lse is None else (b.grad, b.output, b.lse, b.grad_lse)
    deterministic = b.deterministic or _tensor.torch_wants_determinism(inputs.query)
    described = _described(inputs, (b.wanted, deterministic), given)
    if described is None or (inputs.p and b.generator is None):  # the long way says that it has to be given
        return inputs.call().backward(b)
    description, bias, table = described
    kept = table.get(description)
    if kept is not None:
        return kept.run(inputs, bias, b)
    call = inputs.call()
    backward_pass = call.backward_pass(b)
    gradients = backward_pass.run()
    _keep(table, description, _KeptBackward(call, backward_pass, gradients))
    return gradients


def _keep(table: _Table, description: Hashable, kept: _Kept) -> None:
    if len(table) >= _MOST:
        table.clear()
    table[description] = kept


def _described(
    inputs: Inputs, asked: Hashable, given: Tuple[Any, ...] = ()
) -> Optional[Tuple[Hashable, Any, _Table]]:
    """All of a call but its memory, the tensor of its bias, and where the call is kept. `asked` tells one pass from
    another, `given` are the tensors that it takes besides the inputs. Nothing for calls of other frameworks, and for
    packed sequences on the CPU, whose tables are lists that may change."""
    try:
        return _description(inputs, asked, given)
    except (RuntimeError, TypeError, ValueError):
        return None  # a sparse tensor has no strides, say; the long way says what is wrong


def _description(
    inputs: Inputs, asked: Hashable, given: Tuple[Any, ...]
) -> Optional[Tuple[Hashable, Any, _Table]]:
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
    for tensor in given:
        if not is_torch_tensor(tensor) or tensor.is_neg():
            return None
    scale, dtype = inputs.scale, inputs.output_dtype
    description = (
        _library.library(),
        asked,
        mask,
        None if bias is None else _layout(bias),
        float(inputs.p),
        None if scale is None else float(scale),
        None if dtype is None else _tensor.dtype_name(dtype),
        inputs.is_partial,
        _layout(query),
        _layout(key),
        _layout(value),
        *map(_layout, given),
    )
    return description, bias, table


def _layout(tensor: Any) -> Layout:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _address(tensor: Any) -> int:
    return 0 if tensor is None else tensor.data_ptr()
