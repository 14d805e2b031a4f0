"""Block sizes: how a problem is cut into tiles on each platform. Rules of thumb; nothing is measured here."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from attnjax.core.devices import gpus
from attnjax.core.program import Problem
from attnjax.core.symbolic import at_most, is_known
from attnjax.core.tables import tuned

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How the tiled code walks a problem. Blocks of a length that is a symbol are symbols, too: at most that length.

    Attributes:
      block_q, block_k: queries and keys of a tile.
      lanes: how many of each batch axis are computed together; every entry divides its axis.
      lanes_kv: how many key/value heads are computed together; divides K.
    """

    block_q: Any
    block_k: Any
    lanes: tuple[int, ...]
    lanes_kv: int


# Rows (queries times the group) and keys of a tile, and pairs of all lanes that are computed together. Measured on two
# Zen 5 cores at S = 4096: with fewer rows the threads of a matrix product wait for each other; with more, a mask makes
# tiles compute pairs that nobody sees. Without a mask larger ones are 1.5 times as fast (H = 128). On accelerators a
# tile must fill the device, so many heads go together.
_TARGETS = {"cpu": (512, 512, 2**18), None: (512, 512, 2**24)}
_UNMASKED = (4, 2)  # times as many rows, and keys
_FEW_KEYS = 16  # with them all queries are one tile, hardly larger than they: XLA aborts on loops over 2 or 3 keys
_FEW_ROWS = 2**16  # pairs of a tile with few rows (decoding), which is made wider instead


