"""Partial attention and its merge: parts of the keys, put together, are the whole."""

import unittest

import numpy as np

import sequence_masks
from attune.ops import LowerTriangularFromBottomRightMask, fmha, merge_attentions
from attune.ops.fmha import memory_efficient_attention_partial
from support import TINY, assert_close, random_inputs, reference


def parts(query, key, value, cuts, **arguments):
    """Partial attention over the keys between the cuts: lists of outputs and of LSEs."""
    edges = list(zip([0, *cuts], [*cuts, key.shape[1]]))
    return zip(
        *(
            memory_efficient_attention_partial(query, key[:, a:b], value[:, a:b], **arguments)
            for a, b in edges
        )
    )


class Partial(unittest.TestCase):
    def test_output_is_float32_by_default(self):
        for dtype in (np.float32, np.float16):
            inputs = random_inputs(0, dtype=dtype)
            output, lse = memory_efficient_attention_partial(*inputs)
            assert_close(self, output, *inputs, output_dtype=np.float32)
            np.testing.assert_allclose(lse, reference(*inputs)[1], atol=2e-3 if dtype == np.float16 else 1e-5)
            output, _ = memory_efficient_attention_partial(*inputs, output_dtype=np.float16)
            assert_close(self, output, *inputs, output_dtype=np.float16)

    def test_every_class_of_mask(self):
        for name, (mask, key_rows) in sequence_masks.make_all().items():
            with self.subTest(name):
                inputs = sequence_masks.inputs(key_rows)
                output, lse = memory_efficient_attention_partial(*inputs, mask)
                assert_close(self, output, *inputs, mask)
                np.testing.assert_allclose(lse, reference(*inputs, mask)[1], atol=1e-5)

    def test_dropout_is_refused(self):
        with self.assertRaisesRegex(
            NotImplementedError, "p=0.5: dropout is not supported in partial attention"
        ):
            memory_efficient_attention_partial(*random_inputs(1), p=0.5)


