"""JAX's own TPU attention, splash attention: what the schedules of other TPU kernels are compared with."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from programs import Program
from targets import TPU

LENGTH, HEADS, SIZE, BLOCK = 4096, 8, 128, 512


def attend(part: str) -> Any:
    """bfloat16, causal, blocks of 512 x 512, as its defaults but for the block sizes."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as mask

    sizes = kernel.BlockSizes(
        **dict.fromkeys(
            ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute"), BLOCK
        ),
        block_q_dq=BLOCK,
        block_kv_dq=BLOCK,
    )
    masks = mask.MultiHeadMask([mask.CausalMask((LENGTH, LENGTH))] * HEADS)
    call = kernel.make_splash_mha_single_device(masks, block_sizes=sizes)
    shapes = [jax.ShapeDtypeStruct((HEADS, LENGTH, SIZE), jnp.bfloat16)] * 3
    if part == "forward":
        return call, shapes
    return jax.grad(lambda *x: call(*x).astype(jnp.float32).sum(), argnums=(0, 1, 2)), shapes


PROGRAMS = [
    Program(f"splash-causal-{part}", functools.partial(attend, part), TPU, schedule=True)
    for part in ("forward", "gradient")
]
