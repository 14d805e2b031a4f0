"""Measures cases: every competitor on the same arrays, in turn, and a matrix product in turn with them.

Nothing here raises for what a competitor does: what is refused, cannot be done or fails becomes a row that says so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib.metadata
import math
import platform
import shlex
import statistics
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import jax

from attnjax import profiling
from attnjax.bench.accuracy import Oracle, consult
from attnjax.bench.cases import Arrays, Case
from attnjax.bench.peers import COMPETITORS, CannotDo, Prepared, Refused, Skipped
from attnjax.core.dispatch import KERNELS

FORMAT = 1  # of the record

_SECONDS = 0.6  # rounds of a case go on about so long, but there are at least _LEAST
_LEAST, _MOST = 3, 15
_SLOW, _FAR = 1.0, 4.0  # one round is enough for what takes over a second and 4 times as long as the fastest
_PAUSE = 5e-3  # the threads of OpenMP libraries spin for some milliseconds after their work
_MATMUL = "matrix product"


@dataclasses.dataclass
class Row:
    """One competitor on one case: a line of the report. Times in seconds, rates in FLOP/s, memory in bytes.

    Attributes:
      case, implementation, dtype, part: what was run.
      command: runs this row's case again, with all its competitors.
      status: "ok", "refused" (needs too much memory), "skipped" (no news), "cannot" (lacks what the case
        needs), "out of memory" or "failed".
      note: the reason, when the status is not "ok".
      seconds: median over the rounds; low, high: the extremes.
      rounds, repeats: samples, and runs in a row that make one (queued together, where a device has a queue).
      flops: of the visible pairs; bytes: that have to move at least.
      rate: flops / seconds; matmul_rate: the machine's, median, measured between the rounds; share: their
        ratio.
      temporary_bytes: beside arguments and results, as compiled; operand_bytes: dense masks and biases held
        for it.
      errors: largest absolute error against float64, of the output and of each gradient (see `accuracy`).
      compile_seconds: time to compile, which no other number contains.
    """

    case: str
    implementation: str
    dtype: str
    part: str
    command: str
    status: str = "ok"
    note: str = ""
    seconds: float | None = None
    low: float | None = None
    high: float | None = None
    rounds: int = 0
    repeats: int = 0
    flops: int = 0
    bytes: int = 0
    rate: float | None = None
    matmul_rate: float | None = None
    share: float | None = None
    temporary_bytes: int | None = None
    operand_bytes: int = 0
    errors: dict[str, float] = dataclasses.field(default_factory=dict)
    compile_seconds: float | None = None


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
      names: the competitors, in order of their rows.
      asked: whether the user named them.
      rounds: samples of each competitor; `None` is 3 to 15, about a second.
      limit: memory in bytes that a run may need.
      say: is told what is being done, for a progress bar.
    """

    names: tuple[str, ...]
    asked: bool = False
    rounds: int | None = None
    limit: float = 8 * 2**30
    say: Callable[[str], None] = lambda text: None


