"""Gradients of NumPy arrays against a float64 reference, which finite differences check first."""

import unittest

import numpy as np

import attune
import sequence_masks
from attune.ops import (
    LowerTriangularFromBottomRightMask,
    LowerTriangularMask,
    fmha,
    merge_attentions,
    merge_attentions_backward,
)
from attune.ops.fmha import (
    memory_efficient_attention_backward,
    memory_efficient_attention_forward_requires_grad,
    memory_efficient_attention_partial,
)
from attune.ops.fmha.attn_bias import BlockDiagonalMask, LocalAttentionFromBottomRightMask
from support import (
    TINY,
    assert_gradients_close,
    random_inputs,
    reference,
    reference_gradients,
)


def gradient_of(output, seed=99):
    """A random gradient of an output."""
    return np.random.default_rng(seed).standard_normal(output.shape).astype(output.dtype)


def backward(inputs, attn_bias=None, scale=None, forward={}, grad=gradient_of, **arguments):
    """The gradient of the output that was assumed, and the gradients that follow."""
    output, lse = memory_efficient_attention_forward_requires_grad(*inputs, attn_bias, scale=scale, **forward)
    grad = grad(output)
    gradients = memory_efficient_attention_backward(
        grad, output, lse, *inputs, attn_bias, scale=scale, **arguments
    )
    return grad, gradients


class Reference(unittest.TestCase):
    def test_finite_differences(self):
        """Central differences of sum(grad * output) + sum(grad_lse * lse), one element of each tensor at a time."""
        generator = np.random.default_rng(0)
        inputs = random_inputs(0, batch=1, len_q=4, len_k=5, heads=2, head_dim=3, dtype=np.float64)
        bias = generator.standard_normal((1, 2, 4, 5))
        grad, grad_lse = generator.standard_normal((1, 4, 2, 3)), generator.standard_normal((1, 2, 4))
        tensors = [*inputs, bias]
        gradients = reference_gradients(grad, *tensors, grad_lse=grad_lse)
        for tensor, gradient in zip(tensors, gradients):
            for index in np.ndindex(tensor.shape):
                kept, results = tensor[index], []
                for step in (1e-5, -1e-5):
                    tensor[index] = kept + step
                    output, lse = reference(*tensors)
                    results.append((grad * output).sum() + (grad_lse * lse).sum())
                tensor[index] = kept
                self.assertAlmostEqual((results[0] - results[1]) / 2e-5, gradient[index], places=7)


