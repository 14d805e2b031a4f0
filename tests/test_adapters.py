"""`attention_fn` inside Flax's own attention modules, of NNX and of Linen: with it and without it, the same."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import attnjax as aj
from attnjax.nn import attention_fn

D, N = 16, 4
close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6)


@pytest.fixture
def normal(rng):
    return lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)


def pair(**options):
    """Two modules of NNX with the same weights: with Flax's function, and with ours."""
    make = lambda **more: nnx.MultiHeadAttention(N, D, **{"decode": False, **options, **more}, rngs=nnx.Rngs(0))
    return make(), make(attention_fn=attention_fn)


def linen_pair(**options):
    make = lambda **more: linen.MultiHeadDotProductAttention(N, **options, **more)
    return make(), make(attention_fn=attention_fn)


MASKS = {
    "none": None,
    "booleans": np.arange(7) < np.array([7, 4])[:, None, None, None],
    "by head": np.random.default_rng(0).random((1, N, 7, 7)) < 0.7,
    "numbers": nnx.make_causal_mask(np.zeros((2, 7))),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("options", [{}, dict(num_kv_heads=2), dict(normalize_qk=True)], ids=["", "grouped", "norms"])
def test_nnx(name, options, normal):
    plain, ours = pair(**options)
    x = normal(2, 7, D)
    mask = MASKS[name]
    if mask is not None:
        mask = jnp.asarray(mask) | (jnp.eye(7) > 0) if mask.dtype == bool else jnp.asarray(mask)
        mask = jnp.broadcast_to(mask, (2, N, 7, 7))
    close(ours(x, mask=mask), plain(x, mask=mask))


def test_nnx_crossing_causal_and_other_batch_axes(normal):
    plain, ours = pair()
    x, context = normal(2, 3, 7, D), normal(2, 3, 5, D)
    close(ours(x, context), plain(x, context))
    close(ours(x[0], is_causal=True), plain(x[0], is_causal=True))
    close(ours(x[0, 0]), plain(x[0, 0]))
    loss = lambda layer, x: jnp.sin(layer(x, context)).sum()
    got, expected = (nnx.to_pure_dict(nnx.jit(nnx.grad(loss))(layer, x)) for layer in (ours, plain))
    jax.tree.map(functools.partial(close, atol=1e-5), got, expected)
    close(jax.vmap(ours)(x), plain(x))


def test_masks_and_scores_of_attnjax_go_through(normal):
    _, ours = pair()
    x, mask = normal(2, 7, D), aj.Causal() & aj.Window(2, 0)
    close(ours(x, mask=mask), ours(x, mask=mask.to_array(7, 7)))
    score = aj.ALiBi.for_heads(N)
    biased = nnx.MultiHeadAttention(
        N, D, attention_fn=functools.partial(attention_fn, score=score), decode=False, rngs=nnx.Rngs(0)
    )
    assert not np.allclose(biased(x), ours(x))


def test_function_with_bias_against_both(normal):
    query, key, value = normal(3, 2, 7, N, 4)
    bias, mask = normal(1, N, 7, 7), jnp.tril(jnp.ones((2, 1, 7, 7), bool))
    expected = nnx.dot_product_attention(query, key, value, bias, mask)
    close(attention_fn(query, key, value, bias, mask), expected)
    close(attention_fn(query, key, value, bias, mask), linen.dot_product_attention(query, key, value, bias, mask))
    gradient = jax.grad(lambda bias: jnp.sin(attention_fn(query, key, value, bias, mask)).sum())(bias)
    theirs = jax.grad(lambda bias: jnp.sin(linen.dot_product_attention(query, key, value, bias, mask)).sum())(bias)
    close(gradient, theirs, atol=1e-5)
    half = attention_fn(query, key, value, bias, mask, dtype=jnp.bfloat16)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), expected, atol=0.05)
    promote = lambda arrays, dtype: tuple(x.astype(dtype) for x in arrays)
    again = attention_fn(query, key, value, bias, mask, dtype=jnp.bfloat16, promote_dtype=promote)
    np.testing.assert_array_equal(half, again)


