"""The command: `python -m mutants --python 60 --native 25 --seed 0`; `make mutants` runs it. Hours on two cores.

Each mutant is a copy of the package with one change. The tests that are closest to the file run first, then all that
`make test` runs, until one fails: then the mutant is killed. Those that live are printed at the end, and with `--all`
every case of every test is tried on them.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .draw import ENGINE, NATIVE, PACKAGE, Mutant, drawn

ROOT = PACKAGE.parent
# Tests of a file beside those of its own name.
CLOSEST = {
    "masks.py": ("masks", "blocks"),
    "core/mask.py": ("masks", "blocks"),
    "core/softmax.py": ("identities", "edges", "extremes"),
    "core/walk.py": ("identities", "edges", "blocks"),
    "core/sweep.py": ("transforms", "transforms_mixed"),
    "core/transforms.py": ("transforms", "transforms_mixed", "dispatch"),
    "core/blocks.py": ("blocks",),
    "scores.py": ("scores",),
    "core/split.py": ("split", "triton"),
    "core/dispatch.py": ("dispatch", "lowering"),
}
NATIVELY = ("cpu", "cpu_isolation", "cpu_refusals")
# An editable install answers imports before any path does.
WITHOUT_EDITABLE = """
import sys

sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in type(finder).__module__]
"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="mutants", description=__doc__)
    parser.add_argument("--python", type=int, default=60, metavar="N", help="mutants of the engine (default: 60)")
    parser.add_argument("--native", type=int, default=25, metavar="N", help="mutants of the C++ (default: 25)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="which ones are drawn (default: 0)")
    parser.add_argument("--all", action="store_true", help="every case of every test on those that live")
    parser.add_argument("--list", action="store_true", help="print the mutants and run nothing")
    options = parser.parse_args()
    mutants = drawn(ENGINE, options.python, options.seed) + drawn(NATIVE, options.native, options.seed)
    if options.list:
        print(*mutants, sep="\n")
        return 0
    living = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for mutant, (killer, seconds) in zip(mutants, pool.map(lambda m: _tried(m, options.all), mutants), strict=True):
            print(f"{'killed' if killer else 'LIVES '} {seconds:5.0f} s  {mutant}  {killer}", flush=True)
            living += [] if killer else [mutant]
    print(f"mutants: {len(mutants) - len(living)} killed, {len(living)} live, seed {options.seed}")
    return bool(living)


def _tried(mutant: Mutant, every: bool) -> tuple[str, float]:
    """The test that killed a mutant, "" if none did, and how long that took."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "attnjax")
        shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
        changed = copy / mutant.path
        changed.write_text(mutant.applied(changed.read_text()))
        Path(folder, "sitecustomize.py").write_text(WITHOUT_EDITABLE)
        native = mutant.path.startswith("kernels/native")
        killer = "" if not native else _not_built(copy)
        names = NATIVELY if native else CLOSEST[mutant.path]
        closest = [f"tests/test_{name}.py" for name in names]
        stages = [closest, ["tests"], *([["tests", "--cases=all"]] if every else [])]
        for arguments in stages:
            killer = killer or _failed(folder, arguments)
        return killer, time.monotonic() - start


def _failed(folder: str, arguments: list[str]) -> str:
    """The first test that fails with the package in this folder; "" if all pass."""
    environment = os.environ | {"PYTHONPATH": folder}
    # -P: else the package in the folder where it runs would go before the one in PYTHONPATH.
    command = [sys.executable, "-P", "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *arguments]
    try:
        run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=7200)
    except subprocess.TimeoutExpired:
        return "does not end"
    if not run.returncode:
        return ""
    lines = [line for line in run.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return lines[0].split(" - ")[0] if lines else f"exit status {run.returncode}"


def _not_built(package: Path) -> str:
    """Builds the C++ anew; says so where it cannot be built."""
    source, build = package / "kernels/native", package.parent / "build"
    (source / "libattnjax_cpu.so").unlink(missing_ok=True)
    cmake = Path(sys.executable).with_name("cmake")
    configure = [
        cmake,
        "-S",
        source,
        "-B",
        build,
        f"-DPython_EXECUTABLE={sys.executable}",
        "-DCMAKE_BUILD_TYPE=Release",
    ]
    for command in (configure, [cmake, "--build", build]):
        if subprocess.run(command, capture_output=True).returncode:
            return "does not compile"
    shutil.copy(build / "libattnjax_cpu.so", source)
    return ""


if __name__ == "__main__":
    sys.exit(main())
