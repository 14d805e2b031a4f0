"""Programs of implementation="triton" with the sizes that are chosen: forward and gradient, by dtype, size and mask."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from programs import Program
from targets import CUDA

import attnjax as aj

HEADS, KEY_HEADS = 8, 2
FLOAT = jax.ShapeDtypeStruct


def options(kind: str, length: int, dtype: Any) -> tuple[Any, dict[str, Any]]:
    """The arguments of attention beside query, key and value as a function of arrays, and those arrays."""
    integers = lambda *shape: FLOAT(shape, jnp.int32)
    return {
        "full": (lambda x: {}, {}),
        "causal": (lambda x: {"mask": aj.Causal()}, {}),
        "offset": (lambda x: {"mask": aj.Causal(x["offset"])}, {"offset": integers()}),
        "segments": (lambda x: {"mask": aj.Causal() & aj.Segments(x["ids"])}, {"ids": integers(1, length)}),
        "softcap": (lambda x: {"mask": aj.Causal(), "score": aj.SoftCap(30.0)}, {}),
        "bias": (lambda x: {"score": aj.Bias(x["bias"])}, {"bias": FLOAT((HEADS, length, length), dtype)}),
        "dropout": (
            lambda x: {"mask": aj.Causal(), "dropout": aj.Dropout(0.1, x["seed"])},
            {"seed": FLOAT((), jnp.uint32)},
        ),
        "everything": (
            lambda x: {
                "mask": aj.Causal(x["offset"]) & aj.Segments(x["ids"]),
                "score": (aj.SoftCap(30.0), aj.Bias(x["bias"]), aj.ALiBi(x["slopes"])),
                "sinks": x["sinks"],
                "dropout": aj.Dropout(0.1, x["seed"]),
            },
            {
                "offset": integers(),
                "ids": integers(1, length),
                "bias": FLOAT((HEADS, 1, length), dtype),
                "slopes": FLOAT((HEADS,), jnp.float32),
                "sinks": FLOAT((HEADS,), jnp.float32),
                "seed": FLOAT((), jnp.uint32),
            },
        ),
    }[kind]


def attend(kind: str, dtype: Any, size: int, part: str, queries: int = 4096, keys: int = 0) -> Any:
    """The program, and the shapes of its arguments."""
    lengths = (queries, keys or queries, keys or queries)
    qkv = [FLOAT((1, t, n, size), dtype) for t, n in zip(lengths, (HEADS, KEY_HEADS, KEY_HEADS), strict=True)]
    made, arrays = options(kind, queries, dtype)

    def call(q: Any, k: Any, v: Any, floats: Any, rest: Any) -> Any:
        return aj.attention(q, k, v, implementation="triton", **made(floats | rest))

    floats = {name: x for name, x in arrays.items() if jnp.issubdtype(x.dtype, jnp.floating)}
    rest = {name: x for name, x in arrays.items() if name not in floats}
    if part == "forward":
        return call, [*qkv, floats, rest]
    loss = lambda *x: call(*x).astype(jnp.float32).sum()
    return jax.grad(loss, argnums=(0, 1, 2, 3)), [*qkv, floats, rest]


def program(kind: str, dtype: Any, size: int, part: str = "gradient", length: int = 4096) -> Program:
    name = f"triton-{kind}-{jnp.dtype(dtype).name}-{size}-{part}-{length}"
    # With jax 0.12; with 0.10 it is none but for 256 in float32, which has the least tiles there are. The next smaller
    # tiles spill nothing and multiply at a fraction of the rate, which costs more than a dozen registers.
    spills = {64: 96, 128: 0, 256: 256} if dtype == jnp.float32 else {128: 8, 192: 32, 256: 64}
    return Program(name, functools.partial(attend, kind, dtype, size, part, length), CUDA, spills=spills.get(size, 0))


KINDS = ("full", "causal", "offset", "segments", "softcap", "bias", "dropout", "everything")
PROGRAMS = [
    *(program(kind, jnp.bfloat16, size) for kind in KINDS for size in (64, 128, 256)),
    *(program(kind, jnp.float32, size) for kind in ("offset", "everything") for size in (64, 128, 256)),
    *(program("offset", jnp.float16, size) for size in (64, 128, 256)),
    *(program("causal", jnp.bfloat16, size) for size in (16, 80, 192)),
    program("causal", jnp.bfloat16, 128, "gradient", 8192),
    *(program("segments", jnp.bfloat16, 128, "forward", length) for length in (4096, 8192)),
    Program("triton-decode", functools.partial(attend, "full", jnp.bfloat16, 128, "forward", 1, 32768), CUDA),
]
