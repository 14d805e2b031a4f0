"""The functions that have a name of their own, and the drop-in for jax.nn.dot_product_attention."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import MASKS, SCORE_VARIANTS, SCORES, VARIANTS
from oracle import Index, Problem, Shape, expected
from problems import DTYPES, IMPLEMENTATIONS, Case, draw, precision, problem

import attnjax as aj

SHAPE = Shape(batch=(2,), V=19)  # jax.nn wants value heads of the size of the others


def drawn(rng, shape=SHAPE, dtype="float32"):
    return {name: jnp.asarray(rng.normal(size=size), dtype) for name, size in shape.query_key_value().items()}


def forward(problem, x):
    """The oracle's out and lse alone, with their budgets."""
    rows = (*problem.shape.batch, problem.shape.T, problem.shape.N)
    dtype = x["query"].dtype
    cotangents = (
        jnp.zeros((*rows, problem.shape.V), dtype),
        jnp.zeros(rows, "float32" if dtype.itemsize < 4 else dtype),
    )
    return expected(problem, x, x, cotangents)


def agrees(problem, x, out, lse=None):
    want = forward(problem, x)
    lse = want.answer.lse if lse is None else lse
    want.check(want.answer._replace(out=out, lse=lse))


q, k = np.arange(SHAPE.T)[:, None], np.arange(SHAPE.S)
full = (SHAPE.B, SHAPE.N, SHAPE.T, SHAPE.S)


@pytest.mark.parametrize("implementation", [None, *IMPLEMENTATIONS])
def test_full_attention(rng, implementation):
    x = drawn(rng)
    agrees(Problem(SHAPE), x, *aj.full_attention(*x.values(), implementation=implementation, return_lse=True))


@pytest.mark.parametrize("offset", [0, 5, -3])
def test_causal_attention(rng, offset):
    x = drawn(rng)
    out = aj.causal_attention(*x.values(), offset=offset)
    agrees(Problem(SHAPE, np.broadcast_to(k <= q + offset, full)), x, out)


def test_causal_attention_with_a_traced_offset_per_example(rng):
    x = drawn(rng)
    offsets = np.array([2, -6])
    out = jax.jit(lambda offset: aj.causal_attention(*x.values(), offset=offset))(jnp.asarray(offsets))
    agrees(Problem(SHAPE, np.broadcast_to(k <= q + offsets[:, None, None, None], full)), x, out)


@pytest.mark.parametrize("sizes", [(16, 16), (10, 7), (1, 64), (100, 100)], ids=str)
def test_chunked_attention(rng, sizes):
    """The chunks are how the work is cut, not who sees whom."""
    x = drawn(rng)
    out = aj.chunked_attention(*x.values(), query_chunk_size=sizes[0], key_chunk_size=sizes[1])
    agrees(Problem(SHAPE), x, out)


def test_names_take_what_attention_takes(rng):
    x = drawn(rng)
    bias, sinks = jnp.asarray(rng.normal(size=(SHAPE.N, 1, SHAPE.S)), jnp.float32), jnp.ones(SHAPE.N)
    kwargs = dict(score=aj.Bias(bias), sinks=sinks, scale=0.3, return_lse=True)
    x |= {"sinks": sinks, "bias": bias}
    problem = Problem(SHAPE, None, lambda s, i, x: s + i.per(x["bias"], "nts"), 0.3)
    qkv = [x[name] for name in ("query", "key", "value")]
    agrees(problem, x, *aj.full_attention(*qkv, **kwargs))
    agrees(problem, x, *aj.chunked_attention(*qkv, query_chunk_size=16, key_chunk_size=16, **kwargs))
    visible = np.broadcast_to(k <= q, full)
    agrees(Problem(SHAPE, visible, problem.score, 0.3), x, *aj.causal_attention(*qkv, **kwargs))


