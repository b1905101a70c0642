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


def dense_scores(attn_bias, shape, heads):
    """What a bias adds to scores [B, H, Mq, Mkv], in float64; `heads` are (H,) or (G, H) of the query."""
    if attn_bias is None:
        return np.zeros(shape)
    if not isinstance(attn_bias, np.ndarray):
        return attn_bias.materialize(shape, dtype=np.float64)
    if attn_bias.ndim == 5:
        attn_bias = np.broadcast_to(attn_bias, attn_bias.shape[:1] + heads + attn_bias.shape[3:])
        attn_bias = attn_bias.reshape(attn_bias.shape[0], -1, *attn_bias.shape[3:])
    if attn_bias.dtype == bool:
        attn_bias = np.where(attn_bias, 0, -np.inf)
    if attn_bias.ndim == 3:  # [B or 1, Mq, Mkv]
        attn_bias = attn_bias[:, None]
    return np.broadcast_to(attn_bias.astype(np.float64), shape)


def softmax(query, key, attn_bias, scale, heads, rounded):
    """Weights [B, H, Mq, Mkv] and LSE [B, H, Mq] of heads that were expanded."""
    scores = rounded(np.einsum("bihk,bjhk->bhij", rounded(query * scale), key))
    scores = scores + dense_scores(attn_bias, scores.shape, heads)
    highest = scores.max(-1, keepdims=True, initial=-np.inf)
    weights = np.exp(scores - np.where(np.isfinite(highest), highest, 0))
    total = weights.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = (np.log(total) + np.where(np.isfinite(highest), highest, 0))[..., 0]
    return rounded(np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)), lse


def exact_inputs(query, key, value):
    """The inputs in float64, without NaN: where no query looks it is poison, which a reference does not look at."""
    return [np.nan_to_num(np.asarray(x).astype(np.float64)) for x in expand_heads(query, key, value)]


def reference(query, key, value, attn_bias=None, scale=None, rounded=lambda x: x):
    """Output [B, Mq, H, Kv] and LSE [B, H, Mq] in float64, as the documentation's equivalent code computes them; with
    groups [B, Mq, G, H, Kv] and [B, G, H, Mq].

    `rounded` is applied to every intermediate result: the identity, or what a plain implementation in a smaller type
    would keep.
    """
    shape = query.shape
    query, key, value = exact_inputs(query, key, value)
    scale = shape[-1] ** -0.5 if scale is None else scale
    p, lse = softmax(query, key, attn_bias, scale, shape[2:-1], rounded)
    output = rounded(np.einsum("bhij,bjhk->bihk", p, value))
    return output.reshape(*shape[:-1], -1), lse.reshape(shape[0], *shape[2:-1], shape[1])


def reference_gradients(
    grad, query, key, value, attn_bias=None, scale=None, grad_lse=None, keep=1, rounded=lambda x: x
):
    """Gradients of query, key and value, and of the scores [B, H, Mq, Mkv], in float64: what the chain rule makes of the
    reference. `keep` multiplies the weights: dropout's decisions."""
    q, k, v = exact_inputs(query, key, value)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    p, _ = softmax(q, k, attn_bias, scale, query.shape[2:-1], rounded)
    grad, grad_lse = exact_gradients(grad, grad_lse, p, v)
    grad_p = rounded(np.einsum("bihk,bjhk->bhij", grad, v)) * keep
    delta = (p * grad_p).sum(-1, keepdims=True) - grad_lse
    gradients = chain_rule(rounded(p * (grad_p - delta)), rounded(p * keep), grad, q, k, scale)
    return [rounded(x) for x in of_shared_heads(gradients[:3], query, key, value)] + gradients[3:]


def tinies_of_gradients(grad, query, key, value, attn_bias=None, scale=None, grad_lse=None, keep=1):
    """What the float32 arithmetic of a kernel may cost each element of those gradients, where a plain implementation happens
    to be right: the sum of its terms' magnitudes, each times 2^-23 (4 + 3 |score|). docs/numerics.md says why.
    """
    q, k, v = exact_inputs(query, key, value)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    p, lse = softmax(q, k, attn_bias, scale, query.shape[2:-1], lambda x: x)
    grad, grad_lse = exact_gradients(grad, grad_lse, p, v)
    bias = dense_scores(attn_bias, p.shape, query.shape[2:-1])
    output = np.einsum("bhij,bjhk->bihk", p * keep, v)
    grad, q, k, v, scale = np.abs(grad), np.abs(q), np.abs(k), np.abs(v), abs(scale)
    score = np.abs(scale * np.einsum("bihk,bjhk->bhij", q, k)) + np.abs(bias) + np.abs(lse)[..., None]
    p = np.where(p > 0, p * 2.0**-23 * (4 + 3 * np.where(p > 0, score, 0)), 0)
    grad_p = np.einsum("bihk,bjhk->bhij", grad, v) * keep
    delta = np.einsum("bihk,bihk->bhi", grad, np.abs(output))[..., None] + np.abs(grad_lse)
    gradients = chain_rule(p * (grad_p + delta), p * keep, grad, q, k, scale)
    return of_shared_heads(gradients[:3], query, key, value) + gradients[3:]


