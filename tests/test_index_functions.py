"""What users' functions of indices mean: which are equal, what they captured, their derivatives, copies of them."""

import copy
import dataclasses
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import index_functions
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import EVERY_IMPLEMENTATION

import attnjax as aj
from attnjax.kernels import cpu, mosaic_tpu, triton, xla

T, N, H = 20, 2, 8  # two tiles of 16, the second ragged
ROWS = np.random.default_rng(0).normal(size=(4, T, N, H)).astype(np.float32)
i, j = np.arange(T)[:, None], np.arange(T)
TILED = [name for name in EVERY_IMPLEMENTATION if name != "cpu"]


def loss(logits: Callable, visible: Any) -> Callable:
    """The dense formula; `logits` maps dot products [N, T, T] and what is captured, and is finite everywhere."""

    def run(q, k, v, captured):
        made = jnp.where(visible, logits(jnp.einsum("tnh,snh->nts", q, k) / np.sqrt(H), captured), -jnp.inf)
        return (jnp.einsum("nts,snv->tnv", jax.nn.softmax(made), v) * ROWS[3].astype(v.dtype)).sum()

    return run


def exact(function: Callable, *arguments: Any) -> list[np.ndarray]:
    """The leaves of what a function gives in float64."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64), arguments)
        return [np.asarray(x) for x in jax.tree.leaves(jax.jit(function)(*wide))]


def close(got: Any, want: list[np.ndarray]) -> None:
    for x, y in zip(jax.tree.leaves(got), want, strict=True):
        np.testing.assert_allclose(np.asarray(x, np.float64), y, rtol=0, atol=2e-5 * max(1, np.abs(y).max()))


# Equality


def by(ids):
    return lambda q, k: ids[q] == ids[k]


IDS = [jnp.arange(T) // 4, jnp.arange(T) // 7]
CALLBACKS = [lambda q, k: np.asarray(q - k < 3), lambda q, k: np.asarray(q - k < 7)]


def inside(transform):
    return lambda ids: lambda b, h, q, k: transform(by(ids))(q, k)


def with_rule(slope):
    @jax.custom_jvp
    def double(x):
        return 2 * x

    double.defjvp(lambda primals, tangents: (double(*primals), tangents[0] * slope))
    return lambda s, b, h, q, k: double(s)


def with_backward(slope):
    @jax.custom_vjp
    def double(x):
        return 2 * x

    double.defvjp(lambda x: (double(x), None), lambda _, ct: (ct * slope,))
    return lambda s, b, h, q, k: double(s)


def mapped(bound):
    @jax.custom_batching.custom_vmap
    def before(q, k):
        return q - k < 3

    before.def_vmap(lambda size, batched, q, k: (q - k < bound, True))
    return lambda b, h, q, k: before(q, k)


# What differs between two functions: how to make one, and the two things that it is made of.
DIFFERENT = {
    "number": (lambda n: lambda b, h, q, k: q - k < n, (3, 4)),
    "zero": (lambda x: lambda s, b, h, q, k: s / x, (0.0, -0.0)),
    "jit": (inside(jax.jit), IDS),
    "jit_in_jit": (inside(lambda f: jax.jit(jax.jit(f))), IDS),
    "checkpoint": (inside(lambda f: jax.checkpoint(jax.jit(f))), IDS),
    "cond": (lambda ids: lambda b, h, q, k: jax.lax.cond(q > 2, lambda: ids[q] == ids[k], lambda: q > k), IDS),
    "jit_in_cond": (
        lambda ids: lambda b, h, q, k: jax.lax.cond(q > 2, lambda: jax.jit(by(ids))(q, k), lambda: q > k),
        IDS,
    ),
    "while": (
        lambda ids: (
            lambda b, h, q, k: (
                jax.lax.while_loop(lambda n: ids[n] < ids[q], lambda n: n + 1, jnp.zeros((), jnp.int32)) <= k
            )
        ),
        IDS,
    ),
    "scan": (
        lambda ids: lambda b, h, q, k: jax.lax.scan(lambda c, x: (c | (x == q - k), None), q < 0, ids)[0],
        [jnp.array([0, 2]), jnp.array([1, 3])],
    ),
    "custom_vmap": (mapped, (3, 7)),
    "custom_jvp": (with_rule, (1.0, 3.0)),
    "custom_vjp": (with_backward, (1.0, 3.0)),
    "callback": (
        lambda f: (
            lambda b, h, q, k: jax.pure_callback(f, jax.ShapeDtypeStruct((), bool), q, k, vmap_method="broadcast_all")
        ),
        CALLBACKS,
    ),
}
SCORES = ("zero", "custom_jvp", "custom_vjp")
ANEW = ("custom_jvp", "custom_vjp", "custom_vmap")  # their rules are other functions each time


@pytest.mark.parametrize("name", DIFFERENT)
def test_functions_are_compared_by_what_they_compute(name):
    """AI-Hypercomputer/maxtext#4929 and others: one document's mask was used for another."""
    make, (first, second) = DIFFERENT[name]
    of = lambda x: (aj.ScoreFn if name in SCORES else aj.Where)(make(x))
    structure = lambda x: (jax.tree.structure(of(x)), [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(of(x))])
    assert structure(first) != structure(second)
    if name not in ANEW:
        assert structure(first) == structure(first)
        assert hash(jax.tree.structure(of(first))) == hash(jax.tree.structure(of(first)))


