"""Random problems: shapes, masks and scores drawn by hypothesis, against the same oracle as the table of cases."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import MaskCase, ScoreCase, distance, relative
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from oracle import Index, Shape
from problems import Case, check_first_order, draw, expect, first_order, poison, precision, solver

import attnjax as aj
from attnjax.kernels import cpu, xla

small = st.integers(0, 12)
signed = st.integers(-12, 12)
positive = st.integers(1, 12)


@dataclasses.dataclass(frozen=True)
class Rule:
    """A mask and its rule, with the text that hypothesis shows when it fails."""

    text: str
    mask: object
    rule: object

    def __repr__(self):
        return self.text


def table(seed: int) -> np.ndarray:
    """A fixed sequence of 300 integers in [0, 4) for each seed: ids by position."""
    return np.random.default_rng(seed).integers(0, 4, 300).astype(np.int32)


def segments(seed, sort):
    ids = lambda n: (lambda a: np.sort(a) if sort else a)(table(seed)[:n])
    return Rule(
        f"segments(seed={seed}, sort={sort})",
        lambda shape: aj.Segments(jnp.asarray(ids(shape.T)), jnp.asarray(ids(shape.S))),
        lambda i: ids(i.T)[i.q] == ids(i.S)[i.k],
    )


def dense(seed, share):
    array = lambda T, S: np.random.default_rng(seed).random((T, S)) < share
    return Rule(
        f"dense(seed={seed}, share={share})",
        lambda shape: aj.Dense(jnp.asarray(array(shape.T, shape.S))),
        lambda i: array(i.T, i.S),
    )


def node(text, mask, rule):
    return Rule(text, lambda shape: mask, rule)


LEAVES = st.one_of(
    signed.map(lambda o: node(f"Causal({o})", aj.Causal(o), lambda i: i.k <= i.q + o)),
    signed.map(
        lambda o: node(f"Causal.aligned_end({o})", aj.Causal.aligned_end(o), lambda i: i.k <= i.q + i.S - i.T + o)
    ),
    st.tuples(small, small, signed).map(
        lambda a: node(f"Window{a}", aj.Window(*a), lambda i: (i.q + a[2] - a[0] <= i.k) & (i.k <= i.q + a[2] + a[1]))
    ),
    st.tuples(positive, signed).map(
        lambda a: node(f"Chunked{a}", aj.Chunked(*a), lambda i: (i.q + a[1]) // a[0] == i.k // a[0])
    ),
    small.map(lambda n: Rule(f"Prefix({n})", lambda shape: aj.Prefix(min(n, shape.S)), lambda i: i.k < n)),
    st.tuples(positive, signed).map(
        lambda a: node(f"Dilated{a}", aj.Dilated(*a), lambda i: (i.q + a[1] - i.k) % a[0] == 0)
    ),
    st.builds(segments, small, st.booleans()),
    st.builds(dense, small, st.sampled_from([0.05, 0.5, 0.95])),
    st.tuples(positive, positive, st.booleans()).map(
        lambda a: node(
            f"Where{a}",
            aj.Where(lambda b, h, q, k: (q * a[0] + k * (h + 1) + b) % a[1] == 0, scan=a[2]),
            lambda i: (i.q * a[0] + i.k * (i.h + 1) + i.b) % a[1] == 0,
        )
    ),
)


def combine(masks):
    return st.one_of(
        masks.map(lambda a: Rule(f"~{a}", lambda s: ~a.mask(s), lambda i: ~np.asarray(a.rule(i)))),
        st.tuples(masks, masks).map(
            lambda p: Rule(
                f"({p[0]} & {p[1]})", lambda s: p[0].mask(s) & p[1].mask(s), lambda i: p[0].rule(i) & p[1].rule(i)
            )
        ),
        st.tuples(masks, masks).map(
            lambda p: Rule(
                f"({p[0]} | {p[1]})", lambda s: p[0].mask(s) | p[1].mask(s), lambda i: p[0].rule(i) | p[1].rule(i)
            )
        ),
    )


MASK_TREES = st.recursive(LEAVES, combine, max_leaves=4)

MODIFIERS = {
    "number": (lambda x: aj.SoftCap(1.7), lambda s, i, x: 1.7 * jnp.tanh(s / 1.7), {}),
    "keys": (lambda x: aj.Bias(x["keys"]), lambda s, i, x: s + i.per(x["keys"], "nts"), {"keys": "1s"}),
    "queries": (lambda x: aj.Bias(x["queries"]), lambda s, i, x: s + i.per(x["queries"], "nts"), {"queries": "nt1"}),
    "relative": (
        lambda x: aj.RelativeBias(x["table"], max_distance=20),
        lambda s, i, x: relative(s, i, x["table"]),
        {"table": "8n"},
    ),
    "softcap": (lambda x: aj.SoftCap(x["cap"]), lambda s, i, x: x["cap"] * jnp.tanh(s / x["cap"]), {"cap": ""}),
    "bias": (lambda x: aj.Bias(x["bias"]), lambda s, i, x: s + i.per(x["bias"], "ts"), {"bias": "ts"}),
    "heads": (lambda x: aj.Bias(x["heads"]), lambda s, i, x: s + i.per(x["heads"], "nts"), {"heads": "n1s"}),
    "alibi": (
        lambda x: aj.ALiBi(jnp.abs(x["slopes"])),
        lambda s, i, x: s - jnp.abs(i.per(x["slopes"], "n")) * distance(i, s),
        {"slopes": "n"},
    ),
    "function": (
        lambda x: aj.ScoreFn(lambda s, b, h, q, k: s * x["weight"][q].astype(s.dtype)),
        lambda s, i, x: s * i.per(x["weight"], "t"),
        {"weight": "t"},
    ),
}


def score_case(names: tuple[str, ...], with_sinks: bool, rate: float) -> ScoreCase:
    """The named modifiers in this order."""
    parts = [MODIFIERS[name] for name in names]

    def rule(s, i, x):
        for _, each, _ in parts:
            s = each(s, i, x)
        return s

    def operands(rng, shape):
        sizes = {"n": shape.N, "t": shape.T, "s": shape.S, "1": 1, "8": 8}
        axes = {name: a for part in parts for name, a in part[2].items()} | ({"sinks": "n"} if with_sinks else {})
        drawn = {name: rng.normal(size=[sizes[c] for c in a]) for name, a in axes.items()}
        return {name: np.abs(a) + 1 if name == "cap" else a for name, a in drawn.items()}

    text = f"scores{names}, sinks={with_sinks}, rate={rate}"
    build = lambda x: tuple(part[0](x) for part in parts)
    return ScoreCase(text, build, rule, operands, dropout=(rate, 4) if rate else None)


def chains(names):
    modifiers = st.lists(st.sampled_from(names), max_size=3, unique=True).map(tuple)
    return st.builds(score_case, modifiers, st.booleans(), st.sampled_from([0.0, 0.0, 0.4]))


SCORE_CHAINS = chains(["alibi", "bias", "function", "heads", "softcap"])
COMPILED_CHAINS = chains(["alibi", "bias", "heads", "keys", "number", "queries", "relative"])  # without functions
LENGTHS = st.sampled_from([1, 2, 7, 16, 17, 33])
SIZES = st.sampled_from([1, 3, 8])
SHAPES = st.builds(
    lambda batch, T, S, K, G, H, V: Shape(batch, T, S, K * G, K, H, V),
    st.sampled_from([(), (1,), (2,), (2, 1), (2, 3)]),
    LENGTHS,
    LENGTHS,
    st.sampled_from([1, 2, 3]),
    st.sampled_from([1, 2]),
    SIZES,
    SIZES,
)
LARGER = st.builds(
    lambda batch, T, S, K, G, H, V: Shape(batch, T, S, K * G, K, H, V),
    st.sampled_from([(), (2,), (2, 2)]),
    st.sampled_from([1, 2, 5, 33, 64, 65, 97]),
    st.sampled_from([1, 7, 63, 128, 129, 300]),
    st.sampled_from([1, 2, 3]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 5, 16, 24, 65]),
    st.sampled_from([1, 7, 32, 48]),
)
BLOCKS = st.sampled_from([1, 3, 8, 16, 64])
CONFIGS = st.builds(xla.Config, BLOCKS, BLOCKS, st.sampled_from([None, 1, 2, 5]))
COMPILED = st.builds(cpu.Config, st.sampled_from([None, *cpu.instruction_sets()]), st.sampled_from([None, 1, 2]))
DTYPES = st.sampled_from(["float32", "float32", "bfloat16", "float16", "float64"])


def case_of(rule: Rule, score: ScoreCase, shape: Shape) -> Case:
    return Case(MaskCase(rule.text, lambda d: rule.mask(shape), lambda i, d: rule.rule(i)), score, shape)


def agrees(case, dtype, implementation, config):
    with precision(dtype):
        inputs = draw(case, dtype)
        want = expect(case, inputs)
        solve = jax.jit(solver(case, implementation, config))
        want.check(solve(*inputs))
        want.check(solve(*poison(case, inputs)))


# Every example is compiled: shrinking one that fails would take longer than looking at it.
AS_DRAWN = [Phase.explicit, Phase.generate]


@settings(phases=AS_DRAWN)
@given(MASK_TREES, SCORE_CHAINS, SHAPES, DTYPES, CONFIGS)
def test_xla_agrees_with_the_oracle(rule, score, shape, dtype, config):
    agrees(case_of(rule, score, shape), dtype, "xla", config)


@settings(phases=AS_DRAWN)
@given(MASK_TREES, SCORE_CHAINS, SHAPES, DTYPES)
def test_reference_agrees_with_the_oracle(rule, score, shape, dtype):
    agrees(case_of(rule, score, shape), dtype, "reference", None)


@pytest.mark.compiled
@settings(phases=AS_DRAWN)
@given(MASK_TREES, COMPILED_CHAINS, st.one_of(SHAPES, LARGER), DTYPES, COMPILED)
def test_the_compiled_kernel_agrees_with_the_oracle(rule, score, shape, dtype, config):
    """Value and gradients, of larger shapes too: its tiles have a fixed size."""
    case = case_of(rule, score, shape)
    with precision(dtype):
        inputs, solve = draw(case, dtype), first_order(case, config)
        want = expect(case, inputs)
        for one in (inputs, poison(case, inputs)):
            check_first_order(want, solve(one.x, one.d, one.cotangents)[0])


@given(MASK_TREES, SHAPES)
def test_any_mask_shows_itself_as_it_is(rule, shape):
    index = Index(shape)
    sizes = (shape.B, shape.N, shape.T, shape.S)
    want = np.broadcast_to(rule.rule(index), sizes)
    mask = rule.mask(shape)
    got = mask.to_array(shape.T, shape.S, batch=shape.batch, heads=shape.N)
    got = np.broadcast_to(got, (*shape.batch, *sizes[1:])).reshape(sizes)
    np.testing.assert_array_equal(got, want)
    density = mask.density(shape.T, shape.S, batch=shape.batch, heads=shape.N)
    np.testing.assert_allclose(density, want.mean(), rtol=1e-6, atol=1e-9)
