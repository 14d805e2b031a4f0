"""`KVCache`: a sequence in pieces gives what it gives in one call, however it is cut, stored, mapped or masked."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attnjax as aj
from attnjax import KVCache

B, T, N, K, H, V = 3, 23, 4, 2, 8, 5
CUTS = {"whole": [23], "two": [9, 14], "prompt": [20, 1, 1, 1], "tokens": [1] * 23, "uneven": [1, 7, 1, 11, 3]}
TABLE = np.linspace(-2, 2, 8 * N, dtype=np.float32).reshape(8, N)
SLOPES = np.linspace(0.1, 0.9, B * N, dtype=np.float32).reshape(B, N)
ROWS = np.array([2, 5, 3], np.int32)
shift = lambda b, h, q, k: (q * (h + 1) + 2 * k + b) % 3 != 0

bent = lambda score, n: score * jnp.cos(0.1 * n.astype(score.dtype))

# What is said of positions: the same objects for the whole sequence and for its parts.
RULES = {
    "causal": dict,
    "window": lambda: dict(mask=aj.Window(4, 0)),
    "window_by_row": lambda: dict(mask=aj.Window(jnp.asarray(ROWS), None)),
    "chunked": lambda: dict(mask=aj.Chunked(5)),
    "dilated": lambda: dict(mask=~aj.Dilated(3)),
    "prefix": lambda: dict(mask=aj.Prefix(4) | aj.Window(2, 0)),
    "lengths": lambda: dict(mask=aj.Lengths(query=jnp.asarray(ROWS + 9), key=12)),
    "aligned_end": lambda: dict(mask=aj.Window.aligned_end(6, 0)),
    "where": lambda: dict(mask=aj.Where(shift)),
    "alibi": lambda: dict(score=aj.ALiBi(jnp.asarray(SLOPES))),
    "relative": lambda: dict(
        score=(aj.RelativeBias(jnp.asarray(TABLE), bidirectional=False, max_distance=16), aj.SoftCap(2.0))
    ),
    "function": lambda: dict(score=aj.ScoreFn(lambda score, b, h, q, k: bent(score, q + 2 * k + h + b))),
    "sinks": lambda: dict(sinks=jnp.arange(4.0), scale=0.7),
}


def drawn(batch=(B,), length=T, dtype=jnp.float32):
    rng = np.random.default_rng(7)
    shapes = (N, H), (K, H), (K, V)
    return [jnp.asarray(rng.standard_normal((*batch, length, *shape)), dtype) for shape in shapes]


def create(batch=(B,), capacity=T + 2, **options):
    return KVCache.create(batch, capacity, K, H, value_size=V, **options)


def whole(q, k, v, mask=None, **options):
    """The oracle: one call, in float64."""
    mask = aj.Causal() if mask is None else aj.Causal() & mask
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in (q, k, v)]
        return np.asarray(aj.attention(*wide, mask=mask, implementation="reference", **options))


@functools.partial(jax.jit, static_argnames="cut")
def pieces(cache, q, k, v, options, cut):
    outs, start = [], 0
    for count in cut:
        part = (x[..., start : start + count, :, :] for x in (q, k, v))
        out, cache = cache.attend(*part, **options)
        outs.append(out)
        start += count
    return jnp.concatenate(outs, -3), cache


@pytest.mark.parametrize("window", [None, 6], ids=["straight", "ring"])
@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("rule", ["causal", "where", "alibi"])
def test_pieces_give_the_whole(rule, cut, window):
    agrees(rule, cut, window, capacity=T if window is None else 9)


@pytest.mark.parametrize("window", [None, 6], ids=["straight", "ring"])
@pytest.mark.parametrize("rule", RULES)
def test_rules_mean_the_same_in_a_cache(rule, window):
    agrees(rule, CUTS["uneven"], window, capacity=T + 2 if window is None else 7)


def agrees(rule, cut, window, capacity):
    q, k, v = drawn()
    options = RULES[rule]()
    got, cache = pieces(create(capacity=capacity, window=window), q, k, v, options, tuple(cut))
    with jax.enable_x64(True):  # functions are traced for the types that there are
        options = RULES[rule]()
    mask = options.get("mask")
    if window is not None:
        mask = aj.Window(window, 0) if mask is None else mask & aj.Window(window, 0)
    np.testing.assert_allclose(got, whole(q, k, v, **{**options, "mask": mask}), rtol=0, atol=5e-6)
    assert cache.length.tolist() == [T] * B


@pytest.mark.parametrize("window", [None, 5], ids=["straight", "ring"])
def test_rows_of_different_lengths(window):
    """Prompts padded at the right, then tokens one by one: each row as if it were alone."""
    prompts, steps = np.array([9, 1, 6], np.int32), 5
    q, k, v = drawn(length=9 + steps)
    mask = None if window is None else aj.Window(window, 0)

    @jax.jit
    def run(cache, lengths):
        first, cache = cache.attend(q[:, :9], k[:, :9], v[:, :9], lengths=lengths, score=aj.ALiBi(jnp.asarray(SLOPES)))
        rest = []
        for t in range(9, 9 + steps):
            step = (x[:, t : t + 1] for x in (q, k, v))
            out, cache = cache.attend(*step, score=aj.ALiBi(jnp.asarray(SLOPES)))
            rest.append(out)
        return first, jnp.concatenate(rest, 1), cache

    first, rest, cache = run(create(capacity=14 if window is None else 6, window=window), jnp.asarray(prompts))
    assert cache.length.tolist() == (prompts + steps).tolist()
    for row, prompt in enumerate(prompts):
        own = [np.concatenate([x[row, :prompt], x[row, 9:]]) for x in map(np.asarray, (q, k, v))]
        want = whole(*own, mask=mask, score=aj.ALiBi(jnp.asarray(SLOPES[row])))
        np.testing.assert_allclose(np.concatenate([first[row, :prompt], rest[row]]), want, rtol=0, atol=5e-6)


@pytest.mark.parametrize("window", [None, 5], ids=["straight", "ring"])
def test_some_tokens_of_rows_at_every_step(window):
    """Every call brings some rows less than others, also nothing."""
    counts = np.array([[2, 0, 4], [4, 4, 0], [0, 1, 1], [4, 3, 4]], np.int32)
    q, k, v = drawn(length=16)
    cache, taken = create(capacity=16 if window is None else 6, window=window), [0] * B
    held = [[] for _ in range(B)]
    step = jax.jit(lambda cache, *x, lengths: cache.attend(*x, lengths=lengths))
    for n, lengths in enumerate(counts):
        x = [a[:, 4 * n : 4 * n + 4] for a in (q, k, v)]
        out, cache = step(cache, *x, lengths=jnp.asarray(lengths))
        for row in range(B):
            held[row].append(([a[row, : lengths[row]] for a in x], out[row, : lengths[row]]))
            taken[row] += lengths[row]
    assert cache.length.tolist() == taken
    for row in range(B):
        parts, outs = zip(*held[row], strict=True)
        own = [jnp.concatenate(x) for x in zip(*parts, strict=True)]
        want = whole(*own, mask=None if window is None else aj.Window(window, 0))
        np.testing.assert_allclose(np.concatenate(outs), want, rtol=0, atol=5e-6)


def test_a_ring_of_more_room_than_its_window():
    for cut in ([T], [1] * T, [5, 18]):
        q, k, v = drawn()
        got, _ = pieces(create(capacity=11, window=3), q, k, v, {}, tuple(cut))
        np.testing.assert_allclose(got, whole(q, k, v, mask=aj.Window(3, 0)), rtol=0, atol=5e-6)


@pytest.mark.parametrize("batch", [(), (2,), (2, 3), (0,)], ids=str)
def test_batch_axes(batch):
    q, k, v = drawn(batch)
    got, cache = pieces(create(batch), q, k, v, {}, (9, 14))
    assert cache.batch == batch and cache.length.shape == batch
    np.testing.assert_allclose(got, whole(q, k, v), rtol=0, atol=5e-6)


def test_under_scan_and_vmap():
    q, k, v = drawn()
    tokens = [jnp.moveaxis(x, 1, 0)[:, :, None] for x in (q, k, v)]

    @jax.jit
    def scanned(cache):
        def step(cache, x):
            out, cache = cache.attend(*x)
            return cache, out

        cache, outs = jax.lax.scan(step, cache, tuple(tokens))
        return jnp.moveaxis(outs[:, :, 0], 0, 1)

    @jax.jit
    def mapped(cache):
        step = jax.vmap(lambda cache, *x: cache.attend(*x))
        first, cache = step(cache, *(x[:, :9] for x in (q, k, v)))
        second, cache = step(cache, *(x[:, 9:] for x in (q, k, v)))
        return jnp.concatenate([first, second], 1)

    for run in (scanned, mapped):
        np.testing.assert_allclose(run(create()), whole(q, k, v), rtol=0, atol=5e-6)


def test_gradients_flow_through_it():
    q, k, v = drawn()

    def cut(q, k, v):
        return jnp.sin(pieces(create(), q, k, v, {}, (9, 14))[0]).sum()

    def one(q, k, v):
        return jnp.sin(aj.attention(q, k, v, mask=aj.Causal())).sum()

    for got, want in zip(*(jax.jit(jax.grad(f, (0, 1, 2)))(q, k, v) for f in (cut, one)), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("window", [None, 6], ids=["straight", "ring"])
@pytest.mark.parametrize("dtype, error", [(jnp.bfloat16, 0.02), (jnp.int8, 0.02), (jnp.float16, 2e-3)])
def test_stored_in_fewer_bits(dtype, error, window):
    """Queries stay what they are; what is stored is rounded once: to 8 bits of mantissa, or to 1/254 of the largest."""
    q, k, v = drawn()
    cache = create(dtype=dtype, window=window)
    assert cache.key.dtype == dtype
    got, cache = pieces(cache, q, k, v, {}, tuple(CUTS["prompt"]))
    assert got.dtype == jnp.float32 and cache.key.dtype == dtype
    want = whole(q, k, v, mask=None if window is None else aj.Window(window, 0))
    assert 0 < np.abs(got - want).max() < error * np.abs(want).max()


def test_arrays_of_the_call():
    """Segments, Dense and Bias are for the queries and slots of the call."""
    q, k, v = drawn()
    ids = np.arange(T + 2) // 6
    bias = np.random.default_rng(1).standard_normal((N, T, T + 2)).astype(np.float32)
    cache = create()
    _, cache = cache.attend(q[:, :9], k[:, :9], v[:, :9])
    mask = aj.Segments(jnp.asarray(ids[9:T]), jnp.asarray(ids)) & aj.Dense(jnp.asarray(bias[:, 9:] > -1))
    got, _ = cache.attend(q[:, 9:], k[:, 9:], v[:, 9:], mask=mask, score=aj.Bias(jnp.asarray(bias[:, 9:])))
    mask = aj.Segments(jnp.asarray(ids[:T])) & aj.Dense(jnp.asarray(bias[:, :, :T] > -1))
    want = whole(q, k, v, mask=mask, score=aj.Bias(jnp.asarray(bias[:, :, :T])))
    np.testing.assert_allclose(got, want[:, 9:], rtol=0, atol=5e-6)


@pytest.mark.compiled
def test_decoding_runs_on_the_compiled_kernel():
    """Named, an implementation runs or raises: every rule but the functions of a score is in the kernel's words."""
    q, k, v = (x[:, :1] for x in drawn())
    for name in ("causal", "window", "chunked", "prefix", "where", "alibi", "sinks"):
        for window in (None, 6):
            if name == "alibi" and window:
                continue
            create(window=window).attend(q, k, v, implementation="cpu", **RULES[name]())


