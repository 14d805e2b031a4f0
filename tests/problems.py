"""Draws the arrays of a case, runs attnjax on them and asks the oracle about the same arrays. Holds no cases."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import zlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from cases import MaskCase, ScoreCase
from oracle import HALVES, Answer, Arrays, Expected, Index, Problem, Shape, differentiate, expected

import attnjax
from attnjax.core.devices import gpus
from attnjax.core.dropout import head_seeds, keep
from attnjax.kernels import mosaic_gpu, mosaic_tpu, triton, xla

# With JAX_PLATFORMS=cuda,cpu (`make test-gpu`) kernels for GPUs are compiled and run there, and nothing is interpreted;
# the oracle stays on the CPU.
ON_GPU = jax.default_backend() == "gpu"

# Every implementation is tried on everything: a new kernel joins with one line. The small tiles cut T = 37 and
# S = 53 into several, with a remainder on both sides.
IMPLEMENTATIONS = {
    "reference": None,
    "xla": xla.Config(block_q=16, block_k=16),
    **({} if ON_GPU else {"cpu": None}),
}
TRITON = triton.Config(block_q=16, block_k=16, backward_block_q=16, backward_block_k=16, interpret=not ON_GPU)
# Kernels for devices that are not here run interpreted: the same numbers, slowly. So they take a part of the table,
# where that is said, and all of it with --full-cross.
INTERPRETED = (
    {} if ON_GPU else {"triton": TRITON, "mosaic_tpu": mosaic_tpu.Config(block_q=16, block_k=16, interpret=True)}
)


def compiled(capabilities: Iterable[str | None], version: tuple[int, ...] = jax.__version_info__) -> dict[str, Any]:
    """The kernels for GPUs of these compute capabilities, each with its config; cuDNN has cases of its own."""
    found = {"triton": TRITON} if set(capabilities) else {}
    if set(capabilities) == {"9.0"} and version >= mosaic_gpu.NEEDS:
        found["mosaic_gpu"] = None
    return found


EVERY_IMPLEMENTATION = IMPLEMENTATIONS | INTERPRETED | compiled(gpus().values())
# What an implementation refuses, by dtype or by name of the score, and what it says then. None refuses a mask.
REFUSED = {
    "cpu": dict.fromkeys(
        ("function", "function_indices", "function_distance", "function_nonlinear", "function_stopped"),
        "cannot run ScoreFn",
    ),
    "triton": {
        "float64": "takes float32, bfloat16 and float16, not float64",
        "function_distance": "cannot run this mask or score on its tiles: dynamic_slice of query and key together",
    },
    "mosaic_gpu": {
        "float64": "takes bfloat16 and float16, not float64",
        "float32": "takes bfloat16 and float16, not float32",
        "relative": "cannot look up a score by distance inside its tiles",
        "relative_past": "cannot look up a score by distance inside its tiles",
        "function_distance": "cannot run this mask or score on its tiles: dynamic_slice of query and key together",
        "function_stopped": "cannot run this mask or score on its tiles: stop_gradient",
    },
    "mosaic_tpu": {
        "float64": "takes float32 and bfloat16, not float64",
        "float16": "takes float32 and bfloat16, not float16",
        "function_distance": "cannot run this mask or score on its tiles: dynamic_slice of query and key together",
    },
}
DTYPES = ("float32", "bfloat16", "float16", "float64")

# `compiler_options` of jax.jit. Tests are compiled fast unless they say that they want what users run (conftest.py).
FAST_COMPILE = {"xla_backend_optimization_level": 0}
OPTIMISED = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}


@dataclasses.dataclass(frozen=True)
class Case:
    """A mask, a score and a shape."""

    mask: MaskCase
    score: ScoreCase
    shape: Shape = Shape()

    def __post_init__(self):
        if self.mask.square and self.shape.T != self.shape.S:
            object.__setattr__(self, "shape", dataclasses.replace(self.shape, S=self.shape.T))

    def __repr__(self) -> str:
        return f"{self.mask.name}-{self.score.name}"

    def inner(self) -> Case:
        return dataclasses.replace(self, shape=self.shape.inner())


class Inputs(NamedTuple):
    """Everything drawn for a case: float arrays, the mask's arrays, and where the derivatives are taken."""

    x: Arrays
    d: Arrays
    tangents: Arrays
    cotangents: tuple[Any, Any]


def precision(dtype: str) -> contextlib.AbstractContextManager:
    """float64 exists only inside `jax.enable_x64`."""
    return jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext()


def draw(case: Case, dtype: str, seed: int = 0) -> Inputs:
    """The same numbers for every implementation, rounded to `dtype`.

    Score operands are bfloat16 beside bfloat16 but float32 beside float16, so that both habits are tried.
    """
    rng = np.random.default_rng(zlib.crc32(f"{case} {seed}".encode()))
    shape = case.shape
    x = {name: rng.normal(size=size) for name, size in shape.query_key_value().items()}
    operands = case.score.operands(rng, shape)
    d = {name: jnp.asarray(a) for name, a in case.mask.arrays(rng, shape).items()}
    dtypes = dict.fromkeys(x, dtype) | dict.fromkeys(operands, "float32" if dtype == "float16" else dtype)
    x = {name: jnp.asarray(a, dtypes[name]) for name, a in (x | operands).items()}
    tangents = {name: jnp.asarray(rng.normal(size=a.shape), a.dtype) for name, a in x.items()}
    rows = (*shape.batch, shape.T, shape.N)
    lse_dtype = "float32" if dtype in HALVES else dtype
    cotangents = (jnp.asarray(rng.normal(size=(*rows, shape.V)), dtype), jnp.asarray(rng.normal(size=rows), lse_dtype))
    return Inputs(x, d, tangents, cotangents)


