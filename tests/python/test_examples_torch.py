"""The documentation's examples, with `attune` for `xformers`, on the GPU where torch sees one.

The code stands as the documentation has it, but for the device and, on the CPU, float32 for float16, which torch's own
layers lack there.
"""

import unittest

try:
    import torch
except ImportError:
    raise unittest.SkipTest("torch is not installed") from None

import attune.ops as xops
from attune.ops import fmha


def equivalent_code(query, key, value, attn_bias=None):
    """The documentation's "equivalent pytorch code", without dropout."""
    scale = 1.0 / query.shape[-1] ** 0.5
    query = query * scale
    query = query.transpose(1, 2)
    key = key.transpose(1, 2)
    value = value.transpose(1, 2)
    attn = query @ key.transpose(-2, -1)
    if attn_bias is not None:
        attn = attn + attn_bias
    attn = attn.softmax(-1)
    attn = attn @ value
    return attn.transpose(1, 2)


class Examples(unittest.TestCase):
    def setUp(self):
        torch.manual_seed(0)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype = torch.float16 if self.device == "cuda" else torch.float32

    def close(self, actual, expected, atol=3e-3):
        torch.testing.assert_close(actual.float(), expected.float(), atol=atol, rtol=0)

    def test_attention(self):
        q, k, v = torch.randn(3, 2, 40, 4, 32, device=self.device, dtype=self.dtype)

        # Compute regular attention
        y = xops.memory_efficient_attention(q, k, v)
        self.close(y, equivalent_code(q.float(), k.float(), v.float()))

        # With a dropout of 0.2
        y = xops.memory_efficient_attention(q, k, v, p=0.2)
        self.assertEqual(y.shape, q.shape)

        # Causal attention
        y = xops.memory_efficient_attention(q, k, v, attn_bias=xops.LowerTriangularMask())
        causal = xops.LowerTriangularMask().materialize((2, 4, 40, 40), device=self.device)
        self.close(y, equivalent_code(q.float(), k.float(), v.float(), causal))

    def test_grouped_queries(self):
        B, M, K = 3, 32, 128
        kwargs = dict(device=self.device, dtype=self.dtype)
        q = torch.randn([B, M, 8, K], **kwargs)
        k = torch.randn([B, M, 2, K], **kwargs)
        v = torch.randn([B, M, 2, K], **kwargs)
        out_gqa = xops.memory_efficient_attention(
            q.reshape([B, M, 2, 4, K]),
            k.reshape([B, M, 2, 1, K]).expand([B, M, 2, 4, K]),
            v.reshape([B, M, 2, 1, K]).expand([B, M, 2, 4, K]),
        )
        expanded = (x.float().repeat_interleave(4, dim=2) for x in (k, v))
        self.close(out_gqa.reshape([B, M, 8, K]), equivalent_code(q.float(), *expanded))
        # Nothing has to be expanded, here.
        self.close(xops.memory_efficient_attention(q, k, v), out_gqa.reshape([B, M, 8, K]), atol=0)

    def test_local_attention(self):
        bias = fmha.attn_bias.LocalAttentionFromBottomRightMask(window_left=1, window_right=2)
        expected_4 = [[1, 1, 1, 0], [1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 1, 1]]
        expected_5 = [[1, 1, 1, 1, 0], [0, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 1, 1]]
        self.assertEqual(bias.materialize(shape=(4, 4)).exp().tolist(), expected_4)
        self.assertEqual(bias.materialize(shape=(4, 5)).exp().tolist(), expected_5)

    def test_block_diagonal(self):
        K = 16
        dtype = self.dtype
        device = self.device
        list_x = [
            torch.randn([1, 3, 1, K], dtype=dtype, device=device),
            torch.randn([1, 6, 1, K], dtype=dtype, device=device),
            torch.randn([1, 2, 1, K], dtype=dtype, device=device),
        ]
        attn_bias, x = fmha.BlockDiagonalMask.from_tensor_list(list_x)
        linear = torch.nn.Linear(K, K * 3).to(device=device, dtype=dtype)

        q, k, v = linear(x).reshape([1, -1, 1, 3, K]).unbind(-2)
        out = fmha.memory_efficient_attention(q, k, v, attn_bias=attn_bias)
        list_out = attn_bias.split(out)
        self.assertEqual(tuple(list_out[0].shape), (1, 3, 1, K))
        expected = [equivalent_code(*x) for x in zip(*(attn_bias.split(x.float()) for x in (q, k, v)))]
        for piece, expected_piece in zip(list_out, expected):
            self.close(piece, expected_piece)
        gradients = [
            torch.autograd.grad(
                sum(x.float().square().sum() for x in pieces), linear.weight, retain_graph=True
            )[0]
            for pieces in (list_out, expected)
        ]
        self.close(*gradients, atol=3e-3 * gradients[1].abs().max().item())

    def test_partial(self):
        q, k, v = torch.randn(3, 2, 40, 4, 32, device=self.device, dtype=self.dtype)
        parts = [fmha.memory_efficient_attention_partial(q, k[:, i::2], v[:, i::2]) for i in range(2)]
        attn_split, lse_split = zip(*parts)
        out_full, lse_full = fmha.merge_attentions(attn_split, lse_split)
        self.close(out_full, equivalent_code(q.float(), k.float(), v.float()))
        self.close(lse_full, torch.logaddexp(*lse_split), atol=1e-5)

    def test_partial_with_gradients(self):
        q, k, v = (
            torch.randn(2, 40, 4, 32, device=self.device, dtype=self.dtype, requires_grad=True)
            for _ in range(3)
        )
        parts = [fmha.memory_efficient_attention_partial(q, k[:, i::2], v[:, i::2]) for i in range(2)]
        out_full, _ = fmha.merge_attentions(*zip(*parts))
        whole = equivalent_code(q.float(), k.float(), v.float())
        for actual, expected in zip(
            *(torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (out_full, whole))
        ):
            self.close(actual, expected, atol=3e-3 * expected.abs().max().item())

    def test_forced_operator(self):
        q, k, v = torch.randn(3, 2, 40, 4, 32, device=self.device, dtype=self.dtype)
        op = xops.MemoryEfficientAttentionCutlassOp
        self.assertTrue(issubclass(op[0], xops.AttentionOpBase))
        if not op[0].not_supported_reasons(fmha.Inputs(q, k, v)):
            out = xops.memory_efficient_attention(q, k, v, op=op)
            self.close(out, equivalent_code(q.float(), k.float(), v.float()))
        else:
            self.assertEqual(self.device, "cpu")
