"""Different ways of asking for the same attention give the same answer. The oracle only says how close is the same."""

import functools
import itertools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import MASKS, SCORES
from oracle import Problem, Shape, expected
from problems import IMPLEMENTATIONS, OPTIMISED, Case, draw, expect, solver

import attnjax as aj
from attnjax.kernels import xla

COMBINED, EVERYTHING = MASKS[-1], SCORES[-1]
T, S, N, K, H, V = 37, 53, 6, 2, 19, 23


@pytest.fixture
def qkv(rng):
    array = lambda *size: jnp.asarray(rng.normal(size=size), jnp.float32)
    return array(2, T, N, H), array(2, S, K, H), array(2, S, K, V)


def agree(left, right):
    """Raises unless two pairs (out, lse) are as close as two answers within the error budget must be.

    The budget of full attention on these sizes: 2 (error of the plain formula + eps max), for each of the two.
    """
    for one, other, allowed in zip(left, right, usual_budget(), strict=True):
        assert one.shape == other.shape
        np.testing.assert_array_equal(np.isneginf(one), np.isneginf(other))
        difference = np.abs(np.where(np.isneginf(one), 0, one) - np.where(np.isneginf(other), 0, other))
        assert np.max(difference, initial=0.0) <= 2 * allowed


@functools.cache
def usual_budget():
    case = Case(MASKS[0], SCORES[0])
    allowed = expect(case, draw(case, "float32")).allowed
    return allowed.out, allowed.lse


def close(left, right, allowed):
    assert left.shape == right.shape
    assert np.max(np.abs(np.asarray(left) - np.asarray(right)), initial=0.0) <= allowed


def merge(parts):
    """Attention over a union of disjoint key sets, from (out, lse) of each."""
    outs, lses = zip(*parts, strict=True)
    lse = functools.reduce(jnp.logaddexp, lses)
    return sum(out * jnp.exp(part - lse)[..., None] for out, part in zip(outs, lses, strict=True)), lse


def split(attend, q, k, v, mask, cuts=(0, 20, 41, S)):
    """Attention over three spans of keys apart, each with its columns of the mask, merged by log-sum-exp."""
    return merge([attend(q, k[:, a:b], v[:, a:b], mask=mask[:, a:b]) for a, b in itertools.pairwise(cuts)])


def test_splitting_the_keys_and_merging_is_the_whole(attend, qkv):
    mask = jnp.asarray(np.tri(T, S, 3, dtype=bool))
    mask = mask.at[:, 0].set(True).at[:, 20].set(True).at[:, 41].set(True)  # every span is seen by every query
    agree(split(attend, *qkv, mask), attend(*qkv, mask=mask))


def test_gradients_through_a_merge_are_those_of_the_whole(attend, qkv, rng):
    """The merge weighs parts by their log-sum-exp, so its gradient has to be right too."""
    mask = jnp.ones((T, S), bool)
    weight = jnp.asarray(rng.normal(size=(2, T, N, V)), jnp.float32)
    loss = lambda run: lambda qkv: (run(*qkv, mask=mask)[0] * weight).sum()
    got = jax.jit(jax.grad(loss(functools.partial(split, attend))))(qkv)
    want = jax.jit(jax.grad(loss(attend)))(qkv)
    x = dict(zip(("query", "key", "value"), qkv, strict=True))
    allowed = expected(Problem(Shape(batch=(2,))), x, x, (weight, jnp.zeros((2, T, N)))).allowed.gradients
    for name, one, other in zip(x, got, want, strict=True):
        close(one, other, 2 * allowed[name])


def test_permuted_heads_are_permuted_outputs(attend, qkv, rng):
    """Key/value heads move with their groups of query heads; what is per head moves along."""
    q, k, v = qkv
    bias, slopes = jnp.asarray(rng.normal(size=(N, T, S)), jnp.float32), jnp.arange(1.0, N + 1) / 8
    groups, heads = np.array([1, 0]), np.array([5, 3, 4, 1, 2, 0])
    run = lambda q, k, v, bias, slopes: attend(q, k, v, score=(aj.Bias(bias), aj.ALiBi(slopes)), mask=aj.Causal(9))
    out, lse = run(q, k, v, bias, slopes)
    permuted = run(q[:, :, heads], k[:, :, groups], v[:, :, groups], bias[heads], slopes[heads])
    agree(permuted, (out[:, :, heads], lse[:, :, heads]))


def test_segments_are_separate_runs(attend, qkv):
    q, k, v = qkv
    cuts = [0, 5, 22, T]
    ids = jnp.asarray(np.repeat(np.arange(3), np.diff(cuts)), jnp.int32)
    packed = attend(q, k[:, :T], v[:, :T], mask=aj.Segments(ids) & aj.Causal())
    apart = [attend(q[:, a:b], k[:, a:b], v[:, a:b], mask=aj.Causal()) for a, b in itertools.pairwise(cuts)]
    agree(packed, [jnp.concatenate(parts, axis=1) for parts in zip(*apart, strict=True)])


