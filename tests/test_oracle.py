"""The oracle itself: against a loop over rows, against finite differences, and that it does refuse wrong answers."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from oracle import Answer, Expected, Problem, Shape

SMALL = Shape(batch=(2,), T=4, S=5, N=4, K=2, H=3, V=2)


def score(s, i, x):
    return x["cap"] * jnp.tanh(s / x["cap"]) + i.per(x["bias"], "ts")


@pytest.fixture(params=[True, False], ids=["sinks", "no_sinks"])
def small(request, rng):
    """A problem with everything in it, its inputs in float64: a row that sees nothing, a key that nobody sees."""
    visible = rng.random((SMALL.B, SMALL.N, SMALL.T, SMALL.S)) < 0.6
    visible[:, :, 1] = False
    visible[:, :, :, 3] = False
    problem = Problem(SMALL, visible, score, 0.8, kept=rng.random(visible.shape) < 0.7, rate=0.3)
    shapes = SMALL.query_key_value() | {"bias": (SMALL.T, SMALL.S), "cap": ()}
    shapes |= {"sinks": (SMALL.N,)} if request.param else {}
    rows = (*SMALL.batch, SMALL.T, SMALL.N)
    with jax.enable_x64(True):
        array = lambda size: jnp.asarray(rng.normal(size=size))
        x, tangents = ({name: array(size) for name, size in shapes.items()} for _ in range(2))
        return problem, x, tangents, (array((*rows, SMALL.V)), array(rows))


def test_dense_is_a_loop_over_rows(small):
    """Row by row, with Python's own exp, log and sums over the keys that are seen."""
    problem, x, _, _ = small
    with jax.enable_x64(True):
        out, lse = (np.asarray(a) for a in oracle.dense(x, problem))
    x = {name: np.asarray(a) for name, a in x.items()}
    for b, n, t in np.ndindex(SMALL.B, SMALL.N, SMALL.T):
        seen = [s for s in range(SMALL.S) if problem.visible[b, n, t, s]]
        key, value = x["key"][b, :, n // 2], x["value"][b, :, n // 2]
        logit = {s: 0.8 * float(x["query"][b, t, n] @ key[s]) for s in seen}
        logit = {s: x["cap"] * math.tanh(a / x["cap"]) + x["bias"][t, s] for s, a in logit.items()}
        total = sum(math.exp(a) for a in logit.values()) + (math.exp(x["sinks"][n]) if "sinks" in x else 0)
        if total == 0:
            assert lse[b, t, n] == -math.inf and not out[b, t, n].any()
            continue
        want = sum(math.exp(logit[s]) / total * value[s] / 0.7 for s in seen if problem.kept[b, n, t, s])
        np.testing.assert_allclose(lse[b, t, n], math.log(total), rtol=1e-13)
        np.testing.assert_allclose(out[b, t, n], want, rtol=1e-12, atol=1e-15)


def test_derivatives_are_those_of_finite_differences(small):
    """Along a random direction: (f(x + e d) - f(x - e d)) / 2e, paired with the cotangents for the gradients."""
    problem, x, tangents, cotangents = small
    step = 1e-5
    answer = oracle.evaluate(problem, (x, tangents, cotangents), "float64")
    with jax.enable_x64(True):
        f = jax.jit(functools.partial(oracle.dense, problem=problem))
        finite = lambda a: np.where(np.isneginf(a), 0, a)  # a row that sees nothing stays at -inf
        move = lambda sign: map(finite, f({name: a + sign * step * tangents[name] for name, a in x.items()}))
        slope = [(a - b) / (2 * step) for a, b in zip(move(1), move(-1), strict=True)]
    np.testing.assert_allclose(answer.out_tangent, slope[0], atol=1e-9)
    np.testing.assert_allclose(answer.lse_tangent, slope[1], atol=1e-9)
    forward = sum(float(np.vdot(c, s)) for c, s in zip(cotangents, slope, strict=True))
    backward = sum(float(np.vdot(answer.gradients[name], tangents[name])) for name in x)
    assert backward == pytest.approx(forward, rel=1e-8)


def test_rows_and_keys_without_a_partner_have_no_derivative(small):
    problem, x, tangents, cotangents = small
    answer = oracle.expected(problem, x, tangents, cotangents).answer
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(answer._replace(lse=0.0)))
    assert not answer.gradients["key"][:, 3].any() and not answer.gradients["value"][:, 3].any()
    assert not answer.gradients["query"][:, 1].any() and not answer.gradients["bias"][1].any()
    assert not answer.out[:, 1].any() and not answer.out_tangent[:, 1].any()
    if "sinks" in x:
        np.testing.assert_array_equal(answer.lse[:, 1], np.broadcast_to(x["sinks"], (SMALL.B, SMALL.N)))
    else:
        assert np.isneginf(answer.lse[:, 1]).all() and not answer.lse_tangent[:, 1].any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_the_plain_formula_is_within_its_own_budget(small, dtype):
    problem, *inputs = small
    with jax.enable_x64(True):
        inputs = jax.tree.map(lambda a: a.astype(dtype), inputs)
        expected = oracle.expected(problem, *inputs)
    plain = oracle.evaluate(problem, inputs, dtype)
    if dtype in oracle.HALVES:  # there the budget of lse is that of float32, which is the point
        plain = plain._replace(lse=expected.answer.lse, lse_tangent=expected.answer.lse_tangent)
    expected.check(plain)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_every_array_of_an_answer_is_checked(small, dtype):
    """A little more than allowed in one element of one array is refused, so are NaN and a wrong shape."""
    problem, *inputs = small
    with jax.enable_x64(True):
        expected = oracle.expected(problem, *jax.tree.map(lambda a: a.astype(dtype), inputs))
    right = expected.answer
    expected.check(right)
    leaves, tree = jax.tree.flatten(right)
    limits = jax.tree.leaves(expected.allowed)
    for n, (leaf, limit) in enumerate(zip(leaves, limits, strict=True)):
        place = np.unravel_index(np.nanargmax(np.where(np.isfinite(leaf), leaf, -np.inf)), leaf.shape)
        for wrong in (leaf[place] + 1.1 * limit, np.nan, np.inf, -np.inf):
            bad = leaf.copy()
            bad[place] = wrong
            with pytest.raises(AssertionError, match="further from the float64 oracle"):
                expected.check(jax.tree.unflatten(tree, [*leaves[:n], bad, *leaves[n + 1 :]]))
        with pytest.raises(AssertionError, match="shape"):
            expected.check(jax.tree.unflatten(tree, [*leaves[:n], leaf[None], *leaves[n + 1 :]]))


