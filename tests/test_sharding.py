"""Attention divided over devices, on 8 simulated ones: the numbers of one device, and what has to move between them."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest

SUMS = {"all-reduce"}  # gradients of what devices share, and nothing else
# By name of the case in sharded.py: what moves, and into how many parts the results are cut.
EXPECTED = {
    "forward by batch and head": (set(), [8, 8]),
    "gradient by batch": (SUMS, [2, 2, 2, 1, 1, 1]),
    "gradient by batch and head": (SUMS, [8, 8, 8, 4, 4, 4]),
    "gradient with one key head": (SUMS, [8, 2, 2, 4, 4, 4]),
    "gradient with two key heads": (SUMS, [8, 2, 2, 4, 4, 4]),
    "forward in 64 bits": (set(), [8, 8]),
    "tangent": (set(), [8, 8]),
    "second order": (SUMS, [8, 4]),
    "vmap of gradient": (set(), [2, 2, 2, 2, 2, 2]),
    "shard_map": (SUMS, [1, 8, 8, 8, 4, 4, 4]),
}
ALONE = ("forward by batch and head", "gradient by batch and head", "gradient with two key heads", "forward in 64 bits")
RUN = [("xla", name) for name in EXPECTED] + [("cpu", name) for name in (*ALONE, "shard_map")]
RUN += [("reference", "second order")]
GATHERED = ("key heads that do not divide", "function of heads")


# One worker of pytest-xdist has all of it, so that the program runs once (make test passes --dist loadgroup).
pytestmark = pytest.mark.xdist_group("sharded")


@functools.cache
def found():
    """What sharded.py printed, by name."""
    program = Path(__file__).parent / "sharded.py"
    run = subprocess.run([sys.executable, str(program)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return {case["name"]: case for case in map(json.loads, run.stdout.splitlines())}


@pytest.mark.parametrize("kind", ["auto", "explicit"])
@pytest.mark.parametrize(("implementation", "name"), RUN)
def test_each_device_runs_its_own_share(implementation, name, kind):
    case = found()[f"{kind} {implementation} {name}"]
    moves, shares = EXPECTED[name]
    assert case["error"] < 2e-6
    assert set(case["moves"]) == moves
    assert case["shares"] == shares
    if kind == "explicit":  # the types tell it
        assert case["typed"] == shares


@pytest.mark.parametrize("kind", ["auto", "explicit"])
@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_gradient_of_a_derivative_that_is_a_program_of_its_own(implementation, kind):
    """One of its arrays is by batch entry and not divided: so is its gradient, where types tell it."""
    case = found()[f"{kind} {implementation} second order, turned"]
    assert case["error"] < 4e-6
    if kind == "explicit":
        assert case["shares"] == case["typed"] == [8, 1]


@pytest.mark.parametrize("kind", ["auto", "explicit"])
@pytest.mark.parametrize("name", GATHERED)
def test_what_cannot_be_divided_is_gathered(name, kind):
    """Right all the same. Explicit results lie as the query does."""
    case = found()[f"{kind} xla {name}"]
    assert case["error"] < 2e-6
    assert set(case["moves"]) == {"all-gather"}
    if kind == "explicit":
        assert case["shares"] == case["typed"] == [8]


def test_division_by_position():
    """XLA gathers on Auto axes; on Explicit axes nothing moves unasked."""
    case = found()["auto xla by position"]
    assert case["error"] < 2e-6
    assert set(case["moves"]) == {"all-gather"}
    refused = found()["explicit xla by position"]["refused"]
    assert "query float32[4,24@data,8,8] is divided along the queries" in refused
    assert "reshard(query, P())" in refused


@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_sizes_of_0_and_calls_of_python(kind):
    """Where an array is empty there is nothing to divide; XLA would lose a Python function and crash."""
    case = found()[f"{kind} xla no keys"]
    assert case["error"] == 0
    assert kind == "auto" or case["typed"] == [8]
    refused = found()[f"{kind} xla by Python"]["refused"]
    assert "a mask or score calls Python (pure_callback), which cannot be divided over devices" in refused
