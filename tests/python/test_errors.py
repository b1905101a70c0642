"""Wrong calls: the exception's type, and what its text tells the caller to do."""

import tempfile
import unittest
from pathlib import Path

import numpy as np

import attune
from attune import _library
from attune.ops import AttentionBias, memory_efficient_attention
from attune.ops.fmha.attn_bias import (
    BlockDiagonalMask,
    BlockDiagonalPaddedKeysMask,
    PagedBlockDiagonalPaddedKeysMask,
)
from support import random_inputs

ROOT = Path(__file__).resolve().parents[2]


class WrongCalls(unittest.TestCase):
    def setUp(self):
        self.query, self.key, self.value = random_inputs(0)

    def refuses(self, error, text, *inputs, **arguments):
        inputs = inputs or (self.query, self.key, self.value)
        with self.assertRaisesRegex(error, text):
            memory_efficient_attention(*inputs, **arguments)

    def test_what_no_kernel_does(self):
        query, key, value = self.query, self.key, self.value
        self.refuses(
            NotImplementedError,
            "query: dtype float64 is not supported; use float32, float16 or bfloat16",
            query.astype(np.float64),
            key,
            value,
        )
        self.refuses(
            NotImplementedError,
            "output_dtype: float64 is not supported; use float32, float16 or bfloat16",
            output_dtype=np.float64,
        )
        self.refuses(NotImplementedError, "AttentionBias does not say which", attn_bias=AttentionBias())

    def test_senseless_arguments(self):
        for p in ("1.5", "-0.25", "nan"):
            self.refuses(ValueError, f"Invalid dropout probability: p={p}", p=float(p))
        self.refuses(ValueError, "scale is nan", scale=float("nan"))
        for argument, wrong in [("p", "0.1"), ("p", None), ("scale", "auto")]:
            self.refuses(TypeError, f"{argument}: expected a number, got {wrong!r}", **{argument: wrong})
        for wrong in (17, [np.float32], "half precision"):
            self.refuses(TypeError, "output_dtype: expected a dtype", output_dtype=wrong)
        self.refuses(TypeError, "expected None, a tensor or a mask", attn_bias="causal")
        self.refuses(
            TypeError,
            "key: expected a NumPy array, a torch tensor or an object with __dlpack__, got list",
            self.query,
            self.key.tolist(),
            self.value,
        )

    def test_masked_arrays(self):
        masked = np.ma.masked_array(self.key, self.key > 0)
        self.refuses(TypeError, "key: a masked array's mask would be ignored", self.query, masked, self.value)

    def test_tensors_that_do_not_fit(self):
        query, key, value = self.query, self.key, self.value
        self.refuses(ValueError, "query: rank 2", query[0, 0], key, value)
        self.refuses(ValueError, "key: rank 6", query, key[None, None], value)
        self.refuses(ValueError, "key: rank 7", query, key[None, None, None], value)
        self.refuses(ValueError, "differ in rank", query, key[:, :, 0], value)
        self.refuses(ValueError, "all should have the same dtype", query, key.astype(np.float16), value)
        self.refuses(
            ValueError,
            r"incompatible shapes: query \[2, 37, 3, 24\], key \[2, 45, 2, 24\]",
            query,
            key[:, :, :2],
            value,
        )
        self.refuses(
            ValueError, "key: the last axis has stride 2", query, np.repeat(key, 2, axis=-1)[..., ::2], value
        )

    def test_bias_tensors(self):
        for shape in ((2, 3, 36, 45), (2, 3, 37, 1), (3, 37, 45), (2, 1, 3, 37, 45)):
            self.refuses(
                ValueError,
                r"attn_bias: shape .* expected \[2 or 1, 3 or 1, 37 or 1, 45\]",
                attn_bias=np.zeros(shape, np.float32),
            )
        self.refuses(ValueError, "attn_bias: rank 1", attn_bias=np.zeros(45, np.float32))
        self.refuses(
            NotImplementedError,
            "attn_bias: dtype float64 is not supported; use float32, float16, bfloat16 or bool",
            attn_bias=np.zeros((37, 45)),
        )

    def test_packed_sequences(self):
        packed = [x.reshape(1, -1, 3, 24) for x in (self.query, self.key, self.value)]  # 74 and 90 rows
        blocks, paged = BlockDiagonalMask.from_seqlens, PagedBlockDiagonalPaddedKeysMask.from_seqlens
        for text, mask, inputs in [
            ("expected batch_size=1, got 2", blocks([37], [45]), (self.query, self.key, self.value)),
            ("the sequences have 73 rows together, but query has 74", blocks([73], [90]), packed),
            ("the sequences have 91 rows together, but key has 90", blocks([74], [91]), packed),
            (
                "the sequences have 80 rows together, but key has 90",
                BlockDiagonalPaddedKeysMask.from_seqlens([74], 80, [7]),
                packed,
            ),
            (
                r"block_tables\[0, 1\] is page 10, but key has 10 pages of 9",
                paged([74], [10], [[0, 10]], 9),
                packed,
            ),
            (r"block_tables\[0, 0\] is page -1", paged([74], [10], [[-1, 1]], 9), packed),
            ("90 rows, expected whole pages of 8", paged([74], [10], [[0, 1]], 8), packed),
        ]:
            self.refuses(ValueError, text, *inputs, attn_bias=mask)

    def test_foreign_byte_order_and_odd_strides(self):
        self.refuses(
            ValueError,
            "query: its bytes are in foreign order",
            self.query.astype(">f4"),
            self.key,
            self.value,
        )
        records = np.zeros(self.query.shape, dtype=[("x", "<f4"), ("tag", "u1")])
        self.refuses(ValueError, "no multiple of the element size", records["x"], self.key, self.value)


class Library(unittest.TestCase):
    def test_everything_tried_is_listed(self):
        with tempfile.TemporaryDirectory() as folder:
            missing, garbage = Path(folder) / "missing.so", Path(folder) / "garbage.so"
            garbage.write_bytes(b"not a shared object")
            for path in (missing, garbage):
                with self.assertRaisesRegex(
                    attune.EnvironmentFailure, rf"(?s)cmake --preset release.*{path.name}"
                ):
                    _library.load(path)
        self.assertIsInstance(attune.counters(), attune.Counters)  # the loaded library stays

    def test_version_equals_the_header(self):
        header = (ROOT / "include" / "attune" / "version.h").read_text()
        self.assertIn(f'#define ATTUNE_VERSION "{attune.__version__}"', header)
        self.assertEqual(_library.library().attune_version().decode(), attune.__version__)

    def test_statuses_become_exceptions(self):
        for status, error in [
            (1, ValueError),
            (2, NotImplementedError),
            (3, attune.EnvironmentFailure),
            (4, RuntimeError),
        ]:
            with self.assertRaises(error) as raised:
                _library.check(status)
            self.assertIs(type(raised.exception), error)
