"""The masks' own code: materialize against the golden masks, constructors, conversions, checks. Runs no kernel."""

import json
import unittest
from pathlib import Path

import numpy as np

import sequence_masks
from attune.ops import fmha
from attune.ops.fmha import attn_bias
from attune.ops.fmha.attn_bias import (
    AttentionBias,
    BlockDiagonalCausalLocalAttentionPaddedKeysMask,
    BlockDiagonalCausalWithOffsetGappyKeysMask,
    BlockDiagonalCausalWithOffsetPaddedKeysMask,
    BlockDiagonalGappyKeysMask,
    BlockDiagonalLocalAttentionPaddedKeysMask,
    BlockDiagonalMask,
    BlockDiagonalPaddedKeysMask,
    LocalAttentionFromBottomRightMask,
    LowerTriangularFromBottomRightMask,
    LowerTriangularMask,
    LowerTriangularMaskWithTensorBias,
    PagedBlockDiagonalCausalWithOffsetGappyKeysMask,
    PagedBlockDiagonalCausalWithOffsetPaddedKeysMask,
    PagedBlockDiagonalGappyKeysMask,
    PagedBlockDiagonalPaddedKeysMask,
)

GOLDENS = json.loads((Path(__file__).resolve().parents[1] / "golden" / "masks.json").read_text())


def construct(case):
    """The bias of a golden case, by the route that `via` names."""
    cls, args = getattr(attn_bias, case["class"]), dict(case["args"])
    source, _, method = case["via"].rpartition(".")
    if method == "constructor":
        return cls(**args)
    if not source:
        return getattr(cls, method)(**args)
    source = getattr(attn_bias, source)
    if method == "make_paged":
        padding = args.pop("notional_padding")
        in_row = args.pop("kv_seqstarts_in_row")
        starts = [b * padding + start for b, start in enumerate(in_row)] + [padding * len(in_row)]
        tables, page_size = np.array(args.pop("block_tables")), args.pop("page_size")
        gappy = source.from_seqlens(kv_seqstarts=starts, **args)
        return gappy.make_paged(tables, page_size, padding, paged_type=cls)
    lengths = {name: args.pop(name) for name in ("q_seqlen", "kv_seqlen") if name in args}
    return getattr(source.from_seqlens(**lengths) if lengths else source(), method)(**args)


def rows_of(dense):
    return ["".join("1" if x == 0 else "0" for x in row) for row in dense]


class Goldens(unittest.TestCase):
    def test_materialize(self):
        checked = 0
        for case in GOLDENS["cases"]:
            with self.subTest(case["class"], via=case["via"], args=case["args"]):
                mask = construct(case)
                self.assertIs(type(mask), getattr(attn_bias, case["class"]))
                dense = mask.materialize((case["q_len"], case["k_len"]), dtype=np.float32)
                self.assertEqual(rows_of(dense), case["mask"])
                self.assertTrue(((dense == 0) | (dense == -np.inf)).all())
                checked += 1
        self.assertEqual(checked, 296)

    def test_paged_gappy_from_seqlens(self):
        """Upstream cannot; ours gives what its make_paged gives."""
        checked = 0
        for case in GOLDENS["cases"]:
            if "kv_seqstarts_in_row" not in case["args"]:
                continue
            args = dict(case["args"])
            del args["notional_padding"]
            args["kv_seqstarts"] = args.pop("kv_seqstarts_in_row")
            with self.subTest(case["class"], args=args):
                mask = getattr(attn_bias, case["class"]).from_seqlens(**args)
                dense = mask.materialize((case["q_len"], case["k_len"]), dtype=np.float32)
                self.assertEqual(rows_of(dense), case["mask"])
                checked += 1
        self.assertEqual(checked, 28)

    def test_errors(self):
        for case in GOLDENS["errors"]:
            with self.subTest(case["class"], args=case["args"]):
                name, _, text = case["error"].partition(": ")
                with self.assertRaises(
                    {"ValueError": ValueError, "RuntimeError": RuntimeError}[name]
                ) as raised:
                    construct(case)
                self.assertEqual(type(raised.exception).__name__, name)
                self.assertTrue(str(raised.exception).startswith(text), raised.exception)


