"""The TPU kernels beyond the conformance table: refusals, sizes of tiles, lists, races.

They run interpreted here; what TPUs' own compiler says of them is in tests/aot.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import MASKS, SCORES
from oracle import Shape
from problems import Case, attend, draw, expect

import attnjax as aj
from attnjax.attention import build
from attnjax.core.steps import PARTIAL, step_of, steps
from attnjax.kernels import mosaic_tpu
from attnjax.kernels.mosaic_tpu import Config

SMALL = Config(block_q=16, block_k=16, interpret=True)
TPU = jax.sharding.AbstractDevice(device_kind="TPU v6 lite", num_cores=1, platform="tpu")


def arrays(t=24, s=40, n=4, k=2, h=8, v=8, dtype=jnp.float32, batch=(2,)):
    rng = np.random.default_rng(0)
    sizes = ((*batch, t, n, h), (*batch, s, k, h), (*batch, s, k, v))
    return [jnp.asarray(rng.normal(size=size), dtype) for size in sizes]


def described(t=4096, n=8, k=2, h=128, v=128, dtype=jnp.bfloat16):
    return [jax.ShapeDtypeStruct((1, t, *last), dtype) for last in ((n, h), (k, h), (k, v))]


table = jnp.arange(64.0)
wrong = {
    "dtype": (dict(dtype=jnp.float16), {}, "takes float32 and bfloat16, not float16"),
    "head_size": (dict(h=257), {}, "takes head sizes up to 256"),
    "value_size": (dict(v=300), {}, "takes head sizes up to 256"),
    "not_splittable": (
        {},
        {"score": aj.ScoreFn(lambda s, b, h, q, k: s + table[jnp.abs(q - k)])},
        "cannot run this mask or score on its tiles: dynamic_slice of query and key together",
    ),
}


@pytest.mark.parametrize("sizes, options, reason", wrong.values(), ids=wrong)
def test_refusals(sizes, options, reason):
    """Named it raises and says who can; not named, xla runs it."""
    q, k, v = arrays(**sizes)
    with pytest.raises(NotImplementedError, match=f"'mosaic_tpu' cannot: {reason}"):
        aj.attention(q, k, v, config=SMALL, **options)
    shapes = described(**sizes)
    found = aj.explain(*shapes, platform="tpu", **options)
    assert found.choices["forward"].name == "xla"
    assert reason in found.choices["forward"].reasons["mosaic_tpu"]


def test_other_devices():
    with pytest.raises(
        NotImplementedError, match="'mosaic_tpu' cannot: runs on TPUs only, not on cpu. .*xla, reference"
    ):
        aj.attention(*arrays(), implementation="mosaic_tpu")
    found = aj.explain(*described(), platform="cuda")
    assert found.choices["forward"].reasons["mosaic_tpu"] == "runs on TPUs only, not on cuda"


def test_block_maps_of_other_sizes():
    q, k, v = described(t=256)
    block_map = aj.BlockMap.build(aj.Causal(), 256, 256, block_q=64, block_k=128)
    with pytest.raises(
        NotImplementedError, match="block_map has blocks of 64 x 128: those of TPUs are multiples of 128"
    ):
        aj.explain(q, k, v, platform="tpu", mask=aj.Causal(), block_map=block_map, implementation="mosaic_tpu")


def test_lists_that_scalar_memory_has_no_room_for():
    ids = jax.ShapeDtypeStruct((64, 65536), jnp.int32)
    x = jax.ShapeDtypeStruct((64, 65536, 2, 64), jnp.bfloat16)
    with pytest.raises(
        NotImplementedError, match=r"would need \d+ KiB of scalar memory for its tiles, and has 512 KiB"
    ):
        aj.explain(x, x, x, platform="tpu", mask=aj.Segments(ids), implementation="mosaic_tpu")
    longest = jax.ShapeDtypeStruct((1, 2**24, 1, 64), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="counts up to 8192 blocks of queries, or keys"):
        aj.explain(*[longest] * 3, platform="tpu", implementation="mosaic_tpu")


@pytest.mark.parametrize(
    "options",
    [{"block_q": 100}, {"block_k": 0}, {"backward_block_q": True}, {"block_q": 12, "interpret": True}],
    ids=str,
)
def test_configs_that_are_none(options):
    with pytest.raises(ValueError, match="Config: (backward_)?block_[qk] must be a multiple of (128|8) or None, got"):
        Config(**options)


def test_a_foreign_config():
    problem, operands = build(*arrays(), config=aj.kernels.xla.Config())
    assert mosaic_tpu.unsupported(problem, operands, "tpu", "forward") == "config is not one of mosaic_tpu"


CONFIGS = {
    "wide": Config(block_q=8, block_k=32, interpret=True),
    "tall": Config(block_q=32, block_k=8, interpret=True),
    "backward_apart": Config(16, 16, 24, 8, interpret=True),
    "usual": Config(interpret=True),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("score", [SCORES[-1], SCORES[4]], ids=repr)
def test_configs(config, score):
    """The answer is the same to rounding, however it is cut; distances (T5's) too."""
    (mask,) = (mask for mask in MASKS if mask.name == "segments")
    case = Case(mask, score, Shape(batch=(2,), T=37, S=53, N=4, K=2))
    inputs = draw(case, "float32")

    def solve(x, d, cotangents):
        value, pull = jax.vjp(functools.partial(attend, case, d=d, implementation="mosaic_tpu", config=config), x)
        return value, pull(cotangents)[0]

    (out, lse), gradients = jax.jit(solve)(inputs.x, inputs.d, inputs.cotangents)
    want = expect(case, inputs)
    want.check(want.answer._replace(out=out, lse=lse, gradients=gradients))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_races(dtype):
    """Under the interpreter that knows the memories of a TPU, with blocks of whole lanes.

    It is called past the primitives, whose lowering has no place for its side effects.
    """
    from jax.experimental.pallas import tpu as pltpu

    q, k, v = arrays(t=150, s=200, h=16, v=32, dtype=dtype, batch=(1,))
    rng = np.random.default_rng(1)
    bias, ct_out = (jnp.asarray(rng.normal(size=size), dtype) for size in ((4, 150, 200), (1, 150, 4, 32)))

    def solve(config):
        options = dict(mask=aj.Causal(), score=aj.Bias(bias), config=config)
        problem, operands = build(q, k, v, **options)
        wanted = tuple((i, operands[i].shape) for i in problem.differentiable)

        def run(operands):
            rows = mosaic_tpu.forward(problem, operands, "tpu")
            return rows, mosaic_tpu.backward(problem, operands, rows, ct_out, jnp.zeros_like(rows.total), wanted)

        return jax.tree.map(np.asarray, jax.jit(run)(operands))

    params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    got = solve(Config(block_q=128, block_k=128, interpret=params))
    want = solve(Config(block_q=128, block_k=128, interpret=True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter

    races = getattr(interpreter, "races", None)  # later versions raise an error
    assert races is None or not races.races_found


def test_same_bits_every_time():
    q, k, v = arrays(t=40, s=72)
    run = jax.jit(jax.grad(lambda q: jnp.sin(aj.attention(q, k, v, mask=aj.Causal(), config=SMALL)).sum()))
    np.testing.assert_array_equal(run(q), run(q))


def test_tiles_that_fit():
    """Large ones where there is room for them, smaller ones where not, also than what is asked for; explain says so."""
    explained = lambda config=None, **sizes: str(aj.explain(*described(**sizes), platform="tpu", config=config))
    assert "1024 x 1024" in explained() and "would need" not in explained()
    assert "256 x 256" in explained(t=200)
    smaller = explained(h=256, v=256, dtype=jnp.float32)
    assert "forward: 512 x 512; 1024 x 1024 would need 27 MiB of vector memory" in smaller
    assert "backward: 512 x 512; 1024 x 1024 would need 30 MiB of vector memory" in smaller
    assert "1024 x 1024; 2048 x 1024 would need" in explained(Config(block_q=2048))
    assert aj.explain(*described(), platform="tpu").choices["backward"].name == "mosaic_tpu"


@pytest.mark.parametrize("by_key", [False, True])
def test_steps(by_key):
    """Every tile that is seen is one step; rows begin and end; those that see nothing have one step, too."""
    q, k, v = arrays(t=64, s=64, batch=())
    mask = aj.Where(lambda b, h, q, k: (q // 16 + k // 16 + h) % 3 == 0, scan=True) & ~aj.Window(0, 15)
    problem, operands = build(q, k, v, mask=mask)
    found = steps(problem, operands, 16, 16, by_key=by_key)
    kinds = np.asarray(problem.kinds(operands, 16, 16)).reshape(-1, 4, 4)
    for h, numbers in enumerate(np.asarray(found.numbers)[0]):
        seen = np.zeros((4, 4), int)
        step = step_of(numbers)
        rows = step.key if by_key else step.query
        assert (np.diff(rows) >= 0).all()
        assert rows[step.first != 0].tolist() == rows[step.last != 0].tolist() == [0, 1, 2, 3]
        np.add.at(seen, (step.query, step.key), step.kind)
        assert (seen == kinds[h % len(kinds)]).all()


def test_steps_of_a_known_mask_hold_no_idle_ones():
    problem, operands = build(*described(t=2048), mask=aj.Causal())
    found = steps(problem, operands, 512, 512)
    assert isinstance(found.numbers, np.ndarray) and found.numbers.shape == (1, 1, 10)
    assert (step_of(found.numbers).kind == PARTIAL).sum() == 4
