"""NumPy arrays against the float64 reference: dtypes, masks, tensors, layouts, LSE, output dtypes."""

import copy
import pickle
import unittest

import numpy as np

import attune
import sequence_masks
from attune.ops import (
    LocalAttentionFromBottomRightMask,
    LowerTriangularFromBottomRightMask,
    LowerTriangularMask,
    memory_efficient_attention,
    memory_efficient_attention_forward,
    memory_efficient_attention_forward_requires_grad,
)
from attune.ops.fmha.attn_bias import BlockDiagonalMask, PagedBlockDiagonalPaddedKeysMask
from support import assert_close, random_inputs, reference

MASKS = [
    None,
    LowerTriangularMask(),
    LowerTriangularFromBottomRightMask(),
    LowerTriangularFromBottomRightMask().make_local_attention(7),
    LocalAttentionFromBottomRightMask(3, 5),
]


class Attention(unittest.TestCase):
    def test_every_mask_in_every_dtype(self):
        for dtype in (np.float32, np.float16):
            for seed, mask in enumerate(MASKS):
                with self.subTest(dtype=dtype.__name__, mask=mask):
                    inputs = random_inputs(seed, dtype=dtype)
                    assert_close(self, memory_efficient_attention(*inputs, mask), *inputs, mask)

    def test_bfloat16(self):
        try:
            from ml_dtypes import bfloat16
        except ImportError:
            self.skipTest("ml_dtypes is not installed")
        inputs = random_inputs(1, dtype=bfloat16)
        assert_close(self, memory_efficient_attention(*inputs), *inputs)

    def test_explicit_scale(self):
        inputs = random_inputs(2)
        assert_close(self, memory_efficient_attention(*inputs, scale=0.05), *inputs, scale=0.05)

    def test_head_dim_v_differs(self):
        inputs = random_inputs(3, head_dim=16, head_dim_v=40)
        assert_close(self, memory_efficient_attention(*inputs), *inputs)

    def test_output_dtype(self):
        for dtype in (np.float32, np.float16):
            for output_dtype in (np.float32, np.float16):
                with self.subTest(dtype=dtype.__name__, output_dtype=output_dtype.__name__):
                    inputs = random_inputs(4, dtype=dtype)
                    output = memory_efficient_attention(*inputs, output_dtype=output_dtype)
                    assert_close(self, output, *inputs, output_dtype=output_dtype)

    def test_output_and_lse(self):
        inputs = random_inputs(4, len_q=50, len_k=20)
        mask = LowerTriangularFromBottomRightMask()  # the first 30 queries see no key
        output, lse = memory_efficient_attention_forward_requires_grad(*inputs, mask)
        assert_close(self, output, *inputs, mask)
        self.assertTrue((output[:, :30] == 0).all())
        _, expected = reference(*inputs, mask)
        self.assertEqual((lse.shape, lse.dtype), ((2, 3, 50), np.float32))
        self.assertTrue((lse[..., :30] == -np.inf).all())
        np.testing.assert_allclose(lse[..., 30:], expected[..., 30:], atol=1e-5)

    def test_forward_is_the_same_computation(self):
        inputs = random_inputs(5)
        expected = memory_efficient_attention(*inputs, LowerTriangularMask())
        np.testing.assert_array_equal(
            memory_efficient_attention_forward(*inputs, LowerTriangularMask()), expected
        )

    def test_window_beyond_64_bits(self):
        inputs = random_inputs(11)
        mask = LocalAttentionFromBottomRightMask(2**80, 0)
        expected = memory_efficient_attention(*inputs, LowerTriangularFromBottomRightMask())
        np.testing.assert_allclose(memory_efficient_attention(*inputs, mask), expected, atol=1e-6)

    def test_documented_defaults_are_accepted(self):
        inputs = random_inputs(12)
        output = memory_efficient_attention(
            *inputs, None, 0.0, None, op=(None, None), output_dtype=np.float32
        )
        assert_close(self, output, *inputs)


