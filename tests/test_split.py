"""Masks and scores as kernels on tiles run them, pieces and all, against the arrays that they stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import MASKS, SCORE_VARIANTS, SCORES, VARIANTS, nothing
from oracle import Shape
from problems import Case, draw, problem

import attnjax as aj
from attnjax.attention import build
from attnjax.core.residual import ELEMENTWISE, NotSplittable
from attnjax.core.split import Split, widened
from attnjax.core.tiles import Tile, tile_form
from attnjax.core.visits import visits
from attnjax.kernels import mosaic_tpu, triton

SHAPE = Shape(batch=(2, 3))
TOGETHER = ("function_distance",)  # reads an array at a distance: what no kernel can do on its tiles


def built(case, **options):
    """The problem and operands of a case, and what was drawn for it."""
    inputs = draw(case, "float32")
    x = inputs.x
    dropout = aj.Dropout(*case.score.dropout) if case.score.dropout else None
    given = dict(mask=case.mask.mask(inputs.d), score=case.score.score(x), sinks=x.get("sinks"), dropout=dropout)
    return *build(x["query"], x["key"], x["value"], **(given | options)), inputs


def tiles_of(split, span_q, span_k):
    """Tiles of these queries and keys, for every batch entry and head, their pieces cut out as a kernel would."""
    sizes = split.problem.sizes
    q, k = (np.arange(*span, dtype=np.int32) for span in (span_q, span_k))
    for b in range(int(np.prod(sizes.batch))):
        for h in range(sizes.heads):
            values = []
            for piece, array in zip(split.pieces, split.arrays, strict=True):
                value = array[piece.entry(sizes.batch, b), h if piece.heads else 0]
                if piece.by_distance:
                    value = value[0][k[None] - q[:, None] + sizes.query_length - 1]
                else:
                    value = value[q] if piece.queries else value
                    value = value[:, k] if piece.keys else value
                values.append(value)
            yield b, h, split.tile(q[:, None], k[None], np.int32(b), np.int32(h), values)


@pytest.mark.parametrize("mask", [*MASKS, *VARIANTS], ids=repr)
def test_masks(mask):
    case = Case(mask, SCORES[0], SHAPE)
    given, operands, inputs = built(case)
    visible = np.asarray(problem(case, inputs.d).visible)
    T, S = case.shape.T, case.shape.S
    for b, h, tile in tiles_of(Split(given, operands), (3, T), (2, S - 1)):
        seen = tile.visible()
        seen = True if seen is None else seen
        np.testing.assert_array_equal(np.broadcast_to(seen, (T - 3, S - 3)), visible[b, h, 3:, 2:-1])


@pytest.mark.parametrize("score", [*SCORES, *SCORE_VARIANTS], ids=repr)
def test_scores(score):
    """Against the same scores on one tile of the tiled code, which the conformance table checks."""
    given, operands, _ = built(Case(MASKS[0], score, SHAPE))
    if score.name in TOGETHER:
        with pytest.raises(NotSplittable, match="dynamic_slice of query and key together"):
            Split(given, operands)
        return
    sizes, program, n = given.sizes, given.program, len(SHAPE.batch)
    whole = Tile(sizes, sizes.batch_index(), sizes.batch, (0, sizes.key_heads), (0, SHAPE.T), (0, SHAPE.S))
    raw = jnp.asarray(np.random.default_rng(0).normal(size=whole.shape), jnp.float32)
    leaves = [tile_form(operands[i], program.axes[i], n, sizes.group) for i in program.score_positions()]
    want = program.modify(raw, whole, leaves).reshape(-1, SHAPE.N, SHAPE.T, SHAPE.S)
    raw = raw.reshape(want.shape)
    for b, h, tile in tiles_of(Split(given, operands), (0, SHAPE.T), (0, SHAPE.S)):
        np.testing.assert_array_equal(tile.modify(raw[b, h]), want[b, h])


@pytest.mark.parametrize(
    "score",
    [s for s in (*SCORES, *SCORE_VARIANTS) if s.name not in (*TOGETHER, "sinks") and s.operands is not nothing],
    ids=repr,
)
def test_gradients_of_pieces_become_those_of_operands(score):
    """Summed over the tiles of all batch entries and heads, for operands with and without those axes."""
    given, operands, _ = built(Case(MASKS[0], score, SHAPE))
    sizes, program, n = given.sizes, given.program, len(SHAPE.batch)
    moved = [i for i in program.score_positions() if i in given.differentiable]
    rng = np.random.default_rng(1)
    whole = Tile(sizes, sizes.batch_index(), sizes.batch, (0, sizes.key_heads), (0, SHAPE.T), (0, SHAPE.S))
    raw, weights = (jnp.asarray(rng.normal(size=whole.shape), jnp.float32) for _ in range(2))

    def loss(*some):
        own = list(operands)
        for i, x in zip(moved, some, strict=True):
            own[i] = x
        leaves = [tile_form(own[i], program.axes[i], n, sizes.group) for i in program.score_positions()]
        return (program.modify(raw, whole, leaves) * weights).sum()

    want = jax.grad(loss, argnums=tuple(range(len(moved))))(*(operands[i] for i in moved))
    split = Split(given, widened(operands, {i: operands[i].shape for i in moved}, n))
    pieces = split.wanted(moved)
    raw, weights = (x.reshape(-1, SHAPE.N, SHAPE.T, SHAPE.S) for x in (raw, weights))
    gradients = {p: np.zeros((len(raw), SHAPE.N, *split.arrays[p].shape[2:]), np.float32) for p in pieces}
    for b, h, tile in tiles_of(split, (0, SHAPE.T), (0, SHAPE.S)):
        for p, d in zip(pieces, tile.pull(raw[b, h], weights[b, h], pieces)[1], strict=True):
            gradients[p][b, h] += _by_distance(d) if split.pieces[p].by_distance else d
    got = split.pulled({p: jnp.asarray(g) for p, g in gradients.items()}, moved)
    for i, g in zip(moved, want, strict=True):
        scale = float(jnp.abs(g).max())
        np.testing.assert_allclose(got[i], g, rtol=1e-4, atol=1e-4 * scale, err_msg=program.axes[i])


def _by_distance(tile):
    """The sums over the diagonals of a tile with all pairs."""
    t, s = tile.shape
    return np.array([np.trace(tile, d) for d in range(1 - t, s)])[None]


def test_a_batch_that_only_some_operands_have():
    """Entries are counted over the batch axes that an operand has."""
    keys = jnp.arange(3 * 1 * 1 * 5, dtype=jnp.float32).reshape(3, 1, 1, 5)
    q = jnp.zeros((2, 3, 4, 1, 8))
    k = jnp.zeros((2, 3, 5, 1, 8))
    split = Split(*build(q, k, k, score=aj.Bias(keys)))
    (piece,) = split.pieces
    assert [int(piece.entry((2, 3), b)) for b in range(6)] == [0, 1, 2, 0, 1, 2]
    assert split.arrays[0].shape == (3, 1, 1, 5)


@pytest.mark.parametrize("by_key", [False, True], ids=["by_query", "by_key"])
@pytest.mark.parametrize("mask", [*MASKS, *VARIANTS], ids=repr)
def test_visits(mask, by_key):
    """Every visible pair is visited, none in a full block is hidden, and no list names a block twice."""
    case = Case(mask, SCORES[0], SHAPE)
    given, operands, inputs = built(case)
    T, S, block_q, block_k = case.shape.T, case.shape.S, 8, 16
    found = visits(given, operands, block_q, block_k, by_key=by_key)
    visible = np.asarray(problem(case, inputs.d).visible)
    for b in range(6):
        for h in range(SHAPE.N):
            entry = int(found.entry(SHAPE.batch, b)), found.head(h)
            covered, full = np.zeros((T, S), int), np.zeros((T, S), bool)
            for row, (partial, count) in enumerate(np.asarray(found.counts)[entry]):
                for place in range(count):
                    i, j = row, int(found.blocks[(*entry, row, place)])
                    i, j = (j, i) if by_key else (i, j)
                    block = np.s_[i * block_q : (i + 1) * block_q, j * block_k : (j + 1) * block_k]
                    covered[block] += 1
                    full[block] |= place >= partial
                    if place >= partial:
                        assert full[block].shape == (block_q, block_k)
            assert covered.max(initial=0) <= 1
            assert not (visible[b, h] & (covered == 0)).any()
            assert visible[b, h][full].all()


def test_lists_of_known_masks_are_known():
    q = jnp.zeros((64, 2, 8))
    found = visits(*build(q, q, q, mask=aj.Causal()), 16, 16)
    assert isinstance(found.blocks, np.ndarray)
    assert found.counts.tolist() == [[[[1, 1], [1, 2], [1, 3], [1, 4]]]]
    assert found.blocks[0, 0].tolist() == [[0, 0, 0, 0], [1, 0, 0, 0], [2, 0, 1, 1], [3, 0, 1, 2]]
    assert found.longest == 4


def primitives(jaxpr):
    """The names of a program's operations, those of what it calls in place of the calls."""
    for equation in jaxpr.eqns:
        inner = [x for x in equation.params.values() if hasattr(x, "jaxpr")]
        yield from (name for x in inner for name in primitives(x.jaxpr))
        if not inner:
            yield equation.primitive.name


