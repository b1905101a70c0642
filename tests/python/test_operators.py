"""The operator classes: what they say of inputs, and what forcing one does. On the CPU; test_torch has the GPU's part."""

import unittest

import numpy as np

import attune
import sequence_masks
from attune.ops import fmha, memory_efficient_attention
from attune.ops.fmha import Inputs
from attune.ops.fmha.attn_bias import BlockDiagonalMask
from support import assert_close, random_inputs

ON_CUDA = "device=cpu (supported: {'cuda'})"
GPU_OPS = [op for op in fmha.ALL_FW_OPS if op is not fmha.cpu.FwOp]


class Reasons(unittest.TestCase):
    def setUp(self):
        self.inputs = random_inputs(0)

    def test_the_cpu_family_runs_everything(self):
        self.assertEqual(fmha.cpu.FwOp.not_supported_reasons(Inputs(*self.inputs)), [])
        for mask, key_rows in sequence_masks.make_all().values():
            inputs = Inputs(*sequence_masks.inputs(key_rows), mask, p=0.1, output_dtype=np.float16)
            self.assertEqual(fmha.cpu.FwOp.not_supported_reasons(inputs), [])

    def test_the_others_want_a_gpu(self):
        for op in GPU_OPS:
            with self.subTest(op.__module__):
                self.assertEqual(op.not_supported_reasons(Inputs(*self.inputs))[0], ON_CUDA)

    def test_their_own_limits(self):
        few = random_inputs(1, len_q=16)
        one = random_inputs(2, len_q=1)
        blocks = BlockDiagonalMask.from_seqlens([20, 17], [25, 20])
        packed = random_inputs(3, batch=1)
        for op, inputs, expected in [
            (fmha.small_k, Inputs(*random_inputs(4, head_dim=32)), []),
            (
                fmha.small_k,
                Inputs(*random_inputs(4, head_dim=32, head_dim_v=40, dtype=np.float16)),
                [
                    "dtype=float16 (supported: {'float32'})",
                    "max(query.shape[-1], value.shape[-1]) > 32: it is 40",
                ],
            ),
            (fmha.triton_splitk, Inputs(*few), []),
            (
                fmha.triton_splitk,
                Inputs(*packed, blocks),
                ["20 queries of one sequence, and it is for at most 16"],
            ),
            (fmha.decoder, Inputs(*one), []),
            (fmha.decoder, Inputs(*few), ["16 queries of one sequence, and it is for at most 1"]),
            (fmha.ck, Inputs(*one), ["it is for AMD GPUs, which this version has no kernels for"]),
            (fmha.ck_decoder, Inputs(*one), ["it is for AMD GPUs, which this version has no kernels for"]),
        ]:
            with self.subTest(op.__name__):
                self.assertEqual(op.FwOp.not_supported_reasons(inputs), [ON_CUDA] + expected)

    def test_a_call_that_makes_no_sense(self):
        query, key, value = self.inputs
        for inputs, text in [
            (Inputs(query, key[:, :, :2], value), "incompatible shapes"),
            (Inputs(query.astype(np.float64), key, value), "query: dtype float64 is not supported"),
            (Inputs(*self.inputs, p=2), "Invalid dropout probability: p=2"),
        ]:
            reasons = fmha.cpu.FwOp.not_supported_reasons(inputs)
            self.assertIn(text, reasons[0])

    def test_the_automatic_choice_says_its_cause_first(self):
        with self.assertRaises(NotImplementedError) as raised:
            memory_efficient_attention(*random_inputs(6, head_dim=600))
        first, *others = str(raised.exception).splitlines()
        self.assertRegex(first, "no kernel for .*: head_dim 600 is outside 1 to 512")
        self.assertRegex(others[0], "cpu: head_dim 600 is outside 1 to 512; head_dim_v 600")

    def test_backward_operators(self):
        amd = "it is for AMD GPUs, which this version has no kernels for"
        self.assertEqual(fmha.cpu.BwOp.not_supported_reasons(Inputs(*self.inputs)), [])
        for mask, key_rows in sequence_masks.make_all().values():
            inputs = Inputs(*sequence_masks.inputs(key_rows), mask, p=0.1, output_dtype=np.float16)
            self.assertEqual(fmha.cpu.BwOp.not_supported_reasons(inputs), [])
        for op, expected in [
            (fmha.flash, [ON_CUDA]),
            (fmha.cutlass, [ON_CUDA]),
            (fmha.small_k, [ON_CUDA]),
            (fmha.ck, [ON_CUDA, amd]),
            (fmha.mma, [ON_CUDA]),
            (fmha.simt, [ON_CUDA]),
        ]:
            with self.subTest(op.__name__):
                self.assertIn(op.BwOp, fmha.ALL_BW_OPS)
                self.assertTrue(issubclass(op.BwOp, fmha.AttentionBwOpBase))
                self.assertEqual(op.BwOp.not_supported_reasons(Inputs(*self.inputs)), expected)
        wide = Inputs(*random_inputs(4, head_dim=40, dtype=np.float16))
        self.assertEqual(
            fmha.small_k.BwOp.not_supported_reasons(wide), fmha.small_k.FwOp.not_supported_reasons(wide)
        )
        reasons = fmha.cpu.BwOp.not_supported_reasons(Inputs(*random_inputs(4, head_dim=600)))
        self.assertIn("head_dim 600 is outside 1 to 512", reasons[0])