def test_the_drop_in_has_the_signature_of_jax_nn():
    ours = inspect.signature(aj.dot_product_attention).parameters
    theirs = inspect.signature(jax.nn.dot_product_attention).parameters
    assert list(ours) == list(theirs)
    for name in theirs:
        assert (ours[name].kind, ours[name].default) == (theirs[name].kind, theirs[name].default), name


lengths = lambda n: jnp.array(n, jnp.int32)
per = lambda n: np.array(n)[:, None, None, None]
random = np.random.default_rng(1)
MASK = random.random((2, 1, SHAPE.T, SHAPE.S)) < 0.5
MASK[..., 0] = True  # jax.nn gives the mean of all values to a row that sees nothing, which is not what is compared
BIAS = random.normal(size=(1, SHAPE.N, SHAPE.T, SHAPE.S)).astype(np.float32)

# name: arguments of jax.nn, who sees whom, bias, scale
CALLS = {
    "plain": ({}, True, None, None),
    "scale": ({"scale": 0.5}, True, None, 0.5),
    "causal": ({"is_causal": True}, k <= q, None, None),
    "mask": ({"mask": jnp.asarray(MASK)}, MASK, None, None),
    "key_mask": ({"mask": jnp.asarray(MASK[:, :, :1])}, MASK[:, :, :1], None, None),
    "bias": ({"bias": jnp.asarray(BIAS)}, True, BIAS, None),
    "bias_and_mask": ({"bias": jnp.asarray(BIAS), "mask": jnp.asarray(MASK)}, MASK, BIAS, None),
    "window": ({"local_window_size": (6, 30)}, (q - 6 <= k) & (k <= q + 30), None, None),
    "window_of_one_number": ({"local_window_size": 8}, (q - 8 <= k) & (k <= q + 8), None, None),
    "causal_window": ({"local_window_size": (6, 3), "is_causal": True}, (q - 6 <= k) & (k <= q), None, None),
    "key_lengths": ({"key_value_seq_lengths": lengths([11, 40])}, k < per([11, 40]), None, None),
    "both_lengths": (
        {"query_seq_lengths": lengths([20, 37]), "key_value_seq_lengths": lengths([53, 9])},
        (q < per([20, 37])) & (k < per([53, 9])),
        None,
        None,
    ),
    "everything": (
        {
            "bias": jnp.asarray(BIAS),
            "mask": jnp.asarray(MASK),
            "scale": 0.2,
            "is_causal": True,
            "key_value_seq_lengths": lengths([11, 40]),
            "local_window_size": (50, 50),
        },
        MASK & (k <= q) & (q - 50 <= k) & (k < per([11, 40])),
        BIAS,
        0.2,
    ),
}


@pytest.mark.parametrize("arguments, visible, bias, scale", CALLS.values(), ids=CALLS)
def test_the_drop_in_computes_what_jax_nn_computes(rng, arguments, visible, bias, scale):
    """Ours is within its budget of the oracle; jax.nn is close to the same oracle wherever a row sees something."""
    x = drawn(rng)
    problem = Problem(
        SHAPE,
        np.broadcast_to(visible, full),
        (lambda s, i, x: s + i.per(jnp.asarray(bias, s.dtype), "nts")) if bias is not None else None,
        scale,
    )
    out, residual = aj.dot_product_attention(*x.values(), **arguments, return_residual=True)
    agrees(problem, x, out, residual)
    np.testing.assert_array_equal(aj.dot_product_attention(*x.values(), **arguments), out)
    theirs = np.asarray(jax.nn.dot_product_attention(*x.values(), **arguments))
    sees = np.isfinite(np.asarray(residual))
    assert sees.any()
    np.testing.assert_allclose(np.asarray(out)[sees], theirs[sees], rtol=1e-4, atol=1e-5)


