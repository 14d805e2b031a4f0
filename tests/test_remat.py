"""What `jax.checkpoint` keeps of attention by name, so that backwards do not run the forward again.

That recomputing changes no number is in test_transforms_mixed.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attnjax as aj
from attnjax.nn import EncoderBlock, Stack

NAMES = ("attention_out", "attention_lse")
P = jax.checkpoint_policies
OFFLOAD = P.save_and_offload_only_these_names(
    names_which_can_be_saved=[], names_which_can_be_offloaded=NAMES, offload_src="device", offload_dst="pinned_host"
)
X = jax.random.normal(jax.random.key(0), (2, 5, 2, 4))


def attend(x):
    return aj.attention(jnp.sin(x), x, x, mask=aj.Causal(), implementation="cpu", return_lse=True)


def loss(x, policy):
    """What comes after attention is kept too, so that nothing but attention can be asked for again."""
    out, lse = jax.checkpoint(attend, policy=policy)(x)
    return (out**2).sum() + lse.sum()


def calls(function, *args):
    """How often the lowered program calls the forward and the backward kernel."""
    text = jax.jit(function).lower(*args).as_text()
    return tuple(text.count(f"custom_call @attnjax_{part}(") for part in ("forward", "backward"))


POLICIES = {
    "names": (P.save_only_these_names(*NAMES), 1),
    "offload": (OFFLOAD, 1),
    "everything": (P.everything_saveable, 1),
    "one_of_two": (P.save_only_these_names(NAMES[0]), 2),
    "other_names": (P.save_only_these_names("context"), 2),
    "nothing": (None, 2),
}
TRANSFORMS = {
    "grad": lambda f: jax.value_and_grad(f),
    "jit": lambda f: jax.value_and_grad(jax.jit(f)),
    "vmap": lambda f: jax.vmap(jax.value_and_grad(f)),
    "grad_of_vmap": lambda f: jax.value_and_grad(lambda x: jax.vmap(f)(x).sum()),
    "vjp_and_jvp": lambda f: lambda x: jax.vjp(lambda x: jax.jvp(f, (x,), (x,))[0], x)[1](1.0),
}


@pytest.mark.compiled
@pytest.mark.parametrize("policy, forwards", POLICIES.values(), ids=POLICIES)
def test_a_policy_keeps_the_output_and_the_log_sum_exp(policy, forwards):
    """With both kept the forward runs once. Each alone is not enough: the backward needs both."""
    assert calls(jax.value_and_grad(functools.partial(loss, policy=policy)), X) == (forwards, 1)


@pytest.mark.compiled
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_names_are_there_in_every_transform(transform):
    once, twice = (functools.partial(loss, policy=p) for p in (P.save_only_these_names(*NAMES), P.nothing_saveable))
    (forwards, backwards), (again, _) = calls(transform(once), X), calls(transform(twice), X)
    assert (forwards, backwards, again) == (1, 1, 2)
    got, want = (jax.tree.leaves(jax.jit(transform(f))(X)) for f in (once, twice))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6), got, want)


@pytest.mark.compiled
@pytest.mark.parametrize("module", ["stack", "nnx.remat"])
def test_names_in_modules(module):
    """The policy of a `Stack` that scans, and of Flax's own remat around a block."""
    block = lambda rngs: EncoderBlock(8, 2, 8, rngs=rngs)
    x = jnp.ones((1, 5, 8))

    def run(policy):
        if module == "stack":
            layers = Stack(block, 2, scan=True, remat=policy, rngs=nnx.Rngs(0))
            return calls(nnx.value_and_grad(lambda layers: (layers(x) ** 2).sum()), layers)
        layer = block(nnx.Rngs(0))
        return calls(nnx.value_and_grad(lambda b: (nnx.remat(lambda b: b(x), policy=policy)(b) ** 2).sum()), layer)

    assert run(P.save_only_these_names(*NAMES)) == (1, 1)
    assert run(P.nothing_saveable) == (2, 1)


def test_names_whatever_the_implementation():
    """The names are where derivatives begin, before an implementation is chosen."""
    policy = P.save_only_these_names(*NAMES)
    for name in ("xla", "reference"):
        f = lambda x, name=name: aj.attention(x, x, x, implementation=name).sum()
        text = str(jax.make_jaxpr(jax.grad(jax.checkpoint(f, policy=policy)))(X))
        assert text.count(" attention[") == 1 and text.count("attention_backward[") == 1, name
