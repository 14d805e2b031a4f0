"""implementation="cudnn": NVIDIA's own attention for 16-bit floats on Hopper and datacenter Blackwell; no T x S bias.

XLA runs cuDNN through a custom call, the one that `jax.nn.dot_product_attention` writes as well. It is written here and
not by that function, because attention needs what the function keeps to itself: the log-sum-exp as cuDNN gives it, in
float32 (`jax.nn` rounds it to the query's type and drops its cotangent), and a backward that starts from it.

Masks are causal, a window to the left, and lengths: what cuDNN knows by name. It reads all others as a bias.

The backward runs where it is asked for by name only: cuDNN adds to the query's gradient in the order in which its
blocks finish, so last bits change from run to run. (`--xla_gpu_deterministic_ops=true` in XLA_FLAGS gives them an
order; a call cannot ask for that.)
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import jax
import jax.numpy as jnp

from attnjax.core.devices import gpus
from attnjax.core.node import is_array
from attnjax.core.program import Problem
from attnjax.core.softmax import Rows, finite, log_sum_exp
from attnjax.core.walk import reduce_to
from attnjax.masks import And, Causal, Lengths, Mask, Window

Array = jax.Array

PARTS = ("forward", "backward")
# Compute capability -> the largest head size, forward and backward (cuDNN's support matrix, 9.10 and newer).
_MOST_SIZE = {"9.0": 256, "10.0": 128}
_TYPES = {"float16": "F16", "bfloat16": "BF16"}


def unsupported(problem: Problem, operands: list[Any], platform: str, part: str) -> str | None:
    """A reason why this implementation cannot take a part of the problem, or `None`."""
    if platform != "cuda":
        return f"runs on NVIDIA GPUs only, not on {platform}"
    if part not in PARTS:
        return "has forward and backward; other derivatives are those of the tiled code"
    if problem.config is not None:
        return "has no config"
    return _unsupported_program(problem, part) or _unsupported_mask(problem, operands) or _unsupported_device(problem)


def _unsupported_program(problem: Problem, part: str) -> str | None:
    """A reason that has to do with neither mask nor device."""
    program, sizes = problem.program, problem.sizes
    if problem.dtype not in _TYPES:
        return f"takes bfloat16 and float16, not {problem.dtype}"
    for what, there in (("scores", program.scores), ("sinks", program.sinks), ("dropout", program.dropout)):
        if there:
            return f"takes no {what}"
    if program.has_map:
        return "takes no block_map: cuDNN chooses its blocks"
    if problem.head_size != problem.value_size:
        return "takes one head size for keys and values"
    most = max(_MOST_SIZE.values())
    if problem.head_size % 8 or not 8 <= problem.head_size <= most:
        return f"takes head sizes that are multiples of 8, up to {most}"
    if min(sizes.query_length, sizes.key_length) < 2 or not math.prod(sizes.batch):
        return "takes two queries and keys or more"
    if part == "backward" and problem.returns_lse:
        return "has no gradient of the log-sum-exp, which is returned here"
    if part == "backward" and problem.implementation != "cudnn":
        return "does not give the same gradient to the last bit every time; ask for it by name"
    return None


def _unsupported_mask(problem: Problem, operands: list[Any]) -> str | None:
    try:
        _seen(problem, operands)
    except _NotTaken as reason:
        return str(reason)
    return None


def _unsupported_device(problem: Problem) -> str | None:
    """A reason that has to do with the GPU that is compiled for, as far as that is known without touching it."""
    named = "runs on Hopper and datacenter Blackwell GPUs (compute capability 9.0 and 10.0)"
    found = gpus()
    if not found:
        return f"{named}; which GPU this is compiled for is not known here"
    others = [f"{kind} ({number})" if number else kind for kind, number in found.items() if number not in _MOST_SIZE]
    if others:
        return f"{named}, not on {', '.join(others)}"
    most = min(_MOST_SIZE[number] for number in found.values() if number)
    return f"takes head sizes up to {most} on {', '.join(sorted(found))}" if problem.head_size > most else None


def blocks(problem: Problem, platform: str) -> None:
    """Not known: cuDNN chooses."""
    return None


def temporary_bytes(problem: Problem, operands: list[Any], platform: str) -> dict[str, int]:
    """About how much memory each part needs beside its arguments and results: rows, and the query's gradient.

    Lengths need a copy of the arguments as well.
    """
    out, rows = (math.prod(shape) for shape in problem.out_shapes())
    return {"forward": 2 * 4 * rows, "backward": 4 * out + 3 * 4 * rows}


def forward(problem: Problem, operands: list[Array], platform: str) -> Rows:
    """The output, and the log-sum-exp as highest, all in operand form."""
    call = _Call(problem, operands)
    b, t, n, h = call.query.shape
    row = jax.ShapeDtypeStruct((b, n, t), jnp.float32)
    out, lse = call.run("__cudnn$fmhaSoftmax", [call.query, call.key, call.value], [(b, n, t, h), row])
    lse = lse.swapaxes(1, 2)
    total = jnp.ones_like(lse)
    if call.seeing is not None:
        out = _kept(out, call.seeing)
        lse = jnp.where(call.seeing[..., None], lse, -jnp.inf)
        total = _kept(total, call.seeing)
    out_shape, row_shape = problem.out_shapes()
    return Rows(out.reshape(out_shape), lse.reshape(row_shape), total.reshape(row_shape))


def backward(
    problem: Problem,
    operands: list[Array],
    rows: Rows,
    ct_out: Array,
    ct_lse: Array,
    wanted: tuple[tuple[int, tuple[int, ...]], ...],
) -> list[Array]:
    """Gradients of the operands in `wanted`: pairs of position and shape (batch axes of size 1 are summed over).

    `ct_lse` is 0: the log-sum-exp is not returned (`unsupported`).
    """
    call = _Call(problem, operands)
    (b, t, n, h), (_, s, k, _) = call.query.shape, call.key.shape
    flat = lambda x: x.reshape(b, t, *x.shape[len(problem.sizes.batch) + 1 :])
    out, ct_out = (flat(x).astype(problem.dtype) for x in (rows.out, ct_out))
    lse = flat(finite(log_sum_exp(rows.highest, rows.total))).swapaxes(1, 2)  # 0, not -inf, where nothing is seen
    if call.seeing is not None:
        ct_out = _kept(ct_out, call.seeing)
    arguments = [call.query, call.key, call.value, lse, ct_out, out]
    results = [(b, n, t, h), (b, k, s, h), (b, k, s, h)]
    made = call.run("__cudnn$fmhaSoftmaxBackward", arguments, results, backward=True)
    if call.seeing is not None and call.seen is not None:  # beyond the lengths there may be anything
        made = [_kept(x, rows) for x, rows in zip(made, (call.seeing, call.seen, call.seen), strict=True)]
    gradients = []
    for i, shape in wanted:
        gradient = made[i].astype(jnp.float32)
        if i:  # keys that were left out
            gradient = jnp.pad(gradient, ((0, 0), (0, problem.sizes.key_length - s), (0, 0), (0, 0)))
        gradients.append(reduce_to(gradient.reshape(*problem.sizes.batch, *gradient.shape[1:]), shape))
    return gradients


@dataclasses.dataclass(frozen=True)
class _Seen:
    """A mask in cuDNN's words: query t sees the keys of t - left <= s <= t (`causal`), within the lengths.

    Attributes:
      causal: whether keys after the query are hidden; left: `None` for no bound, else `causal` holds.
      key, query: lengths, each a list of integers or arrays [*batch or 1] of which the smallest counts.
    """

    causal: bool
    left: int | None
    key: list[Any]
    query: list[Any]


class _NotTaken(Exception):
    """Why a mask cannot be said in cuDNN's words."""


