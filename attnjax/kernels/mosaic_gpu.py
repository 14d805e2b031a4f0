"""implementation="mosaic_gpu": kernels for Hopper GPUs in Pallas on Mosaic GPU, run where they are asked for by name.

Forward, and gradients of query, key, value and sinks; gradients of scores are those of other implementations. One group
of warps fetches blocks into shared memory and two others compute (`core.hopper`): in the forward one of them multiplies
matrices while the other is at its softmax. Each program is the only one that writes what it owns, so results are the
same to the last bit. Masks and scores are run on tiles by `core.split`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attnjax.core.checks import number_of
from attnjax.core.devices import gpus
from attnjax.core.hopper import (
    GROUP_ROWS,
    GROUPS,
    ROWS,
    SHARED,
    Call,
    Kernel,
    Refs,
    Tiling,
    padded_bytes,
    padded_sizes,
)
from attnjax.core.program import Problem
from attnjax.core.residual import NotSplittable
from attnjax.core.softmax import Rows, add_sinks, finite, log_sum_exp, row_delta, sink_gradient
from attnjax.core.split import Split, summed
from attnjax.core.view import LOG2E
from attnjax.tuning import Blocks

Array = jax.Array

PARTS = ("forward", "backward")
_KERNELS = {"forward": ("forward",), "backward": ("query", "key")}
_OPERATIONS = frozenset(
    "add sub mul div rem max min neg abs sign eq ne lt le gt ge and or not xor select_n convert_element_type exp exp2 "
    "log tanh logistic sqrt rsqrt square integer_pow sin cos clamp shift_left shift_right_logical "
    "shift_right_arithmetic one_minus_square broadcast_in_dim reshape squeeze".split()
)
# Of heads: more does not fit into registers and shared memory. The last is for the gradients of key and value together.
_MOST_SIZE, _MOST_BACKWARD, _MOST_TOGETHER = 256, 128, 64
NEEDS = (0, 11, 2)  # of jax: an interpreter of these kernels, and the meaning of operations that they are written in


@dataclasses.dataclass(frozen=True)
class Config:
    """How the kernels run. `None` chooses.

    Attributes:
      block_k: keys of a tile of the forward, 64 or 128.
      stages: so many blocks of keys and values are in shared memory, 2 to 4.
      backward_block: keys of a tile of the gradient of query, queries of one of those of key and value, 64 or 128.
      backward_stages: as `stages`.
      interpret: `forward` and `backward` run as plain XLA on any device and look for races; for tests, which call them
        themselves, because JAX's interpreter of these kernels cannot run inside of `attention`.
    """

    block_k: int | None = None
    stages: int | None = None
    backward_block: int | None = None
    backward_stages: int | None = None
    interpret: bool = False

    def __post_init__(self) -> None:
        blocks, stages = (64, 128), (2, 3, 4)
        fields = dict(block_k=blocks, stages=stages, backward_block=blocks, backward_stages=stages)
        for name, allowed in fields.items():
            value = getattr(self, name)
            number = number_of(value)
            if isinstance(number, int) and number in allowed:
                object.__setattr__(self, name, number)
            elif value is not None:
                raise ValueError(f"Config: {name} must be one of {list(allowed)} or None, got {value!r}.")
        if not isinstance(self.interpret, bool):
            raise ValueError(f"Config: interpret must be True or False, got {self.interpret!r}.")


def unsupported(problem: Problem, operands: list[Any], platform: str, part: str) -> str | None:
    """A reason why this implementation cannot take a part of the problem, or `None`."""
    config = problem.config
    if part not in PARTS:
        return "has forward and backward; other derivatives are those of the tiled code"
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
    sizes, given = problem.sizes, problem.blocks or (ROWS, ROWS)
    for block, length in zip(given, (sizes.query_length, sizes.key_length), strict=True):
        if block < length and block % ROWS:
            return f"block_map has blocks of {given[0]} x {given[1]}: its own are multiples of {ROWS}"
    if reason := _unsupported_pieces(problem, operands, part):
        return reason
    if any(_tiling(problem, kernel) is None for kernel in _KERNELS[part]):
        return "has not enough shared memory for these head sizes" + (f" and {config}" if config else "")
    return None


def parts(problem: Problem, operands: list[Any]) -> tuple[str, ...]:
    """What it has for a problem; where that is a forward only, the backward is another's."""
    alone = _unsupported_pieces(problem, operands, "backward") and not _unsupported_pieces(problem, operands, "forward")
    return PARTS[:1] if alone else PARTS


