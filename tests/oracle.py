"""The oracle: attention as one dense formula in float64, and how far from it an answer may be. No kernels here.

Nothing of attnjax's mathematics is used but the dropout hash, which is part of the meaning of a seed.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Arrays = dict[str, Any]
HALVES = ("bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of one attention call, in the letters of the library."""

    batch: tuple[int, ...] = (3,)
    T: int = 37
    S: int = 53
    N: int = 6
    K: int = 2
    H: int = 19
    V: int = 23

    @property
    def B(self) -> int:
        return math.prod(self.batch)

    def inner(self) -> Shape:
        """The shape that `jax.vmap` over the first batch axis leaves inside."""
        return dataclasses.replace(self, batch=self.batch[1:])

    def query_key_value(self) -> dict[str, tuple[int, ...]]:
        return {
            "query": (*self.batch, self.T, self.N, self.H),
            "key": (*self.batch, self.S, self.K, self.H),
            "value": (*self.batch, self.S, self.K, self.V),
        }


class Index:
    """Index arrays of the T x S matrix of every batch entry and head; they broadcast to [B, N, T, S].

    With `order`, two permutations, the rows and columns of that matrix come in another order.
    """

    def __init__(self, shape: Shape, order: tuple[Any, Any] | None = None):
        self.shape, self.T, self.S, self.N = shape, shape.T, shape.S, shape.N
        queries, keys = order or (np.arange(shape.T), np.arange(shape.S))
        self.b = np.arange(shape.B).reshape(-1, 1, 1, 1)
        self.h = np.arange(shape.N).reshape(-1, 1, 1)
        self.q = queries.reshape(-1, 1)
        self.k = keys

    def per(self, array: Any, axes: str = "") -> Any:
        """An array with axes [*batch, axes...] (or broadcastable, right-aligned) laid out as [B, n, t, s]."""
        sizes = {"n": self.N, "t": self.T, "s": self.S}
        xp = jnp if isinstance(array, jax.Array) else np
        full = xp.broadcast_to(array, (*self.shape.batch, *(sizes[a] for a in axes)))
        full = full.reshape(self.shape.B, *(sizes[a] if a in axes else 1 for a in "nts"))
        full = full[:, :, self.q[:, 0]] if "t" in axes else full
        return full[..., self.k] if "s" in axes else full


@dataclasses.dataclass(frozen=True)
class Problem:
    """What the dense formula needs besides the float arrays.

    `visible` and `kept` are booleans [B, N, T, S]; `score(s, index, x)` is the chain of score modifiers.
    """

    shape: Shape
    visible: np.ndarray | None = None
    score: Callable[[Any, Index, Arrays], Any] | None = None
    scale: float | None = None
    kept: np.ndarray | None = None
    rate: float = 0.0


class Answer(NamedTuple):
    """Everything first-order that attention says: value, reverse mode, forward mode."""

    out: Any
    lse: Any
    gradients: Arrays
    out_tangent: Any
    lse_tangent: Any


