"""Modes of JAX that a user may have set: attention, caches, modules, generation under each. Numbers are elsewhere."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from problems import EVERY_IMPLEMENTATION, REFUSED

import attnjax as aj
from attnjax.models import DecoderConfig, DecoderLM, generate
from attnjax.nn import EncoderBlock, MultiHeadAttention
from attnjax.positions import RoPE

T, S, N, K, H = 7, 9, 4, 2, 8

MODES = {
    # jax#7208, equinox#308
    "rank_promotion": lambda: jax.numpy_rank_promotion("raise"),
    # jax#7368
    "dtype_promotion": lambda: jax.numpy_dtype_promotion("strict"),
    # jax#5636, dm-haiku#99, numpyro#1329
    "leaks": lambda: jax.checking_leaks(),
    "transfers": lambda: jax.transfer_guard("disallow"),
    "nans": lambda: jax.debug_nans(True),
    # jax#37422
    "infinities": lambda: jax.debug_infs(True),
    "no_jit": lambda: jax.disable_jit(),
    # tokamax#1349, jax#18847
    "x64": lambda: jax.enable_x64(True),
}
every_mode = pytest.mark.parametrize("mode", MODES)


def options(with_function):
    """Masks and scores that hold arrays, a function that captures one, rows that see nothing, and dropout."""
    seen, weight = jnp.arange(S, dtype=jnp.int32), jnp.ones(S, jnp.float32)
    mask = (aj.Causal(jnp.int32(2)) | aj.Dense(jnp.eye(T, S, dtype=bool))) & aj.Lengths(
        query=jnp.array([T, 4], jnp.int32)
    )
    score = (aj.Bias(jnp.ones((N, 1, S), jnp.float32)), aj.ALiBi.for_heads(N, jnp.array([1, 2], jnp.int32)))
    if with_function:
        mask &= aj.Where(lambda b, h, q, k: (seen[k] >= q - 3) | (h == 1))
        score = (aj.ScoreFn(lambda s, b, h, q, k: s * weight[k]), *score)
    return dict(mask=mask, score=score, dropout=aj.Dropout(0.1, 3))


@every_mode
@pytest.mark.parametrize("implementation", EVERY_IMPLEMENTATION)
def test_attention(implementation, mode, rng):
    """Forward and gradient, eager and jitted, are what they are without the mode."""
    if "float32" in REFUSED.get(implementation, {}):
        pytest.skip("takes no float32")
    q, k, v = (jnp.asarray(rng.normal(size=x), jnp.float32) for x in ((2, T, N, H), (2, S, K, H), (2, S, K, H)))
    more = options("function" not in REFUSED.get(implementation, {}))
    run = functools.partial(
        aj.attention, implementation=implementation, config=EVERY_IMPLEMENTATION[implementation], **more
    )

    def both(q, k, v):
        out, pull = jax.vjp(run, q, k, v)
        return out, *pull(out)

    want = jax.jit(both)(q, k, v)
    with MODES[mode]():
        for f in (jax.jit(both), both) if mode in ("leaks", "rank_promotion") else (both,):
            for got, right in zip(f(q, k, v), want, strict=True):
                assert got.dtype == right.dtype
                np.testing.assert_allclose(got, right, rtol=1e-4, atol=1e-5)


@every_mode
def test_what_is_looked_at(mode):
    """Block maps, masks as arrays, and what would run."""
    mask = options(True)["mask"]
    want = aj.BlockMap.build(mask, T, S, batch=(2,), heads=N, block_q=2, block_k=2)
    q, k = jax.ShapeDtypeStruct((2, T, N, H), "float32"), jax.ShapeDtypeStruct((2, S, K, H), "float32")
    with MODES[mode]():
        made = aj.BlockMap.build(mask, T, S, batch=(2,), heads=N, block_q=2, block_k=2)
        if mode != "transfers":  # it reads what masks hold
            assert aj.explain(q, k, k, mask=mask).choices["forward"].name in ("cpu", "xla")
    np.testing.assert_array_equal(made.kinds, want.kinds)


@every_mode
def test_modules(mode):
    """A module and a block, forward and gradients."""
    attention = MultiHeadAttention(16, N, key_heads=K, rope=RoPE(), score=aj.ALiBi.for_heads(N), rngs=nnx.Rngs(0))
    block = EncoderBlock(16, N, 32, rngs=nnx.Rngs(1))
    x = jax.random.normal(jax.random.key(0), (2, 5, 16), jnp.float32)
    loss = lambda module, x: (module(x) ** 2).sum()
    for module in (attention, block):
        want = jax.tree.leaves(nnx.grad(loss)(module, x))
        with MODES[mode]():
            got = jax.tree.leaves(
                nnx.grad(loss)(module, x) if mode != "transfers" else nnx.jit(nnx.grad(loss))(module, x)
            )
        for one, right in zip(got, want, strict=True):
            np.testing.assert_allclose(one, right, rtol=1e-3, atol=1e-4)


@every_mode
@pytest.mark.parametrize("kind", ["plain", "ring", "int8"])
def test_caches(kind, mode):
    """Tokens appended one after the other, of one row: the path of decoding."""
    x = jax.random.normal(jax.random.key(0), (1, 3, K, H), jnp.float32)
    tokens = jnp.split(x, 3, axis=1)
    more = {"plain": {}, "ring": dict(window=2), "int8": dict(dtype=jnp.int8)}[kind]

    def run(cache):
        outs = []
        for t in range(3):
            one = tokens[t]
            out, cache = cache.attend(one, one, one)
            outs.append(out)
        assert cache.rollback(1).truncate(1).grow(6).reset().length.tolist() == [0]
        return jnp.concatenate(outs, 1)

    cache = aj.KVCache.create(1, 5, K, H, **({"dtype": jnp.float32} | more))
    want = run(cache)
    with MODES[mode]():
        got = run(cache)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@every_mode
def test_generation(mode):
    """Greedy tokens of one prompt are what they are without the mode."""
    config = DecoderConfig(vocab_size=11, features=16, num_heads=2, num_layers=1, max_length=16)
    model = DecoderLM(config, rngs=nnx.Rngs(0))
    want = generate(model, [[1, 2, 3]], max_new_tokens=2).lists()
    with MODES[mode]():
        assert generate(model, [[1, 2, 3]], max_new_tokens=2).lists() == want


def test_explicit_keys():
    """Keys with types of their own, which may be the only ones that are allowed, drive dropout."""
    with jax.legacy_prng_key("error"):
        module = MultiHeadAttention(16, N, dropout=0.5, rngs=nnx.Rngs(jax.random.key(0)))
        x = jnp.ones((2, 5, 16), jnp.float32)
        assert jnp.isfinite(module(x)).all()
        assert not np.array_equal(module(x), module(x))
