"""Shows the record of a run: a table, and what it adds up to. Measures nothing.

Everything is made from the dictionary that `--json` writes, so an old file can be shown as well as a new run.
"""

from __future__ import annotations

import importlib.util
import math
import statistics
from typing import Any

Record = dict[str, Any]

HEADINGS = ("case", "impl", "ms", "GFLOP/s", "share", "memory", "error", "x jax.nn", "x torch", "note")
_NUMBERS = HEADINGS[2:9]
_AGAINST = ("jax.nn", "torch")
_MORE = ("jax.nn-cudnn", "torch-flex", "tokamax")  # in the summary only
_HEAVY = 1e9  # FLOPs; below, the time of a call is not that of its products

_READING = (
    "ms: median of interleaved runs. GFLOP/s: products of visible pairs. share: of the matrix-multiply rate.",
    "memory: temporaries, and dense masks made for it. error: largest, absolute, against float64.",
    "x jax.nn, x torch: how many times faster than these. -grad: forward and backward; others: forward.",
)


def show(record: Record, style: str) -> None:
    """Prints a record. Styles: "rich" (a terminal), "plain" (a file or a pipe), "markdown"."""
    rows = table(record)
    if style == "rich":
        _print_rich(record, rows)
        return
    print("\n".join(header(record)), end="\n\n")
    print("\n".join(_markdown(rows) if style == "markdown" else _plain(rows)), end="\n\n")
    bullet = "- " if style == "markdown" else ""
    print("\n".join(bullet + line for line in (*summary(record), *footnotes(record))))


def style_for(terminal: bool) -> str:
    """The style for this output: rich where there is a terminal and the package."""
    return "rich" if terminal and importlib.util.find_spec("rich") is not None else "plain"


def header(record: Record) -> list[str]:
    """Machine, versions, matrix-multiply rates."""
    machine, versions = record["machine"], record["versions"]
    where = machine["processor"] if machine["platform"] == "cpu" else f"{machine['devices']} x {machine['device']}"
    rates = [f"{dtype} {rate['median'] / 1e9:.0f} GFLOP/s" for dtype, rate in record["matmul_rates"].items()]
    return [
        f"{record['command']}   {record['date']}, {record['seconds']:.0f} s",
        f"{where}, {machine['cores']} cores, {' '.join(machine['features'])}",
        ", ".join(f"{name} {version}" for name, version in versions.items()),
        f"matrix multiply: {', '.join(rates) or 'not measured'}",
    ]


def table(record: Record) -> list[list[str]]:
    """The cells, a line per case and implementation; the name of a case stands in its first line only."""
    seconds = {(row["case"], row["dtype"], row["implementation"]): row["seconds"] for row in record["rows"]}
    lines, previous = [], None
    for row in record["rows"]:
        if row["status"] == "skipped":
            continue
        key = row["case"], row["dtype"]
        name = row["case"] if row["dtype"] in ("float32", row["case"].split("-")[-1]) else " ".join(key)
        name = "" if key == previous else name
        if row["status"] != "ok":
            lines.append([name, row["implementation"], *[""] * 7, f"{row['status']}: {row['note']}"])
        else:
            ratios = []
            for other in _AGAINST:
                theirs = seconds.get((*key, other))
                ratios.append(
                    "" if theirs is None or other == row["implementation"] else _ratio(theirs / row["seconds"])
                )
            lines.append([name, row["implementation"], *_measured(row), *ratios, ""])
        previous = key
    return lines