def test_rows_without_room_are_nan_under_jit():
    q, k, v = drawn(length=6)
    cache = dataclasses.replace(create(capacity=8), length=jnp.array([2, 3, 8], jnp.int32))
    out, after = jax.jit(lambda cache: cache.attend(q, k, v))(cache)
    assert np.isnan(out).all((1, 2, 3)).tolist() == [False, True, True] and np.isfinite(out[0]).all()
    out, _ = jax.jit(lambda cache: cache.attend(q[2:, :1], k[2:, :1], v[2:, :1]))(jax.tree.map(lambda x: x[2:], cache))
    assert np.isnan(out).all()
    np.testing.assert_array_equal(after.key[2], cache.key[2])


def test_donated_memory_is_written_in_place():
    """A step takes no second cache."""
    capacity = 4096
    cache = jax.eval_shape(lambda: KVCache.create(1, capacity, K, 64))
    x = [jax.ShapeDtypeStruct((1, 1, heads, 64), jnp.float32) for heads in (N, K, K)]
    step = jax.jit(lambda cache, q, k, v: cache.attend(q, k, v), donate_argnames="cache")
    memory = step.lower(cache, *x).compile().memory_analysis()
    held = 2 * capacity * K * 64 * 4
    assert memory.alias_size_in_bytes >= held
    assert memory.temp_size_in_bytes < held / 8


