"""The compiled kernel: scales and caps that are arrays, NaN that stays where it is seen, long sums, long windows."""

import functools
import pathlib
import platform

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import DTYPES

import attnjax as aj
from attnjax.kernels import cpu

pytestmark = pytest.mark.compiled


def normal(*size, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=size), dtype)


def test_instruction_sets_are_those_of_the_processor():
    """A set that the compiler could not build is left out without an error, so that nobody would miss it."""
    if platform.machine() != "x86_64":
        assert cpu.instruction_sets() == ("portable",)
        return
    text = pathlib.Path("/proc/cpuinfo").read_text()
    flags = set(next(line for line in text.splitlines() if line.startswith("flags")).split(":")[1].split())
    avx2 = {"avx2", "fma", "bmi2"} <= flags
    avx512 = avx2 and {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"} <= flags
    want = ["avx512_bf16"] * (avx512 and "avx512_bf16" in flags) + ["avx512"] * avx512 + ["avx2"] * avx2
    assert cpu.instruction_sets() == (*want, "portable")


SCALES = {"number": (), "head": (4,), "entry_and_head": (2, 4), "entry": (2, 1)}


@pytest.mark.parametrize("size", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("t", [1, 70])
def test_scales_and_caps_that_are_arrays(t, size):
    """Value and gradients, also where a scale is 0, on every instruction set; several caps in one call."""
    q, k, v = normal(2, t, 4, 16), normal(2, 150, 2, 16, seed=1), normal(2, 150, 2, 8, seed=2)
    scale, cap, bias = normal(*size, seed=3), 1 + normal(2, seed=4) ** 2, normal(4, 1, 150, seed=5)
    scale = scale.at[..., 0].set(0.0) if size else scale

    @functools.partial(jax.jit, static_argnums=0)
    def solve(config, *x):
        def loss(q, k, v, scale, cap, bias):
            score = (aj.SoftCap(cap), aj.Bias(bias), aj.SoftCap(3.0), aj.SoftCap(cap.sum()))
            named = {"implementation": "reference"} if config is None else {"config": config}
            out = aj.attention(q, k, v, mask=aj.Causal(150 - t), scale=scale, score=score, **named)
            return jnp.sin(out).sum()

        return jax.grad(loss, argnums=range(6))(*x)

    x = (q, k, v, scale, cap, bias)
    with jax.enable_x64(True):
        want = [np.asarray(a) for a in solve(None, *(np.float64(a) for a in x))]
    for isa in cpu.instruction_sets():
        for got, one in zip(solve(cpu.Config(isa=isa), *x), want, strict=True):
            assert np.abs(np.float64(got) - one).max() <= 2e-5 * np.abs(one).max(), isa


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != "float64"])
@pytest.mark.parametrize("heads, key_heads", [(2, 2), (4, 1)])
def test_documents_do_not_reach_each_other(dtype, heads, key_heads):
    """NaN and inf in one of them, in queries, keys, values or cotangents: the others have the same bits as without."""
    t, lo, hi = 233, 77, 151
    sizes = (t, heads, 16), (t, key_heads, 16), (t, key_heads, 16), (t, heads, 16)
    clean = [normal(*size, seed=n, dtype=dtype) for n, size in enumerate(sizes)]
    ids = jnp.asarray(np.searchsorted([lo, hi], np.arange(t), side="right"), jnp.int32)
    others = np.r_[:lo, hi:t]

    @functools.partial(jax.jit, static_argnums=0)
    def solve(config, q, k, v, ct):
        mask = aj.Segments(ids) & aj.Window(90, 40)
        out, pull = jax.vjp(lambda q, k, v: aj.attention(q, k, v, mask=mask, config=config), q, k, v)
        return out, *pull(ct)

    for isa in cpu.instruction_sets():
        want = solve(cpu.Config(isa=isa), *clean)
        for spoilt in [{0}, {1}, {2}, {3}, {0, 1, 2, 3}]:
            x = [a.at[hi - 5].set(np.nan).at[lo + 3].set(np.inf) if n in spoilt else a for n, a in enumerate(clean)]
            got = solve(cpu.Config(isa=isa), *x)
            for a, b in zip(got, want, strict=True):
                np.testing.assert_array_equal(np.float32(a[others]), np.float32(b[others]), err_msg=f"{isa} {spoilt}")
            assert np.isnan(np.float32(got[0][hi - 5])).all() or spoilt == {3}  # who sees it has it


def test_many_entries_that_share_a_bias():
    """Its gradient is one long sum of float32."""
    q, k, v, ct = (normal(2000, 16, 8, 8, seed=n) for n in range(4))
    bias = normal(16, 16, seed=4)
    loss = lambda bias: jnp.vdot(aj.attention(q, k, v, score=aj.Bias(bias), implementation="cpu"), ct)
    got = jax.jit(jax.grad(loss))(bias)
    q, k, v, ct, bias = (np.float64(a) for a in (q, k, v, ct, bias))
    logits = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(8) + bias
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    d_weights = np.einsum("btnh,bsnh->bnts", ct, v)
    want = (weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True))).sum((0, 1))
    assert np.abs(np.float64(got) - want).max() <= 4 * np.finfo(np.float32).eps * np.abs(want).max()


def test_a_window_in_a_million_keys():
    """What a program holds and takes grows with T + S, not with T x S: this would be 1.3 GB, and hours."""
    length = 10**6
    q = jax.ShapeDtypeStruct((length, 1, 8), jnp.float32)
    attend = lambda q: aj.attention(q, q, q, mask=aj.Window(63, 0), implementation="cpu")
    program = jax.jit(attend).lower(q)
    x = normal(length, 1, 8)
    got = program.compile()(x)
    for start in (0, 500_000, length - 100):
        part = x[max(start - 63, 0) : start + 100]
        want = aj.attention(part, part, part, mask=aj.Window(63, 0), implementation="reference")
        skip = min(start, 63)
        np.testing.assert_allclose(got[start : start + 100], want[skip:], rtol=1e-5, atol=1e-5)
