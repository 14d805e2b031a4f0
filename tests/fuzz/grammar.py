"""Functions of indices: small expressions with captured constants, as Python text and as rules of the oracle."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from fuzz import tape
from fuzz.draw import Drawing
from fuzz.oracle import Index


@dataclasses.dataclass
class At:
    """What an expression is evaluated on: index arrays, the logits, arrays by name."""

    index: Index
    get: Callable
    var: Callable | None = None
    s: Any = None

    def letter(self, name: str) -> Any:
        return getattr(self.index, name)


Text = tuple[str, Callable[[At], Any]]
INNER = "lambda b, h, q, k: {}"


def predicate(draw: Drawing, depth: int = 2) -> Text:
    """A boolean of (b, h, q, k)."""
    if depth and draw.chance(0.55):
        (one, first), (other, second) = predicate(draw, depth - 1), predicate(draw, depth - 1)
        kind = draw.one_of(["&", "|", "~", "^", "where", "cond", "jit", "checkpoint", "inner"])
        if kind == "&":
            return f"(({one}) & ({other}))", lambda at: first(at) & second(at)
        if kind == "|":
            return f"jnp.logical_or({one}, {other})", lambda at: first(at) | second(at)
        if kind == "~":
            return f"(~({one}))", lambda at: ~first(at)
        if kind == "^":
            return f"(({one}) ^ ({other}))", lambda at: first(at) ^ second(at)
        if kind in ("where", "cond"):
            choice, rule = predicate(draw, 0)
            text = "jnp.where({}, {}, {})" if kind == "where" else "jax.lax.cond({}, lambda: {}, lambda: {})"
            return text.format(choice, one, other), lambda at: np.where(rule(at), first(at), second(at))
        return _inner(draw, kind, one), first
    return draw.one_of([_compared, _looked_up, _numbered, _by_float, _odd_one], [3, 4, 2, 2, 1])(draw)


def _inner(draw: Drawing, kind: str, text: str) -> str:
    """The expression inside a function that is a program of its own."""
    if kind == "jit":
        return f"jax.jit({INNER.format(text)})(b, h, q, k)"
    if kind == "checkpoint":
        return f"jax.checkpoint({INNER.format(text)})(b, h, q, k)"
    return f"jax.jit(lambda *i: jax.jit({INNER.format(text)})(*i))(b, h, q, k)"


def _compared(draw: Drawing) -> Text:
    n, m = draw.between(-3, 8), draw.between(2, 5)
    options = [
        ("(q >= k)", lambda at: at.letter("q") >= at.letter("k")),
        (f"(q - k < {n})", lambda at: at.letter("q") - at.letter("k") < n),
        (f"(abs(q - k) <= {abs(n)} + h)", lambda at: abs(at.letter("q") - at.letter("k")) <= abs(n) + at.letter("h")),
        (f"((q + k) % {m} != 0)", lambda at: (at.letter("q") + at.letter("k")) % m != 0),
        (
            f"((q // {m} == k // {m}) == (h == 0))",
            lambda at: (at.letter("q") // m == at.letter("k") // m) == (at.letter("h") == 0),
        ),
        (f"((b + k) % {m} > 0)", lambda at: (at.letter("b") + at.letter("k")) % m > 0),
        ("(k == k)", lambda at: at.letter("k") == at.letter("k")),
    ]
    return draw.one_of(options)


def _looked_up(draw: Drawing) -> Text:
    """Tables of integers of any type, by one or two indices."""
    z, dtype = draw.sizes, draw.dtype_of_integers()
    dtype = dtype if draw.x64 or not dtype.endswith("64") else dtype.replace("64", "32")
    info = np.iinfo(dtype)
    base = draw.one_of([0, 0, info.max - 2, info.min])
    length = max(z.T, z.S, 1)
    lead = draw.one_of(["", "b", "h"], [4, 1, 1])
    shape = (*([max(z.B, 1)] if lead == "b" else [z.N] if lead == "h" else []), length)
    make = lambda: base + draw.rng.integers(0, 3, shape).astype(dtype)
    name = draw.array(make, numpy=False)
    draw.rounds = max(draw.rounds, 1)
    at_ = lambda letter: f"{name}[{lead + ', ' if lead else ''}{letter}]"
    read = lambda at, letter: at.get(name)[tuple(at.letter(x) for x in (*lead, letter))]
    if draw.chance(0.6):
        return f"({at_('q')} == {at_('k')})", lambda at: read(at, "q") == read(at, "k")
    if draw.chance(0.5):
        return f"({at_('k')} + 1 > {at_('q')})", lambda at: read(at, "k") + np.asarray(1, dtype) > read(at, "q")
    return f"({at_('k')} > np.{dtype}({base}))", lambda at: read(at, "k") > base


def _numbered(draw: Drawing) -> Text:
    """A number that the function captures: Python's, or an array without axes; another one in each round."""
    z = draw.sizes
    if draw.chance(0.5):
        name = draw.per_round([draw.between(0, z.S), draw.between(0, z.S)])
    else:
        dtype = draw.one_of(["int32", "int16", "uint8"][: 3 if z.S < 200 else 2])
        name = draw.array(lambda: np.asarray(draw.between(0, z.S), dtype), numpy=False)
    limit = lambda at: np.asarray(at.get(name)).astype(np.int64)
    if draw.chance(0.5):
        return f"(k < {name})", lambda at: at.letter("k") < limit(at)
    return f"((q + 3 * k) % 7 < {name} % 7)", lambda at: (at.letter("q") + 3 * at.letter("k")) % 7 < limit(at) % 7


