"""The kinds of change: each yields all changes of its kind to the source of one function."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias


class Edit(NamedTuple):
    """The bytes from `start` to `end` are replaced by `by`."""

    start: int
    end: int
    by: bytes


class Source:
    """The text of a file, and the positions of its syntax nodes; `ast` counts columns in bytes."""

    def __init__(self, text: bytes) -> None:
        self.text = text
        lengths = (len(line) for line in text.splitlines(keepends=True))
        self._line_starts = [0, *itertools.accumulate(lengths)]

    def span(self, node: Any) -> tuple[int, int]:
        """Start and end of the node in bytes."""
        start = self._line_starts[node.lineno - 1] + node.col_offset
        return start, self._line_starts[node.end_lineno - 1] + node.end_col_offset

    def of(self, node: ast.AST) -> bytes:
        start, end = self.span(node)
        return self.text[start:end]

    def replace(self, node: ast.AST, by: bytes) -> list[Edit]:
        return [Edit(*self.span(node), by)]

    def exchange(self, first: ast.AST, second: ast.AST) -> list[Edit]:
        return self.replace(first, self.of(second)) + self.replace(second, self.of(first))

    def apply(self, edits: list[Edit]) -> bytes:
        """The text after the edits, which do not overlap."""
        text = self.text
        for start, end, by in sorted(edits, reverse=True):
            text = text[:start] + by + text[end:]
        return text


Kind: TypeAlias = Callable[[ast.AST, Source], Iterator[list[Edit]]]


def _swap(function: ast.AST, source: Source) -> Iterator[list[Edit]]:
    """Two statements of one block change places; a compound statement takes its block along."""
    for block in _blocks(function):
        for first, second in itertools.combinations(block, 2):
            yield source.exchange(first, second)


def _drop(function: ast.AST, source: Source) -> Iterator[list[Edit]]:
    """A statement becomes `pass`."""
    for statement in itertools.chain.from_iterable(_blocks(function)):
        yield source.replace(statement, b"pass")


def _arguments(function: ast.AST, source: Source) -> Iterator[list[Edit]]:
    """Two positional arguments of a call change places."""
    for node in _walk(function):
        if isinstance(node, ast.Call):
            for first, second in itertools.combinations(node.args, 2):
                yield source.exchange(first, second)


_OPPOSITES = (
    ((ast.Add, b"+"), (ast.Sub, b"-")),
    ((ast.Mult, b"*"), (ast.Div, b"/")),
    ((ast.Lt, b"<"), (ast.LtE, b"<=")),
    ((ast.Gt, b">"), (ast.GtE, b">=")),
    ((ast.Eq, b"=="), (ast.NotEq, b"!=")),
    ((ast.And, b"and"), (ast.Or, b"or")),
)
# By operator: its symbol, and the symbol that replaces it.
_SYMBOLS: dict[type[ast.AST], tuple[bytes, bytes]] = {
    operator: (symbol, other)
    for pair in _OPPOSITES
    for (operator, symbol), (_, other) in (pair, pair[::-1])
}


def _operator(function: ast.AST, source: Source) -> Iterator[list[Edit]]:
    """An operator becomes its opposite, or its neighbour."""
    for left, operator, right in _operations(function):
        if type(operator) in _SYMBOLS:
            symbol, other = _SYMBOLS[type(operator)]
            at = source.text.index(symbol, source.span(left)[1], source.span(right)[0])
            yield [Edit(at, at + len(symbol), other)]


def _operations(function: ast.AST) -> Iterator[tuple[ast.AST, ast.AST, ast.AST]]:
    """Left operand, operator and right operand of each operation with two operands."""
    for node in _walk(function):
        if isinstance(node, ast.BinOp):
            yield node.left, node.op, node.right
        elif isinstance(node, ast.BoolOp):
            for left, right in itertools.pairwise(node.values):
                yield left, node.op, right
        elif isinstance(node, ast.Compare):
            operands = itertools.pairwise([node.left, *node.comparators])
            for (left, right), operator in zip(operands, node.ops, strict=True):
                yield left, operator, right


def _negate(function: ast.AST, source: Source) -> Iterator[list[Edit]]:
    """A condition is negated."""
    for node in _walk(function):
        if isinstance(node, (ast.If, ast.IfExp, ast.While)):
            yield source.replace(node.test, b"(not (" + source.of(node.test) + b"))")


def _constant(function: ast.AST, source: Source) -> Iterator[list[Edit]]:
    """A number becomes the next one; True becomes False, and False becomes True."""
    for node in _walk(function):
        if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
            value = node.value
            other = not value if isinstance(value, bool) else value + 1
            yield source.replace(node, repr(other).encode())


KINDS: dict[str, Kind] = {
    "swap": _swap,
    "arguments": _arguments,
    "operator": _operator,
    "drop": _drop,
    "negate": _negate,
    "constant": _constant,
}


def _blocks(function: ast.AST) -> Iterator[list[ast.stmt]]:
    """Every block of statements, without its docstring."""
    for node in _walk(function):
        for name in ("body", "orelse", "finalbody"):
            block = getattr(node, name, None)
            if isinstance(block, list):
                yield [statement for statement in block if not _is_docstring(statement)]


def _is_docstring(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    """Like ast.walk, but not into f-strings: Python before 3.12 counts their columns wrongly."""
    yield node
    if not isinstance(node, ast.JoinedStr):
        for child in ast.iter_child_nodes(node):
            yield from _walk(child)
