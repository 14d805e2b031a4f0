"""Programs of implementation="mosaic_tpu": forward and gradient, over masks, scores, types and head sizes."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from programs import Program
from targets import TPU

import attnjax as aj
from attnjax.kernels import mosaic_tpu

LENGTH = 4096
PARTS = ("forward", "gradient")


def options_of(feature: str, ids: Any, slopes: Any, table: Any, bias: Any) -> dict[str, Any]:
    """The arguments of `attention` that a program is about; the arrays are its arguments."""
    return {
        "full": {},
        "causal": {"mask": aj.Causal()},
        "window": {"mask": aj.Window(512, 0)},
        "segments": {"mask": aj.Causal() & aj.Segments(ids)},
        "softcap": {"mask": aj.Causal(), "score": aj.SoftCap(30.0)},
        "dropout": {"dropout": aj.Dropout(0.1, 7)},
        "bias": {"score": aj.Bias(bias)},
        "alibi": {"mask": aj.Causal(), "score": aj.ALiBi(slopes), "sinks": slopes},
        "relative": {"score": aj.RelativeBias(table)},
        "function": {"mask": aj.Where(lambda b, h, q, k: (ids[q] == ids[k]) | ((q - k) % (h + 2) == 0))},
    }[feature]


def attend(
    feature: str, part: str, dtype: str = "bfloat16", size: int = 128, length: int = LENGTH, config: Any = None
) -> Any:
    """8 query heads, 2 key/value heads; the gradient is that of all floating-point arrays."""
    bias = (8, length, length) if feature == "bias" else (1, 1, 1)
    shapes = [jax.ShapeDtypeStruct((1, length, heads, size), dtype) for heads in (8, 2, 2)]
    shapes += [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((8,), (32, 8))]
    shapes += [jax.ShapeDtypeStruct(bias, dtype), jax.ShapeDtypeStruct((length,), jnp.int32)]

    def call(q: Any, k: Any, v: Any, slopes: Any, table: Any, bias: Any, ids: Any) -> Any:
        options = options_of(feature, ids, slopes, table, bias)
        return aj.attention(q, k, v, implementation="mosaic_tpu", config=config, **options)

    if part == "forward":
        return call, shapes
    moved = (0, 1, 2) + {"alibi": (3,), "bias": (5,)}.get(feature, ())
    return jax.grad(lambda *x: call(*x).astype(jnp.float32).sum(), argnums=moved), shapes


def _named(name: str, *args: Any, schedule: bool = False, **options: Any) -> list[Program]:
    return [
        Program(
            name.replace("PART", part),
            functools.partial(attend, args[0], part, *args[1:], **options),
            TPU,
            schedule=schedule,
        )
        for part in PARTS
    ]


FEATURES = ("full", "causal", "window", "segments", "softcap", "dropout", "bias", "alibi", "relative", "function")
# As JAX's splash attention is compiled in splash_programs.py: blocks of 512 x 512, heads of 128.
BESIDE_SPLASH = mosaic_tpu.Config(block_q=512, block_k=512)
PROGRAMS = [
    *(one for feature in FEATURES for one in _named(f"mosaic_tpu-{feature}-PART", feature)),
    *(
        one
        for dtype in ("bfloat16", "float32")
        for size in (16, 64, 80, 256)
        for one in _named(f"mosaic_tpu-causal-{dtype}-{size}-PART", "causal", dtype, size)
    ),
    *_named("mosaic_tpu-softcap-float32-256-PART", "softcap", "float32", 256),
    *(one for length in (4096, 8192) for one in _named(f"mosaic_tpu-memory-PART-{length}", "causal", length=length)),
    *(
        one
        for feature in ("full", "causal")
        for one in _named(f"mosaic_tpu-schedule-{feature}-PART", feature, schedule=True, config=BESIDE_SPLASH)
    ),
]
