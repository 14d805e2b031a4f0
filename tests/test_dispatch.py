"""Which implementation runs what, on which platform, and what `explain` says about it. The numbers are elsewhere."""

import functools
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attnjax as aj
from attnjax.attention import build
from attnjax.core.dispatch import KERNELS, PARTS, choose
from attnjax.kernels import cpu, xla

X = jax.ShapeDtypeStruct((1, 256, 4, 32), jnp.float32)
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def choices(platform="cpu", **options):
    return aj.explain(X, X, X, platform=platform, **options).choices


def names(platform="cpu", **options):
    return {part: choice.name for part, choice in choices(platform, **options).items()}


@pytest.mark.compiled
def test_on_a_cpu_the_compiled_kernel_goes_first():
    """Its two parts; the others are those of the tiled code. Named, nothing changes."""
    parts = {"forward": "cpu", "backward": "cpu", "tangent": "xla", "higher": "xla"}
    assert names() == names(implementation="cpu") == names(config=cpu.Config(threads=1)) == parts
    assert (
        choices()["tangent"].reasons["cpu"] == "has forward and backward; other derivatives are those of the tiled code"
    )
    assert choices()["forward"].reasons["xla"] == "cpu is faster here"
    assert choices(implementation="cpu")["forward"].reasons["xla"] == "implementation='cpu' was asked for"


@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_name_or_a_config_is_obeyed_in_every_part(platform):
    for options in ({"implementation": "xla"}, {"config": xla.Config(block_q=16)}):
        assert names(platform, **options) == dict.fromkeys(PARTS, "xla")
    assert names(platform, implementation="reference") == dict.fromkeys(PARTS, "reference")


@pytest.mark.parametrize("platform", PLATFORMS)
def test_every_other_one_has_a_reason(platform):
    for choice in choices(platform).values():
        assert set(choice.reasons) == set(KERNELS) - {choice.name}
        assert all(choice.reasons.values())
    assert "ask for it by name" in choices(platform)["forward"].reasons["reference"]


@pytest.mark.compiled
def test_exported_programs_do_without_the_compiled_kernel():
    problem, operands = build(X, X, X)
    choice = choose(problem, operands, "cpu", "forward", exported=True)
    assert choice.name == "xla"
    assert choice.reasons["cpu"] == "jax.export: the program could not be loaded without attnjax"
    named, operands = build(X, X, X, implementation="cpu")
    assert choose(named, operands, "cpu", "forward", exported=True).name == "cpu"


def test_without_the_library(monkeypatch):
    """Where it was not built everything works, and the name says what is missing."""
    reason = "the compiled kernel was not built"
    monkeypatch.setattr(cpu, "_library", lambda: reason)
    assert cpu.instruction_sets() == () and cpu.missing() == reason
    assert names() == dict.fromkeys(PARTS, "xla")
    assert choices()["forward"].reasons["cpu"] == reason
    with pytest.raises(NotImplementedError, match=f"implementation 'cpu' cannot: {reason}. xla, reference can"):
        choices(implementation="cpu")
    with pytest.raises(ValueError, match=f"isa must be one of .*none: {reason}.*got 'avx2'"):
        cpu.Config(isa="avx2")
    q = jnp.ones((3, 2, 4))
    np.testing.assert_array_equal(aj.attention(q, q, q), aj.attention(q, q, q, implementation="xla"))


def test_a_library_that_cannot_be_loaded(monkeypatch, tmp_path):
    (tmp_path / "native").mkdir()
    monkeypatch.setattr(cpu, "__file__", str(tmp_path / "cpu.py"))
    load = cpu._library.__wrapped__
    assert load().startswith("the compiled kernel was not built: install attnjax where there is a C++17 compiler, ")
    (tmp_path / "native" / "libattnjax_cpu.so").write_text("no library")
    assert load().startswith("the compiled kernel cannot be loaded: ")


DERIVATIVES = {
    "tangent": lambda f, q: jax.jvp(f, (q,), (q,)),
    "forward_over_reverse": lambda f, q: jax.jvp(jax.grad(f), (q,), (q,)),
    "reverse_over_reverse": lambda f, q: jax.grad(lambda q: jnp.vdot(jax.grad(f)(q), q))(q),
    "forward_over_forward": lambda f, q: jax.jvp(lambda q: jax.jvp(f, (q,), (q,))[1], (q,), (q,)),
    "hessian": lambda f, q: jax.hessian(f)(q),
}


