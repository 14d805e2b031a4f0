"""implementation="cudnn": what it takes and refuses, the calls it writes, and its numbers by a stand-in, or on a GPU.

The stand-in does what cuDNN's documentation says for the call it is given, and no more: NaN in the rows that cuDNN is
free to leave as they are. What it cannot tell is whether cuDNN does it too: where JAX has a GPU, cuDNN itself runs.
"""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import MaskCase, ScoreCase
from draws import integers, nothing
from oracle import Index, Shape, worst
from problems import ON_GPU, Case, attend, draw, expect

import attnjax as aj
from attnjax.attention import build
from attnjax.core.dispatch import choose
from attnjax.core.softmax import log_sum_exp
from attnjax.kernels import cudnn

HALF, T, S, N, K, H = jnp.bfloat16, 37, 37, 6, 2, 16


def shapes(dtype=HALF, queries=256, keys=256, heads=4, key_heads=4, size=64, value_size=None):
    like = lambda *shape: jax.ShapeDtypeStruct((2, *shape), dtype)
    return (
        like(queries, heads, size),
        like(keys, key_heads, size),
        like(keys, key_heads, value_size or size),
    )


def on(kind):
    """As if compiled for a GPU of this kind."""
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=1, platform="gpu")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))


def reason(part="forward", kind="NVIDIA H200", given=None, **options):
    problem, operands = build(*(given or shapes()), **({"return_lse": False} | options))
    with on(kind):
        return cudnn.unsupported(problem, operands, "cuda", part)


N_KEYS = jax.ShapeDtypeStruct((2,), jnp.int32)
TAKEN = {
    "full": None,
    "causal": aj.Causal(),
    "causal_end": aj.Causal.aligned_end(),
    "window": aj.Window(7, 0),
    "window_causal": aj.Window(7, 30) & aj.Causal(),
    "window_everything": aj.Window(400, 400),
    "lengths": aj.Lengths(key=N_KEYS, query=17),
    "all": aj.Causal() & aj.Window(7) & aj.Lengths(N_KEYS) & aj.Lengths(query=N_KEYS),
}


@pytest.mark.parametrize("mask", TAKEN.values(), ids=TAKEN)
@pytest.mark.parametrize("kind", ["NVIDIA H200", "NVIDIA H100 80GB HBM3", "NVIDIA GH200 480GB", "NVIDIA B200"])
def test_what_it_takes(mask, kind):
    for dtype in (jnp.float16, jnp.bfloat16):
        given = shapes(dtype, heads=8, key_heads=2)
        assert reason(kind=kind, given=given, mask=mask) is None
        assert reason("backward", kind, given, mask=mask, implementation="cudnn") is None


