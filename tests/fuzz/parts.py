"""Masks and scores: each drawn as Python text with leaves of every type, and as a rule of the oracle's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from oracle import t5_bucket

from fuzz import grammar, tape
from fuzz.draw import Drawing, integers_of

Rule = Callable[[Any, Callable], Any]
Text = tuple[str, Rule]
FRAMES = """
class Frames(Mask):
    axes = {"size": ""}
    size: int | jax.Array
    def evaluate(self, tile):
        return tile.k // tile.take(self.size, "") <= tile.q // tile.take(self.size, "")
    def blocks(self, grid):
        return np.int8(1)
"""
SLOPE = """
class Slope(Score):
    axes = {"rate": ""}
    rate: float
    def evaluate(self, logits, tile):
        return logits - self.rate * abs(tile.q - tile.k).astype(logits.dtype)
"""


def mask(draw: Drawing, depth: int) -> Text:
    """A mask of at most this depth."""
    if depth and draw.chance(0.6):
        kind = draw.one_of("&|~", [5, 3, 2])
        one, first = mask(draw, depth - 1)
        if kind == "~":
            return f"~{one}", lambda index, get: ~np.asarray(first(index, get), bool)
        other, second = mask(draw, depth - 1)
        combine = np.logical_and if kind == "&" else np.logical_or
        return f"({one} {kind} {other})", lambda index, get: combine(first(index, get), second(index, get))
    still = 0 if draw.cached else 1  # arrays by query and key are for the slots of a cache
    kinds = [_causal, _window, _chunked, _prefix, _dilated, _frames, _where]
    kinds += [_segments, _lengths, _dense, _permutation]
    weights = [3, 3, 2, 2, 2, 1, 5 if draw.mode != "strict" else 0, 4 * still, 2 * still, 2 * still, still]
    return draw.one_of(kinds, weights)(draw)


def _placed(draw: Drawing) -> tuple[str, str, Callable]:
    """The end of a mask's name, its offset as an argument, and how far queries are moved."""
    z = draw.sizes
    end = draw.chance(0.25) and not draw.cached
    text, read = draw.integer(-3, 8) if draw.chance(0.6) else ("0", 0)
    shift = lambda index, get: integers_of(read, index, get) + (z.S - z.T if end else 0)
    return ".aligned_end" if end else "", text, shift


def _causal(draw: Drawing) -> Text:
    end, offset, shift = _placed(draw)
    return f"Causal{end}({offset})", lambda index, get: _true(index.k <= index.q + shift(index, get))


def _window(draw: Drawing) -> Text:
    end, offset, shift = _placed(draw)
    left, right = (draw.integer(0, 9, 0) if draw.chance(0.75) else ("None", None) for _ in "lr")

    def rule(index, get):
        centre = index.q + shift(index, get)
        seen = np.ones(index.q.shape, bool)
        if left[1] is not None:
            seen = seen & _true(index.k >= centre - integers_of(left[1], index, get))
        if right[1] is not None:
            seen = seen & _true(index.k <= centre + integers_of(right[1], index, get))
        return seen

    return f"Window{end}({left[0]}, {right[0]}, {offset})", rule