@pytest.mark.compiled
@pytest.mark.parametrize("derive", DERIVATIVES.values(), ids=DERIVATIVES)
def test_derivatives_that_the_named_kernel_has_not(derive):
    """With a name or a config of it the value is the kernel's, and its other derivatives those of the tiled code."""
    q = jnp.asarray(np.random.default_rng(0).normal(size=(6, 2, 4)), jnp.float32)
    loss = lambda q, **options: jnp.sin(aj.attention(q, q, q, mask=aj.Causal(), **options)).sum()
    want = derive(functools.partial(loss, implementation="reference"), q)
    for options in ({"implementation": "cpu"}, {"config": cpu.Config(threads=1)}, {}):
        got = derive(functools.partial(loss, **options), q)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


@pytest.mark.compiled
def test_explanation_of_the_compiled_kernel():
    """Its blocks are those of its block map, which it counts as every implementation does."""
    found = aj.explain(X, X, X, mask=aj.Causal(), platform="cpu")
    text = str(found)
    assert "forward              cpu" in text and "tangent (jvp)        xla" in text
    assert found.blocks is not None and found.block_counts is not None
    sizes = dict(block_q=found.blocks.block_q, block_k=found.blocks.block_k)
    counts = aj.BlockMap.build(aj.Causal(), 256, 256, **sizes).counts()
    assert found.block_counts == {kind: 4 * count for kind, count in counts.items()}
    assert all(0 < found.temporary_bytes[part] < 2**26 for part in ("forward", "backward", "tangent"))


def test_blocks_of_a_million_positions_are_counted_in_little_memory():
    """No map of all blocks is made: 240 million of them on CPUs. A function is counted where it is looked at."""
    x, n = jax.ShapeDtypeStruct((10**6, 1, 64), "float32"), 10**6 // 64
    odd = aj.Where(lambda b, h, q, k: (q + k) % 2 == 1)
    config = aj.kernels.xla.Config(block_q=64, block_k=64)
    edge = {"empty": n * n - 2 * n + 1, "partial": 2 * n - 1, "full": 0}
    counted = [
        (aj.Causal(), {"empty": n * (n - 1) // 2, "partial": n, "full": n * (n - 1) // 2}),
        (aj.Window(63, 0), edge),
        (aj.Window(63, 0) & odd, edge),
        (odd, {"empty": 0, "partial": n * n, "full": 0}),
        (None, {"empty": 0, "partial": 0, "full": n * n}),
    ]
    tracemalloc.start()
    try:
        for mask, counts in counted:
            assert aj.explain(x, x, x, mask=mask, config=config, platform="cpu").block_counts == counts
        assert tracemalloc.get_traced_memory()[1] < 2**26
    finally:
        tracemalloc.stop()


@pytest.mark.compiled
def test_what_is_explained_is_what_would_run():
    """NumPy's int64, which JAX takes for int32 when it runs, does not change the choice."""
    ids = np.arange(256) // 100
    assert ids.dtype == np.int64
    assert names(mask=aj.Segments(ids) & aj.Causal(np.int64(2))) == names(mask=aj.Causal())


def test_a_user_given_map_is_what_is_explained():
    block_map = aj.BlockMap.build(aj.Causal(), 256, 256, block_q=32, block_k=16)
    found = aj.explain(X, X, X, mask=aj.Causal(), block_map=block_map, platform="cpu")
    assert (found.blocks.block_q, found.blocks.block_k) == (32, 16)


@pytest.mark.compiled
def test_a_gradient_that_the_kernel_lacks_comes_from_another(monkeypatch):
    """The rest stays where it was, and explain says who gives what."""
    q = jax.random.normal(jax.random.key(0), (19, 2, 8))
    slopes = jnp.array([0.5, 0.25])
    loss = lambda q, slopes, name: jnp.sin(aj.attention(q, q, q, score=aj.ALiBi(slopes), implementation=name)).sum()
    want = jax.grad(loss, argnums=(0, 1))(q, slopes, "xla")
    monkeypatch.setattr(cpu, "gradients", lambda problem, operands: (0, 1, 2), raising=False)
    told = aj.explain(q, q, q, score=aj.ALiBi(slopes), platform="cpu")
    assert told.choices["backward"].name == "cpu"
    assert told.choices["backward of ALiBi.slopes"].name == "xla"
    assert told.choices["backward of ALiBi.slopes"].reasons["cpu"] == "cannot give the gradient of ALiBi.slopes"
    assert "backward of ALiBi.slopes  xla" in str(told)
    for name in (None, "cpu"):
        got = jax.grad(loss, argnums=(0, 1))(q, slopes, name)
        for a, b in zip(got, want, strict=True):
            assert jnp.allclose(a, b, rtol=1e-4, atol=1e-5)
