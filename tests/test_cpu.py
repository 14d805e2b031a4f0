"""The compiled kernel beyond the table: instruction sets, threads, the edges of its tiles, decoding, block maps.

Every check is of value and gradients. Its tangents are those of the tiled code, and the table has them. What it
refuses is in test_cpu_refusals.py.
"""

import dataclasses
import functools
import itertools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import MASKS, SCORE_VARIANTS, SCORES, VARIANTS, MaskCase, ScoreCase, bias
from draws import join, normal
from oracle import Expected, Shape, expected
from problems import (
    DTYPES,
    Case,
    attend,
    check_first_order,
    draw,
    expect,
    first_order,
    poison,
    precision,
    problem,
)

import attnjax as aj
from attnjax.kernels import cpu
from attnjax.scores import Scale

pytestmark = pytest.mark.compiled

ISAS = cpu.instruction_sets()
EVERY_ISA = [cpu.Config(isa=isa) for isa in ISAS]
MASK = {mask.name: mask for mask in (*MASKS, *VARIANTS)}
SCORE = {score.name: score for score in (*SCORES, *SCORE_VARIANTS)}
FULL, NONE = MASK["full"], dataclasses.replace(SCORE["none"], scale=0.37)
COMBINED, EVERYTHING = MASK["combined"], SCORE["everything"]
TAKEN = [score for score in (*SCORES, *SCORE_VARIANTS) if not score.name.startswith("function")]


