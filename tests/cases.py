"""The table of masks and scores that every implementation is tried on. How they are run and judged is elsewhere.

A case says twice what it means: as attnjax objects, and as a rule in plain NumPy (jnp for scores, which are
differentiated) on index arrays. The two share the drawn arrays and nothing else.
`d` are the drawn integer and boolean arrays of a mask, `x` all float arrays, `i` is an `oracle.Index`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from draws import Draw, booleans, documents, integers, join, normal, nothing, order, slopes
from oracle import Arrays, Index, Shape, alibi_slopes, t5_bucket

import attnjax as aj


@dataclasses.dataclass(frozen=True)
class MaskCase:
    """One mask: `mask(d)` builds it, `rule(i, d)` says who sees whom, `mapped` names arrays that have batch axes."""

    name: str
    mask: Callable[[Arrays], Any]
    rule: Callable[[Index, Arrays], Any]
    arrays: Draw = nothing
    mapped: tuple[str, ...] = ()
    square: bool = False  # needs as many keys as queries

    def __repr__(self) -> str:
        return self.name


@dataclasses.dataclass(frozen=True)
class ScoreCase:
    """One chain of score modifiers, with the other things that act on the softmax: scale, sinks, dropout."""

    name: str
    score: Callable[[Arrays], Any]
    rule: Callable[[Any, Index, Arrays], Any]
    operands: Draw = nothing
    mapped: tuple[str, ...] = ()
    scale: float | None = None
    dropout: tuple[float, int] | None = None  # rate and seed

    def __repr__(self) -> str:
        return self.name


everything = lambda i, d: np.bool_(True)
causal = lambda i, offset=0: i.k <= i.q + offset
same = lambda i, d: i.per(d["a"], "t") == i.per(d["b"], "s")

# One mask of every kind. These are crossed with every score, every dtype and every implementation.
MASKS = [
    MaskCase("full", lambda d: None, everything),
    MaskCase("causal", lambda d: aj.Causal(d["a"]), lambda i, d: causal(i, d["a"]), integers(3, 9, "-")),
    MaskCase("window", lambda d: aj.Window(6, 4), lambda i, d: (i.q - 6 <= i.k) & (i.k <= i.q + 4)),
    MaskCase("chunked", lambda d: aj.Chunked(11), lambda i, d: i.q // 11 == i.k // 11),
    MaskCase("prefix", lambda d: aj.Prefix(d["a"]), lambda i, d: i.k < i.per(d["a"]), integers(1, 30, ""), ("a",)),
    MaskCase("segments", lambda d: aj.Segments(d["a"], d["b"]), same, documents, ("a", "b")),
    MaskCase(
        "lengths",
        lambda d: aj.Lengths(key=d["a"], query=d["b"]),
        lambda i, d: (i.k < i.per(d["a"])) & (i.q < i.per(d["b"])),
        integers(1, 30, "", ""),
        ("a", "b"),
    ),
    MaskCase("dilated", lambda d: aj.Dilated(3, 1), lambda i, d: (i.q + 1 - i.k) % 3 == 0),
    MaskCase("dense", lambda d: aj.Dense(d["a"]), lambda i, d: i.per(d["a"], "nts"), booleans("1ts", True), ("a",)),
    MaskCase(
        "where",
        lambda d: aj.Where(lambda b, h, q, k: (q * (h + 1) + k + b) % 3 != 0),
        lambda i, d: (i.q * (i.h + 1) + i.k + i.b) % 3 != 0,
    ),
    MaskCase(
        "permutation",
        lambda d: aj.Permutation(d["a"]),
        lambda i, d: d["a"][i.k] <= d["a"][i.q],
        order,
        square=True,
    ),
    MaskCase(
        "combined",
        lambda d: (aj.Causal() | aj.Prefix(d["c"])) & aj.Segments(d["a"], d["b"]) & ~aj.Dilated(4),
        lambda i, d: (causal(i) | (i.k < d["c"])) & same(i, d) & ((i.q - i.k) % 4 != 0),
        lambda rng, shape: documents(rng, shape) | {"c": np.int32(min(9, shape.S))},
        ("a", "b"),
    ),
]

ab = ("a", "b")
# Further forms of the same masks: other arguments, traced or batched ones, rows that see nothing.
VARIANTS = [
    MaskCase("causal_static", lambda d: aj.Causal(), lambda i, d: causal(i)),
    MaskCase("causal_negative", lambda d: aj.Causal(-9), lambda i, d: causal(i, -9)),
    MaskCase("causal_sees_all", lambda d: aj.Causal(200), everything),
    MaskCase("causal_sees_none", lambda d: aj.Causal(-100), lambda i, d: np.bool_(False)),
    MaskCase("causal_end", lambda d: aj.Causal.aligned_end(), lambda i, d: causal(i, i.S - i.T)),
    MaskCase("causal_end_offset", lambda d: aj.Causal.aligned_end(-20), lambda i, d: causal(i, i.S - i.T - 20)),
    MaskCase(
        "causal_end_batched",
        lambda d: aj.Causal.aligned_end(d["a"]),
        lambda i, d: causal(i, i.S - i.T + i.per(d["a"])),
        integers(-20, 5, ""),
        ("a",),
    ),
    MaskCase(
        "causal_batched",
        lambda d: aj.Causal(d["a"]),
        lambda i, d: causal(i, i.per(d["a"])),
        integers(-20, 20, ""),
        ("a",),
    ),
    MaskCase("window_left", lambda d: aj.Window(7, None), lambda i, d: i.q - 7 <= i.k),
    MaskCase("window_right", lambda d: aj.Window(None, 4), lambda i, d: i.k <= i.q + 4),
    MaskCase("window_past", lambda d: aj.Window(7, 0), lambda i, d: (i.q - 7 <= i.k) & (i.k <= i.q)),
    MaskCase("window_unbounded", lambda d: aj.Window(), everything),
    MaskCase("window_diagonal", lambda d: aj.Window(0, 0), lambda i, d: i.k == i.q),
    MaskCase(
        "window_end",
        lambda d: aj.Window.aligned_end(9, 0),
        lambda i, d: (i.q + i.S - i.T - 9 <= i.k) & (i.k <= i.q + i.S - i.T),
    ),
    MaskCase(
        "window_batched",
        lambda d: aj.Window(d["a"], d["b"], d["c"]),
        lambda i, d: (i.q + i.per(d["c"]) - i.per(d["a"]) <= i.k) & (i.k <= i.q + i.per(d["c"]) + i.per(d["b"])),
        integers(0, 12, "", "", ""),
        ("a", "b", "c"),
    ),
    MaskCase("chunked_ones", lambda d: aj.Chunked(1), lambda i, d: i.q == i.k),
    MaskCase("chunked_one", lambda d: aj.Chunked(1000), everything),
    MaskCase("chunked_negative", lambda d: aj.Chunked(8, -5), lambda i, d: (i.q - 5) // 8 == i.k // 8),
    MaskCase(
        "chunked_batched",
        lambda d: aj.Chunked(13, d["a"]),
        lambda i, d: (i.q + i.per(d["a"])) // 13 == i.k // 13,
        integers(0, 30, ""),
        ("a",),
    ),
    MaskCase("prefix_none", lambda d: aj.Prefix(0), lambda i, d: np.bool_(False)),
    MaskCase("prefix_static", lambda d: aj.Prefix(17), lambda i, d: i.k < 17),
    MaskCase(
        "segments_self",
        lambda d: aj.Segments(d["a"]),
        lambda i, d: i.per(d["a"], "t") == i.per(d["a"], "s"),
        lambda rng, shape: {"a": documents(rng, shape)["a"]},
        ("a",),
        square=True,
    ),
    MaskCase("segments_unsorted", lambda d: aj.Segments(d["a"], d["b"]), same, integers(-2, 4, "t", "s"), ab),
    MaskCase(
        "segments_disjoint", lambda d: aj.Segments(d["a"], d["b"] + 7), lambda i, d: np.bool_(False), documents, ab
    ),
    MaskCase(
        "lengths_key", lambda d: aj.Lengths(key=d["a"]), lambda i, d: i.k < i.per(d["a"]), integers(0, 30, ""), ("a",)
    ),
    MaskCase(
        "lengths_query",
        lambda d: aj.Lengths(query=d["a"]),
        lambda i, d: i.q < i.per(d["a"]),
        integers(0, 30, ""),
        ("a",),
    ),
    MaskCase("lengths_static", lambda d: aj.Lengths(key=33, query=20), lambda i, d: (i.k < 33) & (i.q < 20)),
    MaskCase("dilated_one", lambda d: aj.Dilated(1), everything),
    MaskCase(
        "dilated_batched",
        lambda d: aj.Dilated(5, d["a"]),
        lambda i, d: (i.q + i.per(d["a"]) - i.k) % 5 == 0,
        integers(0, 9, ""),
        ("a",),
    ),
    MaskCase("dense_ts", lambda d: aj.Dense(d["a"]), lambda i, d: d["a"], booleans("ts")),
    MaskCase("dense_bare", lambda d: d["a"], lambda i, d: d["a"], booleans("ts")),
    MaskCase("dense_heads", lambda d: aj.Dense(d["a"]), lambda i, d: d["a"], booleans("nts")),
    MaskCase(
        "dense_keys", lambda d: aj.Dense(d["a"]), lambda i, d: i.per(d["a"], "nts"), booleans("11s", True), ("a",)
    ),
    MaskCase("dense_queries", lambda d: aj.Dense(d["a"]), lambda i, d: d["a"], booleans("nt1")),
    MaskCase(
        "dense_full", lambda d: aj.Dense(d["a"]), lambda i, d: i.per(d["a"], "nts"), booleans("nts", True), ("a",)
    ),
    MaskCase("dense_none", lambda d: aj.Dense(d["a"]), lambda i, d: np.bool_(False), booleans("ts", share=-1.0)),
    MaskCase(
        "where_scanned",
        lambda d: aj.Where(lambda b, h, q, k: (q // 7 + k // 9) % 4 == 0, scan=True),
        lambda i, d: (i.q // 7 + i.k // 9) % 4 == 0,
    ),
    MaskCase(
        "where_captured",
        lambda d: aj.Where(lambda b, h, q, k: d["a"][q] >= d["b"][k]),
        lambda i, d: d["a"][i.q] >= d["b"][i.k],
        lambda rng, shape: {
            "a": rng.integers(0, 9, shape.T).astype(np.int32),
            "b": rng.integers(0, 9, shape.S).astype(np.int32),
        },
    ),
    MaskCase(
        "permutation_strict",
        lambda d: aj.Permutation(d["a"], strict=True),
        lambda i, d: d["a"][i.k] < d["a"][i.q],
        order,
        square=True,
    ),
    MaskCase(
        "permutation_batched",
        lambda d: aj.Permutation(d["a"]),
        lambda i, d: i.per(d["a"], "s") <= i.per(d["a"], "t"),
        lambda rng, shape: {
            "a": rng.permuted(np.zeros((*shape.batch, 1), np.int32) + np.arange(shape.T, dtype=np.int32), axis=-1)
        },
        ("a",),
        square=True,
    ),
    MaskCase("not_causal", lambda d: ~aj.Causal(4), lambda i, d: i.k > i.q + 4),
    MaskCase(
        "not_either",
        lambda d: ~(aj.Causal(d["a"]) | aj.Window(20, 20)),
        lambda i, d: ~(causal(i, i.per(d["a"])) | (abs(i.q - i.k) <= 20)),
        integers(-3, 9, ""),
        ("a",),
    ),
    MaskCase(
        "where_and_dense",
        lambda d: aj.Where(lambda b, h, q, k: (q + k + h) % 5 > 1) & d["a"],
        lambda i, d: ((i.q + i.k + i.h) % 5 > 1) & i.per(d["a"], "nts"),
        booleans("1ts", True),
        ("a",),
    ),
]


def buckets(i: Index, offset: int, bidirectional: bool) -> Any:
    """T5's bucket of every (query, key), [T, S], for 8 buckets up to distance 20."""
    first = -i.T - abs(offset)
    table = [t5_bucket(r, bidirectional, 8, 20) for r in range(first, i.S + abs(offset))]
    return jnp.asarray(table)[i.k - i.q - offset - first]


