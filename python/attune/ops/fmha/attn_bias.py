"""What attention's `attn_bias` takes: which keys a query sees, and what is added to its scores.

Every class of the documentation is a window over blocks of queries and keys. Query i of a block sees key j of it iff
i + s - left <= j <= i + s + right, with s = 0 (anchored at the top left) or keys - queries of the block (at the bottom
right). No mask is ever a matrix in memory, except in `materialize`.

Sequence lengths, starts and page tables may be lists, NumPy arrays or integer torch tensors. With torch tensors on a GPU
nothing waits and nothing is read back; what only a GPU knows is not checked, and wrong numbers there never write outside
the output. `device=` puts the tables on a device at once; otherwise the first call on a GPU copies them there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Callable, Iterator, List, Optional, Sequence, Tuple, Type

import numpy as np

from attune import _library, _tensor
from attune._numbers import whole
from attune._table import Table
from attune.ops.fmha._bias import (
    CAUSAL,
    CAUSAL_FROM_BOTTOM_RIGHT,
    EVERYTHING,
    AttentionBias,
    Blocks,
    Window,
    both_sides,
    last_keys,
    moved,
)
from attune.ops.fmha._seqinfo import _GappySeqInfo, _PaddedSeqLenInfo, _SeqLenInfo, lengths_of, one_axis

# ---- Masks of whole attention. s = keys - queries. ----


class LowerTriangularMask(AttentionBias):
    """j <= i: causal, anchored at the first query and the first key."""

    _window = CAUSAL

    def __init__(self, *, _subtensor: Any = None):
        """`_subtensor` is the documentation's and means nothing here."""

    def add_bias(self, bias: Any) -> LowerTriangularMaskWithTensorBias:
        """The same mask with a dense tensor on top; see AttentionBias.add_bias."""
        return LowerTriangularMaskWithTensorBias(bias)

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class LowerTriangularMaskWithTensorBias(LowerTriangularMask):
    """j <= i, and a dense tensor is added."""

    def __init__(self, bias: Any):
        self._dense = bias

    @property
    def _mask(self) -> AttentionBias:
        return LowerTriangularMask()

    def add_bias(self, bias: Any) -> LowerTriangularMaskWithTensorBias:
        raise ValueError("add_bias: the mask has a tensor already; add the two and give their sum")

    def to(self, device: Any) -> LowerTriangularMaskWithTensorBias:
        return LowerTriangularMaskWithTensorBias(moved(self._dense, device))

    def __repr__(self) -> str:
        return f"{type(self).__name__}(bias={self._dense!r})"


@dataclass(frozen=True)
class LowerTriangularFromBottomRightMask(AttentionBias):
    """j <= i + s: causal, anchored at the last query and the last key."""

    _window = CAUSAL_FROM_BOTTOM_RIGHT

    def make_local_attention(self, window_size: int) -> LowerTriangularFromBottomRightLocalAttentionMask:
        """The same, and only the last `window_size` keys, the diagonal included."""
        return LowerTriangularFromBottomRightLocalAttentionMask(window_size)


@dataclass(frozen=True)
class LowerTriangularFromBottomRightLocalAttentionMask(LowerTriangularFromBottomRightMask):
    """i + s - window_size < j <= i + s. The window counts the diagonal itself."""

    _window_size: int

    def __post_init__(self):
        self._window  # checks the reach

    @property
    def _window(self) -> Window:
        return last_keys(_library.BOTTOM_RIGHT, self._window_size)


@dataclass(frozen=True)
class LocalAttentionFromBottomRightMask(AttentionBias):
    """i + s - window_left <= j <= i + s + window_right."""

    window_left: int
    window_right: int

    def __post_init__(self):
        self._window  # checks the reach

    @property
    def _window(self) -> Window:
        return both_sides(self.window_left, self.window_right)


# ---- Masks of packed sequences: batch 1, all sequences on the sequence axis ----


