"""Settings every test runs under: the CPU unless JAX_PLATFORMS is set, strict promotion, skips that are counted."""

import functools
import gc
import itertools
import os
import zlib
from collections import Counter

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jax
import numpy as np
import pytest
from covering import few
from problems import IMPLEMENTATIONS, ON_GPU

import attnjax
from attnjax.kernels import cpu

# A float32 and a float64 never meet silently: a forgotten cast is an error here, not a slow float64 program.
jax.config.update("jax_numpy_dtype_promotion", "strict")

# The same examples on every machine and in every worker, so that a failure can be looked at again.
_settings = hypothesis.settings(deadline=None, derandomize=True, database=None, print_blob=True)
hypothesis.settings.register_profile("few", _settings, max_examples=5)
hypothesis.settings.register_profile("all", _settings, max_examples=40)


collect_ignore = ["sharded.py", "sharded_nn.py"]  # programs, not modules with examples
_finished = itertools.count(1)


@pytest.fixture
def rng():
    """NumPy's generator with a fixed seed."""
    return np.random.default_rng(20250731)


@pytest.fixture
def some(request):
    """some(values, count): so many of them in their order, which the seed of --cases chooses; or all."""

    def chosen(values, count):
        seed = request.config.getoption("--cases")
        if seed == "all":
            return list(values)
        rank = lambda n: zlib.crc32(f"{seed} {request.node.nodeid} {n}".encode())
        kept = sorted(range(len(values)), key=rank)[:count]
        return [value for n, value in enumerate(values) if n in kept]

    return chosen


@pytest.fixture(params=IMPLEMENTATIONS)
def attend(request):
    """attention(...) -> (out, lse) on one implementation, with its small tiles."""
    return functools.partial(
        attnjax.attention, implementation=request.param, config=IMPLEMENTATIONS[request.param], return_lse=True
    )


def pytest_addoption(parser):
    parser.addoption(
        "--cases",
        default="0",
        metavar="SEED",
        help="of tests with several parameters, few cases that this seed chooses, with every value of each; or: all",
    )
    parser.addoption(
        "--full-cross",
        action="store_true",
        help="run every mask x score pair in every dtype, directly and under vmap, on every implementation",
    )
    parser.addoption(
        "--interpret-mosaic-gpu",
        action="store_true",
        help="interpret the Mosaic GPU kernel too; set NPROC=16, for its interpreter needs that many threads",
    )
    parser.addoption(
        "--optimised",
        action="store_true",
        help="compile every test with all of XLA's optimisations, not only those that ask for them",
    )
    parser.addoption(
        "--share",
        default="1/1",
        metavar="I/N",
        help="the I-th of N parts of the tests and of their cases",
    )
    parser.addoption(
        "--without-compiled-kernel",
        action="store_true",
        help="skip the tests of implementation='cpu', where its library was not built; without this that is an error",
    )


def pytest_configure(config):
    """Most programs here are compiled to be run once: without LLVM's optimisations that takes half the time.

    What is computed and how much memory it takes are the same; the speed is not. A test that is about the optimised
    code passes `problems.OPTIMISED` to jax.jit, one that measures time runs in a process of its own.
    """
    jax.config.update("jax_disable_most_optimizations", not (ON_GPU or config.getoption("--optimised")))
    hypothesis.settings.load_profile("all" if config.getoption("--cases") == "all" else "few")
    config.addinivalue_line(
        "markers", "compiled: needs the compiled kernel, as does every test of implementation='cpu'"
    )
    config.addinivalue_line(
        "markers",
        "crossed(*names, each=name): these parameters are apart; run each of their values with every value of `each`",
    )
    config.addinivalue_line(
        "markers", "device: runs kernels on the device there is; `make test-gpu` runs these on a GPU"
    )
    if cpu.missing() and not ON_GPU and not config.getoption("--without-compiled-kernel"):
        raise pytest.UsageError(f"{cpu.missing()}. To skip its tests: pytest --without-compiled-kernel")


def pytest_report_header(config):
    """Where the kernels run, and which cases."""
    return f"device: {jax.devices()[0].device_kind}", f"cases: {config.getoption('--cases')}"


@pytest.hookimpl(trylast=True)  # of what -k and -m leave
def pytest_collection_modifyitems(config, items):
    """Leaves out the cases that are not asked for, and what is not in the share that is.

    Skips what needs the compiled kernel where that is asked for, and then by name and not by its absence.
    """
    seed = config.getoption("--cases")
    by_name = any("[" in argument for argument in config.args)
    chosen = set(items) if by_name or seed == "all" else few(items, seed)
    part, parts = map(int, config.getoption("--share").split("/"))
    own = lambda item: item in chosen and zlib.crc32(item.nodeid.encode()) % parts == part - 1
    config.hook.pytest_deselected(items=[item for item in items if not own(item)])
    items[:] = [item for item in items if own(item)]
    if not config.getoption("--without-compiled-kernel"):
        return
    for item in items:
        given = item.callspec.params if hasattr(item, "callspec") else {}
        names = [given.get(argument) for argument in ("implementation", "attend", "name")]
        names += [one.get("implementation") for one in given.values() if isinstance(one, dict)]
        if "cpu" in names or item.get_closest_marker("compiled"):
            item.add_marker(pytest.mark.skip(reason="--without-compiled-kernel"))


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item):
    """Forgets compiled programs now and then.

    Each of them holds memory mappings, and a process may have 65530 of these (Linux, vm.max_map_count): beyond that,
    XLA crashes while it compiles.
    """
    if next(_finished) % 250 == 0:
        jax.clear_caches()
        gc.collect()


def pytest_terminal_summary(terminalreporter):
    """Says how many tests were skipped, and why."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in skipped)
    terminalreporter.section("skips, by reason")
    terminalreporter.write_line(f"{len(skipped)} skipped")
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"{count:5d}  {reason}")