class Gradients(unittest.TestCase):
    def check(self, inputs, attn_bias=None, scale=None, **arguments):
        grad, gradients = backward(inputs, attn_bias, scale, **arguments)
        assert_gradients_close(self, gradients, grad, *inputs, attn_bias, scale)
        return gradients

    def test_dtypes(self):
        for dtype in (np.float32, np.float16):
            for mask in (None, LowerTriangularMask()):
                with self.subTest(dtype=dtype, mask=mask):
                    self.check(random_inputs(0, dtype=dtype), mask)

    def test_shapes(self):
        for shape in (
            dict(head_dim=1, head_dim_v=7),
            dict(head_dim=64, len_q=1),
            dict(head_dim=100, head_dim_v=33, len_k=1),
            dict(head_dim=256, len_q=70, len_k=130, batch=1, heads=1),
        ):
            with self.subTest(**shape):
                self.check(random_inputs(1, **shape))

    def test_scales(self):
        for scale in (0.0, -0.3, 1.5):
            self.check(random_inputs(2), scale=scale)

    def test_without_heads(self):
        inputs = random_inputs(3, heads=1)
        output, lse = memory_efficient_attention_forward_requires_grad(*(x[:, :, 0] for x in inputs))
        grad = gradient_of(output)
        gradients = memory_efficient_attention_backward(grad, output, lse, *(x[:, :, 0] for x in inputs))
        self.assertEqual([x.ndim for x in gradients], [3, 3, 3])
        assert_gradients_close(self, [x[:, :, None] for x in gradients], grad[:, :, None], *inputs)

    def test_grouped_heads(self):
        query, key, value = random_inputs(4, heads=8)
        for heads in (1, 2, 4):
            self.check((query, key[:, :, :heads], value[:, :, :heads]))
        query, key, value = (x.reshape(*x.shape[:2], 2, 4, 24) for x in (query, key, value))
        self.check((query, key, value))
        self.check((query, key[:, :, :, :1], value[:, :, :, :1]))
        self.check((query, key[:, :, :1], value[:, :, :, :1]))  # of different groups
        expanded = [np.broadcast_to(x[:, :, :, :1], query.shape[:1] + x.shape[1:]) for x in (key, value)]
        self.check((query, *expanded))  # every head has its own gradient: the caller did the broadcast

    def test_views(self):
        packed = np.random.default_rng(5).standard_normal((2, 40, 3, 3, 24)).astype(np.float32)
        query, key, value = (packed[:, :, i] for i in range(3))
        self.check((query[:, ::-1], key[:, 3:], value[:, 3:]))

    def test_any_strides_of_the_gradient(self):
        inputs = random_inputs(6)
        for grad in (
            lambda output: np.broadcast_to(np.float32(1), output.shape),
            lambda output: np.ascontiguousarray(gradient_of(output).transpose(3, 2, 1, 0)).transpose(
                3, 2, 1, 0
            ),
            lambda output: np.repeat(gradient_of(output), 2, axis=-1)[..., ::2],
            lambda output: gradient_of(output)[:, ::-1, :, ::-1],
            lambda output: np.broadcast_to(gradient_of(output)[..., :1], output.shape),
        ):
            self.check(inputs, grad=grad)

    def test_output_dtypes(self):
        for dtype, output_dtype in (np.float16, np.float32), (np.float32, np.float16):
            self.check(random_inputs(7, dtype=dtype), forward=dict(output_dtype=output_dtype))

    def test_every_class_of_packed_sequences(self):
        """Among poison: rows of keys that belong to no sequence get a gradient of 0."""
        for name, (mask, key_rows) in sequence_masks.make_all().items():
            with self.subTest(name):
                inputs = sequence_masks.inputs(key_rows)
                sequence_masks.poison(mask, *inputs[1:])
                unused = np.isnan(inputs[1][0, :, 0, 0])
                for gradient in self.check(inputs, mask)[1:]:
                    self.assertTrue((gradient[:, unused] == 0).all())

    def test_windows(self):
        for mask in (
            LowerTriangularFromBottomRightMask(),
            LowerTriangularFromBottomRightMask().make_local_attention(5),
            LocalAttentionFromBottomRightMask(3, 2),
        ):
            for len_q, len_k in (37, 45), (45, 37), (60, 3):
                with self.subTest(mask=mask, len_q=len_q):
                    self.check(random_inputs(8, len_q=len_q, len_k=len_k), mask)

    def test_queries_that_see_nothing(self):
        inputs = random_inputs(9, len_q=50, len_k=20)
        mask = LowerTriangularFromBottomRightMask()
        output, lse = memory_efficient_attention_forward_requires_grad(*inputs, mask)
        self.assertTrue((lse[..., :30] == -np.inf).all())
        for mark in (-np.inf, np.inf):
            lse[..., :30] = mark
            grad = gradient_of(output)
            gradients = memory_efficient_attention_backward(grad, output, lse, *inputs, mask)
            assert_gradients_close(self, gradients, grad, *inputs, mask)
            self.assertTrue((gradients[0][:, :30] == 0).all())

    def test_empty_extents(self):
        for shape in (dict(batch=0), dict(len_q=0), dict(len_k=0), dict(heads=0)):
            with self.subTest(**shape):
                self.check(random_inputs(10, **shape))

    def test_layouts_of_the_lse(self):
        """As other producers make it: longer than its rows, or [sequences, H, longest]."""
        inputs = random_inputs(11, batch=1)
        mask = BlockDiagonalMask.from_seqlens([30, 0, 7], [20, 5, 20])
        output, lse = memory_efficient_attention_forward_requires_grad(*inputs, mask)
        grad = gradient_of(output)
        longer = np.pad(lse, [(0, 0), (0, 0), (0, 27)], constant_values=np.inf)
        padded = np.full((3, 3, 32), np.inf, np.float32)
        padded[0, :, :30], padded[2, :, :7] = lse[0, :, :30], lse[0, :, 30:]
        for layout in (lse, longer, np.repeat(lse, 2, axis=-1)[..., ::2], padded):
            gradients = memory_efficient_attention_backward(grad, output, layout, *inputs, mask)
            assert_gradients_close(self, gradients, grad, *inputs, mask)

    def test_gradient_of_the_lse(self):
        inputs = random_inputs(12)
        output, lse = memory_efficient_attention_forward_requires_grad(*inputs)
        for grad, grad_lse in [
            (gradient_of(output), gradient_of(lse)),
            (np.zeros_like(output), gradient_of(lse)),
            (gradient_of(output), np.broadcast_to(np.float32(1), lse.shape)),
        ]:
            gradients = memory_efficient_attention_backward(grad, output, lse, *inputs, grad_lse=grad_lse)
            assert_gradients_close(self, gradients, grad, *inputs, grad_lse=grad_lse)

    def test_two_runs_are_equal(self):
        inputs = random_inputs(13, len_q=300, len_k=300)
        _, once = backward(inputs, deterministic=True)
        _, again = backward(inputs, deterministic=True)
        for one, other in zip(once, again):
            np.testing.assert_array_equal(one, other)

    def test_the_kernel_is_the_cpu_s(self):
        self.check(random_inputs(14), op=fmha.cpu.BwOp)
        self.assertIn("cpu", attune.last_kernel())


