"""Bad input: each is refused before anything is computed, by an error that names the argument and the rule it breaks.

Padding and empty shapes, which are not bad input, are in test_edges.
"""

import functools
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attnjax as aj
from attnjax.kernels import cpu, mosaic_gpu, mosaic_tpu, triton, xla
from attnjax.models import DecoderConfig, Sampling, VisionConfig
from attnjax.positions import RoPE, YaRN, alibi_slopes, sinusoidal
from attnjax.scores import Scale


def floats(*shape, dtype=jnp.float32):
    return jnp.zeros(shape, dtype)


def integers(*shape):
    return jnp.zeros(shape, jnp.int32)


def booleans(*shape):
    return jnp.zeros(shape, bool)


B, T, S, N, K, H, V = 2, 7, 9, 4, 2, 8, 5
Q, KEY, VALUE = floats(B, T, N, H), floats(B, S, K, H), floats(B, S, K, V)


def call(query=Q, key=KEY, value=VALUE, **options):
    return aj.attention(query, key, value, **options)


def every(*cases):
    """Cases (name, function, error, text): the text is looked for as it stands, `...` stands for anything."""
    return pytest.mark.parametrize("bad, error, text", [pytest.param(*case[1:], id=case[0]) for case in cases])


def check(bad, error, text):
    pattern = ".*".join(re.escape(part) for part in text.split("..."))
    with pytest.raises(error, match=f"(?s){pattern}") as raised:
        bad()
    assert raised.type is error  # not one of JAX's own, some of which are subclasses of TypeError
    assert len(str(raised.value)) < 400


@every(
    ("batch", lambda: call(floats(3, T, N, H)), ValueError, "query, key and value have batch axes [3], [2] and [2]"),
    ("head_size", lambda: call(key=floats(B, S, K, 6)), ValueError, "query has head size 8 and key has 6"),
    ("key_length", lambda: call(value=floats(B, 8, K, V)), ValueError, "key has 9 positions and value has 8"),
    ("value_heads", lambda: call(value=floats(B, S, 1, V)), ValueError, "key has 2 heads and value has 1"),
    ("not_a_multiple", lambda: call(floats(B, T, 5, H)), ValueError, "number of query heads must be a multiple of"),
    ("ranks", lambda: call(floats(T, N, H)), ValueError, "query, key and value have 3, 4 and 4 axes"),
    ("two_axes", lambda: call(floats(T, H), floats(S, H), floats(S, H)), ValueError, "query must have at least 3 axes"),
    ("no_heads", lambda: call(floats(B, T, 0, H)), ValueError, "query and key need at least one head"),
    ("no_key_heads", lambda: call(key=floats(B, S, 0, H), value=floats(B, S, 0, V)), ValueError, "at least one head"),
    ("no_size", lambda: call(floats(B, T, N, 0), floats(B, S, K, 0)), ValueError, "a head size of at least 1"),
)
def test_sizes_that_do_not_fit(bad, error, text):
    check(bad, error, text)


def test_shapes_that_came_are_shown():
    """Every error of sizes ends with all three shapes, so that nothing has to be printed to find the mistake."""
    with pytest.raises(ValueError, match=re.escape("query [2, 7, 5, 8], key [2, 9, 2, 8], value [2, 9, 2, 5]")):
        call(floats(B, T, 5, H))


@every(
    ("integer", lambda: call(integers(B, T, N, H)), TypeError, "query must be float64, float32, ...got int32"),
    ("boolean", lambda: call(value=booleans(B, S, K, V)), TypeError, "value must be float64, float32, ...got bool"),
    ("complex", lambda: call(floats(B, T, N, H, dtype=jnp.complex64)), TypeError, "query must be ...got complex64"),
    ("float8", lambda: call(key=KEY.astype(jnp.float8_e4m3fn)), TypeError, "key must be ...got float8_e4m3fn"),
    ("mixed", lambda: call(Q.astype(jnp.bfloat16)), TypeError, "must have one dtype, got query bfloat16, key float32"),
    ("none", lambda: call(None), TypeError, "query must be an array, got NoneType"),
    ("text", lambda: call(value="v"), TypeError, "value must be an array, got str"),
)
def test_types_that_do_not_fit(bad, error, text):
    check(bad, error, text)


