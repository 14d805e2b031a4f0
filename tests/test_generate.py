"""Generation: cached decoding is a loop of full forwards; rows, chunks and callbacks change nothing; beam search."""

import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_models import DECODERS, ENCODER, TRANSFORMER, build

from attnjax.models import Sampling, Transformer, TransformerConfig, beam_search, generate, pad

module = sys.modules["attnjax.models.generate"]  # whose name the function has taken
STOP = 2


@pytest.fixture(scope="module")
def gpt():
    return build(DECODERS["gpt"])


def greedy(model, tokens, count, *, source=None, source_lengths=None):
    """What follows one prompt, by forwards of everything so far, padded to one length so that they compile once."""
    tokens = list(map(int, tokens))
    length = len(tokens) + count

    @nnx.jit
    def run(model, tokens):
        given = (tokens,) if source is None else (source, tokens)
        options = {} if source_lengths is None else {"source_lengths": source_lengths}
        return model(*given, deterministic=True, **options)[0]

    for _ in range(count):
        logits = run(model, jnp.array([tokens + [0] * (length - len(tokens))]))
        tokens.append(int(logits[len(tokens) - 1].argmax()))
    return tokens[-count:]


@pytest.mark.parametrize("name", DECODERS)
def test_greedy_tokens_are_those_of_full_forwards(name):
    model = build(DECODERS[name])
    tokens, lengths = pad([[5, 9, 3, 7, 1, 8, 2], [4], [6, 6, 1, 50]], pad_token=52)
    made = generate(model, tokens, lengths=lengths, max_new_tokens=9)
    assert made.lengths.tolist() == [9, 9, 9] and not made.stopped.any()
    for row, length, found in zip(tokens, lengths, made.lists(), strict=True):
        assert found == greedy(model, row[:length], 9)


def test_a_row_is_generated_as_when_it_is_alone(gpt):
    prompts = [[5, 9, 3, 7, 1], [4, 8], [6, 6, 1]]
    tokens, lengths = pad(prompts)
    for sampling, rng in ((Sampling(0.0), None), (Sampling(top_k=20), jax.random.key(4))):
        options = dict(max_new_tokens=6, sampling=sampling, rng=rng)
        made = generate(gpt, tokens, lengths=lengths, **options)
        assert made.lists()[0] == generate(gpt, [prompts[0]], **options).lists()[0]
    for prompt, found in zip(prompts, generate(gpt, tokens, lengths=lengths, max_new_tokens=6).lists(), strict=True):
        assert found == generate(gpt, [prompt], max_new_tokens=6).lists()[0]


def test_scanned_layers_generate(gpt):
    model = build(DECODERS["llama"].__class__(**{**vars(DECODERS["llama"]), "scan": True}))
    assert generate(model, [[5, 9, 3]], max_new_tokens=5).lists()[0] == greedy(model, [5, 9, 3], 5)


def test_stop_tokens_end_rows_and_are_the_last(gpt):
    free = generate(gpt, [[5, 9, 3], [4, 8, 8]], max_new_tokens=8).lists()
    stop = free[0][2]
    ends = free[0].index(stop) + 1
    made = generate(gpt, [[5, 9, 3], [4, 8, 8]], max_new_tokens=8, stop_tokens=[stop], pad_token=51)
    assert made.lists()[0] == free[0][:ends]
    assert made.tokens[0].tolist() == free[0][:ends] + [51] * (8 - ends)
    want = free[1].index(stop) + 1 if stop in free[1] else 8
    assert made.lists()[1] == free[1][:want]
    assert made.stopped.tolist() == [True, stop in free[1]]


def test_callbacks_get_the_tokens_of_each_step_in_order(gpt):
    rules = dict(max_new_tokens=7, sampling=Sampling(temperature=1.5, top_p=0.95), rng=jax.random.key(3))
    free = generate(gpt, [[5, 9, 3], [4, 8, 8]], **rules)
    steps = []
    made = generate(gpt, [[5, 9, 3], [4, 8, 8]], on_token=steps.append, **rules)
    np.testing.assert_array_equal(made.tokens, free.tokens)
    np.testing.assert_array_equal(np.stack(steps, 1), free.tokens)

    stop, steps = free.lists()[0][1], []
    made = generate(gpt, [[5, 9, 3], [4, 8, 8]], on_token=steps.append, stop_tokens=[stop], **rules)
    streamed = [[int(t) for t in row if t >= 0] for row in np.stack(steps, 1)]
    assert streamed == made.lists() and len(steps) == made.lengths.max()


def test_a_bar_for_long_runs_changes_nothing(monkeypatch):
    model = build(DECODERS["alibi"])
    rules = dict(max_new_tokens=70, temperature=1.0, rng=jax.random.key(3))
    free = generate(model, [[5, 9, 3]], **rules)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    shown = []
    update = pytest.importorskip("rich.progress").Progress.update
    monkeypatch.setattr(
        "rich.progress.Progress.update",
        lambda self, task, *, completed: shown.append(completed) or update(self, task, completed=completed),
    )
    np.testing.assert_array_equal(generate(model, [[5, 9, 3]], **rules).tokens, free.tokens)
    assert shown == [1, 33, 65, 70]
    generate(model, [[5, 9, 3]], progress=False, **rules)
    assert len(shown) == 4