class BiasTensors(unittest.TestCase):
    SHAPES = [
        (2, 3, 37, 45),
        (1, 3, 37, 45),
        (2, 1, 37, 45),
        (2, 3, 1, 45),
        (1, 1, 1, 45),
        (2, 37, 45),
        (37, 45),
    ]

    def check(self, inputs, attn_bias):
        grad, gradients = backward(inputs, attn_bias, bias_gradient=True)
        assert_gradients_close(self, gradients, grad, *inputs, attn_bias)

    def test_shapes_and_dtypes(self):
        generator = np.random.default_rng(0)
        for shape in self.SHAPES:
            bias = generator.standard_normal(shape)
            for inputs_dtype, dtype in (
                (np.float32, np.float32),
                (np.float16, np.float16),
                (np.float16, np.float32),
            ):
                with self.subTest(shape=shape, dtype=dtype):
                    self.check(random_inputs(1, dtype=inputs_dtype), bias.astype(dtype))

    def test_strides(self):
        inputs = random_inputs(2)
        bias = np.random.default_rng(2).standard_normal((2, 3, 45, 37)).astype(np.float32)
        self.check(inputs, bias.swapaxes(2, 3))
        self.check(inputs, np.broadcast_to(bias[:1, :, :1, :1], (2, 3, 37, 45)))

    def test_groups(self):
        query, key, value = random_inputs(3, heads=4)
        inputs = [x.reshape(*x.shape[:2], 2, 2, 24) for x in (query, key, value)]
        for shape in (2, 2, 2, 37, 45), (1, 2, 1, 37, 45), (1, 1, 2, 1, 45):
            self.check(inputs, np.random.default_rng(3).standard_normal(shape).astype(np.float32))

    def test_on_top_of_masks(self):
        bias = np.random.default_rng(4).standard_normal((1, 3, 37, 45)).astype(np.float32)
        self.check(random_inputs(4), LowerTriangularMask().add_bias(bias))
        self.check(random_inputs(4), LowerTriangularFromBottomRightMask().add_bias(bias))
        for name, (mask, key_rows) in sequence_masks.make_all().items():
            for rows, heads in (sum(sequence_masks.Q_SEQLEN), 1), (1, 2):
                with self.subTest(name, rows=rows):
                    bias = np.random.default_rng(5).standard_normal((1, heads, rows, key_rows))
                    self.check(sequence_masks.inputs(key_rows), mask.add_bias(bias.astype(np.float32)))

    def test_what_has_none(self):
        for attn_bias in (None, LowerTriangularMask(), np.tri(37, 45) > 0):
            with self.assertRaisesRegex(ValueError, "bias_gradient: attn_bias has no tensor of numbers"):
                backward(random_inputs(5), attn_bias, bias_gradient=True)


