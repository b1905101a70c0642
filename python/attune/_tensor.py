"""The caller's tensors as the C ABI takes them: NumPy arrays, torch tensors, and anything with DLPack.

Nothing is copied and torch is never imported unless a torch tensor was passed. Results are allocated in the caller's
framework: NumPy for NumPy and for other CPU tensors, torch for torch, the producer's own for other GPU tensors.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Callable, List, NamedTuple, Optional, Tuple

import numpy as np

from attune import _dlpack, _library

Shape = Tuple[int, ...]

_DTYPES = {
    "float32": _library.F32,
    "float16": _library.F16,
    "bfloat16": _library.BF16,
    "bool": _library.BOOLEAN,
    "int32": _library.I32,
}
_ITEM_BYTES = {_library.F32: 4, _library.F16: 2, _library.BF16: 2, _library.BOOLEAN: 1, _library.I32: 4}
_DLPACK_DTYPES = {
    (_dlpack.FLOAT, 32): "float32",
    (_dlpack.FLOAT, 16): "float16",
    (_dlpack.BFLOAT, 16): "bfloat16",
    (_dlpack.BOOLEAN, 8): "bool",
    (_dlpack.INTEGER, 32): "int32",
}
# What an argument may hold.
FLOATS = ("float32", "float16", "bfloat16")
BIASES = FLOATS + ("bool",)
LSES = ("float32",)
TABLES = ("int32",)
_DLPACK_DEVICES = {
    _dlpack.CPU: _library.CPU,
    _dlpack.CUDA_HOST: _library.CPU,
    _dlpack.CUDA: _library.CUDA,
    _dlpack.CUDA_MANAGED: _library.CUDA,
}


class Framework(NamedTuple):
    """What a tensor's framework is asked for, on the tensor's device."""

    empty: Callable[[Any, Shape, str], Any]  # an uninitialised tensor like this one, of a shape and dtype
    # Where its work is queued; None: the default stream.
    stream: Callable[[Any], Optional[int]] = lambda tensor: None


@dataclass
class View:
    """A tensor, how to pass it, and how to allocate more of its kind."""

    value: Any  # what the caller passed or gets
    c: _library.Tensor
    shape: Shape
    dtype: str  # "float16", a key of _DTYPES
    framework: Framework
    keep_alive: Any = None

    @property
    def device(self) -> Tuple[int, int]:
        """Type and index, as in the C ABI."""
        return self.c.device_type, self.c.device_index

    @property
    def stream(self) -> Optional[int]:
        return self.framework.stream(self.value)

    @property
    def rows(self) -> int:
        """The extent of the sequence axis."""
        return self.shape[1] if len(self.shape) > 1 else 0

    def along_first_axis(self) -> List[_library.Tensor]:
        """The tensors that are stacked in this one."""
        rank, step = self.c.rank, self.c.strides[0] * _ITEM_BYTES[self.c.dtype]
        pieces = []
        for index in range(self.shape[0]):
            piece = _library.Tensor.from_buffer_copy(self.c)
            piece.data = (self.c.data or 0) + index * step
            piece.rank = rank - 1
            piece.shape[: rank - 1] = self.c.shape[1:rank]
            piece.strides[: rank - 1] = self.c.strides[1:rank]
            pieces.append(piece)
        return pieces

    def empty(self, shape: Shape, dtype: str) -> Any:
        return self.framework.empty(self.value, shape, dtype)

    def empty_like(self, name: str, shape: Shape, dtype: Optional[str] = None) -> View:
        """A new contiguous tensor to write to."""
        view = view_of(name, self.empty(shape, dtype or self.dtype))
        if isinstance(view.keep_alive, _dlpack.Exchanged) and view.keep_alive.read_only:
            raise NotImplementedError(
                f"{name}: {type(view.value).__module__} makes read-only tensors; pass NumPy "
                "arrays or torch tensors"
            )
        return view


def view_of(name: str, tensor: Any, dtypes: Tuple[str, ...] = FLOATS) -> View:
    """The view of an argument called `name`, of one of these dtypes; TypeError when it is no tensor."""
    if isinstance(tensor, np.ndarray):
        view = _numpy_view
    elif is_torch_tensor(tensor):
        view = _torch_view
    elif is_tensor(tensor):
        view = _dlpack_view
    else:
        raise TypeError(
            f"{name}: expected a NumPy array, a torch tensor or an object with __dlpack__, got "
            f"{type(tensor).__name__}"
        )
    return view(name, tensor, dtypes)


def is_tensor(value: Any) -> bool:
    return isinstance(value, np.ndarray) or (
        hasattr(value, "__dlpack__") and hasattr(value, "__dlpack_device__")
    )


def is_torch_tensor(tensor: Any) -> bool:
    return _is_torch_class(type(tensor))


@lru_cache(maxsize=256)
def _is_torch_class(cls: type) -> bool:
    return any(base.__module__ == "torch" and base.__name__ == "Tensor" for base in cls.__mro__)


def torch_wants_determinism(tensor: Any) -> bool:
    """Is it torch's, under torch.use_deterministic_algorithms(True)?"""
    return is_torch_tensor(tensor) and sys.modules["torch"].are_deterministic_algorithms_enabled()


