"""Sizes that `attnjax tune` measured to be the fastest: reads its tables and finds a problem in them. Measures nothing.

There is a file per device in `attnjax/tables`. An entry counts for one implementation, part of the work, dtype and head
size, for lengths up to the next power of 2, and for calls with or without mask and scores.
"""

from __future__ import annotations

import functools
import json
import pathlib
import re
from typing import Any

import jax

from attnjax.core.devices import gpus
from attnjax.core.program import Problem
from attnjax.profiling import processor_name

FORMAT = 1
FOLDER = pathlib.Path(__file__).parents[1] / "tables"


def device_name(platform: str) -> str | None:
    """What a table's device is called: the accelerator that is compiled for, or the processor; `None`: not known."""
    if platform == "cpu":
        return processor_name()
    if platform == "cuda":
        return next(iter(gpus()), None)
    described = jax.sharding.get_abstract_mesh().abstract_device
    if described is not None:
        return described.device_kind
    return jax.local_devices()[0].device_kind if jax.default_backend() == platform else None


def path_for(device: str) -> pathlib.Path:
    """Where the table of a device is kept."""
    return FOLDER / (re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json")


def key_of(problem: Problem, implementation: str, part: str) -> str:
    """The entry of a problem: "triton forward bfloat16 128 4096x4096 mask scores"."""
    program, sizes = problem.program, problem.sizes
    size = _up(max(problem.head_size, problem.value_size))
    lengths = f"{_up(sizes.query_length)}x{_up(sizes.key_length)}"
    words = [implementation, part, problem.dtype, str(size), lengths]
    words += ["mask"] * bool(program.mask) + ["scores"] * bool(program.scores or program.dropout)
    return " ".join(words)


def tuned(problem: Problem, implementation: str, part: str, platform: str) -> dict[str, Any]:
    """Fields of the implementation's Config that were measured for such a problem; none where it has a config."""
    device = device_name(platform) if problem.config is None else None
    if device is None:
        return {}
    return _entries(path_for(device)).get(key_of(problem, implementation, part), {})


@functools.cache
def _entries(path: pathlib.Path) -> dict[str, dict[str, Any]]:
    """The configs of a table, by key; read once."""
    if not path.exists():
        return {}
    return {key: entry["config"] for key, entry in json.loads(path.read_text())["entries"].items()}


def _up(length: int) -> int:
    """The next power of 2, at least 16."""
    return max(16, 1 << (max(length, 1) - 1).bit_length())
