"""Runs drawn programs and compares them with the oracle; in worker processes, so that a crash is found and named."""

from __future__ import annotations

import collections
import dataclasses
import gc
import json
import os
import queue
import re
import subprocess
import sys
import threading
import time
import traceback
import warnings
from typing import Any

import numpy as np

from fuzz.oracle import expected, plainly, worst
from fuzz.programs import Program, answer, drawn, executed

# Arguments that do not fit are refused by name: a mask, a score, an argument of attention, a method of the cache.
NAMED = re.compile(
    r"^(Causal|Window|Chunked|Prefix|Segments|Lengths|Dilated|Dense|Where|Permutation|SoftCap|Bias|ALiBi|RelativeBias|"
    r"ScoreFn|Dropout|KVCache|BlockMap|mask|score|scale|sinks|dropout|block_map|query|key|value|"
    r"the (score )?function)\b"
)
PER_PROCESS = 100  # cases until a worker is replaced: each compiled program holds memory mappings
MARK = "fuzz: "  # before the lines that a worker says; JAX prints others
SLOWEST = 150.0  # seconds that a case may take


@dataclasses.dataclass
class Result:
    """What came of a case: `passed`, `refused`, `failed` or `crashed`; why; how long it took."""

    number: int
    status: str
    reason: str = ""
    seconds: float = 0.0


def check(program: Program) -> tuple[str, str]:
    """Runs the program in this process. Whether it passed, was refused or failed, and why."""
    import jax

    space = executed(program.text)
    wrong: list[str] = []
    with warnings.catch_warnings(), jax.enable_x64(program.draw.x64):
        warnings.simplefilter("ignore")
        for r in range(program.draw.rounds):
            x, d, c, u, ct = space["inputs"](r)
            try:
                got = jax.block_until_ready(space["run"](x, d, c, u, ct))
            except Exception as error:
                return _raised(error)
            lines = compare(program, got, (x, d, c, u, ct), orders=3)
            lines = lines and compare(program, got, (x, d, c, u, ct), orders=20)  # was the plain formula only lucky?
            wrong += [f"round {r}: {line}" for line in lines]
    return ("failed", "\n".join(wrong)) if wrong else ("passed", "")


def compare(program: Program, got: Any, inputs: tuple[Any, ...], orders: int) -> list[str]:
    """A line for every result that is further from the oracle than allowed, or of another shape or type."""
    import jax

    x, d, c, u, ct = inputs
    known = {name: np.asarray(a) for name, a in {**d, **c}.items()}
    number = jax.tree.map(np.asarray, (x, u, ct))
    for name in ("query", "key", "value"):  # what is not finite is unseen: the oracle is asked without it
        number[0][name] = np.where(np.isfinite(number[0][name]), number[0][name], 0)
    names = sorted(x) if program.by_name else ["out", "lse"]
    got = [got[name] for name in names] if program.by_name else list(got)
    dtypes = [a.dtype for a in (x[name] for name in names)] if program.by_name else [x["query"].dtype, None]
    make, call = answer(program, number[1], number[2]), program.draw.dtype
    lse = plainly(program.values, number[0], known.__getitem__)[1] if program.letters else 0.0
    stored = [call if dtype is None else str(dtype) for dtype in dtypes][: len(got)]
    wants = expected(make, number[0], known.__getitem__, call, (1,) if program.has_lse else (), stored, orders, lse)
    lines = []
    for name, one, dtype, (want, allowed) in zip(names, got, dtypes, wants, strict=False):
        value = np.asarray(one)
        if value.shape != want.shape:
            lines.append(f"{name}: shape {value.shape}, expected {want.shape}")
        elif dtype is not None and value.dtype != dtype:
            lines.append(f"{name}: {value.dtype}, expected {dtype}")
        elif not np.array_equal(np.isneginf(value), np.isneginf(want)) and not program.letters:
            lines.append(f"{name}: -inf where it is not expected, or the other way round")
        elif not (error := worst(value, want)) <= allowed:
            lines.append(f"{name}: error {error:.3g}, allowed {allowed:.3g}, largest {np.max(np.abs(want)):.3g}")
    return lines