def summary(record: Record) -> list[str]:
    """Geometric means over the cases, for each implementation of attnjax and each part of the work."""
    rows = [row for row in record["rows"] if row["status"] == "ok"]
    seconds = {(row["case"], row["dtype"], row["implementation"]): row["seconds"] for row in rows}
    lines = []
    for name in record["implementations"]:
        if name == "reference":  # for checking, not for speed
            continue
        for part in ("forward", "forward+backward"):
            own = [row for row in rows if row["implementation"] == name and row["part"] == part]
            found = []
            for other in (*_AGAINST, *_MORE):
                pairs = [(seconds.get((row["case"], row["dtype"], other)), row["seconds"]) for row in own]
                ratios = [theirs / mine for theirs, mine in pairs if theirs is not None]
                if ratios:
                    found.append(f"{_ratio(statistics.geometric_mean(ratios))} x {other} {_range(ratios)}")
            shares = [row["share"] for row in own if row["flops"] >= _HEAVY]
            if shares:
                found.append(f"{statistics.geometric_mean(shares):.2f} of the matrix-multiply rate {_range(shares)}")
            if found:
                lines.append(f"{name}, {part}: {'; '.join(found)}")
    return lines


def footnotes(record: Record) -> list[str]:
    """How to read the columns, how to get a row again, and who is not in the table."""
    example = record["rows"][0]["command"] if record["rows"] else "attnjax bench --case NAME"
    skipped = {row["implementation"]: row["note"] for row in record["rows"] if row["status"] == "skipped"}
    left_out = [f"{name} (small cases only, {note}; --impl {name})" for name, note in skipped.items()]
    left_out += [f"{name} ({reason})" for name, reason in record["absent"].items()]
    lines = [*_READING, f"One case again: {example}"]
    return [*lines, f"Left out: {', '.join(left_out)}."] if left_out else lines


def _measured(row: dict[str, Any]) -> list[str]:
    share = "" if row["flops"] < _HEAVY else f"{row['share']:.2f}"
    memory = "-" if row["temporary_bytes"] is None else _bytes(row["temporary_bytes"] + row["operand_bytes"])
    errors = [float(error) for error in row["errors"].values()]  # JSON holds "nan" as text
    worst = math.nan if any(map(math.isnan, errors)) else max(errors, default=math.nan)
    return [milliseconds(row["seconds"]), f"{row['rate'] / 1e9:.3g}", share, memory, f"{worst:.0e}"]


def milliseconds(seconds: float) -> str:
    """Three or four digits."""
    value = seconds * 1e3
    return f"{value:.{0 if value >= 1000 else 1 if value >= 100 else 2 if value >= 10 else 3}f}"


def _bytes(count: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 2**10:.1f} KiB"


def _ratio(value: float) -> str:
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _range(values: list[float]) -> str:
    return f"({len(values)} cases, {_ratio(min(values))} to {_ratio(max(values))})" if len(values) > 1 else "(1 case)"


def _plain(rows: list[list[str]]) -> list[str]:
    """Aligned columns, numbers at the right; a note takes the place of the numbers."""
    *shown, _ = range(len(HEADINGS))
    widths = [max(len(line[i]) for line in (HEADINGS, *rows)) for i in shown]
    pad = lambda text, i: text.rjust(widths[i]) if HEADINGS[i] in _NUMBERS else text.ljust(widths[i])
    lines = []
    for row in (list(HEADINGS[:-1]) + [""], *rows):
        cells = [*row[:2], row[-1]] if row[-1] else row[:-1]
        lines.append("  ".join(pad(text, i) if i < 2 or not row[-1] else text for i, text in enumerate(cells)).rstrip())
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def _markdown(rows: list[list[str]]) -> list[str]:
    rule = ["---:" if heading in _NUMBERS else "---" for heading in HEADINGS]
    return [f"| {' | '.join(line)} |" for line in (HEADINGS, rule, *rows)]


def _print_rich(record: Record, rows: list[list[str]]) -> None:
    """The plain table with attnjax in bold, and with what is not a number dimmed."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    heading, rule, *lines = _plain(rows)
    styles = ["bold" if row[1] in record["implementations"] else "dim" if row[-1] else "" for row in rows]
    for text in (*header(record), ""):
        console.print(Text(text, style="dim"))
    console.print(Text(heading, style="bold"))
    console.print(Text(rule, style="dim"))
    for line, style in zip(lines, styles, strict=True):
        console.print(Text(line, style=style))
    console.print()
    for text in (*summary(record), *footnotes(record)):
        console.print(Text(text))