def test_a_second_function_is_not_answered_with_the_first(attend):
    q, k, v, _ = ROWS
    for ids in IDS:
        got = attend(q, k, v, mask=aj.Where(inside(jax.jit)(ids)))[0]
        want = attend(q, k, v, mask=aj.Dense(ids[:, None] == ids))[0]
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_derivative_rules_are_those_of_the_function():
    """The same value, and 1 and 3 times as much gradient."""
    q, k, v, w = ROWS
    run = lambda q, make, slope: (aj.attention(q, k, v, score=aj.ScoreFn(make(slope))) * w).sum()
    for make in (with_rule, with_backward):
        one, three = (jax.grad(run)(q, make, slope) for slope in (1.0, 3.0))
        np.testing.assert_allclose(three, 3 * one, atol=1e-5)


def test_a_method_is_asked_again():
    """What it reads of its object may have changed."""

    class Documents:
        def visible(self, b, h, q, k):
            return self.ids[q] == self.ids[k]

    documents = Documents()
    for documents.ids in IDS:
        np.testing.assert_array_equal(
            aj.Where(documents.visible).to_array(T, T), documents.ids[:, None] == documents.ids
        )


def test_equal_functions_written_anew_compile_once():
    """Also those that call functions with rules of their own, such as jax.nn.relu."""
    q, k, v, _ = ROWS
    of = lambda n: aj.ScoreFn(lambda s, b, h, q, k: jax.nn.relu(s) * n + jax.nn.softplus(s) * jnp.linspace(0, 1, T)[k])
    assert jax.tree.structure(of(2.0)) == jax.tree.structure(of(2.0))
    counts = []
    attend = jax.jit(lambda q, score: (counts.append(1), aj.attention(q, k, v, score=score))[1])
    for n in (2.0, 2.0, 3.0, 2.0):
        attend(q, of(n))
    assert len(counts) == 2


def test_what_is_set_where_a_function_is_traced_is_no_part_of_it():
    """Meshes, precision, disable_jit; keras and others: a mask traced under a mesh could not be divided."""
    table = jnp.ones((4, 4))

    def function(s, b, h, q, k):
        return s * jnp.clip(table @ table, -1, 1)[q % 4, k % 4] + jnp.arange(T, dtype=s.dtype)[q]

    plain = aj.ScoreFn(function).function
    mesh = jax.make_mesh((1,), ("data",))
    for context in (jax.set_mesh(mesh), jax.default_matmul_precision("highest"), jax.disable_jit()):
        with context:
            assert aj.ScoreFn(function).function == plain
    with jax.set_mesh(mesh):
        program = aj.ScoreFn(function).function.program("float32")
        placed = [step for step in program.steps if step.parameters.get("sharding") is not None]
        assert not placed


# What is captured


