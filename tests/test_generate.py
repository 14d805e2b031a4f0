"""Generation: cached decoding is a loop of full forwards; rows, chunks and callbacks change nothing."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_models import DECODERS, ENCODER, TRANSFORMER, build

from attnjax.models import Sampling, generate, pad

module = sys.modules["attnjax.models.generate"]  # whose name the function has taken


@pytest.fixture(scope="module")
def gpt():
    return build(DECODERS["gpt"])


@nnx.jit
def logits(model, *given, **options):
    """Logits of the first row."""
    return model(*given, deterministic=True, **options)[0]


def greedy(model, tokens, count, *, source=None, source_lengths=None):
    """What follows one prompt, by forwards of everything so far, padded to one length so that they compile once."""
    tokens = list(map(int, tokens))
    before = () if source is None else (source,)
    options = {} if source_lengths is None else {"source_lengths": source_lengths}
    for _ in range(count):
        padded = jnp.array([tokens + [0] * (16 - len(tokens))])
        tokens.append(int(logits(model, *before, padded, **options)[len(tokens) - 1].argmax()))
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
    given = module.Given(leaves, None, None, {}, stops=np.zeros(0, np.int32))
    prompt = (jnp.zeros((2, 3), jnp.int32), jnp.full(2, 3))
    rules = module.Rules(room=600, capacity=4096)
    state = jax.eval_shape(lambda *given: module._start(frozen, rules, *given), given, *prompt)
    held = sum(x.size * 4 for cache in state.caches for x in (cache.key, cache.value))
    memory = module._steps.lower(frozen, given, state, np.int32(4)).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= held
    assert memory.temp_size_in_bytes < held / 20


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_what_the_cache_stores(gpt, dtype):
    """Greedy tokens are those of a loop with such caches, written by hand."""
    caches = gpt.create_caches(1, 10, dtype=dtype)
    assert caches[0].key.dtype == dtype
    made, tokens = [], [5, 9, 3, 7]
    for _ in range(6):
        logits, caches = gpt(jnp.array([tokens]), caches=caches, deterministic=True)
        tokens = [int(logits[0, -1].argmax())]
        made += tokens
    assert generate(gpt, [[5, 9, 3, 7]], max_new_tokens=6, cache_dtype=dtype).lists() == [made]


def test_the_prompts_make_no_logits_but_the_last():
    """At a vocabulary of a million, those of all 16 tokens would be 64 MB."""
    config = DECODERS["gpt"].__class__(**{**vars(DECODERS["gpt"]), "vocab_size": 2**20})
    frozen = module.Frozen(nnx.eval_shape(lambda: build(config)))
    frozen, leaves = frozen.without_arrays()
    rules = module.Rules(room=2, capacity=18)
    given = module.Given(leaves, None, None, {}, stops=np.zeros(0, np.int32))
    given = (given, jnp.zeros((1, 16), jnp.int32), jnp.full(1, 16))
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
    twice = generate(
        model, [[1], [1]], memory=memory, max_new_tokens=6, num_samples=2, temperature=1e-30, rng=jax.random.key(0)
    )
    assert twice.lists() == [[found, found] for found in made]


@nnx.jit
def forward(model, tokens):
    return jax.nn.log_softmax(model(tokens, deterministic=True))


def looped(model, prompt, count, rule=lambda logits, made: logits):
    """Greedy tokens by full forwards, and their log-probabilities; `rule` changes the logits of the next token."""
    made, logs = [], []
    for _ in range(count):
        tokens = [*prompt, *made]
        own = np.array(forward(model, jnp.array([tokens + [0] * (18 - len(tokens))]))[0, len(tokens) - 1])
        made.append(int(rule(own.copy(), made).argmax()))
        logs.append(own[made[-1]])
    return made, logs


def test_log_probabilities_are_those_of_the_model(gpt):
    """Whatever the rules are that tokens are drawn by (sglang-jax#15, transformers#8794); 0 behind the end."""
    tokens, lengths = pad([[5, 9, 3], [4]])
    free = generate(gpt, tokens, lengths=lengths, max_new_tokens=6)
    for row, prompt in enumerate(([5, 9, 3], [4])):
        made, logs = looped(gpt, prompt, 6)
        assert free.lists()[row] == made
        np.testing.assert_allclose(free.log_probabilities[row], logs, atol=1e-5)
    rules = dict(sampling=Sampling(0.7, top_k=9, repetition_penalty=2.0), rng=jax.random.key(1), banned_tokens=[7])
    drawn = generate(gpt, [[5, 9, 3]], max_new_tokens=6, **rules)
    whole = forward(gpt, jnp.array([[5, 9, 3, *drawn.lists()[0], *[0] * 9]]))[0]
    np.testing.assert_allclose(
        drawn.log_probabilities[0], [whole[2 + i, t] for i, t in enumerate(drawn.lists()[0])], atol=1e-5
    )
    stop = drawn.lists()[0][2]
    ended = generate(gpt, [[5, 9, 3]], max_new_tokens=6, stop_tokens=[stop], **rules)
    n = int(ended.lengths[0])
    np.testing.assert_array_equal(ended.log_probabilities[0, :n], drawn.log_probabilities[0, :n])
    assert n < 6 and not ended.log_probabilities[0, n:].any()


def test_samples_are_prompts_given_several_times(gpt):
    tokens, lengths = pad([[5, 9, 3], [4]])
    rules = dict(max_new_tokens=5, sampling=Sampling(2.0, repetition_penalty=1.5), rng=jax.random.key(0))
    steps = []
    made = generate(gpt, tokens, lengths=lengths, num_samples=3, on_token=steps.append, return_caches=True, **rules)
    want = generate(gpt, np.repeat(tokens, 3, 0), lengths=np.repeat(lengths, 3), **rules)
    assert made.tokens.shape == made.log_probabilities.shape == (2, 3, 5) and made.lengths.shape == (2, 3)
    np.testing.assert_array_equal(made.tokens.reshape(6, 5), want.tokens)
    np.testing.assert_array_equal(np.stack(steps, 2), made.tokens)
    assert made.lists()[1] == want.lists()[3:] and len({tuple(x) for x in want.lists()}) == 6
    assert made.caches[0].length.tolist() == [8] * 3 + [6] * 3


def test_rules_of_ones_own(gpt):
    """Processors, banned tokens and a minimum length against the loop of full forwards."""
    double = lambda logits, tokens, step: jnp.where(np.arange(53) % 2 == step % 2, logits, logits - 100.0)
    new = lambda logits, tokens, step: logits.at[np.arange(len(tokens)), tokens[:, step - 1]].set(-jnp.inf)

    def rule(logits, made):
        logits = np.where(np.arange(53) % 2 == len(made) % 2, logits, logits - 100)
        if made:
            logits[made[-1]] = -np.inf
        logits[banned] = -np.inf
        if len(made) < 4:
            logits[stops] = -np.inf
        return logits

    banned = stops = np.zeros(0, int)
    free = looped(gpt, [5, 9, 3], 7, rule)[0]
    banned, stops = np.array(free[:1]), np.array(free[1:2] + [free[2]])
    made = generate(
        gpt,
        [[5, 9, 3]],
        max_new_tokens=7,
        processors=(double, new),
        banned_tokens=banned,
        stop_tokens=stops,
        min_new_tokens=4,
    )
    want = looped(gpt, [5, 9, 3], 7, rule)[0]
    ends = [i + 1 for i, token in enumerate(want) if token in stops] or [7]
    assert made.lists()[0] == want[: ends[0]] and min(ends) > 4 and want != free


def test_a_callback_may_end_the_run(gpt):
    free = generate(gpt, [[5, 9, 3], [4, 8, 8]], max_new_tokens=8)
    steps = []
    made = generate(
        gpt, [[5, 9, 3], [4, 8, 8]], max_new_tokens=8, on_token=lambda token: steps.append(token) or len(steps) == 3
    )
    assert made.lengths.tolist() == [3, 3] and not made.stopped.any()
    assert made.lists() == [row[:3] for row in free.lists()]
    assert made.tokens.shape == (2, 8) and not made.tokens[:, 3:].any()


@pytest.mark.parametrize("name", ["gpt", "gemma"])
def test_turns_of_a_chat(name):
    """A run goes on where another has ended: the second turn sees all of the first, in rows that stopped as well."""
    model = build(DECODERS[name])
    first, lengths = pad([[5, 9, 3], [4, 8]])
    free = generate(model, first, lengths=lengths, max_new_tokens=4).lists()
    stop = free[0][1]
    made = generate(model, first, lengths=lengths, max_new_tokens=4, stop_tokens=[stop], return_caches=True)
    turns = [[5, 9, 3, *made.lists()[0]], [4, 8, *made.lists()[1]]]
    assert made.caches[0].length.tolist() == list(map(len, turns)) and len(turns[0]) < 7
    second, lengths = pad([[1], [2, 6]])
    again = generate(model, second, lengths=lengths, max_new_tokens=3, caches=made.caches, return_caches=True)
    more = generate(model, [[7], [7]], max_new_tokens=2, caches=again.caches, capacity=30 if name == "gemma" else None)
    for row, turn in enumerate(turns):
        own = [*turn, *second[row][: lengths[row]]]
        want = looped(model, own, 3)[0]
        assert again.lists()[row] == want
        assert more.lists()[row] == looped(model, [*own, *want, 7], 2)[0]


def test_a_prefix_that_all_prompts_share(gpt):
    _, prefix = gpt(jnp.array([[5, 9, 3, 1]]), caches=gpt.create_caches(1, 4))
    tokens, lengths = pad([[4, 8], [7]])
    made = generate(gpt, tokens, lengths=lengths, max_new_tokens=4, caches=prefix)
    for row, prompt in enumerate(([4, 8], [7])):
        assert made.lists()[row] == looped(gpt, [5, 9, 3, 1, *prompt], 4)[0]
    assert prefix[0].length.tolist() == [4]  # and is still there
    with pytest.raises(ValueError, match=r"caches have the batch axes \[1, 2\], and the prompts are 2 rows"):
        generate(gpt, tokens, max_new_tokens=2, caches=gpt.create_caches((1, 2), 9))
    with pytest.raises(TypeError, match="caches must be those of model.create_caches or of Generated, .* got KVCache"):
        generate(gpt, tokens, max_new_tokens=2, caches=prefix[0])
    with pytest.raises(ValueError, match="caches and cache_dtype were both given"):
        generate(gpt, tokens, max_new_tokens=2, caches=prefix, cache_dtype="int8")
    with pytest.raises(
        ValueError, match="4 tokens of the caches, 2 tokens of the prompts and max_new_tokens = 14 are mo"
    ):
        generate(gpt, tokens, max_new_tokens=14, caches=prefix)


def test_padding_at_the_left_is_said_or_noticed(gpt):
    """unsloth#3699, nnsight#672, LLaDA#120."""
    left, mask = (
        np.array([[0, 0, 5, 9, 3], [1, 2, 3, 4, 5], [0, 0, 0, 0, 8]]),
        np.array([[0, 0, 1, 1, 1], [1] * 5, [0] * 4 + [1]]),
    )
    right, lengths = pad([[5, 9, 3], [1, 2, 3, 4, 5], [8]])
    want = generate(gpt, right, lengths=lengths, max_new_tokens=3).lists()
    for given in (mask, mask.astype(bool), mask.tolist()):
        assert generate(gpt, left, mask=given, max_new_tokens=3).lists() == want
    assert generate(gpt, right, mask=np.arange(5) < lengths[:, None], max_new_tokens=3).lists() == want
    with pytest.raises(
        ValueError, match="tokens seem to be padded at the left, with 0, and lengths are counted from the l"
    ):
        generate(gpt, left, lengths=lengths, max_new_tokens=3)
    with pytest.raises(ValueError, match="mask: row 1 has padding between its tokens"):
        generate(gpt, left, mask=[[1] * 5, [1, 0, 1, 1, 1], [1] * 5], max_new_tokens=3)
    with pytest.raises(
        ValueError, match="mask must be booleans, or 0 and 1, one for each of tokens .3, 5., got int64.3."
    ):
        generate(gpt, left, mask=np.ones(3, int), max_new_tokens=3)
    with pytest.raises(ValueError, match="row 2 has length 0: a prompt needs at least one token"):
        generate(gpt, left, mask=[[1] * 5, [1] * 5, [0] * 5], max_new_tokens=3)
    with pytest.raises(ValueError, match="lengths and mask were both given"):
        generate(gpt, left, mask=mask, lengths=lengths, max_new_tokens=3)


def test_numbers_compile_nothing_anew(gpt):
    """One program for prompts and one for steps, where the capacity is one; also for arrays of a processor."""
    add = lambda bias, logits, tokens, step: logits + bias
    programs = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: programs.append(name) if name.endswith("backend_compile_duration") else None
    )

    def run(count, temperature, k, p, bias, least):
        rules = Sampling(temperature, top_k=k, top_p=p, min_p=p / 9, repetition_penalty=1 + p)
        own = jax.tree_util.Partial(add, bias)
        options = dict(capacity=14, stop_tokens=[k], min_new_tokens=least, banned_tokens=[k + 1], processors=own)
        return generate(gpt, [[5, 9, 3]], max_new_tokens=count, sampling=rules, rng=jax.random.key(k), **options)

    assert run(6, 0.7, 5, 0.9, jnp.zeros(53), 1).tokens.shape == (1, 6)
    bias = jnp.zeros(53).at[11].set(1e4)
    before = len(programs)
    made = run(9, 1.3, 30, 0.5, bias, 3)
    assert made.lists() == [[11] * 9] and run(2, 0.1, 7, 0.95, bias, 2).tokens.shape == (1, 2)
    assert len(programs) == before > 0