class Materialize(unittest.TestCase):
    def test_documented_example(self):
        mask = LocalAttentionFromBottomRightMask(window_left=1, window_right=2)
        np.testing.assert_array_equal(
            np.exp(mask.materialize((4, 5), dtype=np.float32)),
            [[1, 1, 1, 1, 0], [0, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 1, 1]],
        )

    def test_leading_axes_and_dtype(self):
        dense = LowerTriangularMask().materialize((2, 3, 4, 5), dtype=np.float16)
        self.assertEqual((dense.shape, dense.dtype), ((2, 3, 4, 5), np.float16))
        self.assertTrue((dense == dense[0, 0]).all())
        dense[0, 0, 0, 0] = 1  # the caller's own memory
        self.assertEqual(dense[1, 0, 0, 0], 0)

    def test_tensors_on_top(self):
        tensor = np.arange(2 * 3 * 4, dtype=np.float32).reshape(2, 1, 3, 4)
        for mask in (LowerTriangularMask().add_bias(tensor), LowerTriangularMaskWithTensorBias(tensor)):
            self.assertIsInstance(mask, LowerTriangularMask)
            dense = mask.materialize((2, 5, 3, 4), dtype=np.float32)
            causal = LowerTriangularMask().materialize((3, 4), dtype=np.float32)
            np.testing.assert_array_equal(dense, np.broadcast_to(tensor + causal, dense.shape))
        visible = tensor > 5
        dense = (
            LowerTriangularFromBottomRightMask().add_bias(visible).materialize((2, 1, 3, 4), dtype=np.float32)
        )
        np.testing.assert_array_equal(dense == 0, visible & np.tri(3, 4, 1, dtype=bool))
        rank_3 = BlockDiagonalMask.from_seqlens([1, 2], [2, 2]).add_bias(tensor[:1, 0])
        np.testing.assert_array_equal(
            rank_3.materialize((1, 2, 3, 4), dtype=np.float32)[0, 1, 0], [0, 1, -np.inf, -np.inf]
        )

    def test_it_is_checked(self):
        with self.assertRaisesRegex(ValueError, r"expected \[\*, queries, keys\]"):
            LowerTriangularMask().materialize((4,))
        with self.assertRaisesRegex(ValueError, "NumPy arrays are on the CPU"):
            LowerTriangularMask().materialize((4, 4), dtype=np.float32, device="cuda")
        with self.assertRaisesRegex(NotImplementedError, "does not say which keys"):
            AttentionBias().materialize((4, 4))
        mask = BlockDiagonalMask.from_seqlens([2, 3], [4, 5])
        with self.assertRaisesRegex(ValueError, "the sequences have 5 rows together, but query has 6"):
            mask.materialize((6, 9))
        with self.assertRaisesRegex(ValueError, "the sequences have 9 rows together, but key has 8"):
            mask.materialize((5, 8))