def test_captured_arrays_that_lie_divided_are_named():
    """Every device reads all of them: where types tell that they lie divided, nothing moves unasked."""
    with jax.set_mesh(jax.make_mesh((1,), ("data",))):
        a = jax.device_put(jnp.arange(T), jax.P("data"))
        mask = aj.Where(lambda b, h, q, k: a[q] >= k)
        with pytest.raises(
            ValueError, match=r"Where.constants\[0\] .* an axis that every pair may read.*reshard\(.*P\(\)"
        ):
            aj.attention(ROWS[0], ROWS[1], ROWS[2], mask=mask)


@pytest.mark.parametrize("implementation", EVERY_IMPLEMENTATION)
def test_captured_floats_keep_their_type(implementation):
    """A function means what it meant when it was traced, on every implementation: bfloat16 rounds to bfloat16."""
    q, k, v, w = ROWS
    options = dict(implementation=implementation, config=EVERY_IMPLEMENTATION[implementation])
    p = jnp.asarray(ROWS[0, :, 0, 0], jnp.bfloat16)
    rounded = aj.Where(lambda b, h, q, k: (p[q] + p[k]) - p[k] == p[q])
    seen = np.asarray((p[:, None] + p) - p == p[:, None])
    assert 0.2 < seen.mean() < 0.8
    want = exact(jax.value_and_grad(loss(lambda s, _: s, seen)), *ROWS[:3], 0.0)
    run = lambda q, score: (aj.attention(q, k, v, mask=rounded, score=score, **options) * w).sum()
    close(run(q, None), want[:1])
    if implementation != "cpu":
        score = aj.ScoreFn(lambda s, b, h, q, k: s + p[k].astype(s.dtype) * 2)
        want = exact(jax.value_and_grad(loss(lambda s, p: s + p * 2, seen), (0, 3)), *ROWS[:3], p)
        value, (d_q, d_score) = jax.value_and_grad(run, (0, 1))(q, score)
        close((value, d_q), want[:2])
        (d_p,) = d_score.constants
        assert d_p.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.float32(d_p), want[2], rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_both_types_of_scores_have_their_own_constants(implementation):
    """A table rounded for float32 is not used for float64, and either may fail to trace where it is not asked for."""
    options = dict(implementation=implementation, config=EVERY_IMPLEMENTATION[implementation])
    table = np.random.default_rng(1).random(T)
    with jax.enable_x64(True):
        q, k, v, w = ROWS.astype(np.float64)
        want = exact(loss(lambda s, t: s + t, True), *ROWS[:3], table)
        run = lambda f: float((aj.attention(q, k, v, score=aj.ScoreFn(f), **options) * w).sum())
        assert abs(run(lambda s, b, h, q, k: s + jnp.asarray(table, s.dtype)[k]) - want[0]) < 1e-12
        assert abs(run(lambda s, b, h, q, k: s + jnp.asarray(table)[k]) - want[0]) < 1e-12  # strict: float64 alone
        score = aj.ScoreFn(lambda s, b, h, q, k: s + jnp.asarray(table)[k])
        with pytest.raises(TypeError, match="function of ScoreFn cannot be traced for float32: TypePromotionError"):
            aj.attention(*ROWS[:3], score=score, **options)
        fine = jnp.asarray(1 + 1e-12 * (j % 2))
        seen = aj.attention(*ROWS[:3], mask=aj.Where(lambda b, h, q, k: fine[q] == fine[k]), **options)
        np.testing.assert_allclose(seen, aj.attention(*ROWS[:3], mask=aj.Dense((i - j) % 2 == 0)), atol=1e-5)


def test_a_wide_table_has_gradients_in_a_narrow_call():
    """float64 captured, float32 attended, to second order."""
    with jax.enable_x64(True):
        table = jnp.linspace(0.5, 1.5, T)
        score = aj.ScoreFn(lambda s, b, h, q, k: (s.astype(jnp.float64) * table[k]).astype(s.dtype))
        run = lambda q, score: (aj.attention(q, *ROWS[1:3], score=score, implementation="xla") * ROWS[3]).sum()
        product = lambda q: jax.jvp(lambda q: jax.grad(run, 1)(q, score).constants[0], (q,), (q,))
        got = jax.jit(product)(ROWS[0])
    dense = loss(lambda s, t: s * t, True)
    want = exact(
        lambda q, t: jax.jvp(lambda q: jax.grad(dense, 3)(q, *ROWS[1:3].astype(q.dtype), t), (q,), (q,)), ROWS[0], table
    )
    close(got, want)


