"""The Flax modules: numbers of Flax and NumPy; transforms, caches, scans and devices change none of them."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attnjax as aj
from attnjax.nn import (
    DecoderBlock,
    EncoderBlock,
    FeedForward,
    LearnedPositions,
    MultiHeadAttention,
    PatchEmbedding,
    RelativePositions,
    RoPE,
    SinusoidalPositions,
    Stack,
)

D, N = 16, 4
close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6)


def trees_close(a, b):
    jax.tree.map(close, a, b)


@pytest.fixture
def normal(rng):
    return lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)


def attend(*args, rngs=0, **options):
    return MultiHeadAttention(*(args or (D, N)), **options, rngs=nnx.Rngs(rngs))


def randomized(module, seed=1):
    """The module with all parameters drawn anew, biases and scales too."""
    rng = np.random.default_rng(seed)
    draw = lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.5, x.dtype)
    nnx.update(module, jax.tree.map(draw, nnx.state(module, nnx.Param)))
    return module


# What is computed


FLAX = {
    "plain": (dict(), dict()),
    "no bias": (dict(use_bias=False), dict(use_bias=False)),
    "grouped": (dict(key_heads=2), dict(num_kv_heads=2)),
    "sizes": (dict(head_size=6, out_features=10), dict(qkv_features=24, out_features=10)),
    "context": (dict(context_features=12), dict(in_kv_features=12)),
    "norms": (dict(normalize="layer"), dict(normalize_qk=True)),
}


@pytest.mark.parametrize("name", FLAX)
def test_equals_flax_with_the_same_weights(name, normal):
    ours, theirs = FLAX[name]
    theirs = nnx.MultiHeadAttention(N, D, **theirs, decode=False, rngs=nnx.Rngs(0))
    layer, theirs = attend(**ours), randomized(theirs)
    weights = nnx.to_pure_dict(nnx.state(theirs, nnx.Param))
    for part in ("query", "key"):  # the only names that differ
        if f"{part}_ln" in weights:
            weights[f"{part}_norm"] = weights.pop(f"{part}_ln")
    assert jax.tree.map(jnp.shape, weights) == jax.tree.map(jnp.shape, nnx.to_pure_dict(nnx.state(layer, nnx.Param)))
    nnx.update(layer, weights)
    x, context = normal(2, 3, 7, D), normal(2, 3, 5, ours.get("context_features", D))
    mask = jnp.tril(jnp.ones((7, 5), bool), 1)
    close(layer(x, context), theirs(x, context))
    close(layer(x, context, mask=mask), theirs(x, context, mask=jnp.broadcast_to(mask, (2, 3, N, 7, 5))))
    if name != "context":
        close(layer(x), theirs(x))
        close(layer(x, mask=aj.Causal()), theirs(x, mask=nnx.make_causal_mask(x[..., 0])))


def numpy_layer(layer, x, mask, logits_of, positions):
    """A layer with RMS norms, RoPE, sinks and grouped heads, in float64."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), nnx.to_pure_dict(nnx.state(layer, nnx.Param)))
    x = np.asarray(x, np.float64)
    project = lambda part: np.einsum("btd,dnh->btnh", x, p[part]["kernel"]) + p[part]["bias"]
    norm = lambda y, part: y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-6) * p[part]["scale"]
    query, key, value = norm(project("query"), "query_norm"), norm(project("key"), "key_norm"), project("value")
    frequencies = 10000.0 ** (-np.arange(0, query.shape[-1], 2) / query.shape[-1])
    turn = np.exp(1j * positions[:, None] * frequencies)[:, None]

    def rotated(y):
        a, b = np.split(y, 2, axis=-1)
        z = (a + 1j * b) * turn
        return np.concatenate([z.real, z.imag], axis=-1)

    groups = query.shape[2] // key.shape[2]
    query, key, value = rotated(query), np.repeat(rotated(key), groups, 2), np.repeat(value, groups, 2)
    logits = np.einsum("btnh,bsnh->bnts", query, key) / np.sqrt(query.shape[-1])
    logits = np.where(mask, logits_of(logits), -np.inf)
    sinks = np.broadcast_to(p["sinks"][:, None, None], (*logits.shape[:-1], 1))
    weights = np.exp(np.concatenate([logits, sinks], -1))
    weights = (weights / weights.sum(-1, keepdims=True))[..., :-1]
    return np.einsum("bnts,bsnv,nvd->btd", weights, value, p["out"]["kernel"]) + p["out"]["bias"], weights


