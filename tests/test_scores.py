"""What scores do to logits, and the published rules behind the positional ones. Attention with scores is elsewhere."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import MASKS, SCORE_VARIANTS, SCORES, ScoreCase
from draws import normal
from oracle import Index, Shape, differentiate
from problems import IMPLEMENTATIONS, INTERPRETED, Case, draw, expect, solver

import attnjax as aj
from attnjax.attention import build
from attnjax.positions import alibi_slopes, relative_position_bucket

CASES = [*SCORES, *SCORE_VARIANTS]
SINGLE = [s for s in CASES if s.name not in ("none", "everything", "biases", "sinks", "dropout", "scale")]
every_single_score = pytest.mark.parametrize("score", SINGLE, ids=repr)


@pytest.mark.parametrize("heads", [*range(1, 18), 24, 32, 40, 71])
def test_alibi_slopes_are_the_papers(heads):
    np.testing.assert_allclose(alibi_slopes(heads), oracle.alibi_slopes(heads), rtol=1e-7)


def test_alibi_slopes_of_eight_heads():
    """The example of the paper: 1/2, 1/4, ... 1/256."""
    assert alibi_slopes(8).tolist() == [2.0**-n for n in range(1, 9)]
    np.testing.assert_array_equal(aj.ALiBi.for_heads(8).slopes, alibi_slopes(8))


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(
    "num_buckets, max_distance", [(32, 128), (8, 20), (16, 64), (64, 256), (12, 37), (2, 9), (4, 5), (32, 16), (32, 8)]
)
def test_t5_buckets_are_the_papers(num_buckets, max_distance, bidirectional):
    if bidirectional and num_buckets < 4:
        bidirectional = False  # two buckets cannot be halved and halved again
    relative = np.arange(-400, 401)
    got = relative_position_bucket(
        jnp.asarray(relative), bidirectional=bidirectional, num_buckets=num_buckets, max_distance=max_distance
    )
    want = [oracle.t5_bucket(int(r), bidirectional, num_buckets, max_distance) for r in relative]
    np.testing.assert_array_equal(got, want)


def test_t5_buckets_of_the_released_models():
    """32 buckets up to 128, written out: 0 to 15 for keys before the query, 16 to 31 for keys after it."""
    relative = jnp.array([0, -1, -7, -8, -11, -12, -16, -23, -32, -64, -90, -91, -127, -128, -500, 1, 8, 500])
    want = [0, 1, 7, 8, 8, 9, 10, 11, 12, 14, 14, 15, 15, 15, 15, 17, 24, 31]
    assert relative_position_bucket(relative).tolist() == want


@every_single_score
def test_to_array_is_the_rule_on_zeros(score):
    shape = Shape(T=11, S=7)
    x = draw(Case(MASKS[0], score, shape), "float32").x
    want = score.rule(jnp.zeros((shape.B, shape.N, shape.T, shape.S)), Index(shape), x)
    got = score.score(x).to_array(shape.T, shape.S, batch=shape.batch, heads=shape.N)
    sizes = (*shape.batch, shape.N, shape.T, shape.S)
    np.testing.assert_allclose(np.broadcast_to(got, sizes), want.reshape(sizes), rtol=1e-6, atol=1e-7)


@every_single_score
def test_a_score_is_a_frozen_pytree_that_prints_itself(score):
    x = draw(Case(MASKS[0], score), "float32").x
    one = score.score(x)
    leaves, tree = jax.tree.flatten(one)
    assert jax.tree.structure(score.score(x)) == tree == jax.tree.structure(jax.tree.unflatten(tree, leaves))
    assert len(leaves) >= len(set(x) - set(Shape().query_key_value()))
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(one, dataclasses.fields(one)[0].name, 1)
    text = repr(one)
    assert type(one).__name__ in text and "object at 0x" not in text and len(text) < 200


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_scores_act_in_the_order_given(implementation):
    """A cap before a bias is not a cap after it, and a tuple is applied from left to right."""
    rng = np.random.default_rng(0)
    array = lambda *size: jnp.asarray(rng.normal(size=size), jnp.float32)
    q, k, v, bias = array(5, 2, 4), array(7, 2, 4), array(7, 2, 3), 4 * array(5, 7)
    both = lambda *score: aj.attention(q, k, v, score=score, return_lse=True, implementation=implementation)[1]
    s = np.einsum("tnh,snh->nts", np.float64(q), np.float64(k)) / 2
    lse = lambda s: np.log(np.exp(s).sum(-1)).T
    capped, after = both(aj.SoftCap(1.0), aj.Bias(bias)), both(aj.Bias(bias), aj.SoftCap(1.0))
    np.testing.assert_allclose(capped, lse(np.tanh(s) + np.float64(bias)), rtol=1e-5)
    np.testing.assert_allclose(after, lse(np.tanh(s + np.float64(bias))), rtol=1e-5)
    assert np.abs(capped - after).max() > 0.5


BIASES = ["", "s", "1s", "t1", "ts", "11s", "1t1", "nts", "n1s", "n11", "*111", "*11s", "*1ts", "*n1s", "*nts", "1nts"]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("axes", BIASES)
def test_a_bias_gradient_has_the_shape_of_the_bias(axes, implementation):
    """Whatever broadcasts may be given, and what was broadcast is summed."""
    shape = Shape(T=19, S=21, N=4, H=3, V=2)
    sizes = {"n": (shape.N,), "t": (shape.T,), "s": (shape.S,), "1": (1,), "*": shape.batch}
    size = sum((sizes[c] for c in axes), ())
    score = dataclasses.replace(
        next(s for s in SCORES if s.name == "bias"),
        name=f"bias_{axes}",
        operands=lambda rng, shape: {"a": rng.normal(size=size)},
    )
    case = Case(MASKS[0], score, shape)
    inputs = draw(case, "float32")
    got = jax.jit(solver(case, implementation, IMPLEMENTATIONS[implementation]))(*inputs)
    assert got.gradients["a"].shape == size
    expect(case, inputs).check(got)


def test_buckets_that_no_pair_uses_get_no_gradient():
    q = jnp.ones((4, 1, 2))
    loss = lambda table: aj.attention(q, q, q, score=aj.RelativeBias(table, bidirectional=False), return_lse=True)[
        1
    ].sum()
    gradient = jax.grad(loss)(jnp.zeros((32, 1)))
    assert (gradient[:4] > 0).all() and not gradient[4:].any()


def test_score_fn_holds_what_its_function_captures():
    """Captured arrays are leaves: the same structure with other numbers is another score, without a new trace."""
    build = lambda table: aj.ScoreFn(lambda s, b, h, q, k: s + table[k])
    first, second = build(jnp.array([1.0, 2.0])), build(jnp.array([3.0, 4.0]))
    assert jax.tree.structure(first) == jax.tree.structure(second)
    assert first.to_array(1, 2).tolist() == [[1.0, 2.0]] and second.to_array(1, 2).tolist() == [[3.0, 4.0]]


@pytest.mark.parametrize("implementation", {**IMPLEMENTATIONS, **INTERPRETED})
@pytest.mark.parametrize("axes", ["", "n", "*n"])
def test_a_scale_may_be_an_array(axes, implementation):
    """One factor, one for each head, or one for each head of a batch entry: its value, gradient and tangent."""
    draw_factors = lambda rng, shape: {"a": 0.4 + 0.2 * np.abs(normal(a=axes)(rng, shape)["a"])}
    rule = lambda s, i, x: s * i.per(x["a"][..., None] if not axes else x["a"], "n")
    score = ScoreCase("scaled", lambda x: None, rule, draw_factors, scale=1.0)
    case = Case(MASKS[1], score, Shape(T=17, S=19, N=4, H=3, V=2))
    inputs = draw(case, "float32")
    config = {**IMPLEMENTATIONS, **INTERPRETED}[implementation]
    mask = case.mask.mask(inputs.d)

    def function(x):
        arrays = (x["query"], x["key"], x["value"])
        named = "xla" if implementation == "cpu" else implementation
        options = dict(mask=mask, implementation=named, config=config, return_lse=True)
        return aj.attention(*arrays, scale=x["a"], **options)

    got = jax.jit(lambda *args: differentiate(function, *args))(inputs.x, inputs.tangents, inputs.cotangents)
    expect(case, inputs).check(got)


def test_a_scale_that_is_known_is_a_number():
    """A scalar array outside of a transformation asks nothing more of an implementation than a Python number does."""
    q = jnp.ones((5, 2, 4))
    plain = aj.attention(q, q, q, scale=0.25, return_lse=True)
    for scale in (np.float32(0.25), np.array(0.25), jnp.float32(0.25), jnp.bfloat16(0.25)):
        assert not build(q, q, q, scale=scale)[0].program.scores
        np.testing.assert_array_equal(aj.attention(q, q, q, scale=scale, return_lse=True)[1], plain[1])
    assert not build(q, q, q, scale=jnp.int32(2))[0].program.scores
