"""The caller's tensors as the C ABI takes them: NumPy arrays, torch tensors, and anything with DLPack.

Nothing is copied and torch is never imported unless a torch tensor was passed. Results are allocated in the caller's
framework: NumPy for NumPy and for other CPU tensors, torch for torch, the producer's own for other GPU tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable, Optional, Tuple

import numpy as np

from attune import _dlpack, _library

Shape = Tuple[int, ...]

_DTYPES = {"float32": _library.F32, "float16": _library.F16, "bfloat16": _library.BF16}
_DLPACK_DTYPES = {
    (_dlpack.FLOAT, 32): "float32",
    (_dlpack.FLOAT, 16): "float16",
    (_dlpack.BFLOAT, 16): "bfloat16",
}
_DLPACK_DEVICES = {
    _dlpack.CPU: _library.CPU,
    _dlpack.CUDA_HOST: _library.CPU,
    _dlpack.CUDA: _library.CUDA,
    _dlpack.CUDA_MANAGED: _library.CUDA,
}


@dataclass
class View:
    """A tensor, how to pass it, and how to allocate more of its kind."""

    value: Any  # what the caller passed or gets
    c: _library.Tensor
    shape: Shape
    dtype: str  # "float32", "float16" or "bfloat16"
    empty: Callable[[Shape, str], Any]  # an uninitialised tensor on the same device, of a shape and dtype
    stream: Optional[int] = None
    keep_alive: Any = None

    def empty_like(self, name: str, shape: Shape, dtype: Optional[str] = None) -> View:
        """A new contiguous tensor to write to."""
        view = view_of(name, self.empty(shape, dtype or self.dtype))
        if isinstance(view.keep_alive, _dlpack.Exchanged) and view.keep_alive.read_only:
            raise NotImplementedError(
                f"{name}: {type(view.value).__module__} makes read-only tensors; pass NumPy "
                "arrays or torch tensors"
            )
        return view


def view_of(name: str, tensor: Any) -> View:
    """The view of an argument called `name`; TypeError when it is no tensor."""
    if isinstance(tensor, np.ndarray):
        return _numpy_view(name, tensor)
    if is_torch_tensor(tensor):
        return _torch_view(name, tensor)
    if hasattr(tensor, "__dlpack__") and hasattr(tensor, "__dlpack_device__"):
        return _dlpack_view(name, tensor)
    raise TypeError(
        f"{name}: expected a NumPy array, a torch tensor or an object with __dlpack__, got "
        f"{type(tensor).__name__}"
    )


def is_torch_tensor(tensor: Any) -> bool:
    return any(base.__module__ == "torch" and base.__name__ == "Tensor" for base in type(tensor).__mro__)


def dtype_name(dtype: Any) -> str:
    """The name of a NumPy, ml_dtypes or torch dtype, "float16"."""
    if type(dtype).__module__ == "torch":
        return str(dtype).rpartition(".")[2]
    return np.dtype(dtype).name


def numpy_dtype(name: str) -> np.dtype:
    if name != "bfloat16":
        return np.dtype(name)
    try:
        import ml_dtypes
    except ImportError:
        raise NotImplementedError("NumPy has no bfloat16 of its own: install ml_dtypes") from None
    return np.dtype(ml_dtypes.bfloat16)


def _describe(
    name: str, data: int, dtype: str, device: Tuple[int, int], shape: Shape, strides: Shape
) -> _library.Tensor:
    if dtype not in _DTYPES:
        raise NotImplementedError(f"{name}: dtype {dtype} is not supported; use float32, float16 or bfloat16")
    if len(shape) > _library.MAX_RANK:
        raise ValueError(f"{name}: rank {len(shape)}, expected [B, M, H, K] or [B, M, K]")
    c = _library.Tensor(
        data=data, dtype=_DTYPES[dtype], device_type=device[0], device_index=device[1], rank=len(shape)
    )
    c.shape[: len(shape)] = shape
    # Frameworks disagree on the strides of a tensor without elements; none of them means anything.
    c.strides[: len(shape)] = _row_major(shape) if 0 in shape else strides
    return c


def _numpy_empty(shape: Shape, dtype: str) -> np.ndarray:
    return np.empty(shape, numpy_dtype(dtype))


def _numpy_view(name: str, array: np.ndarray) -> View:
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
    dtype = array.dtype.name
    c = _describe(name, array.ctypes.data, dtype, (_library.CPU, 0), array.shape, strides)
    return View(array, c, array.shape, dtype, _numpy_empty)


def _torch_view(name: str, tensor: Any) -> View:
    import torch

    if tensor.layout != torch.strided:
        raise ValueError(f"{name}: layout {tensor.layout} is not supported, expected torch.strided")
    if tensor.device.type not in ("cpu", "cuda"):
        raise NotImplementedError(f"{name}: device {tensor.device} is not supported; use cpu or cuda")
    shape, dtype = tuple(tensor.shape), dtype_name(tensor.dtype)
    tensor = tensor.detach().resolve_neg()  # a lazily negated view holds the opposite sign
    on_gpu = tensor.is_cuda
    device = (_library.CUDA, tensor.device.index) if on_gpu else (_library.CPU, 0)
    c = _describe(name, tensor.data_ptr(), dtype, device, shape, tensor.stride())
    stream = torch.cuda.current_stream(tensor.device).cuda_stream if on_gpu else None
    return View(
        tensor,
        c,
        shape,
        dtype,
        lambda shape, dtype: torch.empty(shape, dtype=getattr(torch, dtype), device=tensor.device),
        stream,
    )


def _dlpack_view(name: str, tensor: Any) -> View:
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
        raise NotImplementedError(
            f"{name}: DLPack type code {t.code} with {t.bits} bits and {t.lanes} lanes is not "
            "supported; use float32, float16 or bfloat16"
        )
    c = _describe(
        name, (t.data or 0) + t.byte_offset, dtype, (device, device_index if on_gpu else 0), shape, strides
    )
    empty = _producer_empty(name, tensor) if on_gpu else _numpy_empty
    return View(tensor, c, shape, dtype, empty, keep_alive=exchanged)


def _row_major(shape: Shape) -> Shape:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def _producer_empty(name: str, tensor: Any) -> Callable[[Shape, str], Any]:
    def empty(shape: Shape, dtype: str) -> Any:
        module = tensor.__array_namespace__() if hasattr(tensor, "__array_namespace__") else None
        if not hasattr(module, "empty"):
            raise NotImplementedError(
                f"{name}: cannot allocate a result for {type(tensor).__module__}."
                f"{type(tensor).__name__}, which has no array namespace with empty(); pass torch "
                "tensors"
            )
        return module.empty(shape, dtype=getattr(module, dtype, dtype), device=tensor.device)

    return empty
