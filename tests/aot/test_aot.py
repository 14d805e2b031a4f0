"""Programs compiled for GPUs and TPUs that are not here: that they compile, spill nothing, and need linear memory.

`make test-aot` runs this in an environment with the compilers. What is compiled is in the `*_programs.py` here.
"""

import functools
import json
import re

import pytest
from compiling import compile_all
from programs import PROGRAMS
from targets import EVERYWHERE, TARGETS

CASES = [(target, name) for target in EVERYWHERE for name, one in PROGRAMS.items() if target in one.targets]
BY_LENGTH = re.compile(r"(.+)-(\d+)")


@functools.cache
def compiled(target, names, schedule=False):
    return compile_all(list(names), target, schedule)


@pytest.fixture
def facts(request):
    """(target, name) -> `Facts`; all selected programs of a target are compiled together, at the first question."""
    given = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    selected = {params["case"] for params in given if "case" in params}

    def of(target, name):
        schedule = PROGRAMS[name].schedule
        mates = {n for t, n in selected | {(target, name)} if t == target and PROGRAMS[n].schedule == schedule}
        return compiled(target, tuple(sorted(mates)), schedule)[name]

    return of


cases = pytest.mark.parametrize(
    "case", [pytest.param(case, id="-".join(case), marks=pytest.mark.xdist_group(case[0])) for case in CASES]
)


@cases
def test_compiles_within_the_limits_of_the_device(case, facts, record_property):
    """Registers, shared memory, VMEM: what does not fit is an error of the compiler, or spills."""
    found = facts(*case)
    assert not found.error
    assert max(found.spilled.values(), default=0) <= PROGRAMS[case[1]].spills
    record_property("facts", json.dumps([*case, found.kernels, found.schedules]))


LONGER = [
    (target, short, long)
    for target, short in CASES
    for long in PROGRAMS
    if (a := BY_LENGTH.fullmatch(short))
    and (b := BY_LENGTH.fullmatch(long))
    and a[1] == b[1]
    and int(b[2]) == 2 * int(a[2])
]


@pytest.mark.parametrize(
    "target, short, long",
    [pytest.param(*one, id="-".join(one[:2]), marks=pytest.mark.xdist_group(one[0])) for one in LONGER],
)
def test_temporaries_are_linear(target, short, long, facts):
    """Twice the length, at most 2.2 times the memory. A TPU keeps small arrays where they do not count as memory."""
    once, twice = facts(target, short), facts(target, long)
    assert not once.error and not twice.error
    assert twice.temporary_bytes <= 2.2 * max(once.temporary_bytes, once.argument_bytes)


def test_a_crash_is_the_end_of_one_program():
    found = compile_all(["harness-fits", "harness-aborts", "harness-spills"], "h200")
    assert found["harness-aborts"].error.startswith("the compiler's process was killed by SIGABRT")
    assert not found["harness-fits"].error and not found["harness-spills"].error
    assert found["harness-spills"].spilled and not found["harness-fits"].spilled


@pytest.mark.parametrize("target", [name for name, target in TARGETS.items() if target.platform == "cuda"])
def test_too_much_shared_memory_is_an_error(target):
    assert "Shared memory size limit exceeded" in compile_all(["harness-overflows"], target)["harness-overflows"].error
