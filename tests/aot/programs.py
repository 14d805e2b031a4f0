"""The table of programs that are compiled for devices that are not here. A kernel joins with a file of its own.

Each `*_programs.py` beside this file has a list `PROGRAMS`. Nothing is compiled here.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Program:
    """One program.

    Attributes:
      name: unique; the kernel's name comes first.
      build: gives the function of arrays, and its arguments as `jax.ShapeDtypeStruct`s.
      targets: names of `targets.TARGETS`.
      spills: so many bytes, stores and loads, may each of its GPU kernels spill.
      schedule: whether the bundles of its TPU kernels are to be counted.
    """

    name: str
    build: Callable[[], tuple[Callable[..., Any], list[Any]]]
    targets: tuple[str, ...]
    spills: int = 0
    schedule: bool = False


def _collected() -> dict[str, Program]:
    found: dict[str, Program] = {}
    for path in sorted(Path(__file__).parent.glob("*_programs.py")):
        for program in importlib.import_module(path.stem).PROGRAMS:
            assert program.name not in found, f"{path.name}: {program.name} is there already"
            found[program.name] = program
    return found


PROGRAMS = _collected()