def test_numbers_of_numpy_and_jax(gpt):
    rules = dict(max_new_tokens=6, temperature=0.5, rng=jax.random.key(1), stop_tokens=[17])
    same = dict(
        max_new_tokens=jnp.int32(6), temperature=jnp.float32(0.5), stop_tokens=jnp.array([17]), pad_token=np.int8(0)
    )
    want = generate(gpt, [[5, 9, 3]], **rules)
    assert generate(gpt, jnp.array([[5, 9, 3]]), **{**rules, **same}).lists() == want.lists()
    assert generate(gpt, [[5, 9, 3]], **{**rules, "stop_tokens": [jnp.int32(17)], "rng": jax.random.PRNGKey(1)}).lists()


def test_under_modes_of_jax(gpt):
    """x64, where Python's integers are int64 beside the cache's; no false alarm of debug_nans; no silent transfer."""
    tokens = np.array([[5, 9, 3]])
    sampling, rng = Sampling(0.7, top_k=9, top_p=0.9, min_p=0.01, repetition_penalty=1.2), jax.random.key(1)
    rules = dict(max_new_tokens=5, stop_tokens=[50], min_new_tokens=2, return_caches=True)
    want = [generate(gpt, tokens, **rules), generate(gpt, tokens, sampling=sampling, rng=rng, **rules)]
    with jax.enable_x64(True), jax.debug_nans(True), jax.transfer_guard("disallow"):
        found = [generate(gpt, tokens, **rules), generate(gpt, tokens, sampling=sampling, rng=rng, **rules)]
    assert [one.lists() for one in found] == [one.lists() for one in want]