def test_the_drop_in_without_batch_axis(rng):
    x = drawn(rng, Shape(batch=(), V=19))
    out = aj.dot_product_attention(*x.values(), is_causal=True)
    np.testing.assert_allclose(out, jax.nn.dot_product_attention(*x.values(), is_causal=True), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_residual_is_not_rounded_and_has_a_gradient(rng, dtype):
    """Two of the differences that are meant: jax.nn rounds the residual to the inputs' dtype and stops its gradient."""
    with precision(dtype):
        x = drawn(rng, dtype=dtype)
        run = lambda q: aj.dot_product_attention(q, x["key"], x["value"], return_residual=True)[1]
        residual = run(x["query"])
        assert residual.dtype == ("float64" if dtype == "float64" else "float32")
        want = forward(Problem(SHAPE), x)
        want.check(want.answer._replace(lse=residual))
        assert np.abs(np.float32(jax.grad(lambda q: run(q).sum())(x["query"]))).max() > 0.01


def test_rows_that_see_nothing_give_zero_in_the_drop_in(rng):
    """The third difference: jax.nn gives the mean of all values."""
    x = drawn(rng)
    out = aj.dot_product_attention(*x.values(), mask=jnp.zeros((1, 1, SHAPE.T, SHAPE.S), bool))
    assert not np.asarray(out).any()


@pytest.mark.parametrize("implementation", ["xla", None])
def test_the_drop_in_takes_jax_nns_implementations(rng, implementation):
    x = drawn(rng)
    agrees(Problem(SHAPE), x, aj.dot_product_attention(*x.values(), implementation=implementation))


LOGITS = [("full", "softcap_static"), ("combined", "alibi"), ("where", "function"), ("lengths_static", "bias_full")]


@pytest.mark.parametrize("mask, score", LOGITS, ids=str)
def test_the_largest_logit_of_each_query(mask, score):
    """Against the oracle's own formula in float64; -inf where nothing is seen. vmap gives the same, and no gradient."""
    named = lambda name, table: next(case for case in table if case.name == name)
    case = Case(named(mask, (*MASKS, *VARIANTS)), named(score, (*SCORES, *SCORE_VARIANTS)), SHAPE)
    inputs, shape = draw(case, "float32"), case.shape
    of_case, index = problem(case, inputs.d), Index(case.shape)
    run = lambda q, k: aj.max_logit(q, k, mask=case.mask.mask(inputs.d), score=case.score.score(inputs.x))
    got, pull = jax.vjp(run, inputs.x["query"], inputs.x["key"])
    with jax.enable_x64(True):
        x = {name: a.astype("float64") for name, a in inputs.x.items()}
        q = x["query"].reshape(shape.B, shape.T, shape.N, shape.H)
        k = x["key"].reshape(shape.B, shape.S, shape.K, shape.H).repeat(shape.N // shape.K, axis=2)
        logits = of_case.score(jnp.einsum("btnh,bsnh->bnts", q, k) * shape.H**-0.5, index, x)
        want = np.where(of_case.visible, logits, -np.inf).max(-1).swapaxes(1, 2)
    np.testing.assert_allclose(got, want.reshape(got.shape), rtol=1e-5, atol=1e-5)
    assert got.dtype == jnp.float32 and not any(jnp.any(x) for x in pull(got))


def test_the_largest_logit_in_little_memory():
    """No T x S matrix; mapped and compiled; what does not fit is refused as by `attention`."""
    x = jax.ShapeDtypeStruct((2, 4096, 2, 8), jnp.float32)
    mapped = jax.jit(jax.vmap(lambda q, k: aj.max_logit(q, k, mask=aj.Causal()).max(0))).lower(x, x).compile()
    assert mapped.memory_analysis().temp_size_in_bytes < 4096 * 4096
    assert mapped.out_info.shape == (2, 2)
    with pytest.raises(TypeError, match="key must be an array, got NoneType"):
        aj.max_logit(jnp.ones((3, 2, 8)), None)
    with pytest.raises(TypeError, match="query is a jax.ShapeDtypeStruct, no array"):
        aj.max_logit(x, jnp.ones((3, 2, 8)))
