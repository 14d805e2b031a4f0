"""Arrays of masks and scores that modules hold: variables that are saved, moved and updated, and never trained."""

import copy
import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import attnjax as aj
from attnjax.nn import Constant, DecoderBlock, EncoderBlock, MultiHeadAttention, Stack

D, N, T = 16, 4, 6
close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6)
SEEN = np.tril(np.ones((T, T), bool)) | (np.arange(T) == 2)


def holding():
    """Every kind of place in which a mask or score may hold an array."""
    table = jax.random.normal(jax.random.key(1), (8, N))
    shift = jnp.arange(3)
    return {
        "alibi": dict(score=aj.ALiBi.for_heads(N)),
        "bias": dict(score=(aj.SoftCap(jnp.float32(3.0)), aj.Bias(jnp.ones((N, T, T)).at[0, 1].set(3.0)))),
        "relative": dict(score=aj.RelativeBias(table)),
        "function": dict(score=aj.ScoreFn(lambda score, b, h, q, k: score * table[k % 8, h])),
        "booleans": dict(mask=jnp.asarray(SEEN)),
        "numpy": dict(mask=aj.Dense(SEEN)),
        "segments": dict(mask=aj.Segments(jnp.array([0, 0, 1, 1, 1, 2])) & aj.Causal()),
        "nested": dict(mask=~(aj.Causal(jnp.array(-1)) | aj.Prefix(jnp.array(1)))),
        "where": dict(mask=aj.Where(lambda b, h, q, k: q + shift[2] >= k)),
        "scale": dict(scale=jnp.float32(0.3)),
    }


def attend(seed=0, **options):
    return MultiHeadAttention(D, N, **options, rngs=nnx.Rngs(seed))


def x_of(seed=3):
    return jax.random.normal(jax.random.key(seed), (2, T, D))


@pytest.mark.parametrize("name", holding())
def test_transforms_of_modules(name):
    options, x = holding()[name], x_of()
    layer, free = attend(**options), attend()
    expected = free(x, mask=options.get("mask"), score=options.get("score"))
    if name == "scale":
        expected = attend(scale=0.3)(x)
    close(layer(x), expected)
    constants = jax.tree.leaves(nnx.state(layer, Constant))
    assert constants and all(isinstance(leaf, jax.Array) for leaf in constants)
    assert len(jax.tree.leaves(nnx.state(layer, nnx.Param))) == 8
    assert len(jax.tree.leaves(nnx.state(layer))) == 8 + len(constants)
    graph, state = nnx.split(layer)
    assert graph == nnx.graphdef(nnx.clone(layer)) and hash(graph) is not None
    close(jax.jit(lambda state, x: nnx.merge(graph, state)(x))(state, x), expected)
    close(jax.vmap(lambda x: nnx.merge(graph, state)(x))(x), expected)
    nnx.update(layer, nnx.state(layer))
    close(nnx.clone(layer)(x), expected)
    shapes = nnx.state(nnx.eval_shape(lambda: attend(**options)))
    assert jax.tree.map(jnp.shape, nnx.to_pure_dict(shapes)) == jax.tree.map(jnp.shape, nnx.to_pure_dict(state))
    gradient = nnx.grad(lambda layer: jnp.sin(layer(x)).sum())(layer)
    assert len(jax.tree.leaves(gradient)) == 8
    # Donation: twice, for what came back is what goes in; the user's own arrays stay.
    run = nnx.jit(lambda layer, x: layer(x), donate_argnums=0)
    close(run(layer, x), expected)
    close(run(layer, x), expected)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(options) if isinstance(leaf, jax.Array))


def test_modules_are_copied_and_pickled_with_their_constants():
    x = x_of()
    for options in (holding()["alibi"], holding()["booleans"], holding()["nested"]):
        layer = attend(**options)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            close(other(x), layer(x))
            assert "Constant" in repr(other)


