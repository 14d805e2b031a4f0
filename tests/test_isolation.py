"""Packed documents do not reach each other, even when one of them holds NaN; rows that see NaN have it. Bit for bit.

The compiled kernel's are in test_cpu_isolation, on each of its instruction sets.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import EVERY_IMPLEMENTATION, REFUSED

import attnjax as aj

T, S, N, K, H, V = 37, 53, 4, 2, 8, 6
# Three documents, whose ends lie inside of tiles of 16 x 16. The second one is spoilt.
ROWS, KEYS = ((np.arange(length)[:, None] >= ends).sum(1) for length, ends in ((T, (9, 22)), (S, (20, 37))))
OTHERS = np.flatnonzero(ROWS != 1), np.flatnonzero(KEYS != 1)
PAIRS = OTHERS[0][:, None], OTHERS[1]
NAMES = ("query", "key", "value", "bias", "ct")
FIRST = {"query": 10, "key": 23, "value": 23, "bias": (10, 23), "ct": 10}
LAST = {"query": 21, "key": 36, "value": 36, "bias": (21, 30), "ct": 21}


def arrays(dtype):
    rng = np.random.default_rng(0)
    sizes = {"query": (T, N, H), "key": (S, K, H), "value": (S, K, V), "ct": (T, N, V), "bias": (T, S), "sinks": (N,)}
    return {name: jnp.asarray(rng.normal(size=size), dtype) for name, size in sizes.items()}


def attend(x, **options):
    mask = aj.Segments(jnp.asarray(ROWS), jnp.asarray(KEYS)) & aj.Causal(18)
    score = (aj.SoftCap(3.0), aj.Bias(x["bias"]))
    q, k, v = (x[name] for name in NAMES[:3])
    return aj.attention(q, k, v, mask=mask, score=score, sinks=x["sinks"], return_lse=True, **options)


def first_order(options, x):
    """Output, log-sum-exp, and what the others' parts of the gradients are."""
    (out, lse), pull = jax.vjp(lambda x: attend(x, **options), x)
    (gradients,) = pull((x["ct"], x["ct"][..., 0].astype(lse.dtype)))
    rows, keys = OTHERS
    made = [out[rows], lse[rows], gradients["query"][rows], gradients["key"][keys], gradients["value"][keys]]
    return *made, gradients["bias"][PAIRS], out


def second_order(options, x):
    """The same and its tangent, along the arrays themselves."""
    return jax.jvp(functools.partial(first_order, options), (x,), (x,))


@pytest.mark.device
@pytest.mark.parametrize("implementation", [name for name in EVERY_IMPLEMENTATION if name != "cpu"])
def test_documents_do_not_reach_each_other(implementation):
    """Values and gradients, and where the implementation has derivatives of its own their tangents."""
    refused = REFUSED.get(implementation, {})
    x = arrays("bfloat16" if "float32" in refused else "float32")
    options = {"implementation": implementation, "config": EVERY_IMPLEMENTATION[implementation]}
    derived = implementation in ("reference", "xla")
    run = jax.jit(functools.partial(second_order if derived else first_order, options))
    want = jax.tree.leaves(run(x))
    assert all(np.isfinite(a).all() for a in want)
    for spoilt in (*([name] for name in NAMES), NAMES):
        bad = {name: x[name].at[LAST[name]].set(jnp.nan).at[FIRST[name]].set(jnp.inf) for name in spoilt}
        got = jax.tree.leaves(run(x | bad))
        first = len(got) // 2 if derived else len(got)
        for n, (a, b) in enumerate(zip(got, want, strict=True)):
            if n % first < 6:
                np.testing.assert_array_equal(np.float32(a), np.float32(b), err_msg=f"{spoilt} {n}")
        if spoilt != ["ct"]:
            assert np.isnan(got[first - 1][21]).all()  # who sees it has it
        if spoilt == ["value"] and derived:
            assert np.isposinf(got[first - 1][9]).all()  # this row sees the infinity alone


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_examples_share_query_and_key(implementation, rng):
    """Values and a bias with -inf are mapped: the gradients are those of each example alone."""
    normal = lambda *size: jnp.asarray(rng.normal(size=size), jnp.float32)
    query, key, values = normal(1, 21, 2, 3), normal(1, 21, 1, 3), normal(3, 1, 21, 1, 8)
    biases = (lambda x: jnp.where(x > 0.8, -jnp.inf, x))(normal(3, 1, 1, 21, 21))

    def gradients(query, key, value, bias):
        options = dict(mask=aj.Prefix(jnp.array([13])), score=aj.Bias(bias), implementation=implementation)
        return jax.grad(lambda q, k: (aj.attention(q, k, value, **options) ** 2).sum(), argnums=(0, 1))(query, key)

    got = jax.jit(jax.vmap(gradients, in_axes=(None, None, 0, 0)))(query, key, values, biases)
    want = [gradients(query, key, value, bias) for value, bias in zip(values, biases, strict=True)]
    for one, other in zip(got, zip(*want, strict=True), strict=True):
        np.testing.assert_allclose(one, jnp.stack(other), rtol=1e-4, atol=1e-5)