@every(
    ("dense", lambda: call(mask=booleans(T, 8)), ValueError, "mask: Dense.array is bool[7, 8] and must broadcast to"),
    ("dense_batch", lambda: call(mask=booleans(3, 1, T, S)), ValueError, "mask: Dense.array is bool[3, 1, 7, 9]"),
    ("dense_heads", lambda: call(mask=booleans(K, T, S)), ValueError, "N = 4, T = 7, S = 9"),
    ("dense_rank", lambda: call(mask=booleans(1, B, 1, T, S)), ValueError, "must broadcast to [*B, N, T, S]"),
    ("float", lambda: call(mask=floats(T, S)), TypeError, "boolean array...got float32[7, 9]...attnjax.Bias(array)"),
    ("integer", lambda: call(mask=integers(T, S)), TypeError, "boolean array, true where...got int32[7, 9]"),
    ("in_and", lambda: call(mask=aj.Causal() & booleans(T, 8)), ValueError, "mask: Dense.array is bool[7, 8]"),
    ("in_not", lambda: call(mask=~aj.Dense(booleans(T, 8))), ValueError, "mask: Dense.array is bool[7, 8]"),
    ("text", lambda: call(mask="causal"), TypeError, "mask must be an attnjax Mask or a boolean array, got str"),
    ("class", lambda: call(mask=aj.Causal), TypeError, "mask must be an attnjax Mask"),
    ("function", lambda: call(mask=lambda b, h, q, k: q >= k), TypeError, "mask must be...attnjax.Where(function)"),
    ("tuple", lambda: call(mask=(aj.Causal(), aj.Window(1, 1))), TypeError, "mask must be...&"),
    ("score", lambda: call(mask=aj.SoftCap(1.0)), TypeError, "mask must be an attnjax Mask...got SoftCap"),
    ("number", lambda: aj.Causal() & 3, TypeError, "mask must be an attnjax Mask or a boolean array, got int"),
)
def test_masks_that_do_not_fit(bad, error, text):
    check(bad, error, text)


@every(
    (
        "query_ids",
        lambda: call(mask=aj.Segments(integers(8), integers(S))),
        ValueError,
        "query_ids is int32[8]...T = 7",
    ),
    ("key_ids", lambda: call(mask=aj.Segments(integers(T))), ValueError, "Segments.key_ids is int32[7]...S = 9"),
    ("batch", lambda: call(mask=aj.Segments(integers(3, T), integers(S))), ValueError, "query_ids is int32[3, 7]"),
    ("scalar", lambda: call(mask=aj.Segments(jnp.int32(3))), ValueError, "Segments.query_ids is int32[] and must have"),
    ("float", lambda: aj.Segments(floats(T)), TypeError, "Segments: query_ids must be an array of integers"),
    (
        "float_keys",
        lambda: aj.Segments(integers(T), floats(S)),
        TypeError,
        "Segments: key_ids must be an array of integ",
    ),
    ("none", lambda: aj.Segments(None), TypeError, "Segments: query_ids must be an array of integers, got None"),
    ("order", lambda: call(mask=aj.Permutation(integers(T))), ValueError, "Permutation.key_order is int32[7]...S = 9"),
    ("float_order", lambda: aj.Permutation(floats(T)), TypeError, "Permutation: order must be an array of integers"),
)
def test_ids_that_do_not_fit(bad, error, text):
    check(bad, error, text)