def bad(**options):
    return {"batch": 2, "capacity": 8, "key_heads": 2, "head_size": 8} | options


@pytest.mark.parametrize(
    "options, error, message",
    [
        (bad(capacity=0), ValueError, "capacity must be an integer of at least 1, got 0"),
        (bad(head_size=2.0), ValueError, "head_size must be an integer of at least 1, got 2.0"),
        (bad(dtype=jnp.int32), TypeError, "dtype must be float64, float32, bfloat16, float16 or int8, got int32"),
        (bad(batch=-2), ValueError, "batch must be an integer of at least 0, or several, got -2"),
        (bad(batch=(2, 1.5)), ValueError, "batch must be an integer of at least 0, or several, got .2, 1.5."),
        (bad(window=-1), ValueError, "window must be an integer of at least 0, got -1"),
        (bad(window=8), ValueError, r"capacity must be at least window \+ 1 = 9, got 8"),
    ],
    ids=repr,
)
def test_bad_caches(options, error, message):
    with pytest.raises(error, match=f"KVCache: {message}"):
        KVCache.create(**options)


def test_bad_tokens():
    q, k, v = drawn(length=4)
    cache = create(capacity=6)
    with pytest.raises(
        ValueError, match=r"key must be \[\*B, T, heads, size\] with the sizes of the cache. key float32"
    ):
        cache.attend(q, q, v)
    with pytest.raises(ValueError, match=r"value must be \[\*B, T, heads, size\]"):
        cache.append(k, k)
    with pytest.raises(ValueError, match="key and value must have as many tokens as each other"):
        cache.append(k[:, :2], v)
    with pytest.raises(ValueError, match=r"lengths must be integers \[3\], got float32\[3\]"):
        cache.append(k, v, lengths=jnp.ones(3))
    with pytest.raises(ValueError, match=r"lengths must be integers \[3\], got int32\[4\]"):
        cache.append(k, v, lengths=jnp.ones(4, jnp.int32))
    for lengths, says in (([5, 0, 1], "0 to 5"), ([2, -1, 4], "-1 to 4")):
        with pytest.raises(ValueError, match=f"lengths must be between 0 and the 4 tokens that came, got {says}"):
            cache.append(k, v, lengths=jnp.array(lengths))
    with pytest.raises(TypeError, match=r"lengths must be an array of integers, got \[4, 4, 4\]"):
        cache.append(k, v, lengths=[4, 4, 4])
    with pytest.raises(TypeError, match=r"key must be an array of floats, got int32\[3, 4, 2, 8\]"):
        cache.append(k.astype(jnp.int32), v)
    with pytest.raises(
        ValueError, match="query must be .* one for each new key, got query float32.3, 1, 4, 8. and key"
    ):
        cache.attend(q[:, :1], k, v)
    with pytest.raises(
        ValueError, match="8 tokens are more than its capacity of 6: create it with capacity= or grow.. it"
    ):
        cache.append(k, v).append(k, v)
    with pytest.raises(NotImplementedError, match="Bias has an array by key, and a ring's keys have no fixed places"):
        create(window=3).attend(q, k, v, score=aj.Bias(jnp.zeros((4, 4))))


