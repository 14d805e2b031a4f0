"""The staircase of the package: which step each file stands on. test_architecture.py holds the files to it."""

from pathlib import Path

import attnjax
from attnjax.core.dispatch import KERNELS

PACKAGE = Path(attnjax.__file__).parent

# Each file imports only from steps before its own. Files of one step do not import each other, but for bench.
STEPS = [
    {
        "core.context",
        "core.devices",
        "core.fingerprint",
        "core.dropout",
        "core.integers",
        "core.mesh_types",
        "core.softmax",
        "core.symbolic",
        "core.taylor",
        "profiling",
    },
    {"core.operations"},
    {"core.functions"},
    {"core.node"},
    {"core.checks"},
    {"core.tiles", "positions"},
    {"core.mask"},
    {"masks", "scores", "core.program", "core.sides", "core.residual", "core.regions"},
    {"core.blocks", "core.placed", "core.tables", "core.split", "core.sharding"},
    {"tuning"},
    {"core.visits", "core.view", "core.primitives"},
    {"core.steps", "core.parts", "core.hopper"},
    {"core.mosaic"},
    {"core.walk", "core.products"},
    {"core.sweep"},
    {f"kernels.{name}" for name in KERNELS},
    {"core.dispatch"},
    {"core.transforms"},
    {"attention"},
    {"explain", "cache"},
    {"nn.checks", "nn.constants"},
    {"nn.layers"},
    {"nn.attention", "nn.feed_forward", "nn.embeddings", "nn.stack", "nn.adapters"},
    {"nn.blocks"},
    {"nn"},
    {"models.sampling", "models.processors", "models.prompts", "models.checks", "models.layers"}
    | {"models.folders", "models.variables"},
    {"models.checkpoint"},
    {"models.generate", "models.beam", "models.decoder", "models.encoder", "models.encoder_decoder", "models.vision"},
    {"models"},
    {"bench"},
    {""},  # the door
]


def name_of(path: Path) -> str:
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    name = name.removesuffix("__init__").removesuffix(".")
    return "bench" if name.split(".")[0] == "bench" else name
