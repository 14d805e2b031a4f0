"""Situations of attention in which other libraries went wrong, by their public reports, and the right numbers."""

import concurrent.futures
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import t5_bucket

import attnjax as aj

T, S, N, K, H = 11, 17, 4, 2, 8
t, s = np.arange(T)[:, None], np.arange(S)


def formula(q, k, v, seen=True, bias=0.0, scale=None, cap=None):
    """Attention in float64: `seen` and `bias` broadcast to [*B, N, T, S]. Output and log-sum-exp."""
    q, k, v = (np.asarray(x).astype(np.float64) for x in (q, k, v))
    k, v = (x.repeat(q.shape[-2] // x.shape[-2], -2) for x in (k, v))
    logits = np.einsum("...tnh,...snh->...nts", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    logits = logits if cap is None else cap * np.tanh(logits / cap)
    logits = np.where(seen, logits + np.asarray(bias).astype(np.float64), -np.inf)
    highest = np.maximum(logits.max(-1, keepdims=True, initial=-np.inf), -1e300)
    e = np.exp(logits - highest)
    total = e.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = (np.log(total) + highest)[..., 0]
    out = np.einsum("...nts,...snv->...tnv", e / np.where(total > 0, total, 1), v)
    return out, np.where(total[..., 0] > 0, lse, -np.inf).swapaxes(-1, -2)


def close(got, want, size=1e-5):
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(np.asarray(one).astype(np.float64), other, rtol=size, atol=size)


@pytest.fixture
def array(rng):
    return lambda *size, dtype="float32": jnp.asarray(rng.normal(size=size), dtype)


@pytest.fixture
def qkv(array):
    return array(2, T, N, H), array(2, S, K, H), array(2, S, K, H)


run = functools.partial(aj.attention, return_lse=True)


# Masks


def test_windows_and_offsets_without_an_end(qkv):
    """keras-self-attention#10: a window of sys.maxsize; Automodel#3802: a sum with a position that leaves int32."""
    ends = (sys.maxsize, 2**31 - 1, 2**31, np.int64(2**63 - 1), np.uint64(2**64 - 1), jnp.int32(2**31 - 1))
    for end in ends:
        np.testing.assert_array_equal(aj.Window(end, 0).to_array(T, S), s <= t)
        np.testing.assert_array_equal(aj.Window(0, end, offset=3).to_array(T, S), s >= t + 3)
        assert aj.Causal(end).to_array(T, S).all() and not aj.Causal(-int(end)).to_array(T, S).any()
    close(run(*qkv, mask=aj.Window(sys.maxsize, 0)), formula(*qkv, seen=s <= t))


@pytest.mark.parametrize(
    "shape", [(), (1,), (S,), (T, 1), (1, S), (T, S), (N, 1, 1), (N, T, S), (2, 1, 1, S), (2, N, T, 1)]
)
def test_biases_and_masks_broadcast_from_the_right(qkv, array, rng, shape):
    """mlx#2096 and xformers#783, #808, #813: alignment of masks and biases of fewer axes."""
    bias = array(*shape)
    close(run(*qkv, score=aj.Bias(bias)), formula(*qkv, bias=bias))
    mask = rng.random(shape) < 0.8
    close(run(*qkv, mask=jnp.asarray(mask)), formula(*qkv, seen=mask))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "float32"])
def test_masks_of_another_kind_are_refused(qkv, dtype):
    """pytorch#139548 and jax PR#21371: numbers taken for booleans, or booleans for numbers."""
    with pytest.raises(TypeError, match="Dense takes a boolean array"):
        aj.attention(*qkv, mask=jnp.ones((T, S), dtype))
    if dtype != "float32":
        with pytest.raises(TypeError, match="Bias: array must be an array of floats"):
            aj.Bias(jnp.ones((T, S), dtype))


def test_padding_is_a_document_that_no_query_is_in(array):
    """maxtext#4929 and transformers#86: tokens of id 0 saw each other, or were seen."""
    q, k, v = array(2, S, N, H), array(2, S, K, H), array(2, S, K, H)
    ids = np.array([[1] * 6 + [2] * 7 + [0] * 4, [3] * 15 + [0] * 2])
    mask = aj.Segments(jnp.asarray(ids), jnp.where(ids == 0, -1, ids))
    seen = (ids[:, None, :, None] == ids[:, None, None]) & (ids != 0)[:, None, None]
    got = run(q, k, v, mask=mask)
    close(got, formula(q, k, v, seen=seen))
    assert not np.asarray(got[0])[ids == 0].any()


def test_a_tree_of_drafts_at_the_end_of_the_cache(qkv, rng):
    """mlx#1842, Dao#924, flashinfer#152, #959: a mask of queries by queries, behind tokens that all see."""
    past = S - T
    tree = rng.random((T, T)) < 0.5
    seen = np.concatenate([np.ones((T, past), bool), tree], 1)
    padded = jnp.pad(jnp.asarray(tree), ((0, 0), (past, 0)))
    close(run(*qkv, mask=aj.Prefix(past) | aj.Dense(padded)), formula(*qkv, seen=seen))
    known = jnp.asarray(tree)
    by_function = aj.Where(lambda b, h, q, k: (k < past) | known[q, jnp.maximum(k - past, 0)])
    close(run(*qkv, mask=by_function, implementation="xla"), formula(*qkv, seen=seen))


@pytest.mark.parametrize("dilation", [1, 2])
def test_neighbourhoods_are_moved_inwards_at_the_edges(array, dilation):
    """NATTEN#20, #44, #136: windows of always the same size, clipped at the ends, dilated."""
    length, size = 24, 5
    q, k, v = array(length, N, H), array(length, K, H), array(length, K, H)

    def seen(q, k, clip=np.clip):
        group, place, many = q % dilation, q // dilation, length // dilation
        start = clip(place - size // 2, 0, many - size)
        return (k % dilation == group) & (k // dilation >= start) & (k // dilation < start + size)

    mask = aj.Where(lambda b, h, q, k: seen(q, k, jnp.clip))
    want = seen(np.arange(length)[:, None], np.arange(length))
    assert (want.sum(1) == size).all()
    close(run(q, k, v, mask=mask), formula(q, k, v, seen=want))


def test_neighbourhoods_in_two_dimensions(array):
    """NATTEN#67: pixels of a picture see a square around them; here with a width per token too."""
    width, length = 5, 30
    q, k, v = array(length, N, H), array(length, K, H), array(length, K, H)
    reach = np.arange(length) % 3
    known = jnp.asarray(reach)
    mask = aj.Where(
        lambda b, h, q, k: (abs(q // width - k // width) <= known[q]) & (abs(q % width - k % width) <= known[q])
    )
    i, j = np.arange(length)[:, None], np.arange(length)
    near = (abs(i // width - j // width) <= reach[:, None]) & (abs(i % width - j % width) <= reach[:, None])
    close(run(q, k, v, mask=mask), formula(q, k, v, seen=near))


def test_causal_with_padded_keys_and_odd_sizes(array):
    """onnxruntime#14363: key lengths beside causal, 13 heads of 37; pytorch#163588: some of many keys, in 16 bits."""
    q, k, v = array(2, 9, 13, 37), array(2, 9, 13, 37), array(2, 9, 13, 37)
    lengths, i = jnp.array([0, 5]), np.arange(9)
    seen = (i <= i[:, None]) & (i < np.array([0, 5])[:, None, None, None])
    close(run(q, k, v, mask=aj.Causal() & aj.Lengths(key=lengths)), formula(q, k, v, seen=seen))
    q, k, v = (array(1, n, 1, 16, dtype="bfloat16") for n in (2, 1000, 1000))
    close(run(q, k, v, mask=aj.Lengths(key=700)), formula(q, k, v, seen=np.arange(1000) < 700), size=8e-3)


def test_causal_stays_when_dropout_and_lse_are_asked_for(qkv):
    """keras#23038: causal was dropped with dropout, or when weights were asked for."""
    q, k, v = qkv
    poisoned = v.at[:, 5:].set(1e6)  # the first five queries must not know
    dropped = dict(mask=aj.Causal(), dropout=aj.Dropout(0.4, 3), return_lse=True)
    for one, other in zip(aj.attention(q, k, v, **dropped), aj.attention(q, k, poisoned, **dropped), strict=True):
        np.testing.assert_array_equal(one[:, :5], other[:, :5])
    close(aj.attention(q, k, v, **dropped)[1:], formula(q, k, v, seen=s <= t)[1:])


def test_windows_and_masks_are_data(qkv):
    """axlearn#758 and jax#25213: local and global layers in one scan, with windows, switches, masks as inputs."""
    q, k, v = qkv
    widths, masks = jnp.array([0, 3, 30]), aj.Window(jnp.array([1, 4, 20]), jnp.array([0, 2, 2]))
    _, by_width = jax.lax.scan(lambda c, w: (c, aj.attention(q, k, v, mask=aj.Window(w, 0))), 0, widths)
    _, by_mask = jax.lax.scan(lambda c, m: (c, aj.attention(q, k, v, mask=m)), 0, masks)
    kinds = [lambda q: aj.attention(q, k, v, mask=aj.Causal()), lambda q: aj.attention(q, k, v)]
    _, switched = jax.lax.scan(lambda c, n: (c, jax.lax.switch(n, kinds, q)), 0, jnp.array([1, 0]))
    window = lambda left, right: formula(q, k, v, seen=(s >= t - left) & (s <= t + right))[0]
    close(by_width, [window(left, 0) for left in (0, 3, 30)])
    close(by_mask, [window(1, 0), window(4, 2), window(20, 2)])
    close(switched, [formula(q, k, v)[0], formula(q, k, v, seen=s <= t)[0]])


# Scores


@pytest.mark.parametrize("keys", [1, 65, 129])
def test_a_soft_cap_does_not_reach_padding_of_tiles(array, keys):
    """llama.cpp#29034: padded keys of a tile became finite."""
    q, k, v = array(3, N, H), array(keys, K, H), array(keys, K, H)
    close(run(q, k, v, score=aj.SoftCap(1.5)), formula(q, k, v, cap=1.5))


def test_a_mask_comes_after_the_soft_cap(qkv):
    """Dao#1025: the cap made -inf finite; pytorch#127055: -inf as a mask of old tokens."""
    causal = s <= t
    want = formula(*qkv, seen=causal, cap=2.0)
    close(run(*qkv, mask=aj.Causal(), score=aj.SoftCap(2.0)), want)
    hidden = aj.Bias(jnp.where(causal, 0.0, -jnp.inf))
    close(run(*qkv, score=(aj.SoftCap(2.0), hidden)), want)


def test_old_tokens_masked_by_minus_infinity(array):
    """pytorch#127055: 640 keys of which the first are -inf gave NaN on CPUs."""
    q, k, v = array(1, 2, N, H), array(1, 640, K, H), array(1, 640, K, H)
    bias = jnp.where(jnp.arange(640) < 600, -jnp.inf, 0.0)
    close(run(q, k, v, score=aj.Bias(bias)), formula(q, k, v, seen=np.arange(640) >= 600))


def test_a_sink_that_is_a_bias_on_the_first_key(qkv, array):
    """levanter#1124, vllm#49815."""
    bias = jnp.zeros((N, 1, S)).at[:, :, 0].set(array(N, 1))
    gradient = jax.grad(lambda b: (run(*qkv, score=aj.Bias(b))[0] ** 2).sum())(bias)
    close(run(*qkv, score=aj.Bias(bias)), formula(*qkv, bias=bias))
    assert gradient.shape == bias.shape and np.abs(gradient[:, :, 0]).min() > 1e-4


def test_slopes_with_rows_of_different_lengths(qkv):
    """keras-hub#2862, Dao#1585, vllm#945: ALiBi of queries that stand at different places of their rows."""
    slopes, offset = jnp.array([0.5, 0.25, 0.1, 0.05]), jnp.array([6, 2])
    place = t + np.array([6, 2])[:, None, None, None]
    got = run(*qkv, mask=aj.Causal(offset), score=aj.ALiBi(slopes, offset))
    close(got, formula(*qkv, seen=s <= place, bias=-np.asarray(slopes)[:, None, None] * abs(place - s)))


@pytest.mark.parametrize("bidirectional", [True, False])
def test_the_table_of_relative_positions_has_its_gradient(qkv, array, bidirectional):
    """pytorch#145208, attention-gym#20: the gradient of a learned bias that is looked up by distance."""
    table, ct = array(8, N), array(2, T, N, H)
    bucket = np.array([[t5_bucket(j - i, bidirectional, 8, 16) for j in range(S)] for i in range(T)])
    made = lambda score: jnp.vdot(aj.attention(*qkv, score=score), ct)
    got = jax.grad(lambda a: made(aj.RelativeBias(a, bidirectional=bidirectional, max_distance=16)))(table)
    by_pair = np.asarray(jax.grad(lambda a: made(aj.Bias(a)))(jnp.moveaxis(table[bucket], -1, 0)), np.float64)
    want = np.stack([by_pair[:, bucket == n].sum(-1) for n in range(8)])
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_pair_bias_of_a_triangle_gets_the_sum_over_rows(array):
    """openfold#384, DeepSpeed#5052: the bias that all rows of a pair representation share."""
    q, k, v = (array(2, 3, T, N, H) for _ in range(3))
    bias, ct = array(2, 1, N, T, T), array(2, 3, T, N, H)
    made = lambda bias: jnp.vdot(aj.attention(q, k, v, score=aj.Bias(bias)), ct)
    spread = jax.grad(made)(jnp.broadcast_to(bias, (2, 3, N, T, T)))
    np.testing.assert_allclose(jax.grad(made)(bias), spread.sum(1, keepdims=True), rtol=1e-4, atol=1e-5)
    close([aj.attention(q, k, v, score=aj.Bias(bias))], formula(q, k, v, bias=bias)[:1])


def test_the_largest_logit_of_each_head(qkv):
    """Dao#1876, #2357, Megatron-LM#1929, maxtext#2968: QK-clip asks for the largest logit; a large scale tells it."""
    q, k, v = qkv
    largest = run(q, k, v, scale=2.0**20)[1].max((0, 1)) / 2.0**20
    logits = np.einsum("btnh,bsnh->bnts", np.float64(q), np.float64(k).repeat(2, 2))
    np.testing.assert_allclose(largest, logits.max((0, 2, 3)), rtol=1e-6)


@pytest.mark.parametrize("sink", [-np.inf, -100.0, 100.0, 1e30])
def test_sinks_beside_tiles_that_are_empty(array, sink):
    """TensorRT-LLM#19220, Dao#2752: a sink overflowed beside an empty tile, the log-sum-exp of 100 was infinite."""
    q, k, v = array(200, N, H), array(200, K, H), array(200, K, H)
    i, j = np.arange(200)[:, None], np.arange(200)
    sinks = jnp.full(N, sink)
    out, lse = run(q, k, v, mask=aj.Window(3, 0, offset=-150), sinks=sinks)
    plain, plain_lse = formula(q, k, v, seen=(j >= i - 153) & (j <= i - 150))
    with np.errstate(invalid="ignore"):
        want = np.logaddexp(plain_lse, sink)
        share = np.where(np.isneginf(plain_lse), 0, np.exp(plain_lse - want))
    close([out, lse], [plain * share[..., None], want])


def test_gradients_of_forked_windows(qkv, array):
    """pytorch#158212: the gradients of a mask of one's own were wrong."""
    fork = lambda q, k: (abs(q - k) <= 2) | (abs(q + 5 - k) <= 1)
    gradient = lambda mask: jax.grad(lambda x: (aj.attention(*x, mask=mask) ** 2).sum())(qkv)
    by_array = gradient(jnp.asarray(fork(t, s)))
    for one, other in zip(gradient(aj.Where(lambda b, h, q, k: fork(q, k))), by_array, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


# Memory and shapes


def test_rows_do_not_depend_on_what_else_is_computed(array):
    """mlx#3573: the first row changed with the number of rows. Chunks of queries, one batch entry, one head."""
    q, k, v = array(3, 70, N, H), array(3, 33, K, H), array(3, 33, K, H)
    whole, _ = run(q, k, v)
    for n in (1, 2, 7, 64):
        np.testing.assert_allclose(run(q[:, :n], k, v)[0], whole[:, :n], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(run(q[1], k[1], v[1])[0], whole[1], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(run(q[:, :, 2:], k[:, :, 1:], v[:, :, 1:])[0], whole[:, :, 2:], rtol=1e-5, atol=1e-6)


def test_arrays_as_they_lie(rng):
    """pytorch#133671, #146377, #191937, Dao#355, xformers#282, ROCm/pytorch#3230: strides, views, broadcasts."""
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    held = np.full((2, 40, K, H + 3), np.nan, np.float32)
    held[:, 4 : 4 + S, :, :H] = normal(2, S, K, H)
    k = held[:, 4 : 4 + S, :, :H]  # in a cache, with NaN around
    for q in (
        normal(2, N, T, H).swapaxes(1, 2),
        normal(2, T, N, H)[:, ::-1],
        np.broadcast_to(normal(1, 1, N, H), (2, T, N, H)),
    ):
        for v in (normal(H, K, S, 2).T, np.asfortranarray(normal(2, S, K, H))):
            close(run(q, k, v), formula(q, k, v))
            close(jax.jit(run)(*(jnp.asarray(x) for x in (q, k, v))), formula(q, k, v))


@pytest.mark.parametrize("axes", [(0, None, None), (None, 0, 0), (2, 1, 3), (-1, 0, -1), (1, None, 0), (0, 0, None)])
def test_any_axis_is_mapped(array, axes):
    """mlx#3383, jax PR#34920, #36702, pytorch#151558, #161310, #188764: vmap with groups, a shared mask and bias."""
    q, k, v, bias = array(T, N, H), array(S, K, H), array(S, K, H), array(N, 1, S)
    mask = jnp.arange(S) < 9
    stacked = [x if a is None else jnp.stack([x, x + 1, 2 * x], a) for x, a in zip((q, k, v), axes, strict=True)]
    got = jax.vmap(functools.partial(run, mask=mask, score=aj.Bias(bias)), in_axes=axes)(*stacked)
    pick = lambda x, a, n: x if a is None else np.take(np.asarray(x), n, a)
    for n in range(3):
        one = [pick(x, a, n) for x, a in zip(stacked, axes, strict=True)]
        close([x[n] for x in got], formula(*one, seen=np.arange(S) < 9, bias=bias))


def test_what_is_not_finite_is_seen_by_some_rows_only(array):
    """pytorch#101967, #141128: NaN in a query or value reached rows that do not see it, or gave zeros."""
    q, k, v = array(T, N, H), array(S, K, H), array(S, K, H)
    want = formula(q, k, v, seen=s <= t)
    got = run(q.at[3].set(jnp.nan), k, v, mask=aj.Causal())
    assert np.isnan(got[0][3]).all() and np.isnan(got[1][3]).all()
    rest = np.arange(T) != 3
    close([x[rest] for x in got], [x[rest] for x in want])
    late = run(q, k, v.at[T:].set(jnp.nan), mask=aj.Causal())
    close(late, want)


def test_heads_of_latent_attention(array):
    """FlashMLA#92, jax#26433: heads of 576 for keys and 512 for values, many of them on one key head."""
    q, k, v = array(1, 3, 16, 576), array(1, 20, 1, 576), array(1, 20, 1, 512)
    close(run(q, k, v), formula(q, k, v), size=2e-5)


@pytest.mark.parametrize(("dtype", "large"), [("float16", 6e4), ("bfloat16", 1e37), ("float32", 1e37)])
def test_values_near_the_largest_number(array, dtype, large):
    """Sums of such values must not overflow where their mean does not."""
    q, k = array(5, N, H, dtype=dtype), array(S, K, H, dtype=dtype)
    out = aj.attention(0 * q, k, jnp.full((S, K, H), large, dtype))
    np.testing.assert_allclose(np.asarray(out).astype(np.float64), float(jnp.asarray(large, dtype)), rtol=1e-2)


# Programs


def test_a_function_that_is_written_anew_compiles_once(qkv):
    """pytorch#139548 and other reports on FlexAttention: a new lambda in each call, another number in an array."""
    traced = []

    @jax.jit
    def step(q, k, v, n):
        traced.append(n)
        return aj.attention(q, k, v, mask=aj.Where(lambda b, h, q, k: q + n >= k))

    for n in (0, 3, 5):
        close([step(*qkv, jnp.int32(n))], formula(*qkv, seen=s <= t + n)[:1])
    assert len(traced) == 1
    make = lambda: aj.Where(lambda b, h, q, k: q + 2 >= k)
    assert jax.tree.structure(make()) == jax.tree.structure(make())  # so that `jit` takes them for one program


@pytest.mark.compiled
def test_many_threads_at_once(array):
    """executorch#20470, onnxruntime#31961: scratch memory of one thread, used by another."""
    inputs = [(array(1, n, N, H), array(1, 3 * n, K, H), array(1, 3 * n, K, H)) for n in (5, 40, 130)] * 4
    want = [aj.attention(*x, implementation="cpu") for x in inputs]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda x: np.asarray(aj.attention(*x, implementation="cpu")), inputs))
    for one, other in zip(got, want, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("rate", [1e-9, 0.2, 0.999])
def test_how_much_is_dropped(rate):
    """Dao#93, #987, #1064: rates at the ends; heads, rows and seeds that are alike."""
    keys, heads = 256, 8
    q, k = jnp.zeros((64, heads, 2)), jnp.zeros((keys, heads, 2))
    v = jnp.broadcast_to(jnp.eye(keys)[:, None], (keys, heads, keys))
    kept = np.stack([np.asarray(aj.attention(q, k, v, dropout=aj.Dropout(rate, seed))) != 0 for seed in (1, 2**31)])
    assert abs(kept.mean() - (1 - rate)) < 5 * np.sqrt(max(rate * (1 - rate), 1e-9) / kept.size)
    if rate == 0.2:
        spread = kept - kept.mean()
        for axis in range(4):  # seeds, queries, heads, keys
            alike = (spread * np.roll(spread, 1, axis)).mean() / (0.2 * 0.8)
            assert abs(alike) < 6 / np.sqrt(kept.size)