REFUSED = {
    "runs on Hopper and datacenter Blackwell GPUs .*, not on NVIDIA A100-SXM4-80GB .8.0.$": dict(
        kind="NVIDIA A100-SXM4-80GB"
    ),
    "not on NVIDIA RTX PRO 6000 Blackwell": dict(kind="NVIDIA RTX PRO 6000 Blackwell"),
    "takes head sizes up to 128 on NVIDIA B200$": dict(kind="NVIDIA B200", given=shapes(size=192)),
    "takes bfloat16 and float16, not float32$": dict(given=shapes(jnp.float32)),
    "takes head sizes that are multiples of 8, up to 256$": dict(given=shapes(size=60)),
    "takes head sizes that are .*, up to 256$": dict(given=shapes(size=264)),
    "takes one head size for keys and values$": dict(given=shapes(value_size=32)),
    "takes two queries and keys or more$": dict(given=shapes(queries=1)),
    "takes no scores$": dict(score=aj.SoftCap(3.0)),
    "takes no sinks$": dict(sinks=jax.ShapeDtypeStruct((4,), jnp.float32)),
    "takes no dropout$": dict(dropout=aj.Dropout(0.1, 0)),
    "takes no block_map": dict(
        mask=aj.Causal(), block_map=aj.BlockMap.build(aj.Causal(), 256, 256, block_q=64, block_k=64)
    ),
    "would read Dense as a T x S bias$": dict(mask=jax.ShapeDtypeStruct((256, 256), jnp.bool_)),
    "would read Segments as a T x S bias$": dict(
        mask=aj.Segments(jax.ShapeDtypeStruct((256,), jnp.int32)) & aj.Causal()
    ),
    "would read Or as a T x S bias$": dict(mask=aj.Causal() | aj.Prefix(3)),
    "takes Causal with Python numbers, not with arrays$": dict(mask=aj.Causal(jax.ShapeDtypeStruct((), jnp.int32))),
    "takes causal masks and windows that end at s = t": dict(mask=aj.Causal(1)),
    "takes .* that end at s = t, the first query at the first key$": dict(
        mask=aj.Causal.aligned_end(), given=shapes(queries=128)
    ),
    "takes causal masks and windows that end at": dict(mask=aj.Window(5, 5)),
    "takes windows of keys up to the query's own": dict(mask=aj.Window(5)),
    "up to the query's own, for at least as many keys as queries$": dict(mask=aj.Window(5, 0), given=shapes(keys=128)),
    "has forward and backward; other derivatives are those of the tiled code$": dict(part="tangent"),
    "has no gradient of the log-sum-exp, which is returned here$": dict(part="backward", return_lse=True),
    "does not give the same gradient to the last bit every time; ask for it by name$": dict(part="backward"),
}


@pytest.mark.parametrize("given", REFUSED.items(), ids=[name[:50] for name in REFUSED])
def test_what_it_refuses(given):
    text, options = given
    found = reason(**options)
    assert found and re.search(text, found), found


def test_where_the_device_is_not_known_or_no_gpu():
    problem, operands = build(*shapes())
    assert "which GPU this is compiled for is not known here" in cudnn.unsupported(problem, operands, "cuda", "forward")
    assert cudnn.unsupported(problem, operands, "tpu", "forward") == "runs on NVIDIA GPUs only, not on tpu"
    with pytest.raises(
        NotImplementedError, match="implementation 'cudnn' cannot: runs on NVIDIA GPUs only, not on cpu"
    ):
        aj.explain(*shapes(), implementation="cudnn", platform="cpu")


def test_the_gpu_of_this_machine(monkeypatch):
    """Where JAX has GPUs they decide, all of them."""

    class Device:
        device_kind, compute_capability = "NVIDIA H200", "9.0"

    class Old(Device):
        device_kind, compute_capability = "NVIDIA L40", "8.9"

    problem, operands = build(*shapes(size=256))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [Device()] * 2)
    assert cudnn.unsupported(problem, operands, "cuda", "forward") is None
    monkeypatch.setattr(jax, "local_devices", lambda: [Device(), Old()])
    found = cudnn.unsupported(problem, operands, "cuda", "forward")
    assert found.endswith("not on NVIDIA L40 (8.9)")


def test_what_explain_says():
    with on("NVIDIA H200"):
        found = aj.explain(*shapes(), mask=aj.Causal(), platform="cuda")
        named = aj.explain(*shapes(), mask=aj.Causal(), platform="cuda", implementation="cudnn")
        problem, operands = build(*shapes())
        exported = choose(problem, operands, "cuda", "forward", exported=True)
    assert found.choices["forward"].name == "cudnn" and found.choices["backward"].name != "cudnn"
    assert "ask for it by name" in found.choices["backward"].reasons["cudnn"]
    assert "tiles   chosen by the implementation" in str(found)
    assert {part: named.choices[part].name for part in ("forward", "backward")} == dict.fromkeys(cudnn.PARTS, "cudnn")
    assert named.choices["tangent"].name == "xla"
    assert exported.reasons["cudnn"] == "jax.export: the program may run on a GPU for which cuDNN is not used"


