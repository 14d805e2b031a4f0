"""The cases of the benchmark as data, their arrays, and what they ask of attention. Runs nothing."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import operator
from typing import Any

import jax.numpy as jnp
import numpy as np

from attnjax.masks import Causal, Lengths, Mask, Segments, Window
from attnjax.positions import alibi_slopes
from attnjax.profiling import attention_bytes, attention_flops
from attnjax.scores import ALiBi, Bias, Score, SoftCap

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of attention: sizes, mask, scores, dtype, and which part of the work.

    Attributes:
      name: what `--case` matches.
      T, S: queries and keys.
      B, N, K, H, V: batch, query heads, key/value heads, head size, value head size.
      causal: query t sees keys s <= t.
      window: query t sees its last `window` keys, t - window < s <= t.
      documents: the sequence is this many packed documents of equal length; none sees another.
      length: only so many keys are there, the rest is padding.
      alibi: ALiBi with the paper's slopes.
      soft_cap: cap of the logits.
      bias: shape of an additive bias in letters, "1N1S" or "11TS".
      dtype: of query, key and value.
      backward: the gradients of query, key and value too, from a given cotangent of the output.
      default: measured by a plain `attnjax bench`.
    """

    name: str
    T: int
    S: int
    B: int = 1
    N: int = 8
    K: int = 8
    H: int = 64
    V: int = 64
    causal: bool = False
    window: int | None = None
    documents: int | None = None
    length: int | None = None
    alibi: bool = False
    soft_cap: float | None = None
    bias: str | None = None
    dtype: str = "float32"
    backward: bool = False
    default: bool = True

    @property
    def logits(self) -> int:
        """Size of the score matrix: B N T S."""
        return self.B * self.N * self.T * self.S

    @property
    def part(self) -> str:
        return "forward+backward" if self.backward else "forward"

    def pairs(self) -> int:
        """Pairs of query and key that see each other, over batch and heads. Each query sees a range."""
        query = np.arange(self.T)
        first, end = np.zeros(self.T, int), np.full(self.T, self.S if self.length is None else self.length)
        if self.causal or self.window is not None:
            end = np.minimum(end, query + 1)
        if self.window is not None:
            first = np.maximum(first, query - self.window + 1)
        if self.documents is not None:
            ids = self.indices()
            first = np.maximum(first, np.searchsorted(ids["key_ids"], ids["query_ids"], "left"))
            end = np.minimum(end, np.searchsorted(ids["key_ids"], ids["query_ids"], "right"))
        return self.B * self.N * int(np.maximum(end - first, 0).sum())

    def flops(self) -> int:
        """Products of the visible pairs only: what is skipped does not count as work done."""
        counted = attention_flops(self.pairs(), self.H, self.V)
        return counted["forward"] + self.backward * counted["backward"]

    def bytes(self) -> int:
        """Bytes that have to move at least."""
        shaped = lambda *shape: np.broadcast_to(np.zeros((), jnp.dtype(self.dtype)), (self.B, *shape))
        query, key, value = (
            shaped(self.T, self.N, self.H),
            shaped(self.S, self.K, self.H),
            shaped(self.S, self.K, self.V),
        )
        counted = attention_bytes(query, key, value)
        return counted["forward"] + self.backward * counted["backward"]

    def indices(self) -> Arrays:
        """The arrays of the mask."""
        if self.documents is None:
            return {}
        ids = lambda length: (np.arange(length) * self.documents // length).astype(np.int32)
        return {"query_ids": ids(self.T), "key_ids": ids(self.S)}

    def draw(self, seed: int = 0) -> Arrays:
        """All arrays: normal query, key, value, bias and cotangent of the output; slopes and indices."""
        rng = np.random.default_rng(seed)
        sizes = {"1": 1, "N": self.N, "T": self.T, "S": self.S}
        shapes = {
            "query": (self.B, self.T, self.N, self.H),
            "key": (self.B, self.S, self.K, self.H),
            "value": (self.B, self.S, self.K, self.V),
            "cotangent": (self.B, self.T, self.N, self.V),
        }
        arrays = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
        if self.bias:
            arrays["bias"] = rng.standard_normal([sizes[letter] for letter in self.bias], np.float32)
        arrays = {name: array.astype(jnp.dtype(self.dtype)) for name, array in arrays.items()}
        if self.alibi:
            arrays["slopes"] = np.asarray(alibi_slopes(self.N))
        return arrays | self.indices()

    def options(self, arrays: dict[str, Any], first_query: Any = 0) -> dict[str, Any]:
        """`mask` and `score` as attnjax takes them.

        Args:
          arrays: the arrays of the case. Those with an axis of queries may be cut to some rows.
          first_query: position of the first query, an integer or a scalar array.
        """
        masks: list[Mask] = []
        if self.causal:
            masks.append(Causal(first_query))
        if self.window is not None:
            masks.append(Window(self.window - 1, 0, first_query))
        if self.documents is not None:
            masks.append(Segments(arrays["query_ids"], arrays["key_ids"]))
        if self.length is not None:
            masks.append(Lengths(self.length))
        scores: list[Score] = []
        if self.soft_cap is not None:
            scores.append(SoftCap(self.soft_cap))
        if self.alibi:
            scores.append(ALiBi(arrays["slopes"], first_query))
        if self.bias:
            scores.append(Bias(arrays["bias"]))
        mask = functools.reduce(operator.and_, masks) if masks else None
        return {"mask": mask, "score": tuple(scores) or None}

    def describe(self) -> str:
        """Sizes, mask, scores and part in one line."""
        sizes = " ".join(f"{letter}{getattr(self, letter)}" for letter in "BTSNKHV")
        rules = [name for name in ("causal", "alibi") if getattr(self, name)]
        for name in ("window", "documents", "length", "soft_cap", "bias"):
            if getattr(self, name) is not None:
                rules.append(f"{name}={getattr(self, name)}")
        return f"{sizes} {' '.join(rules) or 'full'} {self.dtype} {self.part}"


def _parts(name: str, *, default_grad: bool = True, **fields: Any) -> list[Case]:
    """A case and its `-grad`."""
    default = fields.pop("default", True)
    return [
        Case(name, **fields, default=default),
        Case(f"{name}-grad", **fields, backward=True, default=default and default_grad),
    ]


def _square(length: int, size: int = 64, heads: int = 8) -> dict[str, Any]:
    return {"T": length, "S": length, "H": size, "V": size, "N": heads, "K": heads}


def _grid() -> list[Case]:
    """Full and causal at the usual lengths and head sizes; a plain run measures two of the lengths."""
    return [
        case
        for length in (512, 1024, 2048, 4096, 8192)
        for size in (64, 128)
        for name, causal in (("full", False), ("causal", True))
        for case in _parts(
            f"{name}-{length}-d{size}",
            **_square(length, size),
            causal=causal,
            default=length == 4096 or (length, size) == (1024, 64),
        )
    ]


def _long(name: str, *, default: bool = False, **rules: Any) -> Case:
    """The gradient at 16384 tokens: where memory decides."""
    return Case(f"{name}-16k-h4-grad", **_square(16384, heads=4), **rules, backward=True, default=default)


def _on_gpu(name: str, *, length: int = 8192, size: int = 128, **fields: Any) -> list[Case]:
    """A case and its `-grad` for GPUs: bfloat16, 16384 tokens in the batch, heads of together 2048."""
    heads = 2048 // size
    shape: dict[str, Any] = {
        "B": max(1, 16384 // length),
        "T": length,
        "S": length,
        "N": heads,
        "K": heads,
        "H": size,
        "V": size,
    }
    return _parts(f"gpu-{name}", **shape | fields, dtype="bfloat16", default=False)


def _for_gpus() -> list[Case]:
    """What `make test-gpu` measures."""
    plain = [
        case
        for size in (64, 128, 256)
        for name, causal in (("full", False), ("causal", True))
        for case in _on_gpu(f"{name}-8192-d{size}", size=size, causal=causal)
    ]
    token = {"T": 1, "S": 32768, "H": 128, "V": 128, "dtype": "bfloat16", "default": False}
    return [
        *plain,
        *_on_gpu("causal-2048", length=2048, causal=True),
        *_on_gpu("window1024-16k", length=16384, window=1024),
        *_on_gpu("documents-16k", length=16384, causal=True, documents=16),
        *_on_gpu("alibi", causal=True, alibi=True),
        *_on_gpu("softcap", causal=True, soft_cap=50.0),
        *_on_gpu("bias", bias="1N1S"),
        *_on_gpu("pair-bias", length=4096, bias="11TS"),
        *_on_gpu("gqa", B=1, N=32, K=8, causal=True),
        Case("gpu-decode-32k", B=4, N=32, K=8, **token),
    ]


CASES: tuple[Case, ...] = (
    *_parts("tiny", **_square(16, 32, heads=4)),
    *_parts("batch-32x128", B=32, **_square(128)),
    Case("decode-32k", T=1, S=32768),
    Case("decode-gqa-32k", T=1, S=32768, N=32, K=8, H=128, V=128, dtype="bfloat16", default=False),
    *_grid(),
    *_parts("documents-4096", **_square(4096), documents=16, default_grad=False),
    *_parts("alibi-2048", **_square(2048), causal=True, alibi=True, default_grad=False),
    *_parts("softcap-2048", **_square(2048), causal=True, soft_cap=50.0, default_grad=False),
    *_parts("bias-2048", **_square(2048), bias="1N1S", default_grad=False),
    *_parts("gqa-2048", T=2048, S=2048, N=32, K=8, causal=True, default_grad=False),
    *_parts("causal-2048-bfloat16", **_square(2048), causal=True, dtype="bfloat16", default_grad=False),
    *_parts("padding-2048", **_square(2048), length=1500, default=False),
    *_parts("cross-333x2049", T=333, S=2049, default=False),
    *_parts("value-192-128", T=2048, S=2048, H=192, V=128, causal=True, default=False),
    *_parts("pair-bias-8x1024", B=8, **_square(1024), bias="11TS", default=False),
    Case("window512-16k", **_square(16384), window=512),
    Case("causal-16k", **_square(16384), causal=True),
    _long("full"),
    _long("causal", causal=True, default=True),
    _long("window512", window=512),
    _long("documents", documents=16),
    _long("alibi", causal=True, alibi=True),
    _long("bias", bias="1N1S"),
    Case("causal-128k-h1-grad", **_square(131072, heads=1), causal=True, backward=True, default=False),
    *_for_gpus(),
)


def select(patterns: list[str] | None = None, *, quick: bool = False) -> list[Case]:
    """The cases whose names match any of the patterns, in the order of the table.

    Args:
      patterns: names or shell patterns ("causal-*"); `None` is the default set.
      quick: of the default set only cases of at most 2^23 logits.

    Raises:
      KeyError: a pattern that matches nothing; its argument is the pattern.
    """
    if patterns is None:
        return [case for case in CASES if case.default and (not quick or case.logits <= 2**23)]
    for pattern in patterns:
        if not fnmatch.filter([case.name for case in CASES], pattern):
            raise KeyError(pattern)
    return [case for case in CASES if any(fnmatch.fnmatchcase(case.name, pattern) for pattern in patterns)]