@lru_cache(maxsize=None)
def dtype_name(dtype: Any) -> str:
    """The name of a NumPy, ml_dtypes or torch dtype, "float16"."""
    if type(dtype).__module__ == "torch":
        return str(dtype).rpartition(".")[2]
    return np.dtype(dtype).name


def output_dtype_name(dtype: Any) -> str:
    try:
        return dtype_name(dtype)
    except TypeError:
        raise TypeError(
            f"output_dtype: expected a dtype of NumPy or torch, or its name, got {dtype!r}"
        ) from None


def lse_shape(shape: Shape) -> Shape:
    """[B, (G,) H, M] for an output [B, M, (G,) H, K]; [B, 1, M] for [B, M, K]."""
    heads = shape[2:-1] if len(shape) > 3 else (1,)
    return shape[:1] + heads + shape[1:2]


def dtype_code(name: str) -> int:
    """The C ABI's number of an output's dtype."""
    if name not in FLOATS:
        raise _dtype_refused("output_dtype", name, FLOATS)
    return _DTYPES[name]


def numpy_dtype(name: str) -> np.dtype:
    if name != "bfloat16":
        return np.dtype(name)
    try:
        import ml_dtypes
    except ImportError:
        raise NotImplementedError("NumPy has no bfloat16 of its own: install ml_dtypes") from None
    return np.dtype(ml_dtypes.bfloat16)


def _describe(
    name: str,
    data: int,
    dtype: str,
    device: Tuple[int, int],
    shape: Shape,
    strides: Shape,
    dtypes: Tuple[str, ...],
) -> _library.Tensor:
    if dtype not in dtypes:
        raise _dtype_refused(name, f"dtype {dtype}", dtypes)
    if len(shape) > _library.MAX_RANK:
        raise ValueError(f"{name}: rank {len(shape)}, expected [B, M, H, K], [B, M, K] or [B, M, G, H, K]")
    # Frameworks disagree on the strides of a tensor without elements; none of them means anything.
    if 0 in shape:
        strides = _row_major(shape)
    return _library.Tensor(data, _DTYPES[dtype], *device, len(shape), shape, strides)


def _dtype_refused(name: str, what: str, dtypes: Tuple[str, ...]) -> NotImplementedError:
    *others, last = dtypes
    usable = f"{', '.join(others)} or {last}" if others else last
    return NotImplementedError(f"{name}: {what} is not supported; use {usable}")


def _numpy_empty(_: Any, shape: Shape, dtype: str) -> np.ndarray:
    return np.empty(shape, numpy_dtype(dtype))


_NUMPY = Framework(_numpy_empty)


