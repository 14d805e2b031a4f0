"""The Hopper kernels, interpreted with a search for races or compiled, against the oracle; what they refuse.

Their interpreter cannot run inside of `attention`: forward and backward are called as the primitives do.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import pytest
from cases import MASKS, SCORE_VARIANTS, SCORES, VARIANTS
from oracle import Shape
from problems import EVERY_IMPLEMENTATION, ON_GPU, Case, draw, expect, poison

import attnjax as aj
from attnjax.attention import build
from attnjax.core.softmax import log_sum_exp
from attnjax.kernels import mosaic_gpu

newest = pytest.mark.skipif(
    jax.__version_info__ < mosaic_gpu.NEEDS, reason="mosaic_gpu needs jax 0.11.2: it has no interpreter before"
)
hopper = pytest.mark.skipif(ON_GPU and "mosaic_gpu" not in EVERY_IMPLEMENTATION, reason="mosaic_gpu is for Hopper")
# JAX's interpreter of these kernels waits in XLA's threads, and waits forever where there are too few of them: so what
# is interpreted runs when it is asked for, NPROC=16 pytest --interpret-mosaic-gpu tests/test_mosaic_gpu.py
pytestmark = pytest.mark.usefixtures("asked_for")


@pytest.fixture
def asked_for(request):
    """Skips what would be interpreted, unless that is asked for."""
    interpreted = request.node.name.split("[")[0] in INTERPRETED
    if interpreted and not ON_GPU and not request.config.getoption("--interpret-mosaic-gpu"):
        pytest.skip("interpreted Mosaic GPU kernels need many threads: NPROC=16 pytest --interpret-mosaic-gpu")


INTERPRETED = (
    *("test_masks", "test_scores", "test_shapes", "test_configs"),
    *("test_operands_that_a_batch_shares", "test_gradients_of_operands_that_a_batch_shares"),
)
FULL, COMBINED = MASKS[0], MASKS[-1]
NONE, EVERYTHING = SCORES[0], SCORES[-1]
REFUSED = {
    "relative": "by distance",
    "relative_past": "by distance",
    "function_distance": "dynamic_slice of query and key together",
    "function_stopped": "its tiles: stop_gradient",
}
NO_BACKWARD = {
    "function_nonlinear": dict(backward="cannot run the derivative of this mask or score on its tiles: add_any")
}
X = jax.ShapeDtypeStruct((1, 256, 4, 64), jnp.bfloat16)


def problem_of(case, inputs, config=None):
    x, dropout = inputs.x, case.score.dropout
    given, operands = build(
        x["query"],
        x["key"],
        x["value"],
        mask=case.mask.mask(inputs.d),
        score=case.score.score(x),
        scale=case.score.scale,
        sinks=x.get("sinks"),
        dropout=aj.Dropout(*dropout) if dropout else None,
    )
    return dataclasses.replace(given, config=config or mosaic_gpu.Config(interpret=not ON_GPU)), operands


def agrees(case, dtype, config=None):
    """With what is hidden as it was drawn, and again with NaN and infinities in it."""
    inputs = draw(case, dtype)
    want = expect(case, inputs)
    given, operands = problem_of(case, inputs, config)
    refused = {part: mosaic_gpu.unsupported(given, operands, "cuda", part) for part in mosaic_gpu.PARTS}
    assert refused == dict.fromkeys(refused) | NO_BACKWARD.get(case.score.name, {})
    names = ("query", "key", "value", *(("sinks",) if given.program.sinks else ()))
    wanted = tuple((i, operands[i].shape) for i in range(len(names)))

    @jax.jit
    def run(operands, ct_out, ct_lse):
        rows = mosaic_gpu.forward(given, operands, "cuda")
        made = [] if refused["backward"] else mosaic_gpu.backward(given, operands, rows, ct_out, ct_lse, wanted)
        return rows.out, log_sum_exp(rows.highest, rows.total), dict(zip(names, made, strict=False))

    for some in (inputs, poison(case, inputs)):
        out, lse, made = run(problem_of(case, some, config)[1], *inputs.cotangents)
        made = {name: x.reshape(inputs.x[name].shape).astype(inputs.x[name].dtype) for name, x in made.items()}
        want.check(want.answer._replace(out=out, lse=lse, gradients=want.answer.gradients | made))


@newest
@hopper
@pytest.mark.device
@pytest.mark.parametrize("mask", [*MASKS, *VARIANTS], ids=repr)
def test_masks(mask):
    agrees(Case(mask, NONE), "bfloat16")


@newest
@hopper
@pytest.mark.device
@pytest.mark.parametrize("score", [s for s in (*SCORES[1:], *SCORE_VARIANTS) if s.name not in REFUSED], ids=repr)
def test_scores(score):
    agrees(Case(FULL, score), "float16")


SHAPES = {
    "everything": Shape(),
    "one query": Shape(T=1),
    "one key": Shape(S=1),
    "no batch": Shape(batch=()),
    "two groups, head sizes that differ": Shape(T=130, S=140, H=72, V=40),
    "one head": Shape(N=1, K=1),
    "empty batch": Shape(batch=(0,)),
}


@newest
@hopper
@pytest.mark.device
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(shape):
    score = EVERYTHING if shape.batch != (0,) else NONE
    agrees(Case(FULL if score is NONE else COMBINED, score, shape), "bfloat16")


@hopper
@pytest.mark.device
def test_no_keys():
    """Nothing is seen; no kernel runs."""
    query, empty = jnp.ones((2, 5, 4, 8), jnp.bfloat16), jnp.ones((2, 0, 2, 8), jnp.bfloat16)
    given, operands = build(query, empty, empty)
    rows = mosaic_gpu.forward(given, operands, "cuda")
    assert not rows.out.any() and (log_sum_exp(rows.highest, rows.total) == -jnp.inf).all()
    wanted = tuple((i, operands[i].shape) for i in range(3))
    made = mosaic_gpu.backward(given, operands, rows, rows.out, jnp.ones_like(rows.total), wanted)
    assert [x.shape for x in made] == [shape for _, shape in wanted]
    assert not made[0].any()


CONFIGS = {
    "narrow": dict(block_k=64, stages=2, backward_block=64, backward_stages=2),
    "wide": dict(block_k=128, stages=4, backward_block=128, backward_stages=4),
}


@newest
@hopper
@pytest.mark.device
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_configs(config):
    """More blocks than there is room for at once, so that places in shared memory are used again."""
    config = mosaic_gpu.Config(**config, interpret=not ON_GPU)
    agrees(Case(COMBINED, EVERYTHING, Shape(batch=(1,), T=129, S=700)), "bfloat16", config)


@newest
@hopper
@pytest.mark.device
def test_operands_that_a_batch_shares():
    """As under `vmap` with some arguments not mapped: batch axes of size 1."""
    inputs = draw(Case(FULL, NONE, Shape(batch=(3,))), "bfloat16")
    given, operands = problem_of(Case(FULL, NONE, Shape(batch=(3,))), inputs)
    shared = [operands[0], operands[1][:1], operands[2][1:2]]
    whole = [operands[0], *(jnp.broadcast_to(x, operands[1].shape[:1] + x.shape[1:]) for x in shared[1:])]
    run = jax.jit(lambda operands: mosaic_gpu.forward(given, operands, "cuda").out)
    assert (run(shared) == run(whole)).all()


@newest
@hopper
@pytest.mark.device
def test_gradients_of_operands_that_a_batch_shares():
    """They are sums over the batch."""
    case = Case(COMBINED, NONE, Shape(batch=(3,)))
    inputs = draw(case, "bfloat16")
    given, operands = problem_of(case, inputs)
    shared = [x[1:2] for x in operands[:3]] + operands[3:]
    whole = [jnp.broadcast_to(x, (3, *x.shape[1:])) for x in shared[:3]] + operands[3:]

    def gradients(operands):
        rows = mosaic_gpu.forward(given, operands, "cuda")
        wanted = tuple((i, x.shape) for i, x in enumerate(operands[:3]))
        return mosaic_gpu.backward(given, operands, rows, *inputs.cotangents, wanted)

    for one, each in zip(jax.jit(gradients)(shared), jax.jit(gradients)(whole), strict=True):
        assert jnp.allclose(one, each.sum(0, keepdims=True), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("block, taken", [(64, False), (300, False), (128, True), (512, True), (1000, True)])
def test_block_maps_are_cut_into_its_own_blocks_or_refused(block, taken, monkeypatch):
    monkeypatch.setattr(mosaic_gpu, "NEEDS", (0, 0, 0))
    x = jax.ShapeDtypeStruct((1, 700, 4, 64), jnp.bfloat16)
    block_map = aj.BlockMap.build(aj.Window(63, 0), 700, 700, block_q=block, block_k=block)
    explain = lambda: aj.explain(
        x, x, x, mask=aj.Window(63, 0), block_map=block_map, implementation="mosaic_gpu", platform="cuda"
    )
    if taken:
        assert explain().blocks.block_q == min(block, 700)
        return
    with pytest.raises(NotImplementedError, match=f"block_map has blocks of {block} x {block}: its own are multiples"):
        explain()


@newest  # before, other operations are needed
@pytest.mark.parametrize(
    "function, forward, backward",
    [
        (lambda s, b, h, q, k: jnp.log1p(jnp.abs(s)), "on its tiles: log1p", None),
        (lambda s, b, h, q, k: s**-3, "on its tiles: integer_pow -3", None),
        (lambda s, b, h, q, k: 1 / (1 + jnp.exp(s)), None, "derivative of .* integer_pow -2"),
        (lambda s, b, h, q, k: jnp.sin(s) + s, None, "derivative of .* add_any"),
        (lambda s, b, h, q, k: jnp.tanh(s) * (q + k).astype(s.dtype), None, None),
    ],
)
def test_operations_that_mosaic_gpu_does_not_have(function, forward, backward, monkeypatch):
    monkeypatch.setattr(mosaic_gpu, "NEEDS", (0, 0, 0))
    given, operands = build(X, X, X, score=aj.ScoreFn(function))
    assert re.search(forward or "^None$", str(mosaic_gpu.unsupported(given, operands, "cuda", "forward")))
    if not forward:
        assert re.search(backward or "^None$", str(mosaic_gpu.unsupported(given, operands, "cuda", "backward")))


@pytest.mark.parametrize(
    "sizes, config, text",
    [
        ((256, 192), None, "has not enough shared memory for these head sizes"),
        ((128, 128), dict(block_k=128, stages=4), r"for these head sizes and Config\(block_k=128, stages=4"),
    ],
)
def test_what_does_not_fit_into_shared_memory(sizes, config, text, monkeypatch):
    monkeypatch.setattr(mosaic_gpu, "NEEDS", (0, 0, 0))
    x, value = (jax.ShapeDtypeStruct((1, 256, 4, size), jnp.bfloat16) for size in sizes)
    options = dict(config=mosaic_gpu.Config(**config)) if config else dict(implementation="mosaic_gpu")
    with pytest.raises(NotImplementedError, match=text):
        aj.explain(x, x, value, platform="cuda", **options)


@newest
@pytest.mark.parametrize("name", REFUSED)
def test_scores_that_are_refused(name):
    (score,) = (s for s in (*SCORES, *SCORE_VARIANTS) if s.name == name)
    given, operands = problem_of(Case(FULL, score), draw(Case(FULL, score), "bfloat16"))
    assert REFUSED[name] in mosaic_gpu.unsupported(given, operands, "cuda", "forward")


REFUSALS = {
    "dtype": (dict(dtype=jnp.float32), {}, "takes bfloat16 and float16, not float32"),
    "size": (dict(shape=(1, 64, 4, 320)), {}, "takes head sizes up to 256"),
    "platform": ({}, dict(platform="tpu"), "runs on Hopper GPUs only, not on tpu"),
    "old": ({}, {}, "needs jax 0.11.2 or newer"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_name_one_that_can(case, monkeypatch):
    """An error where it is asked for by name."""
    change, options, text = REFUSALS[case]
    monkeypatch.setattr(mosaic_gpu, "NEEDS", (99, 0, 0) if case == "old" else (0, 0, 0))
    x = jax.ShapeDtypeStruct(change.get("shape", X.shape), change.get("dtype", X.dtype))
    text = text.replace("0.11.2", "99.0.0")
    with pytest.raises(NotImplementedError, match=f"'mosaic_gpu' cannot: {text}.*xla.* can"):
        aj.explain(x, x, x, implementation="mosaic_gpu", **(dict(platform="cuda") | options))


def test_it_runs_on_hopper_only(monkeypatch):
    monkeypatch.setattr(mosaic_gpu, "NEEDS", (0, 0, 0))
    for kind, able in (("NVIDIA H200", True), ("NVIDIA A100-SXM4-80GB", False), ("something new", True)):
        device = jax.sharding.AbstractDevice(device_kind=kind, platform="gpu", num_cores=132)
        given, operands = build(X, X, X)
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
            reason = mosaic_gpu.unsupported(given, operands, "cuda", "forward")
        assert reason is None if able else "not on NVIDIA A100-SXM4-80GB (8.0)" in reason


@pytest.mark.parametrize(
    "wrong, text",
    [
        (dict(block_k=96), r"block_k must be one of \[64, 128\] or None, got 96"),
        (dict(stages=1), r"stages must be one of \[2, 3, 4\] or None, got 1"),
        (dict(backward_block=32), r"backward_block must be one of \[64, 128\] or None, got 32"),
        (dict(backward_stages=True), r"backward_stages must be one of \[2, 3, 4\] or None, got True"),
        (dict(interpret=1), "interpret must be True or False, got 1"),
    ],
)
def test_configs_that_are_wrong(wrong, text):
    with pytest.raises(ValueError, match=text):
        mosaic_gpu.Config(**wrong)


def test_it_runs_where_it_is_named_and_nowhere_else(monkeypatch):
    monkeypatch.setattr(mosaic_gpu, "NEEDS", (0, 0, 0))
    explain = functools.partial(aj.explain, X, X, X, mask=aj.Causal(), platform="cuda")
    assert explain().choices["forward"].name != "mosaic_gpu"
    assert "not yet measured" in explain().choices["forward"].reasons["mosaic_gpu"]
    named = explain(implementation="mosaic_gpu")
    assert {named.choices[part].name for part in mosaic_gpu.PARTS} == {"mosaic_gpu"}
    assert (named.blocks.block_q, named.blocks.block_k) == (128, 128)


def test_others_give_what_it_cannot(monkeypatch):
    """Gradients of scores, and all of large heads and of scores whose derivative it cannot run, are triton's."""
    monkeypatch.setattr(mosaic_gpu, "NEEDS", (0, 0, 0))
    explain = functools.partial(aj.explain, implementation="mosaic_gpu", platform="cuda")
    bias = jax.ShapeDtypeStruct((4, 1, 256), jnp.bfloat16)
    assert "Bias.array" in str(explain(X, X, X, score=aj.Bias(bias)))
    large = jax.ShapeDtypeStruct((1, 256, 4, 192), jnp.bfloat16)
    for arrays, score in ((large, None), (X, aj.ScoreFn(lambda s, b, h, q, k: jnp.sin(s) + s))):
        found = explain(arrays, arrays, arrays, score=score)
        assert (found.choices["forward"].name, found.choices["backward"].name) == ("mosaic_gpu", "triton")


TILINGS = {  # by kernel and head size: rows of a block, and blocks in shared memory
    "forward": {64: (128, 3), 128: (128, 2), 192: (64, 3), 256: (64, 2)},
    "query": {64: (128, 3), 128: (64, 3)},
    "key": {64: (64, 3), 128: (64, 3)},
}


@pytest.mark.parametrize("kernel, size", [(kernel, size) for kernel in TILINGS for size in TILINGS[kernel]])
def test_what_is_chosen_fits_into_shared_memory(kernel, size):
    x = jax.ShapeDtypeStruct((1, 256, 4, size), jnp.bfloat16)
    chosen = mosaic_gpu._tiling(build(x, x, x)[0], kernel)
    own = 128 * size * (1 if kernel == "forward" else 2)
    assert 2 * own + 2 * chosen.stages * chosen.block * 2 * size <= 227 * 1024
    assert (chosen.block, chosen.stages) == TILINGS[kernel][size]