@pytest.mark.parametrize("scan", [False, True])
def test_one_score_for_all_layers_is_trained_by_none(scan):
    """A step that donates model and optimizer, with one score and one mask made outside for all layers."""
    score, mask, x = aj.ALiBi.for_heads(N), jnp.asarray(SEEN), x_of()
    make = lambda rngs: EncoderBlock(D, N, 24, dropout=0.5, attention=dict(score=score, mask=mask), rngs=rngs)
    stack = Stack(make, 2, scan=scan, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(stack, optax.sgd(0.1), wrt=nnx.Param)
    kept = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(stack, Constant)))
    assert [leaf.shape for leaf in jax.tree.leaves(kept)] == (
        [(2, T, T), (2, N)] if scan else [(T, T), (N,), (T, T), (N,)]
    )

    @functools.partial(nnx.jit, donate_argnums=(0, 1))
    def step(stack, optimizer, x):
        loss, gradient = nnx.value_and_grad(lambda stack: (stack(x) ** 2).mean())(stack)
        optimizer.update(stack, gradient)
        return loss

    losses = [float(step(stack, optimizer, x)) for _ in range(3)]
    assert losses[2] < losses[0]
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(stack, Constant)), kept)
    assert mask.sum() == SEEN.sum() and score.slopes.shape == (N,)
    close(stack.eval() or stack(x), nnx.jit(lambda stack: stack(x))(stack))


def test_a_scan_does_not_hand_on_its_constants():
    """The masks of all layers, which do not change, are no result of the loop."""
    mask = jnp.ones((T, T), bool)
    make = lambda rngs: EncoderBlock(D, N, 24, attention=dict(mask=mask), rngs=rngs)
    stack, x = Stack(make, 2, scan=True, rngs=nnx.Rngs(0)), x_of()
    graph, state = nnx.split(stack)
    program = jax.make_jaxpr(lambda state: nnx.merge(graph, state)(x))(state).jaxpr
    (scan,) = [equation for equation in program.eqns if equation.primitive.name == "scan"]
    assert [v.aval.dtype for v in scan.outvars] == [jnp.float32]


def test_a_score_in_a_param_is_trained():
    """`nnx.Param(score)` of floats: gradients and the optimizer reach it, alone or among others, in a stack too."""
    x, slopes = x_of(), np.full(N, 0.5, np.float32)
    learned = nnx.Param(aj.ALiBi(jnp.asarray(slopes), offset=jnp.array(2)), note="mine")
    layer = attend(score=(aj.SoftCap(jnp.float32(4.0)), learned))
    got = nnx.grad(lambda layer: jnp.sin(layer(x)).sum())(layer)["score"][1]["slopes"]
    free = attend()
    score = lambda slopes: (aj.SoftCap(4.0), aj.ALiBi(slopes, offset=2))
    close(got[...], jax.grad(lambda slopes: jnp.sin(free(x, score=score(slopes))).sum())(jnp.asarray(slopes)))
    assert isinstance(layer.score[1].slopes, nnx.Param) and layer.score[1].slopes.note == "mine"
    assert type(layer.score[1].offset) is Constant and type(layer.score[0].cap) is Constant
    optimizer = nnx.Optimizer(layer, optax.sgd(0.1), wrt=nnx.Param)
    optimizer.update(layer, nnx.grad(lambda layer: jnp.sin(layer(x)).sum())(layer))
    assert not np.allclose(layer.score[1].slopes[...], slopes) and learned.get_value().slopes[0] == 0.5
    scale = attend(scale=nnx.Param(jnp.float32(0.3)))
    assert jnp.abs(nnx.grad(lambda layer: jnp.sin(layer(x)).sum())(scale)["scale"][...]) > 0
    with pytest.raises(TypeError, match="score must be an attnjax Score or a tuple of them, got"):
        attend(score=nnx.Param(jnp.ones(N)))


def test_integers_of_numpy_are_known_under_jit():
    """So that a cache is taken, which needs to know that a mask is causal."""
    attention = dict(mask=aj.Causal(np.int64(0)) & aj.Window(np.int32(3), np.int16(0)))
    block, x = DecoderBlock(D, N, 24, attention=attention, rngs=nnx.Rngs(0)), x_of()
    cache = block.create_cache(2, 9)
    assert cache.window == 3 and nnx.state(block, Constant) == nnx.State({})
    close(nnx.jit(lambda block, x, cache: block(x, cache=cache)[0])(block, x, cache), block(x))
