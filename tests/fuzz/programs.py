"""Whole programs: a call of attention, in pieces or through a cache, transforms around it, a mode of JAX around all."""

from __future__ import annotations

import dataclasses
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np

from fuzz import parts
from fuzz.draw import Drawing
from fuzz.oracle import Index, Problem, Sizes, attend, derived, mapped, order_of

MODES = {
    "": "contextlib.nullcontext()",
    "rank": 'jax.numpy_rank_promotion("raise")',
    "strict": 'jax.numpy_dtype_promotion("strict")',
    "debug_nans": "jax.debug_nans(True)",
    "debug_infs": "jax.debug_infs(True)",
    "leaks": "jax.checking_leaks()",
    "disable_jit": "jax.disable_jit()",
    "transfer": 'jax.transfer_guard("disallow")',
}
PRELUDE = """import contextlib
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from attnjax import *
from attnjax.kernels import mosaic_tpu, triton, xla
{helpers}
def faked(factor):  # x, with the derivative of factor * x
    same = jax.custom_jvp(lambda x: x)
    same.defjvp(lambda x, t: (same(x[0]), t[0] * factor))
    return same

def inputs(r):
    normal = lambda n, shape, dtype: jnp.asarray(np.random.default_rng([*np.ravel(n), r]).normal(size=shape), dtype)
    beside = lambda a, b: jax.device_put(a, b.sharding) if len(b.sharding.device_set) > 1 else a
    like = lambda n, x: {{k: beside(normal([n, i], a.shape, a.dtype), a) for i, (k, a) in enumerate(sorted(x.items()))}}
    x = dict({x})
    d = dict({d})
    c = dict({c}){changes}
    u, ct = {tangents}, {cotangents}
    return x, d, c, u, ct

def attend(x, d, c):
{unpack}{body}

def run(x, d, c, u, ct):
{levels}
    with {mode}:
        return whole(x, d, u, ct)

if __name__ == "__main__":
    with jax.enable_x64({x64}):
        for r in range({rounds}):
            print(run(*inputs(r)))
"""


@dataclasses.dataclass
class Program:
    """A drawn program: its text, and what the oracle needs.

    Attributes:
      make: from (seed of an order, late) to the oracle's function (x, get) -> list of arrays.
      values: the oracle's function (x, get) -> [out, lse], without derivatives.
      has_lse: whether the second result is a log-sum-exp or its tangent.
      by_name: the results are a dictionary of what x has.
    """

    text: str
    draw: Drawing
    letters: str
    make: Callable[[int | None, bool], Callable]
    has_lse: bool
    values: Callable
    level_inputs: Callable[[Any, Any], tuple[list[Any], list[Any]]]

    @property
    def by_name(self) -> bool:
        return "r" in self.letters


def drawn(seed: int, number: int) -> Program:
    """The program of this number."""
    rng = np.random.default_rng([seed, number])
    kind = rng.choice(["call", "merge", "cache", "mesh"], p=[0.78, 0.06, 0.08, 0.08])
    return {"call": _call, "merge": _merge, "cache": _cache, "mesh": _mesh}[str(kind)](rng)


def _drawing(rng: np.random.Generator, letters: str, modes: bool = True) -> Drawing:
    pick = lambda options, p: options[int(rng.choice(len(options), p=p))]
    dtype = pick(["float32", "bfloat16", "float16", "float64"], [0.62, 0.12, 0.1, 0.16])
    mode = ""
    if modes and rng.random() < 0.2:
        mode = str(rng.choice([name for name in MODES if name and not (name == "disable_jit" and len(letters) > 1)]))
    top = 9 if len(letters) > 2 or mode == "disable_jit" else 24
    length = lambda: pick([0, 1, int(rng.integers(2, top + 1))], [0.02, 0.1, 0.88])
    T = length()
    S = T if rng.random() < 0.4 else length()
    if len(letters) < 2 and mode != "disable_jit" and rng.random() < 0.1:
        T, S = (int(rng.choice([65, 130, 257])) for _ in "TS")
    batch = tuple(int(rng.integers(1, 4)) for _ in range(pick([0, 1, 2, 3], [0.3, 0.4, 0.2, 0.1])))
    if rng.random() < 0.01 and batch:
        batch = (0, *batch[1:])
    if T * S > 2000:
        batch = batch[:1]
    K, G = int(rng.integers(1, 3)), int(rng.integers(1, 3))
    H, V = (int(rng.choice([1, 2, 3, 5, 8, 16])) for _ in "HV")
    if rng.random() < 0.01:
        V = 0
    x64 = dtype == "float64" or rng.random() < 0.15
    return Drawing(rng, Sizes(batch, T, S, K * G, K, H, V), dtype, x64, mode, order=len(letters))


