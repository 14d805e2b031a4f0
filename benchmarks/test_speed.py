"""The default cases of `attnjax bench` under pytest-benchmark, to follow one implementation over time. No tests here.

    pytest benchmarks                                       all of it (minutes)
    pytest benchmarks -k "causal-1024 and xla"              some of it
    pytest benchmarks --benchmark-autosave                  keep the numbers
    pytest benchmarks --benchmark-compare                   compare with the last ones kept

`attnjax bench` is the place to compare implementations: there they run in turn, so that drift cancels.
"""

import contextlib

import jax
import pytest

from attnjax.bench.cases import Case, select
from attnjax.bench.peers import COMPETITORS, CannotDo, Refused, Skipped
from attnjax.bench.run import default_limit

INSTALLED = [name for name, competitor in COMPETITORS.items() if not competitor.absent]


@pytest.mark.parametrize("name", INSTALLED)
@pytest.mark.parametrize("case", select(), ids=lambda case: case.name)
def test_speed(benchmark, case: Case, name: str):
    benchmark.group = case.name
    benchmark.extra_info["flops"] = case.flops()
    arrays = case.draw()
    arrays["checked"] = arrays["cotangent"]
    with jax.enable_x64(True) if case.dtype == "float64" else contextlib.nullcontext():
        try:
            prepared = COMPETITORS[name].prepare(case, arrays, default_limit(), False)
        except (CannotDo, NotImplementedError, Refused, Skipped) as reason:
            pytest.skip(f"{name}: {reason}")
        benchmark.pedantic(prepared.run, args=("cotangent",), rounds=5, warmup_rounds=1)
