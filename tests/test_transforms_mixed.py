"""vmap over any operand, linearize, transpose, jet, checkpoint, scan, jit and JAX's settings, alone and in each other.

Derivatives of second and third order are in test_transforms, `jax.export` in test_export.
"""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from derivatives import (
    CONFIG,
    RATE,
    SHAPE,
    budgeted,
    derive,
    drawn,
    everything,
    like,
    little,
    meaning,
    meaning_of_little,
    total,
)
from jax.experimental.jet import jet
from oracle import dense
from problems import EVERY_IMPLEMENTATION, FAST_COMPILE

import attnjax as aj

jit = functools.partial(jax.jit, compiler_options=FAST_COMPILE)
FLOATS, INTEGERS = drawn()
EXAMPLES = 2


def first_order(function, x, weights, tangents):
    """Value, gradients and tangents of a function of x -> (out, lse)."""
    (out, lse), moved = jax.jvp(function, (x,), (tangents,))
    return out, lse, moved, derive(total(function, weights), "R", ())(x)


# Which operands are mapped, and at which axis; every other one is shared. Segments' ids, q, k, v, bias, slopes and
# sinks are mapped one by one in test_conformance.
MAPPED = {
    "offset_length_and_one_side_of_ids": {"offset": 0, "length": 0, "b": 1},
    "seed": {"seed": 0},
    "cap_and_scale": {"cap": 0, "scale": 0},
    "table": {"table": 1},
    "captured": {"w": -1},
    "floats": dict.fromkeys(FLOATS, -1),
    "all": dict.fromkeys([*FLOATS, *INTEGERS], 0),
}


def mapped_arrays(axes):
    """`x` and `d` with the mapped axes, what each example sees of them, and the `in_axes` of both."""
    shared, each = drawn(), drawn(examples=(EXAMPLES,))
    merged = [
        {k: jnp.moveaxis(many[k], 0, axes[k]) if k in axes else one[k] for k in one}
        for one, many in zip(shared, each, strict=True)
    ]
    in_axes = [{k: axes.get(k) for k in one} for one in shared]
    see = lambda n: [
        {k: many[k][n] if k in axes else one[k] for k in one} for one, many in zip(shared, each, strict=True)
    ]
    return merged, [see(n) for n in range(EXAMPLES)], in_axes


@pytest.mark.parametrize("axes", MAPPED.values(), ids=MAPPED)
def test_vmap_over_any_operand(axes):
    """Each example is what a call of its own gives: values, tangents and gradients, dropout included."""
    (x, d), examples, (x_axes, d_axes) = mapped_arrays(axes)
    weights = like(jax.eval_shape(everything, *examples[0]), 1)
    tangents = like(FLOATS, 2)
    solve = lambda x, d: first_order(functools.partial(everything, d=d), x, weights, tangents)
    got = jit(jax.vmap(solve, in_axes=(x_axes, d_axes)))(x, d)

    for n, (x, d) in enumerate(examples):
        meant = meaning(SHAPE, d)
        want = budgeted(oracle_first_order, (x, jnp.asarray(meant.visible), jnp.asarray(meant.kept), weights, tangents))
        want.check(jax.tree.map(lambda a, n=n: a[n], got))


def oracle_first_order(x, visible, kept, weights, tangents):
    """`first_order` of the oracle, for any mask and dropout: compiled once for all that is mapped."""
    meant = dataclasses.replace(meaning(SHAPE, INTEGERS), visible=visible, kept=kept)
    return first_order(functools.partial(dense, problem=meant), x, weights, tangents)


ALONE = ("query", "key", "value", "bias", "sinks", "a", "b", "offset", "seed")