def _seen(problem: Problem, operands: list[Any]) -> _Seen:
    """The mask of the problem; raises `_NotTaken`."""
    t, s = problem.sizes.query_length, problem.sizes.key_length
    lefts, rights, key, query = [t - 1], [s - 1], [], []
    for part in _parts(problem.program.mask_of(operands)):
        if isinstance(part, Lengths):
            key += [] if part.key is None else [part.key]
            query += [] if part.query is None else [part.query]
            continue
        numbers = (part.offset,) if isinstance(part, Causal) else (part.offset, part.left, part.right)
        if any(is_array(x) for x in numbers):
            raise _NotTaken(f"takes {type(part).__name__} with Python numbers, not with arrays")
        shift = int(part.offset) + (s - t if part.at_end else 0)  # type: ignore[arg-type]  # is no array
        left, right = (None, 0) if isinstance(part, Causal) else (part.left, part.right)
        lefts += [] if left is None else [left - shift]  # type: ignore[operator]
        rights += [] if right is None else [right + shift]  # type: ignore[operator]
    left, right = min(lefts), min(rights)
    if right not in (0, s - 1):
        raise _NotTaken("takes causal masks and windows that end at s = t, the first query at the first key")
    causal, bounded = right < s - 1, left < t - 1
    if bounded and (left < 0 or not causal or t > s):
        raise _NotTaken("takes windows of keys up to the query's own, for at least as many keys as queries")
    return _Seen(causal, left if bounded else None, key, query)


