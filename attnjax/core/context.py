"""`own_settings`: what of JAX's settings holds while attnjax's programs are traced: they depend on none of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh


@contextlib.contextmanager
def own_settings(*, wide: bool | None = None, keep_mesh: bool = False) -> Iterator[None]:
    """A context for bodies of primitives: `neutral`, and arrays of other ranks broadcast, which users may forbid.

    Args:
      wide: whether there are numbers of 64 bits; `None`: as it is set.
      keep_mesh: see `neutral`.
    """
    with (
        neutral(keep_mesh=keep_mesh),
        jax.enable_x64(in_64_bits() if wide is None else wide),
        jax.numpy_rank_promotion("allow"),
    ):
        yield


@contextlib.contextmanager
def neutral(*, keep_mesh: bool = False) -> Iterator[None]:
    """A context in which what is traced is the same program whatever mesh, precision or mode of JAX is set around it.

    Args:
      keep_mesh: for what is traced together with the caller's own program, whose types are of the caller's mesh.
    """
    with (
        contextlib.nullcontext() if keep_mesh else _without_mesh(),
        jax.default_matmul_precision(None),
        jax.disable_jit(False),
    ):
        yield


def in_64_bits(avals: Sequence[Any] = ()) -> bool:
    """Whether numbers of 64 bits are asked for (jax_enable_x64), here or where these types were made.

    XLA asks for a share of a program on a thread of its own, which does not know of `with jax.enable_x64(True)`.
    """
    wide = (np.int64, np.uint64, np.float64)
    return jax.dtypes.canonicalize_dtype(np.float64) == np.float64 or any(a.dtype in wide for a in avals)


def _without_mesh() -> contextlib.AbstractContextManager:
    """No mesh is set: kernels are traced for one device's share, where the axes of a mesh mean nothing.

    Which device that is stays known.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device))