def _chunked(draw: Drawing) -> Text:
    offset, read = draw.integer(-3, 8) if draw.chance(0.5) else ("0", 0)
    size, sized = draw.integer(1, 9, 1)

    def rule(index, get):
        by = integers_of(sized, index, get)
        return _true((index.q + integers_of(read, index, get)) // by == index.k // by)

    return f"Chunked({size}, {offset})", rule


def _dilated(draw: Drawing) -> Text:
    offset, read = draw.integer(-3, 8) if draw.chance(0.5) else ("0", 0)
    stride, strides = draw.integer(1, 4, 1)

    def rule(index, get):
        by = integers_of(strides, index, get)
        return _true((index.q + integers_of(read, index, get) - index.k) % by == 0)

    return f"Dilated({stride}, {offset})", rule


def _prefix(draw: Drawing) -> Text:
    length, read = draw.integer(0, min(draw.sizes.S, 100), 0)
    return f"Prefix({length})", lambda index, get: _true(index.k < integers_of(read, index, get))


def _lengths(draw: Drawing) -> Text:
    key, query = (
        draw.integer(0, min(n, 100), 0) if draw.chance(0.7) else ("None", None) for n in (draw.sizes.S, draw.sizes.T)
    )

    def rule(index, get):
        seen = np.ones(index.q.shape, bool)
        for (_, read), numbers in ((key, index.k), (query, index.q)):
            seen = seen if read is None else seen & _true(numbers < integers_of(read, index, get))
        return seen

    return f"Lengths({key[0]}, {query[0]})", rule


def _ids(draw: Drawing, length: int, base: int, dtype: str, step: int = 1) -> str:
    batch = draw.sizes.batch
    shape = (*(() if draw.chance(0.4) else batch), length)
    numbers = lambda: (
        np.sort(draw.rng.integers(0, 3, shape), -1) if draw.chance(0.5) else draw.rng.integers(0, 3, shape)
    )
    return draw.array(lambda: np.asarray(base + numbers().astype(object) * step, dtype))


def _segments(draw: Drawing) -> Text:
    """Ids of every type, at the ends of its range too, and such as differ above 32 bits only."""
    z, dtype = draw.sizes, draw.dtype_of_integers()
    info = np.iinfo(dtype)
    base = draw.one_of([0, 1, info.max - 2, info.min], [3, 3, 1, 1])
    step = 2**32 if dtype.endswith("64") and base in (0, 1) and draw.chance(0.3) else 1
    same = z.T == z.S and draw.chance(0.5)
    names = [_ids(draw, z.T, base, dtype, step)]
    names += [] if same else [_ids(draw, z.S, base, dtype, step)]
    big = lambda name, get: (
        np.asarray(get(name)).astype(object) if dtype == "uint64" else np.asarray(get(name)).astype(np.int64)
    )

    def rule(index, get):
        return _true(index.per(big(names[0], get), "t") == index.per(big(names[-1], get), "s"))

    return f"Segments({', '.join(names)})", rule


def _permutation(draw: Drawing) -> Text:
    z = draw.sizes
    if z.T != z.S:
        return _segments(draw)
    shape = (*(() if draw.chance(0.5) else z.batch), z.T)
    dtype = draw.one_of(["int32", "uint8", "int8", "int16"]) if z.T < 120 else "int32"
    name = draw.array(lambda: draw.rng.permuted(np.broadcast_to(np.arange(z.T, dtype=dtype), shape), axis=-1))
    strict = draw.chance(0.5)

    def rule(index, get):
        order = np.asarray(get(name)).astype(np.int64)
        query, key = index.per(order, "t"), index.per(order, "s")
        return key < query if strict else key <= query

    return f"Permutation({name}, strict={strict})", rule


def _broadcast_shape(draw: Drawing) -> tuple[int, ...]:
    z = draw.sizes
    full = (*z.batch, z.N, *((1, 1) if draw.cached else (z.T, z.S)))
    start = draw.between(0, len(full))
    return tuple(1 if draw.chance(0.25) else n for n in full[start:])


def _dense(draw: Drawing) -> Text:
    shape = _broadcast_shape(draw)
    name = draw.array(lambda: draw.rng.random(shape) < draw.one_of([0.3, 0.8]))
    text = name if draw.chance(0.4) and draw.mode != "transfer" else f"Dense({name})"
    return text, lambda index, get: index.per(get(name), "nts")


def _where(draw: Drawing) -> Text:
    text, rule = grammar.predicate(draw, draw.between(0, 2))
    scan = ", scan=True" if draw.chance(0.2) else ""
    run = lambda index, get: np.broadcast_to(rule(grammar.At(index, get)), index.q.shape)
    return f"Where(lambda b, h, q, k: {text}{scan})", run


def _frames(draw: Drawing) -> Text:
    draw.helpers += [FRAMES] if FRAMES not in draw.helpers else []
    size, read = draw.integer(1, 9, 1)

    def rule(index, get):
        by = integers_of(read, index, get)
        return _true(index.k // by <= index.q // by)

    return f"Frames({size})", rule


def _true(x: Any) -> Any:
    return np.asarray(x, bool)


def score(draw: Drawing) -> Text:
    """A score: its rule is (s, index, var, get) -> s; `var` finds floats by name, `get` everything else."""
    kinds = [_softcap, _bias, _alibi, _relative, _function, _slope]
    return draw.one_of(kinds, [2, 4 if not draw.cached else 1, 2, 2, 7 if draw.mode != "strict" else 0, 1])(draw)


def _softcap(draw: Drawing) -> Text:
    if draw.chance(0.5):
        cap = draw.one_of([1.5, 5.0, 30.0])
        return f"SoftCap({cap})", capped(cap)
    shape = draw.sizes.batch if draw.chance(0.3) else ()
    name = draw.floating(shape, draw.one_of(["float32", draw.dtype]), "2.0 + jnp.abs({})")

    def rule(s, index, var, get):
        cap = index.taken(var(name), "")
        return tape.tanh(s / cap) * cap

    return f"SoftCap({name})", rule


def capped(cap: float) -> Callable:
    """The rule of a soft cap that is a number."""
    return lambda s, index, var, get: tape.tanh(s / cap) * cap


def _bias(draw: Drawing) -> Text:
    shape = _broadcast_shape(draw)
    form, dtype = "{}", draw.one_of(["float32", draw.dtype])
    if draw.chance(0.2) and draw.mode not in ("debug_nans", "debug_infs"):
        low = draw.one_of(["-jnp.inf"] + [f"jnp.finfo({dtype!r}).min / 2"] * (draw.order == 0))  # a cap's overflows
        form = f"(lambda t: jnp.where(t > 0.8, jnp.asarray({low}, t.dtype), t))({{}})"
    elif draw.chance(0.05):
        form = f"jnp.full_like({{}}, jnp.finfo({dtype!r}).min)"
    name = draw.floating(shape, dtype, form)
    return f"Bias({name})", lambda s, index, var, get: s + index.taken(var(name), "nts")


def _alibi(draw: Drawing) -> Text:
    z = draw.sizes
    shape = (*(z.batch if draw.chance(0.2) else ()), z.N)
    name = draw.floating(shape, draw.one_of(["float32", draw.dtype]), "{} * 0.25")
    offset, read = draw.integer(-3, 8) if draw.chance(0.4) else ("0", 0)
    offset, read = (offset, read) if not _is_huge(draw, read) else ("2", 2)

    def rule(s, index, var, get):
        distance = np.abs(index.q + integers_of(read, index, get) - index.k).astype(np.float64)
        return s - index.taken(var(name), "n") * s.like(distance)

    return f"ALiBi({name}, {offset})", rule


def _is_huge(draw: Drawing, read: Any) -> bool:
    """A distance of 2^31 says nothing but how floats round."""
    text = {**draw.d, **draw.c}.get(read, "") if isinstance(read, str) else str(read)
    return any(len(digits) > 3 for digits in "".join(c if c.isdigit() else " " for c in text.split("], '")[0]).split())


def _relative(draw: Drawing) -> Text:
    z, both = draw.sizes, draw.chance(0.5)
    buckets, furthest, offset = draw.one_of([4, 8, 32]), draw.one_of([16, 128]), draw.between(-2, 4)
    name = draw.floating((*(z.batch if draw.chance(0.15) else ()), buckets, z.N), draw.one_of(["float32", draw.dtype]))
    bucket = np.vectorize(lambda n: t5_bucket(int(n), both, buckets, furthest), otypes=[np.int64])

    def rule(s, index, var, get):
        table = var(name)
        flat = np.broadcast_to(np.arange(table.value.size).reshape(table.shape), (*z.batch, *table.shape[-2:])).reshape(
            z.B, buckets, z.N
        )
        distance = index.k - index.q - offset
        span = np.arange(distance.min(initial=0), distance.max(initial=0) + 1)
        found = bucket(span)[distance - span[0]]
        return s + tape.take(tape.reshape(table, (-1,)), flat[index.b, found, index.h])

    more = f"bidirectional={both}, max_distance={furthest}, offset={offset}"
    return f"RelativeBias({name}, {more})", rule


def _function(draw: Drawing) -> Text:
    text, rule = grammar.whole(draw)
    body = lambda s, index, var, get: rule(grammar.At(index, get, var, s))
    return f"ScoreFn(lambda s, b, h, q, k: {text})", body


def _slope(draw: Drawing) -> Text:
    draw.helpers += [SLOPE] if SLOPE not in draw.helpers else []
    return "Slope(0.125)", lambda s, index, var, get: s - s.like(np.abs(index.q - index.k) * 0.125)