def _numpy_view(name: str, array: np.ndarray, dtypes: Tuple[str, ...]) -> View:
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(
            f"{name}: a masked array's mask would be ignored; pass its data, and hide keys by attn_bias"
        )
    if not array.dtype.isnative:
        raise ValueError(
            f"{name}: its bytes are in foreign order; convert it with astype(dtype.newbyteorder('='))"
        )
    if any(stride % array.itemsize for stride in array.strides):
        raise ValueError(
            f"{name}: strides {array.strides} in bytes are no multiple of the element size; make a "
            "contiguous copy"
        )
    strides = tuple(stride // array.itemsize for stride in array.strides)
    dtype = dtype_name(array.dtype)
    c = _describe(name, array.ctypes.data, dtype, (_library.CPU, 0), array.shape, strides, dtypes)
    return View(array, c, array.shape, dtype, _NUMPY)


def _torch_empty(tensor: Any, shape: Shape, dtype: str) -> Any:
    torch = sys.modules["torch"]
    return torch.empty(shape, dtype=getattr(torch, dtype), device=tensor.device)


def stream_of(device: Any) -> Callable[[], int]:
    """What tells torch's current stream of a device; 0 on the CPU."""
    if device.type != "cuda":
        return lambda: 0
    torch = sys.modules["torch"]
    quick = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # a tenth of the time, but not public
    if quick is not None:
        return partial(quick, device.index)
    return lambda: torch.cuda.current_stream(device).cuda_stream


def _torch_stream(tensor: Any) -> Optional[int]:
    return stream_of(tensor.device)() if tensor.is_cuda else None


_TORCH = Framework(_torch_empty, _torch_stream)


def _torch_view(name: str, tensor: Any, dtypes: Tuple[str, ...]) -> View:
    if tensor.is_nested:
        raise NotImplementedError(
            f"{name}: nested tensors are not supported; pack sequences with BlockDiagonalMask.from_tensor_list"
        )
    if tensor.layout is not sys.modules["torch"].strided:
        raise ValueError(f"{name}: layout {tensor.layout} is not supported, expected torch.strided")
    place = tensor.device
    if place.type == "cuda":
        device = (_library.CUDA, place.index)
    elif place.type == "cpu":
        device = (_library.CPU, 0)
    else:
        raise NotImplementedError(f"{name}: device {place} is not supported; use cpu or cuda")
    if tensor.is_neg():  # a lazily negated view holds the opposite sign
        tensor = tensor.detach().resolve_neg()
    shape, dtype = tuple(tensor.shape), dtype_name(tensor.dtype)
    c = _describe(name, tensor.data_ptr(), dtype, device, shape, tensor.stride(), dtypes)
    return View(tensor, c, shape, dtype, _TORCH)


def _dlpack_view(name: str, tensor: Any, dtypes: Tuple[str, ...]) -> View:
    device_type, device_index = tensor.__dlpack_device__()
    if device_type not in _DLPACK_DEVICES:
        raise NotImplementedError(
            f"{name}: DLPack device type {int(device_type)} is not supported; use the CPU or CUDA"
        )
    device = _DLPACK_DEVICES[device_type]
    on_gpu = device == _library.CUDA
    # 1 is CUDA's default stream: the producer makes its data ready there, and there the kernel runs.
    exchanged = _dlpack.Exchanged(tensor, stream=1 if on_gpu else None)
    t = exchanged.tensor
    shape = tuple(t.shape[: t.ndim])
    strides = tuple(t.strides[: t.ndim]) if t.strides else _row_major(shape)
    dtype = _DLPACK_DTYPES.get((t.code, t.bits)) if t.lanes == 1 else None
    if dtype is None:
        raise _dtype_refused(
            name, f"DLPack type code {t.code} with {t.bits} bits and {t.lanes} lanes", dtypes
        )
    data = (t.data or 0) + t.byte_offset
    c = _describe(name, data, dtype, (device, device_index if on_gpu else 0), shape, strides, dtypes)
    framework = Framework(partial(_producer_empty, name)) if on_gpu else _NUMPY
    return View(tensor, c, shape, dtype, framework, exchanged)


def _row_major(shape: Shape) -> Shape:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def _producer_empty(name: str, tensor: Any, shape: Shape, dtype: str) -> Any:
    module = tensor.__array_namespace__() if hasattr(tensor, "__array_namespace__") else None
    if not hasattr(module, "empty"):
        raise NotImplementedError(
            f"{name}: cannot allocate a result for {type(tensor).__module__}.{type(tensor).__name__}, which has no "
            "array namespace with empty(); pass torch tensors"
        )
    return module.empty(shape, dtype=getattr(module, dtype, dtype), device=tensor.device)
