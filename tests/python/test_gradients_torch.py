"""torch's autograd through attention and merges, against eager code in float64: on the CPU and, where torch sees one, on a
GPU."""

import unittest
from unittest import mock

try:
    import torch
except ImportError:
    raise unittest.SkipTest("torch is not installed") from None

from torch.utils.checkpoint import checkpoint

import attune
import sequence_masks
from attune import _library, _repeated
from attune.ops import (
    LowerTriangularFromBottomRightMask,
    LowerTriangularMask,
    fmha,
    memory_efficient_attention,
    memory_efficient_attention_backward,
    memory_efficient_attention_forward,
    memory_efficient_attention_forward_requires_grad,
    memory_efficient_attention_partial,
    merge_attentions,
)
from attune.ops.fmha.attn_bias import AttentionBias
from support import random_inputs
from test_torch import WaitingRefused, to_torch

TOLERANCES = {torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}


def dense_bias(attn_bias, shape):
    """What a bias adds to scores of this shape; its tensor may require grad."""
    if isinstance(attn_bias, AttentionBias):
        dense = attn_bias._mask.materialize(shape, torch.float64)
        return dense if attn_bias._dense is None else dense + dense_bias(attn_bias._dense, shape)
    if attn_bias is None:
        return torch.zeros((), dtype=torch.float64)
    return attn_bias.cpu().log() if attn_bias.dtype == torch.bool else attn_bias


