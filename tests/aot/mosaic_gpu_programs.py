"""Programs of implementation="mosaic_gpu", the kernels for Hopper; none where JAX has no such kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from programs import Program

import attnjax as aj

NONE: Callable[..., dict[str, Any]] = lambda n: {}
CALLS: dict[str, Callable[..., dict[str, Any]]] = {
    "full": NONE,
    "causal": lambda n: dict(mask=aj.Causal()),
    "segments": lambda n: dict(mask=aj.Causal() & aj.Segments(jnp.arange(n) // 100)),
    "not": lambda n: dict(mask=~aj.Causal() | aj.Dilated(3) | aj.Chunked(20)),
    "where": lambda n: dict(mask=aj.Where(lambda b, h, q, k: ~((q + k) % 3 == h))),
    "softcap": lambda n: dict(mask=aj.Causal(), score=aj.SoftCap(30.0)),
    "alibi": lambda n: dict(mask=aj.Causal(), score=aj.ALiBi.for_heads(8)),
    "dropout": lambda n: dict(dropout=aj.Dropout(0.1, 7)),
    "bias": lambda n: dict(mask=aj.Causal(), score=aj.Bias(jnp.zeros((8, n, n), jnp.bfloat16))),
}


def attend(name: str, length: int, size: int, dtype: Any, part: str) -> Any:
    """8 query heads, 2 key/value heads."""
    shapes = [jax.ShapeDtypeStruct((2, length, heads, size), dtype) for heads in (8, 2, 2)]
    call = functools.partial(aj.attention, implementation="mosaic_gpu", **CALLS[name](length))
    if part == "forward":
        return call, shapes
    return lambda ct, *x: jax.vjp(call, *x)[1](ct), [shapes[0], *shapes]


def program(name: str, length: int, size: int = 128, dtype: Any = jnp.bfloat16, part: str = "gradient") -> Program:
    title = f"mosaic_gpu-{name}-{size}-{jnp.dtype(dtype).name}-{part}-{length}"
    spills = 64 if name == "not" else 0  # three masks at once
    return Program(title, functools.partial(attend, name, length, size, dtype, part), ("h200",), spills=spills)


PROGRAMS = []
if jax.__version_info__ >= (0, 11, 2):
    PROGRAMS = [program(name, length) for name in CALLS if name != "bias" for length in (4096, 8192)]
    PROGRAMS.append(program("bias", 512))
    PROGRAMS.append(program("causal", 4096, 64))
    PROGRAMS += [program("causal", 4096, size, part="forward") for size in (192, 256)]
    PROGRAMS.append(program("causal", 4096, dtype=jnp.float16))
