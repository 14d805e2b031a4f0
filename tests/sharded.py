"""A program for test_sharding.py: attention divided over 8 simulated devices, and on one. Prints a JSON line per case.

Every case runs on a mesh with Auto axes, where XLA decides how results lie, and on one with Explicit axes, where their
types say it. What is to come out is computed once, by one implementation on one device.
"""

import collections
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import attnjax as aj

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_disable_most_optimizations", True)  # compiled to be run once
KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
MESHES = {kind: jax.make_mesh((2, 4), ("data", "model"), axis_types=(own,) * 2) for kind, own in KINDS.items()}
B, T, N, K, H = 4, 24, 8, 4, 8
rng = np.random.default_rng(0)
normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
q, k, v = normal(B, T, N, H), normal(B, T, K, H), normal(B, T, K, H)
bias, slopes, sinks = normal(N, T, T), normal(N), normal(N)
ids = jnp.asarray(np.sort(rng.integers(0, 3, (B, T))), jnp.int32)
ALL = (q, k, v, bias, slopes, sinks, ids, jnp.int32(3))
FLOATS = tuple(range(6))
one_head, two_heads = (k[:, :, :1], v[:, :, :1]), (k[:, :, :2], v[:, :, :2])  # fewer than devices
twelve, *six_heads = normal(B, T, 12, H), normal(B, T, 6, H), normal(B, T, 6, H)
wide = tuple(np.asarray(x, {"f": np.float64, "i": np.int64}[x.dtype.kind]) for x in ALL)
cap = 2 + jnp.abs(normal(B))  # of each batch entry, and not divided

BOTH, DATA, MODEL, NONE = P("data", None, "model"), P("data"), P("model"), P()
DIVIDED = (BOTH, BOTH, BOTH, MODEL, MODEL, MODEL, DATA, NONE)
SHARED = (DATA, DATA, DATA, NONE, NONE, NONE, DATA, NONE)


def cases(implementation):
    """By name: a function, its arguments, how they lie; and another function that gives the same on one device."""
    attend = lambda q, k, v, **more: aj.attention(q, k, v, implementation=implementation, **more)
    by_head = aj.Where(lambda b, h, q, k: (q + h) % 3 != k % 3)
    called = lambda *at: jax.pure_callback(
        np.greater_equal, jax.ShapeDtypeStruct((), bool), *at, vmap_method="broadcast_all"
    )
    by_python = aj.Where(lambda b, h, q, k: called(q, k))

    def everything(q, k, v, bias, slopes, sinks, ids, seed=None):
        mask, score = aj.Causal() & aj.Segments(ids), (aj.Bias(bias), aj.ALiBi(slopes))
        dropout = None if seed is None else aj.Dropout(0.3, seed)
        return attend(q, k, v, mask=mask, score=score, sinks=sinks, dropout=dropout, return_lse=True)

    def loss(*args):
        out, lse = everything(*args)
        return jnp.sin(out).sum() + jnp.sin(lse).sum()

    def by_hand(*args):
        """The loss with `shard_map`: each device calls attention for its own share."""
        out, lse = jax.shard_map(everything, in_specs=DIVIDED[:7], out_specs=(BOTH, BOTH))(*args)
        return jnp.sin(out).sum() + jnp.sin(lse).sum()

    def product(*args):
        """A derivative of the gradient."""
        gradient = lambda q, bias: jax.grad(loss, argnums=(0, 3))(q, *args[1:3], bias, *args[4:])
        return jax.jvp(gradient, (args[0], args[3]), (args[0], args[3]))[1]

    def turned(q, k, v, cap):
        """A gradient of a derivative, which is a program of its own."""
        capped = lambda q, cap: attend(q, k, v, score=aj.SoftCap(cap))
        tangent = jax.jit(lambda q, cap: jax.jvp(capped, (q, cap), (q, cap))[1])
        return jax.grad(lambda *args: jnp.sin(tangent(*args)).sum(), argnums=(0, 1))(q, cap)

    gradient = jax.grad(loss, argnums=FLOATS)
    with_value = lambda f: jax.value_and_grad(f, argnums=FLOATS)
    tangent = lambda q, k, v: jax.jvp(attend, (q, k, v), (2 * q, v, k))
    mapped = jax.vmap(gradient, in_axes=(0, None, None, None, None, None, 0))
    return {
        "forward by batch and head": (everything, ALL, DIVIDED),
        "gradient by batch": (gradient, ALL, SHARED),
        "gradient by batch and head": (gradient, ALL, DIVIDED),
        "gradient with one key head": (gradient, (q, *one_head, *ALL[3:]), (BOTH, DATA, DATA, *DIVIDED[3:])),
        "gradient with two key heads": (gradient, (q, *two_heads, *ALL[3:]), (BOTH, DATA, DATA, *DIVIDED[3:])),
        "forward in 64 bits": (everything, wide, DIVIDED),
        "tangent": (tangent, (q, k, v), (BOTH,) * 3),
        "second order": (product, ALL, DIVIDED),
        "second order, turned": (turned, (q, k, v, cap), (BOTH, BOTH, BOTH, NONE)),
        "vmap of gradient": (mapped, (q, k[0], v[0], *ALL[3:7]), (DATA, NONE, NONE, NONE, NONE, NONE, DATA)),
        "key heads that do not divide": (attend, (twelve, *six_heads), (BOTH, DATA, DATA)),
        "function of heads": (lambda q, k, v: attend(q, k, v, mask=by_head), (q, k, v), (BOTH,) * 3),
        "no keys": (attend, (q, k[:, :0], v[:, :0]), (BOTH,) * 3),
        "by Python": (lambda q, k, v: attend(q, k, v, mask=by_python), (q, k, v), (BOTH,) * 3),
        "by position": (attend, (q, k, v), (P(None, "data"),) * 3),
        "shard_map": (with_value(by_hand), ALL[:7], DIVIDED[:7], with_value(loss)),
    }