def test_a_missing_array_is_refused(small):
    expected = oracle.expected(*small)
    fewer = {name: a for name, a in expected.answer.gradients.items() if name != "bias"}
    with pytest.raises(ValueError, match="zip"):
        expected.check(expected.answer._replace(gradients=fewer))


def test_the_budget_tells_precisions_apart(small):
    """float64 done in float32, and a log-sum-exp rounded to bfloat16, are both refused."""
    problem, *inputs = small
    single = oracle.evaluate(problem, inputs, "float32")
    with pytest.raises(AssertionError, match="further from"):
        oracle.expected(problem, *inputs).check(single)
    with jax.enable_x64(True):
        halves = jax.tree.map(lambda a: a.astype("bfloat16"), inputs)
        expected = oracle.expected(problem, *halves)
    rounded = expected.answer._replace(lse=expected.answer.lse.astype(jnp.bfloat16))
    with pytest.raises(AssertionError, match=r"\.lse"):
        expected.check(rounded)


def test_an_empty_batch_has_an_answer():
    shape = Shape(batch=(0, 2), T=3, S=2, N=2, K=1, H=2, V=2)
    x = {name: jnp.zeros(size) for name, size in shape.query_key_value().items()}
    rows = (*shape.batch, shape.T, shape.N)
    expected = oracle.expected(Problem(shape), x, x, (jnp.zeros((*rows, shape.V)), jnp.zeros(rows)))
    assert isinstance(expected, Expected) and isinstance(expected.answer, Answer)
    assert expected.answer.out.shape == (0, 2, 3, 2, 2)
    expected.check(expected.answer)


def test_the_order_of_queries_and_keys_changes_rounding_alone(small):
    problem, *inputs = small
    want = oracle.evaluate(problem, inputs, "float64")
    got = oracle.evaluate(problem, inputs, "float64", (np.array([2, 0, 3, 1]), np.array([4, 1, 0, 3, 2])))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-14), got, want)
