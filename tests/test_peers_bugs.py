"""Wrong answers that other attention libraries gave without a word, each tried on attnjax. Crashes are not here."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import MASKS, SCORES
from oracle import Problem, Shape, dense
from problems import IMPLEMENTATIONS, Case, draw, expect, precision, solver

import attnjax as aj

T, S, N, K, H, V = 37, 53, 6, 2, 19, 23


@pytest.fixture
def array(rng):
    return lambda *size, dtype="float32": jnp.asarray(rng.normal(size=size), dtype)


@pytest.fixture
def qkv(array):
    return array(2, T, N, H), array(2, S, K, H), array(2, S, K, V)


def reaches(attend, q, k, v, **kwargs):
    """[T, S] booleans: whether value s changes output t, found by asking for the derivative of every output."""
    weights = jax.jacobian(lambda shift: attend(q, k, v + shift[:, None, None], **kwargs)[0].sum((0, 2, 3)))
    return np.asarray(weights(jnp.zeros(k.shape[1]))) != 0


# Masks


def test_left_window_does_not_see_the_future(attend, qkv):
    """Window (L, 0) without causal attended to all of the future; seen in jax.nn with cuDNN."""
    t, s = np.arange(T)[:, None], np.arange(S)
    np.testing.assert_array_equal(reaches(attend, *qkv, mask=aj.Window(5, 0)), (t - 5 <= s) & (s <= t))
    q, k, v = qkv
    got = aj.dot_product_attention(q, k, v[..., :H], local_window_size=(5, 0))
    want = attend(q, k.at[:, T:].set(9.0), v[..., :H].at[:, T:].set(9.0), mask=aj.Window(5, 0))[0]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_window_alone_is_not_ignored(attend, qkv):
    """A window was ignored unless another mask was given too; seen in jax.nn."""
    t, s = np.arange(T)[:, None], np.arange(S)
    np.testing.assert_array_equal(reaches(attend, *qkv, mask=aj.Window(2, 4)), (t - 2 <= s) & (s <= t + 4))
    q, k, v = qkv
    window = lambda size: aj.dot_product_attention(q, k, v[..., :H], local_window_size=size)
    assert np.abs(window((2, 4)) - window((30, 40))).max() > 0.1


def test_key_lengths_alone_are_not_ignored(qkv):
    """key_value_seq_lengths without query_seq_lengths had no effect; seen in jax.nn."""
    q, k, v = qkv
    v = v[..., :H]
    lengths = jnp.array([7, 30])
    got = aj.dot_product_attention(q, k, v, key_value_seq_lengths=lengths)
    for b, length in enumerate([7, 30]):
        want = aj.attention(q[b], k[b, :length], v[b, :length])
        np.testing.assert_allclose(got[b], want, rtol=1e-5, atol=1e-6)


def test_causal_is_aligned_as_said_when_lengths_differ(attend, qkv):
    """Top-left or bottom-right, depending on the library and even on its kernel; seen in torch and flash-attention."""
    t, s = np.arange(T)[:, None], np.arange(S)
    np.testing.assert_array_equal(reaches(attend, *qkv, mask=aj.Causal()), s <= t)
    np.testing.assert_array_equal(reaches(attend, *qkv, mask=aj.Causal.aligned_end()), s <= t + S - T)


def test_decoding_one_token_sees_the_whole_cache(attend, qkv):
    """Causal with a single query attended to key 0 only; seen in Flax."""
    q, k, v = qkv
    last = q[:, -1:]
    assert reaches(attend, last, k, v, mask=aj.Causal.aligned_end()).all()
    filled = jnp.array([20, 41])  # tokens in the cache, one number per example, traced
    out, _ = jax.jit(lambda n: attend(last, k, v, mask=aj.Causal(n - 1)))(filled)
    for b, n in enumerate([20, 41]):
        np.testing.assert_allclose(out[b], attend(last[b], k[b, :n], v[b, :n])[0], rtol=1e-5, atol=1e-6)


def test_documents_do_not_see_each_other(attend, qkv):
    """Packed documents attended to one another when segment ids were dropped on the way; seen in MaxText."""
    q, k, v = qkv
    ids = np.repeat(np.arange(5), [3, 16, 1, 12, 5])
    got = reaches(attend, q, k[:, :T], v[:, :T], mask=aj.Segments(jnp.asarray(ids, jnp.int32)) & aj.Causal())
    np.testing.assert_array_equal(got, (ids[:, None] == ids) & np.tri(T, dtype=bool))


def test_a_mask_that_is_no_segmentation_is_kept(attend, qkv, rng):
    """A dense mask was turned into segment ids, which cannot say every mask; seen in ejkernel on TPU."""
    mask = rng.random((T, S)) < 0.3
    np.testing.assert_array_equal(reaches(attend, *qkv, mask=jnp.asarray(mask)), mask)


def test_a_padding_mask_broadcasts(attend, qkv):
    """A mask [B, 1, 1, S] was refused or taken for something else; seen in jax.nn with cuDNN."""
    q, k, v = qkv
    mask = jnp.arange(S) < jnp.array([11, 40])[:, None]
    out, _ = attend(q, k, v, mask=mask[:, None, None])
    np.testing.assert_allclose(out, attend(q, k, v, mask=aj.Lengths(key=jnp.array([11, 40])))[0], rtol=1e-5, atol=1e-6)


def test_rows_that_see_nothing_are_zero(attend, qkv):
    """Such a row gave the mean of all values, or NaN; seen in jax.nn and torch."""
    mask = jnp.ones((T, S), bool).at[4].set(False).at[20:36].set(False)  # one row, and a whole tile of rows
    dead = ~np.asarray(mask).any(1)
    x = dict(zip(("query", "key", "value"), qkv, strict=True))
    f = lambda x: attend(x["query"], x["key"], x["value"], mask=mask)  # tree order is that of the alphabet
    (out, lse), pull = jax.vjp(f, x)
    assert not np.asarray(out)[:, dead].any() and np.isneginf(np.asarray(lse)[:, dead]).all()
    (gradients,) = pull((jnp.ones_like(out), jnp.ones_like(lse)))
    assert not np.asarray(gradients["query"])[:, dead].any()
    assert all(np.isfinite(g).all() for g in gradients.values())
    _, tangents = jax.jvp(f, (x,), (x,))
    assert all(not np.asarray(t)[:, dead].any() and np.isfinite(t).all() for t in tangents)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf], ids=str)
def test_what_padding_holds_does_not_leak(attend, qkv, bad):
    """NaN in masked values reached the output as 0 * NaN; seen in torch."""
    q, k, v = qkv
    lengths = aj.Lengths(key=jnp.array([20, 33]), query=jnp.array([9, 30]))
    hide = lambda x, n: jnp.where(jnp.arange(x.shape[1])[:, None, None] < jnp.array(n)[:, None, None, None], x, bad)
    run = lambda x: jax.vjp(lambda x: attend(*x, mask=lengths), x)
    clean, pull_clean = run(qkv)
    dirty, pull_dirty = run((hide(q, [9, 30]), hide(k, [20, 33]), hide(v, [20, 33])))
    cotangents = jax.tree.map(jnp.ones_like, clean)
    got, want = (dirty, pull_dirty(cotangents)), (clean, pull_clean(cotangents))
    jax.tree.map(np.testing.assert_array_equal, got, want)


# Shapes


@pytest.mark.parametrize("keys", [1, 15, 17, 31, 53, 200])
def test_lengths_that_are_no_multiple_of_the_block(attend, array, keys):
    """Wrong numbers or NaN when S was no multiple of the block, or T was not S; seen in JAX's Pallas kernel."""
    q, k, v = array(2, 23, 2, 8), array(2, keys, 2, 8), array(2, keys, 2, 8)
    out, lse = attend(q, k, v)
    s = np.einsum("btnh,bsnh->btns", np.float64(q), np.float64(k)) / np.sqrt(8)
    np.testing.assert_allclose(lse, np.log(np.exp(s).sum(-1)), rtol=1e-5, atol=1e-6)
    w = np.exp(s) / np.exp(s).sum(-1, keepdims=True)
    np.testing.assert_allclose(out, np.einsum("btns,bsnv->btnv", w, np.float64(v)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("key_heads", [1, 2, 3, 6])
def test_groups_of_any_size(attend, qkv, array, key_heads):
    """Only K = 1 and K = N worked, or query head n read key head n % K; seen in ejkernel and elsewhere."""
    q, k, v = qkv[0], array(2, S, key_heads, H), array(2, S, key_heads, V)
    out, _ = attend(q, k, v)
    for n in range(N):
        g = n // (N // key_heads)
        one = attend(q[:, :, n : n + 1], k[:, :, g : g + 1], v[:, :, g : g + 1])[0]
        np.testing.assert_allclose(out[:, :, n : n + 1], one, rtol=1e-5, atol=1e-6)


def test_heads_before_time_are_not_taken_for_time_before_heads(attend, array):
    """[B, N, T, H] given to an API that wants [B, T, N, H] computed nonsense; a user's report on jax.nn."""
    q, k, v = array(2, N, T, H), array(2, N, S, H), array(2, N, S, V)
    with pytest.raises(ValueError, match="multiple of"):
        attend(q, k, v)
    # With as many keys as queries nothing can be noticed, so the rule must at least be the stated one.
    q = k = v = array(1, N, T, H)
    out, _ = attend(q, k, v)
    swap = lambda x: x.transpose(0, 2, 1, 3)
    assert np.abs(swap(out) - attend(swap(q), swap(k), swap(v))[0]).max() > 0.1


def test_the_default_scale_is_of_the_query_head_size(attend, qkv):
    """The default was 1, not 1 / sqrt(H); seen in JAX's Pallas kernel."""
    q, k, v = qkv
    np.testing.assert_allclose(attend(q, k, v)[1], attend(q, k, v, scale=1 / np.sqrt(H))[1], rtol=1e-6)
    assert np.abs(attend(q, k, v)[1] - attend(q, k, v, scale=1.0)[1]).max() > 0.1


# Gradients


def test_vmap_of_the_backward_does_not_mix_batches(attend, array):
    """With a mapped and a batch axis both longer than 1, gradients changed places; seen in flash_attn_jax."""
    q, k, v = array(2, 3, 20, 2, 4), array(2, 3, 21, 2, 4), array(2, 3, 21, 2, 4)
    loss = lambda q, k, v: attend(q, k, v)[0][..., 0].sum()
    one = jax.grad(loss, (0, 1, 2))
    for got, *want in zip(jax.vmap(one)(q, k, v), *[one(q[n], k[n], v[n]) for n in range(2)], strict=True):
        np.testing.assert_allclose(got, jnp.stack(want), rtol=1e-5, atol=1e-6)
    only_q = jax.vmap(one, in_axes=(0, None, None))(q, k[0], v[0])
    for got, *want in zip(only_q, *[one(q[n], k[0], v[0]) for n in range(2)], strict=True):
        np.testing.assert_allclose(got, jnp.stack(want), rtol=1e-5, atol=1e-6)


def test_bias_and_sink_gradients_are_not_zero(attend, qkv, array):
    """They were returned as zero or None; seen in ejkernel."""
    loss = lambda bias, sinks: (attend(*qkv, score=aj.Bias(bias), sinks=sinks)[0] ** 2).sum()
    bias, sinks = jax.grad(loss, (0, 1))(array(N, T, S), array(N))
    assert (np.abs(bias) > 0).mean() > 0.99 and (np.abs(sinks) > 1e-4).all()


def test_a_sink_is_counted_once(attend, array):
    """It joined the denominator once per block of keys; seen in ejkernel."""
    q = jnp.zeros((1, 2, 1, 4))
    keys = 200  # many blocks
    out, lse = attend(q, jnp.zeros((1, keys, 1, 4)), jnp.ones((1, keys, 1, 3)), sinks=jnp.log(jnp.array([100.0])))
    np.testing.assert_allclose(out, keys / (keys + 100), rtol=1e-6)
    np.testing.assert_allclose(lse, np.log(keys + 100), rtol=1e-6)


def test_lse_has_a_gradient(attend, qkv):
    """Its cotangent was stopped or dropped; seen in jax.nn and in the fused kernels behind it."""
    q, k, v = qkv
    got = jax.grad(lambda q: attend(q, k, v)[1].sum())(q)
    weights = jnp.exp(jnp.einsum("btnh,bsnh->btns", q, k.repeat(3, 2)) * H**-0.5 - attend(q, k, v)[1][..., None])
    want = jnp.einsum("btns,bsnh->btnh", weights, k.repeat(3, 2)) * H**-0.5
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lse_of_half_precision_is_float32(attend, qkv, dtype):
    """It was rounded to the inputs' dtype; seen in jax.nn."""
    q, k, v = (a.astype(dtype) for a in qkv)
    lse = attend(q, k, v)[1]
    want = attend(*(a.astype("float32") for a in (q, k, v)))[1]
    assert lse.dtype == jnp.float32
    np.testing.assert_allclose(lse, want, rtol=2e-6, atol=2e-6)


# Precision


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_float64_is_float64_all_the_way(implementation):
    """The softmax of float64 inputs was done in float32, errors 1e-7; seen in jax.nn."""
    with precision("float64"):
        case = Case(MASKS[1], SCORES[0])
        inputs = draw(case, "float64")
        got = jax.jit(solver(case, implementation, IMPLEMENTATIONS[implementation]))(*inputs)
        want = expect(case, inputs)
        assert all(np.max(limit) < 1e-13 for limit in jax.tree.leaves(want.allowed))
        want.check(got)


def test_half_precision_softmax_is_float32(attend):
    """Weights were rounded to bfloat16 before they were summed, so many small ones vanished; seen in Flax."""
    keys = 4096
    q, k = jnp.zeros((1, 1, 8), jnp.bfloat16), jnp.zeros((keys, 1, 8), jnp.bfloat16)
    out, lse = attend(q, k, jnp.ones((keys, 1, 1), jnp.bfloat16))
    np.testing.assert_allclose(lse, np.log(keys), rtol=1e-6)
    assert float(out[0, 0, 0]) == 1.0


def test_large_logits_do_not_overflow(attend, array):
    """float16 logits beyond 65504 became infinite and the row NaN."""
    q, k, v = (100 * array(1, n, 1, 16, dtype="float16") for n in (5, 40, 40))
    out, lse = attend(q, k, v / 100, scale=1.0)
    s = np.einsum("btnh,bsnh->btns", np.float64(q), np.float64(k))
    assert np.abs(s).max() > 65504
    np.testing.assert_allclose(lse, s.max(-1), rtol=1e-6)
    assert np.isfinite(np.float32(out)).all()


# Dropout


def test_dropout_is_never_ignored(attend, qkv):
    """The rate was accepted and thrown away; seen in ejkernel on TPU."""
    q, k, v = qkv
    out, lse = attend(q, k, v, dropout=aj.Dropout(0.5, 1))
    np.testing.assert_allclose(lse, attend(q, k, v)[1], rtol=1e-6)
    assert np.abs(out - attend(q, k, v)[0]).max() > 0.1


def test_dropout_is_on_weights_and_not_on_logits(attend):
    """Logits were dropped before the softmax; seen in levanter. Here the kept weights are each 1 / (S (1 - rate))."""
    keys, rate = 53, 0.25
    q, k = jnp.zeros((T, N, 4)), jnp.zeros((keys, N, 4))
    v = jnp.broadcast_to(jnp.eye(keys)[:, None], (keys, N, keys))
    weights = np.asarray(attend(q, k, v, dropout=aj.Dropout(rate, 5))[0])
    kept = weights != 0
    np.testing.assert_allclose(weights[kept], 1 / (keys * (1 - rate)), rtol=1e-6)
    # 37 * 6 * 53 draws: the share lies within five standard deviations.
    assert abs(kept.mean() - (1 - rate)) < 5 * np.sqrt(rate * (1 - rate) / kept.size)


def test_dropout_differs_by_seed_head_row_and_example(attend, qkv):
    """One fixed seed in the kernel gave every layer and step the same pattern; seen in jax.nn's cuDNN path."""
    keys = S
    q, k = jnp.zeros((2, T, N, 4)), jnp.zeros((2, keys, N, 4))
    v = jnp.broadcast_to(jnp.eye(keys)[:, None], (2, keys, N, keys))
    pattern = lambda seed: np.asarray(attend(q, k, v, dropout=aj.Dropout(0.5, seed))[0]) != 0
    first = pattern(0)
    assert np.array_equal(first, pattern(0))
    alike = [(first, pattern(1)), (first[0], first[1]), (first[:, 1:], first[:, :-1]), (first[:, :, 0], first[:, :, 1])]
    for one, other in alike:
        assert abs((one == other).mean() - 0.5) < 5 * np.sqrt(0.25 / one.size)


def test_gradients_use_the_weights_that_were_dropped(attend, qkv):
    """A backward that draws again has the wrong gradient: here the output is linear in the values."""
    q, k, v = qkv
    f = lambda v: attend(q, k, v, dropout=aj.Dropout(0.5, 9))[0]
    out, pull = jax.vjp(f, v)
    np.testing.assert_allclose(jnp.vdot(pull(out)[0], v), jnp.vdot(out, out), rtol=1e-5)


# Scores


def test_a_score_and_a_window_and_sinks_together(attend, qkv, array):
    """Each worked alone and one of them was dropped in company; seen where kernels differ in what they take."""
    q, k, v = qkv
    sinks, bias = array(N), array(N, T, S)
    t, s = np.arange(T)[:, None], np.arange(S)
    visible = np.broadcast_to((t - 9 <= s) & (s <= t + 2), (2, N, T, S))
    chain = lambda logits, i, x: 5 * jnp.tanh(logits / 5) + x["bias"]
    problem = Problem(Shape(batch=(2,)), visible, chain)
    want = dense(dict(query=q, key=k, value=v, sinks=sinks, bias=bias), problem)
    got = attend(q, k, v, mask=aj.Window(9, 2), score=(aj.SoftCap(5.0), aj.Bias(bias)), sinks=sinks)
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_minus_infinity_in_a_bias_is_a_mask(attend, qkv):
    """Masks given as biases of -inf made rows, or only their gradients, NaN; seen in several libraries."""
    bias = jnp.where(jnp.tri(T, S, -1, dtype=bool), 0.0, -jnp.inf)  # row 0 sees nothing
    loss = lambda q, bias: attend(q, *qkv[1:], score=aj.Bias(bias))[0].sum()
    (out, lse), (gq, gbias) = attend(*qkv, score=aj.Bias(bias)), jax.grad(loss, (0, 1))(qkv[0], bias)
    assert not np.asarray(out)[:, 0].any() and np.isneginf(lse[:, 0]).all()
    assert np.isfinite(out).all() and np.isfinite(gq).all() and np.isfinite(gbias).all()
    assert not np.asarray(gbias)[np.isneginf(bias)].any()


# Reports whose situations other tests hold. Those that are named where they are tested are not repeated here.

REPORTS = {
    "google/flax#4589, #4151, #4771: dropout in stacks": [
        "test_nn.py::test_stacks_keep_random_streams_and_what_is_sown"
    ],
    "google/flax#5205, marin#2288, #7247: meshes as jax.make_mesh makes them": [
        "test_sharding.py::test_each_device_runs_its_own_share",
        "test_nn.py::test_models_on_meshes_with_explicit_axes",
    ],
    "flax FLIP 4844, maxdiffusion#265: parameters made with and without a mesh": [
        "test_nn.py::test_eight_devices_give_the_same_numbers",
        "test_nn.py::test_with_mesh_places_nothing_and_says_so",
    ],
    "keras-hub#1613, #2795, torchtitan#2577: fewer key heads than devices": [
        "test_sharding.py::test_each_device_runs_its_own_share",
        "test_nn.py::test_models_on_meshes_with_explicit_axes",
    ],
    "google/flax#5172: an optimizer on a divided model": ["test_nn.py::test_eight_devices_give_the_same_numbers"],
    "transformers#37574, PR 38046, PR 47708, mlx-lm#735: ring caches": [
        "test_cache.py::test_pieces_give_the_whole",
        "test_cache.py::test_rows_of_different_lengths",
        "test_cache.py::test_a_ring_of_more_room_than_its_window",
    ],
    "transformers#25420: cached against uncached": ["test_generate.py::test_greedy_tokens_are_those_of_full_forwards"],
    "TinyLLM#17, x-transformers#187: a prompt at once, then steps": ["test_cache.py::test_pieces_give_the_whole"],
    "OpenNMT-py#60, tensorflow#21920, espnet#4174, ParlAI#2058, transformers#20901, joeynmt#149: beams": [
        "test_beam.py::test_a_wide_beam_finds_the_best_of_all_targets",
        "test_beam.py::test_scores_fall_and_a_row_does_not_depend_on_others",
    ],
    "candle#899, TensorRT-LLM#13870, transformers#4499, rust-bert#170: T5": ["test_nn.py::test_relative_positions"],
    "vllm#48621, mlx-lm#1507: YaRN": ["test_positions.py::test_rope_is_that_of_hugging_face"],
    "EasyDeL#129: packed documents": [
        "test_models.py::test_packed_documents_equal_separate_runs",
        "test_models.py::test_positions_begin_anew_in_each_document",
    ],
    "jax PR 26374, maxtext PR 1805, PR 2323: attention that is kept by name": [
        "test_remat.py::test_a_policy_keeps_the_output_and_the_log_sum_exp",
        "test_remat.py::test_names_in_modules",
    ],
    "pytorch#193728: a value longer than its key": ["test_errors.py::test_sizes_that_do_not_fit"],
}


@pytest.mark.parametrize("report", REPORTS)
def test_reports_are_where_the_table_says(report):
    """A test that is renamed takes its line along."""
    for place in REPORTS[report]:
        file, name = place.split("::")
        assert f"def {name}" in (pathlib.Path(__file__).parent / file).read_text()