@dataclass(eq=False)
class _SequenceMask(AttentionBias):
    """What the block-diagonal classes share: queries of block b see keys of block b at most."""

    q_seqinfo: _SeqLenInfo
    k_seqinfo: _SeqLenInfo

    _window = EVERYTHING

    def __post_init__(self):
        if len(self.q_seqinfo) != len(self.k_seqinfo):
            raise ValueError(
                f"{type(self).__name__}: {len(self.q_seqinfo)} blocks of queries, but {len(self.k_seqinfo)} of keys"
            )

    @property
    def _blocks(self) -> Blocks:
        return Blocks(self.q_seqinfo.starts, self.k_seqinfo.starts, getattr(self.k_seqinfo, "lens", None))

    def to(self, device: Any) -> AttentionBias:
        q = self.q_seqinfo.to(device)
        # One object for both says that queries and keys have the same lengths: split() goes by it.
        k = q if self.k_seqinfo is self.q_seqinfo else self.k_seqinfo.to(device)
        return replace(self, q_seqinfo=q, k_seqinfo=k)


@dataclass(eq=False)
class BlockDiagonalMask(_SequenceMask):
    """Queries of block b see the keys of block b.

    query [1, sum of q_seqlen, H, K], key [1, sum of kv_seqlen, H, K], value [1, sum of kv_seqlen, H, Kv].
    """

    _batch_sizes: Optional[Sequence[int]] = None  # of the tensors that were concatenated

    @classmethod
    def from_seqlens(
        cls, q_seqlen: Sequence[int], kv_seqlen: Optional[Sequence[int]] = None, *, device: Any = None
    ) -> BlockDiagonalMask:
        """From the lengths of each block; `kv_seqlen` defaults to `q_seqlen`. Raises ValueError for unequal counts and
        negative lengths."""
        q = _packed("q_seqlen", q_seqlen, device)
        alike = (
            isinstance(q_seqlen, (list, tuple))
            and type(q_seqlen) is type(kv_seqlen)
            and q_seqlen == kv_seqlen
        )
        if kv_seqlen is None or alike:
            return cls(q, q)
        return cls(q, _packed("kv_seqlen", kv_seqlen, device))

    @classmethod
    def from_tensor_list(cls, tensors: Sequence[Any]) -> Tuple[BlockDiagonalMask, Any]:
        """Concatenates tensors [B_i, M_i, *] to one of [1, sum of B_i * M_i, *]; each batch row becomes a block.
        `split` is the inverse."""
        batch_sizes, info, packed = _concatenated(tensors)
        return cls(info, info, _batch_sizes=batch_sizes), packed

    @classmethod
    def from_tensor_lists_qkv(
        cls, tensors_q: Sequence[Any], tensors_k: Sequence[Any], tensors_v: Optional[Sequence[Any]] = None
    ) -> Tuple[BlockDiagonalMask, Any, Any, Optional[Any]]:
        """The same for queries and keys of different lengths, and values beside the keys if given."""
        batch_sizes, q_info, query = _concatenated(tensors_q)
        k_batch_sizes, k_info, key = _concatenated(tensors_k)
        if batch_sizes != k_batch_sizes:
            raise ValueError(f"tensors_q have batch sizes {batch_sizes}, but tensors_k {k_batch_sizes}")
        value = None
        if tensors_v is not None:
            if [x.shape[:2] for x in tensors_k] != [x.shape[:2] for x in tensors_v]:
                raise ValueError("tensors_k and tensors_v differ in batch size or length")
            value = _concatenated(tensors_v)[2]
        return cls(q_info, k_info, _batch_sizes=batch_sizes), query, key, value

    def split(self, tensor: Any) -> List[Any]:
        """Views [B_i, M_i, *] of a tensor [1, total, *]: the inverse of from_tensor_list."""
        if self.q_seqinfo is not self.k_seqinfo:
            raise ValueError("split: queries and keys have their own lengths; use split_queries or split_kv")
        return self.split_queries(tensor)

    def split_queries(self, tensor: Any) -> List[Any]:
        """Views [B_i, Mq_i, *] of a tensor [1, total, *] of query rows."""
        return self.q_seqinfo.split(tensor, self._batch_sizes)

    def split_kv(self, tensor: Any) -> List[Any]:
        """Views [B_i, Mkv_i, *] of a tensor [1, total, *] of key rows."""
        return self.k_seqinfo.split(tensor, self._batch_sizes)

    def make_causal(self) -> BlockDiagonalCausalMask:
        """Each block causal from its top left."""
        return self._as(BlockDiagonalCausalMask)

    def make_causal_from_bottomright(self) -> BlockDiagonalCausalFromBottomRightMask:
        """Each block causal from its bottom right, perhaps after a prefix that every query sees."""
        return self._as(BlockDiagonalCausalFromBottomRightMask)

    def make_local_attention(self, window_size: int) -> BlockDiagonalCausalLocalAttentionMask:
        """Each block causal from its top left, and only the last `window_size` keys."""
        return self._as(BlockDiagonalCausalLocalAttentionMask, _window_size=window_size)

    def make_local_attention_from_bottomright(
        self, window_size: int
    ) -> BlockDiagonalCausalLocalAttentionFromBottomRightMask:
        """Each block causal from its bottom right, and only the last `window_size` keys."""
        return self._as(BlockDiagonalCausalLocalAttentionFromBottomRightMask, _window_size=window_size)

    def _as(self, cls: Type[BlockDiagonalMask], **window: int) -> Any:
        return cls(self.q_seqinfo, self.k_seqinfo, self._batch_sizes, **window)

    def _block_lengths(self) -> Iterator[Tuple[int, int, int]]:
        """(block, queries, keys), where the host knows them."""
        q, k = self.q_seqinfo.starts, self.k_seqinfo.starts
        if q.on_host and k.on_host:
            lengths = zip(np.diff(q.numbers()).tolist(), np.diff(k.numbers()).tolist())
            yield from ((b, *pair) for b, pair in enumerate(lengths))


