"""Block maps: that the three values are right, how sharp they are, that maps can be reused, and that they save work."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import MASKS, SCORES, VARIANTS
from oracle import Shape
from problems import FAST_COMPILE, IMPLEMENTATIONS, Case, draw, problem

import attnjax as aj
from attnjax.core.regions import regions
from attnjax.core.tiles import Sizes, operand_form
from attnjax.kernels import xla

EMPTY, PARTIAL, FULL = 0, 1, 2
TABLE = [mask for mask in (*MASKS, *VARIANTS) if mask.name not in ("full", "dense_bare")]
BLOCKS = [(1, 1), (5, 7), (16, 16), (64, 8)]
SHAPE = Shape(batch=(2,), T=37, S=53, N=4, K=2)
jit = functools.partial(jax.jit, compiler_options=FAST_COMPILE)


def classified(visible, block_q, block_k):
    """The three values of every block of booleans [..., T, S], pair by pair."""
    rows = range(0, visible.shape[-2], block_q)
    columns = range(0, visible.shape[-1], block_k)
    parts = [[visible[..., q : q + block_q, k : k + block_k] for k in columns] for q in rows]
    kinds = [[p.any((-2, -1)).astype(int) + p.all((-2, -1)) for p in row] for row in parts]
    return np.moveaxis(np.array(kinds), (0, 1), (-2, -1))


def build(mask, shape, blocks):
    options = dict(batch=shape.batch, heads=shape.N, block_q=blocks[0], block_k=blocks[1])
    return aj.BlockMap.build(mask, shape.T, shape.S, **options)


def cased(mask_case):
    """The drawn arrays of a case, its shape (square where it must be) and who sees whom, [*B, N, T, S]."""
    case = Case(mask_case, SCORES[0], SHAPE)
    d = draw(case, "float32").d
    shape = case.shape
    return shape, d, np.asarray(problem(case, d).visible).reshape(*shape.batch, shape.N, shape.T, shape.S)


def assert_conservative(kinds, visible, blocks):
    kinds, true = np.broadcast_arrays(np.asarray(kinds), classified(visible, *blocks))
    assert np.all(true[kinds == EMPTY] == EMPTY), "a block that is called empty is not"
    assert np.all(true[kinds == FULL] == FULL), "a block that is called full is not"


@pytest.mark.parametrize("mask", [mask for mask in TABLE if "scan" not in mask.name], ids=repr)
def test_regions_are_the_map(mask):
    """Rectangles of blocks of one kind, found without a map: each block is in one of them, of its own kind."""
    d, shape = draw(case := Case(mask, SCORES[0], SHAPE), "float32").d, case.shape
    settled = mask.mask(d).settled(shape.T, shape.S)
    leaves = [np.asarray(operand_form(leaf, axes, 1)) for _, leaf, axes in settled.operands()]
    sizes = Sizes(shape.batch, 0, shape.T, shape.S, shape.N, shape.K)
    found = np.full((*shape.batch, shape.N, 19, 18), -1, np.int8)
    for some in regions(jax.tree.unflatten(jax.tree.structure(settled), leaves), sizes, 2, 3):
        corners = zip(some.rows, some.columns, some.heights, some.widths, strict=True)
        for n, (i, j, height, width) in enumerate(corners):
            part = found[..., i : i + height, j : j + width]
            assert part.shape[-2:] == (height, width) and (part == -1).all()
            part[:] = some.kinds[..., n, None, None]
    want = build(mask.mask(d), shape, (2, 3)).kinds
    count = want.shape[-2:]
    np.testing.assert_array_equal(found[..., : count[0], : count[1]], np.broadcast_to(want, (*found.shape[:2], *count)))


@pytest.mark.parametrize("blocks", BLOCKS, ids=lambda b: f"{b[0]}x{b[1]}")
@pytest.mark.parametrize("mask", TABLE, ids=repr)
def test_empty_and_full_are_true(mask, blocks):
    """What is called empty or full is, whatever the sizes; `partial` is always allowed."""
    shape, d, visible = cased(mask)
    assert_conservative(build(mask.mask(d), shape, blocks).kinds, visible, blocks)


@pytest.mark.parametrize("mask", [mask for mask in TABLE if mask.arrays(np.random.default_rng(0), SHAPE)], ids=repr)
def test_traced_arrays_give_the_same_map(mask):
    shape, d, _ = cased(mask)
    got = jit(lambda d: build(mask.mask(d), shape, (5, 7)))(d)
    want = build(mask.mask(d), shape, (5, 7))
    np.testing.assert_array_equal(*np.broadcast_arrays(got.kinds, want.kinds))


# Where no block may be called partial that is empty or full: everything that is an interval, a table, or looked at.
SHARP = {
    "causal": aj.Causal(),
    "causal_offset": aj.Causal(-7),
    "causal_end": aj.Causal.aligned_end(),
    "window": aj.Window(9, 4),
    "window_one_side": aj.Window(None, 3),
    "window_end": aj.Window.aligned_end(6, 0),
    "chunked": aj.Chunked(11),
    "chunked_offset": aj.Chunked(8, -5),
    "prefix": aj.Prefix(20),
    "lengths": aj.Lengths(jnp.array([17, 40]), jnp.array([30, 5])),
    "segments": aj.Segments(np.arange(37) // 9, np.arange(53) // 11),
    "dense": aj.Dense(np.arange(53) // 8 * 3 % 5 < 2 + np.arange(37)[:, None] // 10),
    "scanned": aj.Where(lambda b, h, q, k: (q // 7 + k // 9 + h) % 4 == b, scan=True),
    "permutation": aj.Permutation(np.random.default_rng(0).permutation(37) // 9 * 9),
    "not": ~aj.Causal(3),
    "ones": aj.Dilated(1),
}


@pytest.mark.parametrize("blocks", BLOCKS, ids=lambda b: f"{b[0]}x{b[1]}")
@pytest.mark.parametrize("mask", SHARP.values(), ids=SHARP)
def test_nothing_is_called_partial_that_is_not(mask, blocks):
    shape = Shape(batch=(2,), T=37, S=37 if isinstance(mask, aj.Permutation) else 53, N=4, K=2)
    visible = mask.to_array(shape.T, shape.S, batch=shape.batch, heads=shape.N)
    got = build(mask, shape, blocks).kinds
    np.testing.assert_array_equal(*np.broadcast_arrays(got, classified(np.asarray(visible), *blocks)))


LEAVES = [aj.Causal(), aj.Window(4, 9), aj.Chunked(7), aj.Prefix(9), aj.Dilated(3), aj.Segments(jnp.arange(23) // 5)]
LEAVES += [
    aj.Lengths(jnp.array([5, 20])),
    aj.Where(lambda b, h, q, k: q * k % 7 > b),
    aj.Causal(jnp.array([[1], [-9]])),
]
LEAVES += [aj.Dense(np.random.default_rng(0).random((23, 23)) < 0.5), aj.Permutation(np.arange(23)[::-1].copy())]


def random_mask(rng, depth):
    if depth == 0:
        return LEAVES[rng.integers(len(LEAVES))]
    a, b = random_mask(rng, depth - 1), random_mask(rng, depth - 1)
    return [a & b, a | b, ~a, a & ~b][rng.integers(4)]


@pytest.mark.parametrize("seed", range(12))
def test_combinations_follow_three_valued_logic(seed):
    """and is the minimum, or the maximum, not 2 - x; what comes out is true of the pairs."""
    rng = np.random.default_rng(seed)
    shape, blocks = Shape(batch=(2, 2), T=23, S=23, N=3, K=3), [(4, 4), (5, 3), (7, 23)][seed % 3]
    a, b = random_mask(rng, 2), random_mask(rng, 1)
    kinds = lambda mask: np.broadcast_to(
        build(mask, shape, blocks).kinds, (2, 2, 3, -(-23 // blocks[0]), -(-23 // blocks[1]))
    )
    np.testing.assert_array_equal(kinds(a & b), np.minimum(kinds(a), kinds(b)))
    np.testing.assert_array_equal(kinds(a | b), np.maximum(kinds(a), kinds(b)))
    np.testing.assert_array_equal(kinds(~a), 2 - kinds(a))
    visible = (a & b).to_array(23, 23, batch=(2, 2), heads=3)
    assert_conservative(kinds(a & b), np.broadcast_to(visible, (2, 2, 3, 23, 23)), blocks)


def test_counts():
    """A million keys are classified from the ends of their blocks: n^2 / 2 of the n^2 blocks are empty."""
    n = 2**20 // 1024
    counts = aj.BlockMap.build(aj.Causal(), 2**20, 2**20, block_q=1024, block_k=1024).counts()
    assert counts == {"empty": n * (n - 1) // 2, "partial": n, "full": n * (n - 1) // 2}
    window = aj.BlockMap.build(aj.Window(511, 0), 2**14, 2**14, block_q=512, block_k=512).counts()
    assert window == {"empty": 32 * 32 - 63, "partial": 63, "full": 0}
    batched = aj.BlockMap.build(aj.Lengths(jnp.array([4, 8])), 8, 8, batch=(2,), block_q=4, block_k=4)
    assert batched.counts() == {"empty": 2, "partial": 0, "full": 6}
    assert batched.kinds.shape == (2, 1, 2, 2) and batched.kinds.dtype == jnp.int8


def test_scanning_is_linear_in_memory():
    """Looking at 2^28 pairs needs memory for some blocks of them."""
    mask = aj.Where(lambda b, h, q, k: (q // 700 + k // 900) % 4 == 0, scan=True)
    program = jax.jit(lambda: aj.BlockMap.build(mask, 2**14, 2**14).kinds).lower().compile()
    assert program.memory_analysis().temp_size_in_bytes <= 4 * 2**20


def test_what_is_known_is_not_computed():
    """Maps of masks without arrays are constants of the program: nothing is sorted when it runs."""
    q = jnp.zeros((64, 2, 8))
    config = xla.Config(block_q=16, block_k=16)
    text = lambda mask: jax.jit(lambda q: aj.attention(q, q, q, mask=mask, config=config)).lower(q).as_text()
    assert "stablehlo.sort" not in text(aj.Causal() & aj.Window(9, 9) | ~aj.Chunked(20))
    assert "stablehlo.sort" in text(aj.Causal() & aj.Segments(jnp.zeros(64, jnp.int32)))


CONFIG = xla.Config(block_q=5, block_k=7)


def answers(mask, shape, *, with_map, config):
    """A function of (x, d) -> out, lse and the gradients by x, with or without a map that was built before."""

    def solve(x, d, block_map):
        def loss(x):
            options = {"block_map": block_map} if with_map else {"config": config}
            options |= {"implementation": "xla", "return_lse": True}
            out, lse = aj.attention(x["q"], x["k"], x["v"], mask=mask.mask(d), **options)
            return jnp.sin(out).sum() + jnp.where(lse == -jnp.inf, 0, lse).sum(), (out, lse)

        return jax.value_and_grad(loss, has_aux=True)(x)

    return solve


def arrays(shape, seed=0):
    rng = np.random.default_rng(seed)
    sizes = {"q": (*shape.batch, shape.T, shape.N, 3), "k": (*shape.batch, shape.S, shape.K, 3)}
    return {name: jnp.asarray(rng.normal(size=sizes[at]), jnp.float32) for name, at in zip("qkv", "qkk", strict=True)}


@pytest.mark.parametrize("mask", [m for m in MASKS if m.name not in ("full", "permutation")], ids=repr)
def test_a_map_built_before_changes_nothing(mask):
    """To the bit: values and gradients with `block_map` are those with the same blocks and no map."""
    shape, d, _ = cased(mask)
    x, block_map = arrays(shape), build(mask.mask(d), shape, (5, 7))
    got, want = (jit(answers(mask, shape, with_map=w, config=CONFIG))(x, d, block_map) for w in (True, False))
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_one_map_for_many_layers():
    """Built outside of a scan and of a gradient of second order, passed as an argument of jit."""
    mask = aj.Segments(jnp.arange(40) // 9) & aj.Causal()
    block_map = aj.BlockMap.build(mask, 40, 40, block_q=8, block_k=8)
    h = arrays(Shape(batch=(), T=40, S=40, N=2, K=2))["q"]

    def product(options, h):
        layer = lambda h, _: (h + aj.attention(h, h, h, mask=mask, implementation="xla", **options), None)
        loss = lambda h: jnp.sin(jax.lax.scan(layer, h, None, length=2)[0]).sum()
        return jax.jvp(jax.grad(loss), (h,), (h,))

    got = jit(lambda m, h: product({"block_map": m}, h))(block_map, h)
    want = jit(lambda h: product({"config": xla.Config(block_q=8, block_k=8)}, h))(h)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)


def test_maps_under_vmap():
    """Maps are built for, and used by, each example: offsets with a mapped axis, keys shared."""
    offsets = jnp.array([-9, 0, 4, 30])
    x = arrays(Shape(batch=(4,), T=37, S=53, N=4, K=2))
    made = lambda offset: aj.BlockMap.build(aj.Causal(offset), 37, 53, block_q=5, block_k=7)
    kinds = jax.vmap(made)(offsets).kinds
    np.testing.assert_array_equal(
        kinds[:, 0], aj.BlockMap.build(aj.Causal(offsets), 37, 53, batch=(4,), block_q=5, block_k=7).kinds[:, 0]
    )

    def attend(q, offset, **options):
        return aj.attention(q, x["k"][0], x["v"][0], mask=aj.Causal(offset), **options)

    got = jit(jax.vmap(lambda q, o: attend(q, o, block_map=made(o))))(x["q"], offsets)
    want = jnp.stack([attend(q, o, implementation="reference") for q, o in zip(x["q"], offsets, strict=True)])
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("blocks", [(4, 6), (16, 16)])
def test_a_map_by_hand_says_more_than_its_mask(implementation, blocks):
    """Empty blocks are never seen, full ones whole, and in partial ones the mask decides: on every implementation."""
    shape = Shape(batch=(2,), T=20, S=24, N=4, K=2)
    x, rng, (block_q, block_k) = arrays(shape), np.random.default_rng(0), blocks
    kinds = jnp.asarray(rng.integers(0, 3, (2, 4, -(-20 // block_q), -(-24 // block_k))))
    mask = aj.Dense(jnp.asarray(rng.random((2, 4, 20, 24)) < 0.5))
    wide = jnp.repeat(jnp.repeat(kinds, block_q, -2), block_k, -1)[..., :20, :24]
    meant = aj.Dense(jnp.where(wide == EMPTY, False, jnp.where(wide == FULL, True, mask.array)))
    call = lambda x, **options: jnp.sin(aj.attention(x["q"], x["k"], x["v"], **options)).sum()
    options = dict(mask=mask, block_map=aj.BlockMap(kinds, 20, 24, *blocks), implementation=implementation)
    got = jit(jax.value_and_grad(functools.partial(call, **options)))(x)
    want = jit(jax.value_and_grad(functools.partial(call, mask=meant, implementation="reference")))(x)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_a_map_of_another_mask_is_one_by_hand(rng):
    q, k, v = jnp.asarray(rng.normal(size=(3, 16, 2, 4)), jnp.float32)
    block_map = aj.BlockMap.build(aj.Causal(), 16, 16, block_q=8, block_k=8)
    assert block_map.built_from == jax.tree.structure(aj.Causal())
    got = aj.attention(q, k, v, mask=aj.Window(3, 3), block_map=block_map)
    both = aj.Where(lambda b, h, q, k: ((q < 8) & (k < 8)) | ((q >= 8) & (k >= 8))) & aj.Window(3, 3)
    want = aj.attention(q, k, v, mask=both | aj.Where(lambda b, h, q, k: (q >= 8) & (k < 8)))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_a_map_without_what_its_mask_reads_is_refused():
    """A function of the head, or of the batch entry, that was scanned for one of them only."""
    q = jnp.zeros((2, 16, 2, 4))
    call = lambda mask, **options: aj.attention(
        q, q, q, mask=mask, block_map=aj.BlockMap.build(mask, 16, 16, block_q=8, block_k=8, **options)
    )
    by_head = aj.Where(lambda b, h, q, k: (q // 8 == k // 8) == (h == 0), scan=True)
    by_entry = aj.Causal() & ~aj.Where(lambda b, h, q, k: q % 2 == b, scan=True)
    with pytest.raises(ValueError, match="block_map was built without heads, .* heads=2"):
        call(by_head)
    with pytest.raises(ValueError, match=r"block_map was built without batch, .* batch=\[2\]"):
        call(by_entry)
    call(by_head, heads=2), call(by_entry, batch=(2,))
    with pytest.raises(ValueError, match="Dense.array is bool"):
        call(aj.Dense(jnp.ones((2, 16, 16), bool)))


BY_HAND = {
    "shape": (lambda: aj.BlockMap(jnp.ones((1, 2, 3), int), 16, 16, 8, 8), ValueError, r"kinds must be .* 2, 2\]"),
    "rank": (lambda: aj.BlockMap(jnp.ones((2, 2), int), 16, 16, 8, 8), ValueError, "kinds must be"),
    "negative": (lambda: aj.BlockMap(-jnp.ones((1, 2, 2), int), 16, 16, 8, 8), ValueError, "0, 1 or 2, got -1"),
    "three": (lambda: aj.BlockMap(np.full((1, 2, 2), 3), 16, 16, 8, 8), ValueError, "0, 1 or 2, got 3"),
    "floats": (lambda: aj.BlockMap(jnp.ones((1, 2, 2)), 16, 16, 8, 8), TypeError, "kinds must be an array of int"),
    "no_block": (lambda: aj.BlockMap(jnp.ones((1, 2, 2), int), 16, 16, 0, 8), ValueError, "block_q must be"),
    "length": (lambda: aj.BlockMap(jnp.ones((1, 2, 2), int), -16, 16, 8, 8), ValueError, "query_length must be"),
}


@pytest.mark.parametrize("make, error, text", BY_HAND.values(), ids=BY_HAND)
def test_a_map_by_hand_is_checked(make, error, text):
    with pytest.raises(error, match=f"BlockMap: .*{text}"):
        make()


SEEN = {"score": set(), "mask": set()}  # tiles that were computed, and those whose mask was asked for


def look(what, tile):
    """Notes, when the program runs, that this tile is computed; gives 0, which is not known when it is compiled."""

    def note(*at):
        SEEN[what].add(tuple(int(i) for i in at))
        return np.float32(0)

    at = (tile.b.reshape(-1)[0], tile.h.reshape(-1)[0], tile.q.reshape(-1)[0], tile.k.reshape(-1)[0])
    return jax.pure_callback(note, jax.ShapeDtypeStruct((), jnp.float32), *at)


class Look(aj.Score):
    """A score that changes nothing but notes which tiles are computed."""

    def evaluate(self, logits, tile):
        return logits + look("score", tile)


class LookAt(aj.Mask):
    """A mask that notes for which tiles it is asked."""

    mask: aj.Mask

    def evaluate(self, tile):
        return self.mask.evaluate(tile) & (look("mask", tile) == 0)

    def blocks(self, grid):
        return self.mask.blocks(grid)


WORK = {
    "causal": aj.Causal(),
    "window": aj.Window(7, 3),
    "chunked": aj.Chunked(16),
    "segments": aj.Segments(jnp.asarray([np.arange(32) // 12, np.arange(32) // 20])),
    "lengths": aj.Lengths(jnp.array([5, 32])),
    "heads": aj.Dense(np.arange(32) // 8 != np.arange(4)[:, None, None]),
    "scanned": aj.Where(lambda b, h, q, k: (q // 8 + k // 8) % 3 == b, scan=True),
    "nothing": aj.Causal(-100),
}
PASSES = {
    "forward": lambda f, x: f(x),
    "backward": lambda f, x: jax.vjp(lambda x: f(x), x)[1](jnp.ones((2, 32, 4, 3))),
    "tangent": lambda f, x: jax.jvp(f, (x,), (x,))[1],
    "second_order": lambda f, x: jax.jvp(jax.grad(lambda x: jnp.sin(f(x)).sum()), (x,), (x,))[1],
}


@pytest.mark.parametrize(
    "mask, passed",
    [
        pytest.param(mask, passed, id=f"{name}-{of}")
        for name, mask in WORK.items()
        for of, passed in PASSES.items()
        if of != "second_order" or name in ("segments", "heads")  # takes long to compile
    ],
)
def test_only_blocks_that_are_not_empty_are_computed(mask, passed):
    """Seen from inside of the running program: these tiles and no others, and only partial ones ask the mask."""
    shape = Shape(batch=(2,), T=32, S=32, N=4, K=2)
    x = arrays(shape)
    kinds = np.broadcast_to(build(mask, shape, (8, 8)).kinds, (2, 4, 4, 4)).reshape(2, 2, 2, 4, 4)
    f = lambda x: aj.attention(
        x["q"], x["k"], x["v"], mask=LookAt(mask), score=Look(), config=xla.Config(8, 8, lanes=1)
    )
    SEEN["score"].clear(), SEEN["mask"].clear()
    jax.block_until_ready(jit(functools.partial(passed, f))(x))
    jax.effects_barrier()
    at = lambda chosen: {(b, 2 * g, 8 * i, 8 * j) for b, g, i, j in np.argwhere(chosen).tolist()}
    assert SEEN["score"] == at((kinds != EMPTY).any(2))
    assert SEEN["mask"] == at((kinds != EMPTY).any(2) & ~(kinds == FULL).all(2))