@every(
    ("left", lambda: aj.Window(-1, 0), ValueError, "Window: left must be at least 0, got -1"),
    ("right", lambda: aj.Window(0, -2), ValueError, "Window: right must be at least 0, got -2"),
    ("left_array", lambda: aj.Window(jnp.array([1, -1])), ValueError, "Window: left must be at least 0, got -1"),
    ("left_float", lambda: aj.Window(1.5), TypeError, "Window: left must be an integer"),
    ("left_shape", lambda: call(mask=aj.Window(integers(3))), ValueError, "mask: Window.left is int32[3]...*B = [2]"),
    ("chunk_zero", lambda: aj.Chunked(0), ValueError, "Chunked: size must be at least 1, got 0"),
    ("chunk_negative", lambda: aj.Chunked(-3), ValueError, "Chunked: size must be at least 1, got -3"),
    ("chunk_float", lambda: aj.Chunked(2.0), TypeError, "Chunked: size must be an integer"),
    ("prefix", lambda: aj.Prefix(-1), ValueError, "Prefix: length must be at least 0, got -1"),
    ("prefix_bool", lambda: aj.Prefix(True), TypeError, "Prefix: length must be an integer"),
    ("prefix_long", lambda: call(mask=aj.Prefix(10)), ValueError, "mask: Prefix.length is 10, beyond S = 9"),
    (
        "prefix_inside",
        lambda: call(mask=aj.Causal() | ~aj.Prefix(jnp.array([1, 10]))),
        ValueError,
        "mask: Prefix.length is 10, beyond S = 9",
    ),
    ("length", lambda: aj.Lengths(key=-1), ValueError, "Lengths: key must be at least 0, got -1"),
    ("length_float", lambda: aj.Lengths(key=floats(B)), TypeError, "Lengths: key must be integers, got float32[2]"),
    ("length_long", lambda: call(mask=aj.Lengths(jnp.array([9, 10]))), ValueError, "Lengths.key is 10, beyond S = 9"),
    ("query_long", lambda: call(mask=aj.Lengths(query=8)), ValueError, "mask: Lengths.query is 8, beyond T = 7"),
    ("length_shape", lambda: call(mask=aj.Lengths(integers(3))), ValueError, "mask: Lengths.key is int32[3]"),
    ("stride", lambda: aj.Dilated(0), ValueError, "Dilated: stride must be at least 1, got 0"),
    ("offset", lambda: aj.Causal(1.5), TypeError, "Causal: offset must be an integer"),
    ("offset_shape", lambda: call(mask=aj.Causal(integers(2, 2))), ValueError, "mask: Causal.offset is int32[2, 2]"),
)
def test_numbers_in_masks_that_do_not_fit(bad, error, text):
    check(bad, error, text)


@every(
    ("not_callable", lambda: aj.Where(3), TypeError, "Where takes a function of (b, h, q, k), got int"),
    ("integer", lambda: aj.Where(lambda b, h, q, k: q - k), TypeError, "Where must give one boolean scalar"),
    ("vector", lambda: aj.Where(lambda b, h, q, k: booleans(3)), TypeError, "Where must give one boolean scalar"),
    ("arguments", lambda: aj.Where(lambda q, k: q > k), TypeError, "Where...(b, h, q, k)"),
    ("score", lambda: aj.ScoreFn("s"), TypeError, "ScoreFn takes a function of (score, b, h, q, k), got str"),
    ("index", lambda: aj.ScoreFn(lambda s, b, h, q, k: q), TypeError, "ScoreFn must give one floating-point scalar"),
    ("two", lambda: aj.ScoreFn(lambda s, b, h, q, k: (s, s)), TypeError, "ScoreFn must give one floating-point scalar"),
    ("score_arguments", lambda: aj.ScoreFn(lambda s: s), TypeError, "ScoreFn...(score, b, h, q, k)"),
)
def test_functions_that_do_not_fit(bad, error, text):
    check(bad, error, text)