def choose_blocks(problem: Problem, platform: str) -> Blocks:
    """Tile sizes for a problem, from its config where the config says, else from its shape."""
    sizes, config = problem.sizes, problem.config
    rows, keys, pairs = _TARGETS.get(platform, _TARGETS[None])
    if not problem.program.mask and platform == "cpu" and is_known(sizes.query_length) and sizes.query_length >= 2048:
        rows, keys = _UNMASKED[0] * rows, _UNMASKED[1] * keys
    t, s = (max(size, 1) if is_known(size) else size for size in (sizes.query_length, sizes.key_length))
    own = tuned(problem, "xla", "all", platform) if sizes.known else {}
    asked_q = getattr(config, "block_q", None) or own.get("block_q")
    asked_k = getattr(config, "block_k", None) or own.get("block_k")
    few = is_known(s) and s <= _FEW_KEYS and not asked_q and problem.blocks is None
    if problem.blocks is not None:
        block_q, block_k = problem.blocks
    else:
        block_q = asked_q or (t if few and is_known(t) else _even(t, max(16, rows // sizes.group)))
        wide = max(keys, _FEW_ROWS // min(block_q * sizes.group, rows))
        block_k = asked_k or _even(s, wide)
    block_q, block_k = (min(block, size) if is_known(size) else block for block, size in ((block_q, t), (block_k, s)))
    budget = getattr(config, "lanes", None) or max(1, pairs // (block_q * sizes.group * block_k))
    block_q, block_k = t if few else at_most(t, block_q), at_most(s, block_k)
    lanes_kv = _divisor(sizes.key_heads, budget)
    budget //= lanes_kv
    lanes: list[int] = []
    for size in reversed(sizes.batch):
        together = lanes_kv == sizes.key_heads and all(
            a == b for a, b in zip(reversed(lanes), sizes.batch[len(sizes.batch) - len(lanes) :], strict=True)
        )
        lanes.append(_divisor(size, budget) if together and size else 1)
        budget //= lanes[-1]
    return Blocks(block_q, block_k, tuple(reversed(lanes)), lanes_kv)


def _even(length: Any, target: int) -> int:
    """A block of at most `target` (rounded up to 16) that divides the length about evenly, where that is known."""
    if not is_known(length):
        return -(-target // 16) * 16
    count = -(-length // target)
    block = -(-length // count)
    return min(length, -(-block // 16) * 16)


def _divisor(size: Any, most: int) -> int:
    """The largest divisor that is known, of at most `most`."""
    if not is_known(size):
        return 1
    return max((d for d in range(1, min(size, most) + 1) if size % d == 0), default=1)


LEAST = 16  # rows of a tile: what tensor cores multiply; fewer crash the compiler of jax 0.12
_DECODED_ROWS = 64  # at most so many queries times heads of a group are one tile of a Triton kernel


def power_of_two(size: int) -> int:
    """The next power of 2, at least that of the smallest product of tensor cores."""
    return max(LEAST, 1 << (size - 1).bit_length())


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What the sizes of a kernel depend on.

    Attributes:
      name: as JAX shows it.
      capability: compute capability, (8, 0) for an A100.
      shared: bytes of shared memory that a block of threads may ask for.
      processors: its multiprocessors.
    """

    name: str
    capability: tuple[int, int]
    shared: int
    processors: int


# CUDA programming guide, "Technical Specifications per Compute Capability"; multiprocessors of a common GPU of each.
_LIMITS = {
    (8, 0): (163, 108),
    (8, 6): (99, 84),
    (8, 7): (163, 16),
    (8, 9): (99, 128),
    (9, 0): (227, 132),
    (10, 0): (227, 148),
    (10, 3): (227, 148),
    (12, 0): (99, 170),
}


def compiled_for() -> Gpu:
    """The GPU that is compiled for, the smallest if there are several; where it is not known, the smallest there is."""
    found = []
    for name, number in gpus().items():
        major, minor = map(int, (number or "0.0").split("."))
        shared, processors = _LIMITS.get((major, minor), (99, 84))
        found.append(Gpu(name, (major, minor), shared * 1024, processors))
    return min(found, key=lambda gpu: gpu.shared, default=Gpu("an unknown GPU", (8, 0), 99 * 1024, 84))


@dataclasses.dataclass(frozen=True)
class Tiling:
    """The sizes of a Triton kernel.

    Attributes:
      block_q, block_k: queries and keys of a tile.
      warps: how many work on it; stages: so many tiles of the inner loop are in flight.
      upright: whether, in the kernel of keys and values, queries lie along the rows of a tile.
      note: what had to be made smaller than it was asked for or is usual, and why; or "".
    """

    block_q: int
    block_k: int
    warps: int
    stages: int
    upright: bool = False
    note: str = ""

    def __str__(self) -> str:
        stages = f"{self.stages} stage{'s' if self.stages > 1 else ''}"
        sizes = f"{self.block_q} queries x {self.block_k} keys, {self.warps} warps, {stages}"
        return sizes + (f"; {self.note}" if self.note else "")


# Of half precision by kernel and head size, on Ampere, and on Hopper and Blackwell, whose tensor cores read shared
# memory: the largest of those tried that the compiler gives registers for without spilling (tests/aot). The second of a
# pair is for tiles with scores or dropout, which need more registers.
_TRITON = {
    "ampere": {
        "forward": {
            64: ((128, 64, 8, 3), (64, 32, 8, 3)),
            128: ((128, 32, 8, 3), (64, 32, 8, 3)),
            256: ((32, 32, 8, 2), (32, 32, 8, 2)),
        },
        "query": {
            64: ((128, 64, 8, 2), (64, 32, 8, 2)),
            128: ((64, 64, 8, 2), (64, 64, 8, 2)),
            256: ((32, 64, 8, 2), (32, 32, 8, 2)),
        },
        "key": {
            64: ((64, 32, 8, 2), (32, 32, 8, 2)),
            128: ((32, 64, 8, 2), (32, 64, 8, 2)),
            256: ((32, 32, 8, 2), (32, 32, 8, 2)),
        },
    },
    "hopper": {
        "forward": {
            64: ((128, 64, 8, 3), (64, 64, 8, 3)),
            128: ((128, 64, 8, 3), (64, 64, 8, 3)),
            256: ((64, 64, 8, 2), (64, 32, 8, 2)),
        },
        "query": {
            64: ((64, 64, 8, 2), (64, 32, 8, 2)),
            128: ((128, 64, 8, 2), (64, 32, 8, 2)),
            256: ((64, 64, 8, 2), (32, 32, 8, 2)),
        },
        "key": {
            64: ((64, 64, 8, 2), (32, 64, 8, 2)),
            128: ((32, 64, 8, 2), (16, 64, 8, 2)),
            256: ((32, 32, 8, 2), (16, 16, 8, 2)),
        },
    },
}
_TRITON["blackwell"] = _TRITON["hopper"] | {
    "query": {
        64: ((64, 32, 8, 2), (64, 32, 8, 2)),
        128: ((32, 64, 8, 2), (64, 32, 8, 2)),
        256: ((64, 64, 8, 2), (32, 32, 8, 2)),
    }
}
_EXACT = {  # float32, which is multiplied in three parts
    "forward": {
        64: ((64, 32, 4, 2), (32, 32, 4, 2)),
        128: ((32, 32, 8, 2), (16, 32, 8, 2)),
        256: ((16, 32, 8, 1), (16, 32, 8, 1)),
    },
    "query": {
        64: ((32, 32, 4, 2), (32, 32, 4, 2)),
        128: ((16, 32, 8, 1), (16, 32, 8, 1)),
        256: ((16, 16, 8, 1), (16, 16, 8, 1)),
    },
    "key": {
        64: ((32, 32, 8, 2), (16, 16, 8, 2)),
        128: ((16, 16, 8, 1), (16, 16, 8, 1)),
        256: ((16, 16, 8, 1), (16, 16, 8, 1)),
    },
}
_DECODING = ((64, 4, 3), (32, 4, 2))  # keys of a tile, warps and stages where queries are few; of float32


def choose_tiling(problem: Problem, kernel: str, gpu: Gpu) -> Tiling:
    """The sizes of a Triton kernel: "forward", "query", "key", "value" (without the key's gradient) or "pairs".

    From the config where it says, else from the table; smaller where the problem is, where a block map that the user
    gave must be cut evenly, and where the GPU has not enough shared memory.
    """
    tiling = _asked(problem, kernel, gpu)
    sizes, map_q, map_k = problem.sizes, *(problem.blocks or (0, 0))
    together = heads_together(problem) if kernel == "forward" else 1
    block_q = power_of_two(sizes.query_length * together) if together > 1 else tiling.block_q
    block_q = block_q if together > 1 else _fitting(block_q, sizes.query_length, map_q)
    tiling = dataclasses.replace(tiling, block_q=block_q, block_k=_fitting(tiling.block_k, sizes.key_length, map_k))
    first, needed = tiling, shared_bytes(problem, kernel, tiling)
    while shared_bytes(problem, kernel, tiling) > gpu.shared and tiling.block_q + tiling.block_k > 2 * LEAST:
        tiling = _smaller(tiling, first.stages)
    if tiling == first:
        return tiling
    note = (
        f"{first.block_q} x {first.block_k} in {first.stages} stages would need {needed // 1024} KiB of shared memory, "
        f"{gpu.name} has {gpu.shared // 1024}"
    )
    return dataclasses.replace(tiling, note=note)


def _smaller(tiling: Tiling, stages: int) -> Tiling:
    """The next smaller one: fewer stages, then half of the longer side in all `stages` again."""
    if tiling.stages > 1:
        return dataclasses.replace(tiling, stages=tiling.stages - 1)
    if tiling.block_q > tiling.block_k:
        return dataclasses.replace(tiling, block_q=tiling.block_q // 2, stages=stages)
    return dataclasses.replace(tiling, block_k=tiling.block_k // 2, stages=stages)


def heads_together(problem: Problem) -> int:
    """How many heads of a group share a tile of the forward: all where queries are few; keys are then loaded once."""
    sizes, given = problem.sizes, problem.blocks
    few = sizes.query_length * sizes.group <= _DECODED_ROWS and (given is None or given[0] >= sizes.query_length)
    return sizes.group if few else 1


def _asked(problem: Problem, kernel: str, gpu: Gpu) -> Tiling:
    """What the config asks for, and what is usual where it does not."""
    program, config, sizes = problem.program, problem.config, problem.sizes
    newer = {9: "hopper", 10: "blackwell", 11: "blackwell"}  # later ones, of desktops, have Ampere's shared memory
    family = newer.get(gpu.capability[0], "ampere")
    table = _EXACT if problem.dtype == "float32" else _TRITON[family]
    rich = bool(program.scores or program.dropout)
    widest = max(64, power_of_two(max(problem.head_size, problem.value_size)))
    part = {"value": "key", "pairs": "key"}.get(kernel, kernel)
    usual = table[part][widest][rich]
    if kernel == "forward" and (heads_together(problem) > 1 or sizes.query_length <= LEAST):
        usual = (usual[0], *_DECODING[problem.dtype == "float32"])
    prefix = "" if kernel == "forward" else "backward_"
    own = tuned(problem, "triton", "backward" if prefix else "forward", "cuda")
    names = [prefix + name for name in ("block_q", "block_k", "warps", "stages")]
    asked = (getattr(config, name, None) or own.get(name) for name in names)
    chosen = [one or other for one, other in zip(asked, usual, strict=True)]
    return Tiling(*chosen, upright=part == "key" and family == "ampere")


def _fitting(block: int, length: int, given: int) -> int:
    """The block, no longer than the length is, and a part of the `given` blocks if there are several."""
    block = min(block, power_of_two(length))
    return math.gcd(block, given) if 0 < given < length else block


def shared_bytes(problem: Problem, kernel: str, tiling: Tiling) -> int:
    """At most so much shared memory a Triton kernel needs: rows that stay, rows of the loop, what goes beside them.

    Compared with what the compiler asks for, of A100 and H200. In float32 the parts of products stand there too. For
    the least tiles with heads of 256 in float32 it is more than twice as much; they are taken all the same.
    """
    exact = problem.dtype == "float32"
    item = np.dtype(problem.dtype).itemsize
    head, value = (power_of_two(size) * item for size in (problem.head_size, problem.value_size))
    q, k = tiling.block_q, tiling.block_k
    if kernel == "forward":
        staying, moving = q * head, k * (head + value)
    else:
        staying, moving = (q, k) if kernel == "query" else (k, q)
        staying, moving = staying * (head + value), moving * (head + value + 8)
    beside = 1024 + (q * k * item if tiling.upright or problem.program.scores else 0)
    parts = 0 if not exact else 1 if kernel in ("forward", "query") else 2
    return staying * (1 + parts) + moving * (tiling.stages + parts) + beside


def key_splits(problem: Problem, tiling: Tiling, gpu: Gpu) -> int:
    """How many programs share the keys of a block of queries: several where the GPU would be idle otherwise."""
    asked = getattr(problem.config, "splits", None)
    if asked:
        return asked
    sizes, together = problem.sizes, heads_together(problem)
    rows = 1 if together > 1 else -(-sizes.query_length // tiling.block_q)
    programs = math.prod(sizes.batch) * rows * (sizes.heads // together)
    blocks = -(-sizes.key_length // tiling.block_k)
    return max(1, min(2 * gpu.processors // max(programs, 1), blocks // 4))
