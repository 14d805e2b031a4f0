"""What a drawn program has to give: the dense formula in NumPy, its derivatives, and how far from it an answer may be.

The budget is that of docs/meaning.md: 2 (error of the plain formula in the call's dtype + eps max|oracle|), where the
plain formula is the same dense formula, each result of which is rounded to that dtype.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fuzz.tape import Precision, Var, einsum, exp, log, moved, pull, push, reshape, stacked, take, total, where

EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
HALVES = ("float16", "bfloat16")
Arrays = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of one call, in the letters of the library."""

    batch: tuple[int, ...]
    T: int
    S: int
    N: int
    K: int
    H: int
    V: int

    @property
    def B(self) -> int:
        return math.prod(self.batch)


class Index:
    """The numbers of batch entry, head, query and key of all pairs, int64, and arrays laid out beside them.

    At pairs in `hidden` query and key are 0: what a function gives there must not matter, however bad it is.
    """

    def __init__(self, sizes: Sizes, order: Any = None, hidden: Any = None):
        self.sizes = sizes
        self.queries, self.keys = order or (np.arange(sizes.T), np.arange(sizes.S))
        shape = (sizes.B, sizes.N, sizes.T, sizes.S)
        spread = lambda x: np.broadcast_to(x, shape)
        self.b, self.h = spread(np.arange(sizes.B)[:, None, None, None]), spread(np.arange(sizes.N)[:, None, None])
        self.q, self.k = spread(self.queries[:, None]), spread(self.keys)
        if hidden is not None:
            self.q, self.k = np.where(hidden, 0, self.q), np.where(hidden, 0, self.k)

    def per(self, array: Any, axes: str, spread: Callable = np.broadcast_to) -> Any:
        """An array with axes [*batch, axes...], or what broadcasts to that from the right, as [B, n, t, s]."""
        s = self.sizes
        full = {"n": s.N, "t": s.T, "s": s.S}
        array = np.asarray(array)
        array = np.broadcast_to(array, (*s.batch, *(full[a] for a in axes)))
        array = array.reshape(s.B, *(full[a] if a in axes else 1 for a in "nts"))
        array = array[:, :, self.queries] if "t" in axes else array
        return array[..., self.keys] if "s" in axes else array

    def places(self, shape: tuple[int, ...], axes: str) -> Any:
        """For each pair, where in an array of this shape (as in `per`) its number stands: an index for `take`."""
        flat = np.arange(math.prod(shape)).reshape(shape)
        return np.broadcast_to(self.per(flat, axes), self.q.shape)

    def taken(self, x: Var, axes: str) -> Var:
        return take(reshape(x, (x.value.size,)), self.places(x.shape, axes))


@dataclasses.dataclass(frozen=True)
class Problem:
    """A call in the words of the oracle.

    `visible(index, get)` gives booleans; each of `scores` is a function `(s, index, var, get) -> s`; `scale`,
    `sinks` are names of arrays or `None`; `dropout` is (rate, name of the seed). `get` and `var` find arrays by name.
    """

    sizes: Sizes
    visible: Callable | None = None
    scores: tuple[Callable, ...] = ()
    scale: Any = None
    sinks: str | None = None
    dropout: tuple[float, Any] | None = None