def test_the_calls_that_are_written():
    """In a program for CUDA, made here: cuDNN's calls, and nothing of the size of T x S."""
    mask = lambda n: aj.Causal() & aj.Window(100, 0) & aj.Lengths(key=n)
    loss = lambda q, k, v, n: aj.attention(q, k, v, mask=mask(n), implementation="cudnn").astype(jnp.float32).sum()
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    with on("NVIDIA H200"):
        text = gradient.trace(*shapes(), N_KEYS).lower(lowering_platforms=("cuda",)).as_text()
    assert re.findall(r"@(__cudnn\$\w+)", text) == ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]
    assert "256x256x" not in text
    config = json.loads(re.search(r'backend_config = "(.*?)", ', text)[1].replace(r"\22", '"'))[
        "cudnn_fmha_backend_config"
    ]
    told = {name: config[name] for name in ("mask_type", "sliding_window_length", "fmha_scale")}
    assert told == {"mask_type": "PADDING_CAUSAL", "sliding_window_length": 101, "fmha_scale": 0.125}


def stand_in(name, results, *, output_layouts, custom_call_api_version, legacy_backend_config):
    """cuDNN, from its documentation: softmax(scale q k^T) v under the mask that the config names, and its backward."""
    config = json.loads(legacy_backend_config)["cudnn_fmha_backend_config"]
    padded, causal = "PADDING" in config["mask_type"], "CAUSAL" in config["mask_type"]
    wide = jnp.float32

    def run(*given):
        *arrays, query_length, key_length = given if padded else (*given, None, None)
        q, k, v = (x.astype(wide) for x in arrays[:3])
        group = q.shape[2] // k.shape[2]
        k, v = (x.repeat(group, axis=2) for x in (k, v))
        t, s = jnp.arange(q.shape[1])[:, None], jnp.arange(k.shape[1])
        seen = jnp.ones((q.shape[0], 1, q.shape[1], k.shape[1]), bool)
        rows, columns = jnp.ones(q.shape[:2], bool), jnp.ones(k.shape[:2], bool)
        if causal:
            seen &= s <= t
        if config["sliding_window_length"]:
            seen &= s > t - config["sliding_window_length"]
        if padded:
            rows, columns = t[:, 0] < query_length[:, None], s < key_length[:, None]
            seen &= columns[:, None, None, :]
        free = lambda x, some: jnp.where(some[..., None, None], x, jnp.nan)  # what cuDNN may leave unwritten
        logits = jnp.where(seen, jnp.einsum("btnh,bsnh->bnts", q, k) * config["fmha_scale"], -jnp.inf)
        if not name.endswith("Backward"):
            stat = jax.nn.logsumexp(logits, axis=-1)
            out = jnp.einsum("bnts,bsnh->btnh", jnp.exp(logits - stat[..., None]), v)
            made = [free(out, rows).swapaxes(1, 2), jnp.where(rows[:, None], stat, jnp.nan)]
        else:
            stat, ct_out, out = (x.astype(wide) for x in arrays[3:])
            ct_out, out = (jnp.where(rows[..., None, None], x, 0) for x in (ct_out, out))
            weights = jnp.where(rows[:, None, :, None], jnp.exp(logits - stat[..., None]), 0)
            delta = (ct_out * out).sum(-1).swapaxes(1, 2)
            d_logits = weights * (jnp.einsum("btnh,bsnh->bnts", ct_out, v) - delta[..., None]) * config["fmha_scale"]
            d_query = jnp.einsum("bnts,bsnh->btnh", d_logits, k)
            d_key = jnp.einsum("bnts,btnh->bsnh", d_logits, q)
            d_value = jnp.einsum("bnts,btnh->bsnh", weights, ct_out)
            d_key, d_value = (x.reshape(*x.shape[:2], -1, group, x.shape[-1]).sum(3) for x in (d_key, d_value))
            made = [free(d_query, rows), free(d_key, columns), free(d_value, columns)]
            made = [x.swapaxes(1, 2) for x in made]
        made.append(jnp.zeros((0,), jnp.uint8))
        return [x.astype(r.dtype) for x, r in zip(made, results, strict=True)]

    return run


