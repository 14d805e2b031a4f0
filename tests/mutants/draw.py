"""What may be changed in a file, one operator or number at a time, and which of it is drawn. Runs nothing."""

import ast
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).parent.parent.parent / "attnjax"
ENGINE = (
    "masks.py",
    "core/mask.py",
    "core/softmax.py",
    "core/walk.py",
    "core/sweep.py",
    "core/transforms.py",
    "core/blocks.py",
    "scores.py",
    "core/split.py",
    "core/dispatch.py",
)
NATIVE = tuple(sorted(f"kernels/native/{path.name}" for path in (PACKAGE / "kernels/native").glob("*.h")))

_SWAPPED = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "+": "-", "-": "+", "*": "+", "/": "*"}
_PYTHON = _SWAPPED | {"is": "is not", "in": "not in", "and": "or", "or": "and"}
_PYTHON |= {"//": "*", "%": "//", "&": "|", "|": "&"}
_CPP = _SWAPPED | {"%": "/", "&&": "||", "||": "&&"}
# clang-format puts spaces around operators with two sides, and around no other `<` or `*`.
_IN_CPP = re.compile(r" (<=|>=|==|!=|<|>|\+|-|\*|/|%|&&|\|\|) ")


class Mutant(NamedTuple):
    """One change: in this line (from 1), from this column on, `before` becomes `after`."""

    path: str
    line: int
    column: int
    before: str
    after: str

    def __str__(self) -> str:
        text = (PACKAGE / self.path).read_text().splitlines()[self.line - 1].strip()
        return f"{self.path}:{self.line}: {self.before} -> {self.after or 'nothing'} in `{text}`"

    def applied(self, source: str) -> str:
        """The source of the file with this change."""
        lines = source.splitlines(keepends=True)
        line = lines[self.line - 1]
        end = self.column + len(self.before)
        assert line[self.column : end] == self.before
        lines[self.line - 1] = line[: self.column] + self.after + line[end:]
        return "".join(lines)


def drawn(paths: tuple[str, ...], count: int, seed: int) -> list[Mutant]:
    """So many mutants, each file as often as the others while it has some left."""
    rng = random.Random(seed)
    left = [rng.sample(found, len(found)) for found in map(candidates, paths)]
    made: list[Mutant] = []
    while len(made) < count and any(left):
        made += [some.pop() for some in left if some]
    return made[:count]


def candidates(path: str) -> list[Mutant]:
    """Everything that may be changed in a file."""
    source = (PACKAGE / path).read_text()
    found = _python(source) if path.endswith(".py") else _cpp(source)
    return [Mutant(path, *change) for change in found]


def _python(source: str) -> Iterator[tuple[int, int, str, str]]:
    """Changes inside functions, but for messages of errors, annotations and defaults."""
    lines = source.splitlines()
    for node in _computing(ast.parse(source)):
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            yield from _between(lines, node.left, node.comparators[0])
        elif isinstance(node, ast.BinOp):
            yield from _between(lines, node.left, node.right)
        elif isinstance(node, ast.BoolOp):
            yield from _between(lines, node.values[0], node.values[1])
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.Invert)):
            yield node.lineno, node.col_offset, "not " if isinstance(node.op, ast.Not) else "~", ""
        elif isinstance(node, ast.Constant) and type(node.value) is int:
            text = lines[node.lineno - 1][node.col_offset : node.end_col_offset]
            yield node.lineno, node.col_offset, text, str(node.value + 1)


def _computing(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes of statements in functions."""
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            waiting: list[ast.AST] = list(function.body)
            while waiting:
                node = waiting.pop()
                if isinstance(node, (ast.Raise, ast.Assert, ast.JoinedStr, ast.FunctionDef)):
                    continue
                yield node
                skipped = {getattr(node, "annotation", None)}
                waiting += [child for child in ast.iter_child_nodes(node) if child not in skipped]


def _between(lines: list[str], left: ast.expr, right: ast.expr) -> Iterator[tuple[int, int, str, str]]:
    """The operator between two operands that stand in one line."""
    start = left.end_col_offset or 0
    gap = lines[right.lineno - 1][start : right.col_offset]
    operator = gap.strip(" ()")
    if left.end_lineno == right.lineno and operator in _PYTHON:
        yield right.lineno, start + gap.index(operator), operator, _PYTHON[operator]


def _cpp(source: str) -> Iterator[tuple[int, int, str, str]]:
    """Changes of operators with two sides, outside of comments and directives."""
    for number, line in enumerate(source.splitlines(), 1):
        code = line.partition("//")[0]
        if code.lstrip().startswith(("#", "*", "/*", "template", "static_assert")) or '"' in code:
            continue
        for match in _IN_CPP.finditer(code):
            yield number, match.start(1), match[1], _CPP[match[1]]