@pytest.mark.parametrize("batch", [(), (1,), (1, 1)], ids=str)
def test_single_tokens_under_x64(batch):
    """Python integers beside int32 ones are int64 there; integers of every type are lengths (jax#7368)."""
    with jax.enable_x64(True):
        q, k, v = drawn(batch, length=3)
        for dtype, window in ((jnp.float64, None), (jnp.int8, 2)):
            cache = create(batch, capacity=4, dtype=dtype, window=window)
            outs = []
            for t, kind in enumerate((np.int64, np.uint8, np.uint64)):
                step = (x[..., t : t + 1, :, :] for x in (q, k, v))
                out, cache = cache.attend(*step, lengths=np.ones(batch, kind))
                outs.append(out)
            want = whole(q, k, v, mask=None if window is None else aj.Window(window, 0))
            np.testing.assert_allclose(jnp.concatenate(outs, -3), want, rtol=0, atol=1e-6 if window is None else 0.05)


def test_under_strict_modes():
    """equinox#308 (rank promotion), jax#37422 (false alarms of debug_nans)."""
    q, k, v = drawn(length=2)
    for window in (None, 3):
        with jax.debug_nans(True):
            assert np.isfinite(create(window=window).attend(q, k, v)[0]).all()
        with jax.numpy_rank_promotion("raise"):
            cache = create(window=window, dtype=jnp.int8).append(k, v, lengths=jnp.array([2, 1, 0], jnp.int16))
            assert cache.rollback(jnp.array([1, 1, 0])).grow(29).truncate(1).length.tolist() == [1, 0, 0]