class Lengths(unittest.TestCase):
    def test_seqinfo(self):
        info = BlockDiagonalMask.from_seqlens([3, 0, 4]).q_seqinfo
        np.testing.assert_array_equal(info.seqstart, [0, 3, 3, 7])
        self.assertEqual(info.seqstart.dtype, np.int32)
        self.assertEqual((info.seqstart_py, info.max_seqlen, info.min_seqlen), ([0, 3, 3, 7], 4, 0))
        self.assertEqual(list(info.intervals()), [(0, 3), (3, 3), (3, 7)])
        padded = BlockDiagonalPaddedKeysMask.from_seqlens([1, 1], 5, [2, 4]).k_seqinfo
        self.assertEqual((padded.seqstart_py, padded.seqlen_py, padded.padding), ([0, 5, 10], [2, 4], 5))
        self.assertEqual((padded.max_seqlen, padded.min_seqlen), (4, 2))
        self.assertEqual(list(padded.intervals()), [(0, 2), (5, 9)])
        gappy = BlockDiagonalGappyKeysMask.from_seqlens([1, 1], [3, 1, 9], [2, 4]).k_seqinfo
        self.assertEqual(list(gappy.intervals()), [(3, 5), (1, 5)])

    def test_lists_and_arrays_mean_the_same(self):
        lists = sequence_masks.make_all()
        for dtype in (np.int32, np.int64, np.uint8):
            arrays = sequence_masks.make_all(lambda numbers: np.array(numbers, dtype))
            for name, (mask, key_rows) in arrays.items():
                with self.subTest(name, dtype=dtype.__name__):
                    shape = (sum(sequence_masks.Q_SEQLEN), key_rows)
                    np.testing.assert_array_equal(
                        mask.materialize(shape, dtype=np.float32),
                        lists[name][0].materialize(shape, dtype=np.float32),
                    )

    def test_equal_lengths_can_be_split(self):
        for lengths in ([2, 3], None), ([2, 3], [2, 3]), ((2, 3), (2, 3)):
            self.assertEqual(len(BlockDiagonalMask.from_seqlens(*lengths).split(np.zeros((1, 5)))), 2)
        mixed = BlockDiagonalMask.from_seqlens([2, 3], np.array([2, 3]))
        self.assertEqual(mixed.k_seqinfo.seqstart_py, [0, 2, 5])

    def test_no_blocks(self):
        self.assertEqual(
            BlockDiagonalMask.from_seqlens([]).materialize((0, 0), dtype=np.float32).shape, (0, 0)
        )
        self.assertEqual(BlockDiagonalMask.from_seqlens([]).q_seqinfo.max_seqlen, 0)

    def test_what_is_refused(self):
        for error, text, make in [
            (
                ValueError,
                r"q_seqlen\[1\] is -3; expected 0 or more",
                lambda: BlockDiagonalMask.from_seqlens([1, -3]),
            ),
            (
                ValueError,
                "2 blocks of queries, but 1 of keys",
                lambda: BlockDiagonalMask.from_seqlens([1, 3], [4]),
            ),
            (
                TypeError,
                "q_seqlen: expected integers, got float64",
                lambda: BlockDiagonalMask.from_seqlens([1.5]),
            ),
            (ValueError, "the limit is 2", lambda: BlockDiagonalMask.from_seqlens([2**31])),
            (ValueError, "the limit is 2", lambda: BlockDiagonalMask.from_seqlens([2**30] * 2)),
            (
                ValueError,
                r"q_seqlen: shape \[1, 2\]",
                lambda: BlockDiagonalMask.from_seqlens(np.array([[1, 2]])),
            ),
            (
                ValueError,
                r"kv_seqlen\[1\] is 5, more than the padding of 4",
                lambda: BlockDiagonalPaddedKeysMask.from_seqlens([1, 1], 4, [4, 5]),
            ),
            (ValueError, "kv_padding=-1", lambda: BlockDiagonalPaddedKeysMask.from_seqlens([1], -1, [0])),
            (ValueError, "No elements", lambda: BlockDiagonalGappyKeysMask.from_seqlens([], [0], [])),
            (
                TypeError,
                "kv_padding: expected an integer, got 8.0",
                lambda: BlockDiagonalPaddedKeysMask.from_seqlens([1], 8.0, [0]),
            ),
            (
                ValueError,
                "kv_seqlen: .* inhomogeneous",
                lambda: BlockDiagonalMask.from_seqlens([1], [[2], [3, 4]]),
            ),
            (
                ValueError,
                "kv_seqstarts has 2 entries and kv_seqlen 2; expected one start more",
                lambda: BlockDiagonalGappyKeysMask.from_seqlens([1, 1], [0, 5], [2, 2]),
            ),
            (
                ValueError,
                r"block 1 has the keys \[5, 9\), but there are 8 key rows",
                lambda: BlockDiagonalGappyKeysMask.from_seqlens([1, 1], [0, 5, 8], [2, 4]),
            ),
            (
                ValueError,
                "kv_seqstarts has 3 entries and kv_seqlen 2; expected equally many",
                lambda: PagedBlockDiagonalGappyKeysMask.from_seqlens(
                    [1, 1], [0, 5, 8], [2, 2], [[0], [1]], 8
                ),
            ),
            (
                ValueError,
                r"block 1 has the logical keys \[5, 9\), but its row of block_tables has 8 \(2 pages of 4\)",
                lambda: PagedBlockDiagonalGappyKeysMask.from_seqlens(
                    [1, 1], [0, 5], [2, 4], [[0, 1], [2, 3]], 4
                ),
            ),
            (
                ValueError,
                r"kv_seqlen\[0\] is 9, more than the padding of 8",
                lambda: PagedBlockDiagonalPaddedKeysMask.from_seqlens([1], [9], [[0, 1]], 4),
            ),
            (
                ValueError,
                r"block_tables: shape \[1, 2\], expected \[2, pages of a row\]",
                lambda: PagedBlockDiagonalPaddedKeysMask.from_seqlens([1, 1], [2, 2], [[0, 1]], 4),
            ),
            (
                ValueError,
                "page_size=0",
                lambda: PagedBlockDiagonalPaddedKeysMask.from_seqlens([1], [4], [[0, 1]], 0),
            ),
            (
                TypeError,
                "page_size: expected an integer, got 4.0",
                lambda: PagedBlockDiagonalPaddedKeysMask.from_seqlens([1], [4], [[0, 1]], 4.0),
            ),
            (
                ValueError,
                r"block_tables: shape \[2\], expected \[blocks, pages of a row\]",
                lambda: PagedBlockDiagonalPaddedKeysMask.from_seqlens([1], [4], [0, 1], 4),
            ),
        ]:
            with self.subTest(text), self.assertRaisesRegex(error, text):
                make()


