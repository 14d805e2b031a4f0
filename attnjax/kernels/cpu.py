"""implementation="cpu": the compiled kernel for CPUs (`native/`, C++), the fastest there. Forward and backward.

Here a problem is put into the kernel's words: the mask as comparisons of numbers by key and by query (`core.sides`),
the scores as arrays. The library is loaded when the first program is compiled for a CPU.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import math
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.core.checks import check_count
from attnjax.core.node import is_array
from attnjax.core.program import Problem
from attnjax.core.regions import regions
from attnjax.core.sides import Combined, Comparison, Function, NotSeparable, Pairs, Rule, separate
from attnjax.core.softmax import Rows, row_delta, sink_gradient
from attnjax.core.tiles import Sizes, Tile, tile_form
from attnjax.scores import Bias, Scale, Score, SoftCap
from attnjax.tuning import Blocks

Array = jax.Array

PARTS = ("forward", "backward")
_BLOCKS = (64, 64)  # that are visited or not: a panel of queries with 512-bit vectors, half a tile of keys
_MOST_SIZE = 512  # of heads
_MOST_BITS = 2**24  # bytes: of functions of pairs, packed to bits; more where query, key and value are more
_PACKED_KEYS = 64  # of a block of bits: see native/call.h
_PAIRS_AT_ONCE = 2**20  # on which a function is evaluated before they are packed
# What the kernel has room for, and the codes of its steps: see native/call.h.
_MOST_STEPS, _MOST_COMPARISONS, _MOST_ARRAYS, _MOST_SCORES, _MOST_DEPTH = 64, 24, 4, 6, 8
_MASK_STEPS = ("less_equal", "less", "equal", "greater_equal", "greater", "dense", "bits", "both", "either", "negate")
_SCORE_STEPS = ("soft_cap", "bias", "by_distance", "scale")


@dataclasses.dataclass(frozen=True)
class Config:
    """How the kernel runs. `None` chooses.

    Attributes:
      isa: the instruction set, one of `instruction_sets()`; default: the fastest that the processor has.
      threads: at most so many; default: all of XLA's. The results are the same to the last bit.
    """

    isa: str | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.isa is not None and self.isa not in instruction_sets():
            have = ", ".join(instruction_sets()) or f"none: {missing()}"
            raise ValueError(f"Config: isa must be one of those that run on this processor ({have}), got {self.isa!r}.")
        if self.threads is not None:
            object.__setattr__(self, "threads", check_count("Config: threads", self.threads))


def instruction_sets() -> tuple[str, ...]:
    """Those that the kernel was compiled for and this processor runs, the fastest first; empty without the kernel."""
    library = _library()
    return () if isinstance(library, str) else tuple(library.attnjax_instruction_sets().decode().split(","))


def missing() -> str | None:
    """Why the compiled kernel cannot be used here, or `None`."""
    library = _library()
    return library if isinstance(library, str) else None


def unsupported(problem: Problem, operands: list[Any], platform: str, part: str) -> str | None:
    """A reason why this implementation cannot take a part of the problem, or `None`."""
    if platform != "cpu":
        return f"runs on CPUs only, not on {platform}"
    if part not in PARTS:
        return "has forward and backward; other derivatives are those of the tiled code"
    if problem.config is not None and not isinstance(problem.config, Config):
        return "config asks for tiles of xla"
    if max(problem.head_size, problem.value_size) > _MOST_SIZE:
        return f"takes head sizes up to {_MOST_SIZE}"
    reason = _unsupported_scores(problem, operands) or missing()
    if reason is None and problem.program.mask:
        reason = _unsupported_mask(problem, operands)
    return reason


def blocks(problem: Problem, platform: str) -> Blocks:
    """The blocks that are visited or skipped."""
    block_q, block_k = problem.blocks or _BLOCKS
    return Blocks(block_q, block_k, (1,) * len(problem.sizes.batch), 1)


def temporary_bytes(problem: Problem, operands: list[Any], platform: str) -> dict[str, int]:
    """About how much memory each part needs beside its arguments and results: tiles per thread, rows, the mask."""
    size, item = problem.head_size + problem.value_size, problem.accumulate.itemsize
    threads = (problem.config or Config()).threads or os.cpu_count() or 1
    rows = math.prod(problem.out_shapes()[1]) * item
    mask = _Needs.of(problem, operands).all_bytes if problem.program.mask and problem.pairs else 0
    return {
        "forward": threads * (2**18 + 256 * size * item) + mask,
        "backward": threads * (2**18 + 1600 * size * item) + 2 * rows + mask,
    }


def forward(problem: Problem, operands: list[Array], platform: str) -> Rows:
    """The output, and highest and total of the softmax, all in operand form."""
    call = _Call(problem, operands)
    out, rows = problem.out_shapes()
    results = [jax.ShapeDtypeStruct(out, problem.dtype), *[jax.ShapeDtypeStruct(rows, problem.accumulate)] * 2]
    return Rows(*_run("forward", call.operands, results, call.attributes))


def backward(
    problem: Problem,
    operands: list[Array],
    rows: Rows,
    ct_out: Array,
    ct_lse: Array,
    wanted: tuple[tuple[int, tuple[int, ...]], ...],
) -> list[Array]:
    """Gradients of the operands in `wanted`: pairs of position and shape (batch axes of size 1 are summed over)."""
    call = _Call(problem, operands)
    shapes, made = dict(wanted), {}
    if problem.program.sinks and 3 in shapes:
        made[3] = sink_gradient(operands[3], rows, row_delta(rows, ct_out, ct_lse), shapes[3])
    first_three = {i: (*problem.sizes.batch, *operands[i].shape[-3:]) for i in range(3) if i in shapes}
    scale = [(*problem.sizes.batch, problem.sizes.heads, problem.sizes.query_length)] if call.factor in shapes else []
    scores = {n: score.gradient_shape(shapes) for n, score in enumerate(call.scores) if score.wanted(shapes)}
    flags = [i in first_three for i in range(3)] + [bool(scale)] + [n in scores for n in range(len(call.scores))]
    if not math.prod((*problem.sizes.batch, problem.sizes.query_length, problem.sizes.key_length)):  # no pairs
        made = {i: jnp.zeros(shape, problem.accumulate) for i, shape in wanted} | made
    elif any(flags):
        every = (*first_three.values(), *scale, *scores.values())
        results = [jax.ShapeDtypeStruct(shape, problem.accumulate) for shape in every]
        given = [*rows, ct_out.astype(problem.dtype), ct_lse.astype(problem.accumulate)]
        attributes = call.attributes | {"wanted": np.array(flags, np.int64)}
        gradients = iter(_run("backward", [*call.operands, *given], results, attributes))
        for i in first_three:
            made[i] = _summed(next(gradients), shapes[i])
        if call.factor in shapes:
            made[call.factor] = _summed(next(gradients).sum(-1), shapes[call.factor])
        for n in scores:
            made.update(call.scores[n].pulled(next(gradients), shapes))
    return [made[i] for i, _ in wanted]


class _Call:
    """The operands of the kernel and its attributes, without those that only the backward has."""

    def __init__(self, problem: Problem, operands: list[Any]):
        program, sizes = problem.program, problem.sizes
        self.factor, nodes = _scaled(_nodes(problem, operands))
        scale = np.full((1,) * (len(sizes.batch) + 1), program.scale) if self.factor is None else operands[self.factor]
        self.operands: list[Any] = [*operands[:3], jnp.asarray(scale, problem.accumulate)]
        if program.sinks:
            self.operands.append(operands[3].astype(problem.accumulate))
        if program.dropout:
            self.operands.append(operands[3 + program.sinks].astype(jnp.uint32))
        steps, arrays = [], []
        if program.mask:
            steps, arrays = _flattened(separate(program.mask_of(operands), sizes), problem)
        self.operands += [jnp.asarray(x) for x in arrays]
        given = program.map_of(operands)
        self.operands += [] if given is None else [given]
        self.scores = [_step(problem, position, node) for position, node in nodes]
        self.operands += [jnp.asarray(score.array) for score in self.scores]
        config = problem.config or Config()
        self.attributes = {
            "batch": np.array(sizes.batch, np.int64),
            "dropout": np.float64(program.dropout),
            "sinks": np.int64(program.sinks),
            "mask": np.array([_MASK_STEPS.index(step) for step in steps], np.int64),
            "blocks": np.array(problem.blocks or (), np.int64),
            "scores": np.array([_SCORE_STEPS.index(score.step) for score in self.scores], np.int64),
            "isa": config.isa or "",
            "threads": np.int64(config.threads or 0),
        }


def _flattened(rule: Rule, problem: Problem) -> tuple[list[str], list[Any]]:
    """A rule as steps in postfix order, and the arrays they read."""
    if isinstance(rule, Comparison):
        return [rule.operator], [rule.keys, rule.queries]
    if isinstance(rule, Pairs):
        return ["dense"], [rule.array]
    if isinstance(rule, Function):
        return ["bits"], _blocks_of(problem).packed(rule)
    assert isinstance(rule, Combined)
    steps, arrays = [], []
    for part in rule.rules:
        more_steps, more_arrays = _flattened(part, problem)
        steps += more_steps
        arrays += more_arrays
    return [*steps, *[rule.operator] * max(1, len(rule.rules) - 1)], arrays


def _depth(rule: Rule) -> int:
    """How many values the kernel holds at most while it evaluates the rule."""
    if not isinstance(rule, Combined):
        return 1
    return max(n + _depth(part) for n, part in enumerate(rule.rules))


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """Blocks of pairs on which functions of the mask are evaluated: those that the rest of it does not decide.

    Attributes:
      size: queries of a block; rows: how many rows of blocks there are; count: how many blocks.
      parts: the blocks as rectangles: first row, first column, height and width of each, integers `[4, rectangles]`.
    """

    size: int
    rows: int
    count: int
    parts: np.ndarray

    def each(self) -> tuple[np.ndarray, np.ndarray]:
        """The row and the column of every block, int32, in order of rows."""
        row, column, height, width = self.parts
        every = height * width
        number = np.arange(every.sum()) - np.repeat(np.cumsum(every) - every, every)
        rows = np.repeat(row, every) + number // np.repeat(width, every)
        columns = np.repeat(column, every) + number % np.repeat(width, every)
        order = np.lexsort((columns, rows))
        return rows[order].astype(np.int32), columns[order].astype(np.int32)

    def bytes_of(self, rule: Function) -> int:
        """What the bits of a function take."""
        return math.prod(_copies(rule)) * self.count * self.size * (_PACKED_KEYS // 8)

    def packed(self, rule: Function) -> list[Array]:
        """Bits [*batch or 1, N or 1, block, query, key / 8], the first key lowest; starts of rows; columns."""
        rows, columns = self.each()
        copies, n = _copies(rule), len(rule.sizes.batch)
        places = np.arange(8, dtype=np.uint8).reshape((1,) * (n + 3) + (8,))

        def block(row: Array, column: Array) -> Array:
            seen = rule.pairs((row * self.size, self.size), (column * _PACKED_KEYS, _PACKED_KEYS))
            seen = seen.reshape(*seen.shape[:-1], -1, 8)
            return (seen.astype(jnp.uint8) << places).sum(-1, dtype=jnp.uint8)

        # The barrier keeps XLA from evaluating functions without arrays while it compiles.
        given = jax.lax.optimization_barrier((jnp.asarray(rows), jnp.asarray(columns)))
        some = min(self.count, max(1, _PAIRS_AT_ONCE // (math.prod(copies) * self.size * _PACKED_KEYS)))

        def step(i: Any, bits: Array) -> Array:
            first = jnp.minimum(i * some, self.count - some)
            part = jax.vmap(block, out_axes=n + 1)(*(jax.lax.dynamic_slice_in_dim(x, first, some) for x in given))
            return jax.lax.dynamic_update_slice_in_dim(bits, part, first, n + 1)

        bits = jnp.zeros((*copies, self.count, self.size, _PACKED_KEYS // 8), jnp.uint8)
        bits = jax.lax.fori_loop(0, -(-self.count // max(some, 1)), step, bits)
        starts = np.searchsorted(rows, np.arange(self.rows + 1)).astype(np.int32)
        return [bits, *(jnp.asarray(x.reshape((1,) * n + x.shape)) for x in (starts, columns))]


def _copies(rule: Function) -> tuple[int, ...]:
    """[*batch or 1, N or 1]: what a function is evaluated for one by one."""
    return jax.eval_shape(lambda: rule.pairs((0, 1), (0, 1))).shape[:-2]


def _blocks_of(problem: Problem) -> _Blocks:
    """What must be looked at whatever the arrays of the mask hold."""
    sizes = problem.sizes
    lengths = Sizes((), 0, sizes.query_length, sizes.key_length, 1, 1)
    return _undecided(problem.program.mask[0], lengths, min(_PACKED_KEYS, sizes.query_length))


@functools.lru_cache(maxsize=64)
def _undecided(mask: Any, sizes: Sizes, size: int) -> _Blocks:
    unknown = [jax.ShapeDtypeStruct((), np.int32)] * mask.num_leaves
    found, count = [], 0
    for some in regions(jax.tree.unflatten(mask, unknown), sizes, size, _PACKED_KEYS):
        partial = some.kinds[0] == 1
        found.append(np.stack([some.rows, some.columns, some.heights, some.widths])[:, partial])
        count += int((found[-1][2] * found[-1][3]).sum())
    return _Blocks(size, -(-sizes.query_length // size), count, np.concatenate(found, axis=1))


@dataclasses.dataclass
class _Needs:
    """What the kernel must have room for to take a mask.

    Attributes:
      names: of its steps; depth: how many values it holds at most.
      bits: bytes of packed functions; all_bytes: of all arrays that are made for it.
    """

    names: list[str]
    depth: int
    bits: int
    all_bytes: int

    @classmethod
    def of(cls, problem: Problem, operands: list[Any]) -> _Needs:
        """Raises `NotSeparable` where the mask does not come apart."""
        found: list[_Needs] = []

        def look(operands: list[Any]) -> list[Any]:
            rule = separate(problem.program.mask_of(operands), problem.sizes)
            rules = list(_leaves(rule))
            functions = [x for x in rules if isinstance(x, Function)]
            bits = sum(_blocks_of(problem).bytes_of(x) for x in functions)
            lists = sum(4 * (_blocks_of(problem).count + _blocks_of(problem).rows + 1) for _ in functions)
            lists += min(8 * bits, _PAIRS_AT_ONCE)  # booleans before they are packed
            compared = sum(4 * (x.keys.size + x.queries.size) for x in rules if isinstance(x, Comparison))
            found.append(cls(_flattened_names(rule), _depth(rule), bits, bits + lists + compared))
            return []

        jax.eval_shape(look, list(operands))
        return found[0]


def _leaves(rule: Rule) -> Iterator[Rule]:
    if not isinstance(rule, Combined):
        yield rule
        return
    for part in rule.rules:
        yield from _leaves(part)


def _unsupported_mask(problem: Problem, operands: list[Any]) -> str | None:
    try:
        needs = _Needs.of(problem, operands)
    except NotSeparable as reason:
        return f"cannot take this mask: {reason}"
    most = max(_MOST_BITS, sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in operands[:3]))
    if needs.bits > most:
        return f"would pack this mask into {needs.bits / 2**20:.0f} MiB, more than {most // 2**20} MiB"
    dense = sum(name in ("dense", "bits") for name in needs.names)
    comparisons = sum(name in _MASK_STEPS[:5] for name in needs.names)
    too_many = comparisons > _MOST_COMPARISONS or dense > _MOST_ARRAYS or len(needs.names) > _MOST_STEPS
    if too_many or needs.depth > _MOST_DEPTH:
        return "cannot take a mask of so many parts"
    return None


def _flattened_names(rule: Rule) -> list[str]:
    if isinstance(rule, Comparison):
        return [rule.operator]
    if isinstance(rule, (Pairs, Function)):
        return ["dense" if isinstance(rule, Pairs) else "bits"]
    assert isinstance(rule, Combined)
    return [name for part in rule.rules for name in _flattened_names(part)] + [rule.operator]


@dataclasses.dataclass(frozen=True)
class _ScoreStep:
    """A score as the kernel takes it.

    Attributes:
      step: one of `_SCORE_STEPS`; array: what is added, or caps and factors [*batch or 1, N or 1].
      position: of the score's first operand; node: the score, its leaves in operand form.
    """

    problem: Problem
    step: str
    node: Score
    position: int
    array: Any

    @property
    def by_head(self) -> bool:
        """Whether its array has one number for each batch entry and head."""
        return self.step in ("soft_cap", "scale")

    def _positions(self) -> range:
        return range(self.position, self.position + len(jax.tree.leaves(self.node)))

    def wanted(self, shapes: dict[int, tuple[int, ...]]) -> bool:
        return any(i in shapes for i in self._positions())

    def gradient_shape(self, shapes: dict[int, tuple[int, ...]]) -> tuple[int, ...]:
        """What the kernel gives: by query and key of the wanted shape, else for every batch entry and head."""
        sizes = self.problem.sizes
        if self.step == "by_distance":
            return (*sizes.batch, sizes.heads, _distances(sizes))
        if self.by_head:
            return (*sizes.batch, sizes.heads, sizes.query_length)
        queries, keys = self._axes()
        if queries and keys:
            return shapes[self.position]
        return (*sizes.batch, sizes.heads, sizes.key_length if keys else sizes.query_length)

    def _axes(self) -> tuple[bool, bool]:
        """Whether a bias has an axis of queries, and one of keys."""
        sizes = self.problem.sizes
        return self.array.shape[-2] == sizes.query_length, self.array.shape[-1] == sizes.key_length

    def pulled(self, gradient: Array, shapes: dict[int, tuple[int, ...]]) -> dict[int, Array]:
        """Gradients of the score's operands from what the kernel gave."""
        if self.by_head:
            gradient = gradient.sum(-1) if self.step == "scale" else gradient.sum((-2, -1))
            return {self.position: _summed(gradient, shapes[self.position])}
        if self.step == "bias":
            queries, keys = self._axes()
            if not (queries and keys):
                gradient = gradient[..., None, :] if keys else gradient[..., None]
            return {self.position: _summed(gradient, shapes[self.position])}
        leaves, structure = jax.tree.flatten(self.node)
        moved = [n for n, i in enumerate(self._positions()) if i in shapes]
        # A leaf that all batch entries share gets a gradient for each, where that is wanted.
        n = len(self.problem.sizes.batch)
        wide = [jnp.broadcast_to(leaves[m], (*shapes[self.position + m][:n], *leaves[m].shape[n:])) for m in moved]

        def vector(*some: Array) -> Array:
            own = list(leaves)
            for m, leaf in zip(moved, some, strict=True):
                own[m] = leaf
            return _by_distance(self.problem, jax.tree.unflatten(structure, own))

        made, pull = jax.vjp(vector, *wide)
        return {self.position + m: x for m, x in zip(moved, pull(_summed(gradient, made.shape)), strict=True)}


