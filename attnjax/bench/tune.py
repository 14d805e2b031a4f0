"""`attnjax tune`: times the configs of an implementation on this device and keeps the fastest, for `core.tables`."""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from attnjax import profiling
from attnjax.attention import attention, build
from attnjax.bench.cases import Case
from attnjax.bench.run import versions
from attnjax.core.tables import FORMAT, key_of
from attnjax.kernels import mosaic_tpu, triton, xla

USUAL = {"cpu": "xla", "cuda": "triton", "tpu": "mosaic_tpu"}  # what is tuned where nothing is named
_FORWARD = {
    "xla": (xla.Config, dict(block_q=(128, 256, 512, 1024), block_k=(128, 256, 512, 1024))),
    "triton": (triton.Config, dict(block_q=(64, 128), block_k=(32, 64, 128), warps=(4, 8), stages=(2, 3))),
    "mosaic_tpu": (mosaic_tpu.Config, dict(block_q=(256, 512, 1024), block_k=(256, 512, 1024))),
}
_BACKWARD = {
    "triton": dict(block_q=(32, 64, 128), block_k=(32, 64, 128), warps=(4, 8), stages=(1, 2)),
    "mosaic_tpu": dict(block_q=(256, 512, 1024), block_k=(256, 512, 1024)),
}


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What was found for a case.

    Attributes:
      key: the entry of the table; config: its fields that are the fastest, none where the usual sizes are.
      seconds: of these; usual: of the sizes that are chosen without a table; tried: how many were timed.
    """

    key: str
    config: dict[str, Any]
    seconds: float
    usual: float
    tried: int


def able(implementation: str, case: Case) -> str | None:
    """Why a case says nothing about the sizes of an implementation, or `None`."""
    if implementation not in _FORWARD:
        return f"has no sizes to tune; {', '.join(_FORWARD)} have"
    if case.backward and implementation not in _BACKWARD:
        return "has the same sizes in all parts: give a case without gradients"
    return None


def configs(implementation: str, backward: bool) -> list[Any]:
    """All that are tried, the usual one (`None`) first."""
    make, fields = _FORWARD[implementation]
    fields = {f"backward_{name}": x for name, x in _BACKWARD[implementation].items()} if backward else fields
    return [None, *(make(**dict(zip(fields, values, strict=True))) for values in itertools.product(*fields.values()))]


def tune(case: Case, implementation: str, rounds: int, say: Callable[[str], None]) -> Tuned:
    """Times all configs of a case that compile, interleaved.

    Raises:
      NotImplementedError: the implementation cannot take the case.
    """
    arrays = {name: jnp.asarray(x) for name, x in case.draw().items()}
    options = case.options(arrays)
    problem, _ = build(arrays["query"], arrays["key"], arrays["value"], **options)
    tried = configs(implementation, case.backward)
    runs: dict[int, profiling.Run] = {}
    for n, config in enumerate(tried):
        say(f"{case.name}: config {n + 1} of {len(tried)}")
        try:
            runs[n] = _run(case, arrays, options, implementation, config)
        except Exception as error:  # too large for the device, say: there are others
            if config is None:
                raise
            say(f"{case.name}: left out {config}: {str(error).splitlines()[0]}")
    say(f"{case.name}: time {len(runs)} configs")
    taken = {str(n): run for n, run in runs.items()}
    repeats = {n: profiling.repeats_for(run) if isinstance(run, profiling.Queue) else 1 for n, run in taken.items()}
    medians = {int(n): sorted(x)[len(x) // 2] for n, x in profiling.interleaved(taken, rounds, repeats=repeats).items()}
    best = min(medians, key=lambda n: medians[n])
    return Tuned(
        key_of(problem, implementation, _part(implementation, case.backward)),
        {name: x for name, x in vars(tried[best] or _Nothing()).items() if x is not None and type(x) is int},
        medians[best],
        medians[0],
        len(runs),
    )


class _Nothing:
    """A config that says nothing."""


def _part(implementation: str, backward: bool) -> str:
    if implementation not in _BACKWARD:
        return "all"
    return "backward" if backward else "forward"


def _run(
    case: Case, arrays: dict[str, Any], options: dict[str, Any], implementation: str, config: Any
) -> profiling.Run:
    """The case with a config, compiled and run once."""

    def step(query: Any, key: Any, value: Any, cotangent: Any) -> Any:
        attend = lambda *qkv: attention(*qkv, **options | {"implementation": implementation, "config": config})
        if not case.backward:
            return attend(query, key, value)
        out, pull = jax.vjp(attend, query, key, value)
        return out, *pull(cotangent)

    given = [arrays[name] for name in ("query", "key", "value", "cotangent")]
    compiled = jax.jit(step)
    run = profiling.awaited(lambda: compiled(*given))
    run()
    return run


def write(path: pathlib.Path, device: str, found: Iterator[Tuned] | list[Tuned], command: str) -> None:
    """Adds what was found to a table; entries of the same key are replaced."""
    table = json.loads(path.read_text()) if path.exists() else {}
    entries = dict(table.get("entries", {}))
    for one in found:
        entries[one.key] = {
            "config": one.config,
            "seconds": one.seconds,
            "usual": one.usual,
            "command": command,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {"format": FORMAT, "device": device, "versions": versions(), "entries": dict(sorted(entries.items()))}
    path.write_text(json.dumps(whole, indent=1) + "\n")