class Dropout(unittest.TestCase):
    def test_what_forward_dropped(self):
        for mask in (None, LowerTriangularMask(), BlockDiagonalMask.from_seqlens([20, 17], [5, 40])):
            query, key, value = inputs = random_inputs(0, batch=1)
            state = dict(p=0.4, generator=attune.Generator(5, 6))
            output, lse = memory_efficient_attention_forward_requires_grad(*inputs, mask, **state)
            grad = gradient_of(output)
            gradients = memory_efficient_attention_backward(
                grad, output, lse, *inputs, mask, p=0.4, generator=attune.Generator(5, 6)
            )
            keep = self.kept(query, key, mask, state)
            assert_gradients_close(self, gradients, grad, *inputs, mask, keep=keep)

    def kept(self, query, key, mask, state):
        """What the weights are multiplied by, by attention to an identity."""
        identity = np.broadcast_to(np.eye(45, dtype=np.float32)[None, :, None], (1, 45, 3, 45))
        weights = [
            memory_efficient_attention_forward_requires_grad(query, key, identity, mask, **arguments)[0]
            for arguments in (dict(p=0.4, generator=attune.Generator(5, 6)), {})
        ]
        rescale = 1 / (1 - round(0.4 * 65536) / 65536)
        return (np.where(weights[0] > 0, rescale, 0)).transpose(0, 2, 1, 3)

    def test_a_state_is_demanded(self):
        inputs = random_inputs(1)
        with self.assertRaisesRegex(
            ValueError, "p=0.5: what forward dropped is a function of its generator's"
        ):
            backward(inputs, p=0.5)
        for p in (-0.1, 1.5, float("nan")):
            with self.assertRaisesRegex(ValueError, f"Invalid dropout probability: p={p}"):
                backward(inputs, p=p, generator=attune.Generator(1))


class PartsOfTheKeys(unittest.TestCase):
    """Backward through a merge and then through each part is backward through the whole."""

    def check(self, chunks, stacked, dtype=np.float32, mask=None):
        query, key, value = inputs = random_inputs(chunks, len_k=48, dtype=dtype)
        places = [slice(i, None, chunks) for i in range(chunks)]
        attn, lse = map(
            list, zip(*(memory_efficient_attention_partial(query, key[:, s], value[:, s]) for s in places))
        )
        if stacked:
            attn, lse = np.stack(attn), np.stack(lse)
        output, whole_lse = merge_attentions(attn, lse)
        grad, grad_lse = gradient_of(output), gradient_of(whole_lse)
        gradients = merge_attentions_backward(grad, output, whole_lse, attn, lse, grad_lse=grad_lse)
        self.assertEqual(isinstance(gradients[0], list), not stacked)
        whole = [np.zeros(x.shape, np.float64) for x in inputs]
        for s, a, l, ga, gl in zip(places, attn, lse, *gradients):
            part = memory_efficient_attention_backward(ga, a, l, query, key[:, s], value[:, s], grad_lse=gl)
            whole[0] += part[0]
            whole[1][:, s], whole[2][:, s] = part[1:]
        assert_gradients_close(self, [x.astype(dtype) for x in whole], grad, *inputs, grad_lse=grad_lse)

    def test_2_to_16_chunks(self):
        for chunks in range(2, 17):
            with self.subTest(chunks=chunks):
                self.check(chunks, stacked=chunks % 2 == 0)

    def test_float16(self):
        self.check(3, stacked=True, dtype=np.float16)


class Introspection(unittest.TestCase):
    def test_explain_prepare_call(self):
        """Explaining compiles nothing, preparing launches nothing, and calling compiles nothing more."""
        inputs = random_inputs(0, head_dim=11)
        bias = np.zeros((37, 45), np.float32)
        for arguments, operations in [
            (dict(attn_bias=bias), ["delta", "grad_key_value", "grad_query"]),
            (
                dict(attn_bias=bias, bias_gradient=True),
                ["delta", "grad_key_value", "grad_query", "grad_bias"],
            ),
        ]:
            explained = attune.explain_backward(*inputs, **arguments)
            kernels = explained["kernels"]
            self.assertEqual([kernel["spec"]["operation"] for kernel in kernels], operations)
            self.assertEqual({kernel["family"] for kernel in kernels}, {"cpu"})
            self.assertGreaterEqual(explained["workspace_bytes"], 2 * 3 * 37 * 4)
            missing = sum(kernel["state"] == "absent" for kernel in kernels)
            self.assertGreater(missing, 0)
            before = attune.counters()
            attune.prepare_backward(*inputs, **arguments)
            prepared = attune.counters()
            self.assertEqual(
                (prepared.compiles, prepared.launches), (before.compiles + missing, before.launches)
            )
            output, lse = memory_efficient_attention_forward_requires_grad(*inputs, bias)
            before = attune.counters()
            memory_efficient_attention_backward(output, output, lse, *inputs, **arguments)
            after = attune.counters()
            self.assertEqual(
                (after.compiles, after.launches), (before.compiles, before.launches + len(operations))
            )
            self.assertIn(attune.last_kernel(), [kernel["candidate"] for kernel in kernels])


