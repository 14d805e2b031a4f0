"""Which of a test's cases are run: few of them, in which every value of each parameter occurs."""

import re
import zlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import pytest


def covering(
    rows: Sequence[tuple[Any, ...]], groups: Sequence[tuple[int, ...]], tie: Callable[[int], Any]
) -> list[int]:
    """Indices of few rows in which all occurs that occurs in `rows`: of each group of columns, their values together.

    Greedy: the row that adds most, and of several the one with the smallest `tie(index)`.
    """
    holds = [{(group, tuple(row[column] for column in group)) for group in groups} for row in rows]
    order, missing, chosen = sorted(range(len(rows)), key=tie), set().union(*holds), []
    while missing:
        best = max(order, key=lambda n: len(holds[n] & missing))
        chosen.append(best)
        missing -= holds[best]
    return chosen


def few(items: list[pytest.Item], seed: str) -> set[pytest.Item]:
    """The tests without parameters, and of the others few cases: see `covering`.

    What is given to one `parametrize` is one parameter, unless `pytest.mark.crossed` says that its names are apart.
    With `crossed(..., each="name")` every value of each parameter occurs together with every value of that one.
    """
    chosen, tests = set(), defaultdict(list)
    for item in items:
        if hasattr(item, "callspec"):
            tests[item.nodeid.partition("[")[0]].append(item)
        else:
            chosen.add(item)
    for cases in tests.values():
        crossed = cases[0].get_closest_marker("crossed")
        names = [(name,) for name in crossed.args] if crossed else _parametrized(cases[0])
        values = lambda item, names=names: [[item.callspec.params[name] for name in group] for group in names]
        rows = [_identity(values(item)) for item in cases]
        each = [names.index((crossed.kwargs["each"],))] if crossed and "each" in crossed.kwargs else []
        groups = [tuple(sorted({column, *each})) for column in range(len(names))]
        tie = lambda n, cases=cases: zlib.crc32(f"{seed} {cases[n].nodeid}".encode())
        chosen |= {cases[n] for n in covering(rows, groups, tie)}
    return chosen


def _parametrized(item: pytest.Item) -> list[tuple[str, ...]]:
    """Names of the parameters, those of one `parametrize` together."""
    names = [mark.args[0] for mark in item.iter_markers("parametrize")]
    groups = [tuple(re.split(r"[\s,]+", group)) if isinstance(group, str) else tuple(group) for group in names]
    together = {name for group in groups for name in group}
    return groups + [(name,) for name in item.callspec.params if name not in together]


def _identity(value: Any) -> Any:
    """What tells two values of a parameter apart, hashable."""
    if isinstance(value, tuple | list):
        return tuple(map(_identity, value))
    return value if isinstance(value, str | bool | int | None) else id(value)