def test_nnx_decoding(normal):
    plain, ours = pair(decode=True)
    x = normal(2, 5, D)
    outs = []
    for layer in (plain, ours):
        layer.init_cache(x.shape)
        step = nnx.jit(lambda layer, x: layer(x))
        outs.append(jnp.concatenate([step(layer, x[:, t : t + 1]) for t in range(5)], 1))
    close(outs[1], outs[0])
    close(outs[1], pair()[1](x, mask=aj.Causal()))


def test_linen_decoding(normal):
    x = normal(2, 5, D)
    outs = []
    for layer in linen_pair(decode=True):
        variables = layer.init(jax.random.key(0), x)
        params, cache = variables["params"], variables["cache"]
        step = jax.jit(lambda cache, x, f=layer, p=params: f.apply({"params": p, "cache": cache}, x, mutable=["cache"]))
        out = []
        for t in range(5):
            y, changed = step(cache, x[:, t : t + 1])
            cache = changed["cache"]
            out.append(y)
        outs.append(jnp.concatenate(out, 1))
    close(outs[1], outs[0])


@pytest.mark.parametrize("options", [{}, dict(normalize_qk=True, force_fp32_for_softmax=True, precision="highest")])
def test_linen(options, normal):
    plain, ours = linen_pair(**options)
    x, context = normal(2, 7, D), normal(2, 5, D)
    variables = plain.init(jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, ours.init(jax.random.key(0), x))
    close(ours.apply(variables, x), plain.apply(variables, x))
    mask = linen.make_attention_mask(jnp.ones((2, 7), bool), jnp.arange(5) < jnp.array([[5], [3]]))
    close(ours.apply(variables, x, context, mask=mask), plain.apply(variables, x, context, mask=mask))
    loss = lambda layer: jax.jit(jax.grad(lambda v: jnp.sin(layer.apply(v, x)).sum()))(variables)
    jax.tree.map(functools.partial(close, atol=1e-5), loss(ours), loss(plain))


# What is sown


def test_nnx_weights_are_sown(normal):
    x, causal = normal(2, 7, D), nnx.make_causal_mask(jnp.zeros((2, 7)))
    sown = []
    for layer in pair(dropout_rate=0.5):
        run = nnx.capture(layer, nnx.Intermediate)
        _, found = run(x, mask=causal, sow_weights=True, deterministic=False)
        sown.append(found["attention_weights"][0])
    assert sown[0].shape == (2, N, 7, 7)
    close(sown[1], sown[0])  # before dropout, both


def test_linen_weights_are_sown(normal):
    x = normal(2, 7, D)
    plain, ours = linen_pair()
    variables = plain.init(jax.random.key(0), x)
    sown = []
    for layer in (plain, ours):
        out, found = layer.apply(variables, x, sow_weights=True, mutable=["intermediates"])
        close(out, plain.apply(variables, x))
        sown.append(found["intermediates"]["attention_weights"][0])
    close(sown[1], sown[0])


# Dropout


@pytest.mark.parametrize("broadcast", [True, False])
def test_dropout_keeps_the_mean_and_the_spread(broadcast, normal):
    """Weights that are dropped at rate r have the mean w and the variance w^2 r / (1 - r), here as in Flax."""
    query, key, _ = normal(3, 1, 5, N, 4)
    unit = jnp.broadcast_to(jnp.eye(5)[:, None], (1, 5, N, 5))  # so the output is the weights
    count, rate = 4000, 0.3
    options = dict(dropout_rate=rate, broadcast_dropout=broadcast)
    keys = jax.random.split(jax.random.key(1), count)
    draw = jax.jit(jax.vmap(lambda rng: attention_fn(query, key, unit, dropout_rng=rng, **options)))
    drawn, weights = draw(keys), attention_fn(query, key, unit)
    spread = weights * np.sqrt(rate / (1 - rate))
    assert (jnp.abs(drawn.mean(0) - weights) < 5 * spread / np.sqrt(count)).all()
    np.testing.assert_allclose(drawn.std(0), spread, rtol=0.1)
    share = (drawn == 0).mean()
    assert abs(share - rate) < 0.01
    np.testing.assert_array_equal(draw(keys[:2]), draw(keys[:2]))
    theirs = jax.vmap(lambda rng: nnx.dot_product_attention(query, key, unit, dropout_rng=rng, **options))(keys[:500])
    assert abs((theirs == 0).mean() - share) < 0.03