class WrongCalls(unittest.TestCase):
    def setUp(self):
        self.inputs = random_inputs(0)
        self.output, self.lse = memory_efficient_attention_forward_requires_grad(*self.inputs)

    def refuses(self, error, text, grad=None, output=None, lse=None, inputs=None, **arguments):
        output, lse = self.output if output is None else output, self.lse if lse is None else lse
        grad = output if grad is None else grad
        with self.assertRaisesRegex(error, text):
            memory_efficient_attention_backward(grad, output, lse, *(inputs or self.inputs), **arguments)

    def test_gradients_of_the_output(self):
        shape = r"grad_output: shape \[2, 36, 3, 24\], expected \[2, 37, 3, 24\] as output"
        self.refuses(ValueError, shape, grad=self.output[:, 1:])
        dtype = "grad_output: is f16, expected f32 as output"
        self.refuses(ValueError, dtype, grad=self.output.astype(np.float16))
        self.refuses(ValueError, "query and grad_output differ in rank", grad=self.output[0])
        double = "grad: dtype float64 is not supported; use float32, float16 or bfloat16"
        self.refuses(NotImplementedError, double, grad=self.output.astype(np.float64))
        self.refuses(TypeError, "grad: expected a NumPy array, .* got float", grad=1.0)

    def test_outputs(self):
        text = r"output: shape \[2, 37, 3, 23\], expected \[2, 37, 3, 24\], which attention of query"
        self.refuses(ValueError, text, output=self.output[..., 1:])

    def test_lses(self):
        for lse, shape in [
            (self.lse[..., 1:], r"\[2, 3, 36\]"),
            (self.lse[:, :2], r"\[2, 2, 37\]"),
            (self.lse.swapaxes(1, 2), r"\[2, 37, 3\]"),
            (self.lse[0], r"\[3, 37\]"),
        ]:
            text = rf"lse: f32 {shape}, expected float32 \[2, 3, at least 37\]"
            self.refuses(ValueError, "^" + text, lse=lse)
            self.refuses(ValueError, "^grad_" + text, grad_lse=lse)
        double = "lse: dtype float64 is not supported; use float32"
        self.refuses(NotImplementedError, double, lse=self.lse.astype(np.float64))

    def test_lses_of_packed_sequences(self):
        inputs = random_inputs(1, batch=1)
        mask = BlockDiagonalMask.from_seqlens([30, 7], [20, 25])
        self.refuses(
            ValueError,
            r"lse: f32 \[2, 3, 29\], expected float32 \[1, 3, at least 37\] or, padded, \[2, 3, at least 30\]",
            output=self.output[:1],
            lse=self.lse[..., :29],
            inputs=inputs,
            attn_bias=mask,
        )

    def test_what_forward_refuses(self):
        query, key, value = self.inputs
        self.refuses(ValueError, "incompatible shapes", inputs=(query, key[:, :, :2], value))
        self.refuses(ValueError, "attn_bias: shape .* expected", attn_bias=np.zeros((36, 45), np.float32))

    def test_operators(self):
        for op in (fmha.cpu.FwOp, "cutlass", (None, fmha.cpu.BwOp)):
            self.refuses(
                TypeError, "op: expected a backward operator such as attune.ops.fmha.cutlass.BwOp", op=op
            )
        self.refuses(
            ValueError,
            "(?s)^Operator `memory_efficient_attention_backward` does not support inputs:.*"
            "`cutlassB` is not supported because:\n    device=cpu",
            op=fmha.cutlass.BwOp,
        )

    def test_merges(self):
        attn, lse = self.output, self.lse
        with self.assertRaisesRegex(
            ValueError, "Incompatible number of LSE and attention chunks: 1 of attention, 2"
        ):
            merge_attentions_backward(attn, attn, lse, [attn], [lse, lse])
        with self.assertRaisesRegex(ValueError, "grad_output: shape"):
            merge_attentions_backward(attn[:, 1:], attn, lse, [attn], [lse])
        with self.assertRaisesRegex(ValueError, "output: shape"):
            merge_attentions_backward(attn[:, 1:], attn[:, 1:], lse, [attn], [lse])
        with self.assertRaisesRegex(ValueError, "grad_lse: "):
            merge_attentions_backward(attn, attn, lse, [attn], [lse], grad_lse=lse[..., 1:])


if __name__ == "__main__":
    unittest.main()