@pytest.mark.parametrize("name", ALONE)
@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_vmap_over_one_operand_in_one_tile(name, implementation):
    """Nothing else is there to give the intermediate results the mapped axis that they lack themselves."""

    def solve(x, d):
        mask = {"a": aj.Segments(d["a"], d["b"]), "b": aj.Segments(d["a"], d["b"]), "offset": aj.Causal(d["offset"])}
        dropout = aj.Dropout(0.2, d["seed"]) if name == "seed" else None
        options = dict(mask=mask.get(name), dropout=dropout, return_lse=True, implementation=implementation)

        def attend(x):
            score = aj.Bias(x["bias"]) if name == "bias" else None
            more = dict(score=score, sinks=x["sinks"] if name == "sinks" else None)
            return aj.attention(x["query"], x["key"], x["value"], **more, **options)

        return jax.jvp(attend, (x,), (x,)), jax.grad(lambda x: jnp.sin(attend(x)[0]).sum())(x)

    (x, d), examples, in_axes = mapped_arrays({name: 0})
    got = jit(jax.vmap(solve, in_axes=tuple(in_axes)))(x, d)
    want = jax.tree.map(lambda *a: jnp.stack(a), *[jit(solve)(*example) for example in examples])
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


SECOND = {"hessian_product_of_vmap": False, "vmap_of_hessian_product": True}


@pytest.mark.parametrize("inside", SECOND.values(), ids=SECOND)
def test_second_order_and_vmap(inside):
    """Second derivatives inside of vmap and around it; what is shared gets the sum over the examples."""
    names = ("query", "bias", "sinks", "w", "offset", "a", "b", "seed")
    (x, d), examples, (x_axes, d_axes) = mapped_arrays(dict.fromkeys(names, 0))
    weights = like(jax.eval_shape(everything, *examples[0]), 1)
    along = like(x, 2)

    def one(function, x, weights, along):
        return derive(total(function, weights), "RR", (along,))(x)

    def all_of(x, weights, along):
        if inside:
            solve = lambda x, d, along: one(functools.partial(everything, d=d), x, weights, along)
            return jax.vmap(solve, in_axes=(x_axes, d_axes, x_axes))(x, d, along)
        mapped = jax.vmap(lambda x, d: total(functools.partial(everything, d=d), weights)(x), in_axes=(x_axes, d_axes))
        return derive(lambda x: mapped(x, d).sum(), "RR", (along,))(x)

    def each(x, weights, along):
        pick = lambda tree, n: {k: a[n] if k in names else a for k, a in tree.items()}
        oracles = [functools.partial(dense, problem=meaning(SHAPE, d)) for _, d in examples]
        if inside:
            made = [one(o, pick(x, n), weights, pick(along, n)) for n, o in enumerate(oracles)]
            return jax.tree.map(lambda *a: jnp.stack(a), *made)
        summed = lambda x: sum(total(o, weights)(pick(x, n)) for n, o in enumerate(oracles))
        return derive(summed, "RR", (along,))(x)

    budgeted(each, (x, weights, along)).check(jit(all_of)(x, weights, along))


def test_linearize_and_linear_transpose():
    """The linearised function, its transpose, the transpose of that, and the linearised function under vmap."""
    function = functools.partial(everything, d=INTEGERS)
    weights = like(jax.eval_shape(function, FLOATS), 1)
    tangents, more = like(FLOATS, 2), like(FLOATS, 3)

    def solve(function, x, weights, tangents, more):
        value, pushed = jax.linearize(function, x)
        pull = lambda weights: jax.linear_transpose(pushed, x)(weights)[0]
        again = lambda tangents: jax.linear_transpose(pull, value)(tangents)[0]
        both = jax.tree.map(lambda a, b: jnp.stack([a, b]), tangents, more)
        return pushed(tangents), pull(weights), again(tangents), jax.vmap(pushed)(both)

    def want(x, weights, tangents, more):
        function = functools.partial(dense, problem=meaning(SHAPE, INTEGERS))
        push = lambda t: jax.jvp(function, (x,), (t,))[1]
        both = jax.tree.map(lambda a, b: jnp.stack([a, b]), push(tangents), push(more))
        return push(tangents), jax.vjp(function, x)[1](weights)[0], push(tangents), both

    got = jit(functools.partial(solve, function))(FLOATS, weights, tangents, more)
    budgeted(want, (FLOATS, weights, tangents, more)).check(got)


