"""`Loop`: a Pallas kernel for TPUs that walks a list of tiles: its grid, what a step loads, where in a row it stands.

It hands out the tile's parts of the pieces that masks and scores are made of (`core.split`), and computes nothing with
them. Queries lie along the sublanes of a tile and keys along its lanes, or the other way round.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attnjax.core.program import Problem
from attnjax.core.split import PairTile, Piece, Split, entry_of, member_of
from attnjax.core.steps import FULL, PARTIAL, Step, Steps, step_of
from attnjax.core.tiles import Sizes

Array = jax.Array
Loaded = tuple[Any, tuple[int, ...], str | None]  # an array [entries, *axes] or its shape, its lanes, its axes

LANES = 128


@dataclasses.dataclass(frozen=True)
class Loop:
    """One kernel.

    Attributes:
      blocks: queries and keys of a tile.
      order: what a row of tiles is: "query" (of one head), "key" (of all heads of a group), or "pair": each tile is
        alone, and visited by all batch entries and heads that share a piece.
      steps: the tiles.
      wanted: the pieces whose values must have the whole shape of a tile, because gradients of them are asked for.
      by_row: how many numbers per query are needed as columns; they are in the last input.
      shared: the piece, in the order "pair".
    """

    problem: Problem
    split: Split
    blocks: tuple[int, int]
    order: str
    steps: Steps
    wanted: Sequence[int] = ()
    by_row: int = 0
    shared: Piece | None = None

    @property
    def flipped(self) -> bool:
        """Whether keys lie along sublanes."""
        return self.order != "query"

    @property
    def shape(self) -> tuple[int, int]:
        """Of a tile."""
        block_q, block_k = self.blocks
        return (block_k, block_q) if self.flipped else (block_q, block_k)

    @property
    def grid(self) -> tuple[int, ...]:
        sizes, count = self.problem.sizes, self.steps.numbers.shape[-1]
        batch = math.prod(sizes.batch)
        if self.order == "key":
            return (batch, sizes.key_heads, count, sizes.group)
        if self.shared is not None:
            entries, heads = math.prod(self.shared.lanes), sizes.heads if self.shared.heads else 1
            return (entries, heads, count, batch // entries, sizes.heads // heads)
        return (batch, sizes.heads, count)

    def at(self, ids: Sequence[Any], numbers: Any) -> tuple[Any, Any, Step]:
        """The batch entry, the query head and the tile of a step."""
        sizes = self.problem.sizes
        b, h, t, *inner = ids
        if self.order == "key":
            h = h * sizes.group + inner[0]
        if self.shared is not None:
            b = member_of(self.shared.lanes, sizes.batch, b, inner[0])
            h = h if self.shared.heads else inner[1]
        return b, h, step_of(numbers[self.steps.place(sizes.batch, b, h) + t])

    def spec(self, array: Any, lanes: tuple[int, ...], axes: str | None) -> Any:
        """The part of an array that a step loads; one without axes lies in scalar memory as a whole.

        Axes are h query heads, k key/value heads, t queries, s keys, w windows of distances, 1 of that size, . whole.
        """
        if axes is None:
            return _pallas().BlockSpec(memory_space=_tpu().SMEM)
        sizes, blocks = self.problem.sizes, dict(zip("ts", self.blocks, strict=True))
        block = (n if a == "." else blocks.get(a) for a, n in zip(axes, array.shape[1:], strict=True))

        def index(*args: Any) -> tuple[Any, ...]:
            b, h, step = self.at(args[:-1], args[-1])
            place: dict[str, Any] = {"h": h, "t": step.query, "s": step.key, "1": 0, ".": 0}
            place["k"] = h if sizes.group == 1 else lax.div(h, np.int32(sizes.group))
            place["w"] = _window(sizes.query_length, *self.blocks, step)
            return (entry_of(lanes, sizes.batch, b), *(place[a] for a in axes))

        return _pallas().BlockSpec((None, *block), index)

    def piece(self, n: int) -> Loaded:
        """A piece as it is loaded."""
        piece, array = self.split.pieces[n], self.split.arrays[n]
        array = array.astype(_type_of(piece))
        head = "h" if piece.heads else "1"
        if piece.by_distance:
            return _windows(array, self.problem.sizes, *self.blocks, self.flipped), piece.lanes, head + "w.."
        if piece.queries and piece.keys:
            return array, piece.lanes, head + "ts"
        if piece.queries or piece.keys:
            return array.reshape(*array.shape[:2], 1, -1), piece.lanes, head + (".t" if piece.queries else ".s")
        return array.reshape(-1), piece.lanes, None

    def call(
        self,
        name: str,
        body: Callable,
        inputs: Sequence[Loaded],
        outputs: Sequence[Loaded],
        scratch: Sequence[tuple[int, int]],
        *,
        interpret: Any,
    ) -> list[Array]:
        """Runs `body(here, *inputs, *outputs, *scratch)` at every step.

        Args:
          inputs, outputs: with arrays, and with shapes.
          scratch: shapes of float32 that are kept from step to step.
          interpret: as in `pallas_call`.
        """
        tpu = _tpu()
        pieces = [self.piece(n) for n in range(len(self.split.pieces))]
        columns = [n for n, piece in enumerate(self.split.pieces) if self._as_column(piece)]
        kept = [tpu.VMEM((self.shape[0], LANES), _type_of(self.split.pieces[n])) for n in columns]
        kept += [tpu.VMEM((self.shape[0], LANES), jnp.float32)] * self.by_row
        ends = np.cumsum([len(inputs), len(pieces), len(outputs), len(scratch), len(columns)]).tolist()

        def kernel(numbers: Any, *refs: Any) -> None:
            own, given, made, room, of_pieces = (refs[a:b] for a, b in zip((0, *ends), ends, strict=False))
            here = Here(self, numbers, given, dict(zip(columns, of_pieces, strict=True)))
            here.keep_rows(refs[ends[-1] :], own[-1])
            body(here, *own, *made, *room)

        given = [*inputs, *pieces]
        return _pallas().pallas_call(
            kernel,
            grid_spec=tpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=self.grid,
                in_specs=[self.spec(*one) for one in given],
                out_specs=[self.spec(*one) for one in outputs],
                scratch_shapes=[*(tpu.VMEM(shape, jnp.float32) for shape in scratch), *kept],
            ),
            out_shape=[shape for shape, _, _ in outputs],
            compiler_params=tpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", *["arbitrary"] * (len(self.grid) - 2)),
            ),
            interpret=interpret,
            name=name,
        )(jnp.asarray(self.steps.numbers).reshape(-1), *(array for array, _, _ in given))

    def _as_column(self, piece: Piece) -> bool:
        """Whether it has one number for each sublane of a tile."""
        return not piece.by_distance and (piece.queries, piece.keys) == (not self.flipped, self.flipped)


class Here:
    """One step of a kernel: where it is, and when which part of the body runs.

    Attributes:
      b, h: the batch entry and the query head.
      step: the tile.
      rows: the numbers per query as columns, references to [queries, lanes].
      own_row: the head's row among those of its group; in the order "key" only.
    """

    def __init__(self, loop: Loop, numbers: Any, given: Sequence[Any], columns: dict[int, Any]):
        pl = _pallas()
        self.loop, self._given, self._columns = loop, given, columns
        ids = [pl.program_id(axis) for axis in range(len(loop.grid))]
        self.b, self.h, self.step = loop.at(ids, numbers)
        alone, inner = loop.order == "pair", ids[3:]
        self._first = inner[0] >= 0 if alone else self.step.first != 0
        self._last = inner[0] >= 0 if alone else self.step.last != 0
        for index, size in zip(inner, loop.grid[3:], strict=True):
            self._first, self._last = self._first & (index == 0), self._last & (index == size - 1)
        if loop.order == "key":
            self.own_row = pl.ds(inner[0], 1)
        for n, ref in columns.items():  # they stay for a row of tiles, but where heads or batch entries take turns
            turns = alone or (inner and loop.split.pieces[n].heads)
            self._keep(inner[0] >= 0 if turns else self._first, ref, given[n][...])

    def keep_rows(self, columns: Sequence[Any], rows: Any) -> None:
        self.rows = columns
        for n, ref in enumerate(columns):
            self._keep(self._first, ref, rows[n : n + 1])

    def _keep(self, when: Any, ref: Any, row: Array) -> None:
        @_pallas().when(when)
        def _() -> None:
            ref[...] = column(row)

    def begin(self, body: Callable[[], None]) -> None:
        """Runs it where a row of tiles begins."""
        _pallas().when(self._first)(body)

    def visit(self, body: Callable[[PairTile, bool], None]) -> None:
        """Runs it with a tile that is not empty; and tells whether it is only partly seen."""
        known = self.loop.steps.numbers
        found = step_of(known).kind if isinstance(known, np.ndarray) else np.array([PARTIAL, FULL])
        for kind in (PARTIAL, FULL):
            if (found == kind).any():
                run = lambda kind=kind: body(self._tile(), kind == PARTIAL)
                _pallas().when(self.step.kind == kind)(run)

    def end(self, body: Callable[[], None]) -> None:
        """Runs it where a row of tiles ends."""
        _pallas().when(self._last)(body)

    def scalar(self, n: int) -> Array:
        """The number of a piece that has neither queries nor keys."""
        piece, sizes = self.loop.split.pieces[n], self.loop.problem.sizes
        entry = piece.entry(sizes.batch, self.b)
        return self._given[n][entry * sizes.heads + self.h if piece.heads else entry]

    def _tile(self) -> PairTile:
        loop = self.loop
        starts = self.step.query * loop.blocks[0], self.step.key * loop.blocks[1]
        axes = (1, 0) if loop.flipped else (0, 1)
        # Of the whole shape: comparisons of them then give whole booleans, which a TPU cannot spread.
        q, k = (
            start + lax.broadcasted_iota(jnp.int32, loop.shape, axis) for start, axis in zip(starts, axes, strict=True)
        )
        values = [self._value(n) for n in range(len(loop.split.pieces))]
        return loop.split.tile(q, k, self.b, self.h, values)

    def _value(self, n: int) -> Array:
        """The tile's part of a piece, of a shape that broadcasts to the tile; booleans have its whole shape."""
        loop, piece, ref = self.loop, self.loop.split.pieces[n], self._given[n]
        if piece.by_distance:
            value = _diagonals(ref[...], loop)
        elif piece.queries and piece.keys:
            value = ref[...].astype(_type_of(piece, large=False))
            value = value.T if loop.flipped else value
        elif n in self._columns:
            value = wide(self._columns[n][...], loop.shape[1])
        elif piece.queries or piece.keys:
            value = ref[...]
        else:
            value = self.scalar(n)
        if piece.dtype == "bool" or n in loop.wanted:
            value = jnp.broadcast_to(value, loop.shape)
        return value != 0 if piece.dtype == "bool" else value


