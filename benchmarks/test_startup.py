"""What a user waits for before the first result: the import, and compiling a gradient. Run by `pytest benchmarks`."""

import subprocess
import sys

import jax
import pytest

from attnjax import Causal, attention

IMPORT = "import time, jax, jax.numpy; t = time.perf_counter(); import attnjax; print(time.perf_counter() - t)"


def test_import(benchmark):
    """Seconds that `import attnjax` adds to `import jax`, in a fresh process each time."""
    added = []

    def run() -> None:
        added.append(float(subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, check=True).stdout))

    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
    benchmark.extra_info["seconds added to import jax"] = sorted(added)


@pytest.mark.parametrize("length", [1024, 65536])
def test_compiling_the_gradient(benchmark, length: int):
    """Seconds to trace, lower and compile the causal gradient: the same for every length."""
    x = jax.ShapeDtypeStruct((1, length, 4, 64), "float32")

    def run() -> None:
        jax.clear_caches()
        loss = lambda *qkv: attention(*qkv, mask=Causal()).sum()
        jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x).compile()

    benchmark.pedantic(run, rounds=3, warmup_rounds=1)
