"""Choosing tokens from logits: each rule against a few lines of NumPy that sort; draws; what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.models import sampling
from attnjax.models.sampling import Sampling, sample

SHAPE = (5, 101)


@pytest.fixture
def logits(rng):
    return (3 * rng.normal(size=SHAPE)).astype(np.float32)


def kept(logits):
    return np.isfinite(np.asarray(logits))


@pytest.mark.parametrize("k", [1, 2, 50, 101, 1000])
def test_top_k_keeps_the_k_largest(logits, k):
    order = np.argsort(-logits, axis=-1)[:, :k]
    want = np.zeros(SHAPE, bool)
    np.put_along_axis(want, order, True, axis=-1)
    got = sampling.keep_top_k(jnp.asarray(logits), k)
    np.testing.assert_array_equal(kept(got), want)
    np.testing.assert_array_equal(np.asarray(got)[want], logits[want])


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.99, 1.0])
def test_top_p_keeps_the_smallest_set_with_that_probability(logits, p):
    probability = np.exp(logits.astype(np.float64))
    probability /= probability.sum(-1, keepdims=True)
    want = np.zeros(SHAPE, bool)
    for row, keep in zip(probability, want, strict=True):
        order = np.argsort(-row)
        before = np.cumsum(row[order]) - row[order]
        keep[order[before < p]] = True
    np.testing.assert_array_equal(kept(sampling.keep_top_p(jnp.asarray(logits), p)), want)


def test_top_p_of_equal_logits_keeps_all_of_them():
    assert kept(sampling.keep_top_p(jnp.zeros((1, 7)), 0.1)).all()


def test_top_p_after_another_rule_stays_within_it(logits):
    both = sampling.keep_top_p(sampling.keep_top_k(jnp.asarray(logits), 4), 1 - 1e-7)
    assert (kept(both).sum(-1) <= 4).all()


@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 1.0])
def test_min_p_is_a_share_of_the_most_likely(logits, p):
    probability = np.exp(logits.astype(np.float64))
    want = probability >= p * probability.max(-1, keepdims=True) * (1 - 1e-6)
    np.testing.assert_array_equal(kept(sampling.keep_min_p(jnp.asarray(logits), p)), want)


def test_repetition_penalty_makes_seen_tokens_less_likely(logits, rng):
    seen = rng.random(SHAPE) < 0.3
    got = np.asarray(sampling.penalize_repetition(jnp.asarray(logits), jnp.asarray(seen), 1.5))
    np.testing.assert_array_equal(got[~seen], logits[~seen])
    assert (got[seen] < logits[seen]).all()
    np.testing.assert_allclose(got[seen & (logits > 0)], logits[seen & (logits > 0)] / 1.5, rtol=1e-6)


def test_temperature_zero_is_greedy_and_needs_no_rng(logits):
    np.testing.assert_array_equal(sample(jnp.asarray(logits), Sampling(temperature=0)), logits.argmax(-1))
    one = sample(jnp.asarray(logits), Sampling(top_k=1), jax.random.key(0))
    np.testing.assert_array_equal(one, logits.argmax(-1))


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-45, 1e-300])
def test_the_smallest_temperatures_are_greedy(logits, temperature):
    drawn = sample(jnp.asarray(logits), Sampling(temperature, top_p=0.9, min_p=0.01), jax.random.key(0))
    np.testing.assert_array_equal(drawn, logits.argmax(-1))


def test_draws_have_the_probabilities_of_the_softmax():
    logits = jnp.log(jnp.array([0.1, 0.2, 0.3, 0.4]))
    draw = jax.jit(lambda rng: sample(jnp.tile(logits, (20000, 1)), Sampling(), rng))
    share = np.bincount(draw(jax.random.key(0)), minlength=4) / 20000
    np.testing.assert_allclose(share, [0.1, 0.2, 0.3, 0.4], atol=0.015)
    cold = jax.jit(lambda rng: sample(jnp.tile(logits, (20000, 1)), Sampling(temperature=0.5), rng))
    share = np.bincount(cold(jax.random.key(0)), minlength=4) / 20000
    np.testing.assert_allclose(share, np.array([1, 4, 9, 16]) / 30, atol=0.015)


def test_a_row_is_drawn_as_when_it_is_alone(logits):
    rules = Sampling(top_k=20, top_p=0.9, min_p=0.01)
    together = sample(jnp.asarray(logits), rules, jax.random.key(3))
    assert sample(jnp.asarray(logits[:1]), rules, jax.random.key(3))[0] == together[0]


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"temperature": -0.5}, ValueError, "temperature must be at least 0 and finite, got -0.5"),
        ({"temperature": float("nan")}, ValueError, "temperature must be at least 0"),
        ({"temperature": "hot"}, TypeError, "temperature must be a number, got 'hot'"),
        ({"top_p": 0.0}, ValueError, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.1}, ValueError, r"top_p must be in \(0, 1\], got 1.1"),
        ({"min_p": -0.1}, ValueError, r"min_p must be in \[0, 1\], got -0.1"),
        ({"top_k": 0}, ValueError, "top_k must be an integer of at least 1, got 0"),
        ({"top_k": 2.0}, ValueError, "top_k must be an integer of at least 1, got 2.0"),
        ({"repetition_penalty": 0}, ValueError, "repetition_penalty must be positive and finite, got 0"),
    ],
)
def test_rules_that_make_no_sense_are_refused(arguments, error, says):
    with pytest.raises(error, match=says):
        Sampling(**arguments)


def test_drawing_needs_an_rng():
    with pytest.raises(ValueError, match="rng is missing: temperature 1.0 draws at random"):
        sample(jnp.zeros((1, 3)), Sampling())