def _letters(rng: np.random.Generator) -> str:
    options = ["", "r", "f", "fr", "rf", "rr", "ff", "frr", "rfr", "rrr", "ffr", "fff", "rff"]
    p = np.array([30, 30, 12, 4, 5, 5, 4] + [0.6] * 6)
    return options[int(rng.choice(len(options), p=p / p.sum()))]


def _call(rng: np.random.Generator) -> Program:
    letters = _letters(rng)
    draw = _drawing(rng, letters)
    z = draw.sizes
    if draw.chance(0.25) and draw.mode != "disable_jit" and z.T * z.S < 2000:
        draw.mapped = draw.between(1, 3)
    _query_key_value(draw)
    draw.one_sided = draw.chance(0.15) and draw.mode not in ("debug_nans", "debug_infs", "strict")
    options, problem = _options(draw)
    implementation = _implementation(draw, letters)
    if draw.chance(0.12) and options.get("mask"):
        block = draw.one_of([8, 16])
        whole = draw.chance(0.6)
        axes = f", batch={z.batch}, heads={z.N}" if whole else ""
        options["block_map"] = (
            f"BlockMap.build({options['mask']}, {z.T}, {z.S}{axes}, block_q={block}, block_k={block})"
        )
        if "xla.Config" in implementation:
            implementation = ', implementation="xla"'
    has_lse = draw.chance(0.7) and draw.mode != "debug_infs"
    text = "".join(f", {name}={value}" for name, value in options.items())
    text = f'    return attention(x["query"], x["key"], x["value"]{text}{implementation}, return_lse={has_lse})'
    program = _program(draw, letters, text + ("" if has_lse else ","), problem, has_lse)
    clean = not draw.mapped and draw.mode not in ("debug_nans", "debug_infs", "transfer")
    return _poisoned(program, problem) if clean and draw.chance(0.12) else program


