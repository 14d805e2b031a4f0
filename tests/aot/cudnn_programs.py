"""Programs of implementation="cudnn", with every mask that it takes."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from programs import Program

import attnjax as aj

MASKS = {
    "full": lambda n: None,
    "causal": lambda n: aj.Causal(),
    "window": lambda n: aj.Window(512, 0),
    "lengths": lambda n: aj.Causal() & aj.Lengths(key=n, query=n),
}


def attend(name: str, length: int, part: str) -> Any:
    """bfloat16, 8 query heads, 2 key/value heads of 128."""
    arguments = [jax.ShapeDtypeStruct((2, length, heads, 128), jnp.bfloat16) for heads in (8, 2, 2)]
    arguments.append(jax.ShapeDtypeStruct((2,), jnp.int32))
    call = lambda q, k, v, n: aj.attention(q, k, v, mask=MASKS[name](n), implementation="cudnn")
    if part == "forward":
        return call, arguments
    return jax.grad(lambda *x: call(*x).astype(jnp.float32).sum(), argnums=(0, 1, 2)), arguments


PROGRAMS = [
    Program(f"cudnn-{name}-{part}-{length}", functools.partial(attend, name, length, part), ("h200", "b200"))
    for name in MASKS
    for part in ("forward", "gradient")
    for length in (4096, 8192)
]
