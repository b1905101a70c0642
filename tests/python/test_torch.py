"""Torch tensors, on the CPU and, where torch sees a GPU, on its streams."""

import unittest

import numpy as np

try:
    import torch
except ImportError:
    raise unittest.SkipTest("torch is not installed") from None

import attune
from attune.ops import (
    LowerTriangularFromBottomRightMask,
    LowerTriangularMask,
    memory_efficient_attention,
    memory_efficient_attention_forward,
    memory_efficient_attention_forward_requires_grad,
)
from support import random_inputs, reference


def tensors(seed, device="cpu", dtype=torch.float32, **shape):
    return [torch.from_numpy(x).to(device=device, dtype=dtype) for x in random_inputs(seed, **shape)]


def exact(inputs, mask=None):
    output, lse = reference(*(x.double().cpu().numpy() for x in inputs), mask)
    return torch.from_numpy(output), torch.from_numpy(lse)


class OnTheCpu(unittest.TestCase):
    device = "cpu"

    def test_dtypes(self):
        for dtype, tolerance in [(torch.float32, 1e-5), (torch.float16, 3e-3), (torch.bfloat16, 2e-2)]:
            with self.subTest(dtype):
                inputs = tensors(0, self.device, dtype)
                output, lse = memory_efficient_attention_forward_requires_grad(*inputs, LowerTriangularMask())
                self.assertEqual(
                    (output.dtype, output.device, lse.dtype), (dtype, inputs[0].device, torch.float32)
                )
                expected, expected_lse = exact(inputs, LowerTriangularMask())
                torch.testing.assert_close(output.double().cpu(), expected, atol=tolerance, rtol=0)
                torch.testing.assert_close(lse.double().cpu(), expected_lse, atol=tolerance, rtol=1e-4)

    def test_views(self):
        packed = (
            torch.from_numpy(np.random.default_rng(1).standard_normal((2, 33, 3, 4, 16)))
            .float()
            .to(self.device)
        )
        query, key, value = packed.unbind(2)
        key = key.transpose(1, 2).contiguous().transpose(1, 2)
        output = memory_efficient_attention(query, key, value)
        torch.testing.assert_close(output.double().cpu(), exact((query, key, value))[0], atol=1e-5, rtol=0)

    def test_lazily_negated_view(self):
        query, key, value = tensors(2, self.device)
        negated = torch.complex(query, query).conj().imag  # shares query's memory, means -query
        self.assertTrue(negated.is_neg())
        output = memory_efficient_attention(negated, key, value)
        torch.testing.assert_close(output, memory_efficient_attention(-query, key, value))

    def test_gradients_are_refused_not_dropped(self):
        query, key, value = tensors(3, self.device)
        key.requires_grad_()
        with self.assertRaisesRegex(NotImplementedError, "gradients are not supported in this version"):
            memory_efficient_attention(query, key, value)
        with torch.no_grad():
            expected = memory_efficient_attention(query, key, value)
        output = memory_efficient_attention_forward(query, key, value)
        self.assertFalse(output.requires_grad)
        torch.testing.assert_close(output, expected)

    def test_what_is_refused(self):
        query, key, value = tensors(4, self.device)
        with self.assertRaisesRegex(NotImplementedError, "dtype float64 is not supported"):
            memory_efficient_attention(query.double(), key, value)
        with self.assertRaisesRegex(NotImplementedError, "device meta is not supported"):
            memory_efficient_attention(query.to("meta"), key, value)
        with self.assertRaisesRegex(ValueError, "layout torch.sparse_coo is not supported"):
            memory_efficient_attention(query.to_sparse(), key, value)
        with self.assertRaisesRegex(NotImplementedError, "output_dtype=float16 with float32 inputs"):
            memory_efficient_attention(query, key, value, output_dtype=torch.float16)

    def test_materialize(self):
        dense = LowerTriangularFromBottomRightMask().materialize(
            (2, 3, 5), dtype=torch.bfloat16, device=self.device
        )
        self.assertEqual(
            (dense.dtype, dense.device.type, dense.shape), (torch.bfloat16, self.device, (2, 3, 5))
        )
        kept = torch.ones(3, 5, dtype=torch.bool).tril(2)
        self.assertTrue(torch.equal(dense[1].cpu() == 0, kept))


@unittest.skipUnless(torch.cuda.is_available(), "torch sees no GPU")
class OnTheGpu(OnTheCpu):
    device = "cuda"

    def test_current_stream(self):
        """The kernel runs in the stream that is current, after the work that stands there."""
        query, key, value = tensors(5, self.device, torch.float16, len_q=512, len_k=512, head_dim=64)
        expected = memory_efficient_attention(query, key, value)
        stream = torch.cuda.Stream()
        late = torch.zeros_like(query)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000)
            late.copy_(query)
            output = memory_efficient_attention(late, key, value)
        stream.synchronize()
        torch.testing.assert_close(output, expected, atol=0, rtol=0)

    def test_runs_on_the_gpu(self):
        inputs = tensors(6, self.device)
        memory_efficient_attention(*inputs)
        self.assertNotIn("cpu", attune.last_kernel())

    def test_graph_capture(self):
        """A cold call inside a capture is refused before anything is lost; a warm one is captured and replays."""
        query, key, value = tensors(7, self.device, torch.float16, len_q=70, len_k=90, head_dim=24)
        graph = torch.cuda.CUDAGraph()
        with self.assertRaisesRegex(attune.EnvironmentFailure, "captured into a graph: call prepare"):
            with torch.cuda.graph(graph):
                memory_efficient_attention(query, key, value)
        expected = memory_efficient_attention(query, key, value)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = memory_efficient_attention(query, key, value)
        output.zero_()
        graph.replay()
        torch.cuda.synchronize()
        torch.testing.assert_close(output, expected, atol=0, rtol=0)
