"""int32 numbers that belong to a bias: lengths, starts, page tables."""

from __future__ import annotations

import sys
from functools import cached_property
from typing import Any, Dict, Tuple

import numpy as np

from attune import _library, _tensor

Device = Tuple[int, int]  # type and index, as in the C ABI


class Table:
    """Numbers that the host knows, or that are on a GPU, or both.

    Lists, NumPy arrays and torch tensors on the CPU are numbers of the host; the first call on a GPU copies them
    there, once, and waits for that copy. torch tensors on a GPU are used as they are: only `numbers()` reads them.
    """

    def __init__(self, name: str, numbers: Any, device: Any = None):
        self.name = name  # for messages: the argument that it came from
        self._views: Dict[Device, _tensor.View] = {}
        from_torch = _tensor.is_torch_tensor(numbers)
        if from_torch and numbers.is_cuda and not str(device).startswith("cpu"):
            self._host = None
            self.value = _int32_tensor(name, numbers, device)
            return
        self.value = self._host = _int32_array(name, numbers.cpu() if from_torch else numbers)
        if from_torch or device not in (None, "cpu"):
            import torch

            self.value = torch.from_numpy(self._host).to(device or "cpu")

    def __getstate__(self) -> Dict[str, Any]:
        """A copy makes views of its own: they hold addresses."""
        return {**self.__dict__, "_views": {}}

    @property
    def on_host(self) -> bool:
        """Are the numbers known without asking a GPU?"""
        return self._host is not None

    def numbers(self) -> np.ndarray:
        """The numbers; waits for the GPU where only that has them."""
        return self._host if self.on_host else self.value.cpu().numpy()

    @cached_property
    def common_divisor(self) -> int:
        """The largest number that divides all, as far as the host knows: 1 where it knows none, 0 of zeros."""
        return int(np.gcd.reduce(self._host)) if self.on_host else 1

    def to(self, device: Any) -> Table:
        """The same numbers on `device`, in the same framework or, on a GPU, in torch."""
        if not self.on_host:
            return Table(self.name, self.value, device)
        if self._home() is None:
            return Table(self.name, self._host, device)
        import torch

        return Table(self.name, torch.from_numpy(self._host), device)

    def cumulated(self, name: str) -> Table:
        """[0, n0, n0 + n1, ...] of lengths, where they are."""
        if self.on_host:
            starts = np.concatenate(([0], np.cumsum(self._host, dtype=np.int64)))
            return Table(name, starts, self._home())
        import torch

        return Table(name, torch.nn.functional.pad(torch.cumsum(self.value, 0, dtype=torch.int32), (1, 0)))

    def multiples(self, name: str, step: int, count: int) -> Table:
        """[0, step, 2 * step, ...]: known to the host, and where this table is, without waiting."""
        table = Table(name, np.arange(count, dtype=np.int64) * step)
        if self._home() is not None:
            import torch

            table.value = torch.arange(count, dtype=torch.int32, device=self._home()) * step
        return table

    def within_cells(self, cell: int, count: int) -> Table:
        """The first `count` numbers, entry b less b * cell."""
        cells = self.multiples(self.name, cell, count)
        if self.on_host:
            return Table(self.name, self._host[:count] - cells._host, self._home())
        return Table(self.name, self.value[:count] - cells.value)

    def _home(self) -> Any:
        """The device of a torch tensor, None for NumPy."""
        return self.value.device if _tensor.is_torch_tensor(self.value) else None

    def c_on(self, device: Device) -> _library.Tensor:
        """How to pass the table to a call on `device`. One that is elsewhere alone is passed as it is: the library
        refuses it."""
        view = self._views.get(device)
        if view is None:
            value = self.value
            if self.on_host and device[0] == _library.CPU:
                value = self._host
            elif self.on_host and "torch" in sys.modules:
                value = self._copied_to(device[1])
            view = self._views[device] = _tensor.view_of(self.name, value, _tensor.TABLES)
        return view.c

    def _copied_to(self, index: int) -> Any:
        import torch

        target = torch.device("cuda", index)
        if _tensor.is_torch_tensor(self.value) and self.value.device == target:
            return self.value
        if torch.cuda.is_current_stream_capturing():
            raise _library.EnvironmentFailure(
                f"{self.name}: the bias is not on {target} yet, and the stream is being captured into a graph; "
                f"use bias.to('{target}') before the capture"
            )
        return torch.from_numpy(self._host).to(target)


def _int32_tensor(name: str, tensor: Any, device: Any) -> Any:
    import torch

    if tensor.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: expected integers, got {tensor.dtype}")
    return tensor.detach().to(device or tensor.device, torch.int32).contiguous()


def _int32_array(name: str, numbers: Any) -> np.ndarray:
    try:
        array = np.asarray(numbers)
    except ValueError as error:  # lists of different lengths
        raise ValueError(f"{name}: {error}") from None
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(f"{name}: expected integers, got {array.dtype}")
    limits = np.iinfo(np.int32)
    if array.size and not limits.min <= array.min() <= array.max() <= limits.max:
        raise ValueError(f"{name}: its numbers reach from {array.min()} to {array.max()}; the limit is 2^29")
    return np.asarray(array, dtype=np.int32, order="C")
