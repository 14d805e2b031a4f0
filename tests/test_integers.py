"""Integers in masks and scores mean what integers mean: of every type and size, at the ends of their ranges, anywhere.

The oracle computes with Python's integers, which have no ends.
"""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import IMPLEMENTATIONS, INTERPRETED

import attnjax as aj

T, S = 11, 13
SMALL = ("int8", "uint8", "int16", "uint16", "int32", "uint32")
WIDE = ("int64", "uint64")
HOWS = ("python", "numpy", "jax", "traced")

# name -> (mask of its integers, rule of Python integers, which of them are at least 1 or at least 0)
RULES = {
    "causal": (aj.Causal, lambda q, k, a: k <= q + a, "a"),
    "causal_end": (aj.Causal.aligned_end, lambda q, k, a: k <= q + S - T + a, "a"),
    "window": (aj.Window, lambda q, k, l, r, a: q + a - l <= k <= q + a + r, "00a"),
    "window_end": (aj.Window.aligned_end, lambda q, k, l, r, a: q + S - T + a - l <= k <= q + S - T + a + r, "00a"),
    "chunked": (aj.Chunked, lambda q, k, n, a: (q + a) // n == k // n, "1a"),
    "chunked_end": (
        functools.partial(aj.Chunked, at_end=True),
        lambda q, k, n, a: (q + S - T + a) // n == k // n,
        "1a",
    ),
    "dilated": (aj.Dilated, lambda q, k, n, a: (q + a - k) % n == 0, "1a"),
    "dilated_end": (
        functools.partial(aj.Dilated, at_end=True),
        lambda q, k, n, a: (q + S - T + a - k) % n == 0,
        "1a",
    ),
}


def drawn(rng, kind, least):
    """A number of the type: near 0, near an end, near another type's end, or anywhere."""
    low, high = (-(2**70), 2**70) if kind == "python" else (int(np.iinfo(kind).min), int(np.iinfo(kind).max))
    ends = [0, low, high, *(s * 2**b for b in (7, 8, 15, 29, 30, 31, 32, 62, 63) for s in (1, -1))]
    number = int(rng.choice(np.array(ends, object))) + int(rng.integers(-12, 13))
    if rng.random() < 0.4:
        number = int(rng.integers(-6, 25))
    low = {"a": low, "0": max(low, 0), "1": max(low, 1)}[least]
    return min(max(number, low), high)


def given(how, kind, number):
    """The number as the user gives it, and whether it is an argument of the compiled program."""
    if how == "python":
        return number, False
    value = np.dtype(kind).type(number)
    return (value, False) if how == "numpy" else (jnp.asarray(value), how == "traced")


def draw_case(rng, kinds):
    name = str(rng.choice(list(RULES)))
    build, rule, leasts = RULES[name]
    hows = [str(rng.choice(HOWS)) for _ in leasts]
    types = ["python" if how == "python" else str(rng.choice(kinds)) for how in hows]
    # Two numbers that are far away together say something as often as not.
    numbers = [drawn(rng, kind, least) for kind, least in zip(types, leasts, strict=True)]
    if len(numbers) > 1 and rng.random() < 0.5:
        near = numbers[0] * int(rng.choice([-1, 1])) + int(rng.integers(-9, 10))
        limits = (-(2**70), 2**70) if types[-1] == "python" else (np.iinfo(types[-1]).min, np.iinfo(types[-1]).max)
        numbers[-1] = int(min(max(near, int(limits[0])), int(limits[1])))
    return name, build, rule, hows, types, numbers


@pytest.mark.parametrize("x64", [False, True])
def test_bounds_offsets_and_sizes_of_every_type(x64):
    """As an array, as a block map that is never wrong, compiled or not, for 150 draws; promotion is strict."""
    rng = np.random.default_rng(x64)
    q, k = range(T), range(S)
    with jax.enable_x64(x64):
        compiled = functools.cache(lambda structure: jax.jit(functools.partial(_looked_at, structure)))
        for _ in range(150):
            name, build, rule, hows, types, numbers = draw_case(rng, SMALL + (WIDE if x64 else ()))
            what = f"{name} {list(zip(hows, types, numbers, strict=True))}"
            want = np.array([[rule(i, j, *numbers) for j in k] for i in q])
            try:
                values = [given(*one)[0] for one in zip(hows, types, numbers, strict=True)]
                mask = build(*values)
                leaves, structure = jax.tree.flatten(mask)
                look = compiled(structure) if "traced" in hows else functools.partial(_looked_at, structure)
                got, kinds = look(leaves)
            except ValueError as error:
                assert "must fit 32 bits" in str(error), what
                assert "dilated" in name and any(abs(n) >= 2**31 for n in numbers), what
                continue
            np.testing.assert_array_equal(got, want, err_msg=what)
            _check_kinds(np.asarray(kinds)[0], want, what)


def _looked_at(structure, leaves):
    mask = jax.tree.unflatten(structure, leaves)
    return mask.to_array(T, S), aj.BlockMap.build(mask, T, S, block_q=4, block_k=4).kinds


def _check_kinds(kinds, want, what):
    for i, j in np.ndindex(kinds.shape):
        block = want[4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
        assert kinds[i, j] in ((1, 2) if block.all() else (1,) if block.any() else (0, 1)), (what, i, j)


IDS = {
    "segments": (aj.Segments, operator.eq),
    "not_segments": (lambda a, b: ~aj.Segments(a, b), operator.ne),
}


@pytest.mark.parametrize("kinds", [("uint8", "uint8"), ("int8", "uint16"), ("uint32", "int32"), ("uint32", "uint32")])
def test_ids_of_few_bits(kinds):
    _check_ids(kinds)


@pytest.mark.parametrize("kinds", [("int64", "int64"), ("int32", "int64"), ("uint32", "int64"), ("uint64", "int64")])
def test_ids_of_64_bits(kinds):
    with jax.enable_x64(True):
        _check_ids(kinds)


def _check_ids(kinds):
    """NumPy's, JAX's and traced ones, in attention by default and in block maps; ids of one segment are neighbours."""
    rng = np.random.default_rng(0)
    pool = [0, 1, -1, 255, 2**8, 2**31, 2**31 - 1, -(2**31), 2**32, 2**32 - 1, 2**32 + 1, -(2**32), 2**63, 2**64 - 1]
    for trial in range(2):
        arrays = []
        for kind, length in zip(kinds, (T, S), strict=True):
            limits = np.iinfo(kind)
            some = [int(n) for n in rng.permutation(np.array(pool, object)) if limits.min <= n <= limits.max][:4]
            arrays.append(np.array(sorted(some[i] for i in rng.integers(0, len(some), length)), kind))
        exact = [[int(n) for n in a] for a in arrays]
        for build, meaning in IDS.values():
            want = np.array([[meaning(a, b) for b in exact[1]] for a in exact[0]])
            for wrap in (lambda a: a, jnp.asarray):
                mask = build(*map(wrap, arrays))
                np.testing.assert_array_equal(mask.to_array(T, S), want)
                _check_kinds(np.asarray(aj.BlockMap.build(mask, T, S, block_q=4, block_k=4).kinds)[0], want, trial)
            got, kinds_ = jax.jit(functools.partial(_looked_at, jax.tree.structure(mask)))(jax.tree.leaves(mask))
            np.testing.assert_array_equal(got, want)
            _check_kinds(np.asarray(kinds_)[0], want, trial)
    order = np.array(sorted(rng.choice(np.array(exact[1], object), T)), kinds[1])
    order = rng.permutation(order)
    for strict, meaning in ((False, operator.le), (True, operator.lt)):
        want = np.array([[meaning(int(b), int(a)) for b in order] for a in order])
        for wrap in (lambda a: a, jnp.asarray):
            mask = aj.Permutation(wrap(order), strict=strict)
            np.testing.assert_array_equal(mask.to_array(T, T), want)
            _check_kinds(np.asarray(aj.BlockMap.build(mask, T, T, block_q=4, block_k=4).kinds)[0], want, "order")


NARROW = {
    "uint8_window": (lambda: aj.Window(jnp.uint8(3), 0), lambda q, k: q - 3 <= k <= q),
    "int8_ends": (lambda: aj.Window(None, jnp.int8(100), jnp.int8(100)), lambda q, k: True),
    "uint32_offset": (lambda: aj.Chunked(jnp.uint16(5), jnp.uint32(3)), lambda q, k: (q + 3) // 5 == k // 5),
    "all": (lambda: aj.Causal(2**31 - 1) & aj.Window(np.int64(2**63 - 1), jnp.int32(2**31 - 1)), lambda q, k: True),
    "ids": (
        lambda: aj.Segments(jnp.arange(T, dtype=jnp.uint8) // 4, jnp.arange(S, dtype=jnp.uint32) // 4),
        lambda q, k: q // 4 == k // 4,
    ),
    "own": (lambda: Frames(jnp.uint8(4)), lambda q, k: k // 4 <= q // 4),
}


class Frames(aj.Mask):
    """The mask of docs/contributing.md: a user's own."""

    axes = {"size": ""}
    size: int | jax.Array

    def evaluate(self, tile):
        size = tile.take(self.size, "")
        return tile.k // size <= tile.q // size


@pytest.mark.parametrize("implementation", {**IMPLEMENTATIONS, **INTERPRETED})
def test_integers_on_every_implementation(implementation, rng):
    """Types that wrapped, or were taken for booleans: one program for all, against the formula in NumPy."""
    query, key, value = (rng.normal(size=(n, 2, 4)).astype(np.float32) for n in (T, S, S))
    config = {**IMPLEMENTATIONS, **INTERPRETED}[implementation]
    masks = {name: build() for name, (build, _) in NARROW.items()}

    @jax.jit
    def all_of(masks):
        call = lambda mask: aj.attention(query, key, value, mask=mask, implementation=implementation, config=config)
        return {name: call(mask) for name, mask in masks.items()}

    got = all_of(masks)
    weights = np.exp(np.einsum("tnh,snh->nts", query, key) / 2)
    for name, (_, rule) in NARROW.items():
        seen = weights * np.array([[rule(q, k) for k in range(S)] for q in range(T)])
        want = np.einsum("nts,snv->tnv", seen / seen.sum(-1, keepdims=True), value)
        np.testing.assert_allclose(got[name], want, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("implementation", ["cpu", "mosaic_tpu"])
def test_default_integers_of_x64_run_the_kernels(implementation, rng):
    """int64 and float64 leaves beside float32 calls: no kernel is left for them."""
    config = INTERPRETED.get(implementation)
    if config is None and implementation not in IMPLEMENTATIONS:
        pytest.skip("not on this platform")
    with jax.enable_x64(True):
        query, key, value = (jnp.asarray(rng.normal(size=(1, n, 2, 4)), jnp.float32) for n in (T, S, S))
        ids, tokens = jnp.arange(T) // 4, jnp.arange(S) // 4
        mask = aj.Segments(ids, tokens) & aj.Lengths(key=jnp.array([12])) & aj.Chunked(jnp.asarray(8)) & aj.Causal()
        options = dict(mask=mask, score=aj.Bias(jnp.zeros(S)), sinks=jnp.zeros(2))
        got = aj.attention(query, key, value, **options, implementation=implementation, config=config)
        want = aj.attention(query, key, value, **options, implementation="reference")
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