def _poisoned(program: Program, problem: Problem) -> Program:
    """The program with NaN and infinities in every key, value and query that takes part in no visible pair."""
    draw, z = program.draw, problem.sizes
    lines, rounds = [], []
    space = executed(program.text.split("def attend(")[0])
    for r in range(draw.rounds):
        with space["jax"].enable_x64(draw.x64):
            _, d, c, _, _ = space["inputs"](r)
        known = {name: np.asarray(a) for name, a in {**d, **c}.items()}
        seen = np.ones((z.B, z.N, z.T, z.S), bool)
        if problem.visible is not None:
            seen = np.broadcast_to(np.asarray(problem.visible(Index(z), known.__getitem__), bool), seen.shape)
        keys = seen.reshape(z.B, z.K, z.N // z.K, z.T, z.S).any((2, 3)).swapaxes(1, 2)
        queries = seen.any(-1).swapaxes(1, 2)
        rounds.append([np.flatnonzero(~side).tolist() for side in (queries, keys, keys)])
    for n, (name, bad) in enumerate((("query", "nan"), ("key", "nan"), ("value", draw.one_of(["inf", "nan"])))):
        rows = f"np.array({[unseen[n] for unseen in rounds]}[r], int)"
        size = z.V if name == "value" else z.H
        lines.append(
            f"x['{name}'] = x['{name}'].reshape(-1, {size}).at[{rows}].set(jnp.{bad}).reshape(x['{name}'].shape)"
        )
    marker = "    u, ct = ["
    text = program.text.replace(marker, "".join(f"    {line}\n" for line in lines) + marker, 1)
    return dataclasses.replace(program, text=text)


def executed(text: str) -> dict[str, Any]:
    """The names that a program defines."""
    module = sys.modules["fuzzed"] = types.ModuleType("fuzzed")  # classes that it defines look for their module
    exec(compile(text, "<fuzzed>", "exec"), vars(module))
    return vars(module)


def _query_key_value(draw: Drawing) -> None:
    z = draw.sizes
    shapes = {"query": (*z.batch, z.T, z.N, z.H), "key": (*z.batch, z.S, z.K, z.H), "value": (*z.batch, z.S, z.K, z.V)}
    for name, shape in shapes.items():
        draw.floating(shape, draw.dtype, name=name)
    if draw.mapped and all(axis is None for axis in draw.x_axes.values()):
        axis = draw.between(-len(shapes["query"]) - 1, len(shapes["query"]))
        draw.x_axes["query"] = axis
        draw.x["query"] = f"normal({draw.number()}, {draw._grown(shapes['query'], axis)}, {draw.dtype!r})"


def _options(draw: Drawing) -> tuple[dict[str, str], Problem]:
    """Arguments of attention behind query, key and value, and the same in the words of the oracle."""
    z, options = draw.sizes, {}
    visible, scores, scale, sinks, dropout = None, (), None, None, None
    if draw.chance(0.3):
        options["scale"], scale = _scale(draw)
    draw.tiny = scale in (0.0, 1e-30)
    if draw.one_sided or draw.chance(0.85):
        text, visible = parts.mask(draw, draw.between(0, 4 if draw.chance(0.4) else 1))
        if draw.one_sided:
            text, other = f"Causal() & {text}", visible
            visible = lambda index, get: (index.k <= index.q) & np.asarray(other(index, get), bool)
        options["mask"] = text
    if draw.one_sided or draw.chance(0.5):
        made = [parts.score(draw) for _ in range(1 if draw.one_sided else draw.between(1, 3))]
        options["score"] = f"({', '.join(text for text, _ in made)},)"
        scores = tuple(rule for _, rule in made)
    if draw.chance(0.2):
        form = draw.one_of(["{}", "{} * 20.0", "{} - jnp.inf"] if draw.mode == "" else ["{}"])
        sinks = draw.floating((z.N,), draw.one_of(["float32", draw.dtype]), form)
        options["sinks"] = sinks
    if draw.chance(0.15):
        rate = draw.one_of([0.1, 0.5, 0.9])
        seed, read = draw.integer(0, 100)
        if not isinstance(read, str) and not draw.chance(0.9):
            seed, read = "-1", -1
        options["dropout"], dropout = f"Dropout({rate}, {seed})", (rate, read)
    return options, Problem(z, visible, scores, scale, sinks, dropout)


def _scale(draw: Drawing) -> tuple[str, Any]:
    kind = draw.one_of(["number", "numpy", "traced", "huge", "known"], [3, 1, 3, 1, 1])
    if kind == "huge":
        value = draw.one_of([0.0, -1.0, 1e-30] + [1e9, 3e4] * (draw.order < 2))  # their squares overflow
        return repr(value), value
    if kind == "traced":
        name = draw.floating((), draw.one_of(["float32", draw.dtype]))
        return name, name
    if kind == "known":
        name = draw.known_float((), "float32")
        return name, name
    value = draw.one_of([0.5, 1.0, 0.125])
    return (f"np.float32({value})" if kind == "numpy" else repr(value)), value


def _implementation(draw: Drawing, letters: str) -> str:
    z = draw.sizes
    blocks = lambda: draw.one_of([8, 16])
    options = {
        "": 0.37,
        ', implementation="cpu"': 0.15,
        ', implementation="xla"': 0.08,
        f", config=xla.Config(block_q={blocks()}, block_k={blocks()})": 0.25,
        ', implementation="reference"': 0.1,
    }
    if len(letters) < 2 and max(z.T, z.S) < 40 and draw.mode != "disable_jit" and draw.dtype != "float64":
        small = "block_q=16, block_k=16"
        options[f", config=triton.Config({small}, backward_{small.replace(' ', ' backward_')}, interpret=True)"] = 0.03
        options[f", config=mosaic_tpu.Config({small}, interpret=True)"] = 0.03
    return draw.one_of(list(options), list(options.values()))


def _merge(rng: np.random.Generator) -> Program:
    """Keys in several parts, each attended to alone, and merged in any order."""
    letters = _letters(rng)[:2]
    draw = _drawing(rng, letters, modes=False)
    draw.sizes = z = dataclasses.replace(draw.sizes, S=max(draw.sizes.S, 3))
    _query_key_value(draw)
    offset, left = draw.between(-z.T, z.S), draw.one_of([None, draw.between(0, 6)])
    cuts = sorted({0, z.S, *(draw.between(0, z.S) for _ in range(draw.between(1, 3)))})
    pieces = [(a, b) for a, b in zip(cuts, cuts[1:], strict=False)]
    pieces = [pieces[n] for n in rng.permutation(len(pieces))]
    cap = draw.chance(0.3)
    more = (", score=SoftCap(5.0)" if cap else "") + _implementation(draw, "xxx")

    def visible(index, get):
        seen = index.k <= index.q + offset
        return seen if left is None else seen & (index.k >= index.q + offset - left)

    body = f"""    q, mask = x["query"], lambda a: Window({left}, 0, {offset} - a)
    parts = [
        attention(q, *(x[name][..., a:b, :, :] for name in ("key", "value")), mask=mask(a), return_lse=True{more})
        for a, b in {pieces}
    ]
    made = parts[0]
    for part in parts[1:]:
        made = merge(*made, *part)
    return made"""
    scores = (parts.capped(5.0),) if cap else ()
    return _program(draw, letters, body, Problem(z, visible, scores), True)


def _cache(rng: np.random.Generator) -> Program:
    """A whole sequence through a cache in pieces of any length: the same as at once."""
    letters = str(rng.choice(["", "", "", "r"]))
    draw = _drawing(rng, letters)
    T = int(rng.integers(1, 14))
    draw.cached, draw.sizes = True, dataclasses.replace(draw.sizes, T=T, S=T)
    z = draw.sizes
    if draw.chance(0.3):
        draw.sizes = z = dataclasses.replace(z, batch=(1,))
    if 0 in (z.V, *z.batch) or draw.mode in ("disable_jit", "debug_infs"):
        draw.sizes, draw.mode = dataclasses.replace(z, V=max(z.V, 1), batch=tuple(max(n, 1) for n in z.batch)), ""
    z = draw.sizes
    _query_key_value(draw)
    window = draw.between(0, 5) if draw.chance(0.4) else None
    capacity = (
        draw.between((window or 0) + 1, T + 3) if window is not None and window + 1 <= T + 3 else T + draw.between(0, 4)
    )
    options, seen, scores = "", None, ()
    if draw.chance(0.7):
        text, seen = parts.mask(draw, draw.between(0, 2))
        options += f", mask={text}"
    if draw.chance(0.4):
        text, rule = parts.score(draw)
        options, scores = options + f", score={text}", (rule,)
    options += draw.one_of(["", "", ', implementation="cpu"', ', implementation="xla"'])
    cuts, at = [], 0
    while at < T:
        step = min(draw.one_of([1, 1, 2, 5]), T - at)
        cuts.append((at, at + step))
        at += step

    def visible(index, get):
        causal = index.k <= index.q
        causal = causal if window is None else causal & (index.k >= index.q - window)
        return causal if seen is None else causal & np.asarray(seen(index, get), bool)

    create = f"{z.batch}, {capacity}, {z.K}, {z.H}, value_size={z.V}, dtype={draw.dtype!r}, window={window}"
    body = f"""    cache, made = KVCache.create({create}), []
    for a, b in {cuts}:
        new = (t[..., a:b, :, :] for t in (x["query"], x["key"], x["value"]))
        out, cache = cache.attend(*new{options}, return_lse=True)
        made.append(out)
    return tuple(jnp.concatenate(t, axis) for t, axis in zip(zip(*made), (-3, -2)))"""
    return _program(draw, letters, body, Problem(z, visible, scores), True)


def _mesh(rng: np.random.Generator) -> Program:
    """Arrays divided over four simulated devices by batch entry and by head."""
    letters = str(rng.choice(["", "r", "r", "f", "fr"]))
    draw = _drawing(rng, letters, modes=False)
    draw.divided = True
    z = draw.sizes
    draw.sizes = dataclasses.replace(z, batch=(2, *z.batch[1:2]), N=4, K=draw.one_of([2, 4]), V=max(z.V, 1))
    if 0 in draw.sizes.batch:
        draw.sizes = dataclasses.replace(draw.sizes, batch=(2,))
    if draw.chance(0.2):
        draw.mapped = 2
    _query_key_value(draw)
    options, problem = _options(draw)
    if draw.mapped:  # the axis that is mapped may be the one that is divided
        for name in ("query", "key", "value"):
            draw.x_axes[name] = 0
            draw.x[name] = f"normal({draw.number()}, {(2, *_shape_of(draw, name))}, {draw.dtype!r})"
    text = "".join(f", {name}={value}" for name, value in options.items())
    implementation = draw.one_of(
        ["", ', implementation="cpu"', ', implementation="xla"', ', implementation="reference"']
    )
    text = f'    return attention(x["query"], x["key"], x["value"]{text}{implementation}, return_lse=True)'
    axis_type = draw.one_of(["Auto", "Explicit"])
    heads = draw.chance(0.6)
    return _program(draw, letters, text, problem, True, (axis_type, heads))


def _shape_of(draw: Drawing, name: str) -> tuple[int, ...]:
    z = draw.sizes
    return {"query": (*z.batch, z.T, z.N, z.H), "key": (*z.batch, z.S, z.K, z.H), "value": (*z.batch, z.S, z.K, z.V)}[
        name
    ]


def _program(
    draw: Drawing, letters: str, body: str, problem: Problem, has_lse: bool, mesh: tuple[str, bool] | None = None
) -> Program:
    """Puts together the text and the oracle's side."""
    z = draw.sizes
    entries = lambda names: ", ".join(f"{name}={text}" for name, text in names.items())
    rows = (*((draw.mapped,) if draw.mapped else ()), *z.batch, z.T, z.N)
    lse_dtype = draw.dtype if draw.dtype == "float64" else "float32"
    shapes = [((*rows, z.V), draw.dtype), *([(rows, lse_dtype)] if has_lse else [])]
    changes, spec = "", None
    if mesh is not None:
        # All that is mapped together must be divided alike: where more is mapped, another axis is divided.
        others = [*draw.x_axes.values(), *draw.d_axes.values()][3:]
        placed = "None, 'data'" if draw.mapped and any(axis is not None for axis in others) else "'data'"
        rank = len(rows) - 1 - len(placed.split(","))
        spec = f"P({placed}, *[None] * {rank}, {'model' if mesh[1] else None!r})"
        changes = f"""
    mesh = jax.make_mesh((2, 2), ("data", "model"), (AxisType.{mesh[0]},) * 2, devices=jax.devices()[:4])
    for name in ("query", "key", "value"):
        axes = [{placed}, *[None] * {rank}, {"'model'" if mesh[1] else None}, None]
        x[name] = jax.device_put(x[name], NamedSharding(mesh, P(*axes)))"""
    ct = ", ".join(
        f"normal({draw.number()}, {shape}, {dtype!r})"
        if spec is None
        else f"jax.device_put(normal({draw.number()}, {shape}, {dtype!r}), NamedSharding(mesh, {spec}))"
        for shape, dtype in shapes
    )
    tangents, cotangents, first = [], [], True
    for letter in letters:
        tangents.append(f"like({draw.number()}, x)" if letter == "f" else "None")
        cotangents.append((f"({ct},)" if first else f"like({draw.number()}, x)") if letter == "r" else "None")
        first = first and letter == "f"
    names = [(name, "x") for name in draw.x if name not in ("query", "key", "value")]
    names += [(name, "d") for name in draw.d] + [(name, "c") for name in draw.c]
    unpack = "".join(f"    {name} = {place}[{name!r}]\n" for name, place in names)
    mode = MODES[draw.mode] if mesh is None else "jax.set_mesh(x['query'].sharding.mesh)"
    text = PRELUDE.format(
        helpers="".join(draw.helpers),
        x=entries(draw.x),
        d=entries(draw.d),
        c=entries(draw.c),
        changes=changes,
        tangents=f"[{', '.join(tangents)}]",
        cotangents=f"[{', '.join(cotangents)}]",
        unpack=unpack,
        body=body,
        levels=_levels(draw, letters),
        mode=mode,
        x64=draw.x64,
        rounds=draw.rounds,
    )

    def make(order, late, results=1 + has_lse):
        one = lambda x, get: attend(problem, x, get, order_of(z, order), late)[:results]
        return one if not draw.mapped else mapped(one, draw.x_axes, draw.d_axes, draw.mapped)

    def level_inputs(u, ct):
        flat = lambda tree: tree if not isinstance(tree, dict) else [tree[name] for name in sorted(tree)]
        return u, [None if c is None else list(flat(c)) for c in ct]

    return Program(text, draw, letters, make, has_lse and "r" not in letters, make(None, False, 2), level_inputs)


def _levels(draw: Drawing, letters: str) -> str:
    """The transforms around the call, as text."""
    if draw.mapped:
        axes = f"({draw.x_axes!r}, {draw.d_axes!r})"
        lines = [f"f0 = lambda x, d: jax.vmap(lambda x, d: attend(x, d, c), in_axes={axes})(x, d)"]
        if draw.chance(0.2) and not draw.divided:
            pick = "{k: a if axes[k] is None else jnp.take(jnp.asarray(a), i, axes[k]) for k, a in tree.items()}"
            lines = [
                f"pick = lambda tree, axes, i: {pick}",
                f"one = lambda i, x, d: attend(pick(x, {draw.x_axes!r}, i), pick(d, {draw.d_axes!r}, i), c)",
                f"f0 = lambda x, d: jax.lax.map(lambda i: one(i, x, d), jnp.arange({draw.mapped}))",
            ]
    else:
        lines = ["f0 = lambda x, d: attend(x, d, c)"]
    lines.append("whole = lambda x, d, u, ct: f0(x, d)")
    wrap = lambda text: f"jax.{draw.one_of(['checkpoint', 'jit'])}({text})" if draw.chance(0.2) else text
    if letters:
        lines[-1] = f"g0 = lambda x, d, u, ct: {wrap('f0')}(x, d)"
    for n, letter in enumerate(letters):
        one = f"lambda x: g{n}(x, d, u, ct)"
        options = {
            "f": [f"jax.jvp({one}, (x,), (u[{n}],))[1]", f"jax.linearize({one}, x)[1](u[{n}])"],
            "r": [f"jax.vjp({one}, x)[1](ct[{n}])[0]"],
        }[letter]
        lines.append(f"g{n + 1} = lambda x, d, u, ct: {draw.one_of(options)}")
        if draw.chance(0.1):
            lines.append(f"h{n + 1} = g{n + 1}")
            lines.append(f"g{n + 1} = jax.jit(lambda x, d, u, ct: h{n + 1}(x, d, u, ct))")
    if letters:
        lines.append(f"whole = g{len(letters)}")
    if draw.chance(0.6) or len(letters) > 1:
        lines.append("whole = jax.jit(whole)")
    return "\n".join("    " + line for line in lines)


def answer(program: Program, u: Any, ct: Any) -> Callable:
    """The oracle's function of the whole program: from (order, late) to (x, get) -> list of arrays."""
    u, ct = program.level_inputs(u, ct)
    return lambda order, late: derived(program.make(order, late), program.letters, u, ct)