def same_bits(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


def crossed(everything):
    """Every mask with all scores at once, and every score alone; or all pairs in every dtype."""
    pairs = [(mask, EVERYTHING) for mask in MASKS] + [(FULL, score) for score in TAKEN]
    if not everything:
        return [(mask, score, DTYPES[n % 4]) for n, (mask, score) in enumerate(pairs)]
    pairs = itertools.product([*MASKS, *VARIANTS], TAKEN)
    return [(mask, score, dtype) for (mask, score), dtype in itertools.product(pairs, DTYPES)]


def pytest_generate_tests(metafunc):
    if metafunc.function is test_every_instruction_set:
        table = crossed(metafunc.config.getoption("--full-cross"))
        metafunc.parametrize("mask, score, dtype", table, ids=str)


def check_every_isa(solve, inputs, want, about=""):
    """Raises unless every instruction set is within the budget; `solve` is `first_order` with EVERY_ISA."""
    for isa, made in zip(ISAS, solve(inputs.x, inputs.d, inputs.cotangents), strict=True):
        try:
            check_first_order(want, made)
        except AssertionError as error:
            error.add_note(f"{about} on {isa}")
            raise


def check_with_padding(case, dtype="float32"):
    """The same, and again with NaN in what nobody sees."""
    inputs, solve = draw(case, dtype), first_order(case, *EVERY_ISA)
    want = expect(case, inputs)
    check_every_isa(solve, inputs, want, "plain")
    check_every_isa(solve, poison(case, inputs), want, "with NaN")


def test_every_instruction_set(mask, score, dtype):
    with precision(dtype):
        check_with_padding(Case(mask, score), dtype)


# Sizes. The oracle is asked about one large shape, in which the rest is zero and hidden: one program of it for all.


def cut(case, inputs, **sizes):
    """The first T, S, H and V of all arrays, and the oracle's answer to that. Axes are told by their lengths."""
    shape = case.shape
    to = {getattr(shape, letter): size for letter, size in sizes.items()}
    part = lambda tree: jax.tree.map(lambda a: a[tuple(slice(to.get(n, n)) for n in a.shape)], tree)
    beyond = lambda a: jnp.pad(part(a), [(0, n - to.get(n, n)) for n in a.shape])
    whole = problem(case, inputs.d)
    hidden = np.arange(shape.S) >= sizes.get("S", shape.S)
    whole = dataclasses.replace(whole, visible=whole.visible & ~hidden)
    x, tangents, cotangents = (jax.tree.map(beyond, tree) for tree in (inputs.x, inputs.tangents, inputs.cotangents))
    want = expected(whole, x, tangents, cotangents)
    return type(inputs)(*map(part, inputs)), Expected(part(want.answer), want.allowed)


def check_sizes(case, dtype, sizes):
    """Every instruction set on each of the sizes."""
    with precision(dtype):
        inputs, solve = draw(case, dtype), first_order(case, *EVERY_ISA)
        for one in sizes:
            part, want = cut(case, inputs, **one)
            check_every_isa(solve, part, want, one)


HEAD_SIZES = [
    (1, 1),
    (2, 3),
    (7, 8),
    (16, 15),
    (17, 31),
    (33, 64),
    (65, 1),
    (128, 129),
    (255, 257),
    (512, 511),
    (511, 512),
]


@pytest.mark.parametrize("dtype", DTYPES)
def test_head_sizes(dtype, some):
    """From 1 to 512, at and beside the widths of vectors."""
    score = dataclasses.replace(EVERYTHING, scale=0.06)
    case = Case(COMBINED, score, Shape(batch=(2,), T=11, S=141, N=2, K=1, H=512, V=513))
    sizes = some(HEAD_SIZES, 5 if dtype == "float32" else 2)
    check_sizes(case, dtype, [{"H": h, "V": v} for h, v in sizes])


LENGTHS = [
    (0, 5),
    (6, 0),
    (1, 1),
    (7, 1),
    (5, 2),
    (3, 127),
    (31, 128),
    (65, 129),
    (64, 256),
    (128, 63),
    (127, 257),
    (199, 401),
]


@pytest.mark.parametrize("mask, score", [(FULL, NONE), (COMBINED, EVERYTHING)], ids=["plain", "everything"])
def test_lengths(mask, score, some):
    """None, one, primes, and what lies beside the sizes of tiles; batch and heads of each go to several tasks."""
    case = Case(mask, score, Shape(batch=(2,), T=199, S=401, N=6, K=3, H=9, V=14))
    check_sizes(case, "float32", [{"T": t, "S": s} for t, s in some(LENGTHS, 6)])


FEW = {
    "one": (Shape(batch=(2,), T=1, S=1537, N=5, K=5, H=24, V=37), "float32"),
    "group": (Shape(batch=(2,), T=1, S=1537, N=8, K=2, H=17, V=16), "bfloat16"),
    "group_of_8": (Shape(batch=(2,), T=1, S=1537, N=8, K=1, H=33, V=19), "float32"),
    "queries": (Shape(batch=(2,), T=3, S=1537, N=2, K=2, H=24, V=37), "float64"),
    "both": (Shape(batch=(), T=2, S=1537, N=4, K=2, H=40, V=24), "float16"),
}


@pytest.mark.parametrize("shape, dtype", FEW.values(), ids=FEW)
def test_few_queries_and_many_keys(shape, dtype, some):
    """Decoding: all heads share a pass over the keys, which are split among tasks."""
    check_sizes(Case(COMBINED, EVERYTHING, shape), dtype, [{"S": s} for s in some((1, 33, 513, 1537), 2)])


def test_one_query_and_thousands_of_keys():
    shape = Shape(batch=(2,), T=1, S=5003, N=6, K=3, H=64, V=64)
    check_sizes(Case(FULL, SCORE["none"], shape), "float32", [{"S": s} for s in (64, 5003)])


DECODED = ["causal_batched", "lengths", "segments_unsorted", "dense_heads", "dense_keys", "where", "window_batched"]


@pytest.mark.parametrize("mask", DECODED)
def test_masks_of_few_queries(mask):
    check_with_padding(Case(MASK[mask], EVERYTHING, Shape(batch=(3,), T=2, S=1100, N=6, K=3, H=8, V=8)))


# Many tiles, panels and tasks.


def checkerboard(rng, shape):
    """Booleans [N, T, S] in squares of 64, others for each head."""
    squares = rng.random((shape.N, shape.T // 64 + 1, shape.S // 64 + 1)) < 0.4
    return {"a": np.kron(squares, np.ones((64, 64), bool))[:, : shape.T, : shape.S]}


heads = MaskCase("heads", lambda d: aj.Dense(d["a"]), lambda i, d: d["a"], checkerboard)
window = MaskCase("window", lambda d: aj.Window(40, 3), lambda i, d: (i.q - 40 <= i.k) & (i.k <= i.q + 3))
predicates = MaskCase(
    "predicates",
    lambda d: (
        aj.Where(lambda b, h, q, k: (q * (h + 2) + k * d["a"][k]) % 5 < 2 + b)
        & ~aj.Where(lambda b, h, q, k: (q + k) % 4 == 0)
        & aj.Window(None, 130)  # some blocks are not packed
    ),
    lambda i, d: ((i.q * (i.h + 2) + i.k * d["a"][i.k]) % 5 < 2 + i.b) & ((i.q + i.k) % 4 != 0) & (i.k <= i.q + 130),
    lambda rng, shape: {"a": rng.integers(0, 3, shape.S).astype(np.int32)},
)
capped = ScoreCase(
    "capped",
    lambda x: (aj.Bias(x["b"]), aj.SoftCap(2.0), Scale(x["c"]), aj.RelativeBias(x["a"], max_distance=20)),
    lambda s, i, x: SCORE["relative"].rule(
        2 * jnp.tanh((s + i.per(x["b"], "nts")) / 2) * i.per(x["c"], "n"), i, {"a": x["a"]}
    ),
    join(normal(b="t1"), normal(c="n"), normal(a="8n")),
)
LARGE = {
    "full": (FULL, SCORE["none"]),
    "causal": (MASK["causal"], SCORE["alibi"]),
    "window": (window, capped),
    "segments": (MASK["segments"], EVERYTHING),
    "heads": (heads, SCORE["bias_head_keys"]),
    "predicates": (predicates, SCORE["bias_head_queries"]),
    "shared_bias": (MASK["causal_batched"], bias("bias_of_all", "11ts")),
    "whole_bias": (MASK["not_causal"], SCORE["bias_full"]),
}
every_large = pytest.mark.parametrize("mask, score", LARGE.values(), ids=LARGE)


@every_large
def test_many_tiles(mask, score):
    """Several panels of queries, spans of keys and heads, with full, partial and empty blocks."""
    check_with_padding(Case(mask, score, Shape(batch=(2,), T=149, S=521, N=4, K=2, H=16, V=24)))


@every_large
def test_threads_do_not_change_a_bit(mask, score):
    """One thread, two, all of them, and the same program again: the sums are made in one order."""
    case = Case(mask, score, Shape(batch=(2,), T=1031, S=1283, N=4, K=2, H=16, V=24))
    inputs = draw(case, "float32")
    solve = first_order(case, cpu.Config(threads=1), cpu.Config(threads=2), None)
    first, *others = solve(inputs.x, inputs.d, inputs.cotangents)
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(first[1])) and np.any(first[1]["query"])
    for _ in range(3):
        for other in others:
            same_bits(other, first)
        others = solve(inputs.x, inputs.d, inputs.cotangents)


MAPPED = {name: MASK[name] for name in ("causal_batched", "segments", "dense_full", "where")} | {"window": window}


@pytest.mark.parametrize("mask", MAPPED.values(), ids=MAPPED)
def test_block_maps(mask):
    """Maps that users built, of blocks that are no multiple of the kernel's tiles and beyond them."""
    case = Case(mask, SCORE["none"], Shape(batch=(2,), T=149, S=311, N=4, K=2, H=8, V=8))
    shape, inputs = case.shape, draw(case, "float32")
    want, solve = expect(case, inputs), first_order(case)
    for blocks in [(1, 64), (16, 16), (37, 50), (64, 300), (200, 7), (1000, 1000)]:
        options = dict(batch=shape.batch, heads=shape.N, block_q=blocks[0], block_k=blocks[1])
        block_map = aj.BlockMap.build(mask.mask(inputs.d), shape.T, shape.S, **options)
        (made,) = solve(inputs.x, inputs.d, inputs.cotangents, block_map)
        check_first_order(want, made)


# What is mapped, what is wanted, and where the call stands.

SMALL = Shape(batch=(2,), T=5, S=70, N=4, K=2, H=8, V=6)
EXAMPLES = ("query", "key", "value", "a", "ids")
SUBSETS = [names for n in range(1, 6) for names in itertools.combinations(EXAMPLES, n)]


def test_vmap_over_every_subset(some):
    """What is not mapped is shared by the examples, and not copied: each example is what a call of its own gives."""
    case = Case(MASK["segments"], EVERYTHING, SMALL)
    examples = [draw(case, "float32", seed) for seed in range(3)]
    flat = [inputs.x | {"ids": inputs.d["b"]} for inputs in examples]
    cotangents, fixed = examples[0].cotangents, examples[0].d["a"]
    allowed = jax.tree.map(lambda a: 2 * a, expect(case, examples[0]).allowed)
    solve = lambda x: first_order(case)({n: x[n] for n in x if n != "ids"}, {"a": fixed, "b": x["ids"]}, cotangents)
    one = jax.jit(solve)
    for names in some(SUBSETS, 4):
        axes = {name: 0 if name in names else None for name in flat[0]}
        stacked = {n: jnp.stack([x[n] for x in flat]) if n in names else flat[0][n] for n in axes}
        got = jax.jit(jax.vmap(solve, in_axes=(axes,)))(stacked)
        for at, x in enumerate(flat):
            ((out, lse), gradients) = one({n: x[n] if n in names else flat[0][n] for n in axes})[0]
            want = Expected(expect(case, examples[0]).answer._replace(out=out, lse=lse, gradients=gradients), allowed)
            check_first_order(jax.tree.map(np.float64, want), jax.tree.map(lambda a, at=at: a[at], got)[0])


def test_only_what_is_wanted_is_computed():
    """The gradient of some operands is, to the last bit, that of all of them."""
    case = Case(COMBINED, EVERYTHING, SMALL)
    x, d, _, cotangents = draw(case, "float32")
    run = functools.partial(attend, case, d=d, implementation="cpu")

    @functools.partial(jax.jit, static_argnums=1)
    def gradients(x, names):
        moving = lambda some: run(x | some)
        return jax.vjp(moving, {name: x[name] for name in names})[1](cotangents)[0]

    whole = gradients(x, tuple(x))
    for n in (1, 2, len(x) - 1):
        for names in itertools.combinations(x, n):
            same_bits(gradients(x, names), {name: whole[name] for name in names})


def test_inside_of_other_transforms():
    """jit, checkpoint, scan, a conditional and a loop around it."""
    case = Case(COMBINED, EVERYTHING, SMALL)
    x, d, _, cotangents = draw(case, "float32")
    loss = lambda x: sum(jnp.vdot(a, c) for a, c in zip(attend(case, x, d, "cpu"), cotangents, strict=True))
    want = jax.jit(jax.value_and_grad(loss))(x)
    around = {
        "nothing": loss,
        "checkpoint": jax.checkpoint(loss),
        "scan": lambda x: jax.lax.scan(lambda total, _: (total + loss(x), None), 0.0, None, length=1)[0],
        "cond": lambda x: jax.lax.cond(x["query"].sum() < 1e9, loss, lambda x: 0.0, x),
        "loop": jax.jit(lambda x: jax.lax.map(loss, jax.tree.map(lambda a: a[None], x))[0]),
    }
    for function in around.values():
        value, gradients = jax.value_and_grad(function)(x)
        np.testing.assert_allclose(value, want[0], rtol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), gradients, want[1])


CACHED = """
import hashlib, sys, jax, jax.numpy as jnp, numpy as np, attnjax as aj
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
events = []
jax.monitoring.register_event_listener(lambda name, **more: events.append(name))
q = np.random.default_rng(0).normal(size=(90, 2, 16)).astype("float32")
f = lambda q: jnp.sin(aj.attention(q, q, q, mask=aj.Causal(), score=aj.SoftCap(9.0), implementation="cpu")).sum()
program = jax.jit(jax.value_and_grad(f)).lower(q)
assert "attnjax_backward" in program.as_text()
events.clear()
made = program.compile()(q)
bits = b"".join(np.asarray(a).tobytes() for a in made)
print(events.count("/jax/compilation_cache/cache_hits"), hashlib.sha256(bits).hexdigest())
"""


def test_programs_are_found_again_in_the_compilation_cache(tmp_path):
    """By another process, which gets the same numbers from the program that the first one stored."""
    command = [sys.executable, "-c", CACHED, str(tmp_path)]
    run = lambda: subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout.split()
    (first_hits, first), (second_hits, second) = run(), run()
    assert (first_hits, second_hits) == ("0", "1")
    assert first == second


# Scores and masks with values and shapes of their own.

BIASES = ["", "s", "1s", "t1", "ts", "11s", "1t1", "nts", "n1s", "n11", "*111", "*11s", "*1ts", "*n1s", "*nts", "1nts"]


@pytest.mark.parametrize("t, s", [(1, 9), (9, 1), (1, 1), (1, 700), (70, 130)], ids=str)
def test_the_gradient_of_a_bias_is_that_of_its_copies_summed(t, s):
    """For every shape that broadcasts, where an axis of length one is not an axis that is missing."""
    shape = Shape(batch=(2, 2), T=t, S=s, N=4, K=2, H=4, V=3)
    sizes = {"n": (shape.N,), "t": (t,), "s": (s,), "1": (1,), "*": shape.batch}
    case = Case(FULL, bias("bias_whole", "*nts"), shape)
    x, d, _, cotangents = draw(case, "float32")
    solve, eps = first_order(case), np.finfo(np.float32).eps
    for axes in BIASES:
        size = sum((sizes[c] for c in axes), ())
        drawn = jnp.asarray(np.random.default_rng(len(axes)).normal(size=size), jnp.float32)
        (value, some), whole = solve(x | {"a": drawn}, d, cotangents)[0], jnp.broadcast_to(drawn, x["a"].shape)
        wide_value, wide = solve(x | {"a": whole}, d, cotangents)[0]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), value, wide_value)
        assert some["a"].shape == size
        copies = np.float64(wide["a"]).reshape(-1)
        owners = np.broadcast_to(np.arange(drawn.size).reshape(size), x["a"].shape).reshape(-1)
        total, most = (np.bincount(owners, a, drawn.size).reshape(size) for a in (copies, np.abs(copies)))
        assert np.all(np.abs(some["a"] - total) <= 32 * eps * most), axes