def relative(s: Any, i: Index, table: Any, offset: int = 0, bidirectional: bool = True) -> Any:
    return s + table[buckets(i, offset, bidirectional)].transpose(2, 0, 1)


distance = lambda i, s, offset=0: jnp.abs(i.q + offset - i.k).astype(s.dtype)
cap = lambda rng, shape: {"cap": np.array(2.5)}
sinks = normal(sinks="n")
bias = lambda name, axes, mapped=(): ScoreCase(
    name,
    lambda x: aj.Bias(x["a"]),
    lambda s, i, x: s + i.per(x["a"], "nts"),
    normal(a=axes),
    mapped,
)

# One score of every kind, and all of them at once. Crossed with every mask, dtype and implementation.
SCORES = [
    ScoreCase("none", lambda x: None, lambda s, i, x: s),
    ScoreCase("softcap", lambda x: aj.SoftCap(x["cap"]), lambda s, i, x: x["cap"] * jnp.tanh(s / x["cap"]), cap),
    bias("bias", "nts"),
    ScoreCase(
        "alibi",
        lambda x: aj.ALiBi(x["a"]),
        lambda s, i, x: s - i.per(x["a"], "n") * distance(i, s),
        slopes("n"),
    ),
    ScoreCase(
        "relative",
        lambda x: aj.RelativeBias(x["a"], max_distance=20),
        lambda s, i, x: relative(s, i, x["a"]),
        normal(a="8n"),
    ),
    ScoreCase(
        "function",
        lambda x: aj.ScoreFn(lambda s, b, h, q, k: s * x["a"][h].astype(s.dtype) + x["b"][k].astype(s.dtype)),
        lambda s, i, x: s * i.per(x["a"], "n") + i.per(x["b"], "s"),
        normal(a="n", b="s"),
    ),
    ScoreCase(
        "everything",
        lambda x: (aj.SoftCap(3.0), aj.Bias(x["a"]), aj.ALiBi(x["b"])),
        lambda s, i, x: 3 * jnp.tanh(s / 3) + i.per(x["a"], "nts") - i.per(x["b"], "n") * distance(i, s),
        join(normal(a="*1ts"), normal(0.2, b="n"), sinks),
        ("a",),
        scale=0.37,
        dropout=(0.3, 11),
    ),
]