def dense(x: Arrays, problem: Problem, order: tuple[Any, Any] | None = None, late: Any = False) -> tuple[Any, Any]:
    """softmax(score(scale q kᵀ)) v and its log-sum-exp, all of it in the dtype of the query.

    A row that may attend to nothing gives 0 and -inf. Arguments are replaced before `exp` and `log`, not only
    their results after, because the derivative of the branch not taken is computed too, and 0 * inf is NaN.
    `order` tells scores which queries and keys the rows are, and `late` divides by the softmax's sum after the product
    with v and not before: the same answer, with other rounding errors. (With `late` the gradient of the sum is that of
    a row as a whole, as in every formula that does not hold T x S weights.)
    """
    shape = problem.shape
    x = {name: a.astype(x["query"].dtype) for name, a in x.items()}
    q = x["query"].reshape(shape.B, shape.T, shape.N, shape.H)
    k = x["key"].reshape(shape.B, shape.S, shape.K, shape.H).repeat(shape.N // shape.K, axis=2)
    v = x["value"].reshape(shape.B, shape.S, shape.K, shape.V).repeat(shape.N // shape.K, axis=2)
    scale = shape.H**-0.5 if problem.scale is None else problem.scale
    s = jnp.einsum("btnh,bsnh->bnts", q, k) * scale
    if problem.score is not None:
        s = problem.score(s, Index(shape, order), x)
    visible = s > -jnp.inf
    if problem.visible is not None:
        visible &= problem.visible

    m = jnp.max(jnp.where(visible, s, -jnp.inf), axis=-1)
    sink = x["sinks"][:, None] if "sinks" in x else None
    if sink is not None:
        m = jnp.maximum(m, sink)
    m = jax.lax.stop_gradient(jnp.where(m > -jnp.inf, m, 0))
    e = jnp.where(visible, jnp.exp(jnp.where(visible, s - m[..., None], 0)), 0)
    total = e.sum(-1)
    if sink is not None:
        total += jnp.exp(sink - m)
    some = total > 0
    divisor = jnp.where(some, total, 1)
    first, last = jnp.where(late, 1, divisor), jnp.where(late, divisor, 1)
    w = e / first[..., None]
    if problem.kept is not None:
        w = jnp.where(problem.kept, w / (1 - problem.rate), 0)

    out = jnp.einsum("bnts,bsnv->btnv", w, v) / last.transpose(0, 2, 1)[..., None]
    out = out.reshape(*shape.batch, shape.T, shape.N, shape.V)
    lse = jnp.where(some, m + jnp.log(divisor), -jnp.inf).transpose(0, 2, 1)
    return out, lse.reshape(*shape.batch, shape.T, shape.N)


def differentiate(function: Callable, x: Arrays, tangents: Arrays, cotangents: tuple[Any, Any]) -> Answer:
    """Value, vector-Jacobian and Jacobian-vector product of `function: x -> (out, lse)`."""
    (out, lse), pull = jax.vjp(function, x)
    (gradients,) = pull(cotangents)
    _, (out_tangent, lse_tangent) = jax.jvp(function, (x,), (tangents,))
    return Answer(out, lse, gradients, out_tangent, lse_tangent)


class Expected(NamedTuple):
    """The oracle's answer, and for each of its arrays the largest error an implementation may make."""

    answer: Answer
    allowed: Answer

    def check(self, got: Answer) -> None:
        """Raises AssertionError, naming every array of `got` that is further from the oracle than allowed."""
        __tracebackhide__ = True  # arrays of thousands of numbers in a report help nobody
        failures = []
        names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(self.answer)[0]]
        leaves = [jax.tree.leaves(tree) for tree in (got, self.answer, self.allowed)]
        for name, one, want, allowed in zip(names, *leaves, strict=True):
            one = np.asarray(one)
            if one.shape != want.shape:
                failures.append(f"{name}: shape {one.shape}, expected {want.shape}")
            elif not np.array_equal(np.isneginf(one), np.isneginf(want)):
                failures.append(f"{name}: -inf where it is not expected, or the other way round")
            elif not (error := worst(one, want)) <= allowed:  # written so that NaN is a failure
                failures.append(f"{name}: error {error:.3e}, allowed {float(allowed):.3e}")
        if failures:
            raise AssertionError("further from the float64 oracle than allowed\n  " + "\n  ".join(failures))


def worst(got: Any, want: Any) -> float:
    """Largest absolute difference; -inf in the oracle counts as 0 (its place is compared apart), NaN stays NaN."""
    finite = np.isfinite(want)
    return float(np.max(np.abs(np.asarray(got).astype(np.float64)[finite] - want[finite]), initial=0.0))


def expected(problem: Problem, x: Arrays, tangents: Arrays, cotangents: tuple[Any, Any]) -> Expected:
    """The oracle's answer at exactly these (rounded) inputs, with the error budget of the query's dtype.

    allowed = 2 (error of the plain dense formula in that dtype + eps max|oracle|)

    - The plain formula's error depends on luck, most of all where one number sums over many. It is the largest of
      eight, for four orders of the queries and keys, each dividing by the softmax's sum before and after v.
    - lse is float32 for bfloat16 and float16 queries, so there the plain formula and eps are float32's.
    - For float64 the plain formula is the oracle itself. Its error is taken from float32, where it can be
      measured, times the ratio of the two eps; it is added once more because the oracle makes it too.
    - Derivatives remake the weights as exp(s - lse). Where |lse| exceeds 50, that of its rounding is added to eps.
    """
    dtype = str(x["query"].dtype)
    inputs = (x, tangents, cotangents)
    answer = evaluate(problem, inputs, "float64")
    if dtype == "float64":
        rounded = _cast(inputs, "float32")
        single = _errors(problem, rounded, "float32", evaluate(problem, rounded, "float64"))
        errors = jax.tree.map(lambda e: e * _eps("float64") / _eps("float32"), single)
        allowed = jax.tree.map(lambda a, e: a + e, _allowed(errors, answer, dtype), errors)
        return Expected(answer, allowed)
    allowed = _allowed(_errors(problem, inputs, dtype, answer), answer, dtype)
    if dtype in HALVES:
        single = _allowed(_errors(problem, inputs, "float32", answer), answer, "float32")
        allowed = allowed._replace(lse=single.lse, lse_tangent=single.lse_tangent)
    return Expected(answer, allowed)


def _allowed(errors: Answer, answer: Answer, dtype: str) -> Answer:
    largest = lambda a: float(np.max(np.abs(a), where=np.isfinite(a), initial=0.0))
    lse = largest(answer.lse)
    remade = lse * _eps("float64" if dtype == "float64" else "float32") if lse > 50 else 0.0
    values = Answer(0.0, 0.0, *jax.tree.map(lambda _: remade, answer[2:]))
    return jax.tree.map(lambda e, a, r: 2 * (e + (_eps(dtype) + r) * largest(a)), errors, answer, values)


def _errors(problem: Problem, inputs: Any, dtype: str, answer: Answer) -> Answer:
    rng = np.random.default_rng(0)
    orders = [None, *((rng.permutation(problem.shape.T), rng.permutation(problem.shape.S)) for _ in range(3))]
    tries = [
        jax.tree.map(worst, evaluate(problem, inputs, dtype, order, late), answer)
        for order in orders
        for late in (False, True)
    ]
    return jax.tree.map(lambda *errors: float(np.max(errors)), *tries)


def _eps(dtype: str) -> float:
    return float(jnp.finfo(dtype).eps)


def evaluate(
    problem: Problem, inputs: Any, dtype: str, order: tuple[Any, Any] | None = None, late: bool = False
) -> Answer:
    """The dense formula and its derivatives, computed in `dtype`, as float64 arrays of NumPy.

    Always on the CPU: a GPU's products of float32 have 11 bits where nobody asks for more, and a budget measured there
    would allow the same to everyone.
    """
    shape = problem.shape
    queries, keys = order = order or (np.arange(shape.T), np.arange(shape.S))
    features = int(queries[0]) if len(queries) else 0
    forth = _Reordering(queries, keys, features)
    back = _Reordering(np.argsort(queries), np.argsort(keys), -features)
    pairs = lambda a: None if a is None else np.asarray(a)[:, :, queries][..., keys]
    x, tangents, cotangents = inputs
    inputs = forth.operands(x), forth.operands(tangents), forth.results(cotangents)
    program = _program(shape, problem.score, problem.scale, problem.rate)
    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        answer = program(pairs(problem.visible), pairs(problem.kept), order, late, *_cast(inputs, dtype))
        answer = jax.tree.map(lambda a: np.asarray(a).astype(np.float64), answer)
    out, lse, gradients, out_tangent, lse_tangent = answer
    return Answer(*back.results((out, lse)), back.operands(gradients), *back.results((out_tangent, lse_tangent)))


@functools.cache
def _program(shape: Shape, score: Any, scale: float | None, rate: float) -> Callable[..., Answer]:
    """The dense formula and its derivatives. Masks are arguments, so that all of them share one compilation."""

    def program(visible, kept, order, late, x, tangents, cotangents):
        problem = Problem(shape, visible, score, scale, kept, rate)
        function = functools.partial(dense, problem=problem, order=order, late=late)
        return differentiate(function, x, tangents, cotangents)

    return jax.jit(program, compiler_options={"xla_backend_optimization_level": 0})  # compiles in half the time


@dataclasses.dataclass(frozen=True)
class _Reordering:
    """Queries and keys in another order, and the features of both rolled, so that every sum has another order, too."""

    queries: np.ndarray
    keys: np.ndarray
    features: int

    def operands(self, x: Arrays) -> Arrays:
        """Query, key and value; what else there is stays as it is."""
        order = {"query": self.queries, "key": self.keys, "value": self.keys}
        x = {name: np.asarray(a)[..., order[name], :, :] if name in order else a for name, a in x.items()}
        return x | {name: np.roll(x[name], self.features, -1) for name in ("query", "key") if name in x}

    def results(self, pair: tuple[Any, Any]) -> tuple[Any, Any]:
        """(out [*B, T, N, V], lse [*B, T, N])."""
        out, lse = map(np.asarray, pair)
        return out[..., self.queries, :, :], lse[..., self.queries, :]


def _cast(tree: Any, dtype: str) -> Any:
    with jax.enable_x64(True):
        return jax.tree.map(lambda a: jnp.asarray(np.asarray(a), dtype), tree)


def t5_bucket(relative: int, bidirectional: bool, num_buckets: int, max_distance: int) -> int:
    """Bucket of relative = key - query (Raffel et al., 2020, section 2.1 and the code released with it).

    Half of the buckets are for one position each, the rest grow with the logarithm up to `max_distance`. The
    comparison of logarithms is done on integers, where it cannot be rounded to the wrong side.
    """
    first, distance = 0, -relative
    if bidirectional:
        num_buckets //= 2
        first = num_buckets if relative > 0 else 0
        distance = abs(distance)
    distance = max(distance, 0)
    exact = num_buckets // 2
    if distance < exact:
        return first + distance
    rest, step = num_buckets - exact, 0
    # distance >= exact (max_distance / exact)^((step + 1) / rest)
    while step + 1 < rest and distance**rest * exact ** (step + 1) >= max_distance ** (step + 1) * exact**rest:
        step += 1
    return first + exact + step


def alibi_slopes(heads: int) -> list[float]:
    """Slopes of Press et al., 2022, section 3: 2^(-8/n), its square, its cube ... for n a power of two.

    Other n (the authors' code): the slopes of the power of two below, then every other one of the power above.
    """
    below = 2 ** int(math.floor(math.log2(heads)))
    slopes = [2.0 ** (-8.0 * (i + 1) / below) for i in range(below)]
    above = [2.0 ** (-8.0 * (i + 1) / (2 * below)) for i in range(2 * below)]
    return slopes + above[0::2][: heads - below]