def _nodes(problem: Problem, operands: list[Any]) -> list[tuple[int, Score]]:
    """The scores in their order, each behind the position of its first operand."""
    nodes, position = [], next(iter(problem.program.score_positions()), 0)
    for structure in problem.program.scores:
        nodes.append((position, jax.tree.unflatten(structure, operands[position : position + structure.num_leaves])))
        position += structure.num_leaves
    return nodes


def _scaled(nodes: list[tuple[int, Score]]) -> tuple[int | None, list[tuple[int, Score]]]:
    """The position of a scale that comes first, which the kernel has a place for; and all other scores."""
    if nodes and isinstance(nodes[0][1], Scale):
        return nodes[0][0], nodes[1:]
    return None, nodes


def _step(problem: Problem, position: int, node: Score) -> _ScoreStep:
    if isinstance(node, SoftCap):
        cap = node.cap if is_array(node.cap) else np.full((1,) * len(problem.sizes.batch), node.cap)
        return _ScoreStep(problem, "soft_cap", node, position, cap.astype(problem.accumulate)[..., None])
    if isinstance(node, Scale):
        return _ScoreStep(problem, "scale", node, position, node.factor.astype(problem.accumulate))
    if isinstance(node, Bias):
        return _ScoreStep(problem, "bias", node, position, node.array)
    return _ScoreStep(problem, "by_distance", node, position, _by_distance(problem, node))