# Further forms of the same scores.
SCORE_VARIANTS = [
    ScoreCase("sinks", lambda x: None, lambda s, i, x: s, sinks),
    ScoreCase("dropout", lambda x: None, lambda s, i, x: s, dropout=(0.5, 2**31 - 1)),
    ScoreCase("scale", lambda x: (), lambda s, i, x: s, scale=-1.5),
    ScoreCase("softcap_static", lambda x: aj.SoftCap(1.5), lambda s, i, x: 1.5 * jnp.tanh(s / 1.5)),
    bias("bias_keys", "s"),
    bias("bias_shared", "ts"),
    bias("bias_one", "111"),
    bias("bias_head_keys", "n1s"),
    bias("bias_head_queries", "nt1"),
    bias("bias_batch_keys", "*11s", ("a",)),
    bias("bias_batch_heads", "*n11", ("a",)),
    bias("bias_full", "*nts", ("a",)),
    ScoreCase(
        "biases",
        lambda x: (aj.Bias(x["a"]), aj.SoftCap(x["cap"]), aj.Bias(x["b"])),
        lambda s, i, x: x["cap"] * jnp.tanh((s + i.per(x["a"], "ts")) / x["cap"]) + i.per(x["b"], "nts"),
        join(normal(a="ts", b="n1s"), cap),
    ),
    ScoreCase(
        "alibi_batched",
        lambda x: aj.ALiBi(x["a"], 7),
        lambda s, i, x: s - i.per(x["a"], "n") * distance(i, s, 7),
        slopes("*n"),
        ("a",),
    ),
    ScoreCase(
        "alibi_paper",
        lambda x: aj.ALiBi.for_heads(6),
        lambda s, i, x: s - np.array(alibi_slopes(6), s.dtype)[:, None, None] * distance(i, s),
    ),
    ScoreCase(
        "relative_past",
        lambda x: aj.RelativeBias(x["a"], bidirectional=False, max_distance=20, offset=5),
        lambda s, i, x: relative(s, i, x["a"], 5, bidirectional=False),
        normal(a="8n"),
    ),
    ScoreCase(
        "function_indices",
        lambda x: aj.ScoreFn(lambda s, b, h, q, k: s + ((q * 3 + k * (h + 1) + b) % 5).astype(s.dtype)),
        lambda s, i, x: s + jnp.asarray((i.q * 3 + i.k * (i.h + 1) + i.b) % 5).astype(s.dtype),
    ),
    ScoreCase(
        "function_distance",
        lambda x: aj.ScoreFn(lambda s, b, h, q, k: s + x["a"][jnp.minimum(jnp.abs(q - k), 7)].astype(s.dtype)),
        lambda s, i, x: s + x["a"][jnp.minimum(jnp.abs(i.q - i.k), 7)],
        normal(a="8"),
    ),
    ScoreCase(
        "function_stopped",
        lambda x: aj.ScoreFn(lambda s, b, h, q, k: s + jax.lax.stop_gradient(jnp.sin(s)) * x["a"][h].astype(s.dtype)),
        lambda s, i, x: s + jax.lax.stop_gradient(jnp.sin(s)) * i.per(x["a"], "n"),
        normal(a="n"),
    ),
    ScoreCase(
        "function_nonlinear",
        lambda x: aj.ScoreFn(lambda s, b, h, q, k: jnp.sin(s) * x["a"][h, q].astype(s.dtype) + s),
        lambda s, i, x: jnp.sin(s) * i.per(x["a"], "nt") + s,
        normal(a="nt"),
    ),
]

# Shapes other than the default one: (name, shape). Tiles are 16 x 16, so 32 and 64 are whole tiles.
SHAPES = {
    "decode": Shape(T=1),
    "one_key": Shape(S=1),
    "one_by_one": Shape(T=1, S=1),
    "one_head": Shape(N=1, K=1),
    "as_many_key_heads": Shape(N=5, K=5),
    "one_key_head": Shape(N=5, K=1),
    "no_batch": Shape(batch=()),
    "two_batch_axes": Shape(batch=(2, 3)),
    "empty_batch": Shape(batch=(0,)),
    "empty_batch_of_two": Shape(batch=(3, 0)),
    "head_size_one": Shape(H=1, V=1),
    "head_size_130": Shape(H=130, V=3),
    "more_queries": Shape(T=61, S=29),
    "square": Shape(T=41, S=41),
    "whole_tiles": Shape(T=32, S=64),
}
