"""The Triton kernels beyond the table of cases: refusals, sizes of tiles, decoding, odd shapes, determinism, lowering.

What is computed is computed interpreted, and compiled where JAX has a GPU: that is marked "device". That the kernels
compile for GPUs without spilling is in tests/aot.
"""

import contextlib
import dataclasses
import functools
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import MASKS, SCORES
from jax import export
from oracle import Shape
from problems import ON_GPU, TRITON, Case, draw, expect, solver

import attnjax as aj
from attnjax import tuning
from attnjax.attention import build
from attnjax.core.split import entry_of, member_of
from attnjax.core.visits import Lists, visits
from attnjax.kernels import triton, xla
from attnjax.kernels.triton import Config

SMALL = TRITON
FULL, CAUSAL, COMBINED = MASKS[0], MASKS[1], MASKS[-1]
NONE, EVERYTHING = SCORES[0], SCORES[-1]


def arrays(t=5, s=7, n=4, k=2, h=8, v=6, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=size), dtype) for size in ((2, t, n, h), (2, s, k, h), (2, s, k, v))]


def shapes(t, s=None, n=8, k=2, h=64, dtype=jnp.bfloat16):
    return [jax.ShapeDtypeStruct((1, *size), dtype) for size in ((t, n, h), (s or t, k, h), (s or t, k, h))]


def on(kind):
    """While it is open, programs are compiled for a GPU of this name."""
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=1, platform="gpu")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))


captured = jnp.ones(8)
DISTANCE = aj.ScoreFn(lambda s, b, h, q, k: s + captured[jnp.minimum(jnp.abs(q - k), 7)])
REFUSED = {
    "float64": ({}, {"dtype": jnp.float64}, "takes float32, bfloat16 and float16, not float64"),
    "head_size": ({}, {"h": 257}, "takes head sizes up to 256"),
    "value_size": ({}, {"v": 300}, "takes head sizes up to 256"),
    "function": ({"score": DISTANCE}, {}, "cannot run this mask or score on its tiles: .* of query and key together"),
    "map": (
        {"mask": aj.Causal(), "block_map": aj.BlockMap.build(aj.Causal(), 5, 7, block_q=3, block_k=16)},
        {},
        "block_map has blocks of 3 x 7, its own are multiples of 16",
    ),
}


@pytest.mark.parametrize("options, sizes, reason", REFUSED.values(), ids=REFUSED)
def test_what_it_refuses(options, sizes, reason):
    """With the reason, and the names of those that can."""
    wide = jax.enable_x64(True) if sizes.get("dtype") is jnp.float64 else contextlib.nullcontext()
    with wide:
        q, k, v = arrays(**sizes)
        with pytest.raises(NotImplementedError, match=f"'triton' cannot: {reason}.*xla, reference can"):
            aj.attention(q, k, v, config=SMALL, **options)


def test_other_devices_and_configs():
    q, k, v = arrays()
    with pytest.raises(NotImplementedError, match="'triton' cannot: runs on NVIDIA GPUs only, not on cpu; elsewhere"):
        aj.attention(q, k, v, implementation="triton")
    for platform in ("rocm", "tpu"):
        reasons = aj.explain(q, k, v, platform=platform).choices["forward"].reasons
        assert reasons["triton"].startswith(f"runs on NVIDIA GPUs only, not on {platform}")
    with pytest.raises(ValueError, match="config is one of 'triton' and implementation is 'xla'"):
        aj.attention(q, k, v, implementation="xla", config=SMALL)
    problem, operands = build(q, k, v, config=xla.Config())
    assert triton.unsupported(problem, operands, "cuda", "forward") == "config is not one of triton"
    assert triton.unsupported(problem, operands, "cuda", "tangent").startswith("has forward and backward")
    with on("Tesla T4"):
        problem, operands = build(q, k, v, config=Config())
    problem = dataclasses.replace(problem, config=None)
    assert triton.unsupported(problem, operands, "cuda", "forward") is None


@pytest.mark.parametrize(
    "field, value, text",
    [
        ("block_q", 24, "block_q must be one of [16, 32, 64, 128, 256] or None, got 24"),
        ("backward_block_k", 8, "backward_block_k must be one of [16, 32, 64, 128, 256] or None, got 8"),
        ("warps", 3, "warps must be one of [1, 2, 4, 8] or None, got 3"),
        ("backward_stages", 0, "backward_stages must be from 1 to 5 or None, got 0"),
        ("splits", True, "splits must be from 1 to 256 or None, got True"),
        ("tf32", 1, "tf32 must be True or False, got 1"),
        ("interpret", None, "interpret must be True or False, got None"),
    ],
)
def test_wrong_configs(field, value, text):
    with pytest.raises(ValueError, match=re.escape(f"Config: {text}")):
        Config(**{field: value})


