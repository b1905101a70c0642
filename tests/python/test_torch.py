"""Torch tensors, on the CPU and, where torch sees a GPU, on its streams."""

import unittest
import weakref
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import numpy as np

try:
    import torch
except ImportError:
    raise unittest.SkipTest("torch is not installed") from None

import attune
import sequence_masks
from attune import _repeated
from attune.ops import (
    LowerTriangularFromBottomRightMask,
    LowerTriangularMask,
    fmha,
    memory_efficient_attention,
    memory_efficient_attention_forward,
    memory_efficient_attention_forward_requires_grad,
    merge_attentions,
)
from attune.ops.fmha.attn_bias import (
    BlockDiagonalGappyKeysMask,
    BlockDiagonalMask,
    LocalAttentionFromBottomRightMask,
    PagedBlockDiagonalPaddedKeysMask,
)
from support import random_inputs, reference


def to_torch(arrays, device="cpu", dtype=torch.float32):
    return [torch.from_numpy(x).to(device=device, dtype=dtype) for x in arrays]


def tensors(seed, device="cpu", dtype=torch.float32, **shape):
    return to_torch(random_inputs(seed, **shape), device, dtype)


def exact(inputs, mask=None):
    output, lse = reference(*(x.double().cpu().numpy() for x in inputs), mask)
    return torch.from_numpy(output), torch.from_numpy(lse)


