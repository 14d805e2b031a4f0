"""Every mask x score x dtype x {forward, backward, jvp, vmap, jit} against the float64 oracle, on every implementation.

One program per case gives value, gradients and tangents together, because compiling is what takes the time. The same
program is run again with NaN and infinities in everything that nobody may see.
"""

import functools

import jax
import jax.numpy as jnp
import pytest
from cases import MASKS, SCORE_VARIANTS, SCORES, SHAPES, VARIANTS
from oracle import Shape, expected
from problems import (
    DTYPES,
    EVERY_IMPLEMENTATION,
    INTERPRETED,
    OPTIMISED,
    REFUSED,
    Case,
    attend,
    check_dtypes,
    draw,
    expect,
    expect_mapped,
    mapped_axes,
    poison,
    precision,
    problem,
    solver,
)

from attnjax.kernels import xla

MAPPED = Shape(batch=(2, *Shape().batch))  # mapped over 2 with a batch of 3 left inside: both more than one
FULL, COMBINED = MASKS[0], MASKS[-1]
NONE, EVERYTHING = SCORES[0], SCORES[-1]

pytestmark = pytest.mark.device
every_implementation = pytest.mark.parametrize("implementation", EVERY_IMPLEMENTATION)
every_one_of_float32 = pytest.mark.parametrize(
    "implementation", [name for name in EVERY_IMPLEMENTATION if "float32" not in REFUSED.get(name, {})]
)


def crossed(everything: bool):
    """(mask, score, dtype, mapped, implementation) of the big cross, or of a shorter one.

    The shorter one has every pair in float32 under vmap; and every mask without score, and every score with the full
    mask, in every other dtype too: without vmap, and in one of them, a different one for each, under vmap. Of it, the
    plain formula and interpreted kernels run, under vmap, every mask without score, every score with the full mask, and
    each mask with one score.
    """
    for m, mask in enumerate(MASKS):
        for n, score in enumerate(SCORES):
            edge = score is NONE or mask is FULL
            for k, dtype in enumerate(DTYPES):
                plain = everything or (edge and dtype != "float32")
                mapped = everything or dtype == "float32" or (edge and (m + n) % 3 + 1 == k)
                for implementation in EVERY_IMPLEMENTATION:
                    few = implementation in (*INTERPRETED, "reference") and not everything
                    name = f"{mask.name}-{score.name}-{dtype}-{implementation}"
                    if plain and not few:
                        yield pytest.param(mask, score, dtype, False, implementation, id=name)
                    if mapped and (edge or m == n or not few):
                        yield pytest.param(mask, score, dtype, True, implementation, id=f"{name}-vmap")


def pytest_generate_tests(metafunc):
    if metafunc.function is test_cross:
        cases = list(crossed(metafunc.config.getoption("--full-cross")))
        metafunc.parametrize("mask, score, dtype, mapped, implementation", cases)


@pytest.mark.crossed("mask", "score", "dtype", "mapped", "implementation", each="implementation")
def test_cross(mask, score, dtype, mapped, implementation):
    case = Case(mask, score, MAPPED if mapped else Shape())
    agrees(case, dtype, implementation, mapped=mapped, poisoned=False)


@every_implementation
@pytest.mark.parametrize("mask", VARIANTS, ids=repr)
def test_mask_variants(mask, implementation):
    """Those with batched arrays under vmap, with a batch left inside, the others without."""
    mapped = bool(mask.mapped)
    agrees(Case(mask, NONE, MAPPED if mapped else Shape()), "float32", implementation, mapped=mapped)


@every_implementation
@pytest.mark.parametrize("score", SCORE_VARIANTS, ids=repr)
def test_score_variants(score, implementation):
    """Those that tell one example from another under vmap, with a batch left inside, the others without."""
    mapped = bool(score.mapped) or score.name in ("dropout", "function_indices")
    agrees(Case(COMBINED, score, MAPPED if mapped else Shape()), "float32", implementation, mapped=mapped)


@every_implementation
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(shape, implementation):
    agrees(Case(COMBINED, EVERYTHING, shape), "float32", implementation)


@every_implementation
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_hidden_leaks(dtype, implementation):
    """Compiled with all of XLA's optimisations, which may move what guards against NaN."""
    (lengths,) = (mask for mask in MASKS if mask.name == "lengths")
    agrees(Case(lengths, NONE), dtype, implementation, options=OPTIMISED)