MOVES = r" (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)[-\w]*\("
# How work is divided does not depend on the implementation: another one is asked for what it computes itself.
CPU = ("forward by batch and head", "gradient by batch and head", "gradient with two key heads", "forward in 64 bits")
RUN = {"xla": [*cases("xla")], "cpu": [*CPU, "shard_map"], "reference": ["second order", "second order, turned"]}


def shares(array):
    """Into how many different parts an array is cut."""
    return len({str(shard.index) for shard in array.addressable_shards})


def parts(spec):
    """The same as a type tells it."""
    return math.prod(MESHES["explicit"].shape[name] for name in spec if name)


def error(got, want):
    got, want = np.asarray(got), np.asarray(want)
    return float(np.abs(got - want).max() / (1 + np.abs(want).max()))


def run(name, want, function, arguments, specs):
    """Prints what a case gives on each mesh."""
    for kind, mesh in MESHES.items():
        placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arguments, specs, strict=True)]
        case = {"name": f"{kind} {name}"}
        with jax.set_mesh(mesh):
            try:
                traced = jax.jit(function).trace(*placed)
                compiled = traced.lower().compile()
            except (ValueError, NotImplementedError) as refusal:
                print(json.dumps(case | {"refused": str(refusal)}))
                continue
            got = jax.tree.leaves(compiled(*placed))
        if kind == "explicit":
            case["typed"] = [parts(x.sharding.spec) for x in jax.tree.leaves(traced.out_info)]
        case["error"] = max(error(a, b) for a, b in zip(got, want, strict=True))
        case["moves"] = collections.Counter(re.findall(MOVES, compiled.as_text()))
        print(json.dumps(case | {"shares": [shares(x) for x in got]}))


for name, (function, arguments, _, *same) in cases("xla").items():
    with jax.enable_x64("64 bits" in name):  # XLA asks for a device's share on a thread that is not told
        want = jax.tree.leaves(jax.jit(*(same or [function]))(*arguments))
        for implementation, names in RUN.items():
            if name in names:
                run(f"{implementation} {name}", want, *cases(implementation)[name][:3])
