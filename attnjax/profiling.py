"""What attention costs and what a machine gives: FLOPs, bytes, time, memory, peak rates. Knows no kernel."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Run = Callable[[], Any]  # does the work once and returns when it is done


def attention_flops(pairs: int, head_size: int, value_size: int) -> dict[str, int]:
    """Floating-point operations of the matrix products of attention; softmax and scores are not counted.

    Forward is two products: q k^T and p v. The flash backward is five: q k^T again, dO v^T, dV, dQ and dK. The
    tangent is five too: q k^T, dq k^T, q dk^T, p dv and dp v. Both come without the forward before them.

    Args:
      pairs: number of (query, key) pairs that see each other, summed over heads and batch.
      head_size: H, of query and key.
      value_size: V.

    Returns:
      FLOPs by part: "forward" = 2 pairs (H + V), "backward" = "tangent" = 2 pairs (3 H + 2 V).

    Example:
      >>> from attnjax.profiling import attention_flops
      >>> attention_flops(pairs=10, head_size=4, value_size=2)
      {'forward': 120, 'backward': 320, 'tangent': 320}

    References:
      Dao, "FlashAttention-2", 2023, section 4.1: the backward as 2.5 times the forward (V = H).
    """
    five = 2 * pairs * (3 * head_size + 2 * value_size)
    return {"forward": 2 * pairs * (head_size + value_size), "backward": five, "tangent": five}


def attention_bytes(query: Any, key: Any, value: Any) -> dict[str, int]:
    """Bytes that any attention has to move: each input read once, each result written once; no T x S matrix.

    Args:
      query: `[*B, T, N, H]`: an array, or anything with shape and dtype.
      key: `[*B, S, K, H]`.
      value: `[*B, S, K, V]`.

    Returns:
      Bytes by part. "forward" reads q, k, v and writes out and lse; "backward" reads those and the cotangent
      of out, and writes dq, dk, dv; "tangent" reads what forward reads and writes, and dq, dk, dv, and writes
      the tangents of out and lse.

    Example:
      >>> import jax.numpy as jnp
      >>> from attnjax.profiling import attention_bytes
      >>> x = jnp.zeros((16, 2, 8))
      >>> attention_bytes(x, x, x)
      {'forward': 4224, 'backward': 8320, 'tangent': 8448}
    """
    size = lambda shape, dtype: math.prod(shape) * np.dtype(dtype).itemsize
    inputs = sum(size(x.shape, x.dtype) for x in (query, key, value))
    out = size((*query.shape[:-1], value.shape[-1]), query.dtype)
    lse = size(query.shape[:-1], "float64" if query.dtype == np.float64 else "float32")
    results = out + lse
    return {
        "forward": inputs + results,
        "backward": inputs + results + out + inputs,
        "tangent": inputs + results + inputs + results,
    }


@dataclasses.dataclass(frozen=True)
class Queue:
    """A run of a device that works while the program goes on, such as a GPU: runs in a row are waited for once.

    A sample of several then tells how long the device takes, without what a call and its waiting cost the program, as
    long as a run takes longer there than its call takes here. Called, it does the work once and waits.

    Attributes:
      start: queues the work and returns; what it returns is given to `wait`.
      wait: returns when that is done, and so all that was queued before: a device works in order.
    """

    start: Callable[[], Any]
    wait: Callable[[Any], Any]

    def __call__(self) -> None:
        self.wait(self.start())


def awaited(start: Callable[[], Any]) -> Run:
    """A call of something compiled by JAX as a run: a `Queue`, but on CPUs, which have no time of their own.

    Example:
      >>> import jax
      >>> from attnjax.profiling import awaited, median_seconds
      >>> f = jax.jit(lambda x: x @ x)
      >>> median_seconds(awaited(lambda: f(jax.numpy.ones((64, 64))))) < 1
      True
    """
    queue = Queue(start, jax.block_until_ready)
    return (lambda: queue()) if jax.default_backend() == "cpu" else queue


def sample(run: Run, repeats: int = 1) -> float:
    """Seconds of one run, as the mean over `repeats` runs in a row.

    Args:
      run: does the work once and returns when it is done; for JAX, `awaited(lambda: f(x))`.
      repeats: how many runs; more for what takes microseconds (see `repeats_for`).
    """
    start = time.perf_counter()
    if isinstance(run, Queue):
        made = None
        for _ in range(repeats):
            made = run.start()
        run.wait(made)
    else:
        for _ in range(repeats):
            run()
    return (time.perf_counter() - start) / repeats


def repeats_for(run: Run, least: float | None = None, most: int = 1000) -> int:
    """How many runs in a row take at least `least` seconds, from the fastest of three; at most `most`.

    `least` is 2 milliseconds, and 20 for a `Queue`, at the end of which stands the one wait that is timed with it.
    """
    least = (2e-2 if isinstance(run, Queue) else 2e-3) if least is None else least
    fastest = min(sample(run) for _ in range(3))
    return min(most, max(1, math.ceil(least / max(fastest, 1e-9))))


def median_seconds(run: Run, rounds: int = 5) -> float:
    """Median time of a run in seconds, after one that is not counted (it may compile).

    Example:
      >>> import jax
      >>> from attnjax.profiling import median_seconds
      >>> f = jax.jit(lambda x: x @ x)
      >>> median_seconds(lambda: f(jax.numpy.ones((64, 64))).block_until_ready()) < 1
      True
    """
    run()
    repeats = repeats_for(run)
    return statistics.median(sample(run, repeats) for _ in range(rounds))


def interleaved(
    runs: Mapping[str, Run], rounds: int, *, repeats: Mapping[str, int] | None = None, pause: float = 0.0
) -> dict[str, list[float]]:
    """Times several competitors in turn, so that drift of the machine meets all of them alike.

    The order is turned by one in every round, so that no one always follows the same neighbour.

    Args:
      runs: what to time, by name. Each must have run before: compilation is not to be timed.
      rounds: how many samples of each.
      repeats: how many runs in a row make a sample, by name; default 1. A sample of more than one begins with
        a run that is not counted, which finds the caches as its predecessor left them.
      pause: seconds to sleep before each sample. Some libraries' threads spin for a while after their work
        and would take a core from the next competitor.

    Returns:
      Seconds per run, one number per round, by name.

    Example:
      >>> from attnjax.profiling import interleaved
      >>> samples = interleaved({"sum": lambda: sum(range(100)), "max": lambda: max(range(100))}, rounds=3)
      >>> {name: len(seconds) for name, seconds in samples.items()}
      {'sum': 3, 'max': 3}
    """
    names = list(runs)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        turn = i % max(len(names), 1)
        for name in names[turn:] + names[:turn]:
            count = 1 if repeats is None else repeats.get(name, 1)
            time.sleep(pause)
            if count > 1:
                runs[name]()
            samples[name].append(sample(runs[name], count))
    return samples


def temporary_bytes(fn: Callable[..., Any], *args: Any) -> int | None:
    """Bytes of memory that a compiled function needs beside its arguments and results; runs nothing.

    Args:
      fn: a function of arrays, jitted or not.
      args: its arguments: arrays, `jax.ShapeDtypeStruct`s, or pytrees of them.

    Returns:
      The peak of temporaries in bytes, or `None` where the compiler does not tell.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from attnjax.profiling import temporary_bytes
      >>> x = jax.ShapeDtypeStruct((1000, 10), jnp.float32)
      >>> temporary_bytes(lambda x: (x @ x.T) @ x, x)
      4000000
    """
    lower = fn.lower if hasattr(fn, "lower") else jax.jit(fn).lower
    memory = compiled_bytes(lower(*args).compile())
    return None if memory is None else memory["temporaries"]


def compiled_bytes(compiled: Any) -> dict[str, int] | None:
    """Bytes of a compiled function: "arguments", "results" and "temporaries"; `None` where nobody tells."""
    memory = compiled.memory_analysis()
    if memory is None:
        return None
    return {
        "arguments": memory.argument_size_in_bytes,
        "results": memory.output_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
    }


def free_bytes() -> int | None:
    """Bytes that JAX's default device could still give; on a CPU what the system calls available."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        limit = stats.get("bytes_limit")
        return None if limit is None else limit - stats.get("bytes_in_use", 0)
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def matmul(dtype: Any, size: int | None = None) -> tuple[Run, int]:
    """A square matrix product to time, compiled and run once: what a machine can do at best.

    Args:
      dtype: of both matrices, which are drawn from a normal distribution (zeros draw less power).
      size: rows and columns; default 2048 on a CPU, 8192 elsewhere.

    Returns:
      The run, and its floating-point operations (2 size^3).

    Example:
      >>> from attnjax.profiling import matmul, sample
      >>> run, flops = matmul("float32", size=128)
      >>> flops / sample(run) > 0
      True
    """
    size = size or (2048 if jax.default_backend() == "cpu" else 8192)
    left, right = jax.random.normal(jax.random.key(0), (2, size, size)).astype(dtype)
    product = jax.jit(functools.partial(jnp.matmul, precision="highest"))  # of float32, not of its first 11 bits
    run = awaited(lambda: product(left, right))
    run()
    return run, 2 * size**3


