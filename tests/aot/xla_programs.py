"""Programs of implementation="xla": forward and gradient at two lengths, so that memory can be seen to be linear."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from programs import Program
from targets import EVERYWHERE

import attnjax as aj

LENGTHS = (4096, 8192)
MASKS = {"full": None, "causal": aj.Causal(), "window": aj.Window(512, 0)}


def attend(mask: Any, length: int, part: str) -> Any:
    """bfloat16, 8 query heads, 2 key/value heads of 128."""
    shapes = [jax.ShapeDtypeStruct((1, length, heads, 128), jnp.bfloat16) for heads in (8, 2, 2)]
    call = functools.partial(aj.attention, mask=mask, implementation="xla")
    if part == "forward":
        return call, shapes
    return jax.grad(lambda *x: call(*x).astype(jnp.float32).sum(), argnums=(0, 1, 2)), shapes


PROGRAMS = [
    Program(f"xla-{name}-{part}-{length}", functools.partial(attend, mask, length, part), EVERYWHERE)
    for name, mask in MASKS.items()
    for part in ("forward", "gradient")
    for length in LENGTHS
]
