"""The command `attnjax`: reads arguments, calls the subcommand, prints. Measures nothing itself.

A subcommand is a function `(arguments, parser) -> exit status` and an entry in `_parser`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import importlib.metadata
import json
import os
import pathlib
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from attnjax import profiling
from attnjax.bench import report
from attnjax.bench import tune as tuning
from attnjax.bench.cases import CASES, Case, select
from attnjax.bench.peers import COMPETITORS
from attnjax.bench.run import FORMAT, Row, Settings, default_limit, measure, record, versions
from attnjax.core import tables
from attnjax.kernels import cpu

_DTYPES = ("float32", "bfloat16", "float16", "float64")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns the exit status.

    0: done, also where whoever reads the output has had enough (`attnjax bench --list | head`); 1: nothing could be
    measured; 2: arguments that make no sense; 130: interrupted.
    """
    parser = _parser()
    words = list(sys.argv[1:] if argv is None else argv)
    arguments = parser.parse_args(words)
    arguments.words = words
    try:
        status = arguments.command(arguments, parser)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # Python flushes once more when it ends, into what nobody reads.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("attnjax", description="Exact attention for JAX: tools.")
    parser.add_argument("--version", action="version", version=f"attnjax {_version()}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    text = "Compares attention on this machine: time, rate, memory, error."
    bench = commands.add_parser("bench", help="compare attention on this machine", description=text)
    many: dict[str, Any] = {"nargs": "+", "action": "extend"}
    bench.add_argument("--case", **many, metavar="GLOB", help="cases by name or pattern (default: see --list)")
    bench.add_argument("--impl", **many, metavar="NAME", help="competitors (default: all that are installed)")
    bench.add_argument("--dtype", **many, metavar="DTYPE", help="run the cases in this dtype instead of their own")
    bench.add_argument("--rounds", type=int, metavar="N", help="runs of each (default: about a second, 3 to 15)")
    bench.add_argument("--quick", action="store_true", help="three rounds, and of the default cases the small ones")
    text = "refuse runs that need more (default: half of what is free, at most 8)"
    bench.add_argument("--memory", type=float, metavar="GIB", help=text)
    text = "write everything that was measured; into a folder: under the name of the device"
    bench.add_argument("--json", type=pathlib.Path, metavar="FILE", help=text)
    bench.add_argument("--show", type=pathlib.Path, metavar="FILE", help="run nothing, show what --json wrote")
    bench.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    bench.add_argument("--list", action="store_true", help="run nothing, list cases and competitors")
    bench.set_defaults(command=_bench)

    text = "Times the block sizes of an implementation on this device and keeps the fastest in a table that calls use."
    tune = commands.add_parser("tune", help="find the fastest block sizes on this device", description=text)
    tune.add_argument("--case", **many, metavar="GLOB", required=True, help="cases by name or pattern: bench --list")
    tune.add_argument("--impl", metavar="NAME", help="implementation (default: the one with block sizes here)")
    tune.add_argument("--rounds", type=int, default=5, metavar="N", help="runs of each size (default: 5)")
    text = "the table to add to (default: the one of this device that the installed package reads)"
    tune.add_argument("--json", type=pathlib.Path, metavar="FILE", help=text)
    tune.set_defaults(command=_tune, quick=False, dtype=None)

    text = "Prints what there is here: versions, devices, and the compiled kernel for CPUs, or why it is missing."
    info = commands.add_parser("info", help="print versions, devices and the compiled kernel", description=text)
    info.set_defaults(command=_info)
    return parser


def _info(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    machine, sets = profiling.describe_machine(), cpu.instruction_sets()
    others = f"; also {', '.join(sets[1:])}" if sets[1:] else ""
    lines = {
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
        "devices": f"{machine['devices']} x {machine['device']} ({machine['platform']})",
        "processor": f"{machine['processor']}, {machine['cores']} cores, {' '.join(machine['features'])}",
        "cpu kernel": f"{sets[0]}{others}" if sets else f"none: {cpu.missing()}",
    }
    for name, text in lines.items():
        print(f"{name:11} {text}")
    return 0


def _tune(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    cases = _cases(arguments, parser)
    platform: str = profiling.describe_machine()["platform"]
    platform = "cuda" if platform == "gpu" else platform
    name: str = arguments.impl or tuning.USUAL.get(platform, "xla")
    if arguments.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {arguments.rounds}")
    for case in cases:
        reason = tuning.able(name, case)
        if reason:
            parser.error(f"--impl {name}, case {case.name}: {name} {reason}")
    device: str = tables.device_name(platform) or platform
    path = arguments.json or tables.path_for(device)
    for case in cases:
        try:
            found = tuning.tune(case, name, arguments.rounds, lambda text: print(text, file=sys.stderr))
        except NotImplementedError as error:
            parser.error(f"--impl {name}, case {case.name}: {error}")
        tuning.write(path, device, [found], shlex.join(["attnjax", *arguments.words]))
        sizes = ", ".join(f"{field}={x}" for field, x in found.config.items()) or "the usual sizes"
        faster = f"{found.usual / found.seconds:.2f} x as fast as the usual"
        print(f"{case.name}: {sizes}, {found.seconds * 1e3:.4g} ms, {faster}, of {found.tried}")
    print(f"{path}: what calls on {device} use from now on" if not arguments.json else str(path))
    return 0


def _bench(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    style = "markdown" if arguments.markdown else report.style_for(sys.stdout.isatty())
    if arguments.show:
        try:
            made = json.loads(arguments.show.read_text())
        except (OSError, ValueError) as error:
            parser.error(f"--show {arguments.show}: cannot be read ({error})")
        if not isinstance(made, dict) or made.get("format") != FORMAT:
            parser.error(f"--show {arguments.show}: not a file that --json of this version wrote")
        report.show(made, style)
        return 0
    cases, names = _cases(arguments, parser), _names(arguments, parser)
    if arguments.list:
        _list(cases if arguments.case or arguments.quick else list(CASES))
        return 0
    if arguments.rounds is not None and arguments.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {arguments.rounds}")
    if arguments.json and not arguments.json.absolute().parent.is_dir():
        parser.error(f"--json {arguments.json}: there is no directory {arguments.json.parent}")
    settings = Settings(
        names=names,
        asked=arguments.impl is not None,
        rounds=arguments.rounds or (3 if arguments.quick else None),
        limit=default_limit() if arguments.memory is None else arguments.memory * 2**30,
    )
    start = time.perf_counter()
    rows, interrupted = _run(cases, settings, arguments)
    made = record(rows, settings, arguments.words, time.perf_counter() - start)
    report.show(made, style)
    if arguments.json:
        path = arguments.json / _file_name(made["machine"]) if arguments.json.is_dir() else arguments.json
        path.write_text(json.dumps(made, indent=1) + "\n")
    if interrupted:
        return 130
    return 0 if any(row.status == "ok" for row in rows) else 1


def _file_name(machine: dict[str, Any]) -> str:
    """Of a record: "nvidia-h200.json"; of CPUs with the number of cores."""
    if machine["platform"] == "cpu":
        return tables.path_for(f"{machine['processor']} {machine['cores']} cores").name
    return tables.path_for(machine["device"]).name


def _run(cases: list[Case], settings: Settings, arguments: argparse.Namespace) -> tuple[list[Row], bool]:
    """Measures the cases under a progress bar; what was measured before an interruption counts."""
    rows: list[Row] = []
    try:
        with _progress(len(cases)) as (say, done):
            for case in cases:
                tell = lambda text, case=case: say(f"{case.name}: {text}")
                start = time.perf_counter()
                made = measure(case, dataclasses.replace(settings, say=tell), _again(case, arguments))
                rows += made
                done(case.name, made, time.perf_counter() - start)
    except KeyboardInterrupt:
        return rows, True
    return rows, False


@contextlib.contextmanager
def _progress(total: int) -> Iterator[tuple[Callable[[str], None], Callable[[str, list[Row], float], None]]]:
    """`say(what is done now)` and `done(case, rows, seconds)`: a bar on a terminal, else a line per case.

    Both go to the standard error, so that a pipe gets the table alone.
    """
    count = 0

    def line(name: str, rows: list[Row], seconds: float) -> None:
        nonlocal count
        count += 1
        times = [f"{row.implementation} {_outcome(row)}" for row in rows]
        print(f"[{count}/{total}] {name}: {', '.join(times)} ({seconds:.0f} s)", file=sys.stderr, flush=True)

    if report.style_for(sys.stdout.isatty()) == "plain":
        yield lambda text: None, line
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = MofNCompleteColumn(), BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda text: bar.update(task, description=text), lambda *_: bar.advance(task)


def _outcome(row: Row) -> str:
    return row.status if row.seconds is None else f"{report.milliseconds(row.seconds)} ms"


def _cases(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> list[Case]:
    try:
        cases = select(arguments.case, quick=arguments.quick)
    except KeyError as error:
        parser.error(_unknown("--case", error.args[0], [case.name for case in CASES]))
    for dtype in arguments.dtype or ():
        if dtype not in _DTYPES:
            parser.error(_unknown("--dtype", dtype, _DTYPES))
    if not arguments.dtype:
        return cases
    return [dataclasses.replace(case, dtype=dtype) for case in cases for dtype in dict.fromkeys(arguments.dtype)]


def _names(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> tuple[str, ...]:
    for name in arguments.impl or ():
        if name not in COMPETITORS:
            parser.error(_unknown("--impl", name, list(COMPETITORS)))
        if COMPETITORS[name].absent:
            parser.error(f"--impl {name}: {COMPETITORS[name].absent}")
    if arguments.impl:
        return tuple(name for name in COMPETITORS if name in arguments.impl)
    return tuple(name for name, competitor in COMPETITORS.items() if not competitor.absent)


def _unknown(option: str, name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}."
    return f"{option} {name}: unknown; {hint} `attnjax bench --list` shows all."


def _again(case: Case, arguments: argparse.Namespace) -> str:
    """The command that measures this one case in the same way."""
    words = ["attnjax", "bench", "--case", case.name]
    words += ["--dtype", case.dtype] if arguments.dtype else []
    words += ["--impl", *arguments.impl] if arguments.impl else []
    words += ["--rounds", str(arguments.rounds)] if arguments.rounds else []
    words += ["--memory", str(arguments.memory)] if arguments.memory is not None else []
    return shlex.join(words)


def _list(cases: list[Case]) -> None:
    print("cases (* measured by default)")
    for case in cases:
        print(f" {'*' if case.default else ' '} {case.name:28} {case.describe()}")
    print("\ncompetitors")
    for name, competitor in COMPETITORS.items():
        print(f"   {name:28} {competitor.absent or ''}".rstrip())


def _version() -> str:
    try:
        return importlib.metadata.version("attnjax")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed: run from its source)"


if __name__ == "__main__":
    sys.exit(main())