OF_TWO = set("add sub mul div rem max min pow atan2".split())
FLOATS = OF_TWO | set(
    "neg abs sign exp exp2 log log1p expm1 tanh logistic sqrt rsqrt cbrt square sin cos tan sinh cosh asin acos atan "
    "asinh acosh atanh erf erf_inv floor ceil round".split()
)
KERNELS_ON_TILES = {"Triton": (triton, "cuda"), "Mosaic": (mosaic_tpu, "tpu")}
on_tiles = pytest.mark.parametrize("compiler", KERNELS_ON_TILES)


@on_tiles
def test_what_tiles_may_run_the_compiler_has(compiler):
    """Every operation that is taken, and those of its derivative, stand in JAX's own table of what it can lower."""
    if compiler == "Triton":
        from jax._src.pallas.triton import lowering

        table = lowering.triton_lowering_rules
    else:
        from jax._src.pallas.mosaic import lowering

        table = next(rules for kind, rules in lowering.lowering_rules.items() if "tc" in str(kind).lower())
    known, lacks = {primitive.name for primitive in table}, KERNELS_ON_TILES[compiler][0].LACKS
    exists = {name for name in ELEMENTWISE if name in ("add_any", "stop_gradient") or hasattr(jax.lax, f"{name}_p")}
    assert lacks <= exists <= known | lacks
    for name in sorted(FLOATS - lacks):
        function, count = getattr(jax.lax, name), 2 if name in OF_TWO else 1
        made = jax.make_jaxpr(lambda c, *x, f=function: jax.vjp(f, *x)[1](c))(*[1.0] * (count + 1))
        assert set(primitives(made.jaxpr)) <= known, name


@on_tiles
def test_what_the_compiler_lacks_is_refused_by_name(compiler):
    """Where query and key meet; of one side alone it is computed outside. Then the tiled code runs."""
    kernel, platform = KERNELS_ON_TILES[compiler]
    x = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.float32)
    for name in kernel.LACKS:
        function = getattr(jax.lax, name)
        own, other = (dict(score=aj.ScoreFn(lambda s, b, h, q, k, f=f: s + f(s / 9))) for f in (function, jnp.tanh))
        choices = aj.explain(x, x, x, platform=platform, **own).choices
        assert choices["forward"].name == choices["backward"].name == "xla"
        reason = choices["forward"].reasons[kernel.__name__.rsplit(".", 1)[1]]
        assert reason == f"cannot run this mask or score on its tiles: {compiler} has no {name}"
        alone = aj.Where(lambda b, h, q, k, f=function: f(q / 1000) <= f(k / 1000))
        for taken in (other, {"mask": alone}):
            chosen = aj.explain(x, x, x, platform=platform, **taken).choices["forward"].name
            assert chosen == kernel.__name__.rsplit(".", 1)[1]
