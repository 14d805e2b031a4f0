"""Masks taken apart: what comes apart means the same as the mask, to the last pair; what does not says why."""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import MASKS, SCORES, VARIANTS
from oracle import Shape
from problems import Case, draw, problem

import attnjax as aj
from attnjax.core.sides import Combined, Comparison, Function, NotSeparable, Pairs, separate
from attnjax.core.tiles import Sizes, operand_form

TABLE = [mask for mask in (*MASKS, *VARIANTS) if mask.name not in ("full", "dense_bare")]
SHAPE = Shape(batch=(2, 3), T=13, S=17, N=4, K=2)
MEANING = {
    "less_equal": operator.le,
    "less": operator.lt,
    "equal": operator.eq,
    "greater_equal": operator.ge,
    "greater": operator.gt,
    "both": np.logical_and,
    "either": np.logical_or,
}


def rule_of(mask, shape):
    """What the mask comes apart into, its leaves in operand form."""
    n, mask = len(shape.batch), mask.settled(shape.T, shape.S)
    leaves = [operand_form(jnp.asarray(leaf), axes, n) for _, leaf, axes in mask.operands()]
    sizes = Sizes(shape.batch, 0, shape.T, shape.S, shape.N, shape.K)
    return separate(jax.tree.unflatten(jax.tree.structure(mask), leaves), sizes)


def seen(rule):
    """The pairs that a rule allows, as booleans that broadcast to [*batch, N, T, S]."""
    if isinstance(rule, Comparison):
        keys, queries = np.asarray(rule.keys), np.asarray(rule.queries)
        assert keys.dtype == queries.dtype == np.int32
        return MEANING[rule.operator](keys[..., None, None, :], queries[..., None, :, None])
    if isinstance(rule, Pairs):
        return np.asarray(rule.array)
    if isinstance(rule, Function):
        return np.asarray(rule.pairs((0, rule.sizes.query_length), (0, rule.sizes.key_length)))
    assert isinstance(rule, Combined)
    parts = [seen(part) for part in rule.rules]
    return ~parts[0] if rule.operator == "negate" else functools.reduce(MEANING[rule.operator], parts)


@pytest.mark.parametrize("mask", TABLE, ids=repr)
def test_the_parts_mean_what_the_mask_means(mask):
    case = Case(mask, SCORES[0], SHAPE)
    d, shape = draw(case, "float32").d, case.shape
    want = np.asarray(problem(case, d).visible).reshape(*shape.batch, shape.N, shape.T, shape.S)
    np.testing.assert_array_equal(np.broadcast_to(seen(rule_of(mask.mask(d), shape)), want.shape), want)


@pytest.mark.parametrize(
    "mask", [aj.Causal(3), aj.Window(2, 5) & ~aj.Dilated(3), aj.Chunked(4), aj.Lengths(5, 7)], ids=str
)
def test_what_needs_no_array_is_known_while_tracing(mask):
    """Comparisons of positions are NumPy's: they become constants of the program."""

    def arrays(rule):
        return [rule.keys, rule.queries] if isinstance(rule, Comparison) else sum(map(arrays, rule.rules), [])

    @jax.jit
    def traced():
        assert all(isinstance(a, np.ndarray) for a in arrays(rule_of(mask, SHAPE)))

    traced()


class Ordered(aj.Mask):
    """Query t sees keys whose number is not above (or, strict, is below) its own."""

    axes = {"own": "t", "others": "s"}
    own: jax.Array
    others: jax.Array
    strict: bool = False

    def evaluate(self, tile):
        own, others = tile.take(self.own, "t"), tile.take(self.others, "s")
        return others < own if self.strict else others <= own

    def blocks(self, grid):
        return np.int8(1)


EXTREMES = [0, 5, -5, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**32 - 1, 2**40, -(2**40)]
KINDS = [("int64", "int32"), ("uint32", "int32"), ("int32", "uint32"), ("uint64", "int8"), ("int64", "uint64")]
KINDS += [("int64", "int64"), ("uint32", "uint32")]
RULES = {
    "equal": (aj.Segments, operator.eq),
    "less_equal": (Ordered, operator.le),
    "less": (functools.partial(Ordered, strict=True), operator.lt),
    "not_equal": (lambda q, k: ~aj.Segments(q, k), operator.ne),
}


@pytest.mark.parametrize("own, others", KINDS)
@pytest.mark.parametrize("mask, meaning", RULES.values(), ids=RULES)
def test_numbers_of_more_than_32_bits(mask, meaning, own, others):
    """Compared as what they are, up to the limits of 32 bits and beyond."""
    with jax.enable_x64(True):
        fit = lambda kind: [x for x in EXTREMES if np.iinfo(kind).min <= x <= np.iinfo(kind).max]
        queries, keys = fit(own), fit(others)
        shape = Shape(batch=(), T=len(queries), S=len(keys), N=1, K=1)
        got = seen(rule_of(mask(jnp.asarray(queries, own), jnp.asarray(keys, others)), shape))
        want = [[bool(meaning(k, q)) for k in keys] for q in queries]
        np.testing.assert_array_equal(got.reshape(shape.T, shape.S), want)


class Difference(aj.Mask):
    """A rule that subtracts keys from queries."""

    def evaluate(self, tile):
        return tile.q - tile.k < 3

    def blocks(self, grid):
        return np.int8(1)


class Heads(aj.Mask):
    """A rule by head."""

    axes = {"allowed": "h"}
    allowed: jax.Array

    def evaluate(self, tile):
        return tile.take(self.allowed, "h")

    def blocks(self, grid):
        return np.int8(1)


class Told(aj.Mask):
    """A rule that is a plain boolean."""

    def evaluate(self, tile):
        return True

    def blocks(self, grid):
        return np.int8(1)


NOT_SEPARABLE = {
    "arithmetic": (Difference, "arithmetic between queries and keys"),
    "heads": (lambda: Heads(jnp.ones(4, bool)), "an array with axes 'h'"),
    "boolean": (Told, "a bool"),
}


@pytest.mark.parametrize("mask, reason", NOT_SEPARABLE.values(), ids=NOT_SEPARABLE)
def test_what_does_not_come_apart(mask, reason):
    with jax.enable_x64(True), pytest.raises(NotSeparable, match=reason):
        rule_of(mask(), Shape(batch=(), T=5, S=5, N=4, K=2))