# Derivatives


@dataclasses.dataclass(frozen=True)
class Case:
    """A score as attnjax is told it, and the same where every pair is harmless.

    Attributes:
      function: captured array -> function of indices.
      harmless: (dot products, captured array) -> logits, finite at all pairs.
    """

    function: Callable
    harmless: Callable
    captured: Any
    mask: Any = None
    visible: Any = True
    before: tuple = ()
    after: tuple = ()


gamma, ramp = np.float32([0.5, 0.7]), np.linspace(0.5, 2, T).astype(np.float32)
HOLES = np.random.default_rng(2).random((T, T)) < 0.3
HOLES[:, 0] = False
FORBIDDEN = aj.Bias(jnp.asarray(np.where(HOLES, -np.inf, 0), jnp.float32))
float_ = lambda x, like: x.astype(like.dtype)
CASES = {
    # pytorch#153799: NaN in the backward with a block mask and a score function
    "decay": Case(
        lambda g: lambda s, b, h, q, k: s * g[h] ** float_(q - k, s) ** 3,
        lambda s, g: s * g[:, None, None] ** np.maximum(i - j, 0) ** 3,
        gamma,
        aj.Causal(),
        i >= j,
    ),
    "log_of_distance": Case(
        lambda g: lambda s, b, h, q, k: s - g[h] * jnp.log(float_(q - k + 1, s)),
        lambda s, g: s - g[:, None, None] * np.log(np.maximum(i - j + 1, 1)),
        gamma,
        aj.Causal(),
        i >= j,
    ),
    "singular_at_zero": Case(
        lambda g: lambda s, *_: g * jnp.log(s * s), lambda s, g: g * jnp.log(s * s), np.float32(0.5)
    ),
    "singular_at_hidden_keys": Case(
        lambda g: lambda s, b, h, q, k: s + jnp.log(g[k]),
        lambda s, g: s + jnp.log(jnp.where(j < 13, g, 1)),
        np.where(j < 13, ramp, 0),
        aj.Lengths(key=jnp.array(13)),
        np.broadcast_to(j < 13, (T, T)),
    ),
    "after_a_bias_that_forbids": Case(
        lambda g: lambda s, b, h, q, k: s * g[k], lambda s, g: s * g, ramp, None, ~HOLES, (FORBIDDEN,)
    ),
    "forbids_by_itself": Case(
        lambda g: lambda s, b, h, q, k: jnp.where((q + k) % 3 == 1, -jnp.inf, s) * g[k],
        lambda s, g: s * g,
        ramp,
        aj.Causal(),
        (i >= j) & ((i + j) % 3 != 1),
    ),
    # pytorch#185991: a score function that does not read the score
    "content_free": Case(lambda g: lambda s, b, h, q, k: g[k], lambda s, g: jnp.broadcast_to(g, s.shape), ramp),
    "uniform": Case(
        lambda g: lambda s, *_: jnp.zeros_like(s), lambda s, g: jnp.zeros_like(s), gamma, aj.Causal(), i >= j
    ),
    # lucidrains/x-transformers#244: a learned temperature
    "temperature": Case(
        lambda g: lambda s, *_: jnp.tanh(s / g) * g,
        lambda s, g: jnp.tanh(s / g) * g,
        np.float32(0.5),
        aj.Causal(),
        i >= j,
    ),
    "rules": Case(
        lambda g: lambda s, b, h, q, k: jax.nn.relu(s * g[k]) + jax.nn.softplus(s) + jnp.logaddexp(s, g[q]),
        lambda s, g: jax.nn.relu(s * g) + jax.nn.softplus(s) + jnp.logaddexp(s, g[:, None]),
        ramp,
        aj.Causal(),
        i >= j,
    ),
}
INTERPRETED = {  # slow: each runs some
    "triton": ("decay", "singular_at_hidden_keys", "after_a_bias_that_forbids", "content_free"),
    "mosaic_tpu": ("log_of_distance", "forbids_by_itself", "uniform", "rules"),
}


