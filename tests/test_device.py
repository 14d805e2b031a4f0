"""What `make test-gpu` runs, as far as that can be seen without a GPU: which kernels, how, and from which tests."""

import subprocess
import sys
from pathlib import Path

import jax
import problems
import pytest

NEW, OLD = (0, 12, 0), (0, 10, 2)


@pytest.mark.parametrize(
    "capabilities, version, names",
    [
        ([], NEW, []),
        (["9.0"], OLD, ["triton"]),
        (["9.0"], NEW, ["triton", "mosaic_gpu"]),
        (["8.0"], NEW, ["triton"]),
        (["10.0"], NEW, ["triton"]),
        (["9.0", "8.0"], NEW, ["triton"]),
    ],
)
def test_kernels_that_run_compiled(capabilities, version, names):
    assert list(problems.compiled(capabilities, version)) == names


def test_interpreted_exactly_where_there_is_no_gpu():
    assert problems.TRITON.interpret == (jax.default_backend() != "gpu")
    assert ("triton" in problems.INTERPRETED) == problems.TRITON.interpret
    assert "triton" in problems.EVERY_IMPLEMENTATION


PRETENDING = """
import os, sys, jax
jax.default_backend = lambda: "gpu"
class Device:
    device_kind, compute_capability, platform = "NVIDIA H200", "9.0", "gpu"
real = jax.local_devices
jax.local_devices = lambda *args, **options: real(*args, **options) if options else [Device()]
import pytest
sys.exit(pytest.main(["-m", "device", "--cases=all", "--collect-only", "-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


def test_what_is_selected_on_a_gpu():
    """Kernels for GPUs are in the table, those for other devices are not, and every test knows what it is called."""
    tests = Path(__file__).parent
    run = subprocess.run([sys.executable, "-c", PRETENDING, tests], capture_output=True, text=True, cwd=tests.parent)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    count = lambda name: sum(name in line for line in run.stdout.splitlines() if "test_conformance" in line)
    assert count("triton") > 150 and count("xla") > 150
    assert count("mosaic_gpu") > 100 or jax.__version_info__ < (0, 11, 2)
    assert not count("mosaic_tpu") and not count("-cpu")
    for test in (
        "test_triton.py::test_shapes",
        "test_mosaic_gpu.py::test_masks",
        "test_cudnn.py::test_attention_by_name",
    ):
        assert test in run.stdout
    assert "test_lowering" not in run.stdout