def test_the_same_rng_gives_the_same_tokens_and_another_others(gpt):
    draws = [
        generate(gpt, [[5, 9, 3]], max_new_tokens=8, temperature=2.0, rng=jax.random.key(seed)).lists()
        for seed in (0, 0, 1)
    ]
    assert draws[0] == draws[1] != draws[2]


def test_a_large_repetition_penalty_never_repeats(gpt):
    prompt = [5, 9, 3]
    made = generate(gpt, [prompt], max_new_tokens=12, sampling=Sampling(0.0, repetition_penalty=1e6)).lists()[0]
    logits = gpt(jnp.array([prompt]))[0, -1]
    assert len(set(made + prompt)) == 15
    assert made[0] == int(jnp.where(jnp.isin(np.arange(53), np.array(prompt)), -jnp.inf, logits).argmax())


def test_one_compiled_step_writes_the_cache_in_place(gpt):
    module._steps.clear_cache()
    for prompt in ([5, 9, 3], [4, 8, 8], [7, 1, 1, 1, 2]):
        generate(gpt, [prompt], max_new_tokens=6, capacity=16)
    assert module._steps._cache_size() == 1

    frozen, leaves = module.Frozen(gpt).without_arrays()
    rules = module.Rules(Sampling(0.0), (), 0, 600, 4096)
    given = (leaves, None, jax.random.key(0))
    prompt = (jnp.zeros((2, 3), jnp.int32), jnp.full(2, 3))
    state = jax.eval_shape(lambda *given: module._start(frozen, rules, *given), *given, *prompt)
    held = sum(x.size * 4 for cache in state.caches for x in (cache.key, cache.value))
    memory = module._steps.lower(frozen, rules, *given, state, np.int32(4)).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= held
    assert memory.temp_size_in_bytes < held / 20


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_what_the_cache_stores(gpt, tiny, dtype):
    """Greedy tokens are those of a loop with such caches, written by hand."""
    caches = gpt.create_caches(1, 10, dtype=dtype)
    assert caches[0].key.dtype == dtype
    made, tokens = [], [5, 9, 3, 7]
    for _ in range(6):
        logits, caches = gpt(jnp.array([tokens]), caches=caches, deterministic=True)
        tokens = [int(logits[0, -1].argmax())]
        made += tokens
    assert generate(gpt, [[5, 9, 3, 7]], max_new_tokens=6, cache_dtype=dtype).lists() == [made]
    rules = dict(start_token=1, stop_token=STOP, max_new_tokens=4, beams=2)
    near, exact = (beam_search(tiny, [[4, 3, 1]], cache_dtype=d, **rules).scores for d in (dtype, None))
    assert 0 < float(abs(near - exact).max()) < 0.05


def test_the_prompts_make_no_logits_but_the_last():
    """At a vocabulary of a million, those of all 16 tokens would be 64 MB."""
    config = DECODERS["gpt"].__class__(**{**vars(DECODERS["gpt"]), "vocab_size": 2**20})
    frozen = module.Frozen(nnx.eval_shape(lambda: build(config)))
    frozen, leaves = frozen.without_arrays()
    rules = module.Rules(Sampling(0.0), (), 0, 2, 18)
    given = (leaves, None, jax.random.key(0), jnp.zeros((1, 16), jnp.int32), jnp.full(1, 16))
    shapes = [
        v.aval.shape
        for e in jax.make_jaxpr(lambda *g: module._start(frozen, rules, *g))(*given).eqns
        for v in e.outvars
    ]
    assert not any(2**20 in shape and 16 in shape for shape in shapes)


def test_an_encoder_decoder_generates_what_full_forwards_give():
    model = build(TRANSFORMER)
    source, lengths = pad([[5, 9, 3, 7, 1, 8, 2], [4, 4, 9]])
    memory = model.encode(source, lengths=lengths)
    made = generate(model, [[1], [1]], memory=memory, max_new_tokens=6).lists()
    for row, found in enumerate(made):
        own = dict(source=jnp.asarray(source[row : row + 1]), source_lengths=jnp.asarray(lengths[row : row + 1]))
        assert found == greedy(model, [1], 6, **own)
    one = beam_search(model, source, lengths=lengths, start_token=1, stop_token=STOP, max_new_tokens=6, beams=1)
    stopped = generate(model, [[1], [1]], memory=memory, max_new_tokens=6, stop_tokens=[STOP])
    assert one.lists() == stopped.lists()


VOCAB, LENGTH = 5, 3