def _unsupported_pieces(problem: Problem, operands: list[Any], part: str) -> str | None:
    """Why its tiles cannot run the mask and the scores; a backward runs them, and then the scores' derivative."""
    try:
        split = Split.described(problem, operands)
    except NotSplittable as reason:
        return f"cannot run this mask or score on its tiles: {reason}"
    if any(piece.by_distance for piece in split.pieces):
        return "cannot look up a score by distance inside its tiles"
    shape = lambda dtype: jax.ShapeDtypeStruct((1, 1), dtype)
    logits, index, pieces = shape(problem.accumulate), shape(jnp.int32), [shape(x.dtype) for x in split.pieces]
    tile = lambda q, k, values: split.tile(q, k, np.int32(0), np.int32(0), values)

    def run(q: Array, k: Array, values: list[Array], logits: Array) -> Any:
        return tile(q, k, values).visible(), tile(q, k, values).modify(logits)

    def pull(q: Array, k: Array, values: list[Array], logits: Array) -> Array:
        return tile(q, k, values).pull(logits, logits, [])[0]

    unknown = lambda function: _unknown(jax.make_jaxpr(function)(index, index, pieces, logits).jaxpr)
    if found := unknown(run):
        return f"cannot run this mask or score on its tiles: {found}"
    if part == "forward":
        return None
    if max(problem.head_size, problem.value_size) > _MOST_BACKWARD:
        return f"has a backward for head sizes up to {_MOST_BACKWARD}"
    found = unknown(pull) if problem.program.scores else None
    return f"cannot run the derivative of this mask or score on its tiles: {found}" if found else None


def _unknown(jaxpr: Any) -> str | None:
    """The name of an operation that Mosaic GPU does not have for tiles, or `None`."""
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        if "jaxpr" in parameters:
            if found := _unknown(getattr(parameters["jaxpr"], "jaxpr", parameters["jaxpr"])):
                return found
        elif name not in _OPERATIONS or (name == "integer_pow" and parameters["y"] < 2 and parameters["y"] != -1):
            return f"{name} {parameters.get('y', '')}".strip()
    return None


def gradients(problem: Problem, operands: list[Any]) -> tuple[int, ...]:
    """Positions of the operands whose gradients `backward` can give: query, key, value and sinks."""
    return tuple(i for i in problem.differentiable if i < 3 + problem.program.sinks)


def blocks(problem: Problem, platform: str) -> Blocks:
    """The tiles of the forward: those of a whole program."""
    tiling = _tiling(problem, "forward")
    own = (ROWS, tiling.block) if tiling else (ROWS, ROWS)
    return Blocks(*(problem.blocks or own), (1,) * len(problem.sizes.batch), 1)


def temporary_bytes(problem: Problem, operands: list[Any], platform: str) -> dict[str, int]:
    """About how much memory each part needs beside its arguments and results: rows, and what has to be padded."""
    rows, copies = 2 * 4 * math.prod(problem.out_shapes()[1]), padded_bytes(problem)
    return {"forward": rows + copies, "backward": rows + 2 * copies}


def _tiling(problem: Problem, kernel: str) -> Tiling | None:
    """The largest blocks and as many of them as fit, if any do, for the forward or the gradient of query, or of key."""
    config, sizes = problem.config or Config(), padded_sizes(problem)
    if kernel == "forward":
        own, block, stages = ROWS * (max(sizes) if _in_place(problem) else sum(sizes)), config.block_k, config.stages
        wide = 128
    else:  # two tiles and the gradients of a row have to be in registers
        own, block, stages = ROWS * sum(sizes), config.backward_block, config.backward_stages
        wide = 128 if kernel == "query" and max(sizes) == 64 else 64
    fits = [
        Tiling(rows, count)
        for rows in ((block,) if block else (wide, 64))
        for count in ((stages,) if stages else (3, 2))
        if 2 * (own + count * rows * sum(sizes)) <= SHARED - 4096
    ]
    return fits[0] if fits else None


