"""Where sequences stand that are packed on one axis: what the block-diagonal masks are made of.

Lengths and starts are lists, NumPy arrays or integer tensors. With torch tensors on a GPU nothing waits: sums are made
there, and only `seqstart_py`, `max_seqlen` and the like read them back.
"""

from __future__ import annotations

from typing import Any, Iterable, List, Optional, Sequence, Tuple

import numpy as np

from attune._numbers import whole
from attune._table import Table


class _SeqLenInfo:
    """Sequences one behind the other: sequence b has the rows [seqstart[b], seqstart[b + 1])."""

    def __init__(self, seqstart: Any, *, device: Any = None):
        """`seqstart`: [sequences + 1], from 0 on."""
        self.starts = one_axis("seqstart", seqstart, device)
        if len(self.starts.value) == 0:
            raise ValueError(f"{self.starts.name}: no elements, expected [sequences + 1]")

    @classmethod
    def from_seqlens(cls, seqlens: Any, *, device: Any = None) -> _SeqLenInfo:
        return cls(lengths_of("seqlens", seqlens, device).cumulated("seqstart"))

    def __len__(self) -> int:
        """The number of sequences."""
        return len(self.starts.value) - 1

    @property
    def seqstart(self) -> Any:
        """int32 [sequences + 1]: a NumPy array, or a torch tensor where lengths or `device` were torch's."""
        return self.starts.value

    @property
    def seqstart_py(self) -> List[int]:
        return self.starts.numbers().tolist()

    @property
    def max_seqlen(self) -> int:
        return int(self._lengths().max(initial=0))

    @property
    def min_seqlen(self) -> int:
        return int(min(self._lengths(), default=0))

    def intervals(self) -> Iterable[Tuple[int, int]]:
        """The rows [start, end) of each sequence."""
        starts = self.seqstart_py
        return zip(starts, starts[1:])

    def split(self, tensor: Any, batch_sizes: Optional[Sequence[int]] = None) -> List[Any]:
        """Views of a [1, rows, *] tensor: [1, M_i, *] each, or [B_i, M_i, *] where B_i sequences belong together."""
        starts = self.seqstart_py
        if tensor.shape[0] != 1 or tensor.shape[1] != starts[-1]:
            raise ValueError(
                f"Invalid tensor of shape {tuple(tensor.shape)}, expected [B, M, *] with B=1 and M={starts[-1]}"
            )
        pieces, first = [], 0
        for batch in [1] * len(self) if batch_sizes is None else batch_sizes:
            rows = tensor[:, starts[first] : starts[first + batch]]
            pieces.append(rows.reshape(batch, rows.shape[1] // max(batch, 1), *tensor.shape[2:]))
            first += batch
        return pieces

    def to(self, device: Any) -> _SeqLenInfo:
        """The same on another device."""
        return type(self)(self.starts.to(device))

    def __repr__(self) -> str:
        return f"{type(self).__name__}(seqstart={self.seqstart})"

    def _lengths(self) -> np.ndarray:
        return np.diff(self.starts.numbers())


class _WithLengths(_SeqLenInfo):
    """Sequences that start somewhere and have lengths of their own."""

    def __init__(self, seqstart: Any, seqlen: Any, *, device: Any = None):
        super().__init__(seqstart, device=device)
        self.lens = lengths_of("seqlen", seqlen, device)

    def __len__(self) -> int:
        return len(self.lens.value)

    @property
    def seqlen(self) -> Any:
        """int32 [sequences]: a NumPy array or a torch tensor, as `seqstart`."""
        return self.lens.value

    @property
    def seqlen_py(self) -> List[int]:
        return self.lens.numbers().tolist()

    def intervals(self) -> Iterable[Tuple[int, int]]:
        return ((start, start + length) for start, length in zip(self.seqstart_py, self.seqlen_py))

    def split(self, tensor: Any, batch_sizes: Optional[Sequence[int]] = None) -> List[Any]:
        """Views [1, M_i, *] of the rows that are in use."""
        if batch_sizes is not None:
            raise NotImplementedError(f"{type(self).__name__}.split with batch_sizes")
        return [tensor[:, start:end] for start, end in self.intervals()]

    def __repr__(self) -> str:
        return f"{type(self).__name__}(seqstart={self.seqstart}, seqlen={self.seqlen})"

    def _lengths(self) -> np.ndarray:
        return self.lens.numbers()


class _PaddedSeqLenInfo(_WithLengths):
    """Sequences in cells of one size: sequence b has the rows [b * padding, b * padding + seqlen[b])."""

    def __init__(self, seqlen: Any, padding: int, *, device: Any = None):
        lens = lengths_of("seqlen", seqlen, device)
        padding = whole("kv_padding", padding)
        if padding < 0:
            raise ValueError(f"kv_padding={padding}; expected 0 or more")
        super().__init__(lens.multiples("seqstart", padding, len(lens.value) + 1), lens)
        self.zeros = lens.multiples("seqstart", 0, len(lens.value))  # where the keys start in pages
        self.padding = padding
        for b, length in enumerate(lens.numbers() if lens.on_host else ()):
            if length > padding:
                raise ValueError(f"{lens.name}[{b}] is {length}, more than the padding of {padding}")

    @classmethod
    def from_seqlens(cls, seqlens: Any, *, device: Any = None) -> _SeqLenInfo:
        raise NotImplementedError("use from_seqlens_padded: padded sequences need a padding")

    @classmethod
    def from_seqlens_padded(cls, seqlens: Any, padding: int, *, device: Any = None) -> _PaddedSeqLenInfo:
        return cls(seqlens, padding, device=device)

    def to(self, device: Any) -> _PaddedSeqLenInfo:
        return type(self)(self.lens.to(device), self.padding)


class _GappySeqInfo(_WithLengths):
    """Sequences anywhere: sequence b has the rows [seqstart[b], seqstart[b] + seqlen[b]).

    In one tensor, `seqstart` is [sequences + 1] and ends with the number of rows; in pages, [sequences], each counted
    within the sequence's own row of pages.
    """

    @classmethod
    def from_seqlens(cls, seqlens: Any, *, device: Any = None) -> _SeqLenInfo:
        raise NotImplementedError("use from_seqlens_gappy: gappy sequences need their starts")

    @classmethod
    def from_seqlens_gappy(
        cls, seqstarts: Any, seqlens: Any, paged: bool = False, *, device: Any = None
    ) -> _GappySeqInfo:
        info = cls(seqstarts, seqlens, device=device)
        if len(info) == 0:
            raise ValueError("No elements: gappy sequences need one at least")
        expected = len(info) + (0 if paged else 1)
        if len(info.starts.value) != expected:
            raise ValueError(
                f"{info.starts.name} has {len(info.starts.value)} entries and {info.lens.name} {len(info)}; expected "
                + ("equally many" if paged else "one start more, the last being the number of rows")
            )
        if not paged and info.starts.on_host and info.lens.on_host:
            rows = info.seqstart_py[-1]
            for b, (start, end) in enumerate(info.intervals()):
                if not 0 <= start <= end <= rows:
                    raise ValueError(
                        f"block {b} has the keys [{start}, {end}), but there are {rows} key rows"
                    )
        return info

    def to(self, device: Any) -> _GappySeqInfo:
        return type(self)(self.starts.to(device), self.lens.to(device))


def one_axis(name: str, numbers: Any, device: Any) -> Table:
    """A table with one axis."""
    table = numbers if isinstance(numbers, Table) else Table(name, numbers, device)
    if table.value.ndim != 1:
        raise ValueError(f"{table.name}: shape {list(table.value.shape)}, expected one axis")
    return table


def lengths_of(name: str, seqlens: Any, device: Any) -> Table:
    """A table of lengths; what the host knows is checked."""
    lengths = one_axis(name, seqlens, device)
    for b, length in enumerate(lengths.numbers() if lengths.on_host else ()):
        if length < 0:
            raise ValueError(f"{lengths.name}[{b}] is {length}; expected 0 or more")
    return lengths