def test_queries_do_not_know_of_each_other(attend, qkv):
    """A slice of the queries with the offset of its first one: chunked prefill, and decoding one token at a time."""
    q, k, v = qkv
    out, lse = attend(q, k, v, mask=aj.Causal(7))
    for a, b in [(0, 16), (16, 30), (30, 31), (31, T)]:
        agree(attend(q[:, a:b], k, v, mask=aj.Causal(7 + a)), (out[:, a:b], lse[:, a:b]))


SAME_MASKS = {
    "causal_is_a_window": (aj.Causal(), aj.Window(None, 0)),
    "infinite_window_is_full": (aj.Window(S, S), None),
    "unbounded_window_is_full": (aj.Window(None, None), None),
    "window_is_two_causals": (aj.Window(5, 3), aj.Causal(3) & ~aj.Causal(-6)),
    "de_morgan_or": (~(aj.Causal() | aj.Dilated(3)), ~aj.Causal() & ~aj.Dilated(3)),
    "de_morgan_and": (~(aj.Chunked(9) & aj.Causal()), ~aj.Chunked(9) | ~aj.Causal()),
    "not_not": (~~aj.Causal(4), aj.Causal(4)),
    "end_is_an_offset": (aj.Causal.aligned_end(), aj.Causal(S - T)),
    "window_end_is_an_offset": (aj.Window.aligned_end(8, 0), aj.Window(8, 0, S - T)),
    "prefix_is_a_length": (aj.Prefix(19), aj.Lengths(key=19)),
    "chunk_is_segments": (
        aj.Chunked(10),
        aj.Segments(jnp.arange(T, dtype=jnp.int32) // 10, jnp.arange(S, dtype=jnp.int32) // 10),
    ),
    "stride_one_is_full": (aj.Dilated(1), None),
    "predicate": (aj.Where(lambda b, h, q, k: k <= q), aj.Causal()),
    "scanned_predicate": (aj.Where(lambda b, h, q, k: k <= q, scan=True), aj.Causal()),
    "traced_offset": (aj.Causal(jnp.int32(3)), aj.Causal(3)),
    "batched_offset": (aj.Causal(jnp.array([3, 3])), aj.Causal(3)),
    "permutation_of_nothing": (aj.Permutation(jnp.arange(T, dtype=jnp.int32)), aj.Causal()),
}


@pytest.mark.parametrize("one, other", SAME_MASKS.values(), ids=SAME_MASKS)
def test_masks_that_mean_the_same(attend, qkv, one, other):
    q, k, v = qkv
    keys = T if isinstance(one, aj.Permutation) else S
    agree(attend(q, k[:, :keys], v[:, :keys], mask=one), attend(q, k[:, :keys], v[:, :keys], mask=other))


def test_a_mask_is_its_array_and_a_bias_of_minus_infinity(attend, qkv):
    mask = aj.Causal(2) & ~aj.Dilated(3)
    array = mask.to_array(T, S)
    agree(attend(*qkv, mask=mask), attend(*qkv, mask=array))
    agree(attend(*qkv, mask=mask), attend(*qkv, score=aj.Bias(jnp.where(array, 0.0, -jnp.inf))))


def test_a_shared_prefix_is_a_duplicated_one(attend, qkv):
    """Answers to one prompt: packed behind a prefix that all see, or each run with its own copy of the prefix."""
    q, k, v = (a[:1] for a in qkv)
    prefix, cuts = 11, [11, 20, 31, T]
    ids = jnp.asarray(np.repeat([0, 1, 2, 3], np.diff([0, *cuts])), jnp.int32)
    mask = aj.Causal() & (aj.Segments(ids) | aj.Prefix(prefix))
    out, lse = attend(q, k[:, :T], v[:, :T], mask=mask)
    for a, b in itertools.pairwise(cuts):
        copy = lambda x, a=a, b=b: jnp.concatenate([x[:, :prefix], x[:, a:b]], axis=1)
        alone = attend(q[:, a:b], copy(k), copy(v), mask=aj.Causal(prefix))
        agree(alone, (out[:, a:b], lse[:, a:b]))


def test_grouped_heads_are_repeated_ones(attend, qkv, rng):
    """Gradients too: those of the repeated heads, summed over each group."""
    q, k, v = qkv
    weight = jnp.asarray(rng.normal(size=(2, T, N, V)), jnp.float32)
    repeat = lambda x: x.repeat(N // K, axis=2)
    agree(attend(q, k, v, mask=aj.Causal(9)), attend(q, repeat(k), repeat(v), mask=aj.Causal(9)))
    loss = lambda q, k, v: (attend(q, k, v)[0] * weight).sum()
    got = jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)
    want = jax.jit(jax.grad(lambda q, k, v: loss(q, repeat(k), repeat(v)), (0, 1, 2)))(q, k, v)
    x = dict(zip(("query", "key", "value"), qkv, strict=True))
    allowed = expected(Problem(Shape(batch=(2,))), x, x, (weight, jnp.zeros((2, T, N)))).allowed.gradients
    for name, one, other in zip(x, got, want, strict=True):
        close(one, other, 2 * allowed[name])


def test_a_constant_added_to_all_logits_only_moves_lse(attend, qkv):
    out, lse = attend(*qkv, mask=aj.Causal(5))
    moved = attend(*qkv, mask=aj.Causal(5), score=aj.Bias(jnp.full((1, 1), 0.5)))
    agree((moved[0], moved[1] - 0.5), (out, lse))


def test_scale_is_a_factor_of_the_query(attend, qkv):
    q, k, v = qkv
    agree(attend(q, k, v, scale=0.25), attend(q * 0.25, k, v, scale=1.0))
    agree(attend(q, k, v), attend(q, k, v, scale=H**-0.5))


def test_a_sink_is_a_key_with_a_value_of_zero(attend, qkv, rng):
    """One more key, of zeros, whose logit is the sink by way of a bias."""
    q, k, v = qkv
    sinks = jnp.asarray(rng.normal(size=N), jnp.float32)
    more = lambda x: jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0)))
    bias = jnp.zeros((N, 1, S + 1)).at[:, 0, -1].set(sinks)
    agree(attend(q, k, v, sinks=sinks), attend(q, more(k), more(v), score=aj.Bias(bias)))