def _in_place(problem: Problem) -> bool:
    """Whether the output goes where the query was in shared memory."""
    head_size, value_size = padded_sizes(problem)
    return head_size == value_size


def forward(problem: Problem, operands: list[Array], platform: str) -> Rows:
    """The output, and highest and total of the softmax, all in operand form."""
    out_shape, row_shape = problem.out_shapes()
    sinks = problem.program.sinks_of(operands)
    if math.prod((*out_shape, problem.sizes.key_length)):
        rows = _forward(problem, operands)
    else:  # no pairs
        zeros = jnp.zeros(row_shape, problem.accumulate)
        rows = Rows(jnp.zeros(out_shape, problem.dtype), zeros - jnp.inf, zeros)
    if sinks is None:
        return rows
    rows = rows._replace(out=rows.out.astype(problem.accumulate))
    rows = add_sinks(rows, sinks[..., None, :].astype(problem.accumulate))
    return rows._replace(out=rows.out.astype(problem.dtype))


def _forward(problem: Problem, operands: list[Array]) -> Rows:
    query, key, value = operands[:3]
    if problem.program.mask:  # a hidden value may be NaN, and 0 times NaN is NaN: its key is NaN instead
        whole, n = _whole(value), len(problem.sizes.batch)
        wide = jnp.broadcast_shapes(key.shape[:n], value.shape[:n])
        key = jnp.where(whole, jnp.broadcast_to(key, (*wide, *key.shape[n:])), jnp.nan).astype(key.dtype)
        value = jnp.where(whole, value, 0)
    call = _call(problem, [query, key, value, *operands[3:]], "forward")
    entries, heads, queries, stages = call.entries, call.sizes.heads, call.queries, call.tiling.stages
    by_row = ((entries, heads, queries), jnp.float32)
    results = dict(out=((entries, queries, heads, call.value_size), problem.dtype), highest=by_row, total=by_row)
    rows = call.numbers(GROUPS, GROUP_ROWS)
    scratch = dict(
        query=call.shared(GROUPS, GROUP_ROWS, call.head_size),
        key=call.shared(stages, call.tiling.block, call.head_size),
        value=call.shared(stages, call.tiling.block, call.value_size),
        highest=rows,
        total=rows,
        has_own=call.barrier(GROUPS),
        has_key=call.barrier(stages),
        has_value=call.barrier(stages),
        free_key=call.barrier(stages, GROUPS),
        free_value=call.barrier(stages, GROUPS),
        turn=call.barrier(1, GROUPS),
    )
    if not _in_place(problem):
        scratch["out"] = call.shared(GROUPS, GROUP_ROWS, call.value_size)
    made = call.run("forward", _Forward, results, scratch)
    out_shape, row_shape = problem.out_shapes()
    t, v = call.sizes.query_length, problem.value_size
    across_heads = lambda x: x[..., :t].swapaxes(1, 2).reshape(row_shape)
    return Rows(made["out"][:, :t, :, :v].reshape(out_shape), *(across_heads(made[x]) for x in ("highest", "total")))


