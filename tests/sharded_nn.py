"""A program for test_nn.py: a stack of blocks divided over 8 simulated devices, and on one. Prints JSON lines."""

import collections
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from attnjax.nn import DecoderBlock, RoPE, Stack

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_disable_most_optimizations", True)  # compiled to be run once
MESH = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "model"))
RULES = (("embed", None), ("heads", "model"), ("size", None), ("mlp", "model"), ("vocab", "model"), ("layers", None))
MOVES = r" (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)[-\w]*\("
rng = np.random.default_rng(0)
x, context = (jnp.asarray(rng.normal(size=(4, length, 16)), jnp.float32) for length in (12, 8))


def make(rngs):
    return DecoderBlock(16, 8, 32, cross=True, attention=dict(rope=RoPE(), key_heads=4), rngs=rngs)


def gradients(params, x, context):
    """The value and all gradients, the one of x first."""
    loss = lambda params, x: jnp.sin(nnx.merge(graph, params, rest)(x, context)).sum()
    return jax.value_and_grad(loss, argnums=(1, 0))(params, x)


def parts(array):
    return len({str(shard.index) for shard in array.addressable_shards})


for name, scan in {"loop": False, "scan": True, "placed when made": False}.items():
    graph, params, rest = nnx.split(Stack(make, 2, scan=scan, rngs=nnx.Rngs(0)), nnx.Param, ...)
    want = jax.tree.leaves(jax.jit(gradients)(params, x, context))
    with nnx.logical_axis_rules(RULES):
        if name == "placed when made":
            with jax.set_mesh(MESH):
                placed = nnx.state(Stack(make, 2, scan=scan, rngs=nnx.Rngs(0)), nnx.Param)
        else:
            placed = jax.device_put(params, nnx.get_named_sharding(params, MESH))
    data = [jax.device_put(array, NamedSharding(MESH, P("data"))) for array in (x, context)]
    compiled = jax.jit(gradients).lower(placed, *data).compile()
    got = jax.tree.leaves(compiled(placed, *data))
    differ = lambda a, b: float(jnp.abs(np.asarray(a) - b).max() / (1 + jnp.abs(b).max()))
    block = placed["layers"] if scan else placed["layers"][0]
    kernels = dict(query=block["attention"]["query"]["kernel"], up=block["feed_forward"]["up"]["kernel"])
    kernels["norm"] = block["attention_norm"]["scale"]
    facts = {key: parts(variable[...]) for key, variable in kernels.items()} | {"x": parts(got[1])}
    moves = collections.Counter(re.findall(MOVES, compiled.as_text()))
    error = max(differ(a, b) for a, b in zip(got, want, strict=True))
    print(json.dumps({"name": name, "error": error, "parts": facts, "moves": moves}))