def attend(problem: Problem, x: dict[str, Var], get: Callable, order: Any = None, late: bool = False) -> list[Var]:
    """softmax(score(scale q k)) v and its log-sum-exp. A row that may attend to nothing gives 0 and -inf.

    `order` permutes queries and keys on the way; `late` divides by the softmax's sum after the product with v.
    """
    z, index = problem.sizes, Index(problem.sizes, order)
    shape = index.q.shape
    visible = np.ones(shape, bool)
    if problem.visible is not None:
        visible = np.broadcast_to(np.asarray(problem.visible(index, get), bool), shape)
    visible = visible.copy()
    harmless = Index(z, order, ~visible)
    heads = np.arange(z.N) // max(z.N // z.K, 1)
    q = take(reshape(x["query"], (z.B, z.T, z.N, z.H)), (slice(None), index.queries))
    k, v = (reshape(x[name], (z.B, z.S, z.K, size)) for name, size in (("key", z.H), ("value", z.V)))
    k, v = (take(take(a, (slice(None), index.keys)), (slice(None), slice(None), heads)) for a in (k, v))
    var = lambda name: x[name] if name in x else q.like(np.asarray(get(name)).astype(np.float64))

    s = einsum("btnh,bsnh->bnts", q, k)
    scale = var(problem.scale) if isinstance(problem.scale, str) else problem.scale
    if isinstance(scale, Var) and scale.shape != ():
        scale = index.taken(scale, "")
    s = s * (z.H**-0.5 if scale is None else scale)
    for score in problem.scores:
        visible &= s.value != -np.inf
        s = score(where(visible, s, 1.0), harmless, var, get)
    visible &= s.value != -np.inf
    s = where(visible, s, 0.0)

    highest = np.where(visible, s.value, -np.inf).max(-1, initial=-np.inf)
    sink = None
    if problem.sinks:
        sink = var(problem.sinks)
        sink = take(index.taken(sink, "n"), (..., 0)) if z.S else spread_rows(sink, index)
        highest = np.maximum(highest, sink.value)
    highest = q.like(np.where(np.isfinite(highest), highest, 0.0))
    e = where(visible, exp(s - reshape(highest, (*highest.shape, 1))), 0.0)
    divisor = total(e, -1)
    if sink is not None:
        there = sink.value != -np.inf
        divisor = divisor + where(there, exp(where(there, sink, 0.0) - highest), 0.0)
    some = divisor.value > 0
    divisor = where(some, divisor, 1.0)
    w = e if late else e / reshape(divisor, (*divisor.shape, 1))
    if problem.dropout is not None:
        rate, seed = problem.dropout
        w = where(kept(rate, get(seed) if isinstance(seed, str) else seed, index), w / (1 - rate), 0.0)
    out = einsum("bnts,bsnv->bntv", w, v)
    if late:
        out = out / reshape(divisor, (*divisor.shape, 1))
    lse = where(some, highest + log(divisor), -np.inf)
    back = np.argsort(index.queries)
    rows = (slice(None), back, slice(None))
    out, lse = (take(_swapped(a), rows if a is out else rows[:2]) for a in (out, lse))
    return [reshape(out, (*z.batch, z.T, z.N, z.V)), reshape(lse, (*z.batch, z.T, z.N))]


def spread_rows(sink: Var, index: Index) -> Var:
    """Sinks by row, where there is no key to lay them beside."""
    z = index.sizes
    where_to = np.broadcast_to(np.arange(sink.value.size).reshape(sink.shape), (*z.batch, z.N)).reshape(z.B, z.N, 1)
    return take(reshape(sink, (-1,)), np.broadcast_to(where_to, (z.B, z.N, z.T)))


def _swapped(x: Var) -> Var:
    """[B, n, t, ...] as [B, t, n, ...]."""
    return Var(np.swapaxes(x.value, 1, 2), x.kind, [(x, _swapped)])


def kept(rate: float, seed: Any, index: Index) -> np.ndarray:
    """Dropout's hash of seed, batch entry, head, query and key, on numbers of 64 bits that are cut to 32."""
    z, cut = index.sizes, np.uint64(0xFFFFFFFF)

    def mix(x):
        x = ((x ^ (x >> np.uint64(16))) * np.uint64(0x7FEB352D)) & cut
        x = ((x ^ (x >> np.uint64(15))) * np.uint64(0x846CA68B)) & cut
        return x ^ (x >> np.uint64(16))

    seed = np.vectorize(lambda n: int(n) % 2**32, otypes=[np.uint64])(np.asarray(seed, object))
    bits = np.broadcast_to(seed, z.batch).reshape(z.B, 1, 1, 1)
    for factor, number in zip((0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F), "bhqk", strict=True):
        number = getattr(index, number).astype(np.uint64)
        bits = mix((bits + ((number * np.uint64(factor)) & cut)) & cut)
    return bits >= min(round(rate * 2**32), 2**32 - 1)


def mapped(function: Callable, x_axes: dict[str, int | None], d_axes: dict[str, int | None], size: int) -> Callable:
    """`jax.vmap`, said as a loop: function(x, get) -> list of arrays, of which each gets a new first axis."""

    def run(x: dict[str, Var], get: Callable) -> list[Var]:
        made = []
        for n in range(size):
            one = {name: a if x_axes.get(name) is None else take(_first(a, x_axes[name]), n) for name, a in x.items()}
            found = lambda name, n=n: get(name) if d_axes.get(name) is None else np.take(get(name), n, d_axes[name])
            made.append(function(one, found))
        return [stacked(parts) for parts in zip(*made, strict=True)]

    return run