def by_value(x, d, implementation=None, config=None):
    """Attention that every kernel takes, as a function of the values alone."""
    options = dict(mask=aj.Causal(d["offset"]) & aj.Segments(d["a"], d["b"]), score=aj.SoftCap(2.5), sinks=x["sinks"])
    options |= dict(dropout=aj.Dropout(RATE, d["seed"]), implementation=implementation, config=config)
    return lambda value: aj.attention(x["query"], x["key"], value, **options)


def meaning_by_value(d):
    return dataclasses.replace(meaning(SHAPE, d), score=lambda s, i, x: 2.5 * jnp.tanh(s / 2.5), scale=None)


def pulled(function, cotangent, value):
    return jax.vjp(function, value)[1](cotangent)[0]


@pytest.mark.parametrize("implementation", EVERY_IMPLEMENTATION)
def test_transpose_in_the_values(implementation):
    """Attention is linear in value: its transpose needs no linearisation, and is that of the weights."""
    x = {name: FLOATS[name] for name in ("query", "key", "value", "sinks")}
    weights = like(jax.eval_shape(by_value(x, INTEGERS), x["value"]), 1)

    def want(x, weights):
        oracle = lambda value: dense(x | {"value": value}, meaning_by_value(INTEGERS))[0]
        return pulled(oracle, weights, x["value"])

    def got(x, weights):
        function = by_value(x, INTEGERS, implementation, EVERY_IMPLEMENTATION[implementation])
        return jax.linear_transpose(function, x["value"])(weights)[0]

    budgeted(want, (x, weights)).check(jit(got)(x, weights))


def test_the_transpose_is_like_any_other_function():
    """Differentiated by what it is not linear in, mapped, transposed again, with the log-sum-exp left out."""
    x = {name: FLOATS[name] for name in ("query", "key", "value", "sinks")}
    weights = like(jax.eval_shape(by_value(x, INTEGERS), x["value"]), 1)
    transposed = lambda x, weights: jax.linear_transpose(by_value(x, INTEGERS), x["value"])(weights)[0]
    vjp = lambda x, weights: pulled(by_value(x, INTEGERS), weights, x["value"])

    def made(function):
        loss = lambda query: jnp.sin(function(x | {"query": query}, weights)).sum()
        return jax.grad(loss)(x["query"]), jax.vmap(lambda w: function(x, w))(jnp.stack([weights, weights + 1]))

    scaled = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(scaled, *(jit(lambda f=f: made(f))() for f in (transposed, vjp)))
    again = jax.linear_transpose(functools.partial(transposed, x), weights)(x["value"])[0]
    scaled(again, by_value(x, INTEGERS)(x["value"]))
    both = lambda value: aj.attention(x["query"], x["key"], value, return_lse=True)[0]
    scaled(jax.linear_transpose(both, x["value"])(weights)[0], pulled(both, weights, x["value"]))


def test_no_transpose_in_query_or_key():
    x = FLOATS
    calls = {
        "query": lambda query: aj.attention(query, x["key"], x["value"]),
        "key": lambda key: aj.attention(x["query"], key, x["value"]),
    }
    for name, call in calls.items():
        with pytest.raises(NotImplementedError, match=f"linear in value, and not in {name}.*by {name}: jax.vjp"):
            jax.linear_transpose(call, x[name])(jax.eval_shape(call, x[name]))