def matmul_rate(dtype: Any, size: int | None = None, rounds: int = 5) -> dict[str, float]:
    """This machine's rate of multiplying matrices, measured: FLOP/s, "best" and "median" of `rounds`."""
    run, flops = matmul(dtype, size)
    repeats = matmul_repeats(run)
    return rates(flops, [sample(run, repeats) for _ in range(rounds)])


def matmul_repeats(run: Run) -> int:
    """How many matrix products make a sample: one on a CPU, where it takes long enough."""
    return repeats_for(run) if isinstance(run, Queue) else 1


def rates(flops: int, seconds: Iterable[float]) -> dict[str, float]:
    """FLOP/s of equal runs, "best" and "median"."""
    seconds = list(seconds)
    return {"best": flops / min(seconds), "median": flops / statistics.median(seconds)}


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak rates of one JAX device, as its maker states them, without sparsity.

    Attributes:
      name: of the product.
      kinds: what `jax.Device.device_kind` calls it, or begins with.
      matmul: FLOP/s of products, by dtype; float32 is not TF32.
      bandwidth: bytes per second of its main memory.
    """

    name: str
    kinds: tuple[str, ...]
    matmul: dict[str, float]
    bandwidth: float


def _chip(name: str, kinds: tuple[str, ...], half: float, single: float | None, bandwidth: float) -> Chip:
    by_dtype = {"bfloat16": half, "float16": half, "float32": single}
    return Chip(name, kinds, {dtype: rate * 1e12 for dtype, rate in by_dtype.items() if rate}, bandwidth * 1e9)


# TFLOP/s of 16-bit and of 32-bit products, GB/s. The longest kind that fits counts.
CHIPS = (
    # NVIDIA's data sheets of A100, L4, L40S, H100, H200 and HGX B200; dense, SXM where there are several.
    _chip("A100 80GB", ("NVIDIA A100-SXM4-80GB",), 312, 19.5, 2039),
    _chip("A100 40GB", ("NVIDIA A100",), 312, 19.5, 1555),
    _chip("L40S", ("NVIDIA L40S",), 362, 91.6, 864),
    _chip("L4", ("NVIDIA L4",), 121, 30.3, 300),
    _chip("H100 SXM", ("NVIDIA H100 80GB",), 989, 67, 3350),
    _chip("H200 SXM", ("NVIDIA H200",), 989, 67, 4800),
    _chip("B200", ("NVIDIA B200",), 2250, 75, 7700),
    # docs.cloud.google.com/tpu/docs, pages v4, v5e, v5p, v6e and tpu7x. A JAX device is a chip, of TPU7x half
    # of one. The matrix units multiply in bfloat16 only.
    _chip("TPU v4", ("TPU v4",), 275, None, 1200),
    _chip("TPU v5e", ("TPU v5 lite", "TPU v5e"), 197, None, 819),
    _chip("TPU v5p", ("TPU v5p", "TPU v5"), 459, None, 2765),
    _chip("TPU v6e", ("TPU v6 lite", "TPU v6e"), 918, None, 1638),
    _chip("TPU7x, one of its two cores", ("TPU7x",), 2307 / 2, None, 7380 / 2),
)


def find_chip(device_kind: str) -> Chip | None:
    """The chip that JAX calls `device_kind`, or `None`: then only measured rates can be told (`matmul_rate`).

    Example:
      >>> from attnjax.profiling import find_chip
      >>> find_chip("TPU v5 lite").name
      'TPU v5e'
    """
    matches = [(len(kind), chip) for chip in CHIPS for kind in chip.kinds if device_kind.startswith(kind)]
    return max(matches, key=lambda match: match[0])[1] if matches else None


# What decides how fast a CPU multiplies matrices.
_FEATURES = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "sve", "bf16")


def describe_machine() -> dict[str, Any]:
    """The processor, its cores that this process may use, its features, memory in bytes, JAX's devices."""
    lines = [line.partition(":")[::2] for line in _lines("/proc/cpuinfo")]
    about = {name.strip(): text.strip() for name, text in lines}
    flags = (about.get("flags") or about.get("Features") or "").split()
    devices = jax.devices()
    return {
        "processor": processor_name(),
        "model": "/".join(about[name] for name in ("cpu family", "model", "stepping") if name in about),
        "features": [feature for feature in _FEATURES if feature in flags],
        "cores": usable_cores(),
        "memory": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else None,
        "system": f"{platform.system()} {platform.release()}",
        "platform": devices[0].platform,
        "device": devices[0].device_kind,
        "devices": len(devices),
    }


@functools.cache
def processor_name() -> str:
    """What the processor calls itself."""
    names = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def usable_cores() -> int:
    """How many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _lines(path: str) -> list[str]:
    """Lines of a file of the system, none where it does not exist."""
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read().splitlines()