@dataclass(eq=False)
class BlockDiagonalCausalMask(BlockDiagonalMask):
    """Same block and j <= i."""

    _window = CAUSAL


@dataclass(eq=False)
class BlockDiagonalCausalFromBottomRightMask(BlockDiagonalMask):
    """Same block and j <= i + s. Raises ValueError where a block has fewer keys than queries."""

    _window = CAUSAL_FROM_BOTTOM_RIGHT

    def __post_init__(self):
        super().__post_init__()
        for b, queries, keys in self._block_lengths():
            if keys < queries:
                raise ValueError(
                    f"Block #{b} has num_keys={keys} and num_queries={queries}. Expected `num_keys >= num_queries`: "
                    f"the first {queries - keys} queries would see no key"
                )


@dataclass(eq=False)
class BlockDiagonalCausalLocalAttentionMask(BlockDiagonalCausalMask):
    """Same block and i - window_size < j <= i. Raises RuntimeError where a query would see no key."""

    _window_size: int = 0

    def __post_init__(self):
        super().__post_init__()
        self._window  # checks the reach
        for _, queries, keys in self._block_lengths():
            if queries - self._window_size >= keys:
                raise RuntimeError(
                    f"No keys are attended in q_seqlen {queries} k_seqlen {keys} with sliding window "
                    f"{self._window_size}"
                )

    @property
    def _window(self) -> Window:
        return last_keys(_library.TOP_LEFT, self._window_size)


@dataclass(eq=False)
class BlockDiagonalCausalLocalAttentionFromBottomRightMask(BlockDiagonalCausalFromBottomRightMask):
    """Same block and i + s - window_size < j <= i + s. Raises ValueError where a block has fewer keys than queries."""

    _window_size: int = 0

    def __post_init__(self):
        super().__post_init__()
        self._window  # checks the reach

    @property
    def _window(self) -> Window:
        return last_keys(_library.BOTTOM_RIGHT, self._window_size)


def _packed(name: str, seqlens: Any, device: Any) -> _SeqLenInfo:
    return _SeqLenInfo.from_seqlens(lengths_of(name, seqlens, device))


def _concatenated(tensors: Sequence[Any]) -> Tuple[List[int], _SeqLenInfo, Any]:
    """Batch sizes, lengths of all batch rows, and [1, rows, *]."""
    if len(tensors) == 0:
        raise ValueError("no tensors to concatenate")
    first = tensors[0]
    for i, x in enumerate(tensors):
        if x.ndim < 2:
            raise ValueError(f"tensors[{i}]: shape {list(x.shape)}, expected [B, M, *]")
    batch_sizes = [x.shape[0] for x in tensors]
    lengths = [x.shape[1] for x in tensors for _ in range(x.shape[0])]
    rows = [x.reshape(1, x.shape[0] * x.shape[1], *x.shape[2:]) for x in tensors]
    if not _tensor.is_torch_tensor(first):
        return batch_sizes, _SeqLenInfo.from_seqlens(lengths), np.concatenate(rows, axis=1)
    import torch

    return batch_sizes, _SeqLenInfo.from_seqlens(lengths, device=first.device), torch.cat(rows, dim=1)


