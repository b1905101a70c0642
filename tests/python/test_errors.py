"""Wrong calls: the exception's type, and what its text tells the caller to do."""

import tempfile
import unittest
from pathlib import Path

import numpy as np

import attune
from attune import _library
from attune.ops import AttentionBias, memory_efficient_attention
from support import random_inputs

ROOT = Path(__file__).resolve().parents[2]


class WrongCalls(unittest.TestCase):
    def setUp(self):
        self.query, self.key, self.value = random_inputs(0)

    def refuses(self, error, text, *inputs, **arguments):
        inputs = inputs or (self.query, self.key, self.value)
        with self.assertRaisesRegex(error, text):
            memory_efficient_attention(*inputs, **arguments)

    def test_not_in_this_version(self):
        self.refuses(NotImplementedError, "p=0.5: dropout is not supported", p=0.5)
        self.refuses(NotImplementedError, "leave op=None", op="cutlass")
        self.refuses(NotImplementedError, "output_dtype=float16 with float32 inputs", output_dtype=np.float16)
        self.refuses(
            NotImplementedError, "tensor biases are not supported", attn_bias=np.zeros((2, 3, 37, 45))
        )
        self.refuses(NotImplementedError, "AttentionBias is not supported", attn_bias=AttentionBias())
        self.refuses(
            NotImplementedError,
            r"5-D .* reshape",
            *(x[:, :, None] for x in (self.query, self.key, self.value)),
        )
        self.refuses(
            NotImplementedError,
            "dtype float64 is not supported; use float32",
            self.query.astype(np.float64),
            self.key,
            self.value,
        )

    def test_senseless_arguments(self):
        self.refuses(ValueError, "Invalid dropout probability: p=1.5", p=1.5)
        self.refuses(ValueError, "Invalid dropout probability: p=nan", p=float("nan"))
        self.refuses(ValueError, "scale is nan", scale=float("nan"))
        self.refuses(TypeError, "expected None or a mask", attn_bias="causal")
        self.refuses(
            TypeError,
            "key: expected a NumPy array, a torch tensor or an object with __dlpack__, got list",
            self.query,
            self.key.tolist(),
            self.value,
        )

    def test_tensors_that_do_not_fit(self):
        query, key, value = self.query, self.key, self.value
        self.refuses(ValueError, "query: rank 2", query[0, 0], key, value)
        self.refuses(ValueError, "key: rank 6", query, key[None, None], value)
        self.refuses(ValueError, "differ in rank", query, key[:, :, 0], value)
        self.refuses(ValueError, "all should have the same dtype", query, key.astype(np.float16), value)
        self.refuses(
            ValueError,
            r"incompatible shapes: query \[2, 37, 3, 24\], key \[2, 45, 1, 24\]",
            query,
            key[:, :, :1],
            value,
        )
        self.refuses(
            ValueError, "key: the last axis has stride 2", query, np.repeat(key, 2, axis=-1)[..., ::2], value
        )

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