@pytest.mark.parametrize(
    "name, implementation", [(n, x) for x in TILED for n in CASES if n in INTERPRETED.get(x, CASES)]
)
def test_gradients_where_functions_are_not_finite(name, implementation):
    """At pairs that are not seen a function may be anything. Its gradients are those of the pairs that are."""
    case = CASES[name]
    options = dict(implementation=implementation, config=EVERY_IMPLEMENTATION[implementation])

    def run(q, k, v, captured):
        score = (*case.before, aj.ScoreFn(case.function(captured)), *case.after)
        return (aj.attention(q, k, v, mask=case.mask, score=score, **options) * ROWS[3]).sum()

    derivative = lambda f: jax.value_and_grad(f, (0, 1, 2, 3))
    got = jax.jit(derivative(run))(*ROWS[:3], jnp.asarray(case.captured))
    close(got, exact(derivative(loss(case.harmless, case.visible)), *ROWS[:3], case.captured))


@pytest.mark.parametrize("name", ["log_of_distance", "forbids_by_itself"])
def test_second_derivatives_where_functions_are_not_finite(name):
    case = CASES[name]

    def run(q, captured):
        score = aj.ScoreFn(case.function(captured))
        out = aj.attention(q, *ROWS[1:3], mask=case.mask, score=score, config=xla.Config(block_q=16, block_k=16))
        return (out * ROWS[3]).sum()

    product = lambda f: lambda *x: jax.jvp(jax.grad(f, (0, 1)), x, x)
    dense = lambda q, g: loss(case.harmless, case.visible)(q, *(x.astype(q.dtype) for x in ROWS[1:3]), g)
    close(jax.jit(product(run))(ROWS[0], jnp.asarray(case.captured)), exact(product(dense), ROWS[0], case.captured))


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_a_soft_cap_that_is_learned_after_a_bias_that_forbids(implementation):
    """The cap of -inf is -cap, and so is its derivative."""
    options = dict(implementation=implementation, config=EVERY_IMPLEMENTATION[implementation])
    capped = lambda s, c: jnp.where(HOLES, -c, c * jnp.tanh(s / c))
    run = lambda q, c: (aj.attention(q, *ROWS[1:3], score=(FORBIDDEN, aj.SoftCap(c)), **options) * ROWS[3]).sum()
    dense = lambda q, c: loss(capped, True)(q, *(x.astype(q.dtype) for x in ROWS[1:3]), c)
    derivative = lambda f: jax.value_and_grad(f, (0, 1))
    close(derivative(run)(ROWS[0], jnp.float32(2.0)), exact(derivative(dense), ROWS[0], np.float32(2.0)))


# Kinds of captured arrays


