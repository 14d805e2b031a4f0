"""Training: batches in parts, mixed precision; the pages of the documentation with fewer steps of the same code."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from attnjax.models import DecoderConfig, DecoderLM, checkpoint
from attnjax.nn import RoPE

PAGES = Path(__file__).parent.parent / "docs" / "training"

# What is replaced, and what must hold then: it has begun to learn. What the pages promise, they assert when built.
REDUCED = {
    "gpt": (
        {
            "STEPS, BATCH, LENGTH = 190, 16, 256": "STEPS, BATCH, LENGTH = 20, 16, 64",
            "FEATURES = 4, 256": "FEATURES = 2, 64",
        },
        # It begins with 8 bits for 256 bytes, and at most 0.72 more for logits of variance 1.
        "losses[-1] < 5.5 < 7.9 < losses[0] < 8.9 and result < 5.5",
    ),
    "digits": (
        {"EPOCHS, BATCH = 40, 64": "EPOCHS, BATCH = 3, 64", "features=128": "features=32"},
        "accuracy > 0.2 and value < 2.25",
    ),
    "translation": (
        {
            "EPOCHS, BATCH = 26, 64": "EPOCHS, BATCH = 1, 64",
            "exact(training), exact(held_out)": "exact(training[:9]), exact(held_out[:9])",
        },
        "value < 6.5 and len(translated(['Iceland'])) == 1",
    ),
    "masked": (
        {"STEPS, BATCH, LENGTH = 250, 16, 256": "STEPS, BATCH, LENGTH = 40, 16, 64", "features=192": "features=64"},
        "loss < 4.6",
    ),
    "flow": (
        {"STEPS, BATCH = 1600, 64": "STEPS, BATCH = 150, 64", "Velocity(128, 4,": "Velocity(64, 2,"},
        # The mean drawn digit, which is nothing at first, is nearer to the mean real one.
        "np.abs(drawn.mean(0) - images.mean(0)).mean() < 0.75 * np.abs(images.mean(0)).mean()",
    ),
}


CONFIG = DecoderConfig(29, features=16, num_heads=2, num_layers=2, positions=RoPE(), norm="rms", use_bias=False)
TOKENS = jax.random.randint(jax.random.key(0), (8, 17), 0, 29)


def learner(optimizer, seed=0, **fields):
    model = DecoderLM(dataclasses.replace(CONFIG, **fields), rngs=nnx.Rngs(seed))
    return model, nnx.Optimizer(model, optimizer, wrt=nnx.Param)


@nnx.jit
def learn(model, optimizer, tokens):
    def loss_of(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(tokens[:, :-1]), tokens[:, 1:]).mean()

    with jax.numpy_dtype_promotion("standard"):  # Flax's norms and optax need it
        loss, gradients = nnx.value_and_grad(loss_of)(model)
        optimizer.update(model, gradients)
    return loss


def test_batches_in_parts_are_the_whole_batch_also_when_resumed_between(tmp_path):
    """Gradients of four parts, added up, take the step of the whole; a run cut off between parts goes on with them."""
    rule = optax.sgd(0.5, momentum=0.9)
    whole, its_rule = learner(rule)
    parts, accumulating = learner(optax.MultiSteps(rule, every_k_schedule=4))
    for step in range(3):
        learn(whole, its_rule, TOKENS)
        for n, part in enumerate(jnp.split(TOKENS, 4)):
            learn(parts, accumulating, part)
            if (step, n) == (1, 1):
                checkpoint.save(tmp_path, parts, accumulating, step=6)
    for one, other in zip(*(jax.tree.leaves(nnx.state(m, nnx.Param)) for m in (whole, parts)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)

    resumed, its_rule = learner(optax.MultiSteps(rule, every_k_schedule=4), seed=1)
    for n in range(checkpoint.restore(tmp_path, resumed, its_rule), 12):
        learn(resumed, its_rule, jnp.split(TOKENS, 4)[n % 4])
    for one, other in zip(*(jax.tree.leaves(nnx.state(m, nnx.Param)) for m in (resumed, parts)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_mixed_precision_learns_as_float32_does():
    losses = []
    for dtype in (None, jnp.bfloat16):
        model, optimizer = learner(optax.adam(1e-2), dtype=dtype)
        losses.append(np.array([learn(model, optimizer, TOKENS) for _ in range(30)]))
        kept = jax.tree.leaves(nnx.state((model, optimizer), nnx.Param))
        assert {x.dtype for x in kept} == {jnp.dtype(jnp.float32)}
    assert losses[0][-1] < 0.6 * losses[0][0]
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.03)


def test_every_page_is_here():
    assert {page.stem for page in PAGES.glob("*.md")} - {"index"} == set(REDUCED)


@pytest.mark.parametrize("name", REDUCED)
def test_page(name):
    replaced, holds = REDUCED[name]
    text = (PAGES / f"{name}.md").read_text()
    for old, new in replaced.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    cells = re.findall(r"^```\{code-cell\} python\n(?::tags: \[(.*?)\]\n)?(.*?)^```$", text, re.S | re.M)
    code = "\n".join(body for tags, body in cells if "full" not in tags)
    program = f"{code}\nassert {holds}, {{k: v for k, v in vars().items() if type(v) in (float, int)}}\n"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "MPLBACKEND": "agg"}
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, env=environment, timeout=600
    )
    assert run.returncode == 0, run.stderr[-4000:]
