"""The training pages of the documentation, in reduced form: fewer steps of the same code, each in its own process."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGES = Path(__file__).parent.parent / "docs" / "training"

# What is replaced, and what must hold then: it has begun to learn. What the pages promise, they assert when built.
REDUCED = {
    "gpt": (
        {
            "STEPS, BATCH, LENGTH = 150, 16, 256": "STEPS, BATCH, LENGTH = 20, 16, 64",
            "FEATURES = 4, 256": "FEATURES = 2, 64",
        },
        "losses[-1] < 5.5 < 7.9 < losses[0] < 8.1 and result < 5.5",
    ),
    "digits": (
        {"EPOCHS, BATCH = 60, 64": "EPOCHS, BATCH = 3, 64", "features=128": "features=32"},
        "accuracy > 0.2 and value < 2.25",
    ),
    "translation": (
        {
            "EPOCHS, BATCH = 24, 64": "EPOCHS, BATCH = 1, 64",
            "exact(training), exact(held_out)": "exact(training[:9]), exact(held_out[:9])",
        },
        "value < 6.5 and len(translated(['Iceland'])) == 1",
    ),
    "masked": (
        {"STEPS, BATCH, LENGTH = 250, 16, 256": "STEPS, BATCH, LENGTH = 20, 8, 64", "features=192": "features=64"},
        "loss < 4.5",
    ),
    "flow": (
        {"STEPS, BATCH = 1600, 64": "STEPS, BATCH = 40, 32", "Velocity(128, 4,": "Velocity(32, 2,"},
        "value < 1 and np.isfinite(drawn).all()",
    ),
}


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