def _parts(mask: Mask | None) -> list[Any]:
    """The masks that are combined with `&`."""
    if mask is None:
        return []
    if isinstance(mask, And):
        return _parts(mask.left) + _parts(mask.right)
    if type(mask) not in (Causal, Window, Lengths):
        raise _NotTaken(f"would read {type(mask).__name__} as a T x S bias")
    return [mask]


class _Call:
    """The operands as cuDNN takes them, [B, T, N, H], and what is the same in both calls.

    Padding may hold anything, even NaN, and cuDNN multiplies it by weights of 0. So what lies beyond the lengths is
    replaced by 0, keys that are beyond every query are cut off, and what cuDNN leaves in rows without keys is replaced.

    Attributes:
      query, key, value: all of them zero where nothing is seen.
      seeing: booleans [B, T], false for queries that see nothing; `None` when there are no lengths.
      seen: booleans [B, S], false for keys that no query sees, likewise.
    """

    seeing: Array | None = None
    seen: Array | None = None

    def __init__(self, problem: Problem, operands: list[Array]):
        self.problem, self.mask = problem, _seen(problem, operands)
        batch, n = problem.sizes.batch, len(problem.sizes.batch)
        t, s = problem.sizes.query_length, problem.sizes.key_length
        s = min(s, t) if self.mask.causal else s
        whole = lambda x: jnp.broadcast_to(x, (*batch, *x.shape[n:])).reshape(-1, *x.shape[n:])
        self.query, *self.keys = whole(operands[0]), *(whole(x)[:, :s] for x in operands[1:3])
        self.lengths: list[Array] = []
        if self.mask.key or self.mask.query:
            wide = lambda x: jnp.broadcast_to(jnp.asarray(x).astype(jnp.int32), batch).reshape(-1)
            self._shorten(
                *(_least(most, [wide(x) for x in some]) for most, some in ((t, self.mask.query), (s, self.mask.key)))
            )
        self.key, self.value = self.keys

    def _shorten(self, query: Array, key: Array) -> None:
        """Takes the lengths of queries and keys; both are made so short that every query sees a key, and is seen."""
        query, key = jnp.broadcast_arrays(query, key)
        some = (query > 0) & (key > 0)
        if self.mask.causal:
            key = jnp.minimum(key, query)
        if self.mask.left is not None:
            query = jnp.minimum(query, key + self.mask.left)
        query, key = jnp.where(some, query, 0), jnp.where(some, key, 0)
        count = lambda x: jnp.arange(x.shape[1], dtype=jnp.int32)
        self.seeing, self.seen = count(self.query) < query[:, None], count(self.keys[0]) < key[:, None]
        self.query, self.keys = _kept(self.query, self.seeing), [_kept(x, self.seen) for x in self.keys]
        self.lengths = [jnp.maximum(query, 1), jnp.maximum(key, 1)]  # of zeros, where there are none

    def run(self, name: str, arguments: list[Array], results: list[Any], *, backward: bool = False) -> list[Array]:
        """cuDNN's results. Those of four axes are given as [B, N, T, H] and come as [B, T, N, H], as they lie."""
        wide = [isinstance(x, tuple) for x in results]
        types = [jax.ShapeDtypeStruct(x, self.problem.dtype) if isinstance(x, tuple) else x for x in results]
        call = jax.ffi.ffi_call(
            name,
            [*types, jax.ShapeDtypeStruct((0,), jnp.uint8)],  # the last is cuDNN's workspace: XLA knows its size
            output_layouts=[*((0, 2, 1, 3) if four else None for four in wide), None],
            custom_call_api_version=2,
            legacy_backend_config=json.dumps(self._config(backward)),
        )
        made = call(*arguments, *self.lengths)[:-1]
        return [x.swapaxes(1, 2) if four else x for x, four in zip(made, wide, strict=True)]

    def _config(self, backward: bool) -> dict[str, Any]:
        """What XLA is told besides the operands (its message `CudnnfMHABackendConfig`)."""
        b, t, n, _ = self.query.shape
        names = {(False, False): "NO_MASK", (False, True): "CAUSAL", (True, False): "PADDING"}
        mask = names.get((bool(self.lengths), self.mask.causal), "PADDING_CAUSAL")
        own = {
            "algorithm": {
                "algo_id": "0",
                "math_type": "TENSOR_OP_MATH",
                "tuning_knobs": {"17": "1", "24": "0"},
                "is_cudnn_frontend": True,
                "workspace_size": "0",
            },
            "fmha_scale": self.problem.program.scale,
            "intermediate_tensor_shape": _logits((b, n, t, self.key.shape[1]), _TYPES[self.problem.dtype]),
            "is_flash_attention": True,
            "mask_type": mask,
            **_products(backward),
            "dropout_rate": 0.0,
            "seed": 42,  # of the dropout that there is not
            "sliding_window_length": 0 if self.mask.left is None else self.mask.left + 1,  # the query's own key counts
            "max_seg_per_batch": 1,
            "is_paged_attention": False,
        }
        return {"operation_queue_id": "0", "cudnn_fmha_backend_config": own}