def _raised(error: Exception) -> tuple[str, str]:
    text = f"{type(error).__name__}: {error}".split("\n--------------------")[0]
    if isinstance(error, NotImplementedError) or "NotImplementedError: implementation" in text:  # said while lowering
        return "refused", text
    if isinstance(error, (ValueError, TypeError, OverflowError)) and NAMED.match(str(error)):
        return "refused", text
    frames = [f"{f.filename.split('/')[-1]}:{f.lineno} {f.name}" for f in traceback.extract_tb(error.__traceback__)]
    ours = [f for f in frames if not f.startswith(("run.py", "traceback_util", "api.py"))]
    return "failed", f"{text[:400]}\n  at {' < '.join(reversed(ours[-6:]))}"


def settings(number: int) -> None:
    """What a process is set to before JAX is used: every third block of cases is compiled as users compile."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4 " + os.environ.get("XLA_FLAGS", "")
    import jax

    jax.config.update("jax_disable_most_optimizations", number // PER_PROCESS % 3 != 2)


def one(seed: int, number: int) -> Result:
    """Draws the case, runs it, and compares."""
    start = time.monotonic()
    try:
        status, reason = check(drawn(seed, number))
    except Exception:  # of the fuzzer itself: to be seen, and no reason to stop
        status, reason = "failed", "in the fuzzer: " + traceback.format_exc()
    return Result(number, status, reason, time.monotonic() - start)


def work(seed: int, numbers: range) -> None:
    """A worker: a line before each case and one with its result after it."""
    settings(numbers.start)
    for number in numbers:
        print(MARK + json.dumps({"begun": number}), flush=True)
        print(MARK + json.dumps(dataclasses.asdict(one(seed, number))), flush=True)
        if number % 50 == 49:
            import jax

            jax.clear_caches()
            gc.collect()


class Worker:
    """A process that runs a block of cases, and what it said last."""

    def __init__(self, seed: int, numbers: range):
        here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        command = [sys.executable, "-m", "fuzz", "--work", f"{seed}:{numbers.start}:{numbers.stop}"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=here)
        self.begun, self.since, self.end = numbers.start, time.monotonic(), numbers.stop
        self.lines: queue.Queue[str | None] = queue.Queue()
        self.errors: collections.deque[str] = collections.deque(maxlen=30)
        threading.Thread(target=self._read, daemon=True).start()
        threading.Thread(target=lambda: self.errors.extend(self.process.stderr), daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def next(self, wait: float) -> Result | str | None:
        """A result; "ended" when the process has; `None` where nothing came in time."""
        try:
            line = self.lines.get(timeout=wait)
        except queue.Empty:
            if time.monotonic() - self.since < SLOWEST:
                return None
            self.process.kill()
            return Result(self.begun, "crashed", f"took more than {SLOWEST:.0f} seconds", SLOWEST)
        if line is None:
            status = self.process.wait()
            if status == 0:
                return "ended"
            return Result(self.begun, "crashed", f"the process ended with {status}: {''.join(self.errors)[-1500:]}")
        if not line.startswith(MARK):
            return None
        said = json.loads(line.removeprefix(MARK))
        self.since = time.monotonic()
        if "begun" in said:
            self.begun = said["begun"]
            return None
        return Result(**said)


def campaign(seed: int, minutes: float, first: int = 0) -> int:
    """Runs cases for that long, one worker after another; prints failures as they come. The number of failures."""
    stop, number, results = time.monotonic() + 60 * minutes, first, []
    while time.monotonic() < stop:
        block = range(number, (number // PER_PROCESS + 1) * PER_PROCESS)
        worker = Worker(seed, block)
        while True:
            made = worker.next(1.0)
            if made == "ended":
                number = block.stop
                break
            if isinstance(made, Result):
                results.append(made)
                number = made.number + 1
                _report(seed, made)
                if made.status == "crashed":
                    break
            if time.monotonic() >= stop:
                worker.process.kill()
                break
        worker.process.wait()
    return _summary(results)


def _report(seed: int, result: Result) -> None:
    if result.status in ("failed", "crashed"):
        print(
            f"{result.status}: python -m fuzz --case {seed}:{result.number}\n    "
            + result.reason.replace("\n", "\n    "),
            flush=True,
        )


def _summary(results: list[Result]) -> int:
    counts = collections.Counter(result.status for result in results)
    reasons = collections.Counter(
        re.sub(r"\d+", "N", result.reason)[:140] for result in results if result.status == "refused"
    )
    for reason, count in reasons.most_common():
        print(f"{count:5d}  {reason}")
    wrong = counts["failed"] + counts["crashed"]
    print(f"fuzz: {counts['passed']} passed, {wrong} failed, {counts['refused']} refused")
    return wrong
