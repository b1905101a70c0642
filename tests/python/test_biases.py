"""The masks' own code: materialize against the golden masks, constructor checks. Runs no kernel."""

import json
import unittest
from pathlib import Path

import numpy as np

from attune.ops.fmha.attn_bias import (
    AttentionBias,
    LocalAttentionFromBottomRightMask,
    LowerTriangularFromBottomRightLocalAttentionMask,
    LowerTriangularFromBottomRightMask,
    LowerTriangularMask,
)

GOLDENS = Path(__file__).resolve().parents[1] / "golden" / "masks.json"
CLASSES = {
    cls.__name__: cls
    for cls in (
        LowerTriangularMask,
        LowerTriangularFromBottomRightMask,
        LowerTriangularFromBottomRightLocalAttentionMask,
        LocalAttentionFromBottomRightMask,
    )
}


def construct(case):
    if "make_local_attention" in case["via"]:
        return LowerTriangularFromBottomRightMask().make_local_attention(**case["args"])
    return CLASSES[case["class"]](**case["args"])


class Biases(unittest.TestCase):
    def test_materialize_equals_the_goldens(self):
        cases = [case for case in json.loads(GOLDENS.read_text())["cases"] if case["class"] in CLASSES]
        self.assertEqual({case["class"] for case in cases}, set(CLASSES))
        for case in cases:
            with self.subTest(case["class"], args=case["args"], q_len=case["q_len"], k_len=case["k_len"]):
                dense = construct(case).materialize((case["q_len"], case["k_len"]))
                self.assertEqual(
                    ["".join("1" if x == 0 else "0" for x in row) for row in dense], case["mask"]
                )
                self.assertTrue(((dense == 0) | (dense == -np.inf)).all())

    def test_documented_example(self):
        kept = np.exp(LocalAttentionFromBottomRightMask(window_left=1, window_right=2).materialize((4, 5)))
        np.testing.assert_array_equal(
            kept, [[1, 1, 1, 1, 0], [0, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 1, 1]]
        )

    def test_leading_axes_and_dtype(self):
        dense = LowerTriangularMask().materialize((2, 3, 4, 5), dtype=np.float16)
        self.assertEqual((dense.shape, dense.dtype), ((2, 3, 4, 5), np.float16))
        self.assertTrue((dense == dense[0, 0]).all())
        dense[0, 0, 0, 0] = 1  # the caller's own memory
        self.assertEqual(dense[1, 0, 0, 0], 0)

    def test_windows_are_checked(self):
        for window_size in (0, -3):
            with self.assertRaisesRegex(ValueError, r"Expected `window_size > 0`"):
                LowerTriangularFromBottomRightMask().make_local_attention(window_size)
        with self.assertRaisesRegex(ValueError, r"window_left is -1\. Expected `window_left >= 0`"):
            LocalAttentionFromBottomRightMask(window_left=-1, window_right=0)
        with self.assertRaisesRegex(ValueError, r"window_right is -2\. Expected `window_right >= 0`"):
            LocalAttentionFromBottomRightMask(window_left=0, window_right=-2)

    def test_materialize_is_checked(self):
        with self.assertRaisesRegex(ValueError, r"expected \[\*, queries, keys\]"):
            LowerTriangularMask().materialize((4,))
        with self.assertRaisesRegex(ValueError, "NumPy arrays are on the CPU"):
            LowerTriangularMask().materialize((4, 4), device="cuda")
        with self.assertRaises(NotImplementedError):
            AttentionBias().materialize((4, 4))