def test_everything_at_once_is_the_formula(normal):
    layer = randomized(
        attend(key_heads=2, head_size=6, value_size=5, sinks=True, rope=RoPE(), normalize="rms", mask=aj.Causal())
    )
    layer.score = nnx.data((aj.SoftCap(2.0),))
    x, positions = normal(2, 7, D), np.arange(7) + 3
    mask = (np.tril(np.ones((7, 7), bool)) & (np.arange(7) != 2)[:, None]).astype(bool)
    mask = mask | np.eye(7, dtype=bool)
    slopes = np.array([0.5, 0.25, 0.1, 0.0], np.float32)
    distances = slopes[:, None, None] * np.abs(np.arange(7)[:, None] - np.arange(7))
    got, sown = nnx.capture(layer, nnx.Intermediate)(
        x,
        mask=jnp.asarray(mask),
        score=aj.ALiBi(jnp.asarray(slopes)),
        positions=jnp.asarray(positions),
        sow_weights=True,
    )
    logits_of = lambda logits: (
        2 * np.tanh(logits / 2) - distances
    )  # the score of the layer first, then that of the call
    expected, weights = numpy_layer(layer, x, mask, logits_of, positions)
    close(got, expected, atol=1e-5)
    close(sown["attention_weights"][0], weights)


def test_other_numbers_of_batch_axes(normal):
    layer, x = attend(mask=aj.Causal(), rope=RoPE()), normal(2, 3, 5, D)
    whole = layer(x)
    close(layer(x[1, 2]), whole[1, 2])
    close(layer(x[1]), whole[1])


def test_relative_positions(normal):
    layer, table, x = attend(), RelativePositions(8, N, max_distance=16, rngs=nnx.Rngs(1)), normal(2, 7, D)
    bias = aj.RelativeBias(table.table[...], max_distance=16).to_array(7, 7)
    close(layer(x, score=table()), layer(x, score=aj.Bias(bias)))
    loss = lambda table: layer(x, score=table()).var()
    assert jnp.abs(nnx.grad(loss)(table)["table"][...]).max() > 0


def test_lengths_are_padding(normal):
    layer, x, lengths = attend(rope=RoPE()), normal(2, 7, D), jnp.array([7, 4])
    got = layer(x, lengths=lengths)
    close(got[0], layer(x[0]))
    close(got[1, :4], layer(x[1, :4]))
    assert jnp.isfinite(got).all()


@pytest.mark.parametrize("activation", ["gelu", "gelu_exact", "relu", "silu", "swiglu", "geglu", jnp.tanh])
def test_feed_forward(activation, normal):
    layer, x = randomized(FeedForward(D, 24, activation=activation, rngs=nnx.Rngs(0))), normal(2, 5, D)
    linear = lambda part, x: x @ part.kernel[...] + part.bias[...]
    names = {"swiglu": jax.nn.silu, "geglu": jax.nn.gelu, "gelu_exact": lambda x: jax.nn.gelu(x, approximate=False)}
    function = activation if callable(activation) else names.get(activation) or getattr(jax.nn, activation)
    hidden = linear(layer.up, x)
    hidden = function(linear(layer.gate, x)) * hidden if layer.gate is not None else function(hidden)
    close(layer(x), linear(layer.down, hidden), atol=1e-5)
    assert (layer.gate is not None) == (activation in ("swiglu", "geglu"))


def test_embeddings(normal):
    learned = LearnedPositions(9, 6, rngs=nnx.Rngs(0))
    close(learned(jnp.array([[3, 1], [8, 0]])), learned.embedding[...][np.array([[3, 1], [8, 0]])])
    assert jnp.isnan(learned(jnp.array([9]))).all()
    close(SinusoidalPositions(6)(jnp.arange(5)), aj.positions.sinusoidal(5, 6))
    assert SinusoidalPositions(6, dtype=jnp.bfloat16)(jnp.zeros((2, 3), jnp.int32)).dtype == jnp.bfloat16
    patches, images = PatchEmbedding((2, 3), 3, 8, rngs=nnx.Rngs(0)), normal(2, 4, 6, 3)
    convolution = nnx.Conv(3, 8, (2, 3), strides=(2, 3), padding="VALID", rngs=nnx.Rngs(0))
    nnx.update(convolution, nnx.to_pure_dict(nnx.state(patches.projection)))
    close(patches(images), convolution(images).reshape(2, 4, 8))
    close(patches(images[1]), patches(images)[1])