def test_taylor_series():
    """`jax.experimental.jet` gives the coefficients of value and log-sum-exp along a curve, here to t^2."""
    names, shape = ("query", "key", "value", "cap", "w", "sinks"), dataclasses.replace(SHAPE, batch=(), N=2, K=1)
    floats, integers = drawn(shape)
    x = {name: floats[name] for name in names}
    first, second = like(x, 2), like(x, 3)

    def want(x, first, second):
        oracle = functools.partial(dense, problem=meaning_of_little(shape, integers))
        value = lambda t: oracle(jax.tree.map(lambda x, a, b: x + t * (a + t * b), x, first, second))
        push = lambda f: lambda t: jax.jvp(f, (t,), (jnp.ones_like(t),))[1]
        zero = jnp.zeros((), x["query"].dtype)
        return value(zero), push(value)(zero), jax.tree.map(lambda a: a / 2, push(push(value))(zero))

    def got(x, first, second):
        call = lambda *x: little(dict(zip(names, x, strict=True)), integers)
        series = [[first[name], second[name]] for name in names]
        value, terms = jet(call, [x[name] for name in names], series, factorial_scaled=False)
        return value, *zip(*terms, strict=True)

    budgeted(want, (x, first, second)).check(jit(got)(x, first, second))


def test_taylor_series_of_third_order_and_of_a_gradient():
    x = jax.random.normal(jax.random.key(0), (5, 1, 2))
    call = lambda x: aj.attention(x, jnp.sin(x), x, mask=aj.Causal())
    gradient = jax.grad(lambda x: (call(x) ** 2).sum())
    _, got = jit(lambda x: jet(call, (x,), ([x, x, x],)))(x)
    line, one = lambda t: call(x + t * x + t**2 / 2 * x + t**3 / 6 * x), jnp.ones(())
    for term in got:
        line = functools.partial(lambda line, t: jax.jvp(line, (t,), (one,))[1], line)
        np.testing.assert_allclose(term, jit(line)(0 * one), rtol=1e-4, atol=1e-5)
    _, (moved,) = jit(lambda x: jet(gradient, (x,), ([x],)))(x)
    np.testing.assert_allclose(moved, jit(lambda x: jax.jvp(gradient, (x,), (x,))[1])(x), rtol=1e-4, atol=1e-5)


POLICIES = {
    "recompute_all": jax.checkpoint_policies.nothing_saveable,
    "save_products": jax.checkpoint_policies.dots_saveable,
}


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_checkpoint(policy):
    """Recomputing changes no number, in a Hessian-vector product too: dropout drops the same weights again."""
    weights = like(jax.eval_shape(little, FLOATS, INTEGERS), 1)
    along = like(FLOATS, 2)
    plain = functools.partial(little, d=INTEGERS)
    products = [
        jit(derive(total(f, weights), "RF", (along,)))(FLOATS) for f in (plain, jax.checkpoint(plain, policy=policy))
    ]
    for name, a, b in zip(FLOATS, *map(lambda tree: tree.values(), products), strict=True):
        scale = float(jnp.abs(a).max())
        np.testing.assert_allclose(b, a, rtol=0, atol=8 * np.finfo(np.float32).eps * scale, err_msg=name)


def layers(implementation, scanned, x, h, d):
    """Layers of attention, each with its own projections, window, offset and dropout seed; the last carry."""
    options = {"implementation": implementation}
    options |= {} if implementation == "reference" else {"config": CONFIG}

    def layer(h, here):
        x, d = here
        q, k, v = (jnp.einsum("btc,cnh->btnh", h, x[name]) for name in "qkv")
        mask = aj.Causal(d["offset"]) & aj.Window(d["left"], 0)
        out = aj.attention(q, k, v, mask=mask, score=aj.Bias(x["bias"]), dropout=aj.Dropout(0.2, d["seed"]), **options)
        return h + jnp.tanh(out.reshape(h.shape)), None

    if scanned:
        return jax.lax.scan(jax.checkpoint(layer), h, (x, d))[0]
    for n in range(len(d["seed"])):
        h, _ = layer(h, jax.tree.map(lambda a, n=n: a[n], (x, d)))
    return h


