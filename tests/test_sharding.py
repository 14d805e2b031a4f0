"""Attention divided over devices, on 8 simulated ones: the numbers of one device, and what has to move between them."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest

IMPLEMENTATIONS = ("xla", "cpu")
SUMS = {"all-reduce"}  # gradients of what devices share, and nothing else
# By name of the case in sharded.py: what moves, and into how many parts the results are cut.
EXPECTED = {
    "forward by batch": (set(), [2, 2]),
    "forward by batch and head": (set(), [8, 8]),
    "gradient by batch": (SUMS, [2, 2, 2, 1, 1, 1]),
    "gradient by batch and head": (SUMS, [8, 8, 8, 4, 4, 4]),
    "gradient with one key head": (SUMS, [8, 2, 2, 4, 4, 4]),
    "gradient with two key heads": (SUMS, [8, 2, 2, 4, 4, 4]),
    "gradient in 64 bits": (SUMS, [8, 8, 8, 4, 4, 4]),
    "tangent": (set(), [8, 8]),
    "second order": (SUMS, [2, 1]),
    "second order by batch and head": (SUMS, [8, 4]),
    "vmap": (set(), [2]),
    "vmap of gradient": (set(), [2, 2, 2, 2, 2, 2]),
    "shard_map": (SUMS, [1]),
    "shard_map gradient": (SUMS, [8, 8, 8, 4, 4, 4]),
}
GATHERED = ("key heads that do not divide", "function of heads")


@functools.cache
def found(implementation):
    """What sharded.py printed, by name."""
    program = Path(__file__).parent / "sharded.py"
    run = subprocess.run([sys.executable, str(program), implementation], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return {case["name"]: case for case in map(json.loads, run.stdout.splitlines())}


@pytest.mark.parametrize("kind", ["auto", "explicit"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", EXPECTED)
def test_each_device_runs_its_own_share(name, implementation, kind):
    case = found(implementation)[f"{kind} {name}"]
    moves, shares = EXPECTED[name]
    assert case["error"] < 2e-6
    assert set(case["moves"]) == moves
    assert case["shares"] == shares
    if kind == "explicit":  # the types tell it
        assert case["typed"] == shares


@pytest.mark.parametrize("kind", ["auto", "explicit"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", GATHERED)
def test_what_cannot_be_divided_is_gathered(name, implementation, kind):
    """Right all the same. Explicit results lie as the query does."""
    case = found(implementation)[f"{kind} {name}"]
    assert case["error"] < 2e-6
    assert set(case["moves"]) == {"all-gather"}
    if kind == "explicit":
        assert case["shares"] == case["typed"] == [8]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_division_by_position(implementation):
    """XLA gathers on Auto axes; on Explicit axes nothing moves unasked."""
    case = found(implementation)["auto by position"]
    assert case["error"] < 2e-6
    assert set(case["moves"]) == {"all-gather"}
    refused = found(implementation)["explicit by position"]["refused"]
    assert "query float32[4,24@data,8,8] is divided along the queries" in refused
    assert "reshard(query, P(None, None, None, None))" in refused