class OnTheCpu(unittest.TestCase):
    device = "cpu"
    own_op = fmha.cpu.FwOp

    def close(self, actual, inputs, mask=None, atol=1e-5):
        torch.testing.assert_close(actual.double().cpu(), exact(inputs, mask)[0], atol=atol, rtol=0)

    def test_dtypes(self):
        for dtype, tolerance in [(torch.float32, 1e-5), (torch.float16, 3e-3), (torch.bfloat16, 2e-2)]:
            with self.subTest(dtype):
                inputs = tensors(0, self.device, dtype)
                output, lse = memory_efficient_attention_forward_requires_grad(*inputs, LowerTriangularMask())
                self.assertEqual(
                    (output.dtype, output.device, lse.dtype), (dtype, inputs[0].device, torch.float32)
                )
                self.close(output, inputs, LowerTriangularMask(), tolerance)
                expected_lse = exact(inputs, LowerTriangularMask())[1]
                torch.testing.assert_close(lse.double().cpu(), expected_lse, atol=tolerance, rtol=1e-4)

    def test_output_dtypes(self):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            inputs = tensors(0, self.device, torch.float16)
            output = memory_efficient_attention(*inputs, output_dtype=dtype)
            self.assertEqual(output.dtype, dtype)
            self.close(output, inputs, atol=2e-2 if dtype == torch.bfloat16 else 3e-3)

    def test_views(self):
        packed = (
            torch.from_numpy(np.random.default_rng(1).standard_normal((2, 33, 3, 4, 16)))
            .float()
            .to(self.device)
        )
        query, key, value = packed.unbind(2)
        key = key.transpose(1, 2).contiguous().transpose(1, 2)
        output = memory_efficient_attention(query, key, value)
        self.close(output, (query, key, value))

    def test_lazily_negated_view(self):
        query, key, value = tensors(2, self.device)
        negated = torch.complex(query, query).conj().imag  # shares query's memory, means -query
        self.assertTrue(negated.is_neg())
        output = memory_efficient_attention(negated, key, value)
        torch.testing.assert_close(output, memory_efficient_attention(-query, key, value))

    def test_what_is_refused(self):
        query, key, value = tensors(4, self.device)
        with self.assertRaisesRegex(NotImplementedError, "dtype float64 is not supported"):
            memory_efficient_attention(query.double(), key, value)
        with self.assertRaisesRegex(NotImplementedError, "device meta is not supported"):
            memory_efficient_attention(query.to("meta"), key, value)
        with self.assertRaisesRegex(ValueError, "layout torch.sparse_coo is not supported"):
            memory_efficient_attention(query.to_sparse(), key, value)
        with self.assertRaisesRegex(NotImplementedError, "query: nested tensors are not supported"):
            memory_efficient_attention(torch.nested.nested_tensor(list(query)), key, value)

    def test_materialize(self):
        dense = LowerTriangularFromBottomRightMask().materialize(
            (2, 3, 5), dtype=torch.bfloat16, device=self.device
        )
        self.assertEqual(
            (dense.dtype, dense.device.type, dense.shape), (torch.bfloat16, self.device, (2, 3, 5))
        )
        kept = torch.ones(3, 5, dtype=torch.bool).tril(2)
        self.assertTrue(torch.equal(dense[1].cpu() == 0, kept))
        self.assertEqual(LowerTriangularMask().materialize((2, 2)).dtype, torch.float32)

    def test_tensor_biases(self):
        inputs = tensors(5, self.device)
        for bias in (torch.randn(2, 3, 37, 45), torch.randn(1, 3, 1, 45), torch.rand(37, 45) < 0.8):
            for dtype in (bias.dtype,) if bias.dtype == torch.bool else (torch.float32, torch.bfloat16):
                moved = bias.to(self.device, dtype)
                mask = moved.float().cpu().numpy() if dtype != torch.bool else bias.numpy()
                self.close(memory_efficient_attention(*inputs, moved), inputs, mask)
                causal = LowerTriangularMask().add_bias(moved)
                self.close(memory_efficient_attention(*inputs, causal), inputs, causal)

    def test_every_packed_mask(self):
        """Lengths as lists, and as integer tensors on the device."""
        lengths_on_device = lambda numbers: torch.tensor(numbers, device=self.device)
        for made in (sequence_masks.make_all(), sequence_masks.make_all(lengths_on_device)):
            for name, (mask, key_rows) in made.items():
                with self.subTest(name):
                    arrays = sequence_masks.inputs(key_rows)
                    sequence_masks.poison(mask.to("cpu"), *arrays[1:])
                    inputs = to_torch(arrays, self.device)
                    self.close(memory_efficient_attention(*inputs, mask), inputs, mask)

    def test_tables_are_torch_tensors_where_torch_asks_for_them(self):
        for make in (
            lambda numbers: BlockDiagonalMask.from_seqlens(numbers, device=torch.device(self.device)),
            lambda numbers: BlockDiagonalMask.from_seqlens(torch.tensor(numbers, device=self.device)),
            lambda numbers: BlockDiagonalMask.from_seqlens(numbers).to(torch.device(self.device)),
            lambda numbers: BlockDiagonalMask.from_seqlens(torch.tensor(numbers)).to(self.device),
            lambda numbers: BlockDiagonalMask.from_tensor_list(
                [torch.zeros(1, n, 2, device=self.device) for n in numbers]
            )[0],
        ):
            info = make([3, 5]).q_seqinfo
            self.assertEqual((info.seqstart.dtype, info.seqstart.device.type), (torch.int32, self.device))
            self.assertEqual((info.seqstart_py, info.max_seqlen, info.min_seqlen), ([0, 3, 8], 5, 3))
        causal = make([3, 5]).make_causal().to("cpu")
        self.assertEqual(type(causal).__name__, "BlockDiagonalCausalMask")
        self.assertIs(causal.q_seqinfo, causal.k_seqinfo)

    def test_tensor_lists(self):
        pieces = [torch.randn(2, m, 3, 8, device=self.device) for m in (4, 0, 7)]
        mask, packed = BlockDiagonalMask.from_tensor_list(pieces)
        self.assertEqual(packed.shape, (1, 22, 3, 8))
        for piece, back in zip(pieces, mask.split(packed)):
            self.assertTrue(torch.equal(piece, back))

    def test_dropout_follows_torch(self):
        inputs = tensors(6, self.device)
        torch.manual_seed(1)
        first, second = (memory_efficient_attention(*inputs, p=0.5) for _ in range(2))
        self.assertFalse(torch.equal(first, second))
        torch.manual_seed(1)
        self.assertTrue(torch.equal(memory_efficient_attention(*inputs, p=0.5), first))
        state = torch.get_rng_state()
        memory_efficient_attention(*inputs, p=0.0)
        self.assertTrue(torch.equal(torch.get_rng_state(), state))
        for make in (lambda: torch.Generator().manual_seed(5), lambda: attune.Generator(5)):
            one, other = (memory_efficient_attention(*inputs, p=0.5, generator=make()) for _ in range(2))
            self.assertTrue(torch.equal(one, other))
        with self.assertRaisesRegex(TypeError, "generator: expected .*, got Tensor"):
            memory_efficient_attention(*inputs, p=0.5, generator=torch.zeros(2))

    def test_partial_and_merge(self):
        query, key, value = inputs = tensors(7, self.device, torch.float16)
        parts = [
            fmha.memory_efficient_attention_partial(query, key[:, i::3], value[:, i::3]) for i in range(3)
        ]
        attn, lse = zip(*parts)
        self.assertEqual(attn[0].dtype, torch.float32)
        for split in (attn, lse), (torch.stack(attn), torch.stack(lse)):
            merged, merged_lse = merge_attentions(*split, output_dtype=torch.bfloat16)
            self.assertEqual((merged.dtype, merged.device), (torch.bfloat16, query.device))
            self.close(merged, inputs, atol=2e-2)
            torch.testing.assert_close(merged_lse.double().cpu(), exact(inputs)[1], atol=2e-3, rtol=0)

    @unittest.skipUnless(hasattr(torch, "compiler"), "this torch has no compiler")
    def test_beside_torch_compile(self):
        """As docs/python.md has it: the compiler stops at the call, and what it makes of the rest fits any shape."""
        attend = torch.compiler.disable(memory_efficient_attention)

        def layer(query, key, value):
            return attend(query * 2, key, value, LowerTriangularMask()) * 2

        compiled = torch.compile(layer, backend="eager")
        for len_q in (5, 9, 13):
            inputs = tensors(8, self.device, len_q=len_q)
            self.assertTrue(torch.equal(compiled(*inputs), layer(*inputs)))

    def test_repeated_calls(self):
        """Calls that differ in one thing, each twice, with other numbers in other memory: the second is a kept one."""
        wide = torch.randn(3, 2, 40, 3, 48, device=self.device)
        bias = torch.randn(2, 3, 37, 45, device=self.device)
        plain = lambda dtype=torch.float32, **shape: tensors(0, self.device, dtype, **shape)
        calls = [
            (plain(), {}),
            (plain(head_dim=16), {}),
            (plain(head_dim_v=8), {}),
            (plain(torch.float16), {}),
            (list(wide[..., :24]), {}),
            (list(wide.transpose(0, 1).contiguous().transpose(0, 1)[..., 24:]), {}),
            (plain(), dict(attn_bias=LowerTriangularMask())),
            (plain(), dict(attn_bias=LocalAttentionFromBottomRightMask(3, 2))),
            (plain(), dict(attn_bias=LocalAttentionFromBottomRightMask(3, 4))),
            (plain(), dict(attn_bias=bias)),
            (plain(), dict(attn_bias=bias[:, :1])),
            (plain(), dict(attn_bias=bias > 0)),
            (plain(), dict(attn_bias=LowerTriangularMask().add_bias(bias))),
            (plain(), dict(scale=0.3)),
            (plain(), dict(scale=torch.tensor(0.7))),
            (plain(), dict(output_dtype=torch.bfloat16)),
        ]
        function = memory_efficient_attention_forward_requires_grad
        for count, (inputs, options) in enumerate(calls, 1):
            with self.subTest(call=count):
                _repeated._kept.clear()
                function(*inputs, **options)
                others = [
                    torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device) for x in inputs
                ]
                for x in others:
                    x.normal_()
                again = function(*others, **options)
                self.assertEqual(len(_repeated._kept), 1)
                _repeated._kept.clear()
                torch.testing.assert_close(again, function(*others, **options), atol=0, rtol=0)

    def test_kept_calls_differ_in_everything_that_matters(self):
        query, key, value = tensors(0, self.device)
        scale, other = torch.tensor(0.3), torch.randn(37, 45, device=self.device)
        first = memory_efficient_attention(query, key, value, scale=scale)
        scale.fill_(0.9)  # the same object
        changed = memory_efficient_attention(query, key, value, scale=scale)
        self.assertFalse(torch.equal(first, changed))
        torch.testing.assert_close(changed, memory_efficient_attention(query, key, value, scale=float(scale)))
        memory_efficient_attention(query, key, value, other)
        added = memory_efficient_attention(query, key, value, 2 * other)
        self.close(added, (query, key, value), (2 * other).cpu().numpy())
        for numbers in query, 2 * query:
            negated = torch.complex(numbers, numbers).conj().imag
            self.close(memory_efficient_attention(negated, key, value), (-numbers, key, value))

    def test_a_wrong_call_is_refused_each_time(self):
        query, key, value = tensors(0, self.device)
        memory_efficient_attention(query, key, value)
        kept = len(_repeated._kept)
        for _ in range(2):
            with self.assertRaisesRegex(ValueError, "incompatible shapes"):
                memory_efficient_attention(query, key[:, :-1], value)
            with self.assertRaisesRegex(ValueError, "Invalid dropout probability"):
                memory_efficient_attention(query, key, value, p=1.5)
        self.assertEqual(len(_repeated._kept), kept)

    def test_kept_calls_are_bounded(self):
        query, key, value = tensors(0, self.device)
        with mock.patch.object(_repeated, "_MOST", 3):
            for rows in range(1, 9):
                for _ in range(2):
                    self.close(
                        memory_efficient_attention(query[:, :rows], key, value), (query[:, :rows], key, value)
                    )
                self.assertLessEqual(len(_repeated._kept), 3)

    def test_threads_share_kept_calls(self):
        inputs = [tensors(seed, self.device) for seed in range(8)]
        expected = [memory_efficient_attention(*x) for x in inputs]
        with ThreadPoolExecutor(8) as pool:
            for _ in range(20):
                outputs = list(pool.map(lambda x: memory_efficient_attention(*x), inputs))
                self.assertTrue(all(map(torch.equal, outputs, expected)))

    def test_forced_operator(self):
        inputs = tensors(8, self.device)
        self.assertEqual(self.own_op.not_supported_reasons(fmha.Inputs(*inputs)), [])
        self.close(memory_efficient_attention(*inputs, op=(self.own_op, None)), inputs)
        self.assertIn(self.own_op.NAME, attune.last_kernel())


