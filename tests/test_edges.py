"""What stands in padding does not matter, not even NaN; empty shapes give empty or zero answers. No bad input here."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from derivatives import like
from problems import FAST_COMPILE

import attnjax as aj
from attnjax.kernels import xla

B, T, S, N, K, H, V = 2, 13, 11, 4, 2, 5, 3
REAL_T, REAL_S = np.array([9, 6]), np.array([7, 10])  # beyond these is padding

IMPLEMENTATIONS = {
    "reference": {"implementation": "reference"},
    "one_tile": {"implementation": "xla"},
    "tiles": {"implementation": "xla", "config": xla.Config(block_q=4, block_k=4)},
    "tiles_of_one_head": {"implementation": "xla", "config": xla.Config(block_q=5, block_k=3, lanes=1)},
    "compiled": {"implementation": "cpu"},
}
every_implementation = pytest.mark.parametrize("options", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)

QUERY_IDS = np.where(np.arange(T) < REAL_T[:, None], np.arange(T) // 3, -1)
KEY_IDS = np.where(np.arange(S) < REAL_S[:, None], np.arange(S) // 3, -2)
ALLOWED = (np.arange(T) < REAL_T[:, None])[:, :, None] & (np.arange(S) < REAL_S[:, None])[:, None, :]

MASKS = {
    "lengths": aj.Lengths(key=jnp.asarray(REAL_S), query=jnp.asarray(REAL_T)),
    "lengths_and_causal": aj.Lengths(key=jnp.asarray(REAL_S), query=jnp.asarray(REAL_T)) & aj.Causal(3),
    "segments": aj.Segments(jnp.asarray(QUERY_IDS), jnp.asarray(KEY_IDS)),
    "dense": aj.Dense(jnp.asarray(ALLOWED[:, None])),
    "where": aj.Where(lambda b, h, q, k: (q < jnp.asarray(REAL_T)[b]) & (k < jnp.asarray(REAL_S)[b])),
    "window": aj.Window(2, 2) & aj.Lengths(query=jnp.asarray(REAL_T)),
}
every_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)


PLAIN_OR_NOT = {name: (options, True) for name, options in IMPLEMENTATIONS.items()}
for name in ("tiles", "compiled"):
    PLAIN_OR_NOT[f"{name}_without_score_and_sinks"] = (IMPLEMENTATIONS[name], False)


def arrays():
    rng = np.random.default_rng(0)
    sizes = {"query": (B, T, N, H), "key": (B, S, K, H), "value": (B, S, K, V), "bias": (B, 1, 1, S), "sinks": (N,)}
    return {name: jnp.asarray(rng.normal(size=size), jnp.float32) for name, size in sizes.items()}


def solve(mask, options, with_score, x, tangents):
    """Values, tangents and gradients."""

    def call(x):
        more = dict(score=(aj.SoftCap(3.0), aj.Bias(x["bias"])), sinks=x["sinks"]) if with_score else {}
        out, lse = aj.attention(x["query"], x["key"], x["value"], mask=mask, return_lse=True, **more, **options)
        return out, jnp.where(lse == -jnp.inf, 0, lse)

    values, moved = jax.jvp(call, (x,), (tangents,))
    gradients = jax.grad(lambda x: sum(jnp.sin(a).sum() for a in call(x)))(x)
    return values, moved, gradients


@pytest.mark.parametrize("options, with_score", PLAIN_OR_NOT.values(), ids=PLAIN_OR_NOT)
@every_mask
def test_padding_does_not_leak(mask, options, with_score):
    """NaN or infinities in what nobody sees change no bit of values, tangents and gradients; gradients there are 0."""
    x = arrays()
    tangents = like(x, 1)
    seen = np.broadcast_to(mask.to_array(T, S, batch=(B,)), (B, 1, T, S))[:, 0]
    rows, columns = jnp.asarray(seen.any(2)), jnp.asarray(seen.any(1))
    run = jax.jit(functools.partial(solve, mask, options, with_score), compiler_options=FAST_COMPILE)
    want = run(x, tangents)
    assert all(jnp.all(jnp.isfinite(a)) for a in jax.tree.leaves(want))
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        spoilt = dict(x)
        for name, some in (("query", rows), ("key", columns), ("value", columns)):
            spoilt[name] = jnp.where(some[:, :, None, None], x[name], bad)
            assert jnp.any(~jnp.isfinite(spoilt[name])) or bool(some.all())
        got = run(spoilt, tangents)
        jax.tree.map(np.testing.assert_array_equal, got, want)
    for name, some in (("query", rows), ("key", columns), ("value", columns)):
        np.testing.assert_array_equal(want[2][name][~some], 0)


@every_implementation
@every_mask
def test_rows_that_see_nothing(mask, options):
    """Output 0, log-sum-exp -inf (or the sink), gradient and tangent 0."""
    x = arrays()
    rows = np.broadcast_to(mask.to_array(T, S, batch=(B,)), (B, 1, T, S)).any(3)[:, 0]
    assert not rows.all()
    q, k, v = (x[name] for name in ("query", "key", "value"))
    call = lambda q: aj.attention(q, k, v, mask=mask, return_lse=True, **options)
    (out, lse), (d_out, d_lse) = jax.jvp(call, (q,), (q,))
    for a, value in ((out, 0), (lse, -np.inf), (d_out, 0), (d_lse, 0)):
        np.testing.assert_array_equal(a[~rows], value)
    assert not np.any(out[rows] == 0) and np.all(np.isfinite(lse[rows]))
    out, lse = aj.attention(q, k, v, mask=mask, sinks=x["sinks"], return_lse=True, **options)
    np.testing.assert_array_equal(out[~rows], 0)
    np.testing.assert_allclose(lse[~rows], np.broadcast_to(x["sinks"], lse[~rows].shape), rtol=1e-6)


def forbid(x, allowed, how):
    """Attention in which -inf logits forbid what a mask would."""
    if how == "bias":
        score = aj.Bias(jnp.where(allowed, x["bias"], -jnp.inf))
    else:
        score = (
            aj.Bias(x["bias"]),
            aj.ScoreFn(lambda s, b, h, q, k: jnp.where((q + k + b) % 3 == 0, s, -jnp.inf)),
        )
    return {"score": score}


FORBIDDING = [
    pytest.param(how, options, id=f"{how}-{name}")
    for how in ("bias", "function")
    for name, options in IMPLEMENTATIONS.items()
    if (how, name) != ("function", "compiled")  # which takes no functions
]


@pytest.mark.parametrize("how, options", FORBIDDING)
def test_minus_infinity_forbids_a_pair(how, options):
    """A logit of -inf is what a mask is, in derivatives of second order too, also where a whole row is -inf."""
    x = arrays()
    q, k = np.arange(T)[:, None], np.arange(S)
    allowed = (q + k + np.arange(B)[:, None, None, None]) % 3 == 0
    if how == "bias":
        allowed[:, :, :3] = False
    mask = aj.Dense(jnp.asarray(allowed))

    def products(more, x):
        def loss(x):
            out, lse = aj.attention(x["query"], x["key"], x["value"], return_lse=True, **more(x), **options)
            return jnp.sin(out).sum() + jnp.where(lse == -jnp.inf, 0, lse).sum()

        return jax.jvp(jax.grad(loss), (x,), (x,))

    run = lambda more: jax.jit(functools.partial(products, more), compiler_options=FAST_COMPILE)(x)
    got = run(functools.partial(forbid, allowed=jnp.asarray(allowed), how=how))
    want = run(lambda x: {"mask": mask, "score": aj.Bias(x["bias"])})
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


EMPTY = {
    "no_batch_entries": ((0, 7), (0, 9)),
    "one_of_two_batch_axes": ((3, 0, 7), (3, 0, 9)),
    "no_queries": ((2, 0), (2, 9)),
    "no_keys": ((2, 7), (2, 0)),
    "neither": ((0,), (0,)),
}


@pytest.mark.parametrize("score", [False, True], ids=["plain", "mask_score_and_sinks"])
@pytest.mark.parametrize("rows, columns", EMPTY.values(), ids=EMPTY)
@every_implementation
def test_empty_shapes(rows, columns, score, options):
    """Right shapes and dtypes for values and gradients; rows without keys see nothing."""
    batch, t, s = rows[:-1], rows[-1], columns[-1]
    ones = lambda *shape: jnp.ones(shape, jnp.float32)
    x = {"query": ones(*rows, N, H), "key": ones(*columns, K, H), "value": ones(*columns, K, V)}
    more = lambda x: {}
    if score:
        x |= {"bias": ones(t, s), "sinks": jnp.arange(4.0, dtype=jnp.float32), "slopes": ones(N)}
        ids = lambda length: jnp.zeros((*batch, length), jnp.int32)
        mask = aj.Segments(ids(t), ids(s)) & aj.Causal(jnp.zeros(batch, jnp.int32)) & ~aj.Dilated(2)
        more = lambda x: dict(mask=mask, score=(aj.Bias(x["bias"]), aj.ALiBi(x["slopes"])), sinks=x["sinks"])
    call = lambda x: aj.attention(x["query"], x["key"], x["value"], return_lse=True, **more(x), **options)
    out, lse = call(x)
    assert (out.shape, out.dtype) == ((*rows, N, V), jnp.float32)
    assert (lse.shape, lse.dtype) == ((*rows, N), jnp.float32)
    if s == 0:
        np.testing.assert_array_equal(out, 0)
        np.testing.assert_array_equal(lse, np.broadcast_to(x["sinks"] if score else -np.inf, lse.shape))
    gradients = jax.grad(lambda x: call(x)[0].sum())(x)
    for name, gradient in gradients.items():
        assert gradient.shape == x[name].shape
        np.testing.assert_array_equal(gradient, 0 * x[name])
    _, moved = jax.jvp(call, (x,), (x,))
    assert [a.shape for a in moved] == [out.shape, lse.shape]


def test_empty_masks_can_be_looked_at():
    for mask in (aj.Causal(), aj.Segments(jnp.zeros(0, jnp.int32), jnp.zeros(5, jnp.int32))):
        assert mask.to_array(0, 5).shape == (0, 5)
        assert mask.density(0, 5) == 0.0
        assert aj.BlockMap.build(mask, 0, 5).counts() == {"empty": 0, "partial": 0, "full": 0}


def test_integers_of_numpy_are_integers():
    """NumPy's int64, where JAX has only int32: ids, offsets, lengths and seeds, without a warning."""
    x = arrays()
    ids = np.arange(T) // 4
    both = []
    for kind in (np.int64, np.int32):
        mask = (
            aj.Segments(ids.astype(kind), ids[:S].astype(kind)) & aj.Causal(kind(2)) & aj.Lengths(REAL_S.astype(kind))
        )
        dropout = aj.Dropout(0.2, kind(5))
        both.append(aj.attention(x["query"], x["key"], x["value"], mask=mask, dropout=dropout))
    np.testing.assert_array_equal(*both)
