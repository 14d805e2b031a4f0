"""Compiles programs for devices that are not here and reports facts about them; runs none of them.

As a library: `compile_for(function, arguments, target)` in this process, `compile_all(names, target)` in processes of
their own, where a crash of a compiler is the end of one program and not of the tests. As a command, from this folder:

    python compiling.py h200                       every program that wants an H200, one line of JSON each
    python compiling.py v6e --schedule NAME ...    these, with the instruction schedule of their TPU kernels
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SECONDS = 900  # for one program: a machine may be busy, a compiler must not hang


@dataclasses.dataclass
class Facts:
    """What the compilers said.

    Attributes:
      error: why it was not compiled, or "".
      argument_bytes: of arguments and results; temporary_bytes: of what is needed beside them; code_bytes: of itself.
      kernels: per GPU kernel {"registers", "spilled", "shared"}, bytes but for the registers; `shared` is what is
        known before launch. Only what XLA writes as PTX: Triton's kernels and its own loops.
      schedules: per TPU kernel {"bundles", "spills", "matmul"}: instruction bundles (about a cycle each, every branch
        and loop body counted once), vector registers spilled and filled, and the bundles that its matrix products need
        at least. Only when they are asked for.
    """

    error: str = ""
    argument_bytes: int = 0
    temporary_bytes: int = 0
    code_bytes: int = 0
    kernels: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    schedules: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)

    @property
    def spilled(self) -> dict[str, int]:
        """Bytes that GPU kernels spill, of those that do."""
        return {name: kernel["spilled"] for name, kernel in self.kernels.items() if kernel["spilled"]}


def prepare(dump: Path, schedule: bool = False) -> None:
    """Sets the variables that compilers read when they are first used. To be called before JAX is imported."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={dump} --xla_dump_emitter_re=ptx"
    os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_cuda_data_dir={_toolkit()}" if _toolkit() else flags
    os.environ["MOSAIC_GPU_DUMP_TO"] = str(dump)  # the PTX of Mosaic GPU's kernels
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # no cloud machine to be asked what it is
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    os.environ["TPU_STDERR_LOG_LEVEL"] = "3"
    if schedule:
        os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"


def compile_for(function: Callable[..., Any], arguments: Iterable[Any], target: Any, dump: Path) -> Facts:
    """Compiles in this process, after `prepare(dump)`.

    Args:
      function: of arrays; it is jitted here.
      arguments: `jax.ShapeDtypeStruct`s, or pytrees of them.
      target: a `targets.Target`.
      dump: the folder that `prepare` was told; it is emptied.
    """
    import jax

    sharding = target.sharding()
    placed = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    try:
        with target.lowering():
            lowered = jax.jit(function).lower(*jax.tree.map(placed, tuple(arguments)))
        compiled = lowered.compile()
    except Exception as error:
        return Facts(error=f"{type(error).__name__}: {error}")
    finally:
        # Read before it is emptied, also after an error: a hundred megabytes are left otherwise.
        kernels = _kernels(dump, target.architecture) if target.platform == "cuda" else {}
        schedules = _schedules(dump) if target.platform == "tpu" else {}
        for path in dump.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    memory = compiled.memory_analysis()
    return Facts(
        argument_bytes=memory.argument_size_in_bytes + memory.output_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        code_bytes=memory.generated_code_size_in_bytes,
        kernels=kernels,
        schedules=schedules,
    )


def compile_all(names: list[str], target: str, schedule: bool = False) -> dict[str, Facts]:
    """Compiles programs by name in a process of their own; what kills it is the error of the program it was at."""
    facts: dict[str, Facts] = {}
    while left := [name for name in names if name not in facts]:
        command = [sys.executable, __file__, target, *(["--schedule"] if schedule else []), *left]
        with tempfile.TemporaryFile("w+") as noise:
            try:
                run = subprocess.run(
                    command, stdout=subprocess.PIPE, stderr=noise, text=True, timeout=SECONDS * len(left)
                )
                text, end = run.stdout, _ending(run.returncode)
            except subprocess.TimeoutExpired as late:
                text, end = (late.stdout or b"").decode(), f"took more than {SECONDS} seconds"
            noise.seek(0)
            last = noise.read()[-2000:]
        for line in text.splitlines():
            if line.startswith("{"):
                one = json.loads(line)
                name = one.pop("name")
                facts[name] = Facts(**one)
        unfinished = next((name for name in left if name not in facts), None)
        if unfinished is not None:
            facts[unfinished] = Facts(error=f"the compiler's process {end}\n{last}")
    return facts