def backward(
    problem: Problem,
    operands: list[Array],
    rows: Rows,
    ct_out: Array,
    ct_lse: Array,
    wanted: tuple[tuple[int, tuple[int, ...]], ...],
) -> list[Array]:
    """Gradients of the operands in `wanted`: pairs of position and shape (batch axes of size 1 are summed over)."""
    shapes, delta = dict(wanted), row_delta(rows, ct_out, ct_lse)
    made = {}
    if problem.program.sinks and 3 in shapes:
        made[3] = sink_gradient(operands[3], rows, delta, shapes[3])
    if not math.prod((*problem.out_shapes()[0], problem.sizes.key_length)):  # no pairs
        made = {i: jnp.zeros(shape, problem.accumulate) for i, shape in wanted} | made
        return [made[i] for i, _ in wanted]
    query, key, value = operands[:3]
    ct_out, lse = ct_out.astype(problem.dtype), finite(log_sum_exp(rows.highest, rows.total)) * LOG2E
    if problem.program.mask:  # what is hidden may be NaN: its rows are 0, and NaN only in the log-sum-exp
        lse = jnp.where((_whole(query) & _whole(ct_out))[..., 0], lse, jnp.nan)
        query, key, value, ct_out = (jnp.where(_whole(x), x, 0) for x in (query, key, value, ct_out))
    operands = [query, key, value, *operands[3:]]
    together = max(padded_sizes(problem)) <= _MOST_TOGETHER
    for kernel, own in (("query", (0,)), *([("key", (1, 2))] if together else [("key", (1,)), ("key", (2,))])):
        if some := [i for i in own if i in shapes]:
            call = _call(problem, operands, kernel)
            for name, x in (("ct_out", ct_out), ("lse", lse), ("delta", delta)):
                call.give(name, x)
            made |= dict(zip(some, _gradients(call, some), strict=True))
    for i in range(3):
        if i in shapes:
            length, size = operands[i].shape[-3], shapes[i][-1]
            x = made[i][:, :length, :, :size].astype(problem.accumulate)
            made[i] = summed(x.reshape(*problem.sizes.batch, *x.shape[1:]), shapes[i])
    return [made[i] for i, _ in wanted]


def _gradients(call: Call, wanted: list[int]) -> list[Array]:
    """Of query, or of key and value, or of one of these: [entries, rows, heads, size], with what is padded."""
    sizes, stages, block = call.sizes, call.tiling.stages, call.tiling.block
    size_of = dict(query=call.head_size, key=call.head_size, value=call.value_size, ct_out=call.value_size)
    rows, heads = (call.keys, sizes.key_heads) if call.by_key else (call.queries, sizes.heads)
    names = [("query", "key", "value")[i] for i in wanted]
    shapes = {name: (call.entries, rows, heads, size_of[name]) for name in names}
    # What its groups own, and what is fetched, with the numbers that come with it.
    own, fetched = ["query", "ct_out"], dict[str, list[str]](key=[], value=[])
    if call.by_key:
        own, fetched = ["key", "value"], dict(query=["lse"], ct_out=["delta"] if "key" in names else [])
    scratch: Refs = {name: call.shared(GROUPS, GROUP_ROWS, size_of[name]) for name in own}
    scratch["has_own"] = call.barrier(GROUPS, len(own))
    for name, numbers in fetched.items():
        scratch[name] = call.shared(stages, block, size_of[name])
        scratch |= {number: call.numbers(stages, block) for number in numbers}
        scratch |= {f"has_{name}": call.barrier(stages, 1 + len(numbers)), f"free_{name}": call.barrier(stages, GROUPS)}
    results = {f"d_{name}": (shape, call.problem.dtype) for name, shape in shapes.items()}
    program = _OfKey if call.by_key else _OfQuery
    return list(call.run(f"backward_{'_'.join(names)}", program, results, scratch).values())


def _call(problem: Problem, operands: list[Array], kernel: str) -> Call:
    tiling, interpret = _tiling(problem, kernel), (problem.config or Config()).interpret
    assert tiling is not None  # else `unsupported` has said so
    return Call(problem, operands, tiling, by_key=kernel == "key", interpret=interpret)


def _whole(rows: Array) -> Array:
    """Whether all of a row is finite."""
    return jnp.isfinite(rows).all(-1, keepdims=True)


class _OverKeys(Kernel):
    """A program that owns queries: keys and values are fetched."""

    def fetch(self) -> None:
        kv, size = lax.div(self.head, np.int32(self.call.sizes.group)), self.call.tiling.block

        def bring(place: Any, block: Any, _: Any, masked: bool) -> None:
            keys = self.pl.ds(block * size, size)
            for name in ("key", "value"):
                self.bring(place, f"free_{name}", f"has_{name}", (self.refs[name].at[self.entry(name), keys, kv], name))

        self.visit(self.head, bring, None)

    def over_keys(self, step: Any, state: Any) -> Any:
        """Goes through the blocks of keys: `step(place, block, state, masked, known=)`."""
        return self.visit(self.head, functools.partial(step, known=self.loaded(self.head, None, {})), state)[1]