def exact_gradients(grad, grad_lse, p, value):
    """Gradients of output and LSE in float64 for heads that were expanded: [B, Mq, H, Kv] and [B, H, Mq, 1]."""
    batch, heads, len_q, _ = p.shape
    grad = np.asarray(grad).astype(np.float64).reshape(batch, len_q, heads, value.shape[-1])
    grad_lse = np.zeros(p.shape[:3]) if grad_lse is None else np.asarray(grad_lse, np.float64)
    return grad, grad_lse.reshape(batch, heads, len_q, 1)


def chain_rule(grad_scores, weights, grad, query, key, scale):
    """Gradients of query, key, value and scores."""
    return [
        scale * np.einsum("bhij,bjhk->bihk", grad_scores, key),
        scale * np.einsum("bhij,bihk->bjhk", grad_scores, query),
        np.einsum("bhij,bihk->bjhk", weights, grad),
        grad_scores,
    ]


def of_shared_heads(gradients, query, key, value):
    """Gradients of tensors whose heads expand_heads expanded."""
    return [sum_heads(x, query.shape, y.shape) for x, y in zip(gradients, (query, key, value))]


def sum_heads(gradient, query_shape, shape):
    """The gradient of a tensor of this shape whose heads expand_heads expanded."""
    if len(shape) == 5:
        return sum_to(shape, gradient.reshape(*shape[:2], *query_shape[2:4], shape[4]))
    return gradient.reshape(*shape[:3], query_shape[2] // max(shape[2], 1), shape[3]).sum(3)


def sum_to(shape, gradient):
    """The gradient of a tensor of this shape that was broadcast."""
    axes = tuple(axis for axis, extent in enumerate(shape) if extent == 1)
    return gradient.sum(axes, keepdims=True)


def bias_gradient(bias, query, grad_scores):
    """The gradient of a bias tensor."""
    if query.ndim == 5:
        grad_scores = grad_scores.reshape(query.shape[0], *query.shape[2:4], *grad_scores.shape[2:])
    batch = bias.shape[:1] if bias.ndim == 3 else ()  # [B or 1, Mq, Mkv]
    shape = batch + (1,) * (grad_scores.ndim - bias.ndim) + bias.shape[len(batch) :]
    return sum_to(shape, grad_scores).reshape(bias.shape)


def plain_rounding(*dtypes):
    """What a plain implementation in the coarsest of these types does to each of its results."""
    coarsest = max(dtypes, key=lambda d: TINY[d.name])
    return lambda x: x.astype(coarsest).astype(np.float64), TINY[coarsest.name]


def assert_within(test, actual, exact, plain, tiny):
    """The project's tolerance: within twice the error that a plain implementation in the same dtype makes."""
    test.assertEqual(actual.shape, exact.shape)
    error = np.abs(actual.astype(np.float64) - exact).max(initial=0)
    test.assertLessEqual(error, 2 * np.abs(plain - exact).max(initial=0) + tiny)


def assert_close(test, actual, query, key, value, attn_bias=None, scale=None, output_dtype=None):
    """An output of attention, within the project's tolerance."""
    dtype = np.dtype(output_dtype or query.dtype)
    rounded, tiny = plain_rounding(dtype, query.dtype)
    exact, plain = (reference(query, key, value, attn_bias, scale, r)[0] for r in (lambda x: x, rounded))
    test.assertEqual(actual.dtype, dtype)
    assert_within(test, actual, exact, plain, tiny)


def assert_gradients_close(test, actual, grad, *inputs, **arguments):
    """Gradients of query, key and value and, if there are four, of the bias tensor, within the project's tolerance. `inputs`
    and `arguments` are those of reference_gradients."""
    query, key, value, *attn_bias = inputs
    rounded, _ = plain_rounding(query.dtype, grad.dtype)
    exact = reference_gradients(grad, *inputs, **arguments)
    plain = reference_gradients(grad, *inputs, **arguments, rounded=rounded)
    tinies = tinies_of_gradients(grad, *inputs, **arguments)
    sources = [query, key, value]
    if len(actual) == 4:
        bias = attn_bias[0] if isinstance(attn_bias[0], np.ndarray) else attn_bias[0]._dense
        sources.append(bias)
        for gradients in exact, plain, tinies:
            gradients[3] = bias_gradient(bias, query, gradients[3])
    for gradient, source, x, y, tiny in zip(actual, sources, exact, plain, tinies):
        test.assertEqual(gradient.dtype, source.dtype)
        assert_within(test, gradient, x, y, tiny.max(initial=0))
