"""What masks say when looked at: arrays, density, combination, pytrees. How attention uses them is not here."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import MASKS, SCORES, VARIANTS
from oracle import Index, Shape
from problems import Case, draw, problem

import attnjax as aj

SHAPE = Shape()
TABLE = [mask for mask in (*MASKS, *VARIANTS) if mask.name not in ("full", "dense_bare")]
every_mask = pytest.mark.parametrize("mask", TABLE, ids=repr)


def both(mask, shape=SHAPE):
    """The drawn arrays and the rule's booleans [*B, N, T, S]."""
    case = Case(mask, SCORES[0], shape)
    d = draw(case, "float32").d
    sizes = (*case.shape.batch, case.shape.N, case.shape.T, case.shape.S)
    return case.shape, d, np.asarray(problem(case, d).visible).reshape(sizes)


@every_mask
@pytest.mark.parametrize("shape", [Shape(), Shape(batch=(2, 3), T=11, S=7)], ids=["one_batch_axis", "two"])
def test_to_array_is_the_rule(mask, shape):
    shape, d, want = both(mask, shape)
    got = mask.mask(d).to_array(shape.T, shape.S, batch=shape.batch, heads=shape.N)
    assert got.dtype == jnp.bool_
    np.testing.assert_array_equal(np.broadcast_to(got, want.shape), want)


@every_mask
def test_to_array_with_traced_leaves(mask):
    shape, d, want = both(mask)
    got = jax.jit(lambda d: mask.mask(d).to_array(shape.T, shape.S, batch=shape.batch, heads=shape.N))(d)
    np.testing.assert_array_equal(np.broadcast_to(got, want.shape), want)


@every_mask
def test_density_is_the_share_of_pairs(mask):
    shape, d, want = both(mask)
    got = mask.mask(d).density(shape.T, shape.S, batch=shape.batch, heads=shape.N)
    assert isinstance(got, float)
    assert got == pytest.approx(want.mean(), rel=1e-6)


@every_mask
def test_a_mask_is_a_pytree(mask):
    """Leaves come back in place, survive tree.map, and the structure is hashable and equal to that of a twin."""
    shape, d, _ = both(mask)
    one, twin = mask.mask(d), mask.mask(d)
    leaves, tree = jax.tree.flatten(one)
    again = jax.tree.unflatten(tree, leaves)
    look = lambda m: np.asarray(m.to_array(shape.T, shape.S, batch=shape.batch, heads=shape.N))
    np.testing.assert_array_equal(look(again), look(one))
    np.testing.assert_array_equal(look(jax.tree.map(jnp.asarray, one)), look(one))
    assert jax.tree.structure(twin) == tree and hash(jax.tree.structure(twin)) == hash(tree)
    assert all(isinstance(leaf, (jax.Array, np.ndarray)) for leaf in leaves)
    assert len(leaves) >= len(d)


@every_mask
def test_a_mask_is_frozen_and_prints_itself(mask):
    one = mask.mask(both(mask)[1])
    field = dataclasses.fields(one)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(one, field, 1)
    text = repr(one)
    assert "object at 0x" not in text and "Traced" not in text and len(text) < 200
    kinds = {"And": "&", "Or": "|", "Not": "~"}
    assert kinds.get(type(one).__name__, type(one).__name__) in text


@pytest.mark.parametrize(
    "mask, shape",
    [
        (aj.Causal(), (5, 7)),
        (aj.Causal(jnp.int32(2)), (5, 7)),
        (aj.Causal(jnp.array([1, 2, 3])), (3, 1, 5, 7)),
        (aj.Causal(jnp.zeros((2, 3), jnp.int32)), (2, 3, 1, 5, 7)),
        (aj.Segments(jnp.zeros(5, jnp.int32), jnp.zeros(7, jnp.int32)), (5, 7)),
        (aj.Segments(jnp.zeros((2, 5), jnp.int32), jnp.zeros((2, 7), jnp.int32)), (2, 1, 5, 7)),
        (aj.Dense(jnp.ones((5, 7), bool)), (5, 7)),
        (aj.Dense(jnp.ones((4, 5, 7), bool)), (4, 5, 7)),
        (aj.Dense(jnp.ones((2, 1, 1, 7), bool)), (2, 1, 5, 7)),
        (aj.Lengths(jnp.array([1, 2])) & aj.Dense(jnp.ones((4, 5, 7), bool)), (2, 4, 5, 7)),
        (~aj.Window(1, jnp.array([1, 2])), (2, 1, 5, 7)),
    ],
    ids=repr,
)
def test_the_shape_tells_which_axes_matter(mask, shape):
    """[T, S] when no leaf has batch or head axes, else [*B, N or 1, T, S]."""
    assert mask.to_array(5, 7).shape == shape