class Layouts(unittest.TestCase):
    def test_three_dimensions_are_one_head(self):
        query, key, value = (x[:, :, 0] for x in random_inputs(6, heads=1))
        output, lse = memory_efficient_attention_forward_requires_grad(query, key, value)
        self.assertEqual((output.shape, lse.shape), (query.shape, (2, 1, 37)))
        assert_close(self, output[:, :, None], *(x[:, :, None] for x in (query, key, value)))

    def test_strided_views(self):
        # One [B, M, 3, H, K] projection, sliced; heads before length; every other row; a batch that runs backwards.
        packed = np.random.default_rng(7).standard_normal((2, 33, 3, 4, 16)).astype(np.float32)
        head_major = np.random.default_rng(8).standard_normal((2, 4, 33, 16)).astype(np.float32)
        for name, query in [
            ("sliced", packed[:, :, 0]),
            ("transposed", head_major.transpose(0, 2, 1, 3)),
            ("every other", np.repeat(packed[:, :, 0], 2, axis=1)[:, ::2]),
            ("reversed", packed[::-1, :, 0]),
            ("narrowed", np.pad(packed[:, :, 0], [(0, 0)] * 3 + [(0, 5)])[..., :16]),
        ]:
            with self.subTest(name):
                key, value = packed[:, :, 1], packed[:, :, 2]
                assert_close(self, memory_efficient_attention(query, key, value), query, key, value)

    def test_expanded_heads(self):
        query, key, value = random_inputs(9, heads=4)
        key, value = (np.broadcast_to(x[:, :, :1], x.shape) for x in (key, value))
        assert_close(self, memory_efficient_attention(query, key, value), query, key, value)

    def test_fewer_key_heads(self):
        for key_heads in (1, 2, 3, 6):
            with self.subTest(key_heads=key_heads):
                query, key, value = random_inputs(13, heads=6)
                key, value = key[:, :, :key_heads], value[:, :, :key_heads]
                output, lse = memory_efficient_attention_forward_requires_grad(
                    query, key, value, LowerTriangularMask()
                )
                assert_close(self, output, query, key, value, LowerTriangularMask())
                _, expected = reference(query, key, value, LowerTriangularMask())
                np.testing.assert_allclose(lse, expected, atol=1e-5)

    def test_groups(self):
        """[B, M, G, H, K]; an extent of 1 of key and value broadcasts."""
        for groups, heads in [(2, 4), (2, 1), (1, 4), (1, 1)]:
            with self.subTest(groups=groups, heads=heads):
                query, key, value = random_inputs(14, heads=8)
                query = query.reshape(2, 37, 2, 4, 24)
                key, value = (x.reshape(2, 45, 2, 4, 24)[:, :, :groups, :heads] for x in (key, value))
                output, lse = memory_efficient_attention_forward_requires_grad(query, key, value)
                assert_close(self, output, query, key, value)
                self.assertEqual(lse.shape, (2, 2, 4, 37))
                np.testing.assert_allclose(lse, reference(query, key, value)[1], atol=1e-5)

    def test_empty_extents(self):
        for extent in ("batch", "len_q", "len_k", "heads"):
            with self.subTest(extent):
                query, key, value = random_inputs(10, **{extent: 0})
                output, lse = memory_efficient_attention_forward_requires_grad(query, key, value)
                self.assertEqual(output.shape, query.shape)
                self.assertTrue((output == 0).all())
                self.assertTrue((lse == -np.inf).all())


class TensorBiases(unittest.TestCase):
    SHAPES = [
        (2, 3, 37, 45),
        (1, 3, 37, 45),
        (2, 1, 37, 45),
        (2, 3, 1, 45),
        (1, 1, 1, 45),
        (2, 37, 45),
        (37, 45),
    ]

    def check(self, bias, dtype=np.float32, mask=None):
        inputs = random_inputs(20, dtype=dtype)
        output = memory_efficient_attention(*inputs, bias if mask is None else mask.add_bias(bias))
        assert_close(self, output, *inputs, bias if mask is None else mask.add_bias(bias))

    def test_shapes_and_dtypes(self):
        generator = np.random.default_rng(21)
        for shape in self.SHAPES:
            for dtype in (np.float32, np.float16):
                for bias_dtype in (np.float32, np.float16):
                    with self.subTest(shape=shape, dtype=dtype.__name__, bias=bias_dtype.__name__):
                        self.check(generator.standard_normal(shape).astype(bias_dtype), dtype)

    def test_boolean(self):
        for shape in self.SHAPES:
            with self.subTest(shape=shape):
                self.check(np.random.default_rng(22).random(shape) < 0.7)

    def test_rows_that_a_boolean_hides(self):
        inputs = random_inputs(23)
        bias = np.ones((37, 45), bool)
        bias[5] = False
        output, lse = memory_efficient_attention_forward_requires_grad(*inputs, bias)
        assert_close(self, output, *inputs, bias)
        self.assertTrue((output[:, 5] == 0).all() and (lse[..., 5] == -np.inf).all())

    def test_views(self):
        wide = np.random.default_rng(24).standard_normal((3, 2, 45, 50)).astype(np.float32)
        self.check(wide.transpose(1, 0, 3, 2)[:, :, 5:42])  # the key axis strided
        self.check(np.broadcast_to(wide[:1, :1, :37, 2:47], (2, 3, 37, 45)))

    def test_with_masks(self):
        bias = np.random.default_rng(25).standard_normal((2, 3, 37, 45)).astype(np.float32)
        for mask in MASKS[1:]:
            with self.subTest(mask=mask):
                self.check(bias, mask=mask)
                self.check(bias > -0.5, mask=mask)

    def test_one_head_of_three_axes(self):
        query, key, value = (x[:, :, 0] for x in random_inputs(26, heads=1))
        bias = np.random.default_rng(26).standard_normal((2, 37, 45)).astype(np.float32)
        output = memory_efficient_attention(query, key, value, bias)
        assert_close(self, output[:, :, None], *(x[:, :, None] for x in (query, key, value)), bias)


