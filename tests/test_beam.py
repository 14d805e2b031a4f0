"""Beam search: brute force over all targets, and the rule itself written out in Python for small beams."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_models import ENCODER, build

from attnjax.models import (
    DecoderConfig,
    DecoderLM,
    Transformer,
    TransformerConfig,
    beam_search,
    generate,
    pad,
)

STOP = 2
VOCAB, LENGTH = 5, 3


SMALL = dict(features=8, num_heads=2, hidden=16)


def translator(seed):
    config = TransformerConfig(VOCAB, **SMALL, encoder_layers=1, decoder_layers=1, dropout=0.0)
    return Transformer(config, rngs=nnx.Rngs(seed))


@pytest.fixture(scope="module")
def tiny():
    return translator(3)


@nnx.jit
def logs_of(model, tokens, source=None):
    """Log-probabilities behind every token."""
    given = (tokens,) if source is None else (jnp.broadcast_to(source, (len(tokens), *source.shape)), tokens)
    return jax.nn.log_softmax(model(*given))


def searched(model, prefix, source, beams, stops, penalty):
    """The best `beams` targets of one row and their scores, by the rule in plain Python."""
    begun = list(itertools.product(range(VOCAB), repeat=LENGTH - 1))
    rows = np.asarray(logs_of(model, jnp.array([[*prefix, *t] for t in begun]), source))
    logs = {t[:n]: row[len(prefix) - 1 + n] for t, row in zip(begun, rows, strict=True) for n in range(LENGTH)}
    best = lambda found: sorted(found, key=lambda one: -one[1])
    live, ended = [((), 0.0)], []
    for n in range(1, LENGTH + 1):
        ways = best(((*t, token), total + logs[t][token]) for t, total in live for token in range(VOCAB))
        ended += [(t, total / ((5 + n) / 6) ** penalty) for t, total in ways[:beams] if t[-1] in stops]
        live = [way for way in ways if way[0][-1] not in stops][:beams]
        ended = best(ended)[:beams]
    return best(ended + [(t, total / ((5 + LENGTH) / 6) ** penalty) for t, total in live])[:beams]


def agrees(found, row, want):
    np.testing.assert_allclose(found.scores[row, : len(want)], [score for _, score in want], rtol=2e-5)
    got = [found.tokens[row, i, : found.lengths[row, i]].tolist() for i in range(len(want))]
    assert got == [list(target) for target, _ in want]


@pytest.mark.parametrize("stops", [STOP, [STOP, 4]], ids=["one_stop", "two_stops"])
@pytest.mark.parametrize("beams", [1, 3])
def test_the_rule(beams, stops):
    """Also with several stop tokens (transformers#25103), of any rank (transformers#8722, #8890), and every bound of
    the length penalty (transformers#20901, joeynmt#149, OpenNMT-py#1320).
    """
    source, several = np.array([[3, 4, 1], [4, 4, 0]]), [STOP] if isinstance(stops, int) else stops
    prefix = 1 if isinstance(stops, int) else [1, 3]
    for seed, penalty in itertools.product(range(4), (0.0, 0.6, 2.0)):
        model = translator(seed)
        rules = dict(start_token=prefix, stop_token=stops, max_new_tokens=LENGTH, length_penalty=penalty)
        found = beam_search(model, source, beams=beams, **rules)
        for row in range(2):
            want = searched(model, np.atleast_1d(prefix), jnp.asarray(source[row]), beams, several, penalty)
            agrees(found, row, want)


def test_one_beam_is_greedy():
    """Without length penalty, for with one a longer sequence may be better than where greedy search ends."""
    source = np.random.default_rng(1).integers(3, 5, (8, 3))
    for seed in range(12):
        model = translator(seed)
        rules = dict(start_token=1, stop_token=STOP, max_new_tokens=5, beams=1, length_penalty=0)
        greedy = generate(model, [[1]] * 8, memory=model.encode(source), stop_tokens=[STOP], max_new_tokens=5)
        assert beam_search(model, source, **rules).lists() == greedy.lists()


def test_prompts_of_a_decoder():
    """Of different lengths, padded at either side."""
    prompts, lengths = pad([[3, 4, 1], [4], [0, 1]])
    for seed in range(3):
        model = DecoderLM(DecoderConfig(VOCAB, num_layers=1, max_length=9, **SMALL), rngs=nnx.Rngs(seed))
        rules = dict(stop_token=STOP, max_new_tokens=LENGTH, beams=2)
        found = beam_search(model, prompts, lengths=lengths, **rules)
        for row, n in enumerate(lengths):
            agrees(found, row, searched(model, prompts[row, :n], None, 2, [STOP], 0.6))
        left = np.array([[3, 4, 1], [0, 0, 4], [0, 0, 1]])
        other = beam_search(model, left, mask=np.arange(3) >= 3 - lengths[:, None], **rules)
        np.testing.assert_array_equal(other.tokens, found.tokens)


def test_a_prefix_for_each_row(tiny):
    source = [[3, 4, 1], [4, 4, 0]]
    rules = dict(stop_token=STOP, max_new_tokens=LENGTH, beams=3)
    both = beam_search(tiny, source, start_token=[[1, 3], [1, 0]], **rules)
    for row, prefix in enumerate(([1, 3], [1, 0])):
        agrees(both, row, searched(tiny, prefix, jnp.array(source[row]), 3, [STOP], 0.6))


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_what_the_cache_stores(tiny, dtype):
    rules = dict(start_token=1, stop_token=STOP, max_new_tokens=4, beams=2)
    near, exact = (beam_search(tiny, [[4, 3, 1]], cache_dtype=d, **rules).scores for d in (dtype, None))
    assert 0 < float(abs(near - exact).max()) < 0.05


def test_under_x64_and_other_modes(tiny):
    """Numbers of numpy and JAX are taken as Python's."""
    rules = dict(start_token=1, stop_token=STOP, max_new_tokens=4, beams=2)
    want = beam_search(tiny, [[4, 3, 1]], **rules)
    rules = dict(start_token=jnp.int32(1), stop_token=jnp.array([2]), max_new_tokens=np.int64(4), beams=np.int8(2))
    with jax.enable_x64(True), jax.debug_nans(True):
        found = beam_search(tiny, [[4, 3, 1]], length_penalty=np.float32(0.6), **rules)
    assert found.lists() == want.lists()
    np.testing.assert_allclose(found.scores, want.scores, rtol=1e-5)


def test_broken_models_and_calls_from_within():
    model = translator(0)
    rules = dict(start_token=1, stop_token=STOP, max_new_tokens=4, beams=2)
    with pytest.raises(TypeError, match="beam_search compiles its own steps and cannot be part of another program"):
        nnx.jit(lambda model: beam_search(model, [[3]], **rules).tokens)(model)
    table = model.embed.tokens.embedding
    table.set_value(table[...] * jnp.nan)
    with pytest.raises(FloatingPointError, match="row 0 has no likeliest token: its logits are NaN or infinite"):
        beam_search(model, [[3], [4]], **rules)


def all_targets(model, source, lengths, penalty):
    """Every target of at most LENGTH tokens with its score, best first: brute force."""
    targets = [t for n in range(1, LENGTH + 1) for t in itertools.product(range(VOCAB), repeat=n)]
    targets = [t for t in targets if STOP not in t[:-1] and (t[-1] == STOP or len(t) == LENGTH)]
    padded = np.array([[1, *t, *[0] * (LENGTH - len(t))] for t in targets])
    many = lambda x: jnp.broadcast_to(x, (len(targets), *x.shape[1:]))
    run = nnx.jit(lambda model, *given: jax.nn.log_softmax(model(*given[:2], source_lengths=given[2])))
    logs = run(model, many(source), jnp.asarray(padded[:, :-1]), many(lengths))
    own = np.take_along_axis(np.asarray(logs), padded[:, 1:, None], -1)[..., 0]
    size = np.array([len(t) for t in targets])
    total = np.where(np.arange(LENGTH) < size[:, None], own, 0).sum(-1)
    scores = total / ((5 + size) / 6) ** penalty
    return [(targets[i], scores[i]) for i in np.argsort(-scores)]


@pytest.mark.parametrize("penalty", [0.0, 0.6, 2.0])
def test_a_wide_beam_finds_the_best_of_all_targets(tiny, penalty):
    source, lengths = pad([[3, 4, 1, 0], [4, 2]])
    rules = dict(start_token=1, stop_token=STOP, max_new_tokens=LENGTH, length_penalty=penalty)
    found = beam_search(tiny, source, lengths=lengths, beams=30, **rules)
    for row in range(2):
        want = all_targets(tiny, jnp.asarray(source[row : row + 1]), jnp.asarray(lengths[row : row + 1]), penalty)
        np.testing.assert_allclose(found.scores[row, :20], [score for _, score in want[:20]], rtol=1e-5)
        assert found.lists()[row] == list(want[0][0])
        for beam in range(20):
            n = int(found.lengths[row, beam])
            assert tuple(found.tokens[row, beam, :n].tolist()) in dict(want)
            assert not found.tokens[row, beam, n:].any()


def test_scores_fall_and_a_row_does_not_depend_on_others(tiny):
    source, lengths = pad([[3, 4, 1, 0], [4, 2]])
    rules = dict(start_token=1, stop_token=STOP, max_new_tokens=8, beams=3)
    found = beam_search(tiny, source, lengths=lengths, **rules)
    assert (np.diff(found.scores, axis=1) <= 0).all()
    assert beam_search(tiny, [[4, 2]], **rules).lists()[0] == found.lists()[1]


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"beams": 0}, ValueError, "beams must be an integer of at least 1, got 0"),
        ({"length_penalty": -1.0}, ValueError, "length_penalty must be a number of at least 0, got -1.0"),
        ({"start_token": 5}, ValueError, "start_token: 5 is not in the vocabulary of 5"),
        ({"stop_token": "end"}, TypeError, "stop_token must be integers, got 'end'"),
        ({"source": [[0.5]]}, TypeError, "source must be integers, got float64"),
        ({"source": [[]]}, ValueError, "source is empty"),
        ({"start_token": None}, ValueError, "start_token is missing: a Transformer begins its targets with one"),
        ({"start_token": [[1], [1]]}, ValueError, "start_token has 2 rows, and source has 1"),
        ({"stop_token": [1.5]}, TypeError, "stop_token must be integers, got 1.5"),
    ],
)
def test_searches_that_make_no_sense_are_refused(tiny, options, error, says):
    rules = dict(source=[[1]], start_token=1, stop_token=STOP, max_new_tokens=3)
    with pytest.raises(error, match=says):
        beam_search(tiny, **{**rules, **options})


def test_models_that_cannot_search_are_refused(tiny):
    with pytest.raises(TypeError, match="model must be a DecoderLM, a Transformer or one like them, got Encoder"):
        beam_search(build(ENCODER), [[1]], stop_token=2, max_new_tokens=3)
    model = DecoderLM(DecoderConfig(VOCAB, num_layers=1, max_length=9, **SMALL), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="start_token was given, and DecoderLM continues its prompts: leave it out"):
        beam_search(model, [[1]], start_token=1, stop_token=2, max_new_tokens=3)