def test_the_model_that_the_docs_describe():
    """`create_caches(batch, capacity)` and no more."""

    class Own(nnx.Module):
        def __init__(self):
            self.inner, self.vocab_size, self.max_length = build(DECODERS["llama"]), 53, None

        def hidden(self, tokens, caches=None, lengths=None, deterministic=None):
            return self.inner.hidden(tokens, caches=caches, lengths=lengths, deterministic=deterministic)

        def logits(self, hidden):
            return self.inner.logits(hidden)

        def create_caches(self, batch, capacity):
            return self.inner.create_caches(batch, capacity)

    model = Own()
    assert generate(model, [[5, 9, 3]], max_new_tokens=4).lists()[0] == looped(model.inner, [5, 9, 3], 4)[0]


def test_broken_logits_are_no_tokens(gpt):
    """They raise, and are not token 0."""
    graph, state = nnx.split(gpt)
    broken = nnx.merge(graph, jax.tree.map(lambda x: x, state))
    scale = broken.norm.scale
    scale.set_value(scale[...] * jnp.nan)
    rules = dict(max_new_tokens=5)
    for more in ({}, dict(temperature=1.0, rng=jax.random.key(0)), dict(on_token=lambda token: None)):
        with pytest.raises(
            FloatingPointError, match="row 0 has no likeliest token behind 0 new ones: its logits are NaN"
        ):
            generate(broken, [[5, 9, 3]], **rules, **more)
    late = lambda logits, tokens, step: jnp.where((step == 2) & (np.arange(2) == 1)[:, None], jnp.nan, logits)
    with pytest.raises(FloatingPointError, match="row 1 has no likeliest token behind 2 new ones"):
        generate(gpt, [[5, 9, 3], [4, 8, 8]], processors=late, **rules)
    with pytest.raises(FloatingPointError, match="or processors and banned_tokens leave none"):
        generate(gpt, [[5, 9, 3]], banned_tokens=range(53), **rules)