@every(
    (
        "bias",
        lambda: call(score=aj.Bias(floats(T, 8))),
        ValueError,
        "score: Bias.array is float32[7, 8] and must broad",
    ),
    (
        "bias_batch",
        lambda: call(score=aj.Bias(floats(3, 1, 1, S))),
        ValueError,
        "score: Bias.array is float32[3, 1, 1, 9]",
    ),
    ("bias_integer", lambda: aj.Bias(integers(T, S)), TypeError, "Bias: array must be an array of floats, got int32"),
    ("bias_boolean", lambda: aj.Bias(booleans(T, S)), TypeError, "Bias: array must be an array of floats, got bool"),
    ("bias_number", lambda: aj.Bias(1.0), TypeError, "Bias: array must be an array of floats, got 1.0"),
    ("array", lambda: call(score=floats(T, S)), TypeError, "score must be an attnjax Score...attnjax.Bias(array)"),
    ("function", lambda: call(score=lambda s, *_: s), TypeError, "score must be...attnjax.ScoreFn(function)"),
    ("mask", lambda: call(score=aj.Causal()), TypeError, "score must be an attnjax Score...got Causal"),
    ("in_tuple", lambda: call(score=(aj.SoftCap(1.0), 3)), TypeError, "score must be an attnjax Score...got int"),
    ("slopes", lambda: call(score=aj.ALiBi(floats(3))), ValueError, "score: ALiBi.slopes is float32[3]...N = 4"),
    ("slopes_integer", lambda: aj.ALiBi(integers(N)), TypeError, "ALiBi: slopes must be an array of floats"),
    ("slopes_offset", lambda: aj.ALiBi(floats(N), 1.5), TypeError, "ALiBi: offset must be an integer"),
    ("heads", lambda: aj.ALiBi.for_heads(0), ValueError, "num_heads must be an integer of at least 1"),
    (
        "table",
        lambda: call(score=aj.RelativeBias(floats(8, 3))),
        ValueError,
        "RelativeBias.table is float32[8, 3]...N = 4",
    ),
    ("table_rank", lambda: aj.RelativeBias(floats(8)), ValueError, "table must be [num_buckets, N], got float32[8]"),
    ("table_empty", lambda: call(score=aj.RelativeBias(floats(0, N))), ValueError, "RelativeBias: table..."),
    ("table_offset", lambda: aj.RelativeBias(floats(8, N), offset=1.5), TypeError, "RelativeBias: offset must be a"),
    ("distance", lambda: aj.RelativeBias(floats(8, N), max_distance=-1), ValueError, "RelativeBias: max_distance"),
    ("cap", lambda: aj.SoftCap(0.0), ValueError, "SoftCap: cap must be positive and finite, got 0.0"),
    ("cap_numpy", lambda: aj.SoftCap(np.float32(-1)), ValueError, "SoftCap: cap must be positive and finite, got -1"),
    ("cap_text", lambda: aj.SoftCap("a"), TypeError, "SoftCap: cap must be"),
    ("cap_shape", lambda: call(score=aj.SoftCap(floats(3))), ValueError, "score: SoftCap.cap is float32[3]...*B = [2]"),
)
def test_scores_that_do_not_fit(bad, error, text):
    check(bad, error, text)


@every(
    ("text", lambda: call(scale="1"), TypeError, "scale must be a number or an array of floats, got str '1'"),
    ("boolean", lambda: call(scale=True), TypeError, "scale must be a number or an array of floats, got bool"),
    ("complex", lambda: call(scale=1j), TypeError, "scale must be a number or an array of floats, got complex"),
    (
        "integers",
        lambda: jax.jit(lambda scale: call(scale=scale))(1),
        TypeError,
        "scale must be a number or an array of floats, got int32[]",
    ),
    ("nan", lambda: call(scale=float("nan")), ValueError, "scale must be finite, got nan"),
    ("infinite", lambda: call(scale=np.inf), ValueError, "scale must be finite, got inf"),
    ("vector", lambda: call(scale=floats(3)), ValueError, "scale is float32[3] and must...[*B, N] with...N = 4"),
    ("sinks_number", lambda: call(sinks=1.0), TypeError, "sinks must be an array of floats [N], got float 1.0"),
    (
        "sinks_integers",
        lambda: call(sinks=integers(N)),
        TypeError,
        "sinks must be an array of floats [N], got int32[4]",
    ),
    ("sinks_heads", lambda: call(sinks=floats(3)), ValueError, "sinks is float32[3] and must be [N] with N = 4"),
    ("sinks_scalar", lambda: call(sinks=floats()), ValueError, "sinks is float32[] and must be [N] with N = 4"),
)
def test_scales_and_sinks_that_do_not_fit(bad, error, text):
    check(bad, error, text)


@every(
    ("all", lambda: aj.Dropout(1.0, 1), ValueError, "Dropout: rate must be in [0, 1), got 1.0"),
    ("negative", lambda: aj.Dropout(-0.1, 1), ValueError, "Dropout: rate must be in [0, 1), got -0.1"),
    ("nan", lambda: aj.Dropout(float("nan"), 1), ValueError, "Dropout: rate must be in [0, 1), got nan"),
    ("text", lambda: aj.Dropout("a", 1), TypeError, "Dropout: rate must be a number that is known, got str"),
    ("array", lambda: aj.Dropout(floats(2), 1), TypeError, "Dropout: rate must be a number that is known"),
    ("no_seed", lambda: aj.Dropout(0.1), ValueError, "Dropout: seed is missing"),
    ("float_seed", lambda: aj.Dropout(0.1, 1.5), TypeError, "Dropout: seed must be an integer"),
    ("key", lambda: aj.Dropout(0.1, jax.random.key(0)), TypeError, "Dropout: seed must be...jax.random.bits(rng)"),
    ("number", lambda: call(dropout=0.1), TypeError, "dropout must be attnjax.Dropout(rate, seed), got float 0.1"),
    ("shape", lambda: call(dropout=aj.Dropout(0.1, integers(3))), ValueError, "dropout: seed is int32[3]...*B = [2]"),
)
def test_dropout_that_does_not_fit(bad, error, text):
    check(bad, error, text)


