"""What the compiled kernel refuses: calls it has no code for, which go to XLA, and frames that its library finds wrong.

How `explain` and `implementation=None` choose is in test_dispatch.py.
"""

import functools
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attnjax as aj
from attnjax.attention import build
from attnjax.kernels import cpu
from attnjax.scores import Scale

pytestmark = pytest.mark.compiled

B, T, S, N, K, H, V = 2, 5, 7, 4, 2, 8, 6


def arrays(t=T, s=S, h=H, v=V, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=size), dtype) for size in ((B, t, N, h), (B, s, K, h), (B, s, K, v))]


class Squared(aj.Score):
    """A score of a user's own."""

    def evaluate(self, logits, tile):
        return logits * logits


class Difference(aj.Mask):
    """A mask of a user's own that does not come apart."""

    def evaluate(self, tile):
        return tile.q - tile.k < 3

    def blocks(self, grid):
        return np.int8(1)


def nested(depth):
    """A mask that holds so many values at once while it is evaluated from left to right."""
    mask = aj.Causal()
    for n in range(1, depth):
        mask = aj.Causal(n) | ~mask
    return mask


def alternating(count):
    return functools.reduce(lambda mask, n: mask | aj.Prefix(n % S), range(count), aj.Causal())


captured = jnp.ones(S)
where = aj.Where(lambda b, h, q, k: (q + k) % 3 != 0)
wide = np.arange(S)
REFUSED = {
    "function": ({"score": aj.ScoreFn(lambda s, b, h, q, k: s * captured[k])}, "cannot run ScoreFn"),
    "own_score": ({"score": (aj.SoftCap(3.0), Squared())}, "cannot run Squared, a function of JAX"),
    "seven_scores": ({"score": (aj.Bias(jnp.ones(S)),) * 7}, "takes 6 scores at most"),
    "own_mask": ({"mask": Difference()}, "cannot take this mask: arithmetic between queries and keys"),
    "many_comparisons": ({"mask": alternating(24)}, "cannot take a mask of so many parts"),
    "many_arrays": ({"mask": where & where & where & where & where}, "cannot take a mask of so many parts"),
    "deep": ({"mask": nested(9)}, "cannot take a mask of so many parts"),
}


@pytest.mark.parametrize("options, reason", REFUSED.values(), ids=REFUSED)
def test_what_it_has_no_code_for(options, reason):
    """Named it raises, also for the gradient alone; not named, the answer is that of xla."""
    q, k, v = arrays()
    run = lambda name: lambda *qkv: aj.attention(*qkv, implementation=name, **options)
    gradient = lambda name: jax.grad(lambda *qkv: jnp.sin(run(name)(*qkv)).sum())
    for named in (run("cpu"), jax.jit(run("cpu")), gradient("cpu"), jax.vmap(run("cpu"))):
        with pytest.raises(NotImplementedError, match=f"'cpu' cannot: .*{re.escape(reason)}.* xla, reference can"):
            named(q, k, v)
    np.testing.assert_array_equal(run(None)(q, k, v), run("xla")(q, k, v))
    np.testing.assert_array_equal(gradient(None)(q, k, v), gradient("xla")(q, k, v))


MOST = {
    "six_scores": {"scale": jnp.arange(N) / 9, "score": (aj.Bias(jnp.ones(S)),) * 6},
    "six_caps": {"score": tuple(aj.SoftCap(jnp.float32(n)) for n in range(1, 7))},
    "many_comparisons": {"mask": alternating(23)},
    "four_arrays": {"mask": where & where & where & where},
    "depth": {"mask": nested(8)},
}


