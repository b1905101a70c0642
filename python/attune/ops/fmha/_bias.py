"""What every bias reduces to: a window, blocks of packed sequences, a dense tensor."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Dict, Iterator, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from attune import _library, _tensor
from attune._numbers import whole
from attune._table import Table


class Window(NamedTuple):
    """How far from the diagonal a query sees; a negative reach is no bound."""

    anchor: int
    left: int
    right: int

    def sees(self, i: np.ndarray, j: np.ndarray, queries: int, keys: int) -> np.ndarray:
        """The predicate over broadcast indices within a block."""
        diagonal = i + (keys - queries if self.anchor == _library.BOTTOM_RIGHT else 0)
        left = self.left < 0 or j >= diagonal - self.left
        right = self.right < 0 or j <= diagonal + self.right
        return np.broadcast_to(left & right, np.broadcast_shapes(i.shape, j.shape))


_FAR = 2**40  # beyond any sequence, and within the C ABI's integers
EVERYTHING = Window(_library.TOP_LEFT, -1, -1)
CAUSAL = Window(_library.TOP_LEFT, -1, 0)
CAUSAL_FROM_BOTTOM_RIGHT = Window(_library.BOTTOM_RIGHT, -1, 0)


def last_keys(anchor: int, window_size: int) -> Window:
    """The last `window_size` keys, of which the query's own position is one."""
    size = whole("window_size", window_size)
    if size <= 0:
        raise ValueError(f"window_size is {size}. Expected `window_size > 0`: 1 is the diagonal alone")
    return Window(anchor, min(size, _FAR) - 1, 0)


def both_sides(window_left: int, window_right: int) -> Window:
    left, right = whole("window_left", window_left), whole("window_right", window_right)
    for name, reach in ("window_left", left), ("window_right", right):
        if reach < 0:
            raise ValueError(f"{name} is {reach}. Expected `{name} >= 0`")
    return Window(_library.BOTTOM_RIGHT, min(left, _FAR), min(right, _FAR))


