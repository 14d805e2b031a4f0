"""Situations of modules, caches and generation in which other libraries went wrong, by their public reports."""

import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from small_models import DECODERS, VISION, build

import attnjax as aj
from attnjax.models import Sampling, checkpoint, generate, pad
from attnjax.models.sampling import keep_top_p
from attnjax.nn import MultiHeadAttention
from attnjax.positions import RoPE


@pytest.fixture(scope="module")
def gpt():
    return build(DECODERS["gpt"])


# Training


def squares(model, x):
    return (model(x) ** 2).mean()


@nnx.jit
def step(model, optimizer, x):
    optimizer.update(model, nnx.grad(squares)(model, x))


X = jax.random.normal(jax.random.key(0), (4, 5, 8))


def test_gradients_through_a_module_put_together():
    """google/flax#5050: jax.grad over nnx.merge with dropout, whose streams move on; the same as nnx.grad."""
    module = MultiHeadAttention(8, 2, dropout=0.3, rngs=nnx.Rngs(0))
    graph, parameters, rest = nnx.split(module, nnx.Param, ...)
    gradients = jax.jit(jax.grad(lambda p: squares(nnx.merge(graph, p, rest, copy=True), X)))(parameters)
    want = nnx.jit(nnx.grad(squares))(module, X)
    for one, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@jax.numpy_dtype_promotion("standard")  # Adam takes a power of a count
def test_optimizers_of_other_parts_are_saved_and_restored():
    """google/flax#5372: nnx.Optimizer with optax.partition, saved and restored."""

    def make(seed):
        model = MultiHeadAttention(8, 2, rngs=nnx.Rngs(seed))
        label = lambda path, _: "a" if "bias" in jax.tree_util.keystr(path) else "b"
        labels = lambda tree: jax.tree.map_with_path(label, tree, is_leaf=lambda x: isinstance(x, nnx.Variable))
        rule = optax.partition({"a": optax.sgd(0.1), "b": optax.adam(1e-3)}, labels)
        return model, nnx.Optimizer(model, rule, wrt=nnx.Param)

    (model, optimizer), (other, restored) = make(0), make(1)
    step(model, optimizer, X)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(folder, model, optimizer, step=1)
        checkpoint.restore(folder, other, restored)
    step(model, optimizer, X)
    step(other, restored, X)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), nnx.state(other))


@jax.numpy_dtype_promotion("standard")  # MultiSteps divides by an integer
def test_steps_that_are_not_finite_are_left_out():
    """optax#1567, #828: MultiSteps with clipping adds up; apply_if_finite leaves a NaN out."""
    model, other = (MultiHeadAttention(8, 2, rngs=nnx.Rngs(0)) for _ in "ab")
    chain = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1))
    optimizer = nnx.Optimizer(model, optax.MultiSteps(chain, 2), wrt=nnx.Param)
    for part in (X[:2], X[2:]):
        step(model, optimizer, part)
    step(other, nnx.Optimizer(other, chain, wrt=nnx.Param), X)
    for one, two in zip(jax.tree.leaves(nnx.state(model)), jax.tree.leaves(nnx.state(other)), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)
    before = nnx.state(nnx.clone(model))
    step(model, nnx.Optimizer(model, optax.apply_if_finite(optax.sgd(0.1), 3), wrt=nnx.Param), X * jnp.nan)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), before)


# Models


def test_log_likelihoods_do_not_depend_on_padding(gpt):
    """lm-eval#704, mlx-lm#1855, t-zero#29, Skywork#55: rows in a batch, padded, and alone."""
    rows = [[5, 9, 3, 7, 1, 8], [4, 2], [6, 6, 1]]
    tokens, lengths = pad(rows)
    logits = jax.nn.log_softmax(gpt(jnp.asarray(tokens), lengths=jnp.asarray(lengths)))
    for n, row in enumerate(rows):
        alone = jax.nn.log_softmax(gpt(jnp.array([row])))[0]
        np.testing.assert_allclose(logits[n, : len(row)], alone, rtol=1e-4, atol=1e-5)


def test_pictures_that_are_not_square():
    """dino#8, dinov2#506, timm#2317: height and width changed places; here a patch goes where it belongs."""
    model = build(VISION)
    image = jax.random.normal(jax.random.key(0), (1, *VISION.image_size, 3))
    assert model(image).shape == (1, 5)
    with pytest.raises(ValueError, match="image"):
        model(image.swapaxes(1, 2))
    patches = model.patches(image).reshape(1, -1, VISION.features)
    per_row = VISION.image_size[1] // VISION.patch_size[1]
    for n in range(patches.shape[1]):
        i, j = n // per_row * 2, n % per_row * 2
        moved = model.patches(image.at[:, i : i + 2, j : j + 2].add(1.0)).reshape(1, -1, VISION.features)
        assert np.flatnonzero(np.abs(moved - patches).max((0, 2)) > 1e-3).tolist() == [n]


@pytest.mark.parametrize("start", [0, 4000, 131071])
def test_rotations_far_out_are_not_rounded_with_the_numbers(start):
    """transformers#29285, sglang-jax#1473, candle#3698: angles in bfloat16 are wrong from a few hundred on."""
    x = jax.random.normal(jax.random.key(0), (1, 4, 2, 64))
    places = jnp.arange(start, start + 4)
    got = np.float64(RoPE()(x.astype(jnp.bfloat16), places))
    with jax.enable_x64(True):
        want = np.asarray(RoPE()(jnp.asarray(np.float64(x.astype(jnp.bfloat16))), places))
    np.testing.assert_allclose(got, want, atol=2e-2 + 1e-7 * start)


# Caches and generation


def test_int8_caches_with_outliers():
    """TensorRT-LLM#133: one outlier of 1000 took the precision of all tokens; here each token has its own scale."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 9, 2, 16)), jnp.float32) for _ in range(3))
    v = v.at[0, 3, 0, 5].set(1000.0)
    out, _ = aj.KVCache.create(1, 9, 2, 16, dtype=jnp.int8).attend(q[:, :3], k[:, :3], v[:, :3])
    cache = aj.KVCache.create(1, 9, 2, 16, dtype=jnp.int8).append(k, v)
    held = np.float64(cache.value) * np.asarray(cache.value_scale)[..., None]
    error = np.abs(held - v)
    assert error[0, 3, 0].max() < 1000 / 127 and np.delete(error[0, :, 0], 3, 0).max() < 4 / 127
    np.testing.assert_allclose(out, aj.causal_attention(q[:, :3], k[:, :3], v[:, :3]), atol=0.05)


def test_the_token_that_crosses_p_is_kept():
    """transformers#18976, llama.cpp#1953: sums that are equal to p, and the token that makes them larger."""
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.125, 0.125]]))
    kept = lambda p: np.isfinite(np.asarray(keep_top_p(logits, p)))[0].tolist()
    assert kept(0.3) == [True, False, False, False]
    assert kept(0.6) == [True, True, False, False]
    assert kept(0.8) == [True] * 4  # equal tokens stay together


def test_padding_is_not_punished_as_a_repetition(gpt):
    """TGI#1765, transformers#36642: the penalty counted padding, so that a row depended on others."""
    prompts = [[5, 9, 3, 7, 1], [4, 8]]
    tokens, lengths = pad(prompts, pad_token=7)
    options = dict(max_new_tokens=6, sampling=Sampling(0.0, repetition_penalty=3.0))
    together = generate(gpt, tokens, lengths=lengths, **options).lists()
    assert together == [generate(gpt, [prompt], **options).lists()[0] for prompt in prompts]