# ---- Keys in padded cells ----


@dataclass(eq=False)
class BlockDiagonalPaddedKeysMask(_SequenceMask):
    """Block b's keys are the rows [b * padding, b * padding + kv_seqlen[b]); the rest of the cell is never looked at.

    query [1, sum of q_seqlen, H, K], key [1, blocks * padding, H, K], value [1, blocks * padding, H, Kv].
    """

    k_seqinfo: _PaddedSeqLenInfo

    @classmethod
    def from_seqlens(
        cls,
        q_seqlen: Sequence[int],
        kv_padding: int,
        kv_seqlen: Sequence[int],
        causal_diagonal: Any = None,
        *,
        device: Any = None,
    ) -> BlockDiagonalPaddedKeysMask:
        """`kv_padding`: rows of a cell, at least the longest of `kv_seqlen`. `causal_diagonal` is the documentation's
        and means nothing."""
        return cls(*_padded(q_seqlen, kv_padding, kv_seqlen, device))

    def make_paged(
        self, block_tables: Any, page_size: int, paged_type: Optional[Callable[..., _PagedMask]] = None
    ) -> _PagedMask:
        """The same lengths behind a page table [blocks, pages of a row]; causality and windows stay unless `paged_type`
        is given."""
        paged_type = paged_type or self._paged_type
        return paged_type(self.q_seqinfo, *_in_pages(self.k_seqinfo.lens, block_tables, page_size), page_size)

    def make_local_attention(
        self, window_left: int, window_right: int
    ) -> BlockDiagonalLocalAttentionPaddedKeysMask:
        """The same, and i + s - window_left <= j <= i + s + window_right."""
        return BlockDiagonalLocalAttentionPaddedKeysMask(
            self.q_seqinfo, self.k_seqinfo, window_left, window_right
        )

    @property
    def _paged_type(self) -> Callable[..., _PagedMask]:
        return partial(PagedBlockDiagonalPaddedKeysMask, _local=self._window)


@dataclass(eq=False)
class BlockDiagonalCausalWithOffsetPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    """And j <= i + s."""

    causal_diagonal: Any = None  # the documentation's, means nothing

    _window = CAUSAL_FROM_BOTTOM_RIGHT

    @property
    def _paged_type(self) -> Callable[..., _PagedMask]:
        return PagedBlockDiagonalCausalWithOffsetPaddedKeysMask


class _LocalPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    """Padded keys and a window, which from_seqlens has no arguments for."""

    def __post_init__(self):
        super().__post_init__()
        self._window  # checks the reach

    @classmethod
    def from_seqlens(cls, *arguments: Any, **keywords: Any) -> BlockDiagonalPaddedKeysMask:
        raise NotImplementedError(f"{cls.__name__} needs a window: use from_seqlens_local")


@dataclass(eq=False)
class BlockDiagonalLocalAttentionPaddedKeysMask(_LocalPaddedKeysMask):
    """And i + s - window_left <= j <= i + s + window_right."""

    window_left: int
    window_right: int

    @classmethod
    def from_seqlens_local(
        cls,
        q_seqlen: Sequence[int],
        kv_padding: int,
        kv_seqlen: Sequence[int],
        window_left: int,
        window_right: int,
        *,
        device: Any = None,
    ) -> BlockDiagonalLocalAttentionPaddedKeysMask:
        return cls(*_padded(q_seqlen, kv_padding, kv_seqlen, device), window_left, window_right)

    @property
    def _window(self) -> Window:
        return both_sides(self.window_left, self.window_right)


@dataclass(eq=False)
class BlockDiagonalCausalLocalAttentionPaddedKeysMask(_LocalPaddedKeysMask):
    """And i + s - window_size < j <= i + s."""

    _window_size: int

    @classmethod
    def from_seqlens_local(
        cls,
        q_seqlen: Sequence[int],
        kv_padding: int,
        kv_seqlen: Sequence[int],
        window_size: int,
        *,
        device: Any = None,
    ) -> BlockDiagonalCausalLocalAttentionPaddedKeysMask:
        return cls(*_padded(q_seqlen, kv_padding, kv_seqlen, device), window_size)

    @property
    def _window(self) -> Window:
        return last_keys(_library.BOTTOM_RIGHT, self._window_size)


