"""The tables of files on the contributors' page, printed from the files themselves. Only that page uses it."""

import ast
import sys
from collections.abc import Iterable
from pathlib import Path

from IPython.display import Markdown

TESTS = Path(__file__).parent.parent / "tests"
sys.path.insert(0, str(TESTS))

from staircase import PACKAGE, STEPS, name_of  # noqa: E402


def staircase() -> Markdown:
    """Step, file and first sentence of every file of the package, from the door down."""
    step = {name: number for number, names in enumerate(STEPS) for name in names}
    files = [path for path in PACKAGE.rglob("*.py") if name_of(path) in step]
    files.sort(key=lambda path: (-step[name_of(path)], path))
    rows = [(str(step[name_of(path)]), f"`{path.relative_to(PACKAGE)}`", _sentence(path)) for path in files]
    return _table(("step", "file", "holds"), rows)


def tests() -> Markdown:
    """File and first sentence of every file of the tests."""
    return _table(("file", "holds"), [(f"`{p.relative_to(TESTS)}`", _sentence(p)) for p in sorted(TESTS.rglob("*.py"))])


def _sentence(path: Path) -> str:
    """The first sentence of a file."""
    text = " ".join(ast.get_docstring(ast.parse(path.read_text())).split())
    return text.partition(". ")[0].rstrip(".").replace("|", "\\|").replace("*", "\\*")


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> Markdown:
    line = lambda cells: f"| {' | '.join(cells)} |"
    return Markdown("\n".join([line(head), line("---" for _ in head), *map(line, rows)]))
