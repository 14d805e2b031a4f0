"""`jax.export` with sizes that are symbols: one program for all numbers of batch entries, queries and keys."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export
from problems import FAST_COMPILE

import attnjax as aj
from attnjax.kernels import xla
from attnjax.models import DecoderConfig, DecoderLM
from attnjax.nn import RoPE
from attnjax.profiling import temporary_bytes

B, T, S = export.symbolic_shape("b, t, s")
N, K, H, V = 4, 2, 5, 3
CONFIG = xla.Config(block_q=4, block_k=4)
FLOATS = {
    "query": (B, T, N, H),
    "key": (B, S, K, H),
    "value": (B, S, K, V),
    "bias": (N, T, S),
    "slopes": (N,),
    "table": (8, N),
    "cap": (B,),
    "gains": (S,),
    "sinks": (N,),
}
INTEGERS = {"lengths": (B,), "queries": (B, T), "keys": (B, S)}


def described(shapes, dtype):
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()}


def drawn(*sizes):
    rng, known = np.random.default_rng(0), dict(zip("bts", sizes, strict=True))
    of = lambda shape: tuple(known.get(str(size), size) for size in shape)
    x = {name: jnp.asarray(rng.normal(size=of(shape)), jnp.float32) for name, shape in FLOATS.items()}
    d = {name: jnp.asarray(np.sort(rng.integers(0, 3, of(shape))), jnp.int32) for name, shape in INTEGERS.items()}
    return x | {"cap": 2 + x["cap"] ** 2}, d | {"lengths": jnp.minimum(1 + d["lengths"], sizes[2])}


def padded(x, d):
    """What models have: padding, packed documents, a window around the last query; what is added to logits."""
    mask = (aj.Window.aligned_end(5, 1) | aj.Prefix(1)) & aj.Segments(d["queries"], d["keys"])
    scores = (aj.SoftCap(x["cap"]), aj.Bias(x["bias"]), aj.ALiBi(x["slopes"]), aj.RelativeBias(x["table"]))
    return dict(mask=mask & aj.Lengths(key=d["lengths"]), score=scores, sinks=x["sinks"])


def functions(x, d):
    """Functions of indices, an array of pairs, dropout."""
    where = aj.Where(lambda b, h, q, k: (b + h + q + k) % 3 != 0, scan=True)
    score = aj.ScoreFn(lambda s, b, h, q, k: s + jnp.sin(s) * x["gains"][k])
    dense = d["queries"][:, None, :, None] != d["keys"][:, None, None, :] + 1
    return dict(mask=(where & dense) | aj.Chunked(2), score=score, dropout=aj.Dropout(0.3, seed=3))


def value_and_gradients(options, x, d, **chosen):
    def call(x):
        made = aj.attention(x["query"], x["key"], x["value"], **options(x, d), return_lse=True, **chosen)
        return (jnp.sin(made[0]).sum() + jnp.where(made[1] > -jnp.inf, made[1], 0).sum()), made

    gradients, made = jax.grad(call, has_aux=True)(x)
    return made, gradients


def exported(function, platforms=("cpu",)):
    """Through bytes and back."""
    options = jax.jit(function, compiler_options=FAST_COMPILE)
    program = export.export(options, platforms=platforms)(
        described(FLOATS, jnp.float32), described(INTEGERS, jnp.int32)
    )
    return export.deserialize(program.serialize())


CALLS = {
    "padded": (padded, "xla", ("cpu", "cuda", "tpu"), [(1, 1, 1), (2, 6, 9)]),
    "functions": (functions, "xla", ("cpu",), [(3, 8, 6)]),
    "reference": (padded, "reference", ("cpu",), [(2, 6, 9)]),
}


@pytest.mark.parametrize("options, implementation, platforms, sizes", CALLS.values(), ids=CALLS)
def test_one_program_for_all_sizes(options, implementation, platforms, sizes):
    """Value and gradients are those of a call with known sizes: of one pair, of tiles with a rest, of whole tiles."""
    config = CONFIG if implementation == "xla" else None
    function = functools.partial(value_and_gradients, options, implementation=implementation, config=config)
    program = exported(function, platforms)
    plain = functools.partial(value_and_gradients, options, implementation="reference")
    for each in sizes:
        x, d = drawn(*each)
        got, want = program.call(x, d), jax.jit(plain, compiler_options=FAST_COMPILE)(x, d)
        compare = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5, err_msg=str(each))
        jax.tree.map(compare, got, want)


def test_the_memory_is_linear():
    """Where no implementation is named, and blocks have their usual sizes. The T x S matrix alone takes 64 MiB."""
    loss = lambda q, k, v: aj.attention(q, k, v, mask=aj.Causal()).sum()
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((B, T, 1, 8), (B, S, 1, 8), (B, S, 1, 8))]
    program = export.export(jax.jit(jax.grad(loss, (0, 1, 2))))(*shapes)
    assert temporary_bytes(program.call, *[jax.ShapeDtypeStruct((1, 4096, 1, 8), jnp.float32)] * 3) < 2**24


def test_sizes_that_must_be_known():
    x = {name: jax.ShapeDtypeStruct(FLOATS[name], jnp.float32) for name in ("query", "key", "value")}
    call = lambda x, **options: export.export(jax.jit(functools.partial(plain, **options)))(x)
    plain = lambda x, **options: aj.attention(x["query"], x["key"], x["value"], **options)
    for name in ("cpu", "mosaic_tpu", "triton"):
        with pytest.raises(
            NotImplementedError, match=f"'{name}' cannot: needs sizes that are known.*xla, reference can"
        ):
            call(x, implementation=name)
    heads = {name: jax.ShapeDtypeStruct((B, 8, S, 4), jnp.float32) for name in x}
    with pytest.raises(ValueError, match=r"query \[b, 8, s, 4\]: s is a symbol where the number of heads"):
        call(heads)
    with pytest.raises(ValueError, match=r"explain: query \[b, t, 4, 5\].*symbols: give sizes that are known"):
        aj.explain(*x.values())
    empty = lambda x: aj.attention(x, x[1:], x[1:])
    with pytest.raises(ValueError, match=r"key \[t - 1, 2, 4\]: t - 1 may be 0.*at least 1.*constraints"):
        export.export(jax.jit(empty))(jax.ShapeDtypeStruct((T, 2, 4), jnp.float32))


def test_a_language_model():
    """What modules do with the number of tokens, too."""
    config = DecoderConfig(16, features=8, num_heads=2, num_layers=1, hidden=8, positions=RoPE())
    model = DecoderLM(config, rngs=nnx.Rngs(0))
    call = jax.jit(lambda tokens: model(tokens), compiler_options=FAST_COMPILE)
    program = export.export(call)(jax.ShapeDtypeStruct((B, T), jnp.int32))
    tokens = jnp.arange(14, dtype=jnp.int32).reshape(2, 7)
    np.testing.assert_allclose(program.call(tokens), call(tokens), rtol=1e-4, atol=1e-5)
