"""The fuzzer's own formula and derivatives, against differences and the other oracle. No random programs are run."""

import jax
import numpy as np
import oracle
import pytest
from fuzz import tape
from fuzz.oracle import Problem, Sizes, attend, derived, expected, order_of
from fuzz.programs import drawn

SIZES = Sizes((2,), 5, 4, 4, 2, 3, 2)
SHAPES = {"query": (2, 5, 4, 3), "key": (2, 4, 2, 3), "value": (2, 4, 2, 2), "sinks": (4,), "table": (4,)}


def score(s, index, var, get):
    return tape.tanh(s) * index.taken(var("table"), "n") + tape.where(s.value > 0, s * s, tape.sin(s))


def visible(index, get):
    return (index.k <= index.q + get("offset")) & (index.q != 2)


@pytest.fixture
def draw(rng):
    return lambda: {name: rng.normal(size=shape) for name, shape in SHAPES.items()}


def formula(order=None, late=False):
    problem = Problem(SIZES, visible, (score,), 0.5, "sinks", (0.3, "seed"))
    return lambda x, get: attend(problem, x, get, order_of(SIZES, order), late)


GET = {"offset": np.array(1), "seed": np.array(-7)}.__getitem__


def run(function, x):
    return [y.value for y in function({n: tape.Var(a, tape.Precision("float64")) for n, a in x.items()}, GET)]


def test_value_is_that_of_the_other_oracle(draw):
    x = draw()
    problem = oracle.Problem(oracle.Shape((2,), 5, 4, 4, 2, 3, 2), scale=0.5)
    index = oracle.Index(problem.shape)
    see = np.broadcast_to(visible(index, GET), (2, 4, 5, 4))
    plain = Problem(SIZES, visible, (), 0.5, "sinks")
    with jax.enable_x64(True):
        known = {name: x[name] for name in ("query", "key", "value", "sinks")}
        want = oracle.dense(jax.tree.map(jax.numpy.asarray, known), oracle.Problem(problem.shape, see, scale=0.5))
    for got, right in zip(run(lambda x, get: attend(plain, x, get), x), want, strict=True):
        np.testing.assert_allclose(got, right, rtol=1e-12)


@pytest.mark.parametrize("letters", ["f", "ff", "rf", "fff", "frf"])
def test_derivatives_are_limits_of_differences(draw, letters):
    """The last letter is forward: the derivative along a line, which two neighbours on it tell."""
    x, u, step = draw(), [draw() for _ in letters], 1e-5
    outs = [np.ones((2, 5, 4, 2)), np.ones((2, 5, 4))]
    c = [outs if "r" not in letters[:n] else [u[0][name] for name in sorted(x)] for n in range(len(letters))]
    before = derived(formula(), letters[:-1], u, c)
    near = [{n: a + sign * step * u[-1][n] for n, a in x.items()} for sign in (1, -1)]
    for got, one, other in zip(
        run(derived(formula(), letters, u, c), x), *(run(before, at) for at in near), strict=True
    ):
        with np.errstate(invalid="ignore"):
            want = np.where(np.isfinite(one), (one - other) / (2 * step), 0)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6 * np.abs(want).max(initial=1))


def test_order_changes_nothing_but_rounding(draw):
    x = draw()
    for got, want in zip(run(formula(3, True), x), run(formula(), x), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-14)


def test_budget_shrinks_with_the_dtype(draw):
    x = draw()
    allowed = [
        max(limit for _, limit in expected(formula, x, GET, dtype, (1,), [dtype] * 2, 3))
        for dtype in ("bfloat16", "float16", "float32", "float64")
    ]
    assert allowed[0] > 2 * allowed[1] > 1000 * allowed[2] > 1e8 * allowed[3] > 0


def test_a_case_is_the_same_every_time():
    assert drawn(3, 14).text == drawn(3, 14).text != drawn(3, 15).text
