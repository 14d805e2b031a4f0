"""Derivatives of second and third order, in every nesting of modes, against the dense oracle in float64.

First order is in test_conformance; vmap, scan, checkpoint and JAX's other transforms in test_transforms_mixed.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import MaskCase, ScoreCase, distance, integers, join, normal, relative
from derivatives import (
    CONFIG,
    SHAPE,
    budgeted,
    derive,
    drawn,
    everything,
    like,
    little,
    meaning,
    meaning_of_little,
    total,
)
from oracle import dense
from problems import FAST_COMPILE, Case, attend, draw, poison, precision, problem

import attnjax as aj

LITTLE = ("query", "key", "value", "cap", "w", "sinks")  # the float operands of `little`


@functools.cache
def ordered(order):
    """A call, its arrays, weights and tangents, and the oracle's derivative of this order."""
    call, meaning_of = (everything, meaning) if order == 2 else (little, meaning_of_little)
    x, d = drawn()
    x = x if order == 2 else {name: x[name] for name in LITTLE}
    weights = like(jax.eval_shape(call, x, d), 1)
    along = [like(x, seed) for seed in range(2, 2 + order)]
    oracle = functools.partial(dense, problem=meaning_of(SHAPE, d))
    reverse = lambda x, weights, *along: derive(total(oracle, weights), "R" + "F" * (order - 1), along)(x)
    forward = lambda x, *along: derive(oracle, "F" * order, along)(x)
    call = functools.partial(call, d=d)
    return call, x, weights, along, budgeted(reverse, (x, weights, *along)), budgeted(forward, (x, *along))


@pytest.mark.parametrize("modes", ["".join(m) for order in (2, 3) for m in itertools.product("FR", repeat=order)])
def test_forward_and_reverse_in_every_order(modes):
    """Second and third derivatives, every operand moving at once, forward and reverse nested in every order."""
    function, x, weights, along, reverse, forward = ordered(len(modes))
    function = total(function, weights) if "R" in modes else function
    got = jax.jit(derive(function, modes, along), compiler_options=FAST_COMPILE)(x)
    (reverse if "R" in modes else forward).check(got)


@pytest.mark.parametrize("dtype, modes", [("bfloat16", "RF"), ("float16", "RR"), ("float64", "RR")])
def test_second_order_in_every_dtype(dtype, modes):
    with precision(dtype):
        x, d = drawn(dtype=dtype)
        x = {name: x[name] for name in LITTLE}
        weights = like(jax.eval_shape(little, x, d), 1)
        along = [like(x, 2)]
        build = lambda function: lambda x, weights, *along: derive(total(function, weights), modes, along)(x)
        oracle = functools.partial(dense, problem=meaning_of_little(SHAPE, d))
        got = jax.jit(build(functools.partial(little, d=d)), compiler_options=FAST_COMPILE)(x, weights, *along)
        assert jax.tree.map(lambda a: a.dtype, got) == jax.tree.map(lambda a: a.dtype, x)
        budgeted(build(oracle), (x, weights, *along), dtype).check(got)


BIASES = dict(a="s", b="ts", c="nts", e="111", f="n1s", g="nt1", h="*11s", i="*n11", j="*1ts", k="*nts")

# The first rows see nothing, the last keys are seen by nobody.
PADDED = MaskCase(
    "padded",
    lambda d: aj.Lengths(key=d["a"]) & aj.Causal(-2),
    lambda i, d: (i.k < i.per(d["a"])) & (i.k <= i.q - 2),
    integers(6, 10, ""),
)

SCORES = {
    "bias_of_every_shape": ScoreCase(
        "biases",
        lambda x: tuple(aj.Bias(x[name]) for name in BIASES),
        lambda s, i, x: sum((i.per(x[name], "nts") for name in BIASES), s),
        normal(0.4, **BIASES),
    ),
    "operands_with_batch_axes": ScoreCase(
        "batched",
        lambda x: (
            aj.SoftCap(2 + x["cap"] ** 2),
            aj.ALiBi(x["slopes"], 3),
            aj.RelativeBias(x["table"], bidirectional=False, max_distance=20, offset=2),
        ),
        lambda s, i, x: batched(s, i, x),
        join(normal(0.3, cap="*", slopes="*n"), normal(table="*8n")),
    ),
    "no_score": ScoreCase("none", lambda x: (), lambda s, i, x: s),
}


