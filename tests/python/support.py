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


def expand_heads(query, key, value):
    """The same call with as many key heads as query heads, 4-D: what grouped heads mean."""
    if query.ndim == 5:
        key, value = (np.broadcast_to(x, x.shape[:2] + query.shape[2:4] + x.shape[4:]) for x in (key, value))
        return [x.reshape(*x.shape[:2], -1, x.shape[-1]) for x in (query, key, value)]
    return [query] + [np.repeat(x, query.shape[2] // max(x.shape[2], 1), axis=2) for x in (key, value)]


def dense_scores(attn_bias, shape):
    """What a bias adds to scores [B, H, Mq, Mkv], in float64."""
    if attn_bias is None:
        return np.zeros(shape)
    if not isinstance(attn_bias, np.ndarray):
        return attn_bias.materialize(shape, dtype=np.float64)
    if attn_bias.dtype == bool:
        attn_bias = np.where(attn_bias, 0, -np.inf)
    if attn_bias.ndim == 3:  # [B or 1, Mq, Mkv]
        attn_bias = attn_bias[:, None]
    return np.broadcast_to(attn_bias.astype(np.float64), shape)


def reference(query, key, value, attn_bias=None, scale=None, rounded=lambda x: x):
    """Output [B, Mq, H, Kv] and LSE [B, H, Mq] in float64, as the documentation's equivalent code computes them; with
    groups [B, Mq, G, H, Kv] and [B, G, H, Mq].

    `rounded` is applied to every intermediate result: the identity, or what a plain implementation in a smaller type
    would keep. NaN in keys and values that no query sees is poison, which the reference does not look at.
    """
    shape = query.shape
    query, key, value = (
        np.nan_to_num(np.asarray(x).astype(np.float64)) for x in expand_heads(query, key, value)
    )
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = rounded(np.einsum("bihk,bjhk->bhij", rounded(query * scale), key))
    scores = scores + dense_scores(attn_bias, scores.shape)
    highest = scores.max(-1, keepdims=True, initial=-np.inf)
    weights = np.exp(scores - np.where(np.isfinite(highest), highest, 0))
    total = weights.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = (np.log(total) + np.where(np.isfinite(highest), highest, 0))[..., 0]
    p = rounded(np.divide(weights, total, out=np.zeros_like(weights), where=total > 0))
    output = rounded(np.einsum("bhij,bjhk->bihk", p, value))
    return output.reshape(*shape[:-1], -1), lse.reshape(shape[0], *shape[2:-1], shape[1])


def assert_close(test, actual, query, key, value, attn_bias=None, scale=None, output_dtype=None):
    """The project's tolerance: within twice the error that a plain implementation in the same dtype makes."""
    dtype = np.dtype(output_dtype or query.dtype)
    coarser = max(dtype, query.dtype, key=lambda d: TINY[d.name])
    exact, _ = reference(query, key, value, attn_bias, scale)
    plain, _ = reference(
        query, key, value, attn_bias, scale, rounded=lambda x: x.astype(coarser).astype(np.float64)
    )
    test.assertEqual(actual.shape, exact.shape)
    test.assertEqual(actual.dtype, dtype)
    error = np.abs(actual.astype(np.float64) - exact).max(initial=0)
    allowed = 2 * np.abs(plain - exact).max(initial=0) + TINY[coarser.name]
    test.assertLessEqual(error, allowed)