@pytest.fixture(scope="module")
def tiny():
    config = TransformerConfig(
        VOCAB, features=8, num_heads=2, hidden=16, encoder_layers=1, decoder_layers=1, dropout=0.0
    )
    return Transformer(config, rngs=nnx.Rngs(3))


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
    ("tokens", "options", "error", "says"),
    [
        ([[1] * 15], {}, ValueError, "15 tokens of the prompts and max_new_tokens = 5 are more than the model's max_l"),
        ([[1] * 9], {"capacity": 12}, ValueError, "9 tokens .* more than the cache's capacity of 12"),
        ([[1]], {"temperature": -1.0}, ValueError, "temperature must be at least 0 and finite, got -1.0"),
        ([[1]], {"temperature": 1.0}, ValueError, "rng is missing"),
        ([[1]], {"temperature": 1.0, "sampling": Sampling()}, ValueError, "were both given"),
        ([[1]], {"sampling": 0.7}, TypeError, r"sampling must be attnjax.models.Sampling\(...\), got float 0.7"),
        ([[]], {}, ValueError, "tokens is empty"),
        (np.zeros((0, 3), int), {}, ValueError, "tokens is empty"),
        ([[1, 2], [3]], {}, ValueError, r"rows differ in length, use attnjax.models.pad\(prompts\)"),
        ([1, 2], {}, ValueError, r"tokens must be \[B, T\], got shape \[2\]"),
        ([[1.0]], {}, TypeError, "tokens must be integers, got float64"),
        ([[1, 53]], {}, ValueError, "tokens: 53 is not in the vocabulary of 53 tokens"),
        ([[-1]], {}, ValueError, "tokens: -1 is not in the vocabulary"),
        ([[1, 2]], {"lengths": [0]}, ValueError, "row 0 has length 0: a prompt needs at least one token"),
        ([[1, 2]], {"lengths": [3]}, ValueError, "lengths: 3 is more than the T = 2 of tokens"),
        ([[1, 2]], {"lengths": [1, 1]}, ValueError, r"lengths must be integers \[1\], got int64\[2\]"),
        ([[1]], {"max_new_tokens": 0}, ValueError, "max_new_tokens must be an integer of at least 1, got 0"),
        ([[1]], {"stop_tokens": [99]}, ValueError, "stop_tokens: 99 is not in the vocabulary"),
        ([[1]], {"stop_tokens": [1.5]}, TypeError, "stop_tokens must be integers, got 1.5"),
        ([[1]], {"stop_tokens": 3}, TypeError, "stop_tokens must be integers in a list, got 3"),
        ([[1]], {"pad_token": "x"}, TypeError, "pad_token must be an integer, got 'x'"),
        (
            [[1]],
            {"temperature": 1.0, "rng": 0},
            TypeError,
            r"rng must be a PRNG key, such as jax.random.key\(0\), got 0",
        ),
        ([[1]], {"cache_dtype": "int4"}, TypeError, "cache_dtype must be float64, .* or int8, got int4"),
        ([[1]], {"cache_dtype": "small"}, TypeError, "cache_dtype must be float64, .* or int8, got 'small'"),
        ([[1]], {"memory": np.ones(3)}, ValueError, "memory was given, and DecoderLM attends to its own tokens only"),
    ],
)
def test_what_cannot_be_generated_is_refused(gpt, tokens, options, error, says):
    with pytest.raises(error, match=says):
        generate(gpt, tokens, **{"max_new_tokens": 5, **options})


def test_models_that_cannot_generate_are_refused(tiny):
    with pytest.raises(TypeError, match="model must be a DecoderLM, a Transformer or one like them, got Encoder"):
        generate(build(ENCODER), [[1]], max_new_tokens=3)
    with pytest.raises(ValueError, match=r"memory is missing: a Transformer generates from memory=model.encode"):
        generate(tiny, [[1]], max_new_tokens=3)
    with pytest.raises(
        ValueError, match=r"target int32\[2, 1\] has the batch axes \[2\], and the source's vectors are"
    ):
        generate(tiny, [[1], [1]], memory=tiny.encode([[1, 2]]), max_new_tokens=3)
    with pytest.raises(TypeError, match="model must be a Transformer, with an encoder of the source, got DecoderLM"):
        beam_search(build(DECODERS["gpt"]), [[1]], start_token=1, stop_token=2, max_new_tokens=3)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"beams": 0}, ValueError, "beams must be an integer of at least 1, got 0"),
        ({"length_penalty": -1.0}, ValueError, "length_penalty must be a number of at least 0, got -1.0"),
        ({"start_token": 5}, ValueError, "start_token: 5 is not in the vocabulary of 5"),
        ({"stop_token": "end"}, TypeError, "stop_token must be integers, got 'end'"),
        ({"source": [[0.5]]}, TypeError, "source must be integers, got float64"),
        ({"source": [[]]}, ValueError, "source is empty"),
    ],
)
def test_searches_that_make_no_sense_are_refused(tiny, options, error, says):
    rules = dict(source=[[1]], start_token=1, stop_token=STOP, max_new_tokens=3)
    with pytest.raises(error, match=says):
        beam_search(tiny, **{**rules, **options})