class WaitingRefused:
    """Within it, what waits for the GPU in torch raises."""

    def __enter__(self):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")

    def __exit__(self, *_):
        torch.cuda.set_sync_debug_mode("default")


@unittest.skipUnless(torch.cuda.is_available(), "torch sees no GPU")
class OnTheGpu(OnTheCpu):
    device = "cuda"
    own_op = fmha.simt.FwOp

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

    def test_device_lengths_wait_for_nothing(self):
        """Making masks from lengths on the GPU, and calling with them: no number comes to the host."""
        on_gpu = {}

        def lengths(numbers):
            return on_gpu.setdefault(str(numbers), torch.tensor(numbers, device="cuda", dtype=torch.int32))

        masks = sequence_masks.make_all(lengths)
        inputs = {rows: to_torch(sequence_masks.inputs(rows), "cuda") for _, rows in masks.values()}
        for mask, rows in masks.values():
            memory_efficient_attention(*inputs[rows], mask)  # compiles
        with WaitingRefused():
            outputs = {
                name: memory_efficient_attention(*inputs[rows], mask)
                for name, (mask, rows) in sequence_masks.make_all(lambda x: on_gpu[str(x)]).items()
            }
        for name, (mask, rows) in masks.items():
            with self.subTest(name):
                self.close(outputs[name], inputs[rows], mask)

    def test_kept_calls_of_packed_sequences(self):
        lengths = torch.tensor([20, 0, 30], dtype=torch.int32, device="cuda")
        gappy = lambda: BlockDiagonalGappyKeysMask.from_seqlens([5, 6, 7], [0, 20, 20, 50], lengths)
        mask, other = gappy(), BlockDiagonalMask.from_seqlens([10, 8], [25, 25])
        for seed in range(4):
            inputs = tensors(seed, self.device, batch=1, len_q=18, len_k=50)
            if seed == 2:
                lengths.copy_(torch.tensor([4, 0, 9]))  # seen by kept calls, too
            for each in mask, other, gappy():
                self.close(memory_efficient_attention(*inputs, each), inputs, each)
        self.assertEqual([len(each._kept_calls) for each in (mask, other)], [1, 1])
        with self.assertRaisesRegex(ValueError, "the sequences have 18 rows together, but query has 17"):
            memory_efficient_attention(inputs[0][:, :17], *inputs[1:], mask)
        tables = weakref.ref(mask._blocks.q_starts)
        del mask, each
        self.assertIsNone(tables())

    def test_lengths_that_are_still_being_computed(self):
        inputs = tensors(9, "cuda", batch=1, len_q=40, len_k=60)
        expected = memory_efficient_attention(*inputs, BlockDiagonalMask.from_seqlens([10, 30], [25, 35]))
        queries, keys = (torch.tensor(x, device="cuda", dtype=torch.int32) for x in ([10, 30], [25, 35]))
        late = torch.zeros_like(queries)
        torch.cuda.synchronize()
        torch.cuda._sleep(200_000_000)
        late.copy_(queries)
        output = memory_efficient_attention(*inputs, BlockDiagonalMask.from_seqlens(late, keys))
        torch.testing.assert_close(output, expected, atol=0, rtol=0)

    def test_wrong_lengths_on_the_device_write_nothing_outside(self):
        query, key, value = tensors(10, "cuda", batch=1, len_q=40, len_k=60)
        for wrong in ([2**30, 5], [-7, 90], [35, 900]):
            lengths = torch.tensor(wrong, device="cuda", dtype=torch.int32)
            for mask in (
                BlockDiagonalMask.from_seqlens(lengths),
                PagedBlockDiagonalPaddedKeysMask.from_seqlens(
                    lengths,
                    lengths,
                    torch.tensor([[2**20, -5], [7, 3]], device="cuda", dtype=torch.int32),
                    12,
                ),
            ):
                memory_efficient_attention(query, key, value, mask)
                torch.cuda.synchronize()  # an access outside mapped memory would be reported here

    def test_tables_of_the_host_are_copied_once(self):
        inputs = tensors(11, "cuda", batch=1, len_q=40, len_k=60)
        mask = BlockDiagonalMask.from_seqlens([10, 30], [25, 35])
        expected = memory_efficient_attention(*inputs, mask)
        with WaitingRefused():
            output = memory_efficient_attention(*inputs, mask)
        torch.testing.assert_close(output, expected, atol=0, rtol=0)
        with self.assertRaisesRegex(ValueError, "the sequences have 60 rows together, but key has 59"):
            memory_efficient_attention(inputs[0], inputs[1][:, :59], inputs[2][:, :59], mask)

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

    def test_graph_of_packed_sequences(self):
        """Lengths on the GPU are read at each replay, so a graph serves every batch of the same size."""
        query, key, value = tensors(12, "cuda", torch.float16, batch=1, len_q=2, len_k=2 * 64)
        lengths = torch.tensor([5, 64], device="cuda", dtype=torch.int32)
        make = fmha.attn_bias.BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens
        mask = make([1, 1], 64, lengths, device="cuda")
        memory_efficient_attention(query, key, value, mask)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = memory_efficient_attention(query, key, value, mask)
        for now in ([5, 64], [33, 1], [0, 17]):
            lengths.copy_(torch.tensor(now))
            graph.replay()
            self.close(output, (query, key, value), make([1, 1], 64, now), atol=3e-3)

    def test_a_capture_does_not_copy_tables(self):
        query, key, value = tensors(13, "cuda", batch=1, len_q=40, len_k=60)
        make = lambda: BlockDiagonalMask.from_seqlens([10, 30], [25, 35])
        expected = memory_efficient_attention(query, key, value, make())
        with self.assertRaisesRegex(attune.EnvironmentFailure, r"use bias.to\('cuda:0'\) before the capture"):
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                memory_efficient_attention(query, key, value, make())
        ready = make().to("cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = memory_efficient_attention(query, key, value, ready)
        graph.replay()
        torch.testing.assert_close(output, expected, atol=0, rtol=0)

    def test_documented_operators(self):
        half = tensors(14, "cuda", torch.float16, len_q=16)
        single = tensors(15, "cuda", len_q=16)
        one_query = tensors(16, "cuda", torch.float16, len_q=1)
        for op, inputs, kernels in [
            (fmha.flash, half, ("mma", "sm90")),
            (fmha.cutlass, half, ("mma", "sm90")),
            (fmha.cutlass, single, ("simt",)),
            (fmha.small_k, single, ("simt",)),
            (fmha.triton_splitk, half, ("mma",)),
            (fmha.decoder, one_query, ("mma",)),
            (fmha.mma, half, ("mma",)),
            (fmha.simt, half, ("simt",)),
        ]:
            with self.subTest(op.__name__):
                self.assertEqual(op.FwOp.not_supported_reasons(fmha.Inputs(*inputs)), [])
                self.close(memory_efficient_attention(*inputs, op=(op.FwOp, None)), inputs, atol=3e-3)
                self.assertTrue(attune.last_kernel().startswith(kernels), attune.last_kernel())
        for op, inputs in [
            (fmha.flash, single),
            (fmha.small_k, half),
            (fmha.decoder, half),
            (fmha.ck, half),
            (fmha.cpu, half),
        ]:
            reasons = op.FwOp.not_supported_reasons(fmha.Inputs(*inputs))
            self.assertGreater(len(reasons), 0)
            with self.assertRaises(ValueError) as raised:
                memory_efficient_attention(*inputs, op=(op.FwOp, None))
            text = str(raised.exception)
            self.assertTrue(text.startswith("Operator `memory_efficient_attention` does not support inputs:"))
            self.assertIn(reasons[0], text)

    def test_dropout_is_the_cpu_s(self):
        on_gpu, on_cpu = (tensors(17, device) for device in ("cuda", "cpu"))
        outputs = [
            memory_efficient_attention(*inputs, p=0.3, generator=attune.Generator(9)).cpu()
            for inputs in (on_gpu, on_cpu)
        ]
        torch.testing.assert_close(*outputs, atol=1e-5, rtol=0)
        with self.assertRaisesRegex(ValueError, "generator: it is on cuda"):
            memory_efficient_attention(*on_gpu, p=0.3, generator=torch.Generator("cuda"))