def test_dropout_in_modules(normal):
    x = normal(2, 7, D)
    _, layer = pair(dropout_rate=0.5)
    assert not np.allclose(layer(x, deterministic=False), layer(x, deterministic=False))
    close(layer(x, deterministic=True), pair()[1](x))
    given = [layer(x, deterministic=False, rngs=nnx.Rngs(7)) for _ in range(2)]
    np.testing.assert_array_equal(*given)
    _, layer = linen_pair(dropout_rate=0.5)
    variables = layer.init(jax.random.key(0), x, deterministic=True)
    run = lambda seed: layer.apply(variables, x, deterministic=False, rngs={"dropout": jax.random.key(seed)})
    np.testing.assert_array_equal(run(1), run(1))
    assert not np.allclose(run(1), run(2))


# What differs, and bad input


def test_a_query_that_sees_nothing_gives_zero(normal):
    query, key, value = normal(3, 2, 7, N, 4)
    mask = jnp.ones((7, 7), bool).at[3].set(False)
    assert (attention_fn(query, key, value, mask=mask)[:, 3] == 0).all()


def test_bad_input(normal):
    query, key, value = normal(3, 2, 7, N, 4)
    with pytest.raises(ValueError, match="dropout_rng is missing: dropout_rate is 0.5"):
        attention_fn(query, key, value, dropout_rate=0.5)
    for name in ("einsum_dot_general", "qk_attn_weights_einsum", "attn_weights_value_einsum"):
        with pytest.raises(NotImplementedError, match=f"cannot use {name}.*flax.linen.dot_product_attention can"):
            attention_fn(query, key, value, **{name: jnp.einsum})
    with pytest.raises(TypeError, match="mask must be an array or an attnjax Mask, got 'causal'"):
        attention_fn(query, key, value, mask="causal")
    with pytest.raises(ValueError, match=r"mask: Dense.array is bool\[6, 7\] and must broadcast"):
        attention_fn(query, key, value, mask=jnp.ones((6, 7), bool))
    with pytest.raises(TypeError, match=r"Bias: array must be an array of floats, got int32\[7, 7\]"):
        attention_fn(query, key, value, bias=jnp.ones((7, 7), jnp.int32))


def test_decoding_step_by_step(normal):
    """google/flax#5591: with is_causal each step saw the first key only. Newer Flax (#5592) leaves it out of steps."""
    x = normal(2, 5, D)
    make = lambda decode: nnx.MultiHeadAttention(
        N, D, decode=decode, attention_fn=attention_fn, deterministic=True, rngs=nnx.Rngs(0)
    )

    def steps(**options):
        layer = make(True)
        layer.init_cache(x.shape)
        return jnp.concatenate([layer(x[:, t : t + 1], **options) for t in range(5)], 1)

    expected = make(False)(x, is_causal=True)
    close(steps(), expected)
    try:
        close(steps(is_causal=True), expected)
    except ValueError as error:
        assert "In a module that decodes (decode=True), leave is_causal out" in str(error)
    query, key = normal(2, 1, N, 4), normal(2, 5, N, 4)
    mask = jnp.ones((2, 1, 1, 5), bool)
    close(attention_fn(query, key, key, is_causal=True), key[:, :1])
    with pytest.raises(
        ValueError, match=r"single query float32.2, 1, 4, 4. would .* the keys float32.2, 5, 4, 4. only"
    ):
        attention_fn(query, key, key, mask=mask, is_causal=True)