class Windows(unittest.TestCase):
    def test_they_are_checked(self):
        blocks = BlockDiagonalMask.from_seqlens([4, 4])
        for window_size in (0, -3):
            for make in (
                LowerTriangularFromBottomRightMask().make_local_attention,
                blocks.make_local_attention,
                blocks.make_local_attention_from_bottomright,
                lambda w: BlockDiagonalCausalLocalAttentionPaddedKeysMask.from_seqlens_local([1], 4, [4], w),
            ):
                with self.assertRaisesRegex(ValueError, rf"is {window_size}\. Expected `window_size > 0`"):
                    make(window_size)
        with self.assertRaisesRegex(ValueError, r"window_left is -1\. Expected `window_left >= 0`"):
            LocalAttentionFromBottomRightMask(window_left=-1, window_right=0)
        with self.assertRaisesRegex(ValueError, r"window_right is -2\. Expected `window_right >= 0`"):
            BlockDiagonalLocalAttentionPaddedKeysMask.from_seqlens_local([1], 4, [4], 0, -2)
        for wrong in (2.5, "2", None):
            with self.assertRaisesRegex(TypeError, f"window_size: expected an integer, got {wrong!r}"):
                blocks.make_local_attention(wrong)
            with self.assertRaisesRegex(TypeError, f"window_right: expected an integer, got {wrong!r}"):
                LocalAttentionFromBottomRightMask(0, wrong)

    def test_a_local_padded_mask_needs_one(self):
        with self.assertRaisesRegex(NotImplementedError, "use from_seqlens_local"):
            BlockDiagonalLocalAttentionPaddedKeysMask.from_seqlens([1], 4, [4])


class Conversions(unittest.TestCase):
    def same(self, one, other, shape):
        np.testing.assert_array_equal(
            one.materialize(shape, dtype=np.float32), other.materialize(shape, dtype=np.float32)
        )

    def test_padded_to_paged(self):
        """Pages that lie as the padded cells do: the mask stays what it is."""
        q, kv, tables = [2, 3], [5, 7], np.array([[0, 1], [2, 3]])
        for padded, paged_type in [
            (BlockDiagonalPaddedKeysMask.from_seqlens(q, 8, kv), PagedBlockDiagonalPaddedKeysMask),
            (
                BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(q, 8, kv),
                PagedBlockDiagonalCausalWithOffsetPaddedKeysMask,
            ),
            (
                BlockDiagonalPaddedKeysMask.from_seqlens(q, 8, kv).make_local_attention(1, 1),
                PagedBlockDiagonalPaddedKeysMask,
            ),
            (
                BlockDiagonalCausalLocalAttentionPaddedKeysMask.from_seqlens_local(q, 8, kv, 2),
                PagedBlockDiagonalPaddedKeysMask,
            ),
        ]:
            paged = padded.make_paged(tables, 4)
            self.assertIs(type(paged), paged_type)
            self.same(padded, paged, (5, 16))
            self.assertEqual(padded.k_seqinfo.padding, 8)  # the source stays as it was
        causal = BlockDiagonalPaddedKeysMask.from_seqlens(q, 8, kv).make_paged(
            tables, 4, PagedBlockDiagonalCausalWithOffsetPaddedKeysMask
        )
        self.same(causal, BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(q, 8, kv), (5, 16))

    def test_gappy_to_paged(self):
        tables = np.array([[0, 1], [2, 3]])
        for source, paged_type in [
            (BlockDiagonalGappyKeysMask, PagedBlockDiagonalGappyKeysMask),
            (
                BlockDiagonalCausalWithOffsetGappyKeysMask,
                PagedBlockDiagonalCausalWithOffsetGappyKeysMask,
            ),
        ]:
            gappy = source.from_seqlens([2, 3], [1, 10, 16], [5, 6])
            paged = gappy.make_paged(tables, 4, notional_padding=8)
            self.assertIs(type(paged), paged_type)
            self.same(gappy, paged, (5, 16))
        with self.assertRaisesRegex(ValueError, "notional_padding=6 should be divisible by page_size=4"):
            gappy.make_paged(tables, 4, notional_padding=6)
        with self.assertRaisesRegex(ValueError, r"block 1 has the logical keys \[-2, 4\)"):
            gappy.make_paged(tables, 4, notional_padding=12)

    def test_to_keeps_the_type(self):
        masks = [mask for mask, _ in sequence_masks.make_all().values()]
        tensor = np.zeros((3, 3), np.float32)
        masks += [LowerTriangularMask(), LowerTriangularMask().add_bias(tensor), masks[0].add_bias(tensor)]
        for mask in masks:
            self.assertIs(type(mask.to("cpu")), type(mask))
        causal = BlockDiagonalMask.from_seqlens([2, 3]).make_causal().to("cpu")
        self.assertEqual([x.shape for x in causal.split(np.zeros((1, 5)))], [(1, 2), (1, 3)])

    def test_a_tensor_on_top_is_shown(self):
        tensor = np.zeros((3, 3), np.float32)
        for mask in (LowerTriangularMask(), LowerTriangularFromBottomRightMask()):
            self.assertIn(repr(tensor), repr(mask.add_bias(tensor)))

    def test_add_bias_once(self):
        tensor = np.zeros((3, 3), np.float32)
        for mask in (LowerTriangularMask(), LowerTriangularFromBottomRightMask()):
            with self.assertRaisesRegex(ValueError, "the mask has a tensor already"):
                mask.add_bias(tensor).add_bias(tensor)