@pytest.mark.parametrize("modes", ["RF", "RR"])
def test_scan_over_layers(modes):
    """A scan over checkpointed layers, with traced window, offset and seed, differentiated twice."""
    rng = np.random.default_rng(0)
    x = {name: 0.4 * rng.normal(size=(3, 6, 3, 2)) for name in "qkv"} | {"bias": rng.normal(size=(3, 3, 1, 9))}
    x = {name: jnp.asarray(a, jnp.float32) for name, a in x.items()}
    h = jnp.asarray(rng.normal(size=(2, 9, 6)), jnp.float32)
    d = {"offset": jnp.array([0, 1, 0]), "left": jnp.array([2, 100, 3]), "seed": jnp.array([5, 6, 7], jnp.uint32)}
    along = like(x, 1)

    def solve(implementation, scanned, x, h, along):
        function = lambda x: jnp.sin(layers(implementation, scanned, x, h, d)).sum()
        return derive(function, modes, (along,))(x)

    got = jit(functools.partial(solve, None, True))(x, h, along)
    budgeted(functools.partial(solve, "reference", False), (x, h, along)).check(got)


def test_scan_over_queries():
    """Decoding one query at a time with a traced offset is causal attention, and so are its derivatives."""
    x = {name: a for name, a in FLOATS.items() if name in ("query", "key", "value")}

    def decode(x):
        def step(_, here):
            t, query = here
            out = aj.attention(query[:, None], x["key"], x["value"], mask=aj.Causal(t), config=CONFIG, return_lse=True)
            return None, jax.tree.map(lambda a: a[:, 0], tuple(out))

        steps = (jnp.arange(SHAPE.T), x["query"].swapaxes(0, 1))
        return jax.tree.map(lambda a: a.swapaxes(0, 1), jax.lax.scan(step, None, steps)[1])

    def whole(x):
        return aj.causal_attention(x["query"], x["key"], x["value"], implementation="reference", return_lse=True)

    weights, tangents = like(jax.eval_shape(whole, x), 1), like(x, 2)
    got = jit(functools.partial(first_order, decode))(x, weights, tangents)
    budgeted(functools.partial(first_order, whole), (x, weights, tangents)).check(got)


def test_cond_and_loops_of_unknown_length():
    """Attention in a branch that is chosen at run time, and in a loop whose number of turns is not known."""
    masks = (aj.Causal(), aj.Window(2, 2))
    q, k = FLOATS["query"], FLOATS["key"]
    attend = lambda q, mask, **options: aj.attention(q, k, k, mask=mask, **options)
    ours = functools.partial(attend, config=CONFIG)
    reference = functools.partial(attend, implementation="reference")
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)

    branch = lambda flag, q: jax.lax.cond(flag, *(functools.partial(ours, mask=m) for m in masks), q)
    gradient = lambda f: lambda *args: jax.grad(lambda q: jnp.sin(f(*args[:-1], q)).sum())(args[-1])
    one = jit(gradient(branch))
    both = jit(jax.vmap(gradient(branch), in_axes=(0, None)))(jnp.array([True, False]), q)
    for n, flag in enumerate([True, False]):
        want = jit(gradient(functools.partial(reference, mask=masks[n])))(q)
        close(one(flag, q), want)
        close(both[n], want)

    loop = lambda f, turns, q: jax.lax.fori_loop(0, turns, lambda _, q: f(q, masks[0]), q)
    moved = lambda f: jit(lambda turns, q: jax.jvp(functools.partial(loop, f, turns), (q,), (q,))[1])
    close(moved(ours)(3, q), moved(reference)(3, q))