def test_a_bias_that_all_batch_entries_share():
    """[1, 1, T, S] beside a batch of 8: its gradient is one sum, made in one order."""
    case = Case(MASK["causal"], bias("bias_of_all", "11ts"), Shape(batch=(8,), T=70, S=300, N=4, K=2, H=8, V=8))
    inputs = draw(case, "float32")
    check_every_isa(first_order(case, *EVERY_ISA), inputs, expect(case, inputs))
    one, every = first_order(case, cpu.Config(threads=1), None)(inputs.x, inputs.d, inputs.cotangents)
    same_bits(one, every)


@pytest.mark.parametrize("t", [2, 80])
def test_minus_infinity_in_a_bias(t):
    """It forbids a pair, as a mask does; rows of nothing else give 0 and -inf, and no gradient."""
    forbidden = np.random.default_rng(0).random((t, 300)) < 0.5
    forbidden[0], forbidden[:, :140] = True, True
    case = Case(FULL, bias("bias_nts", "nts"), Shape(batch=(2,), T=t, S=300, N=4, K=4, H=8, V=8))
    masked = Case(
        MaskCase("allowed", lambda d: jnp.asarray(~forbidden), lambda i, d: ~forbidden), case.score, case.shape
    )
    x, d, _, cotangents = inputs = draw(case, "float32")
    want = expect(masked, inputs)
    spoilt = x | {"a": jnp.where(forbidden, -jnp.inf, x["a"])}
    solve = first_order(case, *EVERY_ISA)
    check_every_isa(solve, inputs._replace(x=spoilt), want)
    for made in solve(spoilt, d, cotangents):
        np.testing.assert_array_equal(made[0][0][:, 0], 0)
        np.testing.assert_array_equal(made[0][1][:, 0], -np.inf)
        np.testing.assert_array_equal(made[1]["query"][:, 0], 0)
        np.testing.assert_array_equal(made[1]["a"][:, forbidden], 0)


