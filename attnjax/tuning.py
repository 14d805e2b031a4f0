"""Block sizes: how a problem is cut into tiles on each platform. Rules of thumb; nothing is measured here."""

from __future__ import annotations

import dataclasses

from attnjax.core.program import Problem

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How the tiled code walks a problem.

    Attributes:
      block_q, block_k: queries and keys of a tile.
      lanes: how many of each batch axis are computed together; every entry divides its axis.
      lanes_kv: how many key/value heads are computed together; divides K.
    """

    block_q: int
    block_k: int
    lanes: tuple[int, ...]
    lanes_kv: int


# Rows (queries times the group) and keys of a tile, and pairs of all lanes that are computed together. Measured on two
# Zen 5 cores at S = 4096: with fewer rows the threads of a matrix product wait for each other; with more, a mask makes
# tiles compute pairs that nobody sees. Without a mask larger ones are 1.5 times as fast (H = 128). On accelerators a
# tile must fill the device, so many heads go together.
_TARGETS = {"cpu": (512, 512, 2**18), None: (512, 512, 2**24)}
_UNMASKED = (4, 2)  # times as many rows, and keys
_FEW_ROWS = 2**16  # pairs of a tile with few rows (decoding), which is made wider instead


def choose_blocks(problem: Problem, platform: str) -> Blocks:
    """Tile sizes for a problem, from its config where the config says, else from its shape."""
    sizes, config = problem.sizes, problem.config
    rows, keys, pairs = _TARGETS.get(platform, _TARGETS[None])
    if not problem.program.mask and platform == "cpu" and sizes.query_length >= 2048:
        rows, keys = _UNMASKED[0] * rows, _UNMASKED[1] * keys
    t, s = max(sizes.query_length, 1), max(sizes.key_length, 1)
    asked_q = getattr(config, "block_q", None)
    asked_k = getattr(config, "block_k", None)
    if problem.blocks is not None:
        block_q, block_k = problem.blocks
    else:
        block_q = asked_q or _even(t, max(16, rows // sizes.group))
        wide = max(keys, _FEW_ROWS // min(block_q * sizes.group, rows))
        block_k = asked_k or _even(s, wide)
    block_q, block_k = min(block_q, t), min(block_k, s)
    budget = getattr(config, "lanes", None) or max(1, pairs // (block_q * sizes.group * block_k))
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


def _even(length: int, target: int) -> int:
    """A block of at most `target` (rounded up to 16) that divides the length about evenly."""
    count = -(-length // target)
    block = -(-length // count)
    return min(length, -(-block // 16) * 16)


def _divisor(size: int, most: int) -> int:
    return max((d for d in range(1, min(size, most) + 1) if size % d == 0), default=1)
