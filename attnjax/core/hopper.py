"""`Call` and `Kernel`: what kernels for Hopper GPUs in Pallas on Mosaic GPU share: arrays, pieces, groups of warps.

A program owns 128 rows, queries or keys, of a head and has three groups of four warps. One group fetches blocks of the
other side's rows into shared memory, a few ahead; the two others take 64 rows each. Arrays whose sizes do not fit are
padded first: rows to whole blocks, head sizes to multiples of 64.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import mlir

from attnjax.core.program import Problem
from attnjax.core.split import Split, entry_of
from attnjax.core.view import View
from attnjax.core.visits import Lists, visits

Array = jax.Array
Refs = dict[str, Any]

GROUP_ROWS, GROUPS = 64, 2  # rows of a group of warps (what wgmma multiplies), and how many groups compute
ROWS = GROUP_ROWS * GROUPS
SHARED = 227 * 1024  # bytes of shared memory that a program may have
DEVICE = "NVIDIA H100 80GB HBM3"
_MULTIPLE = 64  # of head sizes: a row of 128 bytes in shared memory


def padded_sizes(problem: Problem) -> tuple[int, int]:
    """Head size and value size as the kernels have them."""
    return _up(problem.head_size, _MULTIPLE), _up(problem.value_size, _MULTIPLE)


def padded_bytes(problem: Problem) -> int:
    """About how large the copies of query, key and value are, if there have to be any."""
    sizes, batch, wide = problem.sizes, math.prod(problem.sizes.batch), padded_sizes(problem)
    rows = _up(sizes.query_length, ROWS) * sizes.heads * batch
    columns = _up(sizes.key_length, ROWS) * sizes.key_heads * batch
    short = sizes.query_length % ROWS or sizes.key_length % ROWS
    narrow = wide != (problem.head_size, problem.value_size)
    return 2 * (rows + columns) * sum(wide) if short or narrow or problem.program.mask else 0


@dataclasses.dataclass(frozen=True)
class Tiling:
    """A block that is fetched has `block` rows; `stages` of them are in shared memory at once."""

    block: int
    stages: int


class Call:
    """A call's arrays, padded, with one batch axis, and how a kernel is run on them.

    Attributes:
      by_key: programs own keys and fetch blocks of queries; else they own queries and fetch keys.
      given: the arrays that a kernel may load from, by name.
      entries: how many batch entries there are; queries, keys, head_size, value_size: sizes with what is padded.
    """

    def __init__(
        self, problem: Problem, operands: list[Array], tiling: Tiling, *, by_key: bool = False, interpret: bool = False
    ):
        self.problem, self.sizes, self.batch, self.tiling = problem, problem.sizes, problem.sizes.batch, tiling
        self.by_key, self.interpret = by_key, interpret
        self.entries = math.prod(self.batch)
        self.split = Split(problem, operands)
        blocks = (tiling.block, ROWS) if by_key else (ROWS, tiling.block)
        self.lists = Lists(visits(problem, operands, *blocks, by_key=by_key), self.batch)
        self.queries, self.keys = (
            _up(length, block)
            for length, block in zip((self.sizes.query_length, self.sizes.key_length), blocks, strict=True)
        )
        self.head_size, self.value_size = padded_sizes(problem)
        n, names = len(self.batch), ("query", "key", "value")
        self.lanes = {name: tuple(x.shape[:n]) for name, x in zip(names, operands[:3], strict=True)}
        self.given: Refs = {f"piece{i}": self._piece(i) for i in range(len(self.split.pieces))} | self.lists.given
        for name, x in zip(names, operands[:3], strict=True):
            self.give(name, x)

    def give(self, name: str, x: Array) -> None:
        """Adds rows by query `[*batch, T, N, size]`, or by key, or numbers by query `[*batch, T, N]`."""
        x = x.reshape(-1, *x.shape[len(self.batch) :])
        if x.ndim == 3:  # numbers of a head lie side by side
            self.given[name] = _padded(x.swapaxes(1, 2), (self.sizes.heads, self.queries))
            return
        rows = self.keys if name in ("key", "value") else self.queries
        self.given[name] = _padded(x, (rows, x.shape[2], _up(x.shape[3], _MULTIPLE)))

    def _piece(self, i: int) -> Array:
        """A piece as the kernel loads it: [entries, N or 1, *own rows, *fetched rows], padded; booleans as integers."""
        piece, x = self.split.pieces[i], jnp.asarray(self.split.arrays[i])
        x = x.astype(jnp.int32) if x.dtype == np.bool_ else x
        lengths = [self.queries] * piece.queries + [self.keys] * piece.keys
        x = x if piece.keys else x[..., 0]
        x = x if piece.queries else x[:, :, 0]
        x = _padded(x, [x.shape[1], *lengths])
        return x.swapaxes(2, 3) if self.by_key and len(lengths) == 2 else x

    def run(
        self, name: str, program: type[Kernel], results: dict[str, tuple[tuple[int, ...], Any]], scratch: Refs
    ) -> dict[str, Array]:
        """Runs a kernel on the arrays of `given`.

        Args:
          results: shapes and dtypes of what it writes, by name.
          scratch: shared memory and barriers, by name.
        """
        shapes = {key: jax.ShapeDtypeStruct(shape, dtype) for key, (shape, dtype) in results.items()}
        launch = _Launch(f"attnjax_{name}", self, program, tuple(self.given), shapes, scratch)
        arrays = list(self.given.values())
        made = launch(*arrays) if self.interpret else _kernel_p.bind(*arrays, launch=launch)
        return dict(zip(results, made, strict=True))

    def shared(self, *shape: int) -> Any:
        """Rows in shared memory, laid out as matrices are multiplied there."""
        transforms = (_gpu().TilingTransform((8, 64)), _gpu().SwizzleTransform(128))
        return _gpu().SMEM(shape, jnp.dtype(self.problem.dtype), transforms=transforms)

    def numbers(self, *shape: int) -> Any:
        """float32 numbers in shared memory."""
        return _gpu().SMEM(shape, jnp.float32)

    def barrier(self, count: int, arrivals: int = 1) -> Any:
        """So many barriers, each of which is passed when so many have arrived."""
        return _gpu().Barrier(num_arrivals=arrivals, num_barriers=count)


@dataclasses.dataclass(frozen=True, eq=False)
class _Launch:
    """A kernel with its shapes, to be called with its arrays."""

    name: str
    call: Call
    program: type[Kernel]
    given: tuple[str, ...]
    results: Refs
    scratch: Refs

    def __call__(self, *arrays: Array) -> list[Array]:
        call, gpu, pl = self.call, _gpu(), _pallas()
        names = (*self.given, *self.results)

        def kernel(*refs: Any) -> None:
            run = lambda **own: self.program(call, dict(zip(names, refs, strict=True)), own).run()
            pl.run_scoped(run, collective_axes="group", **self.scratch)

        kernel.__name__ = self.name  # what profiles show
        if call.interpret:
            device = jax.sharding.AbstractDevice(device_kind=DEVICE, platform="gpu", num_cores=132)
            pretended = jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))
            options: dict[str, Any] = dict(interpret=gpu.InterpretGPUParams(detect_races=True))
        else:
            pretended, options = contextlib.nullcontext(), dict(compiler_params=gpu.CompilerParams(approx_math=True))
        heads, rows = (call.sizes.key_heads, call.keys) if call.by_key else (call.sizes.heads, call.queries)
        run = gpu.kernel(
            kernel,
            out_type=list(self.results.values()),
            grid=(heads, rows // ROWS, call.entries),
            grid_names=("head", "row", "entry"),
            num_threads=GROUPS + 1,
            thread_name="group",
            **options,
        )
        with pretended:
            return list(run(*arrays))


class Kernel:
    """One program of a kernel. Kernels derive from it and say what the groups do: `fetch` and `compute`.

    Attributes:
      refs, own: arrays in memory, and what is in shared memory, by name.
      b, head, row: the batch entry, the head (of keys where it owns keys) and which 128 rows of it.
      start: the first row of this group.
      shape: of a tile, [own rows, fetched rows].
    """

    registers = (40, 232)  # of a thread of the group that fetches, and of one that computes

    def __init__(self, call: Call, refs: Refs, own: Refs):
        self.call, self.refs, self.own, self.gpu, self.pl = call, refs, own, _gpu(), _pallas()
        self.b, self.head, self.row = (lax.axis_index(name) for name in ("entry", "head", "row"))
        self.group = lax.axis_index("group")
        self.start = self.row * ROWS + self.group * GROUP_ROWS
        self.rows = self.pl.ds(self.start, GROUP_ROWS)
        self.shape = (GROUP_ROWS, call.tiling.block)

    def run(self) -> None:
        fewer, more = self.registers

        @self.pl.when(self.group == GROUPS)
        def _fetch() -> None:
            self.gpu.set_max_registers(fewer, action="decrease")
            self.fetch()

        @self.pl.when(self.group < GROUPS)
        def _compute() -> None:
            self.gpu.set_max_registers(more, action="increase")
            self.compute()

    def fetch(self) -> None:
        """Brings blocks into shared memory, each as soon as its place there is free."""
        raise NotImplementedError

    def compute(self) -> None:
        """Computes what belongs to this group's rows."""
        raise NotImplementedError

    def entry(self, name: str) -> Any:
        """Which entry of query, key or value belongs to the batch entry."""
        return entry_of(self.call.lanes[name], self.call.batch, self.b)

    def visit(self, h: Any, step: Callable[..., Any], state: Any) -> tuple[Any, Any]:
        """Goes through what these rows visit as rows of the query head `h`, the partial blocks first.

        Args:
          step: `step(place, block, state, masked)` gives the next state.

        Returns:
          How many blocks there were, and the last state.
        """
        lists = self.call.lists
        partial, visited, block_of = lists.of(self.refs, self.b, h, self.row)
        for there, masked, first, last in (
            (lists.has_partial, True, np.int32(0), partial),
            (lists.has_full, False, partial, visited),
        ):
            if there:
                run = lambda place, state, masked=masked: step(place, block_of(place, masked), state, masked)
                state = lax.fori_loop(first, last, run, state)
        return visited, state

    def slot(self, place: Any) -> Any:
        """Where in shared memory the block at this place of the list is."""
        return lax.rem(place, np.int32(self.call.tiling.stages))

    def bring(self, place: Any, free: str, has: str, *copies: tuple[Any, str]) -> None:
        """Copies arrays, each with the name of where to, into their slot as soon as it is free."""
        slot = self.slot(place)

        @self.pl.when(place >= self.call.tiling.stages)
        def _wait() -> None:
            self.gpu.barrier_wait(self.own[free].at[slot])

        for source, name in copies:
            self.gpu.copy_gmem_to_smem(source, self.own[name].at[slot], self.own[has].at[slot])

    def bring_own(self, *copies: tuple[Any, str]) -> None:
        """Copies this group's rows into shared memory and waits for them."""
        place, full = (lambda name: self.own[name].at[self.group]), self.own["has_own"].at[self.group]
        for source, name in copies:
            self.gpu.copy_gmem_to_smem(source, place(name), full)
        self.gpu.barrier_wait(full)

    def write(self, *results: tuple[Array, str, Any]) -> None:
        """Writes this group's rows by way of shared memory: values, where there, where to."""
        for value, name, _ in results:
            ref = self.own[name].at[self.group]
            ref[...] = value.astype(ref.dtype)
        self.gpu.commit_smem()
        for _, name, target in results:
            self.gpu.copy_smem_to_gmem(self.own[name].at[self.group], target)
        self.gpu.wait_smem_to_gmem(0)

    def full(self, shape: tuple[int, ...], value: float) -> Array:
        """A tile, or a number for each own row, of this value."""
        layout = self.gpu.Layout.WGMMA
        return self.gpu.layout_cast(
            jnp.full(shape, value, jnp.float32), layout if len(shape) == 2 else layout.reduce(1)
        )

    def product(self, x: Any, y: Any, meanwhile: Callable[[], None] = lambda: None) -> Array:
        """x y^T of rows in shared memory, own ones and fetched ones; `meanwhile` runs before it is waited for."""

        def multiply(tile: Any) -> Array:
            self.gpu.wgmma(tile, x, y.transpose((1, 0)))
            meanwhile()
            return tile[...]

        return self.pl.run_scoped(multiply, self.gpu.ACC(self.shape, jnp.float32))

    def add(self, sums: Array, tile: Array, rows: Any) -> Array:
        """sums + tile rows, of rows in shared memory; the tile is rounded to their type."""
        tile = tile.astype(rows.dtype)
        if self.call.interpret:  # which has no products of registers and shared memory
            sums = sums + jnp.dot(tile, rows[...], preferred_element_type=jnp.float32)
            self.gpu.commit_smem()
            return sums
        return self.pl.run_state(lambda ref: self.gpu.wgmma(ref, tile, rows))(self.gpu.ACC.init(sums))

    def across(self, x: Array, axis: int, shape: tuple[int, ...] | None = None) -> Array:
        """Numbers along an axis of a tile, or of this shape, spread over the other one."""
        return lax.broadcast_in_dim(x, shape or self.shape, [axis])

    def view(self, h: Any, block: Any, raw: Array, masked: bool, known: dict[int, Array]) -> View:
        """The logits of this group's rows with a fetched block, of the query head `h`."""
        call, first = self.call, block * self.call.tiling.block
        own, fetched = (
            at + self.gpu.broadcasted_iota(jnp.int32, self.shape, axis, layout=self.gpu.Layout.WGMMA)
            for axis, at in enumerate((self.start, first))
        )
        q, k = (fetched, own) if call.by_key else (own, fetched)
        loaded = self.loaded(h, first, known, () if masked else call.split.of_mask)
        values = [loaded.get(n) for n in range(len(call.split.pieces))]
        return View(call.split, (self.b, h), q, k, values, raw, masked)

    def loaded(self, h: Any, first: Any, known: dict[int, Array], without: Any = ()) -> dict[int, Array]:
        """The pieces of a tile, spread over it; where `first` is None those that need no fetched rows."""
        call, gpu, found = self.call, self.gpu, dict(known)
        for n, piece in enumerate(call.split.pieces):
            by_own, by_fetched = (piece.keys, piece.queries) if call.by_key else (piece.queries, piece.keys)
            if n in known or n in without or n == call.split.sinks or (by_fetched and first is None):
                continue
            at: list[Any] = [piece.entry(call.batch, self.b), h if piece.heads else 0]
            at += [self.rows] if by_own else []
            at += [self.pl.ds(first, call.tiling.block)] if by_fetched else []
            ref, layout = self.refs[f"piece{n}"], gpu.Layout.WGMMA
            load = functools.partial(gpu.load, optimized=False)
            if by_own and by_fetched:
                x = load(ref.at[tuple(at)], layout=layout)
            elif by_own or by_fetched:
                x = self.across(load(ref.at[tuple(at)], layout=layout.reduce(1 if by_own else 0)), 0 if by_own else 1)
            else:
                x = gpu.layout_cast(jnp.full(self.shape, ref[tuple(at)], ref.dtype), layout)
            found[n] = x != 0 if piece.dtype == "bool" else x
        return found


# A primitive of its own, so that the kernel is built where its device is known.
_kernel_p = Primitive("attnjax_mosaic_gpu")
_kernel_p.multiple_results = True
_kernel_p.def_abstract_eval(lambda *_, launch: [ShapedArray(x.shape, x.dtype) for x in launch.results.values()])
mlir.register_lowering(
    _kernel_p,
    lambda ctx, *arrays, launch: mlir.lower_fun(launch, multiple_results=True)(ctx, *arrays),
    platform="cuda",
)


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _padded(x: Array, sizes: Any) -> Array:
    """With zeros, from the second axis on."""
    widths = [(0, 0), *((0, size - have) for have, size in zip(x.shape[1:], sizes, strict=True))]
    return jnp.pad(x, widths) if any(after for _, after in widths) else x


def _pallas() -> ModuleType:
    """Pallas, when it is first needed: it takes long to import."""
    return importlib.import_module("jax.experimental.pallas")


def _gpu() -> ModuleType:
    return importlib.import_module("jax.experimental.pallas.mosaic_gpu")