class Forced(unittest.TestCase):
    def setUp(self):
        self.inputs = random_inputs(5)

    def test_the_cpu_family(self):
        for op in ((fmha.cpu.FwOp, None), (fmha.cpu.FwOp, fmha.cutlass.BwOp), fmha.cpu.FwOp):
            assert_close(self, memory_efficient_attention(*self.inputs, op=op), *self.inputs)
            self.assertIn("cpu", attune.last_kernel())
        for call in (
            fmha.memory_efficient_attention_forward,
            fmha.memory_efficient_attention_forward_requires_grad,
            fmha.memory_efficient_attention_partial,
        ):
            output = call(*self.inputs, op=fmha.cpu.FwOp)
            assert_close(self, output[0] if isinstance(output, tuple) else output, *self.inputs)

    def test_an_unsuitable_one_says_why(self):
        for op in GPU_OPS:
            with self.assertRaises(ValueError) as raised:
                memory_efficient_attention(*self.inputs, op=(op, None))
            lines = str(raised.exception).splitlines()
            self.assertEqual(lines[0], "Operator `memory_efficient_attention` does not support inputs:")
            self.assertEqual(lines[1], "     query     : shape=(2, 37, 3, 24) (float32)")
            self.assertEqual(lines[6], f"`{op.NAME}` is not supported because:")
            self.assertEqual(lines[7], "    " + ON_CUDA)

    def test_no_other_family_steps_in(self):
        class TensorCores(fmha.AttentionFwOpBase):
            NAME = "tensor cores"
            FAMILIES = fmha.mma.FwOp.FAMILIES
            SUPPORTED_DEVICES = {"cpu", "cuda"}

        reasons = TensorCores.not_supported_reasons(Inputs(*self.inputs))
        self.assertGreater(len(reasons), 0)
        with self.assertRaises(ValueError) as raised:
            memory_efficient_attention(*self.inputs, op=TensorCores)
        self.assertEqual(str(raised.exception).splitlines()[7:], ["    " + reason for reason in reasons])

    def test_what_its_family_refuses(self):
        with self.assertRaises(ValueError) as raised:
            memory_efficient_attention(*random_inputs(7, head_dim=600), op=fmha.cpu.FwOp)
        lines = str(raised.exception).splitlines()
        self.assertEqual(lines[6], "`cpu` is not supported because:")
        self.assertEqual(lines[7], "    head_dim 600 is outside 1 to 512")

    def test_documented_pairs(self):
        for name in ("Cutlass", "CutlassFwdFlashBw", "FlashAttention", "Ck", "CkDecoder", ""):
            forward, backward = getattr(attune.ops, f"MemoryEfficientAttention{name}Op")
            self.assertTrue(issubclass(forward, fmha.AttentionFwOpBase))
            self.assertTrue(issubclass(backward, fmha.AttentionBwOpBase))
            self.assertTrue(issubclass(forward, attune.ops.AttentionOpBase))

    def test_what_is_no_operator(self):
        for op in ("cutlass", fmha.cutlass, fmha.cutlass.BwOp, (fmha.cutlass.BwOp, None), (1, 2, 3)):
            with self.subTest(op=op), self.assertRaisesRegex(TypeError, "op: expected a forward operator"):
                memory_efficient_attention(*self.inputs, op=op)
