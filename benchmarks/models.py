"""Whole models against peers: a training step of a decoder, and tokens per second of a GPT-2 that decodes with a cache.

    python benchmarks/models.py                       both, with whatever peers are installed
    python benchmarks/models.py train --rounds 5      one of them
    python benchmarks/models.py --json FILE           keep the numbers

Competitors run in turn, so that drift cancels; each number is the median of the rounds. Peers: the same model with
flax.nnx.MultiHeadAttention in place of attnjax's; the same in torch, with its scaled_dot_product_attention; GPT-2 of
transformers. Weights are random: they change neither work nor time.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from attnjax.models import DecoderConfig, DecoderLM, generate

VOCABULARY, FEATURES, HEADS, LAYERS, LENGTH, BATCH = 256, 512, 8, 6, 1024, 4
PROMPT, NEW_TOKENS = 16, 512


def train() -> dict[str, Callable[[], Any]]:
    """A training step: forward, backward, AdamW; float32, 6 layers, 8 heads, 512 features, 4 x 1024 tokens."""
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (BATCH, LENGTH + 1), np.int32)
    competitors = {"attnjax": _flax_step(tokens, own=True), "flax": _flax_step(tokens, own=False)}
    if importlib.util.find_spec("torch"):
        competitors["torch"] = _torch_step(tokens)
    return competitors


def decode() -> dict[str, Callable[[], Any]]:
    """GPT-2 small (124 million parameters), float32, batch 1: 512 new tokens after a prompt of 16, greedy."""
    tokens = np.random.default_rng(0).integers(0, 50257, (1, PROMPT), np.int32)
    config = DecoderConfig(50257, features=768, num_heads=12, num_layers=12, max_length=1024)
    model = DecoderLM(config, rngs=nnx.Rngs(0))
    run = lambda: np.asarray(generate(model, tokens, max_new_tokens=NEW_TOKENS, progress=False).tokens)
    return {"attnjax": run} | (
        {"transformers": _transformers(tokens)} if importlib.util.find_spec("transformers") else {}
    )


class FlaxAttention(nnx.Module):
    """Flax's own attention in the place of a block's."""

    def __init__(self, rngs: nnx.Rngs):
        self.attention = nnx.MultiHeadAttention(HEADS, FEATURES, decode=False, rngs=rngs)

    def __call__(self, x: jax.Array, **options: Any) -> jax.Array:
        return self.attention(x, mask=nnx.make_causal_mask(jnp.ones(x.shape[:2])))


def _flax_step(given: np.ndarray, own: bool) -> Callable[[], Any]:
    tokens = jnp.asarray(given)
    config = DecoderConfig(VOCABULARY, features=FEATURES, num_heads=HEADS, num_layers=LAYERS, max_length=LENGTH)
    model = DecoderLM(config, rngs=nnx.Rngs(0))
    if not own:
        for block in model.stack.layers:
            block.attention = FlaxAttention(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adamw(3e-4), wrt=nnx.Param)

    def loss(model: DecoderLM) -> jax.Array:
        logits = model(tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    @nnx.jit
    def step(model: DecoderLM, optimizer: nnx.Optimizer) -> jax.Array:
        value, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients)
        return value

    return lambda: jax.block_until_ready((step(model, optimizer), nnx.state(model)))


def _torch_step(tokens: np.ndarray) -> Callable[[], Any]:
    torch: Any = importlib.import_module("torch")  # the type checker need not find it
    nn, functional = torch.nn, torch.nn.functional
    torch.set_num_threads(_cores())

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention_norm, self.feed_forward_norm = nn.LayerNorm(FEATURES), nn.LayerNorm(FEATURES)
            self.projection, self.out = nn.Linear(FEATURES, 3 * FEATURES), nn.Linear(FEATURES, FEATURES)
            self.up, self.down = nn.Linear(FEATURES, 4 * FEATURES), nn.Linear(4 * FEATURES, FEATURES)

        def forward(self, x: Any) -> Any:
            heads = self.projection(self.attention_norm(x)).view(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
            attended = functional.scaled_dot_product_attention(*heads, is_causal=True)
            x = x + self.out(attended.transpose(1, 2).reshape(x.shape))
            return x + self.down(functional.gelu(self.up(self.feed_forward_norm(x)), approximate="tanh"))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.positions = nn.Embedding(VOCABULARY, FEATURES), nn.Embedding(LENGTH, FEATURES)
            self.blocks, self.norm = nn.Sequential(*(Block() for _ in range(LAYERS))), nn.LayerNorm(FEATURES)

        def forward(self, tokens: Any) -> Any:
            return self.norm(self.blocks(self.embed(tokens) + self.positions.weight)) @ self.embed.weight.T

    model, text = Model(), torch.from_numpy(tokens).long()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4)

    def step() -> float:
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def _transformers(tokens: np.ndarray) -> Callable[[], Any]:
    torch, transformers = importlib.import_module("torch"), importlib.import_module("transformers")
    torch.set_num_threads(_cores())
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(bos_token_id=None, eos_token_id=None))
    model.eval()
    prompt = torch.from_numpy(tokens).long()

    def run() -> Any:
        with torch.no_grad():
            return model.generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)

    return run


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def measured(competitors: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every round of each, after one that is not counted."""
    for run in competitors.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in competitors}
    for _ in range(rounds):
        for name, run in competitors.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def main() -> None:
    benchmarks = {"train": (train, "tokens/s", BATCH * LENGTH), "decode": (decode, "tokens/s", NEW_TOKENS)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *benchmarks], help="which; default: all")
    parser.add_argument("--rounds", type=int, default=5, help="how often each competitor runs (default 5)")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there")
    arguments = parser.parse_args()
    record: dict[str, Any] = {"jax": jax.__version__, "python": platform.python_version(), "cores": _cores()}
    for name in arguments.names or benchmarks:
        make, unit, work = benchmarks[name]
        seconds = measured(make(), arguments.rounds)
        medians = {who: statistics.median(times) for who, times in seconds.items()}
        record[name] = {"what": make.__doc__, "seconds": seconds, "median": medians}
        print(f"{name}: {make.__doc__}")
        for who, median in medians.items():
            ratio = median / medians["attnjax"]
            print(f"  {who:14}{median:8.2f} s{work / median:10.0f} {unit}{ratio:8.2f} x attnjax's time")
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(record, file, indent=1)


if __name__ == "__main__":
    main()