@pytest.mark.parametrize("pre_norm", [True, False])
@pytest.mark.parametrize("output_norm", [True, False])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_blocks_are_sums_and_norms(norm, pre_norm, output_norm, normal):
    options = dict(norm=norm, pre_norm=pre_norm, output_norm=output_norm, rngs=nnx.Rngs(0))
    block = randomized(DecoderBlock(D, N, 24, cross=True, context_features=8, **options))
    x, context = normal(2, 5, D), normal(2, 3, 8)
    runs = dict(attention=block.attention, cross=lambda y: block.cross(y, context), feed_forward=block.feed_forward)
    y = x
    for part, run in runs.items():
        own, output = getattr(block, f"{part}_norm"), getattr(block, f"{part}_output_norm")
        assert (own is None) == (output_norm and not pre_norm) and (output is None) == (not output_norm)
        assert own is None or isinstance(own, {"layer": nnx.LayerNorm, "rms": nnx.RMSNorm}[norm])
        if pre_norm:
            y = y + (output(run(own(y))) if output_norm else run(own(y)))
        else:
            y = y + output(run(y)) if output_norm else own(y + run(y))
    close(block(x, context), y)
    close(block(x, keys_values=block.keys_values(context)), y)


# Who sees whom


def test_a_decoder_does_not_see_later_tokens_and_an_encoder_does(normal):
    x = normal(1, 7, D)
    changed = x.at[:, 4:].multiply(-1.0)
    decoder = DecoderBlock(D, N, 24, attention=dict(rope=RoPE()), rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(decoder(x)[:, :4], decoder(changed)[:, :4])
    assert not np.allclose(decoder(x)[:, 4:], decoder(changed)[:, 4:])
    encoder = EncoderBlock(D, N, 24, rngs=nnx.Rngs(0))
    assert (jnp.abs(encoder(x) - encoder(changed)).max(-1) > 1e-4).all()
    sees = jax.jacobian(lambda x: decoder(x).sum(-1))(x[0])  # [T, S, D]
    np.testing.assert_array_equal(np.abs(sees).max(-1) > 0, np.tril(np.ones((7, 7), bool)))


def test_cross_attention_ignores_padded_source(normal):
    block = DecoderBlock(D, N, 24, cross=True, rngs=nnx.Rngs(0))
    x, context = normal(2, 5, D), normal(2, 6, D)
    mask = aj.Lengths(key=jnp.array([6, 2]))
    got = block(x, context, context_mask=mask)
    close(got[1], block(x[1], context[1, :2]))
    np.testing.assert_array_equal(got, block(x, context.at[1, 2:].set(jnp.nan), context_mask=mask))
    assert not np.allclose(got[1], block(x, context.at[1, 1].multiply(-1.0), context_mask=mask)[1])


# Caches


DECODING = {
    "causal": dict(),
    "grouped, rope, norms, sinks": dict(key_heads=2, value_size=6, rope=RoPE(), normalize="rms", sinks=True),
    "window": dict(mask=aj.Causal() & aj.Window(left=2, right=0), rope=RoPE()),
    "alibi": dict(score=aj.ALiBi.for_heads(N)),
    "window further back": dict(mask=aj.Window(left=1, right=0, offset=-2)),
    "chunks": dict(mask=aj.Causal() & aj.Chunked(3)),
    "chunks further back": dict(mask=aj.Causal() & aj.Chunked(3, offset=-1)),
}
RINGS = {"window": 2, "window further back": 3, "chunks": 2, "chunks further back": 3}


@pytest.mark.parametrize("name", DECODING)
def test_decoding_equals_the_full_forward(name, normal):
    block = randomized(DecoderBlock(D, N, 24, attention=DECODING[name], rngs=nnx.Rngs(0)))
    x = normal(2, 9, D)
    expected = block(x)
    cache = block.create_cache(2, 12)
    assert cache.window == RINGS.get(name)
    graph, state = nnx.split(block)
    step = jax.jit(lambda state, x, cache: nnx.merge(graph, state)(x, cache=cache))
    out, cache = step(state, x[:, :4], cache)
    outs = [out]
    for t in range(4, 9):
        out, cache = step(state, x[:, t : t + 1], cache)
        outs.append(out)
    close(jnp.concatenate(outs, 1), expected, atol=1e-5)
    assert cache.length.tolist() == [9, 9]


def test_decoding_rows_of_different_lengths(normal):
    layer = attend(mask=aj.Causal(), rope=RoPE())
    x, lengths = normal(2, 6, D), jnp.array([5, 2])
    _, cache = layer(x[:, :5], cache=layer.create_cache(2, 8), lengths=lengths)
    out, cache = layer(x[:, 5:], cache=cache)
    assert cache.length.tolist() == [6, 3]
    close(out[0, 0], layer(x[0])[5])
    close(out[1, 0], layer(jnp.concatenate([x[1, :2], x[1, 5:]]))[2])


def test_cache_has_the_dtype_of_the_computation():
    layer = attend(mask=aj.Causal(), dtype=jnp.bfloat16, key_heads=2, value_size=3)
    cache = layer.create_cache((2, 3), 8)
    assert cache.key.shape == (2, 3, 8, 2, 4) and cache.value.shape == (2, 3, 8, 2, 3)
    assert cache.key.dtype == jnp.bfloat16
    out, cache = layer(jnp.ones((2, 3, 4, D)), cache=cache)
    assert out.dtype == jnp.bfloat16 and cache.length.shape == (2, 3)


# Transforms


def decoder(rngs):
    attention = dict(rope=RoPE(), key_heads=2, score=aj.ALiBi.for_heads(N))
    return DecoderBlock(D, N, 24, cross=True, attention=attention, rngs=rngs)


def loss(model, x, context):
    return jnp.sin(model(x, context)).sum()


def test_transforms_of_a_block(normal):
    block, x, context = decoder(nnx.Rngs(0)), normal(3, 5, D), normal(3, 4, D)
    expected = nnx.jit(lambda block, x, context: block(x, context))(block, x, context)
    close(block(x, context), expected)
    graph, params, rest = nnx.split(block, nnx.Param, ...)
    merged = lambda params, x, context: nnx.merge(graph, params, rest)(x, context)
    close(jax.jit(merged)(params, x, context), expected)
    close(jax.jit(jax.vmap(merged, in_axes=(None, 0, 0)))(params, x, context), expected)
    close(jax.jit(jax.vmap(block))(x, context), expected)
    summed = lambda params, x: jnp.sin(merged(params, x, context)).sum()
    gradients = jax.jit(jax.grad(summed, argnums=(0, 1)))(params, x)
    trees_close(jax.jit(jax.grad(jax.checkpoint(summed)))(params, x), gradients[0])
    trees_close(jax.jit(nnx.grad(nnx.remat(loss)))(block, x, context), gradients[0])
    # The derivative along parameters and x: forward, and as a product with the gradients.
    tangent = (jax.tree.map(jnp.cos, params), x)
    value, moved = jax.jit(lambda *along: jax.jvp(summed, (params, x), along))(*tangent)
    close(value, jnp.sin(expected).sum(), rtol=1e-4)
    products = jax.tree.map(lambda a, b: (a * b).sum(), gradients, tangent)
    close(moved, sum(jax.tree.leaves(products)), rtol=1e-4)


value_and_gradient = nnx.jit(nnx.value_and_grad(loss))
together = lambda trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@functools.cache
def plain_stack():
    """Three layers in a loop: their parameters, value and gradients, in one array each; x and context."""
    x, context = jax.random.normal(jax.random.key(0), (2, 2, 5, D))
    stack = Stack(decoder, 3, rngs=nnx.Rngs(0))
    value, gradient = value_and_gradient(stack, x, context)
    parameters = nnx.to_pure_dict(nnx.state(stack, nnx.Param))["layers"]
    gradient = nnx.to_pure_dict(gradient)["layers"]
    return [together(tree[i] for i in range(3)) for tree in (parameters, gradient)], value, x, context


@pytest.mark.parametrize("remat", [False, True, jax.checkpoint_policies.dots_saveable], ids=["keep", "remat", "policy"])
@pytest.mark.parametrize("scan", [False, True], ids=["loop", "scan"])
def test_stacks_give_the_same_numbers(scan, remat):
    (parameters, expected), value, x, context = plain_stack()
    stack = Stack(decoder, 3, scan=scan, remat=remat, rngs=nnx.Rngs(1))
    unstacked = {i: jax.tree.map(lambda leaf, i=i: leaf[i], parameters) for i in range(3)}
    nnx.update(stack.layers, parameters if scan else unstacked)
    got, gradient = value_and_gradient(stack, x, context)
    close(got, value)
    gradient = nnx.to_pure_dict(gradient)["layers"]
    gradient = gradient if scan else together(gradient[i] for i in range(3))
    jax.tree.map(functools.partial(close, rtol=1e-4, atol=1e-5), gradient, expected)


@pytest.mark.parametrize("scan", [False, True])
def test_stacks_with_caches(scan, normal):
    stack = Stack(decoder, 2, scan=scan, remat=True, rngs=nnx.Rngs(0))
    x, context = normal(2, 5, D), normal(2, 4, D)
    expected = stack(x, context)
    keys_values, caches = stack.keys_values(context), stack.create_caches(2, 8)
    first, caches = stack(x[:, :3], keys_values=keys_values, caches=caches)
    last, caches = stack(x[:, 3:], keys_values=keys_values, caches=caches)
    close(jnp.concatenate([first, last], 1), expected)
    assert len(caches) == 2 and caches[1].length.tolist() == [5, 5]


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("scan", [False, True])
def test_stacks_keep_random_streams_and_what_is_sown(scan, remat, normal):
    make = lambda rngs: EncoderBlock(D, N, 24, dropout=0.5, attention_dropout=0.5, rngs=rngs)
    stack, x = Stack(make, 2, scan=scan, remat=remat, rngs=nnx.Rngs(0)), normal(2, 5, D)
    run = nnx.jit(lambda stack, x: stack(x))
    first, second = run(stack, x), run(stack, x)
    assert not np.allclose(first, second)
    stack.eval()
    np.testing.assert_array_equal(run(stack, x), run(stack, x))
    out, sown = nnx.capture(stack, nnx.Intermediate)(x, sow_weights=True)
    close(out, stack(x))
    rows = [leaf.sum(-1) for leaf in jax.tree.leaves(sown)]
    assert [row.shape for row in rows] == ([(2, 2, N, 5)] if scan else [(2, N, 5)] * 2)
    for row in rows:
        close(row, jnp.ones_like(row))


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("scan", [False, True])
def test_stacks_draw_from_the_streams_of_a_call(scan, remat, normal):
    """Layer after layer, and the streams go on: the same numbers however the layers are run."""
    make = lambda rngs: EncoderBlock(D, N, 24, dropout=0.5, attention_dropout=0.5, rngs=rngs)
    plain, stack = Stack(make, 2, rngs=nnx.Rngs(0)), Stack(make, 2, scan=scan, remat=remat, rngs=nnx.Rngs(0))
    parameters = nnx.to_pure_dict(nnx.state(plain, nnx.Param))["layers"]
    nnx.update(stack.layers, together(parameters[i] for i in range(2)) if scan else parameters)
    run, x = nnx.jit(lambda stack, x, rngs: stack(x, rngs=rngs)), normal(2, 5, D)
    rngs, own = nnx.Rngs(3), nnx.Rngs(3)
    for _ in range(2):
        close(run(stack, x, rngs), run(plain, x, own), atol=1e-5)
    assert rngs.dropout.count[...] == own.dropout.count[...] == 2 * 2 * 4
    close(stack(x, rngs=nnx.Rngs(3).dropout), plain(x, rngs=nnx.Rngs(3).dropout), atol=1e-5)
    gradient = nnx.jit(nnx.grad(lambda stack, rngs: stack(x, rngs=rngs).var()))(stack, nnx.Rngs(3))
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_layers_that_differ(normal):
    makes = [functools.partial(DecoderBlock, D, N, 24, attention=dict(mask=m)) for m in (aj.Causal(), aj.Window(1, 0))]
    stack, x = Stack([lambda rngs, make=make: make(rngs=rngs) for make in makes], 2, rngs=nnx.Rngs(0)), normal(1, 5, D)
    close(stack(x), stack.layers[1](stack.layers[0](x)))


# Dropout


def test_attention_dropout_is_that_of_attention(normal):
    layer, x = attend(dropout=0.4), normal(2, 5, D)
    seed = jax.random.bits(nnx.Rngs(3).dropout())
    query, key, value = layer.query(x), layer.key(x), layer.value(x)
    expected = layer.out(aj.attention(query, key, value, dropout=aj.Dropout(0.4, seed)))
    np.testing.assert_array_equal(layer(x, rngs=nnx.Rngs(3)), expected)
    np.testing.assert_array_equal(layer(x, rngs=nnx.Rngs(3).dropout), expected)
    assert not np.allclose(layer(x), layer(x))
    plain = layer(x, deterministic=True)
    layer.eval()
    np.testing.assert_array_equal(layer(x), plain)
    assert not np.allclose(layer(x, deterministic=False), plain)
    layer.train()
    assert not np.allclose(layer(x), plain)


def test_dropout_leaves_the_mean(normal):
    layer, x = attend(dropout=0.3), normal(5, D)
    graph, state = nnx.split(layer)
    run = lambda key: nnx.merge(graph, state)(x, rngs=nnx.Rngs(key))
    outs = jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), 2000))
    spread = outs.std(0) / np.sqrt(2000)
    assert (jnp.abs(outs.mean(0) - layer(x, deterministic=True)) < 5 * spread).all()