def test_masks_scores_and_dropout_are_arguments():
    """They go through grad (integers get float0), vmap, scan and jit like any other pytree."""
    q, k, v = (FLOATS[name] for name in ("query", "key", "value"))
    mask = aj.Segments(INTEGERS["a"], INTEGERS["b"]) & aj.Causal(INTEGERS["offset"])
    score = (aj.ALiBi(FLOATS["slopes"], jnp.int32(2)), aj.Bias(FLOATS["bias"]), aj.SoftCap(5.0))
    traced = []

    @jit
    def solve(mask, score, dropout):
        traced.append(1)
        loss = lambda mask, score, dropout: aj.attention(
            q, k, v, mask=mask, score=score, dropout=dropout, config=CONFIG
        ).sum()
        return jax.grad(loss, argnums=(0, 1, 2), allow_int=True)(mask, score, dropout)

    for_mask, for_score, for_dropout = solve(mask, score, aj.Dropout(0.1, jnp.uint32(3)))
    assert {a.dtype for a in jax.tree.leaves((for_mask, for_dropout))} == {jax.dtypes.float0}
    assert jax.tree.structure((for_mask, for_score)) == jax.tree.structure((mask, score))
    assert for_score[0].slopes.shape == (SHAPE.N,) and jnp.any(for_score[0].slopes != 0)
    assert for_score[0].offset.dtype == jax.dtypes.float0 and for_score[1].array.shape == FLOATS["bias"].shape

    other = jax.tree.map(lambda a: a + jnp.ones_like(a), (mask, score, aj.Dropout(0.1, jnp.uint32(4))))
    assert jnp.any(solve(*other)[1][0].slopes != for_score[0].slopes)
    assert len(traced) == 1, "the same structure with other numbers was traced again"

    stacked = jax.tree.map(lambda a, b: jnp.stack([a, b]), mask, other[0])
    attend = lambda mask: aj.attention(q, k, v, mask=mask, config=CONFIG)
    want = jnp.stack([attend(mask), attend(other[0])])
    np.testing.assert_allclose(jax.vmap(attend)(stacked), want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.lax.map(attend, stacked), want, rtol=1e-5, atol=1e-6)


def test_equal_functions_are_compiled_once():
    """A lambda written anew at every call is the same program, with other captured numbers too."""
    q, k, v = (FLOATS[name] for name in ("query", "key", "value"))
    traced = []

    @jit
    def solve(score, mask):
        traced.append(1)
        return aj.attention(q, k, v, score=score, mask=mask, config=CONFIG)

    call = lambda w, at: solve(aj.ScoreFn(lambda s, b, h, q, k: s * w[k]), aj.Where(lambda b, h, q, k: q + at >= k))
    first, second = call(FLOATS["u"], 1), call(FLOATS["u"] + 1, 1)
    assert len(traced) == 1 and jnp.any(first != second)
    third = call(FLOATS["u"], 2)  # a number that is written into the function is part of the program
    assert len(traced) == 2 and jnp.any(first != third)


SETTINGS = {
    "disable_jit": jax.disable_jit,
    "debug_nans": lambda: jax.debug_nans(True),
    "rank_promotion": lambda: jax.numpy_rank_promotion("raise"),
    "checking_leaks": jax.checking_leaks,
    "enable_x64": lambda: jax.enable_x64(True),
    "matmul_precision": lambda: jax.default_matmul_precision("bfloat16"),
}


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_settings_of_jax_change_nothing(setting):
    """Gradients under each of JAX's switches for finding mistakes, or for other precision, are the same."""
    weights = like(jax.eval_shape(little, FLOATS, INTEGERS), 1)
    loss = total(functools.partial(little, d=INTEGERS), weights)
    want = jax.grad(loss)(FLOATS)
    with setting():
        got = jax.grad(loss)(FLOATS)
    for name in FLOATS:
        assert got[name].dtype == want[name].dtype
        np.testing.assert_allclose(got[name], want[name], rtol=1e-5, atol=1e-5, err_msg=name)


def test_eager_calls_are_compiled_once():
    """Outside of jit, a second call with other numbers compiles nothing."""
    x, d = drawn(seed=1)
    jax.block_until_ready(little(FLOATS, INTEGERS))
    with count_compilations() as compiled:
        jax.block_until_ready(little(x, d))
    assert compiled == []


@contextlib.contextmanager
def count_compilations():
    """Collects the names of JAX's events for compiling a program."""
    events = []
    listener = lambda event, duration, **_: events.append(event) if "backend_compile" in event else None
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