@pytest.mark.parametrize("options", MOST.values(), ids=MOST)
def test_the_most_it_has_room_for(options):
    q, k, v = arrays()
    run = lambda name: aj.attention(q, k, v, implementation=name, **options)
    np.testing.assert_allclose(run("cpu"), run("reference"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sizes", [{"h": 513}, {"v": 513}, {"h": 600, "v": 600}], ids=str)
def test_large_heads(sizes):
    q, k, v = arrays(**sizes)
    with pytest.raises(NotImplementedError, match="takes head sizes up to 512"):
        aj.attention(q, k, v, implementation="cpu")
    run = lambda name: aj.attention(q, k, v, implementation=name)
    np.testing.assert_array_equal(run(None), run("xla"))


def test_masks_that_would_be_packed_into_too_much(monkeypatch):
    """A function of pairs becomes bits, one for each, while those are few."""
    q, k, v = arrays(t=40, s=90, h=1, v=1, dtype=jnp.bfloat16)
    run = lambda mask, name: aj.attention(q, k, v, mask=mask, implementation=name)
    monkeypatch.setattr(cpu, "_MOST_BITS", 0)
    mask = aj.Where(lambda b, h, q, k: (k + q * h) % 3 != 0)  # 2560 bytes; query, key and value have 2080
    with pytest.raises(NotImplementedError, match="would pack this mask into 0 MiB, more than 0 MiB"):
        run(mask, "cpu")
    np.testing.assert_array_equal(run(mask, None), run(mask, "xla"))


def test_a_long_mask_is_refused_before_anything_of_its_size_is_made():
    x = jax.ShapeDtypeStruct((1, 2**17, 4, 64), jnp.float32)
    found = aj.explain(x, x, x, mask=aj.Where(lambda b, h, q, k: (q * h) % 7 > k % 5), platform="cpu")
    assert found.choices["forward"].name == "xla"
    assert "would pack this mask into 8192 MiB, more than 384 MiB" in found.choices["forward"].reasons["cpu"]


def test_ids_of_64_bits_on_both_sides_are_taken():
    with jax.enable_x64(True):
        q, k, v = arrays(s=T)
        mask = aj.Segments(jnp.arange(T) // 2)
        run = lambda name: aj.attention(q, k, v, mask=mask, implementation=name)
        np.testing.assert_allclose(run("cpu"), run("reference"), atol=2e-6)
        assert aj.explain(q, k, v, mask=mask, platform="cpu").choices["forward"].name == "cpu"


def test_other_platforms():
    x = jax.ShapeDtypeStruct((1, 64, 4, 64), jnp.float32)
    for platform in ("cuda", "rocm", "tpu"):
        assert aj.explain(x, x, x, platform=platform).choices["forward"].reasons["cpu"] == (
            f"runs on CPUs only, not on {platform}"
        )
        with pytest.raises(NotImplementedError, match=f"runs on CPUs only, not on {platform}"):
            aj.explain(x, x, x, platform=platform, implementation="cpu")


# The library itself. It is told everything again by XLA, and believes nothing.


def frame(part="forward", **options):
    """What the kernel is called with: operands, results and attributes. The backward is that of everything."""
    problem, operands = build(*arrays(), implementation="cpu", **options)
    with mock.patch.object(cpu, "_run", wraps=cpu._run) as run:
        rows = cpu.forward(problem, operands, "cpu")
        if part == "backward":
            wanted = tuple((i, operands[i].shape) for i in problem.differentiable)
            cpu.backward(problem, operands, rows, rows.out, rows.highest, wanted)
    _, operands, results, attributes = run.call_args.args
    return list(operands), list(results), dict(attributes)


def run(part, operands, results, attributes):
    return jax.block_until_ready(jax.ffi.ffi_call(f"attnjax_{part}", results)(*operands, **attributes))


def refuses(text, part, operands, results, attributes):
    with pytest.raises((jax.errors.JaxRuntimeError, ValueError), match=f"INVALID_ARGUMENT: attnjax: .*{text}"):
        run(part, operands, results, attributes)


FLOAT = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
integers = lambda *values: np.array(values, np.int64)
SINKS = {"sinks": jnp.ones(N)}
MASKED = {"mask": aj.Causal(), "score": (aj.Bias(jnp.ones((T, S))), aj.ALiBi(jnp.ones(N)))}
MAPPED = MASKED | {"block_map": aj.BlockMap.build(aj.Causal(), T, S)}
CAPPED = {"score": aj.SoftCap(2.0)}
LATE = {"score": (aj.SoftCap(2.0), Scale(jnp.float32(0.3)))}
DROPPED = {"dropout": aj.Dropout(0.1, 3)}
BITS = {"mask": aj.Where(lambda b, h, q, k: (q + k) % 3 != 0)}
DENSE = {"mask": jnp.ones((N, T, S), bool)}

# Options of the call; position, or name, of what is replaced, and by what; and what the library says.
WRONG_OPERANDS = {
    "query_axes": ({}, 0, jnp.ones((T, N, H)), "query has 3 axes, expected 4"),
    "key_heads": ({}, 1, jnp.ones((B, S, 3, H)), "query heads must be a multiple of key heads"),
    "key_size": ({}, 1, jnp.ones((B, S, K, H + 1)), "key is .* expected"),
    "value_length": ({}, 2, jnp.ones((B, S + 1, K, V)), "value is .* expected"),
    "no_size": ({}, 2, jnp.ones((B, S, K, 0)), "takes head sizes from 1 to 512"),
    "large_size": ({}, 2, jnp.ones((B, S, K, 513)), "takes head sizes from 1 to 512"),
    "batch": ({}, 1, jnp.ones((3, S, K, H)), "key has a batch that is not \\[2\\]"),
    "types": ({}, 1, jnp.ones((B, S, K, H), jnp.bfloat16), "query, key and value must have one type"),
    "integers": ({}, 0, jnp.ones((B, T, N, H), jnp.int32), "query must hold floats"),
    "scale": ({}, 3, jnp.ones((1, N + 1)), "scale is \\[5\\], expected \\[4\\]"),
    "scale_type": ({}, 3, jnp.ones((1, 1), jnp.bfloat16), "scale has the wrong type"),
    "cap": (CAPPED, 4, jnp.ones((1, K)), "soft cap is \\[2\\], expected \\[4\\]"),
    "cap_type": (CAPPED, 4, jnp.ones((1, 1), jnp.int32), "soft cap has the wrong type"),
    "sinks": (SINKS, 4, jnp.ones((1, N + 1)), "sinks is \\[5\\], expected \\[4\\]"),
    "sinks_type": (SINKS, 4, jnp.ones((1, N), jnp.bfloat16), "sinks has the wrong type"),
    "seed": (DROPPED, 4, jnp.ones((1,), jnp.int32), "seeds has the wrong type"),
    "mask_keys": (MASKED, 4, jnp.ones((1, S + 1), jnp.int32), "mask keys is \\[8\\], expected \\[7\\]"),
    "mask_type": (MASKED, 5, jnp.ones((1, T)), "mask queries has the wrong type"),
    "map": (MAPPED, 6, jnp.ones((1, 1, 2, 1), jnp.int8), "block map is"),
    "map_type": (MAPPED, 6, jnp.ones((1, 1, 1, 1), jnp.int32), "block map has the wrong type"),
    "bias": (MASKED, 6, jnp.ones((1, 1, T, S - 1)), "bias is"),
    "bias_axes": (MASKED, 6, jnp.ones((1, T, S)), "bias has 3 axes"),
    "bias_type": (MASKED, 6, jnp.ones((1, 1, T, S), jnp.int32), "score array must hold floats"),
    "distances": (MASKED, 7, jnp.ones((1, N, T + S)), "score by distance is"),
    "one_distance": (MASKED, 7, jnp.ones((1, N, 1)), "a score by distance lacks distances"),
    "distance_type": (MASKED, 7, jnp.ones((1, N, T + S - 1), jnp.bfloat16), "score by distance has the wrong type"),
    "dense_type": (DENSE, 4, jnp.ones((1, N, T, S), jnp.int32), "mask array has the wrong type"),
    "dense_heads": (DENSE, 4, jnp.ones((1, K, T, S), bool), "mask array is"),
    "bits": (BITS, 4, jnp.ones((1, 1, 1, T, 2), jnp.uint8), "mask bits must be blocks of 64 keys"),
    "bits_heads": (BITS, 4, jnp.ones((1, K, 1, T, 8), jnp.uint8), "mask bits must be of one head or all"),
    "bits_type": (BITS, 4, jnp.ones((1, 1, 1, T, 8), bool), "mask bits has the wrong type"),
    "bits_rows": (BITS, 5, jnp.array([[0, 2]], jnp.int32), "mask rows must rise from 0 to the number of blocks"),
    "bits_falling": (BITS, 5, jnp.array([[1, 0]], jnp.int32), "mask rows must rise"),
    "bits_columns": (BITS, 6, jnp.zeros((1, 2), jnp.int32), "mask columns is \\[2\\], expected \\[1\\]"),
    "bits_batch": (BITS, 6, jnp.zeros((B, 1), jnp.int32), "mask columns must be without a batch"),
    "factor": (LATE, 5, jnp.ones((1, K)), "factor is \\[2\\], expected \\[4\\]"),
}


@pytest.mark.parametrize("options, position, wrong, text", WRONG_OPERANDS.values(), ids=WRONG_OPERANDS)
def test_operands_that_do_not_fit(options, position, wrong, text):
    operands, results, attributes = frame(**options)
    run("forward", operands, results, attributes)
    operands[position] = wrong
    refuses(text, "forward", operands, results, attributes)


WRONG_RESULTS = {
    "out": (0, FLOAT((B, T, N, V + 1)), "out is"),
    "out_type": (0, jax.ShapeDtypeStruct((B, T, N, V), jnp.bfloat16), "out has the wrong type"),
    "out_batch": (0, FLOAT((1, T, N, V)), "out must have the whole batch"),
    "highest": (1, FLOAT((B, T + 1, N)), "highest is"),
    "total": (2, jax.ShapeDtypeStruct((B, T, N), jnp.float16), "total has the wrong type"),
}


@pytest.mark.parametrize("position, wrong, text", WRONG_RESULTS.values(), ids=WRONG_RESULTS)
def test_results_that_do_not_fit(position, wrong, text):
    operands, results, attributes = frame()
    results[position] = wrong
    refuses(text, "forward", operands, results, attributes)


def test_too_few_and_too_many():
    operands, results, attributes = frame(**MASKED)
    for count in range(len(operands)):
        refuses("is missing", "forward", operands[:count], results, attributes)
    for count in range(1, 3):  # without any result nothing is run
        refuses("the result .* is missing", "forward", operands, results[:count], attributes)
    refuses("has 9 operands, expected 8", "forward", [*operands, operands[0]], results, attributes)
    refuses("has 4 results, expected 3", "forward", operands, [*results, results[0]], attributes)


WRONG_ATTRIBUTES = {
    "batch": ("batch", integers(3), "has a batch that is not \\[3\\]"),
    "batch_axes": ("batch", integers(2, 5), "query has 4 axes, expected 5"),
    "negative_batch": ("batch", integers(-2), "has a negative size"),
    "batch_type": ("batch", np.array([2], np.int32), "attribute batch is missing"),
    "huge_batch": ("batch", integers(2**40, 2**40), "an array has more than 2\\^63 elements"),
    "dropout": ("dropout", np.float64(1.0), "dropout must be in \\[0, 1\\)"),
    "dropout_nan": ("dropout", np.float64(np.nan), "dropout must be in \\[0, 1\\)"),
    "mask_code": ("mask", integers(10), "the mask's program is wrong"),
    "mask_negative": ("mask", integers(-1), "the mask's program is wrong"),
    "mask_of_nothing": ("mask", integers(7), "the mask's program is wrong"),
    "mask_negates_nothing": ("mask", integers(9), "the mask's program is wrong"),
    "mask_of_two": ("mask", integers(0, 0), "wrong|missing|expected"),
    "mask_too_long": ("mask", integers(0, *[9] * 64), "the mask's program is wrong"),
    "blocks_zero": ("blocks", integers(0, 64), "blocks must have at least one query and key"),
    "score_code": ("scores", integers(1, 4), "the scores are wrong"),
    "seven_scores": ("scores", integers(*[1] * 7), "missing|wrong|expected|is"),
    "isa": ("isa", "sse9", "this processor cannot run sse9"),
}


@pytest.mark.parametrize("name, wrong, text", WRONG_ATTRIBUTES.values(), ids=WRONG_ATTRIBUTES)
def test_attributes_that_do_not_fit(name, wrong, text):
    operands, results, attributes = frame(**MAPPED)
    refuses(text, "forward", operands, results, attributes | {name: wrong})


@pytest.mark.parametrize("part", cpu.PARTS)
def test_attributes_that_are_missing(part):
    operands, results, attributes = frame(part, **MASKED, **SINKS, **DROPPED)
    for name in attributes:
        rest = {other: value for other, value in attributes.items() if other != name}
        refuses(f"attribute {name} is missing", part, operands, results, rest)


WRONG_GRADIENTS = {
    "out": ("operands", -5, jnp.ones((B, T, N, V + 1)), "out is"),
    "out_type": ("operands", -5, jnp.ones((B, T, N, V), jnp.bfloat16), "out has the wrong type"),
    "highest": ("operands", -4, jnp.ones((B, T, N + 1)), "highest is"),
    "total_type": ("operands", -3, jnp.ones((B, T, N), jnp.bfloat16), "total has the wrong type"),
    "cotangent_type": ("operands", -2, jnp.ones((B, T, N, V), jnp.bfloat16), "cotangent of out has the wrong type"),
    "cotangent": ("operands", -2, jnp.ones((B, T, N, V - 1)), "cotangent of out is"),
    "lse_batch": ("operands", -1, jnp.ones((1, T, N)), "cotangent of lse must have the whole batch"),
    "query": ("results", 0, FLOAT((B, T, N, H + 1)), "d query is"),
    "key_type": ("results", 1, jax.ShapeDtypeStruct((B, S, K, H), jnp.bfloat16), "d key has the wrong type"),
    "value": ("results", 2, FLOAT((B, S, N, V)), "d value is"),
    "bias": ("results", 4, FLOAT((1, 1, T, S + 1)), "d score is"),
    "distances": ("results", 5, FLOAT((1, N, T + S - 1)), "d score must have the whole batch"),
    "scale": ("results", 3, FLOAT((1, N, T)), "d scale must have the whole batch"),
    "cap": ("results", 6, FLOAT((B, N, S)), "d score is"),
    "few_wanted": ("attributes", "wanted", integers(1, 1, 1), "wanted has the wrong length"),
    "none_wanted": ("attributes", "wanted", integers(*[0] * 7), "has 7 results, expected 0"),
}


@pytest.mark.parametrize("where, which, wrong, text", WRONG_GRADIENTS.values(), ids=WRONG_GRADIENTS)
def test_gradients_that_do_not_fit(where, which, wrong, text):
    options = MASKED | {"scale": jnp.ones(N), "score": (*MASKED["score"], aj.SoftCap(jnp.ones(B)))}
    operands, results, attributes = given = frame("backward", **options)
    run("backward", *given)
    {"operands": operands, "results": results, "attributes": attributes}[where][which] = wrong
    refuses(text, "backward", operands, results, attributes)


def test_sizes_whose_product_overflows():
    """Arrays without elements may have axes of any length."""
    huge = jnp.zeros((0, 2**40, 2**20, 512))
    operands, results, attributes = frame()
    refuses(
        "an array has more than 2\\^63 elements", "forward", [huge] * 3, results, attributes | {"batch": integers(0)}
    )