@pytest.mark.parametrize(("window", "capacity"), [(None, T), (6, 10), (6, 23)], ids=["straight", "ring", "wide"])
def test_tokens_taken_back(window, capacity):
    """Drafts of four tokens, of which each row keeps some (mlx-swift-lm#424, transformers#47447)."""
    q, k, v = drawn()
    kept = np.array([[4, 0, 2], [1, 4, 3], [0, 4, 4], [4, 4, 0], [2, 1, 4], [4, 2, 1]])
    mask = None if window is None else aj.Window(window, 0)

    @jax.jit
    def step(cache, q, k, v, keep):
        out, cache = cache.attend(q, k, v)
        return out, cache.rollback(4 - keep)

    cache, noise = create(capacity=capacity, window=window), drawn(length=4)
    _, cache = cache.attend(*(x[:, :3] for x in (q, k, v)))
    held, found = np.full(B, 3), [[] for _ in range(B)]
    for keep in kept:
        draft = [np.array(x) for x in noise]  # refused tokens are others than those that come in their place
        for x, own in zip(draft, (q, k, v), strict=True):
            for row, n in enumerate(keep):
                x[row, :n] = own[row, held[row] : held[row] + n]
        out, cache = step(cache, *draft, jnp.asarray(keep))
        for row, n in enumerate(keep):
            found[row].append(np.asarray(out[row, :n]))
        held += keep
        assert cache.length.tolist() == held.tolist()
    want = whole(q, k, v, mask=mask)
    for row in range(B):
        np.testing.assert_allclose(np.concatenate(found[row]), want[row, 3 : held[row]], rtol=0, atol=5e-6)


def test_a_ring_that_no_longer_holds_what_a_shorter_row_sees():
    """It refuses, or gives NaN; setting the length by hand is no way around."""
    q, k, v = drawn(length=10)
    _, cache = create(capacity=7, window=5).attend(q, k, v)
    want = whole(q, k, v, mask=aj.Window(5, 0))
    last = [x[:, 7:] for x in (q, k, v)]
    attend = jax.jit(lambda cache, q, k, v: cache.attend(q, k, v)[0])
    np.testing.assert_allclose(attend(cache.rollback(2), *(x[:, 8:] for x in (q, k, v))), want[:, 8:], atol=5e-6)
    for cut in (lambda cache: cache.rollback(3), lambda cache: cache.truncate(7)):
        with pytest.raises(ValueError, match="cut to 7 tokens, and its ring of capacity 7 does not hold all of the 5"):
            cut(cache)
        assert np.isnan(jax.jit(lambda cache, cut=cut: cut(cache).attend(*last)[0])(cache)).all()
    by_hand = dataclasses.replace(cache, length=cache.length - 3)
    with pytest.raises(ValueError, match=r"to take n tokens back, it needs a capacity of 5 \+ n"):
        by_hand.attend(*last)
    assert np.isnan(attend(by_hand, *last)).all()
    rows = jax.jit(lambda cache: cache.truncate(jnp.array([8, 7, 0])))(cache)
    assert np.isnan(attend(rows, *(x[:, :1] for x in (q, k, v)))).all((1, 2, 3)).tolist() == [False, True, False]


@pytest.mark.parametrize("window", [None, 5], ids=["straight", "ring"])
def test_emptied_and_grown(window):
    q, k, v = drawn()
    want = whole(q, k, v, mask=None if window is None else aj.Window(window, 0))
    first, second, third = ([x[:, a:b] for x in (q, k, v)] for a, b in ((0, 8), (8, 20), (20, 23)))
    for empty in (KVCache.reset, lambda cache: cache.truncate(np.int64(0))):
        cache = empty(create(capacity=8, window=window, dtype=jnp.float32).attend(*(x + 1 for x in first))[1])
        out, cache = cache.attend(*first)
        np.testing.assert_allclose(out, want[:, :8], rtol=0, atol=5e-6)
    cache = cache.grow(20)
    assert cache.capacity == 20 and cache.length.tolist() == [8] * B
    outs = []
    for part in (second, third):
        out, cache = cache.attend(*part)
        outs.append(out)
        cache = jax.jit(lambda cache: cache.grow(29))(cache)
    np.testing.assert_allclose(jnp.concatenate(outs, 1), want[:, 8:], rtol=0, atol=5e-6)
    few = create(capacity=8, window=window, dtype=jnp.int8).grow(9)
    assert few.key_scale.shape == (B, 9, K) and few.key.dtype == jnp.int8


