"""`regions`: the blocks of a mask without a map of all of them, as rectangles of blocks of one kind. NumPy only.

Large rectangles are asked about first, and those that are neither empty nor full are cut in 16. So time and memory are
those of the edge between what is seen and what is not: linear in the lengths for a causal mask or a window.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from attnjax.core.mask import And, Mask, Not, Or
from attnjax.core.tiles import Grid, Sizes

_CUT = 4  # parts along each side
_AT_ONCE = 2**14  # rectangles that are asked about together
_UNKNOWN = np.array(0, np.int8), np.array(2, np.int8)


@dataclasses.dataclass(frozen=True)
class Regions:
    """Some rectangles of blocks; those of all `regions` make up the whole map.

    Attributes:
      rows, columns: the number of the first query block and key block of each, integers `[rectangles]`.
      heights, widths: how many blocks each has along queries and keys.
      kinds: int8 `[*batch or 1, heads or 1, rectangles]`: 0 empty, 1 partial, 2 full, true of every block in it.
    """

    rows: np.ndarray
    columns: np.ndarray
    heights: np.ndarray
    widths: np.ndarray
    kinds: np.ndarray


def regions(mask: Mask, sizes: Sizes, block_q: int, block_k: int) -> Iterator[Regions]:
    """The kinds that `mask.blocks` gives for a whole `Grid`, a few rectangles at a time.

    Args:
      mask: settled, its leaves in operand form. Parts whose leaves are no NumPy arrays are partial everywhere.
      sizes: with at least one query and key.
      block_q, block_k: size of a block.
    """
    counts = -(-sizes.query_length // block_q), -(-sizes.key_length // block_k)
    scale = 1
    while -(-counts[0] // scale) * -(-counts[1] // scale) > _CUT**2:
        scale *= _CUT
    waiting, levels = [(scale, *_whole(counts, scale))], {}
    while waiting:
        scale, rows, columns = waiting.pop()
        if len(rows) > _AT_ONCE:
            waiting.append((scale, rows[_AT_ONCE:], columns[_AT_ONCE:]))
            rows, columns = rows[:_AT_ONCE], columns[:_AT_ONCE]
        if scale not in levels:
            levels[scale] = _Level(sizes, (block_q, block_k), scale)
        low, high = _bounds(mask, _Cells(levels[scale], rows, columns))
        done = ((low != 1) & (high != 1)).reshape(-1, len(rows)).all(0) if scale > 1 else np.ones(len(rows), bool)
        heights, widths = (
            np.minimum(scale, count - scale * at[done]) for count, at in zip(counts, (rows, columns), strict=True)
        )
        kinds = np.maximum(low, np.minimum(high, np.int8(1)))[..., done]
        if done.any():
            yield Regions(rows[done] * scale, columns[done] * scale, heights, widths, kinds)
        if not done.all():
            waiting.append((scale // _CUT, *_parts(counts, scale // _CUT, rows[~done], columns[~done])))


def _whole(counts: tuple[int, int], scale: int) -> tuple[np.ndarray, np.ndarray]:
    rows, columns = np.indices([-(-count // scale) for count in counts])
    return rows.ravel(), columns.ravel()


def _parts(counts: tuple[int, int], scale: int, rows: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rectangles of `scale` blocks that some larger ones consist of."""
    i, j = np.indices((_CUT, _CUT))
    rows = (rows[:, None] * _CUT + i.ravel()).ravel()
    columns = (columns[:, None] * _CUT + j.ravel()).ravel()
    inside = (rows * scale < counts[0]) & (columns * scale < counts[1])
    return rows[inside], columns[inside]


class _Level(Grid):
    """The `Grid` of all squares of `scale` blocks, which remembers the ends that it was asked for."""

    def __init__(self, sizes: Sizes, blocks: tuple[int, int], scale: int):
        lengths = sizes.query_length, sizes.key_length
        super().__init__(sizes, *(min(block * scale, length) for block, length in zip(blocks, lengths, strict=True)))
        self._found: dict[tuple[int, str], Any] = {}

    def ends(self, array: Any, axes: str) -> tuple[Any, Any]:
        kept = self._found.setdefault((id(array), axes), [array])  # kept, so that no other array gets its id
        if len(kept) == 1:
            kept.append(super().ends(array, axes))
        return kept[1]


class _Cells(Grid):
    """Some squares of a `_Level`, in a column: [..., squares, 1]."""

    def __init__(self, level: _Level, rows: np.ndarray, columns: np.ndarray):
        self.__dict__.update(vars(level))
        self.level, self.rows, self.columns, self.shape = level, rows, columns, (len(rows), 1)
        for name in ("q_min", "q_max", "k_min", "k_max"):
            setattr(self, name, self._own(getattr(level, name)))

    def _own(self, x: np.ndarray) -> np.ndarray:
        rows = self.rows if x.shape[-2] > 1 else np.zeros_like(self.rows)
        columns = self.columns if x.shape[-1] > 1 else np.zeros_like(self.columns)
        return x[..., rows, columns][..., None]

    def ends(self, array: Any, axes: str) -> tuple[Any, Any]:
        low, high = self.level.ends(array, axes)
        return self._own(low), self._own(high)

    def scan(self, mask: Any, uses: tuple[bool, ...]) -> Any:
        return np.int8(1)


def _bounds(mask: Mask, cells: _Cells) -> tuple[np.ndarray, np.ndarray]:
    """The least and the greatest kind of each square, were those parts empty or full that are partial everywhere.

    They tell apart a square whose blocks are all partial, (0, 2), from one that is too large to be known, (1, ...).
    """
    low, high = _pair(mask, cells)
    shape = (*np.broadcast_shapes(low.shape[:-2], high.shape[:-2], (1,) * (len(cells.sizes.batch) + 1)), *cells.shape)
    return np.broadcast_to(low, shape)[..., 0], np.broadcast_to(high, shape)[..., 0]


def _pair(mask: Mask, cells: _Cells) -> tuple[np.ndarray, np.ndarray]:
    if isinstance(mask, Not):
        low, high = _pair(mask.mask, cells)
        return np.int8(2) - high, np.int8(2) - low
    if isinstance(mask, (And, Or)):
        join = np.minimum if isinstance(mask, And) else np.maximum
        (a, b), (c, d) = _pair(mask.left, cells), _pair(mask.right, cells)
        return join(a, c), join(b, d)
    known = all(isinstance(leaf, (np.ndarray, np.generic)) for _, leaf, _ in mask.operands())
    kinds = np.asarray(mask.blocks(cells) if known else np.int8(1), np.int8)
    return _UNKNOWN if kinds.ndim == 0 and kinds == 1 else (kinds, kinds)
