"""A program for test_nn.py: blocks and models divided over 8 simulated devices, and on one. Prints JSON lines.

The stack of blocks runs on a mesh with Auto axes and on one with Explicit axes, the models on the latter.
"""

import collections
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from attnjax.models import (
    DecoderConfig,
    DecoderLM,
    Transformer,
    TransformerConfig,
    VisionConfig,
    VisionTransformer,
    generate,
)
from attnjax.nn import DecoderBlock, RoPE, Stack

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_disable_most_optimizations", True)  # compiled to be run once
KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
MESHES = {kind: jax.make_mesh((2, 4), ("data", "model"), axis_types=(own,) * 2) for kind, own in KINDS.items()}
RULES = dict(embed=None, heads="model", key_heads="model", size=None, mlp="model", vocab="model", layers=None)
FEW_KEY_HEADS = RULES | {"key_heads": None}  # fewer than devices: each has all of them
BY_DATA = FEW_KEY_HEADS | {"embed": "data"}  # every parameter is divided with the data, those of norms too
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


def report(name, got, want, **facts):
    pairs = [(np.asarray(a), np.asarray(b)) for a, b in zip(jax.tree.leaves(got), want, strict=True)]
    error = max(float(np.abs(a - b).max() / (1 + np.abs(b).max())) for a, b in pairs)
    print(json.dumps({"name": name, "error": error} | facts))


def divided(arrays, mesh):
    return [jax.device_put(array, NamedSharding(mesh, P("data"))) for array in arrays]


wanted = {}
for name, (kind, scan) in {
    "loop": ("auto", False),
    "scan": ("auto", True),
    "explicit, scan": ("explicit", True),
    "explicit, placed when made": ("explicit", False),
}.items():
    mesh = MESHES[kind]
    graph, params, rest = nnx.split(Stack(make, 2, scan=scan, rngs=nnx.Rngs(0)), nnx.Param, ...)
    if scan not in wanted:
        wanted[scan] = jax.tree.leaves(jax.jit(gradients)(params, x, context))
    with nnx.logical_axis_rules(RULES.items()):
        if "placed when made" in name:
            with jax.set_mesh(mesh):
                placed = nnx.state(Stack(make, 2, scan=scan, rngs=nnx.Rngs(0)), nnx.Param)
        else:
            placed = jax.device_put(params, nnx.get_named_sharding(params, mesh))
    data = divided((x, context), mesh)
    with jax.set_mesh(mesh):
        compiled = jax.jit(gradients).lower(placed, *data).compile()
        got = compiled(placed, *data)
    block = placed["layers"] if scan else placed["layers"][0]
    kernels = dict(query=block["attention"]["query"]["kernel"], up=block["feed_forward"]["up"]["kernel"])
    kernels["norm"] = block["attention_norm"]["scale"]
    facts = {key: parts(variable[...]) for key, variable in kernels.items()} | {"x": parts(got[1][0])}
    moves = collections.Counter(re.findall(MOVES, compiled.as_text()))
    report(name, got, wanted[scan], parts=facts, moves=moves)


def decoded(model, tokens):
    """Logits of a prompt and of two more tokens, one by one, with caches that were made undivided."""
    caches, outs = model.create_caches(4, 8), []
    for piece in jnp.split(tokens, [4, 5], axis=1):
        out, caches = model(piece, caches=caches)
        outs.append(out)
    return jnp.concatenate(outs, 1)


small = dict(features=16, num_heads=4)
tokens = jnp.asarray(rng.integers(0, 24, (4, 6)), jnp.int32)
images = jnp.asarray(rng.normal(size=(4, 4, 4, 1)), jnp.float32)
decoder = lambda **more: lambda: DecoderLM(DecoderConfig(24, num_layers=1, **small, **more), rngs=nnx.Rngs(0))
translator = TransformerConfig(24, **small, hidden=32, encoder_layers=1, decoder_layers=1, dropout=0.0)
vision = VisionConfig((4, 4), (2, 2), 8, num_layers=1, channels=1, **small)
call = lambda model, *inputs: model(*inputs)
grouped = decoder(positions=RoPE(), key_heads=2)
ring = decoder(positions=RoPE(), key_heads=2, tie_embeddings=False, windows=(3,))
MODELS = {
    "packed": (grouped, lambda m, x: m(x, segments=x // 12), [tokens], {}),
    "learned positions, tied": (decoder(max_length=8), call, [tokens], BY_DATA),
    "caches": (grouped, decoded, [tokens], FEW_KEY_HEADS),
    "rings": (ring, decoded, [tokens], BY_DATA),
    "encoder and decoder": (lambda: Transformer(translator, rngs=nnx.Rngs(0)), call, [tokens, tokens], FEW_KEY_HEADS),
    "vision": (lambda: VisionTransformer(vision, rngs=nnx.Rngs(0)), call, [images], BY_DATA),
}


def compare(name, make, call, inputs, rules):
    graph, params, rest = nnx.split(make(), nnx.Param, ...)

    def loss(params, *inputs):
        logits = call(nnx.merge(graph, params, rest), *inputs)
        return jnp.sin(logits).sum(), logits

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    want = jax.tree.leaves(step(params, *inputs))
    with jax.set_mesh(MESHES["explicit"]), nnx.logical_axis_rules(rules.items()):
        (value, logits), gradients = step(nnx.state(make(), nnx.Param), *divided(inputs, MESHES["explicit"]))
    report(name, ((value, logits), gradients), want, batch=jax.typeof(logits).sharding.spec[0])


for name, model in MODELS.items():
    compare(name, *model)
run = lambda: generate(ring(), np.asarray(tokens), max_new_tokens=3, stop_tokens=[]).tokens
want = run()
with jax.set_mesh(MESHES["explicit"]), nnx.logical_axis_rules(BY_DATA.items()):
    report("generation", run(), [want])