def test_the_order_of_the_keys_does_not_matter(attend, qkv, rng):
    q, k, v = qkv
    order = rng.permutation(S)
    bias = jnp.asarray(rng.normal(size=(T, S)), jnp.float32)
    permuted = attend(q, k[:, order], v[:, order], score=aj.Bias(bias[:, order]))
    agree(permuted, attend(q, k, v, score=aj.Bias(bias)))


def test_block_sizes_do_not_matter(some):
    """Tilings differ by rounding alone: same values, gradients and tangents, same dropped weights."""
    case = Case(COMBINED, EVERYTHING)
    inputs = draw(case, "float32")
    allowed = expect(case, inputs).allowed
    finite = lambda a: np.where(np.isneginf(a), 0, a)
    run = lambda *blocks: jax.tree.map(finite, jax.jit(solver(case, "xla", xla.Config(*blocks)))(*inputs))
    first = run(16, 16)
    for blocks in some([(1, 16), (16, 1), (7, 11), (128, 128)], 2):
        jax.tree.map(lambda a, b, limit: close(a, b, 2 * limit), run(*blocks), first, allowed)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_same_call_gives_the_same_bits(implementation):
    """Twice from one compiled program, and from a program compiled anew."""
    case = Case(COMBINED, EVERYTHING)
    inputs = draw(case, "float32")
    solve = solver(case, implementation, IMPLEMENTATIONS[implementation])
    program = jax.jit(solve, compiler_options=OPTIMISED)
    first = program(*inputs)
    anew = jax.jit(lambda *inputs: solve(*inputs), compiler_options=OPTIMISED)
    for again in (program(*inputs), anew(*inputs)):
        jax.tree.map(np.testing.assert_array_equal, again, first)


THREADS = """
import os, sys
if sys.argv[1] == "one": os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
import hashlib, jax, numpy as np, attnjax
rng = np.random.default_rng(0)
q, k, v = (rng.normal(size=(1, 700, 2, 32)).astype("float32") for _ in range(3))
f = lambda q, k, v: attnjax.attention(q, k, v, mask=attnjax.Causal(), implementation="xla", return_lse=True)
def run(q, k, v, ct):  # no sum: XLA's own sums do depend on the number of threads
    out, pull = jax.vjp(f, q, k, v)
    return out, pull((ct, ct[..., 0])), jax.jvp(f, (q, k, v), (k, v, q))
out = jax.jit(run)(q, k, v, v)
print(hashlib.sha256(b"".join(np.asarray(a).tobytes() for a in jax.tree.leaves(out))).hexdigest())
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot bind a process to one core")
def test_the_number_of_threads_does_not_change_a_bit():
    """The same program in a process with one core and in one with all of them."""
    run = lambda cores: (
        subprocess.run(
            [sys.executable, "-c", THREADS, cores], capture_output=True, text=True, check=True, timeout=300
        ).stdout
    )
    assert run("one") == run("all") != ""


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_vmap_is_a_loop_with_dropout(implementation):
    """vmap(f)(x)[i] is f(x[i]), to the same dropped weights: a mapped axis is not part of the batch."""
    case = Case(COMBINED, EVERYTHING, Shape(batch=(3, 2)))
    inputs = draw(case, "float32")
    kwargs = dict(implementation=implementation, config=IMPLEMENTATIONS[implementation], return_lse=True)
    f = lambda q, k, v: aj.attention(q, k, v, dropout=aj.Dropout(0.5, 3), **kwargs)
    qkv = [inputs.x[name] for name in ("query", "key", "value")]
    mapped = jax.vmap(f)(*qkv)
    for n in range(3):
        agree([a[n] for a in mapped], f(*(a[n] for a in qkv)))