def test_operands_of_other_types():
    """Biases, slopes and sinks may have a type of their own; each gradient comes back in it."""
    rng = np.random.default_rng(0)
    array = lambda dtype, *size: jnp.asarray(rng.normal(size=size), dtype)
    with jax.enable_x64(True):
        for own in ("float32", "bfloat16"):
            q, k, v = array(own, 6, 4, 8), array(own, 70, 2, 8), array(own, 70, 2, 5)
            for dtype in DTYPES:
                operands = array(dtype, 6, 70), array(dtype, 4), array(dtype, 4)

                @functools.partial(jax.jit, static_argnums=0)
                def run(implementation, bias, slopes, sinks, q=q, k=k, v=v):
                    score = aj.Bias(bias), aj.ALiBi(slopes / 32)
                    return aj.attention(q, k, v, score=score, sinks=sinks, implementation=implementation)

                gradients = jax.grad(lambda name, *x: jnp.sin(run(name, *x).astype("float32")).sum(), argnums=(1, 2, 3))
                got, want = (gradients(name, *operands) for name in ("cpu", "reference"))
                precise = max(float(jnp.finfo(kind).eps) for kind in (own, dtype, "float32"))
                for one, other in zip(got, want, strict=True):
                    assert one.dtype == dtype
                    largest = np.abs(np.float64(other)).max()
                    assert np.abs(np.float64(one) - np.float64(other)).max() <= 32 * precise * largest


def test_ids_of_64_bits():
    """One side may hold them: segments named by hashes, offsets that arithmetic made wide."""
    ids = np.array([-(2**40), 3, 4, 2**31 - 1, 2**31, 2**40])
    segments = MaskCase(
        "segments_64",
        lambda d: aj.Segments(d["a"], d["b"]) & aj.Causal(d["c"]),
        lambda i, d: (d["a"][i.q] == d["b"][i.k]) & (i.k <= i.q + d["c"]),
        lambda rng, shape: {
            "a": rng.choice(ids, shape.T),
            "b": rng.choice(np.array([3, 4, 5, 2**31 - 1], np.int32), shape.S),
            "c": np.int64(60),
        },
    )
    case = Case(segments, SCORE["none"], Shape(batch=(2,), T=70, S=130, N=2, K=2, H=4, V=4))
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        inputs = draw(case, "float64")
        assert inputs.d["a"].dtype == inputs.d["c"].dtype == np.int64
        check_every_isa(first_order(case, *EVERY_ISA), inputs, expect(case, inputs))