def _by_float(draw: Drawing) -> Text:
    """Tables of floats. Their numbers are eighths, so that sums of them are exact in every type."""
    dtype = draw.one_of(["float32", "bfloat16", "float16"] + ["float64"] * draw.x64)
    length = max(draw.sizes.T, draw.sizes.S, 1)
    name = draw.known_float((length,), dtype, "jnp.round({} * 4) / 8")
    if dtype == "float64" and draw.chance(0.5):  # the order shows in float64 only
        draw.c[name] = f"1.0 + normal({draw.number()}, ({length},), 'float64') * 1e-12"
    read = lambda at, letter: np.asarray(at.get(name)).astype(np.float64)[at.letter(letter)]
    if draw.chance(0.5):
        return f"({name}[q] < {name}[k])", lambda at: read(at, "q") < read(at, "k")
    return f"({name}[q] - {name}[k] < 0.5)", lambda at: read(at, "q") - read(at, "k") < 0.5


def _odd_one(draw: Drawing) -> Text:
    """A loop, a callback."""
    name = draw.per_round([draw.between(1, 3), draw.between(4, 6)])
    if draw.divided or draw.chance(0.7):
        text = f"(jax.lax.fori_loop(0, 3, lambda i, t: t + (q >> i) * {name} + k, 0) % 3 > 0)"
        summed = lambda at: sum((at.letter("q") >> i) * at.get(name) + at.letter("k") for i in range(3))
        return text, lambda at: summed(at) % 3 > 0
    text = (
        f"jax.pure_callback(lambda q, k: np.asarray((q * 3 + k) % {name} < 2), jax.ShapeDtypeStruct((), bool), q, k, "
        'vmap_method="broadcast_all")'
    )
    return text, lambda at: (at.letter("q") * 3 + at.letter("k")) % at.get(name) < 2


def expression(draw: Drawing, depth: int = 2) -> Text:
    """A float of (s, b, h, q, k), in the type of s."""
    if not depth or draw.chance(0.15):
        return draw.one_of([_logit, _table, _distance, _constant], [4, 4, 1, 1])(draw)
    one, first = expression(draw, depth - 1)
    kind = draw.one_of(["+", "*", "-", "tanh", "sin", "ratio", "where", "scaled", "fake", "inner", "cond", "mixed"])
    if kind in "+-*":
        other, second = expression(draw, depth - 1)
        rule = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b * 0.5}[kind]
        text = f"(({one}) {kind} ({other}){' * 0.5' if kind == '*' else ''})"
        return text, lambda at: rule(first(at), second(at))
    if kind == "tanh":
        return f"jnp.tanh({one})", lambda at: tape.tanh(first(at))
    if kind == "sin":
        return f"jnp.sin({one})", lambda at: tape.sin(first(at))
    if kind == "ratio":
        return f"(lambda t: t / (1 + t * t))({one})", lambda at: _ratio(first(at))
    if kind in ("where", "cond"):
        choice, chosen = predicate(draw, 1)
        other, second = expression(draw, depth - 1)
        text = "jnp.where({}, {}, {})" if kind == "where" else "jax.lax.cond({}, lambda: {}, lambda: {})"
        return text.format(choice, one, other), lambda at: tape.where(chosen(at), first(at), second(at))
    if kind == "scaled":
        return f"(0.25 * ({one}))", lambda at: first(at) * 0.25
    if kind == "mixed":
        return _mixed(draw, one, first)
    if kind == "fake":
        return _fake(draw, one, first)
    inner = draw.one_of(["jit", "checkpoint", "stop"])
    if inner == "stop":
        return f"(s * 0.5 + jax.lax.stop_gradient({one}))", lambda at: at.s * 0.5 + tape.stop(first(at))
    return f"jax.{inner}(lambda s, b, h, q, k: {one})(s, b, h, q, k)", first