def _first(x: Var, axis: int) -> Var:
    return moved(x, axis % len(x.shape), 0)


def derived(function: Callable, letters: str, u: list[Arrays], c: list[Any]) -> Callable:
    """The derivative of function(x, get) -> list: for "f" along u[level], for "r" pulled back from c[level]."""
    for level, letter in enumerate(letters):
        function = _forward(function, u[level]) if letter == "f" else _reverse(function, c[level])
    return function


def _forward(function: Callable, u: Arrays) -> Callable:
    def run(x, get):
        names = sorted(x)
        return push(function(x, get), [x[n] for n in names], [x[n].like(u[n]) for n in names])

    return run


def _reverse(function: Callable, c: list[Any]) -> Callable:
    def run(x, get):
        names = sorted(x)
        made = function(x, get)
        return pull(made, [y.like(a) for y, a in zip(made, c, strict=True)], [x[n] for n in names])

    return run


def expected(
    make: Callable,
    x: Arrays,
    get: Callable,
    dtype: str,
    lse_places: tuple[int, ...],
    stored: Sequence[str],
    orders: int,
    lse: Any = 0.0,
) -> list[Any]:
    """For each result the oracle's array and the largest error that is allowed.

    Args:
      make: from (order, late) to a function (x, get) -> list of Var.
      lse_places: which of the results are log-sum-exps (or their tangents): float32 in a call of 16 bits.
      stored: the dtype of each result: that of an array, for its gradient, which is rounded to it.
      orders: in how many orders the plain formula is tried.
      lse: for derivatives the log-sum-exps: they remake the weights as exp(s - lse), of which lse was rounded.
    """
    answer = _run(make(None, False), x, get, Precision("float64"))
    remade = _largest(lse) * EPS["float64" if dtype == "float64" else "float32"]
    eps = [max(EPS[dtype], EPS[kind]) + remade for kind in stored]
    errors = lambda kind: _errors(make, x, get, kind, answer, orders)
    if dtype == "float64":
        single = [np.asarray(error) * EPS["float64"] / EPS["float32"] for error in errors("float32")]
        return [(a, 2 * (e + p * _largest(a)) + e) for a, e, p in zip(answer, single, eps, strict=True)]
    allowed = [2 * (e + p * _largest(a)) for a, e, p in zip(answer, errors(dtype), eps, strict=True)]
    if dtype in HALVES and lse_places:
        single = errors("float32")
        for n in lse_places:
            allowed[n] = 2 * (single[n] + EPS["float32"] * _largest(answer[n]))
    return list(zip(answer, allowed, strict=True))


def _run(function: Callable, x: Arrays, get: Callable, precision: Precision) -> list[np.ndarray]:
    with np.errstate(all="ignore"):
        made = function({name: Var(np.asarray(a).astype(np.float64), precision) for name, a in x.items()}, get)
        return [y.value.astype(np.float64) for y in made]


def plainly(function: Callable, x: Arrays, get: Callable) -> list[np.ndarray]:
    """What the function gives in float64."""
    return _run(function, x, get, Precision("float64"))


def _errors(make: Callable, x: Arrays, get: Callable, kind: str, answer: list[np.ndarray], orders: int) -> list[float]:
    """The largest error of the plain formula over several orders of its operations: one alone may be lucky."""
    tries = []
    for seed in range(orders):
        for late in (False, True):
            made = _run(make(seed, late), x, get, Precision(kind, seed or None))
            tries.append([worst(one, want) for one, want in zip(made, answer, strict=True)])
    return [max(errors) for errors in zip(*tries, strict=True)]


def worst(got: Any, want: Any) -> float:
    """The largest absolute difference where the oracle is finite; NaN counts as infinite."""
    finite = np.isfinite(want)
    with np.errstate(all="ignore"):
        difference = np.abs(np.asarray(got).astype(np.float64)[finite] - want[finite])
    return float(np.max(np.where(np.isnan(difference), np.inf, difference), initial=0.0))


def _largest(a: Any) -> float:
    return float(np.max(np.abs(a), where=np.isfinite(a), initial=0.0))


def order_of(sizes: Sizes, seed: int | None) -> Any:
    """Queries and keys in an order of their own for each seed; `None` and 0: as they come."""
    if not seed:
        return None
    rng = np.random.default_rng(seed)
    return rng.permutation(sizes.T), rng.permutation(sizes.S)