def _unsupported_scores(problem: Problem, operands: list[Any]) -> str | None:
    _, nodes = _scaled(_nodes(problem, operands))
    for _, node in nodes:
        if not isinstance(node, (SoftCap, Bias, Scale)) and not node.by_distance:
            return f"cannot run {type(node).__name__}, a function of JAX, inside its loops"
    return f"takes {_MOST_SCORES} scores at most" if len(nodes) > _MOST_SCORES else None


def _distances(sizes: Sizes) -> int:
    return max(sizes.query_length + sizes.key_length - 1, 0)


def _by_distance(problem: Problem, node: Score) -> Array:
    """What a score adds, by t - s + S - 1: [*batch or 1, N, T + S - 1]. The score itself is asked, with one query."""
    sizes = problem.sizes
    n = len(sizes.batch)
    leaves = [tile_form(leaf, axes, n, sizes.group) if is_array(leaf) else leaf for _, leaf, axes in node.operands()]
    lanes = tuple(max((leaf.shape[i] for leaf in leaves), default=1) for i in range(n))
    spans = (0, sizes.key_heads), (0, 1), (1 - sizes.query_length, _distances(sizes))
    one = dataclasses.replace(sizes, batch=lanes)
    tile = Tile(one, np.zeros((1,) * n, np.int32), lanes, *spans)
    node = jax.tree.unflatten(jax.tree.structure(node), leaves)
    added = node.evaluate(jnp.zeros(tile.shape, problem.accumulate), tile)
    return jnp.flip(added.reshape(*lanes, sizes.heads, -1), -1)


def _summed(x: Array, shape: tuple[int, ...]) -> Array:
    """Summed over the axes that have size 1 in `shape`."""
    axes = tuple(i for i, (have, want) in enumerate(zip(x.shape, shape, strict=True)) if have != want)
    return x.sum(axes, keepdims=True) if axes else x


def _run(name: str, operands: list[Any], results: list[Any], attributes: dict[str, Any]) -> list[Array]:
    return list(jax.ffi.ffi_call(f"attnjax_{name}", results)(*operands, **attributes))


@functools.cache
def _library() -> Any:
    """The library, its functions registered with XLA; or the reason why there is none."""
    path = pathlib.Path(__file__).parent / "native" / "libattnjax_cpu.so"
    if not path.exists():
        return (
            "the compiled kernel was not built: install attnjax where there is a C++17 compiler, with pip install "
            "--force-reinstall --no-cache-dir (pip keeps what it built without one)"
        )
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return f"the compiled kernel cannot be loaded: {error}"
    library.attnjax_instruction_sets.restype = ctypes.c_char_p
    for part in PARTS:
        target = jax.ffi.pycapsule(getattr(library, f"attnjax_{part}"))
        jax.ffi.register_ffi_target(f"attnjax_{part}", target, platform="cpu")
    return library