def _padded(
    q_seqlen: Any, kv_padding: int, kv_seqlen: Any, device: Any
) -> Tuple[_SeqLenInfo, _PaddedSeqLenInfo]:
    kv_lens = lengths_of("kv_seqlen", kv_seqlen, device)
    return _packed("q_seqlen", q_seqlen, device), _PaddedSeqLenInfo(kv_lens, kv_padding)


# ---- Keys anywhere ----


@dataclass(eq=False)
class BlockDiagonalGappyKeysMask(_SequenceMask):
    """Block b's keys are the rows [kv_seqstarts[b], kv_seqstarts[b] + kv_seqlen[b]); blocks may overlap, and what lies
    between them is never looked at.

    query [1, sum of q_seqlen, H, K], key [1, kv_seqstarts[-1], H, K], value [1, kv_seqstarts[-1], H, Kv].
    """

    k_seqinfo: _GappySeqInfo

    @classmethod
    def from_seqlens(
        cls,
        q_seqlen: Sequence[int],
        kv_seqstarts: Sequence[int],
        kv_seqlen: Sequence[int],
        *,
        device: Any = None,
    ) -> BlockDiagonalGappyKeysMask:
        """`kv_seqstarts` has one entry more than there are blocks: the number of key rows."""
        q, k = _gappy(q_seqlen, kv_seqstarts, kv_seqlen, False, device)
        return cls(q, k)

    def make_paged(
        self,
        block_tables: Any,
        page_size: int,
        notional_padding: int,
        paged_type: Optional[Type[PagedBlockDiagonalGappyKeysMask]] = None,
    ) -> PagedBlockDiagonalGappyKeysMask:
        """Reads block b as living in the cell [b * notional_padding, (b + 1) * notional_padding) of logical keys, which a
        page table [blocks, pages of a row] maps to rows. Causality stays unless `paged_type` is given."""
        table = _page_table(block_tables, page_size)
        if whole("notional_padding", notional_padding) % page_size:
            raise ValueError(
                f"notional_padding={notional_padding} should be divisible by page_size={page_size}"
            )
        starts = self.k_seqinfo.starts.within_cells(notional_padding, len(self.k_seqinfo))
        paged_type = paged_type or self._paged_type
        return paged_type(self.q_seqinfo, _GappySeqInfo(starts, self.k_seqinfo.lens), table, page_size)

    @property
    def _paged_type(self) -> Type[PagedBlockDiagonalGappyKeysMask]:
        return PagedBlockDiagonalGappyKeysMask


@dataclass(eq=False)
class BlockDiagonalCausalWithOffsetGappyKeysMask(BlockDiagonalGappyKeysMask):
    """And j <= i + s."""

    _window = CAUSAL_FROM_BOTTOM_RIGHT

    @property
    def _paged_type(self) -> Type[PagedBlockDiagonalGappyKeysMask]:
        return PagedBlockDiagonalCausalWithOffsetGappyKeysMask


def _gappy(
    q_seqlen: Any, kv_seqstarts: Any, kv_seqlen: Any, paged: bool, device: Any
) -> Tuple[_SeqLenInfo, _GappySeqInfo]:
    k_starts = one_axis("kv_seqstarts", kv_seqstarts, device)
    k_lens = lengths_of("kv_seqlen", kv_seqlen, device)
    return _packed("q_seqlen", q_seqlen, device), _GappySeqInfo.from_seqlens_gappy(k_starts, k_lens, paged)


# ---- Keys in pages ----


@dataclass(eq=False)
class _PagedMask(_SequenceMask):
    """Logical key t of block b is the row block_tables[b, t // page_size] * page_size + t % page_size.

    key and value [1, pages * page_size, (G,) H, K]; a page may belong to several blocks, and entries of the table beyond a
    block's keys are never used.
    """

    block_tables: Any  # int32 [blocks, pages of a row]
    page_size: int

    def __post_init__(self):
        super().__post_init__()
        self._table = _page_table(self.block_tables, self.page_size)
        self.block_tables = self._table.value
        shape = list(self.block_tables.shape)
        if shape[0] != len(self.q_seqinfo):
            raise ValueError(f"block_tables: shape {shape}, expected [{len(self.q_seqinfo)}, pages of a row]")
        self._check_keys(shape[1] * self.page_size)

    def to(self, device: Any) -> _PagedMask:
        return replace(super().to(device), block_tables=self._table.to(device))

    @property
    def _blocks(self) -> Blocks:
        return Blocks(self.q_seqinfo.starts, self._k_starts, self.k_seqinfo.lens, self._table, self.page_size)

    def _check_keys(self, limit: int) -> None:
        """Do the keys of each block lie within its row of pages? As far as the host knows."""
        starts, lengths = self._k_starts, self.k_seqinfo.lens
        if not (starts.on_host and lengths.on_host):
            return
        for b, (start, length) in enumerate(zip(starts.numbers().tolist(), lengths.numbers().tolist())):
            if not 0 <= start <= start + length <= limit:
                raise ValueError(
                    f"block {b} has the logical keys [{start}, {start + length}), but its row of block_tables has "
                    f"{limit} ({self.block_tables.shape[1]} pages of {self.page_size})"
                )


