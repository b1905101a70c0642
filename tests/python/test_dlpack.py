"""Objects with DLPack: both capsules, strides, offsets, and that memory goes back to its producer."""

import gc
import unittest
import weakref

import numpy as np

from attune.ops import (
    LowerTriangularMask,
    memory_efficient_attention,
    memory_efficient_attention_backward,
    memory_efficient_attention_forward_requires_grad,
)
from support import assert_close, assert_gradients_close, random_inputs

if np.lib.NumpyVersion(np.__version__) < "2.1.0":
    raise unittest.SkipTest(f"NumPy {np.__version__} lends nothing through DLPack 1.0, 2.1 does")


class Producer:
    """Lends a NumPy array through DLPack: what any other framework looks like from outside."""

    def __init__(self, array, device=None):
        self.array = array
        self.device = device

    def __dlpack__(self, *, stream=None, max_version=None):
        return self.array.__dlpack__(stream=stream, max_version=max_version)

    def __dlpack_device__(self):
        return self.device or self.array.__dlpack_device__()


class OldProducer(Producer):
    """From before DLPack 1.0."""

    def __dlpack__(self, *, stream=None):
        return self.array.__dlpack__(stream=stream)


class DLPack(unittest.TestCase):
    def test_both_capsules(self):
        inputs = random_inputs(0)
        for producer in (Producer, OldProducer):
            with self.subTest(producer.__name__):
                output = memory_efficient_attention(*map(producer, inputs), LowerTriangularMask())
                self.assertIsInstance(output, np.ndarray)
                assert_close(self, output, *inputs, LowerTriangularMask())

    def test_float16_views(self):
        query, key, value = random_inputs(1, dtype=np.float16)
        views = query[:, 5:], key[:, 1::2], value[:, 1::2]
        assert_close(self, memory_efficient_attention(*map(Producer, views)), *views)

    def test_biases(self):
        inputs = random_inputs(5)
        for bias in (
            np.random.default_rng(5).standard_normal((37, 45)).astype(np.float32),
            np.tri(37, 45) > 0,
        ):
            output = memory_efficient_attention(*inputs, Producer(bias))
            assert_close(self, output, *inputs, bias)

    def test_mixed_with_numpy(self):
        query, key, value = random_inputs(2)
        assert_close(
            self, memory_efficient_attention(query, Producer(key), OldProducer(value)), query, key, value
        )

    def test_gradients(self):
        inputs = random_inputs(6)
        output, lse = memory_efficient_attention_forward_requires_grad(*map(Producer, inputs))
        grad = np.broadcast_to(output[:, :1], output.shape)  # strides of 0 go through DLPack, too
        given = map(Producer, (grad, output, lse, *inputs))
        assert_gradients_close(self, memory_efficient_attention_backward(*given), grad, *inputs)

    def test_memory_goes_back(self):
        for producer in (Producer, OldProducer):
            with self.subTest(producer.__name__):
                # An array cannot be referenced weakly, a subclass can; its base is what DLPack holds on to.
                query, key, value = (x.view(Lent) for x in random_inputs(3))
                gone = weakref.ref(query)
                memory_efficient_attention(*map(producer, (query, key, value)))
                del query
                gc.collect()
                self.assertIsNone(gone())

    def test_what_is_refused(self):
        query, key, value = random_inputs(4)
        with self.assertRaisesRegex(NotImplementedError, "query: DLPack device type 10 is not supported"):
            memory_efficient_attention(Producer(query, device=(10, 0)), key, value)
        with self.assertRaisesRegex(NotImplementedError, "DLPack type code 2 with 64 bits"):
            memory_efficient_attention(Producer(query.astype(np.float64)), key, value)
        with self.assertRaisesRegex(ValueError, "rank 7"):
            memory_efficient_attention(query, Producer(key[None, None, None]), value)


class Lent(np.ndarray):
    pass
