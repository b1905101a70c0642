"""What the tests share: random tensors, the float64 reference and the tolerance."""

import numpy as np

TINY = {"float32": 1e-6, "float16": 1e-5, "bfloat16": 1e-4}


def random_inputs(seed, batch=2, len_q=37, len_k=45, heads=3, head_dim=24, head_dim_v=None, dtype=np.float32):
    """query, key, value as [B, M, H, K]."""
    generator = np.random.default_rng(seed)
    shapes = [
        (batch, len_q, heads, head_dim),
        (batch, len_k, heads, head_dim),
        (batch, len_k, heads, head_dim_v or head_dim),
    ]
    return [generator.standard_normal(shape).astype(dtype) for shape in shapes]


def reference(query, key, value, attn_bias=None, scale=None, rounded=lambda x: x):
    """Output [B, Mq, H, Kv] and LSE [B, H, Mq] in float64, as the documentation's equivalent code computes them.

    `rounded` is applied to every intermediate result: the identity, or what a plain implementation in a smaller type
    would keep.
    """
    query, key, value = (np.asarray(x).astype(np.float64) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = rounded(np.einsum("bihk,bjhk->bhij", rounded(query * scale), key))
    if attn_bias is not None:
        scores = scores + attn_bias.materialize(scores.shape, dtype=np.float64)
    highest = scores.max(-1, keepdims=True, initial=-np.inf)
    weights = np.exp(scores - np.where(np.isfinite(highest), highest, 0))
    total = weights.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = (np.log(total) + np.where(np.isfinite(highest), highest, 0))[..., 0]
    p = rounded(np.divide(weights, total, out=np.zeros_like(weights), where=total > 0))
    return rounded(np.einsum("bhij,bjhk->bihk", p, value)), lse


def assert_close(test, actual, query, key, value, attn_bias=None, scale=None):
    """The project's tolerance: within twice the error that a plain implementation in the same dtype makes."""
    dtype = query.dtype
    exact, _ = reference(query, key, value, attn_bias, scale)
    plain, _ = reference(
        query, key, value, attn_bias, scale, rounded=lambda x: x.astype(dtype).astype(np.float64)
    )
    test.assertEqual(actual.shape, exact.shape)
    test.assertEqual(actual.dtype, dtype)
    error = np.abs(actual.astype(np.float64) - exact).max(initial=0)
    allowed = 2 * np.abs(plain - exact).max(initial=0) + TINY[dtype.name]
    test.assertLessEqual(error, allowed)
