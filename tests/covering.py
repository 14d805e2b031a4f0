"""Which of a test's cases are run: few of them, in which every value of each parameter occurs."""

import itertools
import re
import zlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import pytest


def covering(rows: Sequence[tuple[Any, ...]], strength: int, tie: Callable[[int], Any]) -> list[int]:
    """Indices of few rows in which everything occurs that occurs in `rows`: each value of each column (strength 1), or
    each pair of values of two columns (strength 2).

    Greedy: the row that adds most, and of several the one with the smallest `tie(index)`.
    """
    groups = list(itertools.combinations(range(len(rows[0])), min(strength, len(rows[0]))))
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
    """
    chosen, tests = set(), defaultdict(list)
    for item in items:
        if hasattr(item, "callspec"):
            tests[item.nodeid.partition("[")[0]].append(item)
        else:
            chosen.add(item)
    for cases in tests.values():
        crossed = cases[0].get_closest_marker("crossed")
        groups = [(name,) for name in crossed.args] if crossed else _parametrized(cases[0])
        values = lambda item, groups=groups: [[item.callspec.params[name] for name in group] for group in groups]
        rows = [_identity(values(item)) for item in cases]
        strength = crossed.kwargs.get("strength", 1) if crossed else 1
        tie = lambda n, cases=cases: zlib.crc32(f"{seed} {cases[n].nodeid}".encode())
        chosen |= {cases[n] for n in covering(rows, strength, tie)}
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
