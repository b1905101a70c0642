"""NumPy arrays against the float64 reference: dtypes, masks, layouts, LSE."""

import unittest

import numpy as np

import attune
from attune.ops import (
    LocalAttentionFromBottomRightMask,
    LowerTriangularFromBottomRightMask,
    LowerTriangularMask,
    memory_efficient_attention,
    memory_efficient_attention_forward,
    memory_efficient_attention_forward_requires_grad,
)
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

    def test_empty_extents(self):
        for extent in ("batch", "len_q", "len_k", "heads"):
            with self.subTest(extent):
                query, key, value = random_inputs(10, **{extent: 0})
                output, lse = memory_efficient_attention_forward_requires_grad(query, key, value)
                self.assertEqual(output.shape, query.shape)
                self.assertTrue((output == 0).all())
                self.assertTrue((lse == -np.inf).all())

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


class Introspection(unittest.TestCase):
    def test_explain_prepare_call(self):
        inputs = random_inputs(20, head_dim=12, dtype=np.float16)
        self.assertEqual(attune.explain(*inputs)["state"], "absent")
        before = attune.counters()
        attune.prepare(*inputs)
        self.assertEqual(attune.explain(*inputs)["state"], "loaded")
        prepared = attune.counters()
        self.assertEqual((prepared.compiles, prepared.launches), (before.compiles + 1, before.launches))
        memory_efficient_attention(*inputs)
        after = attune.counters()
        self.assertEqual((after.compiles, after.launches), (prepared.compiles, prepared.launches + 1))
        self.assertEqual(attune.last_kernel(), attune.explain(*inputs)["candidate"])
        self.assertEqual(attune.explain(*inputs)["family"], "cpu")