def test_captured_arrays_of_every_kind():
    """Integers, booleans and complex numbers of every size, keys of jax.random, arrays mapped by vmap."""
    q, k, v, _ = ROWS
    same = {}
    for dtype in ("int8", "uint8", "int16", "uint32", "bool", "complex64", "float16"):
        x = jnp.asarray(j // 10, dtype)
        same[dtype] = aj.attention(q, k, v, mask=aj.Where(lambda b, h, q, k, x=x: x[q] == x[k]))
    want = aj.attention(q, k, v, mask=aj.Dense(i // 10 == j // 10))
    for dtype, got in same.items():
        np.testing.assert_allclose(got, want, atol=1e-6, err_msg=dtype)
    rng = jax.random.key(3)

    def coin(b, h, q, k):
        return jax.random.bernoulli(jax.random.fold_in(rng, q * T + k), 0.5)

    seen = np.asarray(aj.Where(coin).to_array(T, T))
    draw = lambda n: jax.random.bernoulli(jax.random.fold_in(rng, n), 0.5)
    np.testing.assert_array_equal(seen, jax.vmap(draw)(jnp.arange(T * T)).reshape(T, T))
    want = aj.attention(q, k, v, mask=aj.Dense(seen))
    for implementation in ("xla", "reference", "cpu"):
        got = aj.attention(q, k, v, mask=aj.Where(coin), implementation=implementation)
        np.testing.assert_allclose(got, want, atol=1e-6)
    ids = jnp.stack(IDS)
    got = jax.vmap(lambda ids: aj.attention(q, k, v, mask=aj.Where(lambda b, h, q, k: by(ids)(q, k))))(ids)
    for n in range(2):
        want = aj.attention(q, k, v, mask=aj.Dense(ids[n][:, None] == ids[n]))
        np.testing.assert_allclose(got[n], want, atol=1e-6)


# Copies


@pytest.mark.parametrize(
    "made",
    [
        aj.Where(index_functions.near),
        aj.ScoreFn(index_functions.tilt),
        aj.Causal() & ~aj.Where(index_functions.near, scan=True),
        jax.tree.map(lambda x: x + 1, aj.ScoreFn(index_functions.tilt)),
        aj.Segments(IDS[0]) | aj.Window(3, jnp.array(2)),
        aj.Bias(jnp.ones((N, T, T))),
        aj.ALiBi.for_heads(4),
        aj.Dropout(0.1, 3),
        *[kernel.Config() for kernel in (cpu, mosaic_tpu, triton, xla)],
    ],
    ids=repr,
)
def test_pickle_and_deepcopy(made):
    """attention-gym#78, torchtitan#3428: a block mask could be neither pickled nor copied."""
    for again in (pickle.loads(pickle.dumps(made)), copy.deepcopy(made), copy.copy(made)):
        assert jax.tree.structure(again) == jax.tree.structure(made)
        for x, y in zip(jax.tree.leaves(again), jax.tree.leaves(made), strict=True):
            np.testing.assert_array_equal(x, y)
    if hasattr(made, "to_array") and not isinstance(made, aj.ALiBi):
        want = np.asarray(made.to_array(T, T))
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(made)).to_array(T, T), want)
        np.testing.assert_array_equal(copy.deepcopy(made).to_array(T, T), want)


def test_functions_without_a_name_are_copied_but_not_pickled():
    shift = jnp.arange(T)
    made = aj.Where(lambda b, h, q, k: q >= shift[k])
    np.testing.assert_array_equal(copy.deepcopy(made).to_array(T, T), made.to_array(T, T))
    with pytest.raises((pickle.PicklingError, AttributeError), match="Can't .*pickle .*<lambda>"):
        pickle.dumps(made)
    with pytest.raises(pickle.PicklingError, match="this Where cannot be pickled: its Python function is gone"):
        pickle.dumps(jax.tree.map(lambda x: x, aj.Where(lambda b, h, q, k: q >= k)))


def test_a_function_that_captures_something_else_is_not_unpickled(monkeypatch):
    data = pickle.dumps(aj.ScoreFn(index_functions.tilt))
    monkeypatch.setattr(index_functions, "TABLE", jnp.ones(7))
    with pytest.raises(ValueError, match="pickled ScoreFn captured .*20.* when it was pickled, and now .*7"):
        pickle.loads(data)


# Errors


def test_numpy_inside_of_a_function_is_refused_by_name():
    table = np.arange(T)
    with pytest.raises(TypeError, match=r"function of Where gives its indices.* to NumPy.*jax.numpy.asarray\(array\)"):
        aj.Where(lambda b, h, q, k: table[q] == table[k])


def test_a_refusal_names_the_array_and_what_captured_it():
    table = jnp.ones(2 * T, jnp.float32)
    with pytest.raises(NotImplementedError, match=r"of an array float32\[40\], in a ScoreFn"):
        aj.attention(
            *ROWS[:3],
            score=aj.ScoreFn(lambda s, b, h, q, k: s + table[q - k]),
            implementation="triton",
            config=EVERY_IMPLEMENTATION["triton"],
        )


def test_programs_keep_no_captured_array_alive():
    """Caches keep static parts of programs for good: an array in them would never be freed, and a tracer leak."""

    def captures():
        array = jnp.arange(7) + 1
        return aj.Where(lambda b, h, q, k: array[k] > q).predicate, weakref.ref(array)

    function, seen = captures()
    gc.collect()
    assert seen() is None and hash(function) is not None