CONFIGS = {
    "wide": dict(block_q=16, block_k=32, backward_block_q=16, backward_block_k=32),
    "tall": dict(block_q=32, block_k=16, backward_block_q=32, backward_block_k=16),
    "larger_than_the_problem": dict(block_q=128, block_k=256, backward_block_q=64, backward_block_k=128),
    "splits": dict(block_q=16, block_k=16, splits=3),
    "more_splits_than_blocks": dict(block_q=32, block_k=32, splits=7),
}


@pytest.mark.device
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_configs(config):
    agrees(Case(COMBINED, EVERYTHING), Config(**config, interpret=not ON_GPU))


SHAPES = {
    "decode": Shape(T=1, S=83),
    "decode_one_head": Shape(T=1, S=83, N=1, K=1),
    "speculative": Shape(T=3, S=83),
    "no_groups": Shape(T=16, S=48, N=3, K=3),
    "one_key_head": Shape(T=29, S=48, N=5, K=1),
    "sixteen": Shape(T=16, S=16, H=16, V=16),
    "sizes_that_differ": Shape(T=17, S=33, H=33, V=70),
    "chunks": Shape(T=17, S=33, H=130, V=65),
}


@pytest.mark.device
@pytest.mark.parametrize("splits", [None, 3])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(shape, splits):
    """Few queries, whose heads share a tile; sizes of all kinds; the keys in one program and in several."""
    agrees(Case(COMBINED, EVERYTHING, shape), dataclasses.replace(SMALL, splits=splits))


@pytest.mark.device
def test_a_decoded_token_is_a_row_of_the_whole():
    """Grouped heads in one tile and keys in parts: the same as the last query among others."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 40, n, 16)), jnp.float32) for n in (6, 2, 2))
    options = dict(mask=aj.Window.aligned_end(30, 0), score=aj.ALiBi.for_heads(6, offset=0), config=SMALL)
    whole = aj.attention(q, k, v, **options)
    options |= dict(score=aj.ALiBi.for_heads(6, offset=39), config=dataclasses.replace(SMALL, splits=2))
    np.testing.assert_allclose(aj.attention(q[:, -1:], k, v, **options), whole[:, -1:], rtol=1e-5, atol=1e-6)


@pytest.mark.device
def test_the_same_bits_again():
    """Twice the same; and other blocks of queries change nothing in a row, whose keys come in the same order."""
    case = Case(CAUSAL, EVERYTHING)
    inputs = draw(case, "float32")
    run = jax.jit(solver(case, None, SMALL))
    jax.tree.map(np.testing.assert_array_equal, run(*inputs), run(*inputs))


@pytest.mark.device
def test_a_block_map_that_was_given():
    """It is cut to the kernel's own blocks, also where its blocks are no powers of 2."""
    q, k, v = arrays(t=100, s=100)
    for block_q, block_k in ((48, 32), (128, 16), (16, 100)):
        block_map = aj.BlockMap.build(aj.Window(20, 0), 100, 100, block_q=block_q, block_k=block_k)
        run = lambda **options: aj.attention(q, k, v, mask=aj.Window(20, 0), **options)
        config = Config(interpret=not ON_GPU)
        got = run(block_map=block_map, config=config)
        np.testing.assert_allclose(got, run(implementation="reference"), rtol=1e-5, atol=1e-6)
        platform = "cuda" if ON_GPU else "cpu"
        found = aj.explain(q, k, v, mask=aj.Window(20, 0), block_map=block_map, config=config, platform=platform)
        assert (found.blocks.block_q, found.blocks.block_k) == (min(block_q, 100), min(block_k, 100))


def test_a_table_of_distances_has_its_gradient_from_another():
    q, k, v = arrays()
    score = aj.RelativeBias(jnp.ones((8, 4)))
    found = aj.explain(q, k, v, score=score, platform="cuda", implementation="triton")
    assert found.choices["backward"].name == "triton"
    assert found.choices["backward of RelativeBias.table"].name == "xla"


# Lists as kernels load them.


def test_lists_that_need_no_array():
    """The same for all rows: numbers in the program. Neighbours: the first of them. Else the lists."""
    x = shapes(256)
    lists = lambda mask: Lists(visits(*build(*x, mask=mask), 16, 16), (1,))
    assert not lists(None).given and not lists(None).has_partial
    assert set(lists(aj.Causal()).given) == {"counts"}
    assert set(lists(aj.Window(40, 40)).given) == {"counts", "blocks"}


