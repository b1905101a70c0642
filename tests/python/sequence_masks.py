"""One mask of each block-diagonal class over the same lengths, for the tests that walk all of them."""

import numpy as np

from attune.ops.fmha import attn_bias as ab

Q_SEQLEN, KV_SEQLEN = [5, 1, 0, 30, 7], [9, 1, 4, 33, 40]
PADDING, PAGE_SIZE, PAGES = 40, 8, 5
GAPPY_STARTS = [60, 0, 20, 21, 90, 133]  # out of order, with overlaps and gaps
STARTS_IN_ROW = [3, 0, 7, 2, 0]


def block_tables():
    """Pages in random order; one more physical page than is used."""
    return np.random.default_rng(0).permutation(len(Q_SEQLEN) * PAGES + 1)[:-1].reshape(-1, PAGES)


def make_all(lengths=lambda numbers: numbers, **device):
    """{class name: (mask, key rows)}; `lengths` turns each list into what the constructors are given."""
    q, kv, tables = lengths(Q_SEQLEN), lengths(KV_SEQLEN), lengths(block_tables().tolist())
    plain = ab.BlockDiagonalMask.from_seqlens(q, kv, **device)
    padded, paged = (q, PADDING, kv), (q, kv, tables, PAGE_SIZE)
    gappy = (q, lengths(GAPPY_STARTS), kv)
    paged_gappy = (q, lengths(STARTS_IN_ROW), kv, tables, PAGE_SIZE)
    masks = [
        plain,
        plain.make_causal(),
        plain.make_causal_from_bottomright(),
        plain.make_local_attention(6),
        plain.make_local_attention_from_bottomright(6),
        ab.BlockDiagonalPaddedKeysMask.from_seqlens(*padded, **device),
        ab.BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(*padded, **device),
        ab.BlockDiagonalLocalAttentionPaddedKeysMask.from_seqlens_local(*padded, 4, 3, **device),
        ab.BlockDiagonalCausalLocalAttentionPaddedKeysMask.from_seqlens_local(*padded, 6, **device),
        ab.BlockDiagonalGappyKeysMask.from_seqlens(*gappy, **device),
        ab.BlockDiagonalCausalWithOffsetGappyKeysMask.from_seqlens(*gappy, **device),
        ab.PagedBlockDiagonalPaddedKeysMask.from_seqlens(*paged, **device),
        ab.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(*paged, **device),
        ab.PagedBlockDiagonalGappyKeysMask.from_seqlens(*paged_gappy, **device),
        ab.PagedBlockDiagonalCausalWithOffsetGappyKeysMask.from_seqlens(*paged_gappy, **device),
    ]
    return {type(mask).__name__: (mask, _key_rows(mask)) for mask in masks}


def _key_rows(mask):
    if isinstance(mask, ab.BlockDiagonalMask):
        return sum(KV_SEQLEN)
    if isinstance(mask, ab.BlockDiagonalPaddedKeysMask):
        return len(KV_SEQLEN) * PADDING
    return (
        GAPPY_STARTS[-1]
        if isinstance(mask, ab.BlockDiagonalGappyKeysMask)
        else (len(Q_SEQLEN) * PAGES + 1) * PAGE_SIZE
    )


def inputs(key_rows, heads=2, head_dim=20, dtype=np.float32, seed=0):
    """query, key and value for such a mask."""
    generator = np.random.default_rng(seed)
    shapes = [(1, rows, heads, head_dim) for rows in (sum(Q_SEQLEN), key_rows, key_rows)]
    return [generator.standard_normal(shape).astype(dtype) for shape in shapes]


def poison(mask, *tensors):
    """NaN into all rows of keys and values that no query of any block may look at: padding, gaps, unused pages."""
    used = np.unique(np.concatenate([rows for _, _, rows in mask._blocks.intervals()]))
    for tensor in tensors:
        hidden = np.ones(tensor.shape[1], bool)
        hidden[used] = False
        tensor[:, hidden] = np.nan
