"""implementation="mosaic_gpu": a forward for Hopper GPUs in Pallas on Mosaic GPU, run where it is asked for by name.

A program owns 128 queries of a head, and has three groups of four warps. One group fetches blocks of keys and values,
a few ahead, into shared memory; the two others take 64 queries each, and one multiplies matrices while the other is at
its softmax. Masks and scores are run on tiles by `core.split`. The derivatives are those of other implementations.

Arrays whose sizes do not fit are padded first: queries to 128, keys to a block, head sizes to 64.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import mlir

from attnjax.core.devices import gpus
from attnjax.core.program import Problem
from attnjax.core.residual import NotSplittable
from attnjax.core.softmax import Rows, add_sinks, finite
from attnjax.core.split import Split, entry_of
from attnjax.core.view import LOG2E
from attnjax.core.visits import Visits, visits
from attnjax.tuning import Blocks

Array = jax.Array

PARTS = ("forward",)
_GROUP_ROWS, _GROUPS = 64, 2  # queries of a group of warps (what wgmma multiplies), and how many groups compute
_ROWS = _GROUP_ROWS * _GROUPS
_MULTIPLE = 64  # of head sizes: a row of 128 bytes in shared memory
_MOST_SIZE = 256
_SHARED = 227 * 1024  # bytes of shared memory that a program may have on Hopper
NEEDS = (0, 11, 2)  # of jax: an interpreter of these kernels, and the meaning of operations that they are written in
_HOPPER = "NVIDIA H100 80GB HBM3"


@dataclasses.dataclass(frozen=True)
class Config:
    """How the kernel runs. `None` chooses.

    Attributes:
      block_k: keys of a tile, 64 or 128.
      stages: so many blocks of keys and values are in shared memory, 2 to 4.
      interpret: `forward` runs as plain XLA on any device and looks for races; for tests, which call it themselves,
        because JAX's interpreter of these kernels cannot run inside of `attention`.
    """

    block_k: int | None = None
    stages: int | None = None
    interpret: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (("block_k", (64, 128)), ("stages", (2, 3, 4))):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value not in allowed):
                raise ValueError(f"Config: {name} must be one of {list(allowed)} or None, got {value!r}.")
        if not isinstance(self.interpret, bool):
            raise ValueError(f"Config: interpret must be True or False, got {self.interpret!r}.")


def unsupported(problem: Problem, operands: list[Any], platform: str, part: str) -> str | None:
    """A reason why this implementation cannot take a part of the problem, or `None`."""
    config = problem.config
    if part not in PARTS:
        return "has a forward only"
    if config is not None and not isinstance(config, Config):
        return "config is not one of mosaic_gpu"
    if jax.__version_info__ < NEEDS:
        return f"needs jax {'.'.join(map(str, NEEDS))} or newer, this is {jax.__version__}"
    if platform != "cuda":
        return f"runs on Hopper GPUs only, not on {platform}"
    if problem.dtype not in ("bfloat16", "float16"):
        return f"takes bfloat16 and float16, not {problem.dtype}"
    if max(problem.head_size, problem.value_size) > _MOST_SIZE:
        return f"takes head sizes up to {_MOST_SIZE}"
    others = [f"{kind} ({number})" for kind, number in gpus().items() if number not in (None, "9.0")]
    if others:
        return f"runs on Hopper GPUs (compute capability 9.0), not on {', '.join(others)}"
    return _unsupported_pieces(problem, operands)


def _unsupported_pieces(problem: Problem, operands: list[Any]) -> str | None:
    try:
        split = Split.described(problem, operands)
    except NotSplittable as reason:
        return f"cannot run this mask or score on its tiles: {reason}"
    if any(piece.by_distance for piece in split.pieces):
        return "cannot look up a score by distance inside its tiles"
    return None


def blocks(problem: Problem, platform: str) -> Blocks:
    """The tiles: those of a whole program."""
    return Blocks(_ROWS, _tiling(problem)[0], (1,) * len(problem.sizes.batch), 1)


def temporary_bytes(problem: Problem, platform: str) -> dict[str, int]:
    """About how much memory the forward needs beside its arguments and results: rows, and what has to be padded."""
    sizes, batch = problem.sizes, math.prod(problem.sizes.batch)
    rows, item = _up(sizes.query_length, _ROWS) * sizes.heads * batch, 2
    columns = _up(sizes.key_length, _tiling(problem)[0]) * sizes.key_heads * batch
    wide = [_up(size, _MULTIPLE) for size in (problem.head_size, problem.value_size)]
    short = sizes.query_length % _ROWS or sizes.key_length % _tiling(problem)[0]
    narrow = wide != [problem.head_size, problem.value_size]
    copies = item * (rows + columns) * sum(wide) if short or narrow or problem.program.mask else 0
    return {"forward": 2 * 4 * rows + copies}


def forward(problem: Problem, operands: list[Array], platform: str) -> Rows:
    """The output, and highest and total of the softmax, all in operand form."""
    out_shape, row_shape = problem.out_shapes()
    sinks = problem.program.sinks_of(operands)
    if math.prod((*out_shape, problem.sizes.key_length)):
        rows = _Call(problem, operands).run()
    else:  # no pairs
        zeros = jnp.zeros(row_shape, problem.accumulate)
        rows = Rows(jnp.zeros(out_shape, problem.dtype), zeros - jnp.inf, zeros)
    if sinks is None:
        return rows
    rows = rows._replace(out=rows.out.astype(problem.accumulate))
    rows = add_sinks(rows, sinks[..., None, :].astype(problem.accumulate))
    return rows._replace(out=rows.out.astype(problem.dtype))


def _tiling(problem: Problem) -> tuple[int, int]:
    """Keys of a block, and how many blocks are in shared memory: the largest that fit."""
    config = problem.config if isinstance(problem.config, Config) else Config()
    sizes = [_up(size, _MULTIPLE) for size in (problem.head_size, problem.value_size)]
    rows = 2 * _ROWS * (max(sizes) if _in_place(problem) else sum(sizes))
    fits = [
        (block_k, stages)
        for block_k in ((config.block_k,) if config.block_k else (128, 64))
        for stages in ((config.stages,) if config.stages else (3, 2))
        if rows + 2 * stages * block_k * sum(sizes) <= _SHARED - 4096
    ]
    return fits[0] if fits else (64, 2)


def _in_place(problem: Problem) -> bool:
    """Whether the output goes where the query was in shared memory."""
    return _up(problem.head_size, _MULTIPLE) == _up(problem.value_size, _MULTIPLE)


class _Call:
    """A call's arrays, padded, with one batch axis; and the kernel."""

    def __init__(self, problem: Problem, operands: list[Array]):
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import mosaic_gpu as plgpu

        self.pl, self.gpu = pl, plgpu
        self.problem, self.sizes, self.batch = problem, problem.sizes, problem.sizes.batch
        self.config = problem.config or Config()
        self.block_k, self.stages = _tiling(problem)
        self.entries = math.prod(self.batch)
        self.split = Split(problem, operands)
        self.visits: Visits = visits(problem, operands, _ROWS, self.block_k)
        self.queries = _up(self.sizes.query_length, _ROWS)
        self.keys = _up(self.sizes.key_length, self.block_k)
        self.head_size, self.value_size = (_up(x, _MULTIPLE) for x in (problem.head_size, problem.value_size))
        n = len(self.batch)
        query, key, value = operands[:3]
        if problem.program.mask:  # a hidden value may be NaN, and 0 times NaN is NaN: its key is NaN instead
            whole = jnp.isfinite(value).all(-1, keepdims=True)
            wide = jnp.broadcast_shapes(key.shape[:n], value.shape[:n])
            key = jnp.where(whole, jnp.broadcast_to(key, (*wide, *key.shape[n:])), jnp.nan).astype(key.dtype)
            value = jnp.where(whole, value, 0)
        self.lanes = [tuple(x.shape[:n]) for x in (query, key, value)]
        flat = lambda x, *sizes: _padded(x.reshape(-1, *x.shape[n:]), sizes)
        self.given = [
            flat(query, self.queries, self.sizes.heads, self.head_size),
            flat(key, self.keys, self.sizes.key_heads, self.head_size),
            flat(value, self.keys, self.sizes.key_heads, self.value_size),
            jnp.asarray(self.visits.counts),
            jnp.asarray(self.visits.blocks),
            *(self._piece(i) for i in range(len(self.split.pieces))),
        ]

    def _piece(self, i: int) -> Array:
        """A piece as the kernel loads it: [entries, N or 1, *T, *S], padded; booleans as integers."""
        piece, x = self.split.pieces[i], jnp.asarray(self.split.arrays[i])
        x = x.astype(jnp.int32) if x.dtype == np.bool_ else x
        x = x if piece.keys else x[..., 0]
        x = x if piece.queries else x[:, :, 0]
        lengths = [self.queries] * piece.queries + [self.keys] * piece.keys
        return _padded(x, [x.shape[1], *lengths])

    def run(self) -> Rows:
        launch = _Launch(self)
        made = launch(*self.given) if self.config.interpret else _kernel_p.bind(*self.given, launch=launch)
        out, highest, total = made
        shape, rows = self.problem.out_shapes()
        t, v = self.sizes.query_length, self.problem.value_size
        across = lambda x: x[..., :t].swapaxes(1, 2).reshape(rows)
        return Rows(out[:, :t, :, :v].reshape(shape), across(highest), across(total))


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _padded(x: Array, sizes: Any) -> Array:
    """With zeros, from the second axis on."""
    widths = [(0, 0), *((0, size - have) for have, size in zip(x.shape[1:], sizes, strict=True))]
    return jnp.pad(x, widths) if any(after for _, after in widths) else x