@pytest.mark.parametrize("lanes", [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_members_of_an_entry(lanes):
    batch, count = (2, 3), 6 // (lanes[0] * lanes[1])
    for entry in range(lanes[0] * lanes[1]):
        members = [int(member_of(lanes, batch, np.int32(entry), np.int32(n))) for n in range(count)]
        assert members == [b for b in range(6) if entry_of(lanes, batch, b) == entry]


# Sizes of tiles.


def problem_of(x, **options):
    return build(*x, **options)[0]


def test_smaller_where_shared_memory_does_not_suffice():
    problem = problem_of(shapes(4096, h=128), config=Config(block_q=256, block_k=128, stages=4))
    large, small = (tuning.Gpu("", (8, 0), shared * 1024, 100) for shared in (400, 99))
    asked = tuning.choose_tiling(problem, "forward", large)
    assert (asked.block_q, asked.block_k, asked.stages, asked.note) == (256, 128, 4, "")
    found = tuning.choose_tiling(problem, "forward", small)
    assert tuning.shared_bytes(problem, "forward", found) <= 99 * 1024
    assert "256 x 128 in 4 stages would need 321 KiB of shared memory,  has 99" in found.note
    one = tuning.Gpu("", (8, 0), 1, 100)
    least = tuning.choose_tiling(problem, "forward", one)
    assert (least.block_q, least.block_k) == (16, 16)


def test_explain_says_what_is_smaller():
    x = shapes(4096, h=128)
    config = Config(block_q=128, block_k=128, stages=3)
    with on("NVIDIA H200"):
        text = str(aj.explain(*x, platform="cuda", config=config))
        assert "kernel  forward: 128 queries x 128 keys, 8 warps, 3 stages\n" in text
    with on("NVIDIA A100-SXM4-80GB"):
        text = str(aj.explain(*x, platform="cuda", config=config))
    assert "forward: 128 queries x 128 keys, 8 warps, 2 stages; 128 x 128 in 3 stages would need 225 KiB" in text
    assert "NVIDIA A100-SXM4-80GB has 163" in text


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("h", [16, 80, 128, 256])
@pytest.mark.parametrize("number", tuning._LIMITS)
def test_usual_sizes_fit(number, h, dtype):
    """Into the shared memory of every device; the usual ones of A100, H200 and B200 without being made smaller."""
    shared, processors = tuning._LIMITS[number]
    gpu = tuning.Gpu("", number, shared * 1024, processors)
    for options in ({}, {"score": aj.SoftCap(2.0)}):
        problem = problem_of(shapes(4096, h=h, dtype=dtype), **options)
        for kernel in ("forward", "query", "key", "value", "pairs"):
            tiling = tuning.choose_tiling(problem, kernel, gpu)
            least = tiling.block_q + tiling.block_k == 32
            assert least or tuning.shared_bytes(problem, kernel, tiling) <= gpu.shared
            assert not tiling.note or number not in ((8, 0), (9, 0), (10, 0))


def test_programs_for_few_queries():
    """One token and long keys: enough programs for the device; a whole sequence is split no further."""
    gpu = tuning.Gpu("", (9, 0), 227 * 1024, 132)
    splits = lambda problem: tuning.key_splits(problem, tuning.choose_tiling(problem, "forward", gpu), gpu)
    assert splits(problem_of(shapes(1, 32768))) * 2 >= 132
    assert splits(problem_of(shapes(4096))) == 1
    assert splits(problem_of(shapes(1, 128))) == 1
    assert tuning.heads_together(problem_of(shapes(1, 128))) == 4
    assert tuning.heads_together(problem_of(shapes(128))) == 1


def test_gpus_by_name():
    capability = {}
    for kind in ("NVIDIA A100-SXM4-80GB", "NVIDIA H200", "NVIDIA B200", "NVIDIA L40S", "Something new"):
        with on(kind):
            capability[kind] = tuning.compiled_for().capability
    assert list(capability.values()) == [(8, 0), (9, 0), (10, 0), (8, 9), (0, 0)]
    assert tuning.compiled_for().shared == 99 * 1024


# Lowering for a GPU that is not here, beyond test_lowering.py.

ALLOWED = [export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")]


def lowered(x, *, gradient=True, **options):
    """The program for a GPU, as text."""
    call = lambda *x: aj.attention(*x, implementation="triton", **options)
    loss = lambda *x: call(*x).astype(jnp.float32).sum()
    function = jax.jit(jax.grad(loss, argnums=(0, 1, 2)) if gradient else call)
    return export.export(function, platforms=["cuda"], disabled_checks=ALLOWED)(*x).mlir_module()


@pytest.mark.parametrize("h, calls", [(128, 3), (256, 4)])
def test_kernels_of_a_gradient(h, calls):
    """Of large heads the gradients of key and value are made by two."""
    assert lowered(shapes(300, h=h), mask=aj.Causal()).count("__gpu$xla.gpu.triton") == calls


@pytest.mark.parametrize("h", [64, 128, 256])
def test_each_kernel_is_lowered_with_its_own_sizes(h, monkeypatch):
    """Their bodies are run after all of them are made, and would find the sizes of the last one."""
    seen = {}
    for name in ("query", "key", "pairs"):
        real = getattr(triton, f"_backward_{name}")

        def body(call, lists, refs, *rest, name=name, real=real):
            seen["value" if name == "key" and "d_1" not in refs else name] = call
            return real(call, lists, refs, *rest)

        monkeypatch.setattr(triton, f"_backward_{name}", body)
    bias = jax.ShapeDtypeStruct((8, 300, 300), jnp.bfloat16)
    loss = lambda bias, *x: aj.attention(*x, score=aj.Bias(bias), implementation="triton").astype(jnp.float32).sum()
    with on("NVIDIA H200"):
        gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))
        export.export(gradient, platforms=["cuda"], disabled_checks=ALLOWED)(bias, *shapes(300, h=h))
    assert set(seen) == {"query", "key", "pairs"} | ({"value"} if h == 256 else set())
    for kernel, call in seen.items():
        assert call.tiling == tuning.choose_tiling(call.problem, kernel, call.gpu), kernel


@pytest.mark.device
@pytest.mark.skipif(not ON_GPU, reason="sizes that are chosen are for compiled kernels: make test-gpu")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("size", [64, 80, 128, 256])
@pytest.mark.parametrize("score", [NONE, EVERYTHING], ids=repr)
def test_the_sizes_that_are_chosen(score, size, dtype):
    """Every kernel with tiles of its own, several of them along both sides."""
    agrees(Case(CAUSAL, score, Shape(batch=(1,), T=301, S=353, N=4, K=2, H=size, V=size)), Config(), dtype)


def test_lowering_of_every_operation():
    """Of functions of indices, those that may be left to run on tiles."""

    def rule(s, b, h, q, k):
        x = (q * k).astype(s.dtype)
        y = jnp.sin(s) + jnp.cos(x) + jnp.tanh(s) + jnp.exp(-x) + jnp.log1p(x) + jnp.expm1(-x) + jnp.sqrt(x + 1)
        z = jnp.floor(s) + jnp.ceil(x) + jnp.sign(s) + jax.lax.rsqrt(x + 1) + jax.nn.sigmoid(s) + s**3 + jnp.exp2(-x)
        w = jnp.where((q ^ k) % 2 == 0, jnp.clip(s, -1.0, 1.0), jnp.maximum(s, jnp.abs(x))) + jnp.log(x + 2)
        bits = (q // (k + 1) << 1) + ((q | k) & 1) + (~q >> 1) + jax.lax.shift_right_logical(q - k, 3)
        return y + z + w + jnp.minimum(s, 3.0) ** 2 + bits.astype(s.dtype)

    x = shapes(64)
    assert "__gpu$xla.gpu.triton" in lowered(x, score=aj.ScoreFn(rule))


def test_lowering_without_warnings_and_for_a_named_device():
    with warnings.catch_warnings(), on("NVIDIA H200"):
        warnings.simplefilter("error")
        assert "__gpu$xla.gpu.triton" in lowered(shapes(64), gradient=False)


def test_programs_that_are_exported_do_without_it():
    """Nobody named it, and the program may be loaded by another version of JAX."""
    x = shapes(64)
    text = export.export(jax.jit(lambda *x: aj.attention(*x)), platforms=["cuda"])(*x).mlir_module()
    assert "xla.gpu.triton" not in text


def test_gradients_have_no_array_of_pairs():
    """But for that of a bias, whose shape it is, and which is summed over the batch where it is made."""
    q, k, v = (jax.ShapeDtypeStruct((4, 512, 8, 64), jnp.bfloat16) for _ in range(3))
    bias = jax.ShapeDtypeStruct((8, 512, 512), jnp.bfloat16)
    loss = lambda *x: aj.attention(*x[:3], score=aj.Bias(x[3]), implementation="triton").astype(jnp.float32).sum()
    function = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))
    text = export.export(function, platforms=["cuda"], disabled_checks=ALLOWED)(q, k, v, bias).mlir_module()
    largest = [tuple(map(int, found.split("x"))) for found in re.findall(r"tensor<((?:\d+x)*\d+)x(?:f32|bf16)>", text)]
    assert max(map(np.prod, largest)) == 8 * 512 * 512


def agrees(case, config, dtype="float32"):
    __tracebackhide__ = True
    inputs = draw(case, dtype)
    solve = functools.partial(solver, case, None)
    expect(case, inputs).check(jax.jit(solve(config))(*inputs))