def _ratio(t: Any) -> Any:
    return t / (t * t + 1.0)


def _fake(draw: Drawing, text: str, rule: Callable) -> Text:
    """The same number with another derivative, by a rule of the user's own; another one in each round."""
    name = draw.per_round([0.5, 2.0])
    text = f"faked({name})({text})"

    def run(at):
        x, factor = rule(at), at.get(name)
        return tape.Var(x.value, x.kind, [(x, lambda c: c * factor)])

    return text, run


def _mixed(draw: Drawing, text: str, rule: Callable) -> Text:
    """A table of another type meets the logits as it is; `s` is the wider one, or both are float64."""
    name = draw.floating((max(draw.sizes.S, 1),), draw.one_of(["float32", "bfloat16", "float16"]))
    factor = draw.one_of([" + {}[k]", " * {}[k]"]).format(name)
    read = lambda at: tape.take(at.var(name), at.letter("k"))
    return f"(({text}){factor})", lambda at: rule(at) + read(at) if "+" in factor else rule(at) * read(at)


def _logit(draw: Drawing) -> Text:
    return "s", lambda at: at.s


def _constant(draw: Drawing) -> Text:
    name = draw.per_round([0.5, -0.75])
    return f"jnp.asarray({name}, s.dtype)", lambda at: tape.where(True, at.s.like(at.get(name)), at.s * 0.0)


def _distance(draw: Drawing) -> Text:
    rule = lambda at: np.abs(at.letter("q") - at.letter("k")) * 0.125
    return "(abs(q - k).astype(s.dtype) * 0.125)", lambda at: at.s.like(rule(at))


def _table(draw: Drawing) -> Text:
    """A captured array of floats, of any shape, also none: differentiated, or known and another one in each round."""
    z = draw.sizes
    letters = draw.one_of(["k", "q", "h", "b", "", "bk", "hq", "bh", "hk"], [3, 2, 2, 1, 2, 1, 1, 1, 1])
    full = {"b": max(z.B, 1), "h": z.N, "q": max(z.T, 1), "k": max(z.S, 1)}
    shape = tuple(full[letter] for letter in letters)
    dtype = draw.one_of(["float32", "float32", "bfloat16", "float16"] + ["float64"] * draw.x64)
    name = (draw.floating if draw.chance(0.7) else draw.known_float)(shape, dtype, "{} * 0.5")
    text = f"{name}[{', '.join(letters)}]" if letters else name
    rule = lambda at: tape.take(at.var(name), tuple(at.letter(x) for x in letters))
    if not letters:
        rule = lambda at: tape.spread(at.var(name), at.index.q.shape)
    return f"{text}.astype(s.dtype)", rule


def whole(draw: Drawing) -> Text:
    """The body of a ScoreFn: an expression, or one of a few that are known to be hard."""
    if draw.one_sided and draw.chance(0.7):
        return _one_sided(draw)
    if draw.chance(0.08):
        return "jnp.zeros_like(s)", lambda at: at.s * 0.0
    if draw.chance(0.08):
        name = draw.floating((max(draw.sizes.S, 1),), "float32")
        return f"{name}[k]", lambda at: tape.take(at.var(name), at.letter("k"))
    if draw.chance(0.08) and not draw.tiny:
        return "jnp.log(s * s)", lambda at: tape.log(at.s * at.s)
    return expression(draw, draw.between(1, 3))


def _one_sided(draw: Drawing) -> Text:
    """Finite for keys up to the query only."""
    name = draw.floating((draw.sizes.N,), "float32", "0.5 + 0.25 * jnp.tanh({})")
    weight = lambda at: tape.take(at.var(name), at.letter("h"))
    distance = lambda at: at.s.like(at.letter("q") - at.letter("k"))
    kind = draw.one_of(["decay", "log", "root", "exp"])
    if kind == "decay":
        text = f"s * {name}[h].astype(s.dtype) ** ((q - k) * 40)"
        return text, lambda at: at.s * tape.exp(distance(at) * 40.0 * tape.log(weight(at)))
    if kind == "log":
        text = f"s - {name}[h].astype(s.dtype) * jnp.log((q - k + 1).astype(s.dtype))"
        return text, lambda at: at.s - weight(at) * tape.log(distance(at) + 1.0)
    if kind == "root":
        text = f"s + {name}[h].astype(s.dtype) * jnp.sqrt((q - k).astype(s.dtype))"
        return text, lambda at: at.s + weight(at) * tape.sqrt(distance(at))
    text = f"s * {name}[h].astype(s.dtype) + s * jnp.exp((k - q).astype(s.dtype) * 30.0)"
    return text, lambda at: at.s * weight(at) + at.s * tape.exp(distance(at) * -30.0)
