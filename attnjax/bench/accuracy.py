"""The error of a competitor: what it computed against the formula in float64. Measures no time.

The oracle is attnjax's `reference`, in float64, a strip of query rows at a time. To keep it cheap it looks at

- all heads and batch entries up to 2^22 logits, beyond that at the first batch entry and the first key/value
  head with all its query heads;
- all query rows up to 2^24 of those logits, beyond that at four strips of rows, the first and the last among
  them. The cotangent of the output is zero in all other rows ("checked"), so that the gradients of key and
  value are known exactly.

The inputs are those of the competitor, rounded to its dtype: the error is that of the computation alone.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from attnjax.attention import attention
from attnjax.bench.cases import Arrays, Case

_ALL_HEADS = 2**22
_ALL_ROWS = 2**24
_STRIP = 2**21  # logits of a strip of rows and one head, 16 MiB in float64
_RESULTS = ("output", "query", "key", "value")  # the output, and the gradients of these


@dataclasses.dataclass(frozen=True)
class Oracle:
    """The right answer on a part of the heads and rows.

    Attributes:
      batch, heads, key_heads: the first so many are covered.
      rows: boolean `[T]`, the query rows that are covered.
      answer: float64: output rows `[batch, rows, heads, V]`, and if the case has them the gradients of query
        (its rows), key and value.
    """

    batch: int
    heads: int
    key_heads: int
    rows: np.ndarray
    answer: list[np.ndarray]

    def errors(self, made: list[np.ndarray]) -> dict[str, float]:
        """Largest absolute error of the output and of each gradient; NaN if there is any."""
        found = {}
        for name, got, want in zip(_RESULTS, made, self.answer, strict=False):
            by_query = name in ("output", "query")
            got = got[: self.batch, :, : self.heads if by_query else self.key_heads]
            got = got[:, self.rows] if by_query else got
            found[name] = float(np.abs(got.astype(np.float64) - want).max())
        return found


def consult(case: Case, arrays: Arrays) -> Oracle:
    """Computes the oracle of a case, and puts the cotangent it belongs to into `arrays` as "checked"."""
    whole = case.logits <= _ALL_HEADS
    batch, key_heads = (case.B, case.K) if whole else (1, 1)
    heads = key_heads * (case.N // case.K)
    strips = _strips(case.T, case.S, batch * heads)
    rows = np.zeros(case.T, bool)
    for start, stop in strips:
        rows[start:stop] = True
    arrays["checked"] = np.where(rows[:, None, None], arrays["cotangent"], np.zeros((), arrays["cotangent"].dtype))
    with jax.enable_x64(True):
        part = {name: _cut(name, array, batch, heads, key_heads) for name, array in arrays.items()}
        return Oracle(batch, heads, key_heads, rows, _answer(case, part, strips))


def _strips(length: int, keys: int, lanes: int) -> list[tuple[int, int]]:
    """Ranges of query rows to look at, each small enough to hold its logits."""
    size = min(length, max(1, _STRIP // (keys * lanes)))
    starts = list(range(0, length, size))
    if length * keys * lanes > _ALL_ROWS and len(starts) > 4:
        starts = [starts[len(starts) * i // 3] for i in range(3)] + [starts[-1]]
    return [(start, min(start + size, length)) for start in starts]


def _cut(name: str, array: np.ndarray, batch: int, heads: int, key_heads: int) -> np.ndarray:
    """The covered batch entries and heads of an array, floats as float64."""
    if name in ("query", "cotangent", "checked"):
        array = array[:batch, :, :heads]
    elif name in ("key", "value"):
        array = array[:batch, :, :key_heads]
    elif name == "bias":
        array = array[:batch, :heads]
    elif name == "slopes":
        array = array[:heads]
    return array if array.dtype.kind in "iub" else array.astype(np.float64)


def _answer(case: Case, arrays: dict[str, Any], strips: list[tuple[int, int]]) -> list[np.ndarray]:
    """Output and gradients, strip by strip; the gradients of key and value are sums over the strips."""

    @jax.jit
    def strip(query: Any, cotangent: Any, whole: dict[str, Any], by_row: dict[str, Any], start: Any) -> tuple:
        options = case.options(whole | by_row, start)
        attend = lambda *qkv: attention(*qkv, **options, implementation="reference")
        if not case.backward:
            return (attend(query, whole["key"], whole["value"]),)
        out, pull = jax.vjp(attend, query, whole["key"], whole["value"])
        return out, *pull(cotangent)

    whole = {name: jax.numpy.asarray(array) for name, array in arrays.items() if name not in ("query", "checked")}
    made = []
    for start, stop in strips:
        by_row = {}
        if "query_ids" in arrays:
            by_row["query_ids"] = arrays["query_ids"][start:stop]
        if case.bias and case.bias[2] == "T":
            by_row["bias"] = arrays["bias"][:, :, start:stop]
        query, cotangent = arrays["query"][:, start:stop], arrays["checked"][:, start:stop]
        made.append([np.asarray(x) for x in strip(query, cotangent, whole, by_row, start)])
    parts = list(zip(*made, strict=True))
    return [np.concatenate(part, axis=1) for part in parts[:2]] + [np.sum(part, axis=0) for part in parts[2:]]