def problem(case: Case, d: Arrays) -> Problem:
    """The case in the words of the oracle."""
    shape, index = case.shape, Index(case.shape)
    full = (shape.B, shape.N, shape.T, shape.S)
    visible = np.broadcast_to(case.mask.rule(index, {name: np.asarray(a) for name, a in d.items()}), full)
    rate, seed = case.score.dropout or (0.0, 0)
    kept = None
    if rate:
        seeds = head_seeds(np.asarray([seed], np.uint32), index.b.astype(np.uint32), index.h.astype(np.uint32))
        kept = np.broadcast_to(np.asarray(keep(seeds, index.q, index.k, rate)), full)
    return Problem(shape, visible, case.score.rule, case.score.scale, kept, rate)


def expect(case: Case, inputs: Inputs) -> Expected:
    return expected(problem(case, inputs.d), inputs.x, inputs.tangents, inputs.cotangents)


def expect_mapped(case: Case, inputs: Inputs) -> Expected:
    """The oracle on every example apart, stacked: what `jax.vmap` over the first batch axis has to give."""
    inner = case.inner()
    each = [expect(inner, _example(case, inputs, n)) for n in range(case.shape.batch[0])]
    stacked = jax.tree.map(lambda *a: np.stack(a), *[e.answer for e in each])
    return Expected(stacked, jax.tree.map(max, *[e.allowed for e in each]))


def _example(case: Case, inputs: Inputs, n: int) -> Inputs:
    axes = mapped_axes(case, inputs)
    take = lambda tree, which: {name: a[n] if which[name] == 0 else a for name, a in tree.items()}
    cotangents = (inputs.cotangents[0][n], inputs.cotangents[1][n])
    return Inputs(take(inputs.x, axes.x), take(inputs.d, axes.d), take(inputs.tangents, axes.x), cotangents)


def mapped_axes(case: Case, inputs: Inputs) -> Inputs:
    """`in_axes` of `jax.vmap`: 0 for what has batch axes, None for what all examples share."""
    names = {"query", "key", "value", *case.score.mapped}
    x = {name: 0 if name in names else None for name in inputs.x}
    return Inputs(x, {name: 0 if name in case.mask.mapped else None for name in inputs.d}, x, (0, 0))


def attend(
    case: Case,
    x: Arrays,
    d: Arrays,
    implementation: str | None,
    config: Any = None,
    block_map: Any = None,
    **options: Any,
) -> Any:
    """attnjax's answer: out and lse."""
    return attnjax.attention(
        x["query"],
        x["key"],
        x["value"],
        mask=case.mask.mask(d),
        score=case.score.score(x),
        scale=case.score.scale,
        sinks=x.get("sinks"),
        dropout=attnjax.Dropout(*case.score.dropout) if case.score.dropout else None,
        implementation=implementation,
        config=config,
        block_map=block_map,
        **{"return_lse": True} | options,
    )


def solver(
    case: Case, implementation: str | None, config: Any = None, *, forward_mode: bool = True
) -> Callable[..., Answer]:
    """A function of the fields of `Inputs` that gives attnjax's value, gradients and tangents.

    Without `forward_mode` the cotangents stand in the place of the tangents.
    """

    def solve(x, d, tangents, cotangents):
        function = functools.partial(attend, case, d=d, implementation=implementation, config=config)
        if forward_mode:
            return differentiate(function, x, tangents, cotangents)
        value, pull = jax.vjp(function, x)
        return Answer(*value, *pull(cotangents), *cotangents)

    return solve


def first_order(case: Case, *configs: Any) -> Callable[..., Any]:
    """A program that gives ((out, lse), gradients) of the compiled kernel, once for each config, and no tangents.

    Its programs take a tenth of a second to compile, while a tangent, which is the tiled code's, takes seconds.
    """

    @jax.jit
    def solve(x, d, cotangents, block_map=None):
        made = []
        for config in configs or (None,):
            function = functools.partial(attend, case, d=d, implementation="cpu", config=config, block_map=block_map)
            value, pull = jax.vjp(function, x)
            made.append((value, *pull(cotangents)))
        return made

    return solve


def check_first_order(want: Expected, made: Any) -> None:
    """Raises unless what `first_order` made for one config is within the budget."""
    __tracebackhide__ = True
    (out, lse), gradients = made
    want.check(want.answer._replace(out=out, lse=lse, gradients=gradients))


def poison(case: Case, inputs: Inputs) -> Inputs:
    """Puts NaN and infinities into every key, value and query row that takes no part in any visible pair."""
    shape = case.shape
    visible = np.asarray(problem(case, inputs.d).visible).reshape(
        shape.B, shape.K, shape.N // shape.K, shape.T, shape.S
    )
    keys = visible.any((2, 3)).transpose(0, 2, 1).reshape(*shape.batch, shape.S, shape.K)
    queries = visible.any(4).reshape(shape.B, shape.N, shape.T).transpose(0, 2, 1)
    queries = queries.reshape(*shape.batch, shape.T, shape.N)
    x = dict(inputs.x)
    for name, seen, bad in [("key", keys, jnp.nan), ("value", keys, jnp.inf), ("query", queries, jnp.nan)]:
        x[name] = jnp.where(seen[..., None], x[name], jnp.asarray(bad, x[name].dtype))
    return inputs._replace(x=x)


def check_dtypes(inputs: Inputs, answer: Answer) -> None:
    """out in the query's dtype, lse in that of its cotangent, every gradient in that of its argument."""
    want = Answer(inputs.cotangents[0], inputs.cotangents[1], inputs.x, *inputs.cotangents)
    got, want = (jax.tree.map(lambda a: str(a.dtype), tree) for tree in (answer, want))
    if got != want:
        raise AssertionError(f"dtypes {got}, expected {want}")