def test_impossible_lengths_under_jit_are_nan_from_then_on():
    q, k, v = drawn(length=4)
    for window in (None, 3):
        cache = create(window=window).append(k[:, :1], v[:, :1])
        step = jax.jit(lambda cache, lengths: cache.attend(q, k, v, lengths=lengths))
        out, cache = step(cache, jnp.array([4, 5, -1]))
        assert np.isnan(out).all((1, 2, 3)).tolist() == [False, True, True]
        out, _ = step(cache, jnp.array([1, 1, 1]))
        assert np.isnan(out).all((1, 2, 3)).tolist() == [False, True, True]
        with pytest.raises(ValueError, match="impossible lengths, or lost more tokens than it had, under jit: reset"):
            cache.append(k, v)
        assert np.isfinite(cache.reset().attend(q, k, v)[0]).all()


def test_bad_cuts():
    cache = create(capacity=6).append(*drawn(length=4)[1:])
    with pytest.raises(ValueError, match="5 tokens cannot be taken back: the shortest row has 4"):
        cache.rollback(5)
    assert np.isnan(jax.jit(lambda c: c.rollback(5).attend(*drawn(length=1))[0])(cache)).all()
    with pytest.raises(ValueError, match="KVCache: length must be at least 0, got -1"):
        cache.truncate(-1)
    with pytest.raises(TypeError, match="KVCache: count must be an integer or an integer array, got 1.5"):
        cache.rollback(1.5)
    with pytest.raises(ValueError, match=r"KVCache: length must be an integer or integers \[3\], got int32\[2\]"):
        cache.truncate(jnp.array([1, 2]))
    with pytest.raises(ValueError, match="KVCache: capacity must be an integer of at least 6, got 5"):
        cache.grow(5)


class Frames(aj.Mask):
    """The mask of docs/contributing.md: nothing says how it moves with positions, so it is asked at true ones."""

    axes = {"size": ""}
    size: int | jax.Array

    def evaluate(self, tile):
        size = tile.take(self.size, "")
        return tile.k // size <= tile.q // size

    def blocks(self, grid):
        size = grid.take(self.size, "")
        full = grid.k_max // size <= grid.q_min // size
        empty = grid.k_min // size > grid.q_max // size
        return np.int8(1) + full.astype(np.int8) - empty.astype(np.int8)


class Slope(aj.Score):
    """A score of a user's own, by distance and head."""

    axes = {"rate": "h"}
    rate: jax.Array

    def evaluate(self, logits, tile):
        return logits - tile.take(self.rate, "h") * abs(tile.q - tile.k).astype(logits.dtype)


@pytest.mark.parametrize("window", [None, 5], ids=["plain", "ring"])
def test_masks_and_scores_of_ones_own(window, rng):
    """5 tokens and then one by one, against the whole in one call: two rows, one of them two tokens behind."""
    total, first = 12, 5
    query, key, value = (jnp.asarray(rng.normal(size=(2, total, 2, 4)), jnp.float32) for _ in range(3))
    mask, score = aj.Causal() & ~(~Frames(jnp.uint8(4)) & ~aj.Prefix(1)), Slope(jnp.array([0.5, 1.5]))
    causal = aj.Causal() if window is None else aj.Window(window, 0)
    want = aj.attention(query, key, value, mask=causal & mask, score=score, implementation="reference")
    step = jax.jit(lambda cache, *new: cache.attend(*new, mask=mask, score=score))
    cache = aj.KVCache.create(2, total, 2, 4, window=window)
    lengths = jnp.array([first, first - 2])
    out, cache = cache.attend(*(x[:, :first] for x in (query, key, value)), lengths=lengths, mask=mask, score=score)
    np.testing.assert_allclose(out[0], want[0, :first], rtol=1e-5, atol=1e-6)
    for t in range(first, total):
        at = jnp.array([t, t - 2])
        out, cache = step(cache, *(x[jnp.arange(2), at][:, None] for x in (query, key, value)))
        np.testing.assert_allclose(out[:, 0], want[jnp.arange(2), at], rtol=1e-5, atol=1e-6)