class _Forward(_OverKeys):
    """Attention of 128 queries."""

    def compute(self) -> None:
        call, refs = self.call, self.refs
        self.bring_own((refs["query"].at[self.entry("query"), self.rows, self.head], "query"))
        fill = lambda value, *size: self.full((GROUP_ROWS, *size), value)
        self.pl.when(self.group == 1)(self.take_turns)  # half a step behind the other group
        state = self.over_keys(self.step, (fill(0.0, call.value_size), fill(-jnp.inf), fill(0.0)))
        self.pl.when(self.group == 0)(self.take_turns)
        out, highest, total = state
        out = out * self.across(1 / jnp.where(total == 0.0, 1.0, total), 0, out.shape)
        # The total goes with what `highest` is rounded to as it leaves the units of log 2.
        natural = highest * math.log(2)
        total = total * jnp.exp2(finite(highest) - finite(natural) * LOG2E)
        by_row = lambda name: refs[name].at[self.b, self.head, self.rows]
        self.write(
            (out, "query" if _in_place(call.problem) else "out", refs["out"].at[self.b, self.rows, self.head]),
            (natural, "highest", by_row("highest")),
            (total, "total", by_row("total")),
        )

    def take_turns(self) -> None:
        """Waits for the other group: one multiplies while the other does not."""
        self.gpu.barrier_arrive(self.own["turn"])
        self.gpu.barrier_wait(self.own["turn"])

    def step(self, place: Any, block: Any, state: Any, masked: bool, known: dict[int, Array]) -> Any:
        """A block of keys joins the softmax."""
        own, gpu, slot = self.own, self.gpu, self.slot(place)
        out, highest, total = state
        gpu.barrier_wait(own["has_key"].at[slot])
        raw = self.product(own["query"].at[self.group], own["key"].at[slot], self.take_turns)
        gpu.barrier_arrive(own["free_key"].at[slot])
        view = self.view(self.head, block, raw, masked, known)
        new = jnp.maximum(highest, view.logits.max(axis=1))
        safe = finite(new)
        shrink = jnp.exp2(highest - safe)
        weights = jnp.exp2(view.logits - self.across(safe, 0))
        total = total * shrink + weights.sum(axis=1)
        out = out * self.across(shrink, 0, out.shape)
        weights = view.drop(weights).astype(self.call.problem.dtype)
        self.take_turns()
        gpu.barrier_wait(own["has_value"].at[slot])
        out = self.add(out, weights, own["value"].at[slot])
        gpu.barrier_arrive(own["free_value"].at[slot])
        return out, new, total


class _OfQuery(_OverKeys):
    """The gradient of 128 queries."""

    registers = (24, 240)

    def compute(self) -> None:
        call, refs, gpu = self.call, self.refs, self.gpu
        own = lambda name, entry: (refs[name].at[entry, self.rows, self.head], name)
        self.bring_own(own("query", self.entry("query")), own("ct_out", self.b))
        load = functools.partial(gpu.load, layout=gpu.Layout.WGMMA.reduce(1), optimized=False)
        self.lse, self.delta = (load(refs[name].at[self.b, self.head, self.rows]) for name in ("lse", "delta"))
        d_query = self.over_keys(self.step, self.full((GROUP_ROWS, call.head_size), 0.0))
        to = refs["d_query"].at[self.b, self.rows, self.head]
        self.write((d_query * call.problem.program.scale, "query", to))

    def step(self, place: Any, block: Any, d_query: Array, masked: bool, known: dict[int, Array]) -> Array:
        own, gpu, slot = self.own, self.gpu, self.slot(place)
        key, value = own["key"].at[slot], own["value"].at[slot]
        gpu.barrier_wait(own["has_key"].at[slot])
        raw = self.product(own["query"].at[self.group], key)
        view = self.view(self.head, block, raw, masked, known)
        weights = jnp.exp2(view.logits - self.across(self.lse, 0))
        gpu.barrier_wait(own["has_value"].at[slot])
        d_weights = self.product(own["ct_out"].at[self.group], value)
        gpu.barrier_arrive(own["free_value"].at[slot])
        d_raw, _ = view.pulled(weights * (view.drop(d_weights) - self.across(self.delta, 0)), [])
        d_query = self.add(d_query, d_raw, key)
        gpu.barrier_arrive(own["free_key"].at[slot])
        return d_query


