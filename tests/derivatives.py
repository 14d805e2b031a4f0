"""Calls with an operand of every kind, what they mean to the oracle, and derivatives of any order. No tests."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from cases import causal, distance, relative, same
from oracle import Expected, Index, Problem, Shape, worst
from problems import FAST_COMPILE

import attnjax as aj
from attnjax.core.dropout import head_seeds, keep
from attnjax.kernels import xla

# Blocks of 4 cut T = 13 and S = 11 into several, with a rest on both sides; lanes=1 takes the heads one by one.
SHAPE = Shape(batch=(2,), T=13, S=11, N=4, K=2, H=5, V=3)
CONFIG = xla.Config(block_q=4, block_k=4, lanes=1)
RATE = 0.3


def everything(x, d, implementation=None):
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
        implementation=implementation,
        config=None if implementation == "reference" else CONFIG,
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
    return Problem(shape, np.broadcast_to(visible, full), score, 1.0, _kept(index, d["seed"]), RATE)


def little(x, d):
    """What third derivatives are taken of: fewer operands and only partial blocks, so that they compile sooner."""
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
    return Problem(shape, np.broadcast_to(visible, full), score, 0.4, _kept(i, d["seed"]), RATE)


def _kept(i, seed):
    """Which weights dropout keeps, [B, N, T, S]."""
    with jax.ensure_compile_time_eval():
        u32 = lambda x: np.asarray(x).astype(np.uint32)
        kept = keep(head_seeds(u32(i.per(np.asarray(seed))), u32(i.b), u32(i.h)), i.q, i.k, RATE)
    return np.broadcast_to(kept, (i.shape.B, i.N, i.T, i.S))


def drawn(shape=SHAPE, dtype="float32", seed=0, examples=()):
    """Arrays `x` and `d` of `everything`; `examples` are axes in front of each."""
    rng = np.random.default_rng(seed)
    N, T, S = shape.N, shape.T, shape.S
    sizes = shape.query_key_value() | {"cap": (), "bias": (T, S), "slopes": (N,), "table": (8, N)}
    sizes |= {"w": (N, T), "u": (S,), "scale": (), "sinks": (N,)}
    x = {name: rng.normal(size=(*examples, *size)) for name, size in sizes.items()}
    x |= {"cap": 2.5 + 0.1 * x["cap"], "slopes": 0.2 * np.abs(x["slopes"]), "scale": 0.4 + 0.05 * x["scale"]}
    ids = lambda length: np.sort(rng.integers(0, 3, (*examples, *shape.batch, length)), axis=-1)
    d = {
        "a": ids(T),
        "b": ids(S),
        "offset": rng.integers(-3, 4, examples),
        "length": rng.integers(2, 7, examples),
    }
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
        seen = jnp.where(lse > -jnp.inf, lse, 0)
        return dot((out.astype(lse.dtype), seen), jax.tree.map(lambda w: w.astype(lse.dtype), weights))

    return scalar


def derive(function, modes, along):
    """Derivatives from the inside out: F a jvp along the next tangent, R a gradient (of the dot with the next)."""
    along, tree = list(along), False
    for mode in modes:
        if mode == "F":
            function = _pushed(function, along.pop(0))
        else:
            function = jax.grad(_paired(function, along.pop(0)) if tree else function)
            tree = True
    return function


def budgeted(build, arrays, dtype="float32"):
    """What `build(*arrays)` gives in float64, and how far from it an answer in `dtype` may be.

    The design's rule for all arrays of the answer taken as one: the plain formula's error in an operand that is a
    single number is small by luck, and a derivative may be 0, or nearly, because large terms cancel. For the same
    reason that error is at least what nudging the inputs by their own rounding changes, the most of some draws.
    """
    floats = lambda a: jnp.issubdtype(a.dtype, jnp.floating)
    cast = lambda tree, to: jax.tree.map(lambda a: jnp.asarray(np.asarray(a), to) if floats(a) else a, tree)
    rounding, unit = (float(jnp.finfo(kind).eps) for kind in ("float32" if dtype == "float64" else dtype, dtype))
    rng = np.random.default_rng(0)
    nudge = lambda a: a * (1 + rounding * rng.normal(size=a.shape)) if floats(a) else a
    with jax.enable_x64(True):
        exact = cast(arrays, "float64")
        solve = lambda arrays: jax.tree.map(np.float64, _compiled(build)(*arrays))
        want = solve(exact)
        others = [solve(cast(arrays, "float32" if dtype == "float64" else dtype))]
        others += [solve(jax.tree.map(nudge, exact)) for _ in range(8)]
    error = max(max(jax.tree.leaves(jax.tree.map(worst, other, want))) for other in others)
    largest = max(float(np.max(np.abs(a), where=np.isfinite(a), initial=0)) for a in jax.tree.leaves(want))
    allowed = 2 * (error + rounding * largest) * unit / rounding
    return Expected(want, jax.tree.map(lambda a: allowed, want))


@functools.cache
def _compiled(build):
    return jax.jit(build, compiler_options=FAST_COMPILE)


def _pushed(function, tangent):
    return lambda x: jax.jvp(function, (x,), (tangent,))[1]


def _paired(function, tangent):
    return lambda x: dot(function(x), tangent)
