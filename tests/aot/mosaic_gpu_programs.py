"""Programs of implementation="mosaic_gpu", the forward for Hopper; none where JAX has no such kernel."""

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
}


def attend(name: str, length: int, size: int, dtype: Any) -> Any:
    """8 query heads, 2 key/value heads."""
    shapes = [jax.ShapeDtypeStruct((2, length, heads, size), dtype) for heads in (8, 2, 2)]
    return functools.partial(aj.attention, implementation="mosaic_gpu", **CALLS[name](length)), shapes


def program(name: str, length: int, size: int = 128, dtype: Any = jnp.bfloat16) -> Program:
    title = f"mosaic_gpu-{name}-{size}-{jnp.dtype(dtype).name}-{length}"
    return Program(title, functools.partial(attend, name, length, size, dtype), ("h200",))


PROGRAMS = []
if jax.__version_info__ >= (0, 11, 2):
    PROGRAMS = [program(name, length) for name in CALLS for length in (4096, 8192)]
    PROGRAMS += [program("causal", 4096, size) for size in (64, 192, 256)]
    PROGRAMS.append(program("causal", 4096, dtype=jnp.float16))