CONFIG = xla.Config(block_q=2)


@every(
    ("near", lambda: call(implementation="xlaa"), ValueError, "implementation 'xlaa' is unknown...Did you mean 'xla'?"),
    ("near_too", lambda: call(implementation="refrence"), ValueError, "Did you mean 'reference'?"),
    ("number", lambda: call(implementation=3), ValueError, "implementation 3 is unknown: expected one of"),
    (
        "cannot",
        lambda: call(implementation="reference", config=CONFIG),
        NotImplementedError,
        "'reference' cannot: reference has no config...xla can",
    ),
    (
        "config",
        lambda: call(config=128),
        TypeError,
        "config must be the Config of an implementation, such as attnjax.kernels.xla.Config, got int",
    ),
    ("config_dict", lambda: call(config={"block_q": 2}), TypeError, "config must be...got dict"),
    ("block_zero", lambda: xla.Config(block_q=0), ValueError, "Config: block_q must be an integer of at least 1"),
    ("block_float", lambda: xla.Config(block_k=1.5), ValueError, "Config: block_k must be an integer of at least 1"),
    ("lanes", lambda: xla.Config(lanes=-1), ValueError, "Config: lanes must be an integer of at least 1"),
    ("lanes_true", lambda: xla.Config(lanes=True), ValueError, "Config: lanes must be an integer of at least 1"),
    ("isa", lambda: cpu.Config(isa="nonsense"), ValueError, "Config: isa must be one of those that...got 'nonsense'"),
    ("isa_number", lambda: cpu.Config(isa=2), ValueError, "Config: isa must be one of those that...got 2"),
    ("threads_zero", lambda: cpu.Config(threads=0), ValueError, "Config: threads must be an integer of at least 1"),
    ("threads_true", lambda: cpu.Config(threads=True), ValueError, "Config: threads must be an integer of at least 1"),
    (
        "other_config",
        lambda: call(implementation="cpu", config=CONFIG),
        ValueError,
        "config is one of 'xla' and implementation is 'cpu': give one of that",
    ),
    (
        "other_config_too",
        lambda: call(implementation="xla", config=cpu.Config(threads=1)),
        ValueError,
        "config is one of 'cpu' and implementation is 'xla': give one of that",
    ),
)
def test_implementations_and_configs_that_do_not_fit(bad, error, text):
    check(bad, error, text)


CAUSAL = aj.Causal()


def built(t=T, s=S, mask=CAUSAL, **options):
    return aj.BlockMap.build(mask, t, s, **options)


@every(
    ("type", lambda: call(mask=CAUSAL, block_map=3), TypeError, "block_map must be an attnjax.BlockMap, got int"),
    ("no_mask", lambda: call(block_map=built()), ValueError, "block_map was given without mask"),
    ("key_length", lambda: call(mask=CAUSAL, block_map=built(s=8)), ValueError, "block_map was built for T = 7, S = 8"),
    (
        "query_length",
        lambda: call(mask=CAUSAL, block_map=built(t=8)),
        ValueError,
        "built for T = 8, S = 9, the call has",
    ),
    (
        "batch",
        lambda: call(mask=CAUSAL, block_map=built(mask=aj.Causal(integers(3)), batch=(3,))),
        ValueError,
        "block_map is for batch and heads [3, 1], the call has [2, 4]",
    ),
    (
        "config",
        lambda: call(mask=CAUSAL, block_map=built(block_q=3, block_k=3), config=CONFIG),
        ValueError,
        "config asks for other blocks than block_map has (3 x 3)",
    ),
    ("block", lambda: built(block_q=0), ValueError, "BlockMap: block_q must be an integer of at least 1, got 0"),
    ("mask", lambda: built(mask="causal"), TypeError, "mask must be an attnjax Mask or a boolean array, got str"),
    ("length", lambda: built(t=-1), ValueError, "BlockMap: query_length"),
    ("leaf", lambda: built(mask=aj.Segments(integers(8), integers(S))), ValueError, "query_ids is int32[8]...T = 7"),
    ("long", lambda: built(mask=aj.Prefix(10)), ValueError, "Prefix.length is 10, beyond S = 9"),
)
def test_block_maps_that_do_not_fit(bad, error, text):
    check(bad, error, text)