def column(row: Array) -> Array:
    """A row [1, n] as a column [n, lanes], the same in all lanes."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def wide(column: Array, width: int) -> Array:
    """A column [n, lanes] as [n, width]."""
    return jnp.tile(column, (1, -(-width // LANES)))[:, :width]


def _type_of(piece: Piece, large: bool = True) -> Any:
    """The type in which a piece is loaded: of 32 bits, but for `large` ones, by query and key."""
    large = large and piece.queries and piece.keys
    if piece.dtype == "bool":
        return jnp.int8 if large else jnp.int32
    if large and piece.dtype == "bfloat16":
        return jnp.bfloat16
    return jnp.float32 if jnp.issubdtype(piece.dtype, jnp.floating) else jnp.int32


def _window(query_length: int, block_q: int, block_k: int, step: Step) -> Any:
    """Which window of distances belongs to a tile: see `_windows`."""
    apart = math.gcd(block_q, block_k)
    before = -(-query_length // block_q) - 1
    return step.key * (block_k // apart) + (before - step.query) * (block_q // apart)


def _windows(array: Array, sizes: Sizes, block_q: int, block_k: int, flipped: bool) -> Array:
    """The distances of each tile: [entries, heads, 1, T + S - 1] -> [entries, heads, windows, 1, width].

    A window begins with the distance between the last query and the first key of its tile. Flipped ones run backwards.
    """
    apart, width = math.gcd(block_q, block_k), block_q + block_k
    rows, columns = -(-sizes.query_length // block_q), -(-sizes.key_length // block_k)
    count = ((columns - 1) * block_k + (rows - 1) * block_q) // apart + 1
    before = rows * block_q - sizes.query_length
    after = (count - 1) * apart + width - before - array.shape[-1]
    padded = jnp.pad(array[:, :, 0], [(0, 0), (0, 0), (before, after)])
    places = np.arange(count)[:, None] * apart + np.arange(width)[:: -1 if flipped else 1]
    return padded[:, :, places][:, :, :, None]


def _diagonals(window: Array, loop: Loop) -> Array:
    """A tile that is constant along its diagonals: each row of it is the window, rolled one further."""
    rows, columns = loop.shape
    spread = jnp.broadcast_to(window, (rows, window.shape[1]))
    shift = columns if loop.flipped else window.shape[1] - rows + 1
    return _tpu().roll(spread, shift, 1, stride=1, stride_axis=0)[:, :columns]


def _pallas() -> ModuleType:
    """Pallas, when it is first needed: it takes long to import."""
    return importlib.import_module("jax.experimental.pallas")


def _tpu() -> ModuleType:
    return importlib.import_module("jax.experimental.pallas.tpu")
