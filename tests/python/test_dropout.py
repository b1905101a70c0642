"""Dropout: which weights go, by what the output shows of them. An identity as value makes the output the weights."""

import copy
import pickle
import unittest

import numpy as np

import attune
import sequence_masks
from attune.ops import LowerTriangularMask, fmha, memory_efficient_attention
from attune.ops.fmha.attn_bias import BlockDiagonalMask
from support import assert_close, random_inputs, reference

LEN_K = 64


def weights_of(inputs, p, mask=None, **arguments):
    """The dropped softmax weights [B, Mq, H, Mkv]."""
    query, key = inputs[:2]
    value = np.broadcast_to(
        np.eye(key.shape[1], dtype=query.dtype)[None, :, None], key.shape[:3] + (key.shape[1],)
    )
    return memory_efficient_attention(query, key, value, mask, p, **arguments)


class Dropout(unittest.TestCase):
    def setUp(self):
        self.inputs = random_inputs(0, len_q=50, len_k=LEN_K)

    def test_what_is_kept_is_scaled(self):
        for mask in (None, LowerTriangularMask()):
            kept = weights_of(self.inputs, 0.0, mask)
            for p in (0.1, 0.5, 0.9):
                p_used = round(p * 65536) / 65536
                dropped = weights_of(self.inputs, p, mask, generator=attune.Generator(7))
                gone = dropped == 0
                np.testing.assert_allclose(dropped[~gone], kept[~gone] / (1 - p_used), rtol=1e-5)
                seen = kept > 0
                # 5 standard deviations of a binomial: one run in a million is beyond.
                allowed = 5 * (p * (1 - p) / seen.sum()) ** 0.5
                self.assertLess(abs(gone[seen].mean() - p), allowed)

    def test_p_0_and_1(self):
        output = memory_efficient_attention(*self.inputs, p=0.0)
        assert_close(self, output, *self.inputs)
        output, lse = fmha.memory_efficient_attention_forward_requires_grad(*self.inputs, p=1.0)
        self.assertTrue((output == 0).all())
        np.testing.assert_allclose(lse, reference(*self.inputs)[1], atol=1e-5)

    def test_lse_does_not_know(self):
        _, lse = fmha.memory_efficient_attention_forward_requires_grad(*self.inputs, p=0.5)
        np.testing.assert_allclose(lse, reference(*self.inputs)[1], atol=1e-5)

    def test_p_is_checked(self):
        for p in (-0.1, 1.5, float("nan")):
            with self.assertRaisesRegex(ValueError, rf"Invalid dropout probability: p={p}, expected 0 to 1"):
                memory_efficient_attention(*self.inputs, p=p)

    def test_heads_batches_and_rows_differ(self):
        gone = weights_of(self.inputs, 0.5) == 0
        rows = gone.transpose(0, 2, 1, 3).reshape(-1, LEN_K)
        self.assertEqual(len(np.unique(rows, axis=0)), len(rows))

    def test_logical_position_alone_counts(self):
        """A sequence drops the same pairs among others, padded, or in pages, as the same block of a batch."""
        gone = weights_of(self.inputs, 0.5, generator=attune.Generator(3)) == 0
        packed = [x.reshape(1, -1, *x.shape[2:]) for x in self.inputs]
        mask = BlockDiagonalMask.from_seqlens([50, 50], [LEN_K, LEN_K])
        varlen = weights_of(packed, 0.5, mask, generator=attune.Generator(3)) == 0
        for b in range(2):
            np.testing.assert_array_equal(
                varlen[0, 50 * b : 50 * b + 50, :, LEN_K * b : LEN_K * b + LEN_K], gone[b]
            )

    def test_every_class_of_mask(self):
        """The pairs of block b, query i and key j are dropped alike whatever the class, where both see them."""
        decided = {}  # 1 dropped, 0 kept, nan where no class has looked yet; [Mq, H, Mkv] of each block
        for name, (mask, key_rows) in sequence_masks.make_all().items():
            query, key, _ = sequence_masks.inputs(key_rows)
            seen = weights_of((query, key), 0.0, mask) > 0
            dropped = weights_of((query, key), 0.5, mask, generator=attune.Generator(5)) == 0
            for b, (begin, end, rows) in enumerate(mask._blocks.intervals()):
                now = np.where(seen, dropped, np.nan)[0, begin:end][..., rows]
                before = decided.setdefault(b, np.full(now.shape, np.nan))
                both = ~np.isnan(before) & ~np.isnan(now)
                np.testing.assert_array_equal(before[both], now[both], name)
                decided[b] = np.where(np.isnan(before), now, before)
        everything = np.concatenate([pairs.ravel() for pairs in decided.values()])
        self.assertEqual(np.isnan(everything).sum(), 0)
        self.assertTrue(0.45 < everything.mean() < 0.55)


class Generators(unittest.TestCase):
    def setUp(self):
        self.inputs = random_inputs(1)

    def drop(self, generator=None):
        return memory_efficient_attention(*self.inputs, p=0.5, generator=generator)

    def test_each_repeats_from_its_seed(self):
        for make in (attune.Generator, np.random.default_rng):
            generator = make(11)
            first, second = self.drop(generator), self.drop(generator)
            self.assertFalse(np.array_equal(first, second))
            generator = make(11)
            np.testing.assert_array_equal(self.drop(generator), first)
            np.testing.assert_array_equal(self.drop(generator), second)

    def test_an_explicit_state(self):
        generator = attune.Generator(2**64 - 1)
        self.drop(generator)
        second = self.drop(generator)
        self.assertEqual(generator.next(), (2**64 - 1, 2))
        np.testing.assert_array_equal(self.drop(attune.Generator(2**64 - 1, 1)), second)

    def test_the_default(self):
        attune.manual_seed(4)
        first, second = self.drop(), self.drop()
        self.assertFalse(np.array_equal(first, second))
        attune.manual_seed(4)
        np.testing.assert_array_equal(self.drop(), first)

    def test_no_state_is_taken_without_dropout(self):
        generator = attune.Generator(4)
        memory_efficient_attention(*self.inputs, p=0.0, generator=generator)
        self.assertEqual(generator.next(), (4, 0))

    def test_copies_go_on_alike(self):
        generator = attune.Generator(7)
        self.drop(generator)
        copies = copy.copy(generator), copy.deepcopy(generator), pickle.loads(pickle.dumps(generator))
        self.assertEqual(repr(generator), "attune.Generator(seed=7, offset=1)")
        second = self.drop(generator)
        for same in copies:
            np.testing.assert_array_equal(self.drop(same), second)

    def test_others_are_refused(self):
        with self.assertRaisesRegex(TypeError, "generator: expected an attune.Generator"):
            self.drop(1234)
        for seed in (1.5, "a", None):
            with self.assertRaisesRegex(TypeError, f"seed: expected an integer, got {seed!r}"):
                attune.Generator(seed)
            with self.assertRaisesRegex(TypeError, "seed: expected an integer"):
                attune.manual_seed(seed)