def measure(case: Case, settings: Settings, command: str) -> list[Row]:
    """Rows of all competitors on a case, in the order of their names."""
    about = {
        "dtype": case.dtype,
        "part": case.part,
        "command": command,
        "flops": case.flops(),
        "bytes": case.bytes(),
    }
    rows = {name: Row(case.name, name, **about) for name in settings.names}
    with jax.enable_x64(True) if case.dtype == "float64" else contextlib.nullcontext():
        entries = {}
        try:
            settings.say("float64")
            arrays = case.draw()
            oracle = consult(case, arrays)
            for name, row in rows.items():
                settings.say(f"{name}: compile and check")
                try:
                    entries[name] = _prepare(case, arrays, oracle, row, settings)
                except Exception as error:  # whatever it is, it belongs into the row
                    _blame(row, error)
            settings.say("time")
            _time(entries, rows, case.dtype, settings.rounds)
        except Exception as error:  # not the fault of a competitor, so it stands in every row
            for row in rows.values():
                _blame(row, error)
    gc.collect()
    return list(rows.values())


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A competitor ready to be timed, and a guess of its time from which the number of rounds follows."""

    run: profiling.Run
    guess: float
    repeats: int


def _prepare(case: Case, arrays: Arrays, oracle: Oracle, row: Row, settings: Settings) -> _Entry:
    """Compiles, runs once to see the error, and gives what is to be timed."""
    competitor = COMPETITORS[row.implementation]
    prepared: Prepared = competitor.prepare(case, arrays, settings.limit, settings.asked)
    row.compile_seconds = prepared.compile_seconds
    row.temporary_bytes, row.operand_bytes = prepared.temporary_bytes, prepared.operand_bytes
    made: list[Any] = []
    first = profiling.sample(lambda: made.append(prepared.run("checked")))
    row.errors = oracle.errors(prepared.to_numpy(made.pop()))
    run = prepared.timed("cotangent")
    if first > 0.3:
        return _Entry(run, first, 1)
    return _Entry(run, profiling.sample(run), profiling.repeats_for(run))


def _time(entries: dict[str, _Entry], rows: dict[str, Row], dtype: str, rounds: int | None) -> None:
    """Fills in the times. A matrix product takes part. One that fails leaves, and the others start anew."""
    product, product_flops = profiling.matmul(dtype)
    while entries:
        repeats = profiling.matmul_repeats(product)
        everyone = {**entries, _MATMUL: _Entry(product, profiling.sample(product), repeats)}
        try:
            samples = _in_turn(everyone, rounds)
        except _FailedRun as failure:
            del entries[failure.name]
            _blame(rows[failure.name], failure.error)
            continue
        matmul_rate = profiling.rates(product_flops, samples.pop(_MATMUL))["median"]
        for name, seconds in samples.items():
            row = rows[name]
            row.seconds, row.low, row.high = statistics.median(seconds), min(seconds), max(seconds)
            row.rounds, row.repeats = len(seconds), entries[name].repeats
            row.rate, row.matmul_rate = row.flops / row.seconds, matmul_rate
            row.share = row.rate / matmul_rate
        return


def _in_turn(entries: dict[str, _Entry], rounds: int | None) -> dict[str, list[float]]:
    """Samples of all, interleaved. Unless the number of rounds is given, the hopeless take part in one."""
    runs = {name: _guard(name, entry.run) for name, entry in entries.items()}
    repeats = {name: entry.repeats for name, entry in entries.items()}
    far = max(_SLOW, _FAR * min(entry.guess for name, entry in entries.items() if name != _MATMUL))
    close = [name for name, entry in entries.items() if rounds or entry.guess < far]
    total = sum(entries[name].guess * repeats[name] for name in close)
    count = rounds or min(_MOST, max(_LEAST, int(_SECONDS / total)))
    samples = profiling.interleaved(runs, 1, repeats=repeats, pause=_PAUSE)
    rest = {name: runs[name] for name in close}
    for name, seconds in profiling.interleaved(rest, count - 1, repeats=repeats, pause=_PAUSE).items():
        samples[name] += seconds
    return samples


class _FailedRun(Exception):
    """Carries the name of a competitor out of the timing loop, and what went wrong."""

    def __init__(self, name: str, error: Exception):
        super().__init__(name)
        self.name, self.error = name, error


def _guard(name: str, run: profiling.Run) -> profiling.Run:
    def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            try:
                return function(*args)
            except Exception as error:
                raise _FailedRun(name, error) from error

        return call

    if isinstance(run, profiling.Queue):
        return profiling.Queue(guarded(run.start), guarded(run.wait))
    return guarded(run)


def _blame(row: Row, error: Exception) -> None:
    """Turns a row into one that says what went wrong."""
    text = str(error).strip() or type(error).__name__
    exhausted = any(sign in text.lower() for sign in ("resource_exhausted", "out of memory", "not enough memory"))
    if isinstance(error, Refused):
        row.status = "refused"
    elif isinstance(error, Skipped):
        row.status = "skipped"
    elif isinstance(error, (CannotDo, NotImplementedError)):
        row.status = "cannot"
    elif isinstance(error, MemoryError) or exhausted:
        row.status = "out of memory"
    else:
        row.status, text = "failed", f"{type(error).__name__}: {text}"
    row.note = text.splitlines()[0]
    row.seconds, row.repeats, row.errors = None, 0, {}


def default_limit() -> float:
    """Memory in bytes that a run may need when the user does not say: half of what is free; of a CPU at most 8 GiB."""
    free, most = profiling.free_bytes(), 8 * 2**30
    if free is None:
        return most
    return min(most, free / 2) if jax.default_backend() == "cpu" else free / 2


def record(rows: list[Row], settings: Settings, command: list[str], seconds: float) -> dict[str, Any]:
    """Everything needed to read the rows later and to run them again, ready for JSON.

    Args:
      rows: of all cases.
      settings: how they were measured.
      command: the arguments behind `attnjax`.
      seconds: how long the whole run took.
    """
    rates: dict[str, list[float]] = {}
    for row in rows:
        if row.matmul_rate is not None:
            rates.setdefault(row.dtype, []).append(row.matmul_rate)
    return {
        "format": FORMAT,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["attnjax", *command]),
        "seconds": round(seconds, 1),
        "machine": profiling.describe_machine(),
        "versions": versions(),
        "settings": {"rounds": settings.rounds, "memory_limit": settings.limit},
        "implementations": list(KERNELS),
        "absent": {name: competitor.absent for name, competitor in COMPETITORS.items() if competitor.absent},
        "matmul_rates": {
            dtype: {"best": max(found), "median": statistics.median(found)} for dtype, found in rates.items()
        },
        "rows": [_plain(row) for row in rows],
    }


def _plain(row: Row) -> dict[str, Any]:
    """A row as a dictionary; numbers that JSON has no word for become text."""
    errors = {name: error if math.isfinite(error) else str(error) for name, error in row.errors.items()}
    return {**dataclasses.asdict(row), "errors": errors}


def versions() -> dict[str, str]:
    """Versions of Python and of every package that takes part; those that are not installed are left out."""
    found = {"python": platform.python_version()}
    libraries = ("jax-cuda13-plugin", "nvidia-cudnn-cu13", "libtpu", "triton")
    for name in ("attnjax", "jax", "jaxlib", "flax", "numpy", "torch", "tokamax", *libraries):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
