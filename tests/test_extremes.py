"""Numbers at the ends of their ranges and sizes of 0, on every implementation. Padding is in test_edges."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import Problem, Shape, dense
from problems import EVERY_IMPLEMENTATION, INTERPRETED, OPTIMISED, REFUSED

import attnjax as aj

T, S, N, K, H, V = 37, 53, 4, 2, 8, 6
every_implementation = pytest.mark.parametrize("implementation", EVERY_IMPLEMENTATION)


@pytest.fixture
def qkv(rng):
    return tuple(jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((T, N, H), (S, K, H), (S, K, V)))


def call(implementation, **options):
    return functools.partial(
        aj.attention, implementation=implementation, config=EVERY_IMPLEMENTATION[implementation], **options
    )


HUGE = {
    "number": dict(scale=1e9),
    "per_head": dict(scale=np.full(N, 1e9, np.float32)),
    "negative_function": dict(scale=1.0, score=aj.ScoreFn(lambda s, b, h, q, k: s * -1e9)),
}


@pytest.mark.parametrize("kind", HUGE)
@every_implementation
def test_huge_logits(implementation, kind, qkv):
    """Each query takes its best key, whose logit is the log-sum-exp (vllm#56578, torch-ET#18407, tinygrad#4985)."""
    if "float32" in REFUSED.get(implementation, {}):
        pytest.skip("takes no float32")
    (q, k, v), options = qkv, HUGE[kind]
    config = EVERY_IMPLEMENTATION[implementation]
    if implementation == "cpu" and kind != "number":
        implementation = None  # it may not take them; what is chosen then has to be right
    run = functools.partial(aj.attention, implementation=implementation, config=config, return_lse=True, **options)
    # Compiled as users compile: only then are products and differences contracted.
    out, lse = jax.jit(run, compiler_options=OPTIMISED)(q, k, v)
    logits = np.einsum("tkgh,skh->tkgs", np.float64(q).reshape(T, K, N // K, H), np.float64(k)).reshape(T, N, S)
    logits *= -1e9 if "score" in options else 1e9
    np.testing.assert_allclose(lse, logits.max(-1), rtol=1e-6)
    best = np.take_along_axis(np.repeat(v, N // K, axis=1).swapaxes(0, 1), logits.argmax(-1).T[..., None], 1)
    np.testing.assert_array_equal(out, best.swapaxes(0, 1))
    if implementation not in INTERPRETED:  # whose gradients compute products in another order: 64 apart at 10^9
        d_value = jax.jit(jax.grad(lambda v: run(q, k, v)[0].sum()), compiler_options=OPTIMISED)(v)
        assert float(d_value.sum()) == T * N * V


@every_implementation
def test_rows_of_the_most_negative_number(implementation, qkv):
    """A row of finfo.min, which others write for "masked", is seen: the mean (flashinfer#4267, flax#982)."""
    if "float32" in REFUSED.get(implementation, {}):
        pytest.skip("takes no float32")
    bias = jnp.zeros((T, S)).at[::2].set(jnp.finfo(jnp.float32).min).at[1::4, 7:].set(jnp.finfo(jnp.float32).min)
    out, lse = call(implementation, score=aj.Bias(bias), return_lse=True)(*qkv)
    mean = np.broadcast_to(np.repeat(np.asarray(qkv[2]).mean(0), N // K, axis=0), (T, N, V))
    np.testing.assert_allclose(out[::2], mean[::2], atol=2e-6)
    np.testing.assert_allclose(lse[::2], np.finfo(np.float32).min)
    some = call(implementation, return_lse=True)(qkv[0], *(x[:7] for x in qkv[1:]))
    np.testing.assert_allclose(out[1::4], some[0][1::4], atol=2e-6)
    assert np.isfinite(lse[1::2]).all()


# merge


def parts_of(q, k, v):
    """Three spans of keys, of which the first queries see none, or one."""
    spans = itertools.pairwise((0, 10, 25, S))
    one = functools.partial(aj.attention, implementation="reference", return_lse=True)
    return [one(q, k[a:b], v[a:b], mask=aj.Causal(-5 - a)) for a, b in spans]


def merged(q, k, v):
    """As a ring of devices merges: the parts that nobody sees first."""
    parts = parts_of(q, k, v)[::-1]
    return functools.reduce(lambda a, b: aj.merge(*a, *b), parts)


def test_merge_of_parts_that_see_nothing(qkv):
    """Value, tangent, gradient and a second derivative are those of the whole (flashinfer#4051, Dao#978)."""
    visible = np.broadcast_to(np.arange(S) <= np.arange(T)[:, None] - 5, (1, N, T, S))
    problem = Problem(Shape(batch=(1,), T=T, S=S, N=N, K=K, H=H, V=V), visible)
    whole = lambda q, k, v: [
        x[0] for x in dense(dict(zip(("query", "key", "value"), (q[None], k[None], v[None]), strict=True)), problem)
    ]
    finite = lambda f: lambda *x: [jnp.where(a == -jnp.inf, 0, a) for a in f(*x)]
    loss = lambda f: lambda *x: sum(jnp.sin(a).sum() for a in finite(f)(*x))

    def everything(f):
        first = lambda *x: jax.grad(loss(f), (0, 1, 2))(*x)
        return jax.jit(lambda: (jax.jvp(finite(f), qkv, qkv), jax.jvp(first, qkv, qkv)))()

    with jax.numpy_dtype_promotion("standard"):
        want = everything(whole)
    for got, right in zip(jax.tree.leaves(everything(merged)), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(got, right, rtol=2e-4, atol=2e-5)
    # Straight at it, where both parts are empty: gradients to the log-sum-exps too.
    zeros, nothing = jnp.zeros((3, V)), jnp.full(3, -jnp.inf)
    value, moved = jax.jvp(aj.merge, (zeros, nothing) * 2, (zeros + 1, jnp.ones(3)) * 2)
    np.testing.assert_array_equal(value[0], 0)
    np.testing.assert_array_equal(value[1], -np.inf)
    assert all(np.isfinite(x).all() for x in moved)
    gradients = jax.grad(lambda *x: aj.merge(*x)[0].sum(), (0, 1, 2, 3))(*(zeros, nothing) * 2)
    assert all(np.isfinite(x).all() for x in gradients)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_merge_rounds_once(dtype, rng):
    """Weights and sums are float32, also of 16 bits (Dao#2723)."""
    outs = jnp.asarray(rng.normal(size=(2, 50, V)), dtype)
    lses = jnp.asarray(rng.normal(size=(2, 50)), jnp.float32)
    out, lse = aj.merge(outs[0], lses[0], outs[1], lses[1])
    weights = np.exp(np.float64(lses) - np.logaddexp(*np.float64(lses)))
    want = (weights[..., None] * np.float64(outs)).sum(0)
    assert out.dtype == dtype and lse.dtype == jnp.float32
    np.testing.assert_array_equal(out, want.astype(jnp.float32).astype(dtype))
    assert aj.merge(outs[0].astype(jnp.float32), lses[0], outs[1], lses[1])[0].dtype == jnp.float32


def test_merge_of_what_does_not_fit():
    out, lse = jnp.zeros((5, 2, 3)), jnp.zeros((5, 2))
    with pytest.raises(ValueError, match=r"merge: outputs must be .* got out_a \[5, 2, 3\], .* out_b \[4, 2, 3\]"):
        aj.merge(out, lse, out[:4], lse[:4])
    with pytest.raises(ValueError, match=r"lse_b \[5, 2, 1\]"):
        aj.merge(out, lse, out, lse[..., None])
    with pytest.raises(TypeError, match="merge: lse_a must be an array of floats"):
        aj.merge(out, None, out, lse)
    with pytest.raises(TypeError, match="merge: out_b must be an array of floats.* int32"):
        aj.merge(out, lse, out.astype(jnp.int32), lse)


# Sizes of 0

SIZES = dict(B=2, T=5, S=7, V=3)


@pytest.mark.parametrize("empty", ["B", "T", "S", "V"])
@every_implementation
def test_a_size_of_0(implementation, empty):
    """With what users write, sinks and 16 bits among it (pytorch#141218, #174950); rows without keys see the sink."""
    dtype, sizes = "bfloat16", SIZES | {empty: 0}
    b, t, s, v = sizes.values()
    x = {"q": jnp.ones((b, t, N, H), dtype), "k": jnp.ones((b, s, K, H), dtype), "v": jnp.ones((b, s, K, v), dtype)}
    x["sinks"] = jnp.arange(N, dtype=dtype)
    ids = jnp.arange(7)
    mask = aj.Where(lambda b, h, q, k: (ids[q % 7] >= 0) & (k >= h - 9), scan=True)

    def run(x):
        return call(implementation, mask=mask, sinks=x["sinks"], return_lse=True)(x["q"], x["k"], x["v"])

    out, lse = run(x)
    assert (out.shape, out.dtype) == ((b, t, N, v), dtype)
    assert (lse.shape, lse.dtype) == ((b, t, N), jnp.float32)
    want = np.log(s * np.exp(np.sqrt(H)) + np.exp(np.arange(N)))
    np.testing.assert_allclose(lse, np.broadcast_to(want, lse.shape), rtol=1e-5)
    gradients = jax.grad(lambda x: sum(y.astype(jnp.float32).sum() for y in run(x)))(x)
    assert jax.tree.map(lambda y: (y.shape, y.dtype), gradients) == jax.tree.map(lambda y: (y.shape, y.dtype), x)
    share = np.exp(np.arange(N) - want) * b * t
    np.testing.assert_allclose(np.float32(gradients["sinks"]), share, rtol=1e-2)
    assert aj.BlockMap.build(mask, t, s, batch=(b,), heads=N).counts()["empty"] == 0
    assert mask.to_array(t, s, batch=(b,), heads=N).shape == (b, N, t, s)


def test_tiny_keys_whose_values_are_a_product():
    """Two or three keys in a loop over queries, the values of an einsum: XLA ended the process in the gradient."""
    draw = np.random.default_rng(0).normal
    arrays = [
        jnp.asarray(draw(size=s), jnp.float32) for s in ((2, 1200, 2, 5), (2, 3, 2, 5), (2, 2, 3, 3), (2, 3, 2, 5))
    ]

    def loss(q, k, m, r, name=None):
        return jnp.sin(aj.attention(q, k, jnp.einsum("bnij,bjnv->binv", m, r), implementation=name)).sum()

    solve = lambda name: jax.jit(jax.value_and_grad(functools.partial(loss, name=name), (0, 1, 2, 3)))(*arrays)
    for got, want in zip(jax.tree.leaves(solve("xla")), jax.tree.leaves(solve("reference")), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-3)
