"""JAX's transforms beyond the first order and in each other, for every operand, against the dense oracle in float64.

First derivatives, and vmap of them over q, k, v, bias and ids, are in test_conformance; `jax.export` is in test_export.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import MASKS, SCORE_VARIANTS, SCORES, causal, distance, relative, same
from oracle import Expected, Index, Problem, Shape, dense, expected, worst
from problems import FAST_COMPILE, Case, attend, draw, precision, problem

import attnjax as aj
from attnjax.core.dropout import keep
from attnjax.kernels import xla

# Blocks of 4 cut T = 13 and S = 11 into several with a remainder on both sides; lanes=1 takes the heads one by one.
SHAPE = Shape(batch=(2,), T=13, S=11, N=4, K=2, H=5, V=3)
CONFIG = xla.Config(block_q=4, block_k=4, lanes=1)
RATE = 0.3


def everything(x, d, **options):
    """Attention with an operand of every kind: floats in `x`, integers in `d`. Gives out and lse."""
    w, u = x["w"], x["u"]
    score = (
        aj.SoftCap(x["cap"]),
        aj.Bias(x["bias"]),
        aj.ALiBi(x["slopes"]),
        aj.RelativeBias(x["table"], max_distance=20),
        aj.ScoreFn(lambda s, b, h, q, k: s + jnp.sin(s) * w[h, q].astype(s.dtype) * u[k].astype(s.dtype)),
    )
    mask = (aj.Causal(d["offset"]) | aj.Prefix(d["length"])) & aj.Segments(d["a"], d["b"])
    options = {"config": CONFIG} | options
    return aj.attention(
        x["query"],
        x["key"],
        x["value"],
        mask=mask,
        score=score,
        scale=x["scale"],
        sinks=x["sinks"],
        dropout=aj.Dropout(RATE, d["seed"]),
        return_lse=True,
        **options,
    )


def meaning(shape, d):
    """`everything` in the words of the oracle."""
    index = Index(shape)

    def score(s, i, x):
        s = x["scale"] * s
        s = x["cap"] * jnp.tanh(s / x["cap"]) + i.per(x["bias"], "nts") - i.per(x["slopes"], "n") * distance(i, s)
        s = relative(s, i, x["table"])
        return s + jnp.sin(s) * x["w"][:, :, None] * x["u"]

    d = {name: np.asarray(a) for name, a in d.items()}
    visible = (causal(index, index.per(d["offset"])) | (index.k < index.per(d["length"]))) & same(index, d)
    full = (shape.B, shape.N, shape.T, shape.S)
    kept = np.asarray(keep(index.per(d["seed"]), index.b, index.h, index.q, index.k, RATE))
    return Problem(shape, np.broadcast_to(visible, full), score, 1.0, np.broadcast_to(kept, full), RATE)


def little(x, d):
    """What third derivatives are taken of: fewer operands and only partial blocks, because they take long to compile."""
    w = x["w"]
    score = (aj.SoftCap(x["cap"]), aj.ScoreFn(lambda s, b, h, q, k: s + jnp.sin(s) * w[h, q].astype(s.dtype)))
    options = dict(mask=aj.Causal(2) & ~aj.Dilated(3), score=score, sinks=x["sinks"], return_lse=True, config=CONFIG)
    return aj.attention(x["query"], x["key"], x["value"], scale=0.4, dropout=aj.Dropout(RATE, d["seed"]), **options)


def meaning_of_little(shape, d):
    """`little` in the words of the oracle."""

    def score(s, i, x):
        s = x["cap"] * jnp.tanh(s / x["cap"])
        return s + jnp.sin(s) * x["w"][:, :, None]

    i, full = Index(shape), (shape.B, shape.N, shape.T, shape.S)
    visible = (i.k <= i.q + 2) & ((i.q - i.k) % 3 != 0)
    kept = np.asarray(keep(np.asarray(d["seed"]), i.b, i.h, i.q, i.k, RATE))
    return Problem(shape, np.broadcast_to(visible, full), score, 0.4, np.broadcast_to(kept, full), RATE)


def drawn(shape=SHAPE, dtype="float32", seed=0, examples=()):
    """Arrays `x` and `d` of `everything`; `examples` are axes in front of each."""
    rng = np.random.default_rng(seed)
    N, T, S = shape.N, shape.T, shape.S
    sizes = shape.query_key_value() | {"cap": (), "bias": (T, S), "slopes": (N,), "table": (8, N)}
    sizes |= {"w": (N, T), "u": (S,), "scale": (), "sinks": (N,)}
    x = {name: rng.normal(size=(*examples, *size)) for name, size in sizes.items()}
    x |= {"cap": 2.5 + 0.1 * x["cap"], "slopes": 0.2 * np.abs(x["slopes"]), "scale": 0.4 + 0.05 * x["scale"]}
    ids = lambda length: np.sort(rng.integers(0, 3, (*examples, *shape.batch, length)), axis=-1)
    d = {"a": ids(T), "b": ids(S), "offset": rng.integers(-3, 4, examples), "length": rng.integers(2, 7, examples)}
    d = {name: jnp.asarray(a, jnp.int32) for name, a in d.items()}
    d["seed"] = jnp.asarray(rng.integers(0, 2**32, examples, np.uint32))
    return {name: jnp.asarray(a, dtype) for name, a in x.items()}, d


def like(tree, seed):
    """Normal arrays of the same shapes and dtypes."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), a.dtype), tree)