def _logits(shape: tuple[int, ...], dtype: str) -> dict[str, Any]:
    """The logits as XLA's `ShapeProto`. They are never written."""
    layout = {
        "dim_level_types": [],
        "dim_unique": [],
        "dim_ordered": [],
        "minor_to_major": ["3", "2", "1", "0"],
        "tiles": [],
        "element_size_in_bits": "0",
        "memory_space": "0",
        "index_primitive_type": "PRIMITIVE_TYPE_INVALID",
        "pointer_primitive_type": "PRIMITIVE_TYPE_INVALID",
        "dynamic_shape_metadata_prefix_bytes": "0",
    }
    return {
        "element_type": dtype,
        "dimensions": [str(size) for size in shape],
        "tuple_shapes": [],
        "layout": layout,
        "is_dynamic_dimension": [False] * 4,
    }


def _products(backward: bool) -> dict[str, Any]:
    """The axes that matrix products sum over, of both factors; heads are axis 2 of q, k, v and 1 of the logits."""
    of_logits, of_array = [0, 1], [0, 2]
    if backward:
        axes = {
            "bmm1_grad_gemm1": (2, 1, of_logits, of_array),
            "bmm1_grad_gemm2": (3, 1, of_logits, of_array),
            "bmm2_grad_gemm1": (2, 1, of_logits, of_array),
            "bmm2_grad_gemm2": (3, 3, of_array, of_array),
        }
    else:
        axes = {"bmm1": (3, 3, of_array, of_array), "bmm2": (3, 1, of_logits, of_array)}
    return {
        f"{name}_dot_dimension_numbers": {
            "lhs_contracting_dimensions": [str(a)],
            "rhs_contracting_dimensions": [str(b)],
            "lhs_batch_dimensions": [str(i) for i in lhs],
            "rhs_batch_dimensions": [str(i) for i in rhs],
        }
        for name, (a, b, lhs, rhs) in axes.items()
    }


def _least(most: int, lengths: list[Array]) -> Array:
    """The smallest of the lengths and of `most`."""
    least: Any = jnp.int32(most)
    for length in lengths:
        least = jnp.minimum(least, length)
    return least


def _kept(x: Array, rows: Array) -> Array:
    """x [B, T, ...], 0 in the rows that are not kept."""
    return jnp.where(rows.reshape(*rows.shape, *(1,) * (x.ndim - 2)), x, jnp.zeros_like(x))