@every(
    ("full_mask", lambda: aj.full_attention(Q, KEY, VALUE, mask=CAUSAL), ValueError, "full_attention takes no mask"),
    ("offset", lambda: aj.causal_attention(Q, KEY, VALUE, offset=1.5), TypeError, "offset must be an integer"),
    (
        "query_chunk",
        lambda: aj.chunked_attention(Q, KEY, VALUE, query_chunk_size=0),
        ValueError,
        "query_chunk_size must be an integer of at least 1, got 0",
    ),
    (
        "key_chunk",
        lambda: aj.chunked_attention(Q, KEY, VALUE, key_chunk_size=1.5),
        ValueError,
        "key_chunk_size must be an integer of at least 1, got 1.5",
    ),
    (
        "chunk_and_config",
        lambda: aj.chunked_attention(Q, KEY, VALUE, config=CONFIG),
        ValueError,
        "chunked_attention takes its chunk sizes in place of config",
    ),
)
def test_the_named_functions(bad, error, text):
    check(bad, error, text)


def nn(query=Q, key=KEY, value=VALUE, **options):
    return aj.dot_product_attention(query, key, value, **options)


@every(
    ("rank", lambda: nn(Q[None], KEY[None], VALUE[None]), ValueError, "query must be [B, T, N, H] or [T, N, H], got"),
    ("mask", lambda: nn(mask=floats(T, S)), TypeError, "boolean array, true where...got float32[7, 9]"),
    ("bias", lambda: nn(bias=floats(3, 3)), ValueError, "Bias.array is float32[3, 3] and must broadcast to"),
    ("window", lambda: nn(local_window_size=-1), ValueError, "left must be at least 0, got -1"),
    ("window_of_three", lambda: nn(local_window_size=(1, 2, 3)), ValueError, "local_window_size...(1, 2, 3)"),
    ("lengths", lambda: nn(key_value_seq_lengths=integers(3)), ValueError, "is int32[3] and must have shape [*B]"),
    ("long", lambda: nn(key_value_seq_lengths=jnp.array([1, 20])), ValueError, "is 20, beyond S = 9"),
    ("implementation", lambda: nn(implementation="cudn"), ValueError, "implementation 'cudn' is unknown"),
)
def test_the_drop_in(bad, error, text):
    check(bad, error, text)


@every(
    ("ids", lambda: aj.Segments(integers(T)).to_array(8, 8), ValueError, "Segments.query_ids is int32[7]"),
    ("dense", lambda: aj.Dense(booleans(T, S)).to_array(3, 3), ValueError, "Dense.array is bool[7, 9]"),
    ("density", lambda: aj.Dense(booleans(T, S)).density(3, 3), ValueError, "Dense.array is bool[7, 9]"),
    ("score", lambda: aj.Bias(floats(T, S)).to_array(3, 3), ValueError, "Bias.array is float32[7, 9]"),
)
def test_looking_at_masks_with_other_lengths(bad, error, text):
    check(bad, error, text)


@pytest.mark.parametrize("transform", [jax.jit, jax.grad, jax.vmap, jax.eval_shape], ids=lambda f: f.__name__)
def test_the_same_error_inside_of_transforms(transform):
    """Shapes and types are checked where the call is traced."""
    loss = lambda q: aj.attention(q, KEY[0], VALUE[0], mask=booleans(T, 8)).sum()
    run = {jax.vmap: lambda: jax.vmap(loss)(Q), jax.eval_shape: lambda: jax.eval_shape(loss, Q[0])}
    with pytest.raises(ValueError, match=re.escape("mask: Dense.array is bool[7, 8]")):
        run.get(transform, lambda: transform(loss)(Q[0]))()