class TensorLists(unittest.TestCase):
    def setUp(self):
        self.tensors = [
            np.random.default_rng(i).standard_normal((batch, length, 2, 3))
            for i, (batch, length) in enumerate([(2, 3), (1, 0), (1, 5), (3, 1)])
        ]

    def test_round_trip(self):
        mask, packed = BlockDiagonalMask.from_tensor_list(self.tensors)
        self.assertEqual(packed.shape, (1, 14, 2, 3))
        self.assertEqual(mask.q_seqinfo.seqstart_py, [0, 3, 6, 6, 11, 12, 13, 14])
        for split in (mask.split, mask.split_queries, mask.split_kv, mask.make_causal().split):
            pieces = split(packed)
            self.assertEqual(len(pieces), 4)
            for piece, tensor in zip(pieces, self.tensors):
                np.testing.assert_array_equal(piece, tensor)
                self.assertEqual(piece.size == 0, not np.shares_memory(piece, packed))

    def test_queries_keys_values(self):
        keys = [np.zeros((x.shape[0], x.shape[1] + 2, 2, 3)) for x in self.tensors]
        values = [np.ones(x.shape[:2] + (7,)) for x in keys]
        mask, query, key, value = BlockDiagonalMask.from_tensor_lists_qkv(self.tensors, keys, values)
        self.assertEqual((query.shape, key.shape, value.shape), ((1, 14, 2, 3), (1, 28, 2, 3), (1, 28, 7)))
        self.assertEqual([x.shape for x in mask.split_kv(value)], [x.shape for x in values])
        self.assertEqual([x.shape for x in mask.split_queries(query)], [x.shape for x in self.tensors])
        with self.assertRaisesRegex(ValueError, "use split_queries or split_kv"):
            mask.split(query)
        self.assertIsNone(BlockDiagonalMask.from_tensor_lists_qkv(self.tensors, keys)[3])

    def test_batch_sizes_may_be_set_afterwards(self):
        mask = fmha.BlockDiagonalMask.from_seqlens([4, 4, 3])
        mask._batch_sizes = [2, 1]
        self.assertEqual([x.shape for x in mask.split(np.zeros((1, 11, 6)))], [(2, 4, 6), (1, 3, 6)])

    def test_what_is_refused(self):
        with self.assertRaisesRegex(ValueError, "no tensors"):
            BlockDiagonalMask.from_tensor_list([])
        with self.assertRaisesRegex(ValueError, r"tensors\[1\]: shape \[3\], expected \[B, M, \*\]"):
            BlockDiagonalMask.from_tensor_list([np.zeros((1, 3)), np.zeros(3)])
        with self.assertRaisesRegex(ValueError, "tensors_q have batch sizes"):
            BlockDiagonalMask.from_tensor_lists_qkv(self.tensors, self.tensors[::-1])
        with self.assertRaisesRegex(ValueError, "tensors_k and tensors_v differ"):
            BlockDiagonalMask.from_tensor_lists_qkv(self.tensors, self.tensors, self.tensors[::-1])
        mask, packed = BlockDiagonalMask.from_tensor_list(self.tensors)
        for wrong in (packed[:, 1:], packed[0], np.concatenate([packed, packed])):
            with self.assertRaisesRegex(ValueError, "Invalid tensor of shape .* with B=1 and M=14"):
                mask.split(wrong)
