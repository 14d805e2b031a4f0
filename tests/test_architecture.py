"""The staircase of the package: who may import whom, and what `import attnjax` may load. Runs no attention."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from staircase import PACKAGE, STEPS, name_of

import attnjax
from attnjax.core.dispatch import KERNELS, parts_of

STEP = {name: number for number, names in enumerate(STEPS) for name in names}


def imports(path: Path) -> set[str]:
    """The modules of attnjax that a file imports, at its top or anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "attnjax":
            module = node.module.removeprefix("attnjax").removeprefix(".")
            folder = PACKAGE.joinpath(*module.split(".")) if module else PACKAGE
            names |= {f"{module}.{a.name}".removeprefix(".") for a in node.names} if folder.is_dir() else {module}
        elif isinstance(node, ast.Import):
            names |= {a.name.removeprefix("attnjax.") for a in node.names if a.name.split(".")[0] == "attnjax"}
    return {"bench" if name.split(".")[0] == "bench" else name for name in names}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down_the_staircase(path):
    own = name_of(path)
    if own in ("core", "kernels"):
        assert imports(path) == set()
        return
    for other in imports(path) - ({"bench"} if own == "bench" else set()):
        assert STEP[other] < STEP[own], f"{own} imports {other}, which is not below it"


def test_kernels_are_files():
    assert {p.stem for p in (PACKAGE / "kernels").glob("*.py")} - {"__init__"} == set(KERNELS)
    for name, kernel in KERNELS.items():
        assert kernel.__name__ == f"attnjax.kernels.{name}"
        parts = set(parts_of(name)) - {"higher"}
        assert all(callable(getattr(kernel, f)) for f in ("unsupported", "blocks", "temporary_bytes", *parts))


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_are_short_and_say_what_they_are(path):
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text))
    assert text.count("\n") <= 600


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_house_rules_that_can_be_read_off(path):
    """Imports by full name (others would pass by the staircase), no environment variables, no silent except."""
    assert path.stem not in ("utils", "util", "helpers", "common", "misc")
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
        if isinstance(node, ast.Attribute):
            assert node.attr not in ("environ", "getenv"), f"line {node.lineno}: behaviour from the environment"
        if isinstance(node, ast.ExceptHandler):
            silent = all(isinstance(line, (ast.Pass, ast.Continue)) for line in node.body)
            assert node.type is not None and not silent, f"line {node.lineno}: an error that nobody hears of"


PUBLIC = sorted(name for name in vars(attnjax) if not name.startswith("_"))


@pytest.mark.parametrize("name", [n for n in PUBLIC if not inspect.ismodule(getattr(attnjax, n))])
def test_public_names_are_explained_by_example(name):
    text = inspect.getdoc(getattr(attnjax, name)) or ""
    assert text.strip()
    if name not in ("Mask", "Score", "Explanation"):  # bases and results: their examples are elsewhere
        assert ">>>" in text


LOADED = """
import sys
import attnjax
heavy = ("flax", "matplotlib", "optax", "chex", "torch", "jax.experimental.pallas", "rich", "attnjax.bench")
print([m for m in heavy if m in sys.modules])
from jax._src import xla_bridge
print(list(xla_bridge._backends))
"""


def test_import_is_light_and_touches_no_device():
    run = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert run.stdout.split() == ["[]", "[]"]