class Blocks(NamedTuple):
    """Packed sequences as the C ABI takes them."""

    q_starts: Table
    k_starts: Table
    k_lens: Optional[Table] = None
    block_tables: Optional[Table] = None
    page_size: int = 0

    @property
    def count(self) -> int:
        return len(self.q_starts.value) - 1

    def intervals(self) -> Iterator[Tuple[int, int, np.ndarray]]:
        """The query rows [begin, end) and the key rows of each block."""
        q_starts, k_starts = self.q_starts.numbers(), self.k_starts.numbers()
        lengths = np.diff(k_starts) if self.k_lens is None else self.k_lens.numbers()
        for b, length in enumerate(lengths):
            logical = k_starts[b] + np.arange(length)
            rows = logical
            if self.block_tables is not None:
                pages = self.block_tables.numbers()[b]
                rows = pages[logical // self.page_size] * self.page_size + logical % self.page_size
            yield q_starts[b], q_starts[b + 1], rows

    def check_rows(self, queries: int, keys: int) -> None:
        """Raises ValueError where what the host knows does not fit tensors of so many rows. The library checks tables
        of the host too, but on a GPU it sees only their copies."""
        _check_total(self.q_starts, "query", queries)
        if self.block_tables is None:
            _check_total(self.k_starts, "key", keys)
        elif self.block_tables.on_host and self.k_starts.on_host and self.k_lens.on_host:
            self._check_pages(keys // self.page_size)

    def _check_pages(self, pages: int) -> None:
        tables = self.block_tables.numbers()
        begins = self.k_starts.numbers()[:, None]
        ends = begins + self.k_lens.numbers()[:, None]
        first_keys = np.arange(tables.shape[1])[None] * self.page_size
        used = (begins < ends) & (first_keys < ends) & (first_keys + self.page_size > begins)
        for b, column in np.argwhere(used & ((tables < 0) | (tables >= pages)))[:1]:
            raise ValueError(
                f"block_tables[{b}, {column}] is page {tables[b, column]}, but key has {pages} pages of "
                f"{self.page_size} rows"
            )


def _check_total(starts: Table, name: str, rows: int) -> None:
    if starts.on_host and starts.numbers()[-1] != rows:
        raise ValueError(f"the sequences have {starts.numbers()[-1]} rows together, but {name} has {rows}")


class AttentionBias:
    """Base class of what `attn_bias` takes besides tensors."""

    @property
    def _window(self) -> Window:
        raise NotImplementedError(f"attn_bias: {type(self).__name__} does not say which keys a query sees")

    _blocks: Optional[Blocks] = None  # none: a block is a batch entry
    _dense: Any = None  # a tensor that is added, or a boolean one

    @cached_property
    def _kept_calls(self) -> Dict[Any, Any]:
        """Of packed sequences; see _repeated.py."""
        return {}

    def __getstate__(self) -> Dict[str, Any]:
        """A copy keeps calls of its own: these are the library's, in this process."""
        return {name: value for name, value in self.__dict__.items() if name != "_kept_calls"}

    @property
    def _mask(self) -> AttentionBias:
        """The bias without its tensor: add_bias is the inverse."""
        return self

    def to(self, device: Any) -> AttentionBias:
        """The same bias with its tables on `device`, of the same type."""
        return self

    def add_bias(self, bias: Any) -> AttentionBias:
        """The same mask with a dense tensor on top.

        Additive (float32, float16 or bfloat16, whatever the query's dtype) or boolean (true is visible), of shape
        [B or 1, H or 1, Mq or 1, Mkv], [B or 1, Mq or 1, Mkv] or [Mq or 1, Mkv], any strides. With packed sequences Mq
        and Mkv are all query and key rows.
        """
        return _WithTensorBias(self, bias)

    def materialize(self, shape: Sequence[int], dtype: Any = None, device: Any = "cpu") -> Any:
        """The bias as a dense matrix: 0 where a query sees a key and -inf elsewhere, plus the tensor, if any.

        For debugging and tests: slow. `shape` is [*, queries, keys]; paged masks take rows of the key tensor as keys.
        The result is a torch tensor on `device` for a torch dtype, a NumPy array for a NumPy one. The default is
        torch.float32 in a program that has imported torch, else np.float32.
        """
        if len(shape) < 2:
            raise ValueError(f"shape {tuple(shape)}: expected [*, queries, keys]")
        dense = np.where(self._seen(*shape[-2:]), np.float32(0), np.float32(-np.inf))
        dense = np.broadcast_to(dense, shape)
        if self._dense is not None:
            dense = dense + _addend(self._dense, len(shape))
        torch = sys.modules.get("torch")
        if dtype is None:
            dtype = torch.float32 if torch else np.float32
        if type(dtype).__module__ == "torch":
            return torch.tensor(np.ascontiguousarray(dense), dtype=dtype, device=device)
        if str(device) != "cpu":
            raise ValueError(
                f"device {device}: NumPy arrays are on the CPU; pass a torch dtype for another device"
            )
        return dense.astype(dtype)

    def _seen(self, queries: int, keys: int) -> np.ndarray:
        """Boolean [queries, keys]."""
        blocks = self.to("cpu")._blocks
        if blocks is None:
            return self._window.sees(np.arange(queries)[:, None], np.arange(keys)[None], queries, keys)
        blocks.check_rows(queries, keys)
        seen = np.zeros((queries, keys), bool)
        for begin, end, rows in blocks.intervals():
            i, j = np.arange(end - begin)[:, None], np.arange(len(rows))[None]
            seen[begin:end, rows] = self._window.sees(i, j, end - begin, len(rows))
        return seen


def _addend(tensor: Any, rank: int) -> np.ndarray:
    """A bias tensor as something to add to scores of this rank."""
    if _tensor.is_torch_tensor(tensor):
        tensor = tensor.detach().cpu()
        tensor = tensor.float() if tensor.is_floating_point() else tensor  # NumPy has no bfloat16
    array = np.asarray(tensor)
    if array.dtype == bool:
        array = np.where(array, np.float32(0), np.float32(-np.inf))
    if array.ndim == 3 and rank > 3:  # [B or 1, Mq, Mkv]: no axes between
        array = array.reshape(array.shape[:1] + (1,) * (rank - 3) + array.shape[1:])
    return array.astype(np.float32)


@dataclass(frozen=True, eq=False)
class _WithTensorBias(AttentionBias):
    """A mask with a dense tensor on top."""

    mask: AttentionBias
    bias: Any

    def __post_init__(self):
        if self.mask._dense is not None:
            raise ValueError("add_bias: the mask has a tensor already; add the two and give their sum")

    @property
    def _window(self) -> Window:
        return self.mask._window

    @property
    def _blocks(self) -> Optional[Blocks]:
        return self.mask._blocks

    @property
    def _dense(self) -> Any:
        return self.bias

    @property
    def _mask(self) -> AttentionBias:
        return self.mask

    def to(self, device: Any) -> AttentionBias:
        return replace(self, mask=self.mask.to(device), bias=moved(self.bias, device))


def taken_apart(attn_bias: Any) -> Tuple[Any, Any]:
    """The mask and the tensor that an `attn_bias` holds, each None where there is none."""
    if isinstance(attn_bias, AttentionBias):
        return attn_bias._mask, attn_bias._dense
    return None, attn_bias


def put_together(mask: Any, tensor: Any) -> Any:
    """The inverse."""
    if mask is None or tensor is None:
        return tensor if mask is None else mask
    return mask.add_bias(tensor)


def moved(tensor: Any, device: Any) -> Any:
    return tensor.to(device) if _tensor.is_torch_tensor(tensor) else tensor