@dataclass(eq=False)
class PagedBlockDiagonalPaddedKeysMask(_PagedMask):
    """Block b's keys are the first kv_seqlen[b] logical keys of its pages."""

    k_seqinfo: _PaddedSeqLenInfo
    _local: Window = EVERYTHING  # of the padded mask that it was made from

    @classmethod
    def from_seqlens(
        cls,
        q_seqlen: Sequence[int],
        kv_seqlen: Sequence[int],
        block_tables: Any,
        page_size: int,
        *,
        device: Any = None,
    ) -> PagedBlockDiagonalPaddedKeysMask:
        """`block_tables`: int32 [blocks, pages of a row]; `page_size`: keys of a page."""
        kv_lens = lengths_of("kv_seqlen", kv_seqlen, device)
        q = _packed("q_seqlen", q_seqlen, device)
        return cls(q, *_in_pages(kv_lens, block_tables, page_size, device), page_size)

    @property
    def _window(self) -> Window:
        return self._local

    @property
    def _k_starts(self) -> Table:
        return self.k_seqinfo.zeros


@dataclass(eq=False)
class PagedBlockDiagonalCausalWithOffsetPaddedKeysMask(PagedBlockDiagonalPaddedKeysMask):
    """And j <= i + s."""

    _window = CAUSAL_FROM_BOTTOM_RIGHT


def _in_pages(
    kv_lens: Table, block_tables: Any, page_size: int, device: Any = None
) -> Tuple[_PaddedSeqLenInfo, Table]:
    table = _page_table(block_tables, page_size, device)
    return _PaddedSeqLenInfo(kv_lens, table.value.shape[1] * page_size), table


def _page_table(block_tables: Any, page_size: int, device: Any = None) -> Table:
    """The table of pages of this size, whatever the number of blocks."""
    if whole("page_size", page_size) <= 0:
        raise ValueError(f"page_size={page_size}; expected 1 or more")
    table = block_tables if isinstance(block_tables, Table) else Table("block_tables", block_tables, device)
    if table.value.ndim != 2:
        raise ValueError(f"block_tables: shape {list(table.value.shape)}, expected [blocks, pages of a row]")
    return table


@dataclass(eq=False)
class PagedBlockDiagonalGappyKeysMask(_PagedMask):
    """Block b's keys are the logical keys [kv_seqstarts[b], kv_seqstarts[b] + kv_seqlen[b]) of its own pages."""

    k_seqinfo: _GappySeqInfo

    @classmethod
    def from_seqlens(
        cls,
        q_seqlen: Sequence[int],
        kv_seqstarts: Sequence[int],
        kv_seqlen: Sequence[int],
        block_tables: Any,
        page_size: int,
        *,
        device: Any = None,
    ) -> PagedBlockDiagonalGappyKeysMask:
        """`kv_seqstarts`: as many as blocks, each counted within the block's own row of pages. `block_tables`: int32
        [blocks, pages of a row]; `page_size`: keys of a page."""
        q, k = _gappy(q_seqlen, kv_seqstarts, kv_seqlen, True, device)
        return cls(q, k, Table("block_tables", block_tables, device), page_size)

    @property
    def _k_starts(self) -> Table:
        return self.k_seqinfo.starts


@dataclass(eq=False)
class PagedBlockDiagonalCausalWithOffsetGappyKeysMask(PagedBlockDiagonalGappyKeysMask):
    """And j <= i + s."""

    _window = CAUSAL_FROM_BOTTOM_RIGHT