def test_numpy_arrays_are_arrays():
    """NumPy's default float64 is float32 where JAX has no float64, as in all of JAX; lists are arrays too."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=x.shape) for x in (Q, KEY, VALUE))
    want = call(*(jnp.asarray(x) for x in (q, k, v)))
    for got in (call(q, k, v), call(q.tolist(), k.tolist(), v.tolist()), call(q, k, v, scale=np.float64(H**-0.5))):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    bias, sinks = rng.normal(size=(T, S)), rng.normal(size=N)
    got = call(q, k, v, score=aj.Bias(bias), sinks=sinks)
    want = call(*(jnp.asarray(x) for x in (q, k, v)), score=aj.Bias(jnp.asarray(bias)), sinks=jnp.asarray(sinks))
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


@every(
    (
        "key",
        lambda: call(jax.random.split(jax.random.key(0), (B, T, N, H))),
        TypeError,
        "query must be ...got key<fry>",
    ),
    ("described", lambda: call(jax.ShapeDtypeStruct(Q.shape, Q.dtype)), TypeError, "query is a jax.ShapeDtypeStruct"),
    ("name", lambda: call(implementation=["xla"]), ValueError, "implementation ['xla'] is unknown"),
    ("jax_nn", lambda: aj.dot_product_attention(None, KEY, KEY), TypeError, "query must be an array, got NoneType"),
    (
        "jax_nn_window",
        lambda: aj.dot_product_attention(Q, KEY, KEY, local_window_size=1.5),
        ValueError,
        "local_window_size must be an integer or (left, right), got 1.5",
    ),
    ("mask", lambda: aj.Mask(), TypeError, "Mask is the base of masks"),
    ("score", lambda: aj.Score(), TypeError, "Score is the base of scores"),
    ("density", lambda: aj.Causal().density(-2, 3), ValueError, "query_length must be an integer of at least 0"),
    (
        "deep",
        lambda: functools.reduce(lambda a, b: a & b, [aj.Causal(n) for n in range(1000)]),
        ValueError,
        "masks are nested 201 deep",
    ),
    (
        "old_key",
        lambda: aj.Dropout(0.1, jax.random.PRNGKey(1)),
        ValueError,
        "Dropout: seed is uint32[2]...jax.random.bits(rng)",
    ),
    ("key_as_seed", lambda: aj.Dropout(0.1, jax.random.key(1)), TypeError, "Dropout: seed...jax.random.bits(rng)"),
    (
        "wide_bounds",
        lambda: aj.Window(np.array([2**40, 1])),
        ValueError,
        "Window: left must fit 32 bits, got int64[2] with values beyond",
    ),
    ("wide_alibi", lambda: aj.ALiBi(floats(N), 2**40), ValueError, "ALiBi: offset must be within +-2**30"),
)
def test_errors_have_names(bad, error, text):
    check(bad, error, text)


def test_numbers_of_numpy_and_jax_are_numbers():
    """One check for all numbers that are known; booleans are none. They are kept as Python's."""
    for whole, real in ((np.int64(4), np.float32(0.5)), (jnp.int32(4), jnp.float32(0.5)), (np.array(4), np.array(0.5))):
        made = [
            YaRN(whole, whole),
            RoPE(theta=whole, fraction=real),
            aj.Dropout(real, seed=1),
            xla.Config(block_q=whole),
            triton.Config(splits=whole),
            aj.SoftCap(float(real)),
            Sampling(temperature=real, top_k=whole),
            DecoderConfig(
                vocab_size=whole, features=whole, num_heads=whole, num_layers=whole, dropout=real, positions=RoPE()
            ),
        ]
        for one in made:
            hash(one)
            assert not any(isinstance(x, (np.generic, np.ndarray, jax.Array)) for x in vars(one).values()), one
        assert sinusoidal(whole, whole).shape == (4, 4) and alibi_slopes(whole).shape == (4,)
        assert aj.KVCache.create(2, whole, 2, 4).capacity == 4
    with pytest.raises(ValueError, match="YaRN: original_length must be a positive number, got True"):
        YaRN(4.0, True)


def test_masks_and_scores_are_equal_by_value():
    """As static arguments those that say the same compile once."""
    table = jnp.ones(4)
    pairs = [
        lambda: aj.Causal(),
        lambda: aj.Causal(3) & ~aj.Window(2, 0),
        lambda: aj.ALiBi(table, 2),
        lambda: aj.SoftCap(2.0),
    ]
    for n, make in enumerate(pairs):
        assert make() == make() and hash(make()) == hash(make())
        assert all(make() != other() for other in pairs[n + 1 :])
    assert aj.Causal(2) != aj.Causal(3) and aj.ALiBi(table) != aj.ALiBi(jnp.ones(4))
    traces = []
    f = jax.jit(lambda mask: traces.append(mask) or mask.to_array(3, 3), static_argnums=0)
    f(aj.Causal(1) | aj.Prefix(2)), f(aj.Causal(1) | aj.Prefix(2))
    assert len(traces) == 1


