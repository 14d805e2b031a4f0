"""Devices that programs are compiled for without having them: GPUs as descriptions of the chip, TPUs by name.

Says what a device is and how JAX is told of it; compiles nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from typing import Any

import jax
from jax.experimental import topologies

KiB = 2**10
MiB = 2**20
GiB = 2**30


@dataclasses.dataclass(frozen=True)
class Target:
    """A device.

    Attributes:
      name: what tests call it.
      platform: "cuda" or "tpu".
      kind: `device_kind` as JAX shows it.
      topology: a TPU's topology, or the text of a GPU's description (XLA's `GpuTargetConfigProto`).
      architecture: of a GPU, as ptxas calls it.
    """

    name: str
    platform: str
    kind: str
    topology: str
    architecture: str = ""

    @functools.cached_property
    def device(self) -> Any:
        """One such device; programs can be compiled for it, not run."""
        if self.platform == "tpu":
            return topologies.get_topology_desc(platform="tpu", topology_name=self.topology).devices[0]
        found = topologies.get_topology_desc(
            platform="cuda", topology_name="", target_config=self.topology, topology="1x1x1"
        )
        return found.devices[0]

    def sharding(self) -> jax.sharding.NamedSharding:
        """Where arguments of a program for this device lie."""
        return jax.sharding.NamedSharding(jax.sharding.Mesh([self.device], ("x",)), jax.sharding.PartitionSpec())

    def lowering(self) -> contextlib.AbstractContextManager[Any]:
        """While it is open, code that asks which device it is lowered for is told of this one."""
        platform = {"cuda": "gpu"}.get(self.platform, self.platform)
        device = jax.sharding.AbstractDevice(device_kind=self.kind, num_cores=1, platform=platform)
        return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))


def _gpu(name: str, kind: str, architecture: str, **given: Any) -> Target:
    """A GPU from its data sheet. Shared memory is per multiprocessor, and the most that one block may ask for."""
    major, minor = divmod(int(architecture.removeprefix("sm_").removesuffix("a")), 10)
    accelerated = "ACCELERATED_FEATURES" if architecture.endswith("a") else "NONE"
    text = f"""
gpu_device_info {{
  name: "{kind}"
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {accelerated} }}
  core_count: {given["multiprocessors"]} fpus_per_core: {given["lanes"]} clock_rate_ghz: {given["clock_ghz"]}
  device_memory_size: {given["memory"]} memory_bandwidth: {given["bandwidth"]} l2_cache_size: {given["l2"]}
  shared_memory_per_block: {48 * KiB}
  shared_memory_per_core: {given["shared"]} shared_memory_per_block_optin: {given["shared"] - KiB}
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
}}
platform_name: "CUDA"
device_description_str: "{kind}"
dnn_version_info {{ major: 9 minor: 10 }}
"""
    return Target(name, "cuda", kind, text, architecture)


# NVIDIA's data sheets and the CUDA programming guide (compute capabilities).
_GPUS = (
    _gpu(
        "a100",
        "NVIDIA A100-SXM4-80GB",
        "sm_80",
        multiprocessors=108,
        lanes=64,
        clock_ghz=1.41,
        memory=80 * GiB,
        bandwidth=2039 * 10**9,
        l2=40 * MiB,
        shared=164 * KiB,
    ),
    _gpu(
        "h200",
        "NVIDIA H200",
        "sm_90a",
        multiprocessors=132,
        lanes=128,
        clock_ghz=1.98,
        memory=141 * GiB,
        bandwidth=4800 * 10**9,
        l2=50 * MiB,
        shared=228 * KiB,
    ),
    _gpu(
        "b200",
        "NVIDIA B200",
        "sm_100a",
        multiprocessors=148,
        lanes=128,
        clock_ghz=1.965,
        memory=180 * GiB,
        bandwidth=7700 * 10**9,
        l2=126 * MiB,
        shared=228 * KiB,
    ),
)
_TPUS = (
    Target("v5e", "tpu", "TPU v5 lite", "v5e:2x2"),
    Target("v5p", "tpu", "TPU v5", "v5p:2x2x1"),
    Target("v6e", "tpu", "TPU v6 lite", "v6e:2x2"),
)
TARGETS = {target.name: target for target in (*_GPUS, *_TPUS)}
CUDA = tuple(target.name for target in _GPUS)
TPU = tuple(target.name for target in _TPUS)
EVERYWHERE = (*CUDA, *TPU)