def dot(a, b):
    return sum(jnp.vdot(p, q) for p, q in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def total(function, weights):
    """A scalar function of the output and the log-sum-exp of `function`: what is differentiated."""

    def scalar(x):
        out, lse = function(x)
        return dot((out, jnp.where(lse > -jnp.inf, lse, 0)), jax.tree.map(lambda w: w.astype(out.dtype), weights))

    return scalar


def derive(function, modes, along):
    """Derivatives from the inside out: F is a jvp along the next tangent, R a gradient (of the dot with the next)."""
    along, tree = list(along), False
    for mode in modes:
        if mode == "F":
            function = _pushed(function, along.pop(0))
        else:
            function = jax.grad(_paired(function, along.pop(0)) if tree else function)
            tree = True
    return function


def _pushed(function, tangent):
    return lambda x: jax.jvp(function, (x,), (tangent,))[1]


def _paired(function, tangent):
    return lambda x: dot(function(x), tangent)


def budgeted(build, arrays, dtype="float32"):
    """What `build(*arrays)` gives in float64, and how far from it an answer in `dtype` may be.

    The design's rule for all arrays of the answer taken as one: operands that are single numbers have errors that are
    small by luck, and derivatives that are 0, or nearly, because large terms cancel.
    """
    cast = lambda tree, to: jax.tree.map(lambda a: jnp.asarray(np.asarray(a), to), tree)
    answers = {}
    with jax.enable_x64(True):
        for kind in ("float64", "float32" if dtype == "float64" else dtype):
            answer = jax.jit(build, compiler_options=FAST_COMPILE)(*cast(arrays, kind))
            answers[kind] = jax.tree.map(lambda a: np.asarray(a).astype(np.float64), answer)
    (want, plain), eps = answers.values(), float(jnp.finfo(list(answers)[-1]).eps)
    error = max(jax.tree.leaves(jax.tree.map(worst, plain, want)))
    largest = max(float(np.max(np.abs(a), where=np.isfinite(a), initial=0)) for a in jax.tree.leaves(want))
    allowed = 2 * (error + eps * largest) * float(jnp.finfo(dtype).eps) / eps
    return Expected(want, jax.tree.map(lambda a: allowed, want))


@functools.cache
def ordered(order):
    """The call, its arrays, weights and tangents, and the oracle's derivative of this order."""
    call, meaning_of = (everything, meaning) if order == 2 else (little, meaning_of_little)
    x, d = drawn()
    x = x if order == 2 else {name: x[name] for name in ("query", "key", "value", "cap", "w", "sinks")}
    weights = like(jax.eval_shape(call, x, d), 1)
    along = [like(x, seed) for seed in range(2, 2 + order)]
    oracle = functools.partial(dense, problem=meaning_of(SHAPE, d))
    reverse = lambda x, weights, *along: derive(total(oracle, weights), "R" + "F" * (order - 1), along)(x)
    forward = lambda x, *along: derive(oracle, "F" * order, along)(x)
    call = functools.partial(call, d=d)
    return call, x, weights, along, budgeted(reverse, (x, weights, *along)), budgeted(forward, (x, *along))


@pytest.mark.parametrize("modes", ["".join(m) for order in (2, 3) for m in itertools.product("FR", repeat=order)])
def test_forward_and_reverse_in_every_order(modes):
    """Second and third derivatives, every operand moving at once, in every nesting of forward and reverse mode."""
    function, x, weights, along, reverse, forward = ordered(len(modes))
    function = total(function, weights) if "R" in modes else function
    got = jax.jit(derive(function, modes, along), compiler_options=FAST_COMPILE)(x)
    (reverse if "R" in modes else forward).check(got)