# Types, devices


def test_types(normal):
    with jax.numpy_dtype_promotion("standard"):  # Flax's norms need it
        _types(normal)


def _types(normal):
    block = DecoderBlock(
        D, N, 24, norm="rms", attention=dict(rope=RoPE(), sinks=True), dtype=jnp.bfloat16, rngs=nnx.Rngs(0)
    )
    x = normal(2, 5, D).astype(jnp.bfloat16)
    out = nnx.jit(lambda block: block(x))(block)
    assert out.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(block, nnx.Param))} == {jnp.dtype(jnp.float32)}
    gradient = nnx.jit(nnx.grad(lambda block: block(x).astype(jnp.float32).sum()))(block)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype(jnp.float32)}
    half = EncoderBlock(D, N, 24, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert nnx.jit(lambda half: half(x))(half).dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(half, nnx.Param))} == {jnp.dtype(jnp.bfloat16)}


def test_every_parameter_has_axis_names():
    def make(rngs):
        attention = dict(sinks=True, normalize="rms")
        return DecoderBlock(D, N, 24, activation="swiglu", cross=True, output_norm=True, attention=attention, rngs=rngs)

    for scan in (False, True):
        stack = Stack(make, 2, scan=scan, rngs=nnx.Rngs(0))
        parts = (stack, LearnedPositions(8, D, rngs=nnx.Rngs(0)), RelativePositions(8, N, rngs=nnx.Rngs(0)))
        for path, variable in [pair for part in parts for pair in nnx.to_flat_state(nnx.state(part, nnx.Param))]:
            axes = variable.get_metadata()["out_sharding"]
            assert len(axes) == variable[...].ndim, path
            assert set(axes) <= {"embed", "heads", "key_heads", "size", "mlp", "vocab", "layers", None} and any(axes), (
                path
            )
            assert (axes[0] == "layers") == (scan and path[0] == "layers"), path
    spec = nnx.get_partition_spec(nnx.state(stack, nnx.Param))["layers"]["attention"]["query"]["kernel"]
    assert tuple(spec.get_value()) == ("layers", "embed", "heads", "size")