SMALL = {
    "full": [[1, 1, 1], [1, 1, 1]],
    "causal": [[1, 0, 0], [1, 1, 0]],
    "causal_end": [[1, 1, 0], [1, 1, 1]],
    "window": [[1, 1, 0], [0, 1, 1]],
    "chunked": [[1, 1, 0], [1, 1, 0]],
    "strict": [[0, 1, 1], [0, 0, 1], [0, 0, 0]],
}


@pytest.mark.parametrize(
    "mask, want",
    [
        (aj.Window(), "full"),
        (aj.Causal(), "causal"),
        (aj.Causal.aligned_end(), "causal_end"),
        (aj.Window(0, 1), "window"),
        (aj.Chunked(2), "chunked"),
    ],
    ids=repr,
)
def test_masks_small_enough_to_read(mask, want):
    assert mask.to_array(2, 3).astype(int).tolist() == SMALL[want]


def test_a_permutation_small_enough_to_read():
    """The last token comes first in the order: it sees nobody before it, everyone sees it."""
    assert aj.Permutation(jnp.array([2, 1, 0]), strict=True).to_array(3, 3).astype(int).tolist() == SMALL["strict"]


@pytest.mark.parametrize("a", [aj.Causal(1), aj.Dilated(2), aj.Lengths(jnp.array([2, 5]))], ids=repr)
@pytest.mark.parametrize("b", [aj.Window(1, 2), aj.Dense(jnp.eye(5, 7, dtype=bool)), aj.Prefix(3)], ids=repr)
def test_and_or_not_are_those_of_booleans(a, b):
    array = lambda mask: np.asarray(mask.to_array(5, 7))
    np.testing.assert_array_equal(array(a & b), array(a) & array(b))
    np.testing.assert_array_equal(array(a | b), array(a) | array(b))
    np.testing.assert_array_equal(array(~a), ~array(a))
    np.testing.assert_array_equal(array(~(a & b)), array(~a | ~b))
    np.testing.assert_array_equal(array(~~a), array(a))


def test_a_boolean_array_joins_as_dense():
    array = jnp.eye(5, 7, dtype=bool)
    want = np.asarray(aj.Causal().to_array(5, 7)) & np.asarray(array)
    np.testing.assert_array_equal((aj.Causal() & array).to_array(5, 7), want)


def test_where_sees_every_index():
    """The predicate gets the batch, head, query and key index, as integers that count from 0."""
    mask = aj.Where(lambda b, h, q, k: (b * 8 + h * 4 + q * 2 + k) % 3 == 0)
    b, h, q, k = np.indices((3, 2, 2, 2))
    want = (b * 8 + h * 4 + q * 2 + k) % 3 == 0
    np.testing.assert_array_equal(mask.to_array(2, 2, batch=(3,), heads=2), want)


def test_where_holds_what_its_predicate_captures():
    """Captured arrays are leaves: the same structure with other numbers is another mask, without a new trace."""
    build = lambda table: aj.Where(lambda b, h, q, k: table[q] > table[k])
    first, second = build(jnp.array([1, 2, 3])), build(jnp.array([3, 2, 1]))
    assert jax.tree.structure(first) == jax.tree.structure(second)
    np.testing.assert_array_equal(first.to_array(3, 3), np.tril(np.ones((3, 3)), -1))
    np.testing.assert_array_equal(second.to_array(3, 3), np.triu(np.ones((3, 3)), 1))


def test_to_array_under_vmap():
    """A mask with a batched leaf, mapped over that axis, gives what the batch gives."""
    offsets = jnp.array([-1, 0, 4])
    got = jax.vmap(lambda mask: mask.to_array(5, 7))(aj.Causal(offsets))
    np.testing.assert_array_equal(got, aj.Causal(offsets).to_array(5, 7)[:, 0])
    np.testing.assert_array_equal(
        got, Index(Shape(batch=(3,), T=5, S=7)).k <= np.arange(5)[:, None] + np.array([-1, 0, 4])[:, None, None]
    )