def batched(s, i, x):
    """SoftCap, ALiBi and RelativeBias whose operands differ between batch entries."""
    cap = 2 + i.per(x["cap"]) ** 2
    s = cap * jnp.tanh(s / cap) - i.per(x["slopes"], "n") * distance(i, s, 3)
    table = x["table"].reshape(-1, 8, i.N)
    return jnp.stack([relative(s[b], i, table[b], 2, bidirectional=False) for b in range(i.shape.B)])


@pytest.mark.parametrize("score", SCORES.values(), ids=SCORES)
def test_second_order_in_the_shape_of_each_operand(score):
    """A gradient and a Hessian-vector product, with NaN in everything that takes no part."""
    case = Case(PADDED, score, SHAPE)
    inputs = draw(case, "float32")

    def both(function, x, weights, along):
        function = total(function, weights)
        return derive(function, "R", ())(x), derive(function, "RR", (along,))(x)

    oracle = functools.partial(dense, problem=problem(case, inputs.d))
    want = budgeted(functools.partial(both, oracle), (inputs.x, inputs.cotangents, inputs.tangents))
    function = lambda x: attend(case, x, inputs.d, None, CONFIG)
    got = jax.jit(functools.partial(both, function), compiler_options=FAST_COMPILE)
    poisoned = poison(case, inputs).x
    assert jnp.isnan(poisoned["key"]).any() and jnp.isnan(poisoned["query"]).any()
    want.check(got(poisoned, inputs.cotangents, inputs.tangents))


PAIRS = {
    "F": [("query", "bias"), ("sinks", "value"), ("w", "w")],
    "R": [("table", "u"), ("scale", "key"), ("slopes", "cap")],
}


@pytest.mark.parametrize("outer", PAIRS)
def test_mixed_second_derivatives(outer):
    """One operand moves inside, another outside: what does not move has no tangent, not even one of zeros."""
    _, x, weights, (along, _), _, _ = ordered(2)
    d = drawn()[1]

    def mixed(function, first, second, x, weights, along):
        inner = lambda b: jax.grad(lambda a: total(function, weights)(x | {second: b} | {first: a}))
        if outer == "F":
            at = lambda b: inner(b)(b if first == second else x[first])
            return jax.jvp(at, (x[second],), (along[second],))[1]
        return jax.grad(lambda b: jnp.vdot(inner(b)(x[first]), along[first]))(x[second])

    def all_mixed(function, x, weights, along):
        return {f"{a}, {b}": mixed(function, a, b, x, weights, along) for a, b in PAIRS[outer]}

    arrays = (x, weights, along)
    want = budgeted(functools.partial(all_mixed, functools.partial(dense, problem=meaning(SHAPE, d))), arrays)
    function = functools.partial(all_mixed, functools.partial(everything, d=d))
    want.check(jax.jit(function, compiler_options=FAST_COMPILE)(*arrays))


def test_second_derivative_by_value_is_exactly_zero():
    """The output is linear in the values, so there is nothing to compute and nothing to round."""
    x, d = drawn()
    out = lambda value: little({name: x[name] for name in LITTLE} | {"value": value}, d)[0].sum()
    second = jax.jit(lambda value: jax.jvp(jax.grad(out), (value,), (value,)), compiler_options=FAST_COMPILE)
    first, second = second(x["value"])
    assert jnp.all(first != 0)
    np.testing.assert_array_equal(second, np.zeros_like(second))


TINY = dataclasses.replace(SHAPE, batch=(), T=3, S=5, N=2, K=1, H=2, V=1)
MATRICES = {
    "hessian": jax.hessian,
    "jacfwd_of_jacfwd": lambda f: jax.jacfwd(jax.jacfwd(f)),
    "jacrev_of_jacrev": lambda f: jax.jacrev(jax.jacrev(f)),
}


@pytest.mark.parametrize("matrix", MATRICES.values(), ids=MATRICES)
def test_whole_hessians(matrix):
    """All second derivatives by query and sinks: derivatives of derivatives under vmap."""
    x, d = drawn(TINY)
    x = {name: x[name] for name in LITTLE}
    weights = like(jax.eval_shape(little, x, d), 1)

    def hessian(function, moved, x, weights):
        return matrix(lambda moved: total(function, weights)(x | moved))(moved)

    arrays = ({name: x[name] for name in ("query", "sinks")}, x, weights)
    want = budgeted(functools.partial(hessian, functools.partial(dense, problem=meaning_of_little(TINY, d))), arrays)
    got = jax.jit(functools.partial(hessian, functools.partial(little, d=d)), compiler_options=FAST_COMPILE)(*arrays)
    want.check(got)