class PackedSequences(unittest.TestCase):
    def test_every_class_among_poison(self):
        for name, (mask, key_rows) in sequence_masks.make_all().items():
            for dtype in (np.float32, np.float16):
                with self.subTest(name, dtype=dtype.__name__):
                    inputs = sequence_masks.inputs(key_rows, dtype=dtype)
                    sequence_masks.poison(mask, *inputs[1:])
                    output, lse = memory_efficient_attention_forward_requires_grad(*inputs, mask)
                    assert_close(self, output, *inputs, mask)
                    self.assertEqual(lse.shape, (1, 2, len(output[0])))
                    _, expected = reference(*inputs, mask)
                    np.testing.assert_allclose(lse, expected, atol=2e-3 if dtype == np.float16 else 1e-5)

    def test_with_tensors_on_top(self):
        generator = np.random.default_rng(30)
        for name, (mask, key_rows) in sequence_masks.make_all().items():
            inputs = sequence_masks.inputs(key_rows)
            queries = inputs[0].shape[1]
            for bias in (
                generator.standard_normal((1, 2, queries, key_rows)).astype(np.float32),
                generator.random((1, 1, queries, key_rows)) < 0.8,
            ):
                with self.subTest(name, bias=bias.dtype.name):
                    both = mask.add_bias(bias)
                    assert_close(self, memory_efficient_attention(*inputs, both), *inputs, both)

    def test_entries_of_a_page_table_beyond_the_keys_are_never_used(self):
        inputs = random_inputs(31, batch=1, len_q=4, len_k=18)
        mask = PagedBlockDiagonalPaddedKeysMask.from_seqlens([4], [9], [[1, 77]], page_size=9)
        used = [inputs[0], inputs[1][:, 9:], inputs[2][:, 9:]]
        assert_close(self, memory_efficient_attention(*inputs, mask), *used)

    def test_blocks_are_calls_of_their_own(self):
        tensors = [random_inputs(i, batch=1, len_q=m, len_k=m) for i, m in enumerate((4, 1, 33))]
        mask, query, key, value = BlockDiagonalMask.from_tensor_lists_qkv(*zip(*tensors))
        output = memory_efficient_attention(query, key, value, mask.make_causal())
        for piece, inputs in zip(mask.split_queries(output), tensors):
            assert_close(self, piece, *inputs, LowerTriangularMask())

    def test_groups(self):
        for name, (mask, key_rows) in sequence_masks.make_all().items():
            with self.subTest(name):
                query, key, value = sequence_masks.inputs(key_rows, heads=6)
                query = query.reshape(1, -1, 2, 3, 20)
                key, value = (x.reshape(1, -1, 2, 3, 20)[:, :, :, :1] for x in (key, value))
                assert_close(
                    self, memory_efficient_attention(query, key, value, mask), query, key, value, mask
                )


class Copies(unittest.TestCase):
    def test_of_masks_that_were_used(self):
        masks = sequence_masks.make_all()
        masks["a tensor on top"] = (
            LowerTriangularFromBottomRightMask().add_bias(np.zeros((43, 50), np.float32)),
            50,
        )
        for name, (mask, key_rows) in masks.items():
            inputs = sequence_masks.inputs(key_rows)
            output = memory_efficient_attention(*inputs, mask)
            for copied in (copy.copy, copy.deepcopy, lambda mask: pickle.loads(pickle.dumps(mask))):
                with self.subTest(name):
                    again = copied(mask)
                    self.assertIs(type(again), type(mask))
                    np.testing.assert_array_equal(memory_efficient_attention(*inputs, again), output)


class Introspection(unittest.TestCase):
    def test_explain_prepare_call(self):
        inputs = random_inputs(20, head_dim=12, dtype=np.float16)
        bias = np.ones((37, 45), bool)
        mask = BlockDiagonalMask.from_seqlens([30, 44], [40, 50])
        packed = [x.reshape(1, -1, 3, 12) for x in inputs]
        for call, arguments, knows in [
            (inputs, {}, {}),
            (inputs, {"p": 0.25}, {"dropout": "on"}),
            (inputs, {"output_dtype": np.float32}, {"output_dtype": "f32"}),
            (inputs, {"attn_bias": bias}, {"bias": "boolean"}),
            (packed, {"attn_bias": mask}, {"blocks": "varlen"}),
        ]:
            with self.subTest(knows):
                explained = attune.explain(*call, **arguments)
                self.assertEqual((explained["state"], explained["family"]), ("absent", "cpu"))
                self.assertLessEqual(knows.items(), explained["spec"].items())
                before = attune.counters()
                attune.prepare(*call, **arguments)
                self.assertEqual(attune.explain(*call, **arguments)["state"], "loaded")
                prepared = attune.counters()
                self.assertEqual(
                    (prepared.compiles, prepared.launches), (before.compiles + 1, before.launches)
                )
                memory_efficient_attention(*call, **arguments)
                after = attune.counters()
                self.assertEqual((after.compiles, after.launches), (prepared.compiles, prepared.launches + 1))
                self.assertEqual(attune.last_kernel(), explained["candidate"])
