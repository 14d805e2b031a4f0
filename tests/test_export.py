"""`jax.export` of attention and its derivatives: to each platform and to several, to bytes and back.

Only programs for the CPU are run, and give the numbers that the function itself gives there.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from derivatives import derive, drawn, everything, like, little, total
from jax import export
from problems import FAST_COMPILE

import attnjax as aj
from attnjax.kernels import cpu

FLOATS, INTEGERS = drawn()
jit = functools.partial(jax.jit, compiler_options=FAST_COMPILE)


def gradient(x, d):
    function = functools.partial(everything, d=d)
    return derive(total(function, like(jax.eval_shape(function, x), 1)), "R", ())(x)


def hessian_product(x, d):
    loss = lambda x: jnp.sin(little(x, d)[0]).sum()
    return jax.jvp(jax.grad(loss), (x,), (x,))[1]


FUNCTIONS = {"forward": everything, "gradient": gradient}
PLATFORMS = {"cpu": ["cpu"], "cuda": ["cuda"], "tpu": ["tpu"], "several": ["cpu", "cuda", "tpu"]}


@pytest.mark.parametrize("platforms", PLATFORMS.values(), ids=PLATFORMS)
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_export_and_back(function, platforms):
    """Every platform's program can be written down here, without such a device, and read again."""
    again = exported(function, platforms)
    if "cpu" not in platforms:
        with pytest.raises(ValueError, match="exported for platforms"):
            again.call(FLOATS, INTEGERS)
        return
    got, want = (jit(f)(FLOATS, INTEGERS) for f in (again.call, function))
    close(got, want)


def test_export_of_second_order():
    exported(hessian_product, PLATFORMS["several"])


def test_what_is_exported_can_be_differentiated():
    """The exported function carries its own gradient when it is asked to."""
    again = exported(little, ["cpu"], vjp_order=1)
    loss = lambda call: lambda x: jnp.sin(call(x, INTEGERS)[0]).sum()
    close(*(jit(jax.grad(loss(call)))(FLOATS) for call in (again.call, little)))


def simple(x, implementation=None):
    options = dict(mask=aj.Causal(), score=(aj.SoftCap(3.0), aj.ALiBi(x["slopes"])), implementation=implementation)
    call = lambda x: aj.attention(x["query"], x["key"], x["value"], **options)
    return call(x), jax.grad(lambda x: jnp.sin(call(x)).sum())(x)


def test_an_exported_program_has_no_compiled_kernel_in_it():
    """It is to run where attnjax may not be installed; named, the kernel is in it, for those who say that they know."""
    program = export.export(jit(simple), platforms=["cpu"])(FLOATS)
    assert "custom_call" not in program.mlir_module()
    want = jit(functools.partial(simple, implementation="xla"))(FLOATS)
    close(export.deserialize(program.serialize()).call(FLOATS), want)


@pytest.mark.compiled
def test_exporting_the_compiled_kernel_by_name():
    named = jit(functools.partial(simple, implementation="cpu"))
    with pytest.raises(ValueError, match="Cannot serialize code with custom calls whose targets have no compatibility"):
        export.export(named, platforms=["cpu"])(FLOATS)
    allowed = [export.DisabledSafetyCheck.custom_call(f"attnjax_{part}") for part in cpu.PARTS]
    program = export.export(named, platforms=["cpu"], disabled_checks=allowed)(FLOATS)
    assert "attnjax_backward" in program.mlir_module()
    jax.tree.map(np.testing.assert_array_equal, export.deserialize(program.serialize()).call(FLOATS), named(FLOATS))
    with pytest.raises(NotImplementedError, match="runs on CPUs only, not on cuda"):
        export.export(named, platforms=["cuda"], disabled_checks=allowed)(FLOATS)


def exported(function, platforms, **options):
    """The function after a round trip through bytes, with its platforms and shapes checked."""
    bytes_ = export.export(jax.jit(function), platforms=platforms)(FLOATS, INTEGERS).serialize(**options)
    again = export.deserialize(bytes_)
    shapes = lambda arrays: [(a.shape, a.dtype) for a in jax.tree.leaves(arrays)]
    assert shapes(again.out_avals) == shapes(jax.eval_shape(function, FLOATS, INTEGERS))
    assert again.platforms == tuple(platforms)
    assert "custom_call" not in again.mlir_module(), "the program needs code which is not in it"
    return again


def close(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        largest = float(jnp.max(jnp.abs(b), where=jnp.isfinite(b), initial=0))
        np.testing.assert_allclose(a, b, rtol=0, atol=64 * np.finfo(np.float32).eps * largest)