def _ending(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"


def _toolkit() -> str:
    """The folder of a CUDA toolkit that came as wheels (`make test-aot`), or "": then it is on PATH."""
    wheels = sorted(Path(sys.prefix).glob("lib/python*/site-packages/nvidia/cu*/nvvm"))
    return "" if shutil.which("nvcc") or not wheels else str(wheels[-1].parent)


def _ptxas() -> str:
    return str(Path(_toolkit(), "bin", "ptxas")) if _toolkit() else "ptxas"


_ENTRY = re.compile(r"(?:Compiling entry function|Function properties for) '?([\w$.]+)'?")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


def _kernels(dump: Path, architecture: str) -> dict[str, dict[str, int]]:
    """What the assembler says of every kernel among the PTX files that were dumped."""
    kernels: dict[str, dict[str, int]] = {}
    for path in sorted(dump.rglob("*.ptx")):
        if not path.stat().st_size:  # a module of constants
            continue
        command = [_ptxas(), "-v", f"-arch={architecture}", str(path), "-o", os.devnull]
        text = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True).stderr
        name = ""
        for line in text.splitlines():
            if found := _ENTRY.search(line):
                name = found[1]
                kernels.setdefault(name, {"registers": 0, "spilled": 0, "shared": 0})
            if found := _SPILLS.search(line):
                kernels[name]["spilled"] = int(found[1]) + int(found[2])
            if found := _REGISTERS.search(line):
                kernels[name]["registers"] = int(found[1])
            if found := _SHARED.search(line):
                kernels[name]["shared"] = int(found[1])
    return kernels


_SCHEDULE = re.compile(r"\d+-(.+)-\d+-final_hlo-static-per-bundle-utilization")


def _schedules(dump: Path) -> dict[str, dict[str, int]]:
    """Counts of every TPU kernel (not of XLA's own operations), from the table with a line per bundle."""
    schedules = {}
    for path in sorted(dump.rglob("*-final_hlo-static-per-bundle-utilization.txt")):
        named = _SCHEDULE.fullmatch(path.stem)
        assert named, f"{path.name} is not named as expected: the compiler's dump has changed"
        analysis = next(dump.rglob(f"*-{named[1]}-*-schedule-analysis_final_bundles.txt"))
        if named[1] == "TLP" or "custom-call " not in analysis.read_text():  # TLP: the program around the kernels
            continue
        _, columns, capacity, _, *rows = path.read_text().splitlines()
        units = [column.strip() for column in columns.split(",")]
        used = [dict(zip(units, map(int, row.split()), strict=True)) for row in rows if row]
        matrix = dict(zip(units, map(int, capacity.split()), strict=True))["MATMUL"]
        schedules[named[1]] = {
            "bundles": len(used),
            "spills": sum(bundle["VLOAD:FILL"] + bundle["VSTORE:SPILL"] for bundle in used),
            "matmul": -(-sum(bundle["MATMUL"] for bundle in used) // matrix),
        }
    return schedules


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("names", nargs="*", help="programs (default: all of the target)")
    parser.add_argument("--schedule", action="store_true", help="the schedules of TPU kernels too: large dumps")
    arguments = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), arguments.schedule)
        from programs import PROGRAMS
        from targets import TARGETS

        target = TARGETS[arguments.target]
        names = arguments.names or [name for name, one in PROGRAMS.items() if target.name in one.targets]
        for name in names:
            try:
                facts = compile_for(*PROGRAMS[name].build(), target, Path(folder))
            except Exception:  # of the program's own making, as it is built
                facts = Facts(error=traceback.format_exc())
            print(json.dumps({"name": name, **dataclasses.asdict(facts)}), flush=True)


if __name__ == "__main__":
    main()
