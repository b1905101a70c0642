"""The documentation's examples, with `attune` for `xformers` and NumPy for torch."""

import sys
import unittest

import numpy as np

import attune.ops as xops
from attune.ops import fmha
from support import assert_close, assert_gradients_close, random_inputs, reference


class Examples(unittest.TestCase):
    def test_attention(self):
        q, k, v = random_inputs(0)
        assert_close(self, xops.memory_efficient_attention(q, k, v), q, k, v)
        self.assertEqual(xops.memory_efficient_attention(q, k, v, p=0.2).shape, q.shape)
        causal = xops.LowerTriangularMask()
        y = xops.memory_efficient_attention(q, k, v, attn_bias=causal)
        assert_close(self, y, q, k, v, causal)

    def test_grouped_queries(self):
        B, M, K = 3, 32, 128
        q, k, v = random_inputs(1, batch=B, len_q=M, len_k=M, heads=8, head_dim=K)
        k, v = k[:, :, :2], v[:, :, :2]
        out_gqa = xops.memory_efficient_attention(
            q.reshape([B, M, 2, 4, K]),
            np.broadcast_to(k.reshape([B, M, 2, 1, K]), [B, M, 2, 4, K]),
            np.broadcast_to(v.reshape([B, M, 2, 1, K]), [B, M, 2, 4, K]),
        )
        assert_close(self, out_gqa.reshape([B, M, 8, K]), q, k, v)

    def test_local_attention(self):
        bias = fmha.attn_bias.LocalAttentionFromBottomRightMask(window_left=1, window_right=2)
        seen = np.exp(bias.materialize(shape=(4, 4), dtype=np.float32))
        self.assertEqual(seen.tolist(), [[1, 1, 1, 0], [1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 1, 1]])

    def test_the_default_of_materialize(self):
        dense = xops.LowerTriangularMask().materialize((2, 2))
        self.assertEqual(type(dense).__module__.split(".")[0], "torch" if "torch" in sys.modules else "numpy")

    def test_block_diagonal(self):
        K = 16
        generator = np.random.default_rng(2)
        list_x = [generator.standard_normal([1, m, 1, K]).astype(np.float32) for m in (3, 6, 2)]
        attn_bias, x = fmha.BlockDiagonalMask.from_tensor_list(list_x)
        weight = generator.standard_normal([K, K * 3]).astype(np.float32) / K**0.5
        projected = (x @ weight).reshape([1, -1, 1, 3, K])
        q, k, v = (projected[..., i, :] for i in range(3))
        out = fmha.memory_efficient_attention(q, k, v, attn_bias=attn_bias)
        list_out = attn_bias.split(out)
        self.assertEqual(list_out[0].shape, (1, 3, 1, K))
        for piece, *inputs in zip(list_out, *(attn_bias.split(x) for x in (q, k, v))):
            assert_close(self, piece, *inputs)

    def test_padded_keys(self):
        """Space for 12 keys, three blocks of at most 4, of which 2, 3 and 2 are used."""
        bias = fmha.attn_bias.BlockDiagonalPaddedKeysMask.from_seqlens(
            q_seqlen=[1, 1, 1], kv_padding=4, kv_seqlen=[2, 3, 2]
        )
        seen = np.exp(bias.materialize((3, 12), dtype=np.float32))
        self.assertEqual([np.flatnonzero(row).tolist() for row in seen], [[0, 1], [4, 5, 6], [8, 9]])

    def test_gappy_keys_in_one_tensor_and_in_pages(self):
        """Two blocks in cells of 100, the first key of each ignored: starts [1, 101, 200], but [1, 1] in pages."""
        gappy = fmha.attn_bias.BlockDiagonalGappyKeysMask.from_seqlens([1, 1], [1, 101, 200], [9, 99])
        paged = fmha.attn_bias.PagedBlockDiagonalGappyKeysMask.from_seqlens(
            [1, 1], [1, 1], [9, 99], block_tables=[[0, 1], [2, 3]], page_size=50
        )
        q, k, v = random_inputs(3, batch=1, len_q=2, len_k=200)
        expected = fmha.memory_efficient_attention(q, k, v, gappy)
        assert_close(self, expected, q, k, v, gappy)
        np.testing.assert_allclose(fmha.memory_efficient_attention(q, k, v, paged), expected, atol=1e-6)

    def test_partial(self):
        q, k, v = random_inputs(4)
        attn_split, lse_split = zip(
            *(fmha.memory_efficient_attention_partial(q, k[:, i::2], v[:, i::2]) for i in range(2))
        )
        out_full, lse_full = fmha.merge_attentions(attn_split, lse_split)
        assert_close(self, out_full, q, k, v)
        np.testing.assert_allclose(lse_full, reference(q, k, v)[1], atol=1e-5)

    def test_gradients(self):
        q, k, v = random_inputs(6)
        causal = xops.LowerTriangularMask()
        output, lse = fmha.memory_efficient_attention_forward_requires_grad(q, k, v, attn_bias=causal)
        grad = np.ones_like(output)
        gradients = fmha.memory_efficient_attention_backward(grad, output, lse, q, k, v, attn_bias=causal)
        assert_gradients_close(self, gradients, grad, q, k, v, causal)

    def test_forced_operator(self):
        q, k, v = random_inputs(5)
        self.assertEqual(fmha.cpu.FwOp.not_supported_reasons(fmha.Inputs(q, k, v)), [])
        assert_close(self, xops.memory_efficient_attention(q, k, v, op=(fmha.cpu.FwOp, None)), q, k, v)