PLAIN = ScoreCase("plain", lambda x: None, lambda s, i, x: s)
everyone = lambda i, d: np.bool_(True)
left = lambda i: (i.q - 5 <= i.k) & (i.k <= i.q)
short = lambda i, d: (i.k < i.per(d["a"])) & (i.q < i.per(d["b"]))
both = ("a", "b")
MASKS = [
    MaskCase("full", lambda d: None, everyone),
    MaskCase("causal", lambda d: aj.Causal(), lambda i, d: i.k <= i.q),
    MaskCase("window", lambda d: aj.Window(5, 0), lambda i, d: left(i)),
    MaskCase("lengths", lambda d: aj.Lengths(d["a"], d["b"]), short, integers(0, 30, "", ""), both),
    MaskCase(
        "causal_lengths",
        lambda d: aj.Causal() & aj.Lengths(d["a"], d["b"]),
        lambda i, d: short(i, d) & (i.k <= i.q),
        integers(0, 30, "", ""),
        both,
    ),
    MaskCase(
        "window_lengths",
        lambda d: aj.Window(5, 0) & aj.Lengths(key=d["a"]),
        lambda i, d: (i.k < i.per(d["a"])) & left(i),
        integers(0, 30, ""),
        ("a",),
    ),
    MaskCase("no_keys", lambda d: aj.Lengths(key=0), lambda i, d: np.bool_(False), nothing),
]
SIZES = {"square": (37, 37), "more_keys": (37, 53), "more_queries": (53, 37)}


@pytest.fixture
def call(monkeypatch):
    """The stand-in in the place of cuDNN; nothing where there is a GPU."""
    if ON_GPU:
        return
    monkeypatch.setattr(jax.ffi, "ffi_call", stand_in)
    monkeypatch.setattr(cudnn, "_unsupported_device", lambda problem: None)


@pytest.mark.device
@pytest.mark.parametrize("mask", MASKS, ids=repr)
@pytest.mark.parametrize("lengths", SIZES.values(), ids=SIZES)
def test_numbers_of_the_stand_in(mask, lengths, call):
    """Forward and backward against the oracle, with NaN in all that nobody sees."""
    case = Case(mask, PLAIN, Shape((2, 2), *lengths, N, K, H, H))
    inputs = draw(case, "bfloat16")
    want = expect(case, inputs)
    seen = np.broadcast_to(
        mask.rule(Index(case.shape), {n: np.asarray(a) for n, a in inputs.d.items()}), _pairs(case.shape)
    )
    x = dict(inputs.x) | {
        name: _poisoned(inputs.x[name], seen.any(axes), case.shape)
        for name, axes in (("query", (1, 3)), ("key", (1, 2)), ("value", (1, 2)))
    }
    problem, operands = build(
        x["query"], x["key"], x["value"], mask=mask.mask(inputs.d), return_lse=False, implementation="cudnn"
    )
    refusals = {cudnn.unsupported(problem, operands, "cuda", part) for part in cudnn.PARTS}
    if mask.name.startswith("window") and lengths == SIZES["more_queries"]:
        assert all("at least as many keys as queries" in str(refusal) for refusal in refusals)
        return
    assert refusals == {None}
    rows = cudnn.forward(problem, operands, "cuda")
    wanted = tuple((i, tuple(operands[i].shape)) for i in range(3))
    ct_out = inputs.cotangents[0]
    gradients = cudnn.backward(problem, operands, rows, ct_out, jnp.zeros_like(rows.total), wanted)
    lse = np.asarray(log_sum_exp(rows.highest, rows.total))
    for name in ("out", "lse"):
        one, other = np.asarray({"out": rows.out, "lse": lse}[name]), getattr(want.answer, name)
        np.testing.assert_array_equal(np.isneginf(one), np.isneginf(other))
        assert worst(one, other) <= getattr(want.allowed, name), name
    plain = expect(case, inputs._replace(cotangents=(ct_out, jnp.zeros_like(inputs.cotangents[1]))))
    for name, gradient in zip(("query", "key", "value"), gradients, strict=True):
        assert gradient.dtype == jnp.float32
        assert worst(gradient, plain.answer.gradients[name]) <= plain.allowed.gradients[name], name