class Merge(unittest.TestCase):
    def check(self, inputs, attn, lse, mask=None, **arguments):
        merged, merged_lse = merge_attentions(attn, lse, **arguments)
        assert_close(self, merged, *inputs, mask, output_dtype=arguments.get("output_dtype", np.float32))
        np.testing.assert_allclose(merged_lse, reference(*inputs, mask)[1], atol=1e-5)

    def test_parts_are_the_whole(self):
        inputs = random_inputs(2)
        for cuts in ([], [20], [1, 2, 44], list(range(1, 45))):
            with self.subTest(chunks=len(cuts) + 1):
                self.check(inputs, *parts(*inputs, cuts))

    def test_stacked_and_mixed(self):
        inputs = random_inputs(3)
        attn, lse = map(list, parts(*inputs, [9, 30]))
        for attn_split in (attn, tuple(attn), np.stack(attn)):
            for lse_split in (lse, np.stack(lse)):
                self.check(inputs, attn_split, lse_split)

    def test_groups(self):
        query, key, value = random_inputs(4, heads=8)
        inputs = [x.reshape(*x.shape[:2], 2, 4, 24) for x in (query, key, value)]
        attn, lse = map(list, parts(*inputs, [9, 30]))
        self.assertEqual((attn[0].shape, lse[0].shape), ((2, 37, 2, 4, 24), (2, 2, 4, 37)))
        self.check(inputs, attn, lse)
        self.check(inputs, np.stack(attn), np.stack(lse))

    def test_one_head_of_three_axes(self):
        query, key, value = inputs = random_inputs(12, heads=1)
        attn, lse = map(list, parts(*(x[:, :, 0] for x in inputs), [9, 30]))
        self.assertEqual((attn[0].shape, lse[0].shape), ((2, 37, 24), (2, 1, 37)))
        for split in (attn, lse), (np.stack(attn), np.stack(lse)):
            merged, merged_lse = merge_attentions(*split)
            assert_close(self, merged[:, :, None], query, key, value)
            np.testing.assert_allclose(merged_lse, reference(*inputs)[1], atol=1e-5)

    def test_views(self):
        inputs = random_inputs(5)
        attn, lse = map(list, parts(*inputs, [9, 30]))
        head_major = np.stack([x.transpose(0, 2, 1, 3) for x in attn]).transpose(0, 1, 3, 2, 4)
        self.check(inputs, head_major, np.stack(lse)[..., ::-1].copy()[..., ::-1])
        longer = [np.pad(x, [(0, 0)] * 2 + [(0, 11)], constant_values=np.inf) for x in lse]
        self.check(inputs, attn, longer)  # as producers that pad their LSE make it

    def test_output_dtype(self):
        inputs = random_inputs(6)
        attn, lse = map(list, parts(*inputs, [20]))
        self.check(inputs, attn, lse, output_dtype=np.float16)
        half = [x.astype(np.float16) for x in attn]
        self.assertEqual(merge_attentions(half, lse)[0].dtype, np.float16)
        self.assertEqual(merge_attentions(half, lse, output_dtype=np.float32)[0].dtype, np.float32)

    def test_without_lse(self):
        inputs = random_inputs(7)
        attn, lse = map(list, parts(*inputs, [20]))
        merged, none = merge_attentions(attn, lse, write_lse=False)
        self.assertIsNone(none)
        np.testing.assert_array_equal(merged, merge_attentions(attn, lse)[0])

    def test_a_chunk_without_keys_counts_for_nothing(self):
        inputs = random_inputs(8)
        attn, lse = map(list, parts(*inputs, [20, 20]))  # the second has no keys
        self.assertTrue((lse[1] == -np.inf).all())
        attn[1][:] = np.nan
        self.check(inputs, attn, lse)
        merged, merged_lse = merge_attentions([attn[1]], [lse[1]])
        self.assertTrue((merged == 0).all() and (merged_lse == -np.inf).all())

    def test_masked_parts(self):
        """A prefix that all queries see, and a causal end: how a key cache and new keys are put together."""
        query, key, value = random_inputs(9, len_q=30, len_k=45)
        prefix = memory_efficient_attention_partial(query, key[:, :15], value[:, :15])
        mask = LowerTriangularFromBottomRightMask()
        rest = memory_efficient_attention_partial(query, key[:, 15:], value[:, 15:], mask)
        self.check((query, key, value), *zip(prefix, rest), mask=mask)

    def test_what_is_refused(self):
        attn, lse = map(list, parts(*random_inputs(10), [20]))
        for text, arguments in [
            ("Incompatible number of LSE and attention chunks: 2 of attention, 1 of LSE", (attn, lse[:1])),
            ("attn_split: no chunks to merge", ([], [])),
            (
                r"lse\[1\]: shape \[2, 3, 30\], expected \[2, 3, 37\]",
                (attn, [lse[0], lse[1][..., :30]]),
            ),
            (
                r"attn\[0\] has shape .* but attn\[1\] has \[2, 30, 3, 24\]",
                ([attn[0], attn[1][:, :30]], lse),
            ),
            (r"lse\[0\]: ", (attn, [x[:, 0] for x in lse])),
            (r"attn\[0\] is f32 but attn\[1\] is f16", ([attn[0], attn[1].astype(np.float16)], lse)),
        ]:
            with self.subTest(text), self.assertRaisesRegex(ValueError, text):
                merge_attentions(*arguments)
        with self.assertRaisesRegex(NotImplementedError, r"lse_split\[0\]: dtype float16 .* use float32"):
            merge_attentions(attn, [x.astype(np.float16) for x in lse])

    def test_against_the_formula(self):
        generator = np.random.default_rng(11)
        attn = generator.standard_normal((3, 1, 4, 2, 5)).astype(np.float32)
        lse = generator.standard_normal((3, 1, 2, 4)).astype(np.float32) * 20
        weights = np.exp(lse.astype(np.float64) - lse.max(0))
        expected = np.einsum("cbhm,cbmhk->bmhk", weights / weights.sum(0), attn)
        merged, merged_lse = fmha.merge_attentions(attn, lse)
        np.testing.assert_allclose(merged, expected, atol=TINY["float32"])
        np.testing.assert_allclose(merged_lse, np.log(weights.sum(0)) + lse.max(0), rtol=1e-6)