class _Launch:
    """The kernel of a call, to be called with its arrays."""

    def __init__(self, call: _Call):
        self.call = call
        e, t, n = call.entries, call.queries, call.sizes.heads
        row = jax.ShapeDtypeStruct((e, n, t), jnp.float32)
        self.results = [jax.ShapeDtypeStruct((e, t, n, call.value_size), call.problem.dtype), row, row]

    def __call__(self, *arrays: Array) -> list[Array]:
        call, gpu = self.call, self.call.gpu
        dtype, stages = jnp.dtype(call.problem.dtype), call.stages
        transforms = (gpu.TilingTransform((8, 64)), gpu.SwizzleTransform(128))
        shared = lambda *shape: gpu.SMEM(shape, dtype, transforms=transforms)
        rows = gpu.SMEM((_GROUPS, _GROUP_ROWS), jnp.float32)
        scratch = dict(
            query=shared(_GROUPS, _GROUP_ROWS, call.head_size),
            key=shared(stages, call.block_k, call.head_size),
            value=shared(stages, call.block_k, call.value_size),
            highest=rows,
            total=rows,
            has_query=gpu.Barrier(num_barriers=_GROUPS),
            has_key=gpu.Barrier(num_barriers=stages),
            has_value=gpu.Barrier(num_barriers=stages),
            free_key=gpu.Barrier(num_arrivals=_GROUPS, num_barriers=stages),
            free_value=gpu.Barrier(num_arrivals=_GROUPS, num_barriers=stages),
            turn=gpu.Barrier(num_arrivals=_GROUPS),
        )
        if not _in_place(call.problem):
            scratch["out"] = shared(_GROUPS, _GROUP_ROWS, call.value_size)

        def kernel(*refs: Any) -> None:
            call.pl.run_scoped(
                lambda **own: _Program(call, refs[: len(arrays)], refs[len(arrays) :], own).run(),
                collective_axes="group",
                **scratch,
            )

        if call.config.interpret:
            device = jax.sharding.AbstractDevice(device_kind=_HOPPER, platform="gpu", num_cores=132)
            pretended = jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))
            options: dict[str, Any] = dict(interpret=gpu.InterpretGPUParams(detect_races=True))
        else:
            pretended, options = contextlib.nullcontext(), dict(compiler_params=gpu.CompilerParams(approx_math=True))
        run = gpu.kernel(
            kernel,
            out_type=self.results,
            grid=(call.sizes.heads, call.queries // _ROWS, call.entries),
            grid_names=("head", "row", "entry"),
            num_threads=_GROUPS + 1,
            thread_name="group",
            **options,
        )
        with pretended:
            return list(run(*arrays))


class _Program:
    """One program: 128 queries of a head."""

    def __init__(self, call: _Call, given: Any, results: Any, own: dict[str, Any]):
        self.call, self.gpu, self.pl, self.own = call, call.gpu, call.pl, own
        self.query, self.key, self.value, self.counts, self.blocks, *self.pieces = given
        self.results = results
        self.b, self.h, self.row = (lax.axis_index(name) for name in ("entry", "head", "row"))
        self.group = lax.axis_index("group")
        at = (call.visits.entry(call.batch, self.b), call.visits.head(self.h), self.row)
        self.partial, self.visited = self.counts[*at, 0], self.counts[*at, 1]
        self.block_of = lambda place: self.blocks[*at, place]

    def run(self) -> None:
        when = self.pl.when

        @when(self.group == _GROUPS)
        def _fetch() -> None:
            self.gpu.set_max_registers(40, action="decrease")
            self.fetch()

        @when(self.group < _GROUPS)
        def _compute() -> None:
            self.gpu.set_max_registers(232, action="increase")
            self.compute()

    def fetch(self) -> None:
        """Brings keys and values, each block as soon as its place in shared memory is free."""
        call, own, gpu = self.call, self.own, self.gpu
        kv = lax.div(self.h, np.int32(call.sizes.group))
        key_entry, value_entry = (entry_of(lanes, call.batch, self.b) for lanes in call.lanes[1:])

        def bring(place: Any, _: Any) -> None:
            slot = lax.rem(place, np.int32(call.stages))
            keys = self.pl.ds(self.block_of(place) * call.block_k, call.block_k)

            @self.pl.when(place >= call.stages)
            def _wait_key() -> None:
                gpu.barrier_wait(own["free_key"].at[slot])

            gpu.copy_gmem_to_smem(self.key.at[key_entry, keys, kv], own["key"].at[slot], own["has_key"].at[slot])

            @self.pl.when(place >= call.stages)
            def _wait_value() -> None:
                gpu.barrier_wait(own["free_value"].at[slot])

            gpu.copy_gmem_to_smem(
                self.value.at[value_entry, keys, kv], own["value"].at[slot], own["has_value"].at[slot]
            )

        lax.fori_loop(np.int32(0), self.visited, bring, None)

    def compute(self) -> None:
        """The attention of this group's 64 queries."""
        call, own, gpu, group = self.call, self.own, self.gpu, self.group
        by_row = gpu.Layout.WGMMA.reduce(1)
        start = self.row * _ROWS + group * _GROUP_ROWS
        entry = entry_of(call.lanes[0], call.batch, self.b)
        rows = self.pl.ds(start, _GROUP_ROWS)
        gpu.copy_gmem_to_smem(self.query.at[entry, rows, self.h], own["query"].at[group], own["has_query"].at[group])
        gpu.barrier_wait(own["has_query"].at[group])
        fill = lambda shape, value, layout: gpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)
        state = (
            fill((_GROUP_ROWS, call.value_size), 0.0, gpu.Layout.WGMMA),
            fill((_GROUP_ROWS,), -jnp.inf, by_row),
            fill((_GROUP_ROWS,), 0.0, by_row),
        )
        known = self.loaded(start, None, {})
        self.pl.when(group == 1)(self.take_turns)  # half a step behind the other group
        for masked, first, last in ((True, np.int32(0), self.partial), (False, self.partial, self.visited)):
            step = functools.partial(self.step, masked=masked, start=start, known=known)
            state = lax.fori_loop(first, last, step, state)
        self.pl.when(group == 0)(self.take_turns)
        out, highest, total = state
        share = 1 / jnp.where(total == 0.0, 1.0, total)
        place = own["query" if _in_place(call.problem) else "out"].at[group]
        place[...] = (out * _across(share, out.shape, 0)).astype(call.problem.dtype)
        # The total goes with what `highest` is rounded to as it leaves the units of log 2.
        natural = highest * math.log(2)
        own["highest"].at[group][...] = natural
        own["total"].at[group][...] = total * jnp.exp2(finite(highest) - finite(natural) * LOG2E)
        gpu.commit_smem()
        to_out, *to_rows = self.results
        gpu.copy_smem_to_gmem(place, to_out.at[self.b, rows, self.h])
        for name, to in zip(("highest", "total"), to_rows, strict=True):
            gpu.copy_smem_to_gmem(own[name].at[group], to.at[self.b, self.h, rows])
        gpu.wait_smem_to_gmem(0)

    def take_turns(self) -> None:
        """Waits for the other group: one multiplies while the other does not."""
        self.gpu.barrier_arrive(self.own["turn"])
        self.gpu.barrier_wait(self.own["turn"])

    def step(self, place: Any, state: Any, *, masked: bool, start: Any, known: dict[int, Array]) -> Any:
        """A block of keys joins the softmax."""
        call, own, gpu = self.call, self.own, self.gpu
        out, highest, total = state
        slot = lax.rem(place, np.int32(call.stages))
        gpu.barrier_wait(own["has_key"].at[slot])
        key = own["key"].at[slot]

        def product(raw: Any) -> Array:
            gpu.wgmma(raw, own["query"].at[self.group], key.transpose((1, 0)))
            self.take_turns()
            return raw[...]

        raw = self.pl.run_scoped(product, gpu.ACC((_GROUP_ROWS, call.block_k), jnp.float32))
        gpu.barrier_arrive(own["free_key"].at[slot])
        tile, logits = self.logits(raw, start, self.block_of(place) * call.block_k, masked, known)
        new = jnp.maximum(highest, logits.max(axis=1))
        safe = finite(new)
        shrink = jnp.exp2(highest - safe)
        weights = jnp.exp2(logits - _across(safe, logits.shape, 0))
        total = total * shrink + weights.sum(axis=1)
        out = out * _across(shrink, out.shape, 0)
        weights = tile.drop(weights).astype(call.problem.dtype)
        self.take_turns()
        gpu.barrier_wait(own["has_value"].at[slot])
        value = own["value"].at[slot]
        if call.config.interpret:  # which has no products of registers and shared memory
            out = out + jnp.dot(weights, value[...], preferred_element_type=jnp.float32)
            gpu.commit_smem()
        else:
            out = self.pl.run_state(lambda sums: gpu.wgmma(sums, weights, value))(gpu.ACC.init(out))
        gpu.barrier_arrive(own["free_value"].at[slot])
        return out, new, total

    def logits(self, raw: Array, q: Any, k: Any, masked: bool, known: dict[int, Array]) -> tuple[Any, Array]:
        """The tile of these first query and key, and its logits in units of log 2."""
        call, program, shape = self.call, self.call.problem.program, raw.shape
        index = lambda first, axis: (
            first + self.gpu.broadcasted_iota(jnp.int32, shape, axis, layout=self.gpu.Layout.WGMMA)
        )
        queries, keys = index(q, 0), index(k, 1)
        loaded = self.loaded(q, k, known, () if masked else call.split.of_mask)
        values = [loaded.get(n) for n in range(len(call.split.pieces))]
        tile = call.split.tile(queries, keys, self.b, self.h, values)
        seen = None
        if masked:
            seen = tile.visible()
            if call.keys != call.sizes.key_length:
                inside = keys < call.sizes.key_length
                seen = inside if seen is None else seen & inside
        hidden = lambda pairs, value: pairs if seen is None else jnp.where(seen, pairs, value)
        if program.scores:  # where nothing is seen they must stay finite
            return tile, hidden(tile.modify(hidden(raw * program.scale, 0.0)) * LOG2E, -jnp.inf)
        return tile, hidden(raw * (program.scale * LOG2E), -jnp.inf)

    def loaded(self, q: Any, k: Any, known: dict[int, Array], without: Any = ()) -> dict[int, Array]:
        """The pieces of a tile, spread over it; without `k` those that need no keys."""
        call, gpu, shape = self.call, self.gpu, (_GROUP_ROWS, self.call.block_k)
        found = dict(known)
        for n, piece in enumerate(call.split.pieces):
            if n in known or n in without or n == call.split.sinks or (piece.keys and k is None):
                continue
            at: list[Any] = [piece.entry(call.batch, self.b), self.h if piece.heads else 0]
            at += [self.pl.ds(q, _GROUP_ROWS)] if piece.queries else []
            at += [self.pl.ds(k, call.block_k)] if piece.keys else []
            ref = self.pieces[n]
            load = lambda layout, ref=ref, at=at: gpu.load(ref.at[tuple(at)], layout=layout, optimized=False)
            if piece.queries and piece.keys:
                x = load(gpu.Layout.WGMMA)
            elif piece.queries:
                x = _across(load(gpu.Layout.WGMMA.reduce(1)), shape, 0)
            elif piece.keys:
                x = _across(load(gpu.Layout.WGMMA.reduce(0)), shape, 1)
            else:
                x = gpu.layout_cast(jnp.full(shape, ref[tuple(at)], ref.dtype), gpu.Layout.WGMMA)
            found[n] = x != 0 if piece.dtype == "bool" else x
        return found


def _across(x: Array, shape: tuple[int, ...], axis: int) -> Array:
    """A vector along an axis of a tile, spread over the other one."""
    return lax.broadcast_in_dim(x, shape, [axis])


# A primitive of its own, so that the kernel is built where its device is known.
_kernel_p = Primitive("attnjax_mosaic_gpu")
_kernel_p.multiple_results = True
_kernel_p.def_abstract_eval(lambda *_, launch: [ShapedArray(x.shape, jnp.dtype(x.dtype)) for x in launch.results])
mlir.register_lowering(
    _kernel_p,
    lambda ctx, *arrays, launch: mlir.lower_fun(launch, multiple_results=True)(ctx, *arrays),
    platform="cuda",
)