def test_inside_of_jit_it_says_that_it_compiles_by_itself(gpt):
    with pytest.raises(
        TypeError, match="generate compiles its own steps and cannot be part of another program: call it"
    ):
        nnx.jit(lambda m, t: generate(m, t, max_new_tokens=2).tokens)(gpt, jnp.ones((1, 2), int))
    with pytest.raises(TypeError, match="call it outside of jax.jit"):
        nnx.jit(lambda m: generate(m, [[1]], max_new_tokens=2).tokens)(gpt)


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
        (
            [[1]],
            {"temperature": 1.0, "rng": jax.random.split(jax.random.key(0), 2)},
            ValueError,
            r"rng must be one PRNG key, got keys of shape \[2\]",
        ),
        ([[1]], {"rng": jnp.ones(2)}, TypeError, r"rng must be a PRNG key, .* got float32\[2\]"),
        ([[1]], {"num_samples": 2}, ValueError, "num_samples = 2 would be equal at temperature 0"),
        (
            [[1]],
            {"num_samples": 0, "temperature": 1.0, "rng": jax.random.key(0)},
            ValueError,
            "num_samples must be an i",
        ),
        ([[1]], {"min_new_tokens": 6}, ValueError, "min_new_tokens = 6 is more than max_new_tokens = 5"),
        ([[1]], {"banned_tokens": [53]}, ValueError, "banned_tokens: 53 is not in the vocabulary"),
        ([[1]], {"processors": 3}, TypeError, "processors must be a function, or a tuple of functions, got 3"),
        ([[1]], {"processors": lambda *_: 3}, TypeError, r"must give the logits, float32\[1, 53\], got int"),
        ([[1]], {"cache_dtype": "int4"}, TypeError, "cache_dtype must be float64, .* or int8, got int4"),
        ([[1]], {"cache_dtype": "small"}, TypeError, "cache_dtype must be float64, .* or int8, got 'small'"),
        ([[1]], {"memory": np.ones(3)}, ValueError, "memory was given, and DecoderLM attends to its own tokens only"),
    ],
)
def test_what_cannot_be_generated_is_refused(gpt, tokens, options, error, says):
    with pytest.raises(error, match=says):
        generate(gpt, tokens, **{"max_new_tokens": 5, **options})


def test_models_that_cannot_generate_are_refused():
    tiny = build(TRANSFORMER)
    with pytest.raises(TypeError, match="model must be a DecoderLM, a Transformer or one like them, got Encoder"):
        generate(build(ENCODER), [[1]], max_new_tokens=3)
    with pytest.raises(ValueError, match=r"memory is missing: a Transformer generates from memory=model.encode"):
        generate(tiny, [[1]], max_new_tokens=3)
    with pytest.raises(
        ValueError, match=r"target int32\[2, 1\] has the batch axes \[2\], and the source's vectors are"
    ):
        generate(tiny, [[1], [1]], memory=tiny.encode([[1, 2]]), max_new_tokens=3)