def test_numpy_arrays_stand_on_both_sides_of_a_mask():
    array = np.arange(9).reshape(3, 3) % 2 == 0
    for mask in (array & aj.Causal(), aj.Causal() & array):
        np.testing.assert_array_equal(mask.to_array(3, 3), np.tril(array))
    np.testing.assert_array_equal((array | aj.Causal()).to_array(3, 3), array | np.tri(3, dtype=bool))


def test_masks_may_be_trees_of_axes():
    """What `jax.vmap` takes as in_axes: numbers, or nothing, in the places of arrays."""
    ids, keys = jnp.arange(6).reshape(2, 3) % 2, jnp.arange(3) % 2
    look = jax.vmap(lambda mask: mask.to_array(3, 3), in_axes=(aj.Segments(0, None),))
    got = look(aj.Segments(ids, keys))
    np.testing.assert_array_equal(got, ids[:, :, None] == keys)
    dense = jax.vmap(lambda mask: mask.to_array(3, 3), in_axes=(aj.Dense(1),))(aj.Dense(jnp.ones((3, 2, 3), bool)))
    assert dense.shape == (2, 3, 3)


def test_scores_may_be_trees_of_axes():
    look = lambda axes: jax.vmap(lambda score: score.to_array(3, 3, heads=2), in_axes=(axes,))
    table, slopes = jnp.arange(16.0).reshape(2, 4, 2), jnp.arange(4.0).reshape(2, 2)
    for kind, array in ((aj.RelativeBias, table), (aj.ALiBi, slopes), (aj.Bias, slopes[:, :1]), (Scale, slopes)):
        want = jnp.stack([kind(x).to_array(3, 3, heads=2) for x in array])
        np.testing.assert_array_equal(look(kind(0))(kind(array)), want)
    with pytest.raises(ValueError, match="in_axes specification must be a tree prefix"):  # and not an error of its own
        look(aj.ALiBi(0))(aj.ALiBi(slopes, jnp.arange(2)))


def test_numbers_of_every_type_are_counts():
    """NumPy's and JAX's, where they are known, become Python's."""
    two, many = np.int64(2), jnp.int32(128)
    config = cpu.Config(threads=two)
    assert type(config.threads) is int and config == cpu.Config(threads=2)
    assert mosaic_gpu.Config(block_k=many) == mosaic_gpu.Config(block_k=128)
    assert mosaic_tpu.Config(block_q=many) == mosaic_tpu.Config(block_q=128)
    cache = aj.KVCache.create(two, np.uint8(4), jnp.int32(1), np.int16(8), window=np.int8(3))
    assert cache.key.shape == (2, 4, 1, 8) and type(cache.window) is int
    sizes = dict(num_classes=2, features=8, num_heads=2, num_layers=1)
    assert VisionConfig((np.int64(8), many), (two, jnp.int32(4)), **sizes).patch_size == (2, 4)


def test_relative_positions_of_any_reach():
    """A largest distance that nobody reaches takes no memory; buckets are those of the formula in float64."""
    score = aj.RelativeBias(jnp.arange(32.0)[:, None], bidirectional=False, max_distance=sys.maxsize)
    found = score.to_array(2000, 1)[..., 0].reshape(-1)
    far = np.arange(16, 2000)
    want = 16 + np.floor(np.log(far / 16) / np.log(sys.maxsize / 16) * 16)
    np.testing.assert_array_equal(found, [*range(16), *want])


@pytest.mark.parametrize("kind", ["mask", "bias"])
def test_a_query_without_batch_takes_masks_with_one(kind, rng):
    """As jax.nn.dot_product_attention, which this one replaces: [1, N, T, S] beside [T, N, H]."""
    q, k, v = (jnp.asarray(rng.normal(size=(n, 4, 8)), jnp.float32) for n in (5, 7, 7))
    array = rng.random((1, 4, 5, 7)) < 0.7 if kind == "mask" else rng.normal(size=(1, 4, 5, 7)).astype(np.float32)
    array[..., 0] = 1
    options = {kind: jnp.asarray(array)}
    want = jax.nn.dot_product_attention(q, k, v, **options)
    np.testing.assert_allclose(aj.dot_product_attention(q, k, v, **options), want, rtol=1e-5, atol=1e-6)
