"""`jax.export` of attention and its derivatives: to each platform and to several, to bytes and back.

Only programs for the CPU are run, and give the bits that the function itself gives there.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from derivatives import derive, drawn, everything, like, total
from jax import export

FLOATS, INTEGERS = drawn()


def gradient(x, d):
    function = functools.partial(everything, d=d)
    return derive(total(function, like(jax.eval_shape(function, x), 1)), "R", ())(x)


def hessian_product(x, d):
    return jax.jvp(lambda x: gradient(x, d), (x,), (x,))[1]


FUNCTIONS = {"forward": everything, "gradient": gradient, "hessian_product": hessian_product}
PLATFORMS = {"cpu": ["cpu"], "cuda": ["cuda"], "tpu": ["tpu"], "several": ["cpu", "cuda", "tpu"]}


@pytest.mark.parametrize("platforms", PLATFORMS.values(), ids=PLATFORMS)
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_export_and_back(function, platforms):
    """Every platform's program can be written down here, without such a device, and read again."""
    function = jax.jit(function)
    exported = export.export(function, platforms=platforms)(FLOATS, INTEGERS)
    again = export.deserialize(exported.serialize())
    assert again.platforms == tuple(platforms)
    shapes = lambda arrays: [(a.shape, a.dtype) for a in jax.tree.leaves(arrays)]
    assert shapes(again.out_avals) == shapes(jax.eval_shape(function, FLOATS, INTEGERS))
    assert "custom_call" not in again.mlir_module(), "a program that needs code which is not in it"
    if "cpu" not in platforms:
        with pytest.raises(ValueError, match="platform"):
            again.call(FLOATS, INTEGERS)
        return
    got, want = again.call(FLOATS, INTEGERS), function(FLOATS, INTEGERS)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_what_is_exported_can_be_differentiated():
    """The exported function carries its own gradient when it is asked to."""
    exported = export.export(jax.jit(everything), platforms=["cpu"])(FLOATS, INTEGERS)
    again = export.deserialize(exported.serialize(vjp_order=1))
    loss = lambda call: lambda x: jnp.sin(call(x, INTEGERS)[0]).sum()
    got, want = (jax.grad(loss(call))(FLOATS) for call in (again.call, jax.jit(everything)))
    for name in FLOATS:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-5, atol=1e-5, err_msg=name)