def eager(query, key, value, attn_bias=None, keep=1):
    """Output and LSE by plain code, for as many heads of key and value as divide the query's."""
    key, value = (x.repeat_interleave(query.shape[2] // x.shape[2], dim=2) for x in (key, value))
    scores = torch.einsum("bihk,bjhk->bhij", query * query.shape[-1] ** -0.5, key)
    scores = scores + dense_bias(attn_bias, scores.shape)
    lse = scores.logsumexp(-1)
    return torch.einsum("bhij,bjhk->bihk", (scores - lse[..., None]).exp() * keep, value), lse


def leaves(tensors, dtype=None, device=None):
    """Copies that require grad."""
    return [x.detach().to(dtype=dtype, device=device, copy=True).requires_grad_() for x in tensors]


class OnTheCpu(unittest.TestCase):
    device = "cpu"
    own = fmha.cpu

    def tensors(self, seed, dtype=torch.float32, **shape):
        return leaves(to_torch(random_inputs(seed, **shape)), dtype, self.device)

    def weights(self, tensor):
        """What a test multiplies a result by, so that its gradient is this."""
        generator = torch.Generator().manual_seed(tensor.numel())
        return torch.randn(tensor.shape, generator=generator).to(tensor)

    def loss(self, *results):
        return sum((x * self.weights(x)).sum() for x in results)

    def close(self, actual, expected):
        """Gradients of leaves against those of their float64 twins."""
        for one, other in zip(actual, expected):
            self.assertEqual((one.grad.shape, one.grad.dtype), (one.shape, one.dtype))
            expected = torch.zeros_like(other) if other.grad is None else other.grad  # None: not used
            tolerance = TOLERANCES[one.dtype] * max(1, expected.abs().max().item())
            torch.testing.assert_close(one.grad.double().cpu(), expected, atol=tolerance, rtol=0)

    def twins(self, tensors):
        return leaves((x.nan_to_num() for x in tensors), torch.float64, "cpu")

    def differentiate(self, results, expected):
        """The same random gradients into both."""
        weights = [self.weights(x) for x in results]
        sum((x * w).sum() for x, w in zip(results, weights)).backward()
        sum((x * w.double().cpu()).sum() for x, w in zip(expected, weights)).backward()

    def check(self, tensors, make_bias=lambda: None, **arguments):
        """Gradients of attention of three tensors with the bias that `make_bias` makes of the others."""
        exact = self.twins(tensors)
        output = memory_efficient_attention(*tensors[:3], make_bias(*tensors[3:]), **arguments)
        expected, _ = eager(*exact[:3], make_bias(*exact[3:]))
        self.differentiate([output], [expected])
        self.close(tensors, exact)

    def test_dtypes(self):
        for dtype in TOLERANCES:
            for mask in (None, LowerTriangularMask()):
                with self.subTest(dtype=dtype, mask=mask):
                    self.check(self.tensors(0, dtype), lambda: mask)

    def test_output_dtypes(self):
        for dtype, output_dtype in (torch.float16, torch.float32), (torch.float32, torch.float16):
            inputs = self.tensors(1, dtype)
            output = memory_efficient_attention(*inputs, output_dtype=output_dtype)
            self.assertEqual(output.dtype, output_dtype)
            exact = self.twins(inputs)
            output.sum().backward()
            eager(*exact)[0].sum().backward()
            for one, other in zip(inputs, exact):
                torch.testing.assert_close(one.grad.double().cpu(), other.grad, atol=1e-2, rtol=1e-2)

    def test_every_packed_mask(self):
        for name, (mask, key_rows) in sequence_masks.make_all().items():
            with self.subTest(name):
                arrays = sequence_masks.inputs(key_rows)
                sequence_masks.poison(mask, *arrays[1:])
                self.check(leaves(to_torch(arrays, self.device)), lambda: mask)

    def test_grouped_heads(self):
        query, key, value = self.tensors(2, heads=8)
        for heads in (1, 2):
            self.check([query, *leaves(x[:, :, :heads] for x in (key, value))])
            query.grad = None

    def test_views_of_one_projection(self):
        (packed,) = leaves([torch.randn(2, 33, 3, 4, 16)], device=self.device)
        (exact,) = self.twins([packed])
        output = memory_efficient_attention(*packed.unbind(2))
        expected, _ = eager(*exact.unbind(2))
        output.transpose(1, 2).square().sum().backward()
        expected.square().sum().backward()
        self.close([packed], [exact])

    def test_gradients_of_any_strides(self):
        for use in (
            lambda output: output.sum(),
            lambda output: output.mean(),
            lambda output: output[:, :3, :, ::2].sum(),
            lambda output: (output.flip(1).transpose(1, 3) * torch.arange(37, device=output.device)).sum(),
        ):
            inputs = self.tensors(3)
            exact = self.twins(inputs)
            use(memory_efficient_attention(*inputs)).backward()
            use(eager(*exact)[0]).backward()
            self.close(inputs, exact)

    def test_only_what_is_needed(self):
        """Nothing is allocated for the others."""
        everything = self.tensors(4)
        self.loss(memory_efficient_attention(*everything)).backward()
        for wanted in range(1, 8):
            inputs = [x.detach() for x in everything]
            for i, tensor in enumerate(inputs):
                tensor.requires_grad_(bool(wanted >> i & 1))
            with mock.patch.object(fmha._autograd, "run_backward", wraps=fmha._autograd.run_backward) as run:
                self.loss(memory_efficient_attention(*inputs)).backward()
            self.assertEqual(run.call_args.args[2].wanted, (*(x.requires_grad for x in inputs), False))
            for one, other in zip(inputs, everything):
                if one.requires_grad:
                    torch.testing.assert_close(one.grad, other.grad, atol=2e-5, rtol=0)
                else:
                    self.assertIsNone(one.grad)

    def test_bias_tensors(self):
        for shape in (2, 3, 37, 45), (1, 3, 1, 45), (37, 45):
            for make_bias in (
                lambda bias: bias,
                lambda bias: LowerTriangularMask().add_bias(bias),
                lambda bias: LowerTriangularFromBottomRightMask().add_bias(bias),
            ):
                (bias,) = leaves([torch.randn(shape)], device=self.device)
                self.check([*self.tensors(5), bias], make_bias)

    def test_a_bias_alone(self):
        inputs = [x.detach() for x in self.tensors(6)]
        for make_bias in (lambda bias: bias, lambda bias: LowerTriangularMask().add_bias(bias)):
            (bias,) = leaves([torch.randn(1, 3, 37, 45)], device=self.device)
            (exact,) = self.twins([bias])
            output = memory_efficient_attention(*inputs, make_bias(bias))
            expected, _ = eager(*(x.double().cpu() for x in inputs), make_bias(exact))
            self.differentiate([output], [expected])
            self.close([bias], [exact])

    def test_a_boolean_bias(self):
        seen = torch.rand(37, 45, device=self.device) < 0.8
        self.check(self.tensors(7), lambda: seen)

    def test_dropout(self):
        """What forward dropped, whatever was drawn in between."""
        query, key, value = inputs = self.tensors(8)
        identity = torch.eye(45, device=self.device)[None, :, None].expand(2, 45, 3, 45)
        with torch.no_grad():
            torch.manual_seed(3)
            kept = memory_efficient_attention(query, key, identity, p=0.4).transpose(1, 2) > 0
        torch.manual_seed(3)
        output = memory_efficient_attention(*inputs, p=0.4)
        torch.rand(5)
        exact = self.twins(inputs)
        expected, _ = eager(*exact, keep=kept.double().cpu() / (1 - round(0.4 * 65536) / 65536))
        output.sum().backward(retain_graph=True)
        expected.sum().backward()
        self.close(inputs, exact)
        once = [x.grad.clone() for x in inputs]
        output.sum().backward()
        for tensor, gradient in zip(inputs, once):
            torch.testing.assert_close(tensor.grad, 2 * gradient, atol=2e-5, rtol=0)

    def test_checkpoint(self):
        """Computing the forward pass again drops what was dropped."""
        gradients = []
        for call in (
            lambda f, *x: f(*x),
            lambda f, *x: checkpoint(f, *x, use_reentrant=False),
        ):
            inputs = self.tensors(9)
            torch.manual_seed(4)
            self.loss(call(lambda *x: memory_efficient_attention(*x, p=0.5), *inputs)).backward()
            gradients.append([x.grad for x in inputs])
        for one, other in zip(*gradients):
            torch.testing.assert_close(one, other, atol=2e-5, rtol=0)

    def test_any_use_of_a_partial_s_results(self):
        for use in (
            lambda output, lse: (output.square().sum() + lse.sin().sum()),
            lambda output, lse: lse.sum(),
            lambda output, lse: (lse.transpose(1, 2)[..., None] * output).sum(),
        ):
            inputs = self.tensors(10)
            exact = self.twins(inputs)
            use(*memory_efficient_attention_partial(*inputs)).backward()
            use(*eager(*exact)).backward()
            self.close(inputs, exact)

    def test_parts_are_the_whole(self):
        for chunks in (1, 2, 3, 8, 16):
            for stack in (list, torch.stack):
                with self.subTest(chunks=chunks, stack=stack.__name__):
                    query, key, value = inputs = self.tensors(11, len_k=48)
                    parts = [
                        memory_efficient_attention_partial(query, key[:, i::chunks], value[:, i::chunks])
                        for i in range(chunks)
                    ]
                    attn, lse = (stack(x) for x in zip(*parts))
                    output, lse = merge_attentions(attn, lse)
                    exact = self.twins(inputs)
                    self.differentiate([output, lse], eager(*exact))
                    self.close(inputs, exact)

    def test_merge(self):
        """Every chunk's gradient, by the formula in plain code. LSEs are longer than chunks, and stacked or not."""
        for stack in (False, True):
            attn, lse = torch.randn(3, 2, 7, 2, 5), torch.randn(3, 2, 2, 9)
            attn, lse = leaves([attn, lse], device=self.device)
            exact_attn, exact_lse = self.twins([attn, lse])
            given = (attn, lse) if stack else (attn.unbind(), lse.unbind())
            output, merged = merge_attentions(*given)
            (output.square().sum() + merged.square().sum()).backward()
            weights = exact_lse[..., :7].softmax(0).transpose(2, 3)[..., None]
            expected = (weights * exact_attn).sum(0)
            (expected.square().sum() + exact_lse[..., :7].logsumexp(0).square().sum()).backward()
            self.close([attn, lse], [exact_attn, exact_lse])
            self.assertTrue((lse.grad[..., 7:] == 0).all())

    def test_merge_of_chunks_that_do_not_all_require_grad(self):
        attn, lse = torch.randn(2, 1, 7, 2, 5, device=self.device), torch.randn(
            2, 1, 2, 7, device=self.device
        )
        first = attn[0].clone().requires_grad_()
        output, merged = merge_attentions([first, attn[1]], lse)
        (gradient,) = torch.autograd.grad(merged.sum(), first, retain_graph=True)
        self.assertTrue((gradient == 0).all())
        (gradient,) = torch.autograd.grad(output.sum(), first)
        weight = lse.softmax(0)[0].transpose(1, 2)[..., None].expand_as(first)
        torch.testing.assert_close(gradient, weight, atol=2e-5, rtol=0)
        with self.assertRaisesRegex(ValueError, "write_lse should be true if inputs require gradients."):
            merge_attentions([first, attn[1]], lse, write_lse=False)
        with torch.no_grad():
            self.assertIsNone(merge_attentions([first, attn[1]], lse, write_lse=False)[1])

    def test_without_autograd(self):
        inputs = self.tensors(12)
        with torch.no_grad():
            self.assertFalse(memory_efficient_attention(*inputs).requires_grad)
        self.assertFalse(memory_efficient_attention_forward(*inputs).requires_grad)
        output, lse = memory_efficient_attention_forward_requires_grad(*inputs)
        self.assertFalse(output.requires_grad or lse.requires_grad)
        recorded = memory_efficient_attention(*inputs)
        gradients = torch.autograd.grad(recorded, inputs, self.weights(output))
        by_hand = memory_efficient_attention_backward(self.weights(output), output, lse, *inputs)
        for one, other in zip(by_hand, gradients):
            self.assertFalse(one.requires_grad)
            torch.testing.assert_close(one, other, atol=2e-5, rtol=0)

    def test_once(self):
        inputs = self.tensors(13)
        (gradient,) = torch.autograd.grad(
            memory_efficient_attention(*inputs).square().sum(), inputs[:1], create_graph=True
        )
        with self.assertRaisesRegex(RuntimeError, "once_differentiable"):
            gradient.sum().backward()

    def test_a_scale_has_no_gradient(self):
        inputs = self.tensors(14)
        scale = torch.tensor(0.3, requires_grad=True)
        for given in inputs, [x.detach() for x in inputs]:
            with self.assertRaisesRegex(NotImplementedError, "scale: .* multiply query by it"):
                memory_efficient_attention(*given, scale=scale)
        self.assertTrue(
            torch.equal(
                memory_efficient_attention(*inputs, scale=scale.detach()),
                memory_efficient_attention(*inputs, scale=scale.item()),
            )
        )
        with self.assertRaisesRegex(TypeError, "p: expected a number, got '0.1'"):
            memory_efficient_attention(*inputs, p="0.1")

    def test_a_saved_tensor_that_changed(self):
        query, key, value = self.tensors(14)
        output = memory_efficient_attention(query * 1, key, value)
        with torch.no_grad():
            key.add_(1)
        with self.assertRaisesRegex(RuntimeError, "modified by an inplace operation"):
            output.sum().backward()

    def test_operators(self):
        inputs = self.tensors(15)
        self.assertEqual(self.own.BwOp.not_supported_reasons(fmha.Inputs(*inputs)), [])
        self.check(inputs, op=(self.own.FwOp, self.own.BwOp))
        with self.assertRaisesRegex(
            ValueError, "(?s)`memory_efficient_attention_backward`.*`ckB` is not sup"
        ):
            memory_efficient_attention(*inputs, op=(self.own.FwOp, fmha.ck.BwOp))
        with torch.no_grad():
            memory_efficient_attention(*inputs, op=(self.own.FwOp, fmha.ck.BwOp))
        with self.assertRaisesRegex(TypeError, "op: expected a backward operator"):
            memory_efficient_attention(*inputs, op=(self.own.FwOp, fmha.decoder.FwOp))

    def test_other_frameworks_have_no_autograd(self):
        query, key, value = self.tensors(16)
        with self.assertRaisesRegex(
            TypeError, "key: expected a torch tensor, since .* requires grad, got ndarray"
        ):
            memory_efficient_attention(query, random_inputs(16)[1], value)
        attn, lse = memory_efficient_attention_partial(query, key, value)
        with self.assertRaisesRegex(TypeError, "attn_split: expected a torch tensor, .* got ndarray"):
            merge_attentions([attn, attn.detach().cpu().numpy()], [lse, lse])

    def test_repeated_calls(self):
        """Calls that differ in one thing, each twice, with other numbers in other memory: the second is a kept one."""
        bias = torch.randn(2, 3, 37, 45, device=self.device)
        plain = lambda dtype=torch.float32, **shape: [x.detach() for x in self.tensors(19, dtype, **shape)]
        like = lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).normal_()
        calls = [
            (plain(), {}, {}),
            (plain(head_dim=16, head_dim_v=8), {}, {}),
            (plain(torch.float16), {}, {}),
            (plain(), dict(attn_bias=LowerTriangularMask()), {}),
            (plain(), dict(attn_bias=LowerTriangularMask().add_bias(bias)), dict(bias_gradient=True)),
            (plain(), dict(attn_bias=bias[:, :1]), dict(bias_gradient=True)),
            (plain(), dict(attn_bias=bias > 0), {}),
            (plain(), dict(scale=0.3), {}),
            (plain(), {}, dict(deterministic=True)),
            (plain(), {}, dict(grad_lse=True)),
            (plain(), dict(p=0.3), {}),
        ]
        for count, (inputs, arguments, asked) in enumerate(calls, 1):

            def step(inputs, seed):
                """Gradients for a random gradient of the output; dropout has a state of its own in each."""
                torch.manual_seed(seed)
                state = lambda: dict(generator=attune.Generator(seed)) if "p" in arguments else {}
                output, lse = memory_efficient_attention_forward_requires_grad(*inputs, **arguments, **state())
                given = {**arguments, **asked, **state()}
                if "grad_lse" in given:
                    given["grad_lse"] = torch.randn_like(lse)
                return memory_efficient_attention_backward(
                    torch.randn_like(output), output, lse, *inputs, **given
                )

            with self.subTest(call=count):
                _repeated._kept.clear()
                step(inputs, 1)
                others = [like(x) for x in inputs]
                again = step(others, 2)
                self.assertEqual(len(_repeated._kept), 2)  # forward, too
                _repeated._kept.clear()
                expected = step(others, 2)
                # Of the query's gradient a GPU may add up the parts in any order.
                torch.testing.assert_close(again[0], expected[0], atol=2e-3, rtol=1e-3)
                torch.testing.assert_close(again[1:], expected[1:], atol=0, rtol=0)

    def test_kept_calls_differ_in_everything_that_matters(self):
        query, key, value = (x.detach() for x in self.tensors(20))
        output, lse = memory_efficient_attention_forward_requires_grad(query, key, value)
        grad = torch.randn_like(output)
        backward = lambda grad, **arguments: memory_efficient_attention_backward(
            grad, output, lse, query, key, value, **arguments
        )
        first = backward(grad)
        for other in torch.ones_like(output[..., :1]).expand_as(output), torch.complex(grad, grad).conj().imag:
            expected = backward(other.resolve_neg().contiguous())
            torch.testing.assert_close(backward(other), expected, atol=1e-5, rtol=0)
        expected = backward(grad, grad_lse=torch.zeros_like(lse))
        torch.testing.assert_close(expected, first, atol=1e-5, rtol=0)
        with self.assertRaisesRegex(ValueError, "pass a generator in that state"):
            backward(grad, p=0.5)
        with self.assertRaisesRegex(ValueError, "grad"):
            backward(grad[:, :-1])
        for needed in (True, False, False), (False, True, True):
            for x, one in zip((query, key, value), needed):
                x.requires_grad_(one)
            memory_efficient_attention(query, key, value).backward(grad)
            for x, one, gradient in zip((query, key, value), needed, first):
                self.assertEqual(x.grad is not None, one)
                if one:
                    torch.testing.assert_close(x.grad, gradient, atol=1e-5, rtol=0)
                x.grad = None

    def backward_options(self, inputs, **arguments):
        """What the library is told when autograd asks for gradients: its two structs of options."""
        library, name = _library.library(), "attune_memory_efficient_attention_backward"
        output = memory_efficient_attention(*inputs, **arguments)
        _repeated._kept.clear()  # a kept call has its own
        with mock.patch.object(library, name, wraps=getattr(library, name)) as run:
            output.sum().backward()
        return run.call_args.args[-2]._obj, run.call_args.args[-1]

    def test_the_operator_s_families_run_backward(self):
        (_, family), *_ = self.own.BwOp.FAMILIES
        for op, families in ((None, self.own.BwOp), 1 << family), ((self.own.FwOp, None), 0):
            options, _ = self.backward_options(self.tensors(17), op=op)
            self.assertEqual(options.families, families)

    def test_determinism_is_torch_s_setting(self):
        for setting in (False, True):
            torch.use_deterministic_algorithms(setting)
            try:
                _, options = self.backward_options(self.tensors(18))
            finally:
                torch.use_deterministic_algorithms(False)
            self.assertEqual(options.deterministic, setting)


@unittest.skipUnless(torch.cuda.is_available(), "torch sees no GPU")
class OnTheGpu(OnTheCpu):
    device = "cuda"
    own = fmha.simt

    def test_the_kernel_is_the_gpu_s(self):
        for dtype, op, kernel in (torch.float32, fmha.simt, "simt"), (torch.float16, fmha.mma, "mma"):
            inputs = self.tensors(0, dtype, head_dim=64)
            output, lse = memory_efficient_attention_forward_requires_grad(*inputs)
            memory_efficient_attention_backward(output, output, lse, *inputs, op=op.BwOp)
            self.assertTrue(attune.last_kernel().startswith(kernel), attune.last_kernel())

    @unittest.skipUnless(
        torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0), "needs Hopper"
    )
    def test_documented_operators_on_hopper(self):
        for op in fmha.flash, fmha.cutlass:
            with self.subTest(op.__name__):
                inputs = self.tensors(0, torch.float16, head_dim=64)
                output, lse = memory_efficient_attention_forward_requires_grad(*inputs)
                memory_efficient_attention_backward(output, output, lse, *inputs, op=op.BwOp)
                self.assertTrue(attune.last_kernel().startswith("sm90"), attune.last_kernel())

    def test_documented_operators(self):
        half, single = (self.tensors(1, dtype, head_dim=32) for dtype in (torch.float16, torch.float32))
        for op, inputs in [
            (fmha.flash, half),
            (fmha.cutlass, half),
            (fmha.cutlass, single),
            (fmha.small_k, single),
        ]:
            with self.subTest(op.__name__, dtype=inputs[0].dtype):
                self.assertEqual(op.BwOp.not_supported_reasons(fmha.Inputs(*inputs)), [])
                self.check(leaves(inputs), op=(op.FwOp, op.BwOp))
        for op, inputs in (fmha.flash, single), (fmha.small_k, half), (fmha.ck, half), (fmha.cpu, half):
            self.assertGreater(len(op.BwOp.not_supported_reasons(fmha.Inputs(*inputs))), 0)
            with self.assertRaisesRegex(ValueError, f"`{op.BwOp.NAME}` is not supported because"):
                memory_efficient_attention(*inputs, op=(None, op.BwOp))

    def test_stream_of_the_forward_pass(self):
        inputs = self.tensors(2, torch.float16, len_q=512, len_k=512, head_dim=64)
        expected = torch.autograd.grad(memory_efficient_attention(*inputs).sum(), inputs)
        stream = torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000)
            late = [x * 1 for x in inputs]
            gradients = torch.autograd.grad(memory_efficient_attention(*late).sum(), late)
        stream.synchronize()
        for one, other in zip(gradients, expected):
            torch.testing.assert_close(one, other, atol=1e-3, rtol=0)

    def test_nothing_waits(self):
        mask = fmha.BlockDiagonalMask.from_seqlens(torch.tensor([10, 27], device="cuda"), device="cuda")
        inputs = self.tensors(3, batch=1, len_k=37)
        step = lambda: torch.autograd.grad(memory_efficient_attention(*inputs, mask).sum(), inputs)
        expected = step()
        with WaitingRefused():
            gradients = step()
        for one, other in zip(gradients, expected):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=0)

    def test_graph_capture(self):
        """Forward and backward in one graph, after a call that compiled their kernels."""
        inputs = self.tensors(4, torch.float16, head_dim=64)
        (bias,) = leaves([torch.randn(1, 3, 37, 45)], torch.float16, "cuda")
        leaf = [*inputs, bias]
        step = lambda: torch.autograd.grad(memory_efficient_attention(*inputs, bias).square().sum(), leaf)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            gradients = step()
        with torch.no_grad():
            for tensor in leaf:
                tensor.copy_(torch.randn_like(tensor))
        graph.replay()
        replayed = [x.clone() for x in gradients]
        for one, other in zip(replayed, step()):
            torch.testing.assert_close(one, other, atol=2e-2, rtol=1e-2)

    def test_memory_is_torch_s(self):
        """Backward's scratch memory, too, is seen by torch's allocator, and given back."""
        inputs = self.tensors(5, torch.float16, len_q=512, len_k=512, head_dim=64)
        output, lse = memory_efficient_attention_forward_requires_grad(*inputs)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        gradients = memory_efficient_attention_backward(output, output, lse, *inputs)
        results = sum(x.numel() * x.element_size() for x in gradients)
        self.assertGreater(torch.cuda.max_memory_allocated(), before + results)
        self.assertLess(torch.cuda.memory_allocated(), before + results + 8192)

    def test_a_broadcast_bias_costs_no_matrix(self):
        """Its gradient is summed where it is computed."""
        inputs = self.tensors(7, torch.float16, batch=1, len_q=4096, len_k=4096, heads=4, head_dim=64)
        (bias,) = leaves([torch.randn(1, 4, 1, 4096)], torch.float16, "cuda")
        output = memory_efficient_attention(*inputs, bias)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        output.sum().backward()
        self.assertLess(torch.cuda.max_memory_allocated() - before, 2**25)  # the matrix takes 2^27

    def test_deterministic_runs_are_equal(self):
        inputs = self.tensors(6, torch.bfloat16, len_q=700, len_k=700, head_dim=64)
        output, lse = memory_efficient_attention_forward_requires_grad(*inputs)
        runs = [
            memory_efficient_attention_backward(output, output, lse, *inputs, deterministic=True)
            for _ in range(3)
        ]
        for run in runs[1:]:
            for one, other in zip(run, runs[0]):
                self.assertTrue(torch.equal(one, other))

    def test_turns_come_to_an_end(self):
        """Blocks that add up a query's gradient in turn wait for each other: passed on too soon, a turn never comes."""
        queries, keys = [130, 1, 3, 257, 64, 77], [200, 5, 35, 300, 64, 92]
        query, grad = (torch.randn(1, sum(queries), 4, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        key, value = (torch.randn(1, sum(keys), 4, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        bias = torch.randn(1, 4, sum(queries), sum(keys), device="cuda")
        mask = fmha.attn_bias.BlockDiagonalCausalMask.from_seqlens(queries, keys).to("cuda").add_bias(bias)
        # With both the kernel for wide heads is Hopper's at this head dim, too.
        output, lse = memory_efficient_attention_forward_requires_grad(
            query, key, value, mask, 0.3, generator=attune.Generator(1)
        )
        runs = [
            memory_efficient_attention_backward(
                grad, output, lse, query, key, value, mask, 0.3, deterministic=True, generator=attune.Generator(1)
            )
            for _ in range(100)
        ]
        for run in runs[1:]:
            for one, other in zip(run, runs[0]):
                self.assertTrue(torch.equal(one, other))

    def test_wrong_starts_come_to_an_end(self):
        """Starts that fall, on the device, where nobody checks them: two sequences take turns at the same sums."""
        query, grad = (torch.randn(1, 600, 1, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        key, value = (torch.randn(1, 512, 1, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        mask = fmha.attn_bias.BlockDiagonalMask.from_seqlens([200, 200, 200], [256, 0, 256]).to("cuda")
        inputs = query, key, value, mask
        output, lse = memory_efficient_attention_forward_requires_grad(*inputs)
        right = memory_efficient_attention_backward(grad, output, lse, *inputs, deterministic=True)
        starts = mask.q_seqinfo.seqstart
        kept = starts.clone()
        starts.copy_(torch.tensor([0, 600, 0, 600]))
        for _ in range(20):
            memory_efficient_attention_backward(grad, output, lse, *inputs, deterministic=True)
        starts.copy_(kept)
        for one, other in zip(memory_efficient_attention_backward(grad, output, lse, *inputs, deterministic=True), right):
            self.assertTrue(torch.equal(one, other))


if __name__ == "__main__":
    unittest.main()