CONFIGS = {
    "default": None,
    "chosen": xla.Config(),
    "wide": xla.Config(block_q=8, block_k=32),
    "tall": xla.Config(block_q=32, block_k=8),
    "one_row": xla.Config(block_q=1, block_k=64),
    "one_key": xla.Config(block_q=64, block_k=1),
    "not_powers_of_two": xla.Config(block_q=7, block_k=11),
    "larger_than_the_problem": xla.Config(block_q=128, block_k=256),
    "lanes_1": xla.Config(block_q=16, block_k=16, lanes=1),
    "lanes_2": xla.Config(block_q=16, block_k=16, lanes=2),
    "lanes_100": xla.Config(block_q=16, block_k=16, lanes=100),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_xla_configs(config):
    agrees(Case(COMBINED, EVERYTHING, MAPPED), "float32", "xla", config=config)


@every_implementation
@pytest.mark.parametrize(
    "case", [*(Case(mask, NONE) for mask in MASKS), *(Case(FULL, score) for score in SCORES[1:])], ids=repr
)
def test_eager(case, implementation):
    """Without an outer jit: masks and scores hold concrete arrays, which may be looked at, unlike traced ones."""
    inputs = draw(case, "float32")
    want = expect(case, inputs)
    run = functools.partial(attend, case, inputs.x, inputs.d)
    implementation = able(case, implementation, run)
    got = run(implementation, EVERY_IMPLEMENTATION.get(implementation))
    want.check(want.answer._replace(out=got[0], lse=got[1]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_implementation_that_is_chosen(dtype):
    """implementation=None."""
    agrees(Case(COMBINED, EVERYTHING), dtype, None, config=None)


SUBSETS = {
    "query": {"query": 0},
    "key": {"key": 0},
    "value": {"value": 0},
    "key_and_value": {"key": 0, "value": 0},
    "all_from_the_end": {"query": -1, "key": -1, "value": -1},
    "different_axes": {"query": 1, "key": 2, "value": -2},
    "sinks": {"sinks": 0},
    "bias": {"a": 1},
    "slopes": {"b": -1},
    "query_and_bias": {"query": 0, "a": 0},
    "query_ids": {"ids": 0},
    "value_and_both_ids": {"value": 2, "ids": 1, "key_ids": -1},
}
# Interpreted kernels, which take long, are tried on these.
FEW_SUBSETS = ("key_and_value", "different_axes", "sinks", "bias", "query_ids")


@pytest.mark.crossed("subset", "implementation")
@pytest.mark.parametrize(
    "subset, implementation",
    [
        (subset, name)
        for subset in SUBSETS
        for name in EVERY_IMPLEMENTATION
        if "float32" not in REFUSED.get(name, {}) and (subset in FEW_SUBSETS or name not in INTERPRETED)
    ],
)
def test_vmap_over_a_subset(subset, implementation):
    """Some arguments mapped, at any axis, the others shared: each example is what a call of its own gives."""
    case, axes = Case(COMBINED, EVERYTHING), SUBSETS[subset]
    axes = {{"ids": ("d", "a"), "key_ids": ("d", "b")}.get(name, ("x", name)): axis for name, axis in axes.items()}
    examples = [draw(case, "float32", seed) for seed in range(3)]
    shared = examples[0]
    take = lambda field, name, n: getattr(examples[n] if (field, name) in axes else shared, field)[name]
    each = [
        shared._replace(**{field: {name: take(field, name, n) for name in getattr(shared, field)} for field in "xd"})
        for n in range(3)
    ]
    stack = lambda field, name: jnp.stack([take(field, name, n) for n in range(3)], axis=axes[field, name])
    arguments = shared._replace(
        **{
            field: {
                name: stack(field, name) if (field, name) in axes else one
                for name, one in getattr(shared, field).items()
            }
            for field in "xd"
        }
    )
    in_axes = tuple({name: axes.get((field, name)) for name in getattr(shared, field)} for field in "xd")
    solve = jax.vmap(solver(case, implementation, EVERY_IMPLEMENTATION[implementation]), in_axes=(*in_axes, None, None))
    got = jax.jit(solve)(*arguments)
    for n, inputs in enumerate(each):
        expect(case, inputs).check(jax.tree.map(lambda a, n=n: a[n], got))


@every_one_of_float32
def test_vmap_of_vmap(implementation):
    """Two mapped axes and no batch left inside."""
    shape = Shape(batch=(2, 3))
    case = Case(COMBINED, EVERYTHING, shape.inner().inner())
    inputs = draw(Case(COMBINED, EVERYTHING, shape), "float32")
    axes = mapped_axes(Case(COMBINED, EVERYTHING, shape), inputs)
    solve = solver(case, implementation, EVERY_IMPLEMENTATION[implementation])
    twice = jax.vmap(jax.vmap(solve, in_axes=tuple(axes)), in_axes=tuple(axes))
    got = jax.jit(twice)(*inputs)
    pick = lambda tree, which, at: {name: a[at] if which[name] == 0 else a for name, a in tree.items()}
    for at in [(0, 0), (1, 2)]:
        cotangents = (inputs.cotangents[0][at], inputs.cotangents[1][at])
        x, d, tangents = pick(inputs.x, axes.x, at), pick(inputs.d, axes.d, at), pick(inputs.tangents, axes.x, at)
        expected(problem(case, d), x, tangents, cotangents).check(jax.tree.map(lambda a, at=at: a[at], got))


@every_one_of_float32
def test_gradient_of_vmap(implementation):
    """Derivatives outside of vmap: what is shared gets the sum over the examples, in its own shape."""
    case, inner = Case(COMBINED, EVERYTHING, MAPPED), Case(COMBINED, EVERYTHING, MAPPED.inner())
    inputs = draw(case, "float32")
    axes = mapped_axes(case, inputs)
    one = functools.partial(attend, inner, implementation=implementation, config=EVERY_IMPLEMENTATION[implementation])
    mapped = jax.vmap(lambda x, d: one(x, d), in_axes=(axes.x, axes.d))
    _, pull = jax.vjp(lambda x: mapped(x, inputs.d), inputs.x)
    (got,) = pull(inputs.cotangents)
    want = expect_mapped(case, inputs)
    shared = [name for name, axis in axes.x.items() if axis is None]
    total = {name: a.sum(0) if name in shared else a for name, a in want.answer.gradients.items()}
    allowed = {name: a * (2 if name in shared else 1) for name, a in want.allowed.gradients.items()}  # two summands
    want = want._replace(answer=want.answer._replace(gradients=total), allowed=want.allowed._replace(gradients=allowed))
    want.check(want.answer._replace(gradients=got))


def agrees(case, dtype, implementation, *, config=..., mapped=False, options=None, poisoned=True):
    """Raises unless one compiled program gives the oracle's value, gradients and tangents in the right dtypes."""
    __tracebackhide__ = True
    config = EVERY_IMPLEMENTATION.get(implementation) if config is ... else config
    if case.score is EVERYTHING:
        options = OPTIMISED  # compiled fast, sums and recomputed logits are rounded more often than the budget is for
    with precision(dtype):
        inputs = draw(case, dtype)
        want = expectation(case, dtype, mapped)
        # The tangents of kernels that run interpreted here are those of the tiled code, and take most of the time.
        forward_mode = implementation not in INTERPRETED

        def made(implementation):
            own = config if implementation else None
            solve = solver(case.inner() if mapped else case, implementation, own, forward_mode=forward_mode)
            solve = jax.vmap(solve, in_axes=tuple(mapped_axes(case, inputs))) if mapped else solve
            return jax.jit(solve, compiler_options=options)

        solve = made(able(case, implementation, lambda name: made(name).lower(*inputs), dtype))
        known = {} if forward_mode else {name: getattr(want.answer, name) for name in ("out_tangent", "lse_tangent")}
        got = solve(*inputs)
        check_dtypes(inputs, got)
        want.check(got._replace(**known))
        if poisoned:
            want.check(solve(*poison(case, inputs))._replace(**known))


def able(case, implementation, run, dtype="float32"):
    """The implementation; or None, where it is one that refuses the case: then `run(implementation)` says why."""
    refused = REFUSED.get(implementation, {})
    reason = refused.get(dtype) or refused.get(case.score.name)
    if reason is None:
        return implementation
    with pytest.raises(NotImplementedError, match=reason):
        run(implementation)
    return None


@functools.lru_cache(maxsize=1)  # the implementations of one case are tried one after the other
def expectation(case, dtype, mapped):
    return (expect_mapped if mapped else expect)(case, draw(case, dtype))
