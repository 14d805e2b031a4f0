"""`explain`: which implementation would run a call, why not the others, and what it would cost. Runs nothing."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from attnjax.attention import build
from attnjax.core.dispatch import PARTS, Choice, choose, shares
from attnjax.core.node import describe, is_array
from attnjax.core.program import Problem
from attnjax.core.regions import Regions, regions
from attnjax.masks import Window
from attnjax.profiling import attention_bytes, attention_flops
from attnjax.tuning import PLATFORMS, Blocks


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What `explain` found; prints as a table.

    Attributes:
      platform: what the call would be compiled for.
      choices: part ("forward", "tangent", "backward", "higher") -> the implementation, and why not the others; also
        "backward of ..." where another one gives the gradients of some arguments.
      blocks: the tiles; `None` for an implementation that has none.
      block_counts: "empty", "partial", "full" -> number of blocks over all batch entries and heads; `None` when that
        depends on arrays whose values are not known here.
      flops: part -> floating-point operations in the blocks that are visited (an upper bound where they are not known).
      bytes: part -> bytes that must be read and written at least.
      temporary_bytes: part -> memory needed beside arguments and results, estimated.
      settings: what else the kernels chose, in words, and what had to be smaller than usual or asked for.
    """

    platform: str
    call: tuple[tuple[str, str], ...]
    choices: dict[str, Choice]
    blocks: Blocks | None
    block_counts: dict[str, int] | None
    flops: dict[str, int]
    bytes: dict[str, int]
    temporary_bytes: dict[str, int]
    settings: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"attention on {self.platform}", *(f"  {name:<7} {text}" for name, text in self.call), ""]
        rows: list[tuple[str, ...]] = [("part", "implementation", "FLOP", "bytes moved", "temporaries")]
        for part, choice in self.choices.items():
            known = part in self.flops
            cost = [_short(self.flops[part], ""), _short(self.bytes[part], "B")] if known else ["", ""]
            memory = _short(self.temporary_bytes[part], "B", 1024) if known else ""
            rows.append((_PART_NAMES.get(part, part), choice.name, *cost, memory))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines += ["  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines += ["", *self._tiles(), *(f"  kernel  {text}" for text in self.settings)]
        used = {choice.name for choice in self.choices.values()}
        names: dict[str, list[str]] = {}  # by reason; of the forward where there are several
        for name, reason in next(iter(self.choices.values())).reasons.items():
            if name not in used:
                names.setdefault(reason, []).append(name)
        lines += ["", *(f"  not {', '.join(some)}: {reason}" for reason, some in names.items())]
        return "\n".join(lines)

    __repr__ = __str__

    def _tiles(self) -> list[str]:
        if self.blocks is None:
            dense = self.choices["forward"].name == "reference"
            return [f"  tiles   {'none: the whole T x S matrix at once' if dense else 'chosen by the implementation'}"]
        lanes = math.prod(self.blocks.lanes) * self.blocks.lanes_kv
        heads = "1 key/value head" if lanes == 1 else f"{lanes} key/value heads"
        tiles = f"  tiles   {self.blocks.block_q} queries x {self.blocks.block_k} keys, {heads} at a time"
        if self.block_counts is None:
            return [tiles, "  blocks  depend on values that are not known here"]
        empty, partial, full = (self.block_counts[kind] for kind in ("empty", "partial", "full"))
        visited = f"{partial + full} of {empty + partial + full} visited: {full} full, {partial} partial"
        return [tiles, f"  blocks  {visited}; {empty} empty are skipped"]


_PART_NAMES = {
    "forward": "forward",
    "backward": "backward (grad)",
    "tangent": "tangent (jvp)",
    "higher": "second order and up",
}


def explain(query: Any, key: Any, value: Any, *, platform: str | None = None, **options: Any) -> Explanation:
    """Tells what `attention` would do with these arguments, without doing it.

    Args:
      query, key, value: as in `attention`; arrays or `jax.ShapeDtypeStruct`.
      platform: "cpu", "cuda", "rocm" or "tpu"; default: the one that JAX would use now.
      options: the other arguments of `attention`; their arrays may be `jax.ShapeDtypeStruct` too.

    Returns:
      An `Explanation`, which prints as a table.

    Raises:
      TypeError, ValueError, NotImplementedError: as `attention` would.

    Example:
      >>> import jax
      >>> from attnjax import Causal, explain
      >>> q = jax.ShapeDtypeStruct((1, 4096, 8, 64), "float32")
      >>> print(explain(q, q, q, mask=Causal(), platform="tpu").choices["forward"].name)
      mosaic_tpu
    """
    platform = jax.default_backend() if platform is None else platform
    platform = "cuda" if platform == "gpu" else platform
    if platform not in PLATFORMS:
        raise ValueError(f"platform {platform!r} is unknown: expected one of {list(PLATFORMS)} or None.")
    problem, operands = build(query, key, value, **{"return_lse": False, **options})
    if not problem.sizes.known:
        shapes = ", ".join(
            f"{name} {list(x.shape)}" for name, x in zip(("query", "key", "value"), operands, strict=False)
        )
        raise ValueError(f"explain: {shapes} have sizes that are symbols: give sizes that are known.")
    choices = {}
    for part in PARTS:
        choices[part] = choose(problem, operands, platform, part)
        if part == "backward":
            for choice, positions in shares(problem, operands, platform)[1:]:
                names = ", ".join(problem.program.name_of(i) for i in positions)
                choices[f"backward of {names}"] = choice
    blocks = choices["forward"].kernel.blocks(choices["forward"].own(problem), platform)
    pairs, counts = _pairs(problem, operands, blocks)
    flops = attention_flops(pairs, problem.head_size, problem.value_size)
    temporaries = {
        part: choice.kernel.temporary_bytes(choice.own(problem), operands, platform)[part]
        for part, choice in choices.items()
        if part in ("forward", "backward", "tangent")
    }
    call = [(name, describe(x)) for name, x in (("query", query), ("key", key), ("value", value))]
    shown = ("mask", "score", "sinks", "dropout")
    call += [(name, _text(options[name])) for name in shown if options.get(name) is not None]
    moved = _bytes(problem, operands)
    settings: list[str] = []
    for part in ("forward", "backward"):
        chosen = getattr(choices[part].kernel, "settings", lambda problem, platform: {})
        settings += chosen(choices[part].own(problem), platform).get(part, [])
    return Explanation(platform, tuple(call), choices, blocks, counts, flops, moved, temporaries, tuple(settings))


def _text(value: Any) -> str:
    return describe(value) if is_array(value) else repr(value)


def _pairs(problem: Problem, operands: list[Any], blocks: Blocks | None) -> tuple[int, dict[str, int] | None]:
    """Pairs in visited blocks, and the number of blocks of each kind, over all batch entries and heads."""
    sizes = problem.sizes
    every = math.prod(sizes.batch) * sizes.heads
    leaves = [operands[i] for i in problem.program.map_positions()]
    if blocks is None or any(isinstance(x, (jax.ShapeDtypeStruct, Tracer)) for x in leaves):
        return every * sizes.query_length * sizes.key_length, None
    pairs, counts = 0, np.zeros(3, np.int64)
    for some in _regions(problem, operands, blocks) if every and problem.pairs else ():
        kinds = some.kinds.reshape(-1, len(some.rows))
        copies = every // len(kinds)
        rows = _covered(some.rows, some.heights, blocks.block_q, sizes.query_length)
        columns = _covered(some.columns, some.widths, blocks.block_k, sizes.key_length)
        pairs += copies * int((rows * columns * (kinds > 0)).sum())
        counts += [copies * int((some.heights * some.widths * (kinds == kind)).sum()) for kind in range(3)]
    return pairs, dict(zip(("empty", "partial", "full"), map(int, counts), strict=True))


def _regions(problem: Problem, operands: list[Any], blocks: Blocks) -> Iterable[Regions]:
    """The blocks that are visited or not; from the map of all of them where one is given, or must be looked for."""
    known = set(problem.program.map_positions())
    mask = problem.program.mask_of([np.asarray(x) if i in known else x for i, x in enumerate(operands)])
    scanned = mask is not None and any(getattr(part, "scan", False) for part in mask.nodes())
    if not scanned and not problem.program.has_map:
        mask = Window() if mask is None else mask  # which sees all
        return regions(mask, problem.sizes, blocks.block_q, blocks.block_k)
    kinds = np.asarray(problem.kinds(operands, blocks.block_q, blocks.block_k))
    rows, columns = (x.ravel() for x in np.indices(kinds.shape[-2:]))
    one = np.ones_like(rows)
    return [Regions(rows, columns, one, one, kinds.reshape(*kinds.shape[:-2], -1))]


def _covered(first: np.ndarray, count: np.ndarray, block: int, length: int) -> np.ndarray:
    """How many positions lie in some blocks in a row."""
    return np.minimum((first + count) * block, length) - first * block


def _bytes(problem: Problem, operands: list[Any]) -> dict[str, int]:
    """Every argument read and every result written once; masks and scores are read, and differentiated, too."""
    size = lambda i: math.prod(operands[i].shape) * np.dtype(operands[i].dtype).itemsize
    more = sum(map(size, range(3, len(operands))))
    moved = sum(size(i) for i in problem.differentiable[3:])
    own = attention_bytes(*operands[:3])
    return {part: count + more + (0 if part == "forward" else moved) for part, count in own.items()}


def _short(number: float, unit: str, base: int = 1000) -> str:
    for prefix in ("", "K", "M", "G", "T", "P"):
        if number < base or prefix == "P":
            digits = 0 if not prefix else 1
            return f"{number:.{digits}f} {prefix}{'i' if base == 1024 and prefix else ''}{unit}".rstrip()
        number /= base
    raise AssertionError("unreachable")
