"""Which GPUs a program is compiled for, as far as that is known without touching one. Starts nothing."""

from __future__ import annotations

import re

import jax

# Compute capability of the GPUs that a description of a device may name, where no device is.
_NAMED = {
    "8.0": r"\b(A100|A800|A30)\b",
    "8.9": r"\b(L4|L40|L40S)\b|RTX 40\d0",
    "9.0": r"\b(H100|H200|H800|H20|GH200)\b",
    "10.0": r"\b(B100|B200|GB200)\b",
    "12.0": r"RTX PRO 6000|RTX 50\d0",
}


def gpus() -> dict[str, str | None]:
    """What the GPUs are called, and their compute capability ("9.0"), `None` where the name does not tell.

    Of a program that is compiled where no GPU is, the device is known if the abstract mesh describes it; else this is
    empty.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        kind = device.device_kind
        return {kind: next((number for number, names in _NAMED.items() if re.search(names, kind)), None)}
    if jax.default_backend() == "gpu":
        return {d.device_kind: str(d.compute_capability) for d in jax.local_devices()}
    return {}
