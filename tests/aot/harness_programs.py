"""Programs that must fail, so that it is known that their failures are seen. No target compiles them by itself."""

from __future__ import annotations

import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
from programs import Program


def aborts() -> Any:
    """As a compiler that crashes."""
    os.abort()


def product(block: int, warps: int) -> Any:
    """A product of two square matrices as one Triton block."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    def kernel(a: Any, b: Any, out: Any) -> None:
        out[...] = jnp.dot(a[...], b[...], preferred_element_type=jnp.float32)

    shape = jax.ShapeDtypeStruct((block, block), jnp.float32)
    call = pl.pallas_call(kernel, out_shape=shape, compiler_params=triton.CompilerParams(num_warps=warps))
    return call, [jax.ShapeDtypeStruct((block, block), jnp.bfloat16)] * 2


PROGRAMS = [
    Program("harness-aborts", aborts, ()),
    Program("harness-fits", functools.partial(product, 64, 4), ()),
    Program("harness-spills", functools.partial(product, 128, 1), ()),
    Program("harness-overflows", functools.partial(product, 512, 4), ()),
]