class _OfKey(Kernel):
    """The gradients of 128 keys, or values, or both, from all heads of their group. Queries are columns of tiles."""

    registers = (24, 240)

    def heads(self, step: Any, state: Any, before: Any = lambda h: None) -> Any:
        """Goes through the blocks of all query heads: `step(h, before(h), place, block, state, masked)`."""

        def head(n: Any, carry: Any) -> Any:
            start, state = carry
            h = self.head * np.int32(self.call.sizes.group) + n
            first = before(h)
            one = lambda place, *rest: step(h, first, start + place, *rest)
            visited, state = self.visit(h, one, state)
            return start + visited, state

        return lax.fori_loop(np.int32(0), np.int32(self.call.sizes.group), head, (np.int32(0), state))[1]

    def fetch(self) -> None:
        refs, size = self.refs, self.call.tiling.block

        def bring(h: Any, _known: Any, place: Any, block: Any, _state: Any, _masked: bool) -> None:
            queries = self.pl.ds(block * size, size)
            for name, entry, number in (("query", self.entry("query"), "lse"), ("ct_out", self.b, "delta")):
                copies = [(refs[name].at[entry, queries, h], name)]
                copies += [(refs[number].at[self.b, h, queries], number)] if number in self.own else []
                self.bring(place, f"free_{name}", f"has_{name}", *copies)

        self.heads(bring, None)

    def compute(self) -> None:
        call, refs = self.call, self.refs
        self.bring_own(*((refs[name].at[self.entry(name), self.rows, self.head], name) for name in ("key", "value")))
        sizes = dict(d_key=call.head_size, d_value=call.value_size)
        sums = {name: self.full((GROUP_ROWS, size), 0.0) for name, size in sizes.items() if name in refs}
        sums = self.heads(self.step, sums, lambda h: self.loaded(h, None, {}))
        if "d_key" in sums:
            sums["d_key"] *= call.problem.program.scale
        places = dict(d_key="key", d_value="value")
        self.write(*((x, places[name], refs[name].at[self.b, self.rows, self.head]) for name, x in sums.items()))

    def step(self, h: Any, known: Any, place: Any, block: Any, sums: dict[str, Array], masked: bool) -> Any:
        own, gpu, slot, sums = self.own, self.gpu, self.slot(place), dict(sums)
        load = functools.partial(gpu.load, layout=gpu.Layout.WGMMA.reduce(0), optimized=False)
        column = lambda name: self.across(load(own[name].at[slot]), 1)
        query, ct_out = own["query"].at[slot], own["ct_out"].at[slot]
        gpu.barrier_wait(own["has_query"].at[slot])
        raw = self.product(own["key"].at[self.group], query)
        view = self.view(h, block, raw, masked, known)
        weights = view.hidden(jnp.exp2(view.logits - column("lse")), 0.0)
        gpu.barrier_wait(own["has_ct_out"].at[slot])
        if "d_value" in sums:
            sums["d_value"] = self.add(sums["d_value"], view.drop(weights), ct_out)
        if "d_key" in sums:
            d_weights = self.product(own["value"].at[self.group], ct_out)
            d_raw, _ = view.pulled(weights * (view.drop(d_weights) - column("delta")), [])
            sums["d_key"] = self.add(sums["d_key"], d_raw, query)
        gpu.barrier_arrive(own["free_ct_out"].at[slot])
        gpu.barrier_arrive(own["free_query"].at[slot])
        return sums