@functools.cache
def sharded():
    """What sharded_nn.py printed, by name."""
    program = Path(__file__).parent / "sharded_nn.py"
    run = subprocess.run([sys.executable, str(program)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return {case["name"]: case for case in map(json.loads, run.stdout.splitlines())}


STACKS = ["loop", "scan", "explicit, scan", "explicit, placed when made"]
MODELS = ["packed", "learned positions, tied", "caches", "rings", "encoder and decoder", "vision"]
one_worker = pytest.mark.xdist_group("sharded_nn")  # runs the program once


@one_worker
@pytest.mark.parametrize("name", STACKS)
def test_eight_devices_give_the_same_numbers(name):
    case = sharded()[name]
    assert case["error"] < 2e-6
    assert case["parts"] == {"query": 4, "up": 4, "norm": 1, "x": 2}  # by heads, by hidden numbers, whole; by batch
    assert "all-gather" not in case["moves"]


@one_worker
@pytest.mark.parametrize("name", MODELS)
def test_models_on_meshes_with_explicit_axes(name):
    """Logits and gradients; with parameters divided there are more devices than key heads."""
    case = sharded()[name]
    assert case["error"] < 2e-6
    assert case["batch"] == "data"


@one_worker
def test_generation_on_meshes_with_explicit_axes():
    assert sharded()["generation"]["error"] == 0


@pytest.mark.filterwarnings("ignore:.with mesh.:DeprecationWarning")  # of JAX
def test_with_mesh_places_nothing_and_says_so():
    with jax.make_mesh((1,), ("model",)), nnx.logical_axis_rules([("heads", "model")]):
        with pytest.raises(ValueError, match="with mesh: places no parameters. Use jax.set_mesh"):
            attend()


# Bad input


def test_bad_sizes():
    with pytest.raises(ValueError, match="MultiHeadAttention: features = 10 cannot be divided among num_heads = 4"):
        attend(10, 4)
    with pytest.raises(ValueError, match="num_heads must be a multiple of key_heads, got 4 and 3"):
        attend(key_heads=3)
    with pytest.raises(ValueError, match="MultiHeadAttention: head_size must be an integer of at least 1, got 0"):
        attend(head_size=0)
    with pytest.raises(ValueError, match=r"dropout must be a number in \[0, 1\), got 1.0"):
        attend(dropout=1.0)
    with pytest.raises(ValueError, match="fraction . head size must be even"):
        attend(head_size=5, rope=RoPE())
    with pytest.raises(TypeError, match="rope must be attnjax.positions.RoPE, got bool"):
        attend(rope=True)
    with pytest.raises(ValueError, match="FeedForward: hidden must be an integer of at least 1, got 2.5"):
        FeedForward(4, 2.5, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="Stack: count must be an integer of at least 1, got 0"):
        Stack(decoder, 0, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="Stack: make has 2 functions and count is 3"):
        Stack([decoder] * 2, 3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="Stack: layers that differ cannot be scanned"):
        Stack([decoder] * 2, 2, scan=True, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="PatchEmbedding: patch_size must be an integer of at least 1, got 2.5"):
        PatchEmbedding((2, 2.5), 3, 8, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"patch_size must be an integer, or \(height, width\), got \(2, 2, 2\)"):
        PatchEmbedding((2, 2, 2), 3, 8, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="features must be an even integer"):
        SinusoidalPositions(5)


def test_unknown_names():
    with pytest.raises(
        ValueError, match="FeedForward: activation must be one of gelu, .*got 'swigloo'. Did you mean 'swiglu'"
    ):
        EncoderBlock(D, N, 24, activation="swigloo", rngs=nnx.Rngs(0))
    with pytest.raises(
        ValueError, match="EncoderBlock: norm must be one of layer, rms; got 'rmsnorm'. Did you mean 'rms'"
    ):
        EncoderBlock(D, N, 24, norm="rmsnorm", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="MultiHeadAttention: normalize must be one of layer, rms; got True"):
        attend(normalize=True)


def test_dropout_needs_random_numbers():
    rngs = nnx.Rngs(params=0)
    with pytest.raises(ValueError, match="MultiHeadAttention: dropout = 0.1 needs random numbers: give rngs a stream"):
        MultiHeadAttention(D, N, dropout=0.1, rngs=rngs)
    with pytest.raises(ValueError, match="FeedForward: dropout = 0.1 needs random numbers"):
        EncoderBlock(D, N, 24, dropout=0.1, rngs=rngs)
    assert attend(dropout=0.0, rngs=0).rngs is None
    x, key = jnp.ones((5, D)), jax.random.key(0)
    stack = Stack(lambda rngs: EncoderBlock(D, N, 24, rngs=rngs), 1, rngs=nnx.Rngs(0))
    for module in (attend(), FeedForward(D, 24, rngs=nnx.Rngs(0)), stack):
        says = f"{type(module).__name__}: rngs must be nnx.Rngs, or one of its streams, got .*: give nnx.Rngs.key"
        with pytest.raises(TypeError, match=says):
            module(x, rngs=key)


def test_wrong_features_at_the_door():
    x = jnp.ones((2, 5, D + 1))
    for module in (attend(), EncoderBlock(D, N, 24, rngs=nnx.Rngs(0)), DecoderBlock(D, N, 24, rngs=nnx.Rngs(0))):
        name = type(module).__name__
        with pytest.raises(ValueError, match=rf"attnjax.nn.{name}: x must be \[\*B, T, 16\], got float32\[2, 5, 17\]"):
            module(x)
        with pytest.raises(ValueError, match=rf"{name}: x must be \[\*B, T, 16\], got float32\[16\]"):
            module(jnp.ones(D))
        with pytest.raises(
            TypeError, match=rf"{name}: x must be .* of floats, got int32\[2, 16\]: tokens become vectors"
        ):
            module(jnp.ones((2, D), jnp.int32))
        with pytest.raises(TypeError, match=rf"{name}: x must be \[\*B, T, 16\], got list"):
            module([[1.0] * D])
    with pytest.raises(ValueError, match=r"FeedForward: x must be \[..., 16\], got float32\[2, 5, 17\]"):
        FeedForward(D, 24, rngs=nnx.Rngs(0))(x)
    with pytest.raises(
        ValueError, match=r"MultiHeadAttention: context must be \[\*B, S, 16\], got float32\[2, 5, 17\]"
    ):
        attend()(x[..., 1:], x)
    with pytest.raises(
        ValueError, match=r"batch axes must be equal, got x float32\[2, 5, 16\] and context float32\[1, 5, 16\]"
    ):
        attend()(x[..., 1:], x[:1, :, 1:])
    with pytest.raises(ValueError, match="context is missing: context_features = 8 are not those of x, 16"):
        attend(context_features=8)(x[..., 1:])


def test_wrong_masks_and_positions():
    layer, x = attend(rope=RoPE()), jnp.ones((2, 5, D))
    with pytest.raises(ValueError, match=r"mask: Dense.array is bool\[5, 4\] and must broadcast to \[\*B, N, T, S\]"):
        layer(x, mask=jnp.ones((5, 4), bool))
    with pytest.raises(TypeError, match="mask must be an attnjax Mask or a boolean array, got str"):
        layer(x, mask="causal")
    with pytest.raises(TypeError, match="score must be an attnjax Score"):
        attend(score=jnp.ones((5, 5)))
    with pytest.raises(ValueError, match=r"MultiHeadAttention: positions must be \[5\] or \[2, 5\], .* got int32\[4\]"):
        layer(x, positions=jnp.arange(4))
    says = r"MultiHeadAttention: lengths must be integers \[2\], one for each row, got "
    with pytest.raises(ValueError, match=says + r"int32\[3\]"):
        layer(x, lengths=jnp.array([1, 2, 3]))
    with pytest.raises(TypeError, match=says + r"\[5, 2\]"):
        layer(x, lengths=[5, 2])
    with pytest.raises(TypeError, match=says + r"float32\[2\]"):
        layer(x, lengths=jnp.ones(2))
    with pytest.raises(TypeError, match="positions must be an array of integers, got float32"):
        layer(x, positions=jnp.arange(5.0))
    with pytest.raises(ValueError, match=r"LearnedPositions: positions are int32\[5\], and there are 4"):
        LearnedPositions(4, 8, rngs=nnx.Rngs(0))(jnp.arange(5))
    with pytest.raises(TypeError, match="SinusoidalPositions: positions must be an array of integers, got 5"):
        SinusoidalPositions(8)(5)
    patches = PatchEmbedding(4, 3, 8, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"height a multiple of 4 and their width of 4; got float32\[1, 8, 10, 3\]"):
        patches(jnp.ones((1, 8, 10, 3)))
    with pytest.raises(ValueError, match=r"images must be \[\*B, height, width, 3\]"):
        patches(jnp.ones((8, 8, 1)))
    with pytest.raises(TypeError, match=r"images must be an array of floats, got uint8\[8, 8, 3\]"):
        patches(jnp.ones((8, 8, 3), jnp.uint8))


def test_wrong_use_of_caches_and_contexts():
    x = jnp.ones((2, 5, D))
    layer = attend(dropout=0.1, mask=aj.Causal())
    cache = layer.create_cache(2, 8)
    with pytest.raises(ValueError, match="a cache holds the tokens that came before, so attention with it is causal"):
        attend()(x, cache=cache)
    with pytest.raises(ValueError, match="the mask is .Causal.. . Prefix.2.."):
        attend(mask=aj.Causal() | aj.Prefix(2))(x, cache=cache)
    with pytest.raises(ValueError, match="MultiHeadAttention: a call with a cache has no dropout: call eval"):
        layer(x, cache=cache)
    layer.eval()
    with pytest.raises(ValueError, match="sow_weights needs all tokens in one call"):
        layer(x, cache=cache, sow_weights=True)
    with pytest.raises(TypeError, match="cache must be an attnjax.KVCache, got tuple"):
        layer(x, cache=(cache,))
    ring = aj.KVCache.create(2, 8, N, D // N, window=3)
    with pytest.raises(ValueError, match="the cache is a ring of window 3 and the mask, Causal.., reaches further"):
        layer(x, cache=ring)
    with pytest.raises(ValueError, match="cache and lengths are for attention of x to itself"):
        layer(x, x, cache=cache)
    with pytest.raises(ValueError, match="give context or keys_values, not both"):
        layer(x, x, keys_values=layer.keys_values(x))
    plain, cross = (DecoderBlock(D, N, 24, cross=cross, rngs=nnx.Rngs(0)) for cross in (False, True))
    with pytest.raises(ValueError, match="DecoderBlock: a context needs a block with cross=True"):
        plain(x, x)
    with pytest.raises(ValueError, match="DecoderBlock: context is missing, for cross=True"):
        cross(x)
    with pytest.raises(ValueError, match="keys_values needs a block with cross=True"):
        plain.keys_values(x)
    with pytest.raises(ValueError, match="context_features and cross_attention are for cross=True"):
        DecoderBlock(D, N, 24, context_features=8, rngs=nnx.Rngs(0))
    scanned = Stack(decoder, 2, scan=True, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="KVCache: 5 tokens are more than its capacity of 4"):
        scanned(x, x, caches=scanned.create_caches(2, 4))
    with pytest.raises(ValueError, match="caches must have one entry for each of 2 layers, got 1"):
        Stack(decoder, 2, rngs=nnx.Rngs(0))(x, x, caches=(cache,))