@pytest.mark.device
@pytest.mark.skipif(not ON_GPU, reason="cuDNN itself needs a GPU: make test-gpu")
@pytest.mark.parametrize("mapped", [False, True], ids=["plain", "vmap"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("mask", MASKS, ids=repr)
def test_attention_by_name(mask, dtype, mapped):
    """The whole way of a call: output and gradients under jit, and under vmap with a batch left inside."""
    case = Case(mask, PLAIN, Shape((2, 2), 37, 53, N, K, H, H))
    inputs = draw(case, dtype)
    inputs = inputs._replace(cotangents=(inputs.cotangents[0], jnp.zeros_like(inputs.cotangents[1])))

    def solve(x, d, cotangent):
        out, pull = jax.vjp(lambda x: attend(case, x, d, "cudnn", return_lse=False), x)
        return out, *pull(cotangent)

    axes = {name: 0 for name in inputs.x}, {name: 0 for name in inputs.d}, 0
    out, gradients = jax.jit(jax.vmap(solve, in_axes=axes) if mapped else solve)(
        inputs.x, inputs.d, inputs.cotangents[0]
    )
    want = expect(case, inputs)
    want.check(want.answer._replace(out=out, gradients=gradients))


def _pairs(shape):
    return shape.B, shape.N, shape.T, shape.S


def _poisoned(x, some, shape):
    """x [*batch, rows, heads, size] with NaN in the rows, [B, rows], of which there is nothing to be seen."""
    return jnp.where(some.reshape(*shape.batch, -1)[..., None, None], x, jnp.nan).astype(x.dtype)


@pytest.mark.device
@pytest.mark.parametrize("mask", [m for m in MASKS if m.name not in ("lengths", "causal_lengths", "no_keys")], ids=repr)
def test_the_stand_in_is_what_jax_makes_of_the_same_words(mask, call):
    """jax.nn's own attention, given the words that the mask was put into, agrees with the stand-in given the call."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 37, n, H)), HALF) for n in (N, K, K))
    lengths = jnp.array([30, 9], jnp.int32)
    problem, operands = build(q, k, v, mask=mask.mask({"a": lengths}), implementation="cudnn", return_lse=False)
    told = cudnn._seen(problem, operands)
    with jax.numpy_dtype_promotion("standard"):  # which jax.nn relies on
        want = jax.nn.dot_product_attention(
            q,
            k,
            v,
            is_causal=told.causal,
            local_window_size=None if told.left is None else (told.left, 0),
            key_value_seq_lengths=told.key[0] if told.key else None,
            implementation="xla",
        )
    rows = cudnn.forward(problem, operands, "cuda")
    live = np.asarray(rows.total) > 0
    np.testing.assert_allclose(
        np.asarray(rows.out, np.float32)[live], np.asarray(want, np.float32)[live], atol=2e-2, rtol=2e-2
    )


@pytest.mark.device
def test_one_array_for_all_batch_entries(call):
    """Keys and values that the batch shares: their gradients are summed over it."""
    rng = np.random.default_rng(0)
    array = lambda *shape: jnp.asarray(rng.normal(size=shape), HALF)
    q, k, v = array(3, 37, N, H), array(1, 37, K, H), array(1, 37, K, H)
    problem, operands = build(q[0], k[0], v[0], implementation="cudnn", return_lse=False)
    problem, ct_out = problem.with_batch(3), array(3, 37, N, H)
    rows = cudnn.forward(problem, [q, k, v], "cuda")
    give = lambda shapes: cudnn.backward(
        problem, [q, k, v], rows, ct_out, jnp.zeros_like(rows.total), tuple(enumerate(shapes))
    )
    shared = give([q.shape, k.shape, v.shape])
    apart = give([q.shape, (3, *k.shape[1:]), (3, *v.shape[1:])])
    np.testing.assert_allclose(shared[1], apart[1].sum(0, keepdims=True), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(shared[2], apart[2].sum(0, keepdims=True), rtol=1e-5, atol=1e-5)
