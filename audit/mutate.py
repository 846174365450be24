"""Mutants that nobody planned: random changes to the source of syncbn.torch, and their fate.

A mutant is a copy of `syncbn/` with one change in one function. The ranks import the copy; the
controller, which judges, keeps the layer and the suite as they are. The kind `swap`, two statements
of one body that change places, asks the suite for faults like those of somebody else's hand; the
other kinds are the usual operators of mutation testing (DeMillo, Lipton and Sayward, Computer 11,
1978). A mutant that survives is either equivalent to the layer, or shows a gap of the suite.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import itertools
import json
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from rich import box
from rich.console import Console
from rich.table import Table

from syncbn.conformance import ConformanceError, runner, targets
from syncbn.conformance.case import Case
from syncbn.conformance.cases import catalogue
from syncbn.conformance.pool import RankPool
from syncbn.conformance.targets import Target, TargetError
from syncbn.conformance.verdict import Verdict

_ROOT = Path(__file__).resolve().parent.parent
# What a step on CPU runs of the layer; the other backends have suites of their own.
FILES = (
    "syncbn/contract.py",
    "syncbn/protocol.py",
    "syncbn/torch/backends/composed.py",
    "syncbn/torch/step.py",
    "syncbn/torch/functional.py",
    "syncbn/torch/groups.py",
    "syncbn/torch/layer.py",
)

_PATIENCE_SECONDS = 5.0  # for a case; a hang is believed only if it lasts the case's own deadline

_DRAWS_EACH = 20  # before fewer mutants are taken than were asked for

# The ranks load this file, next to the copy, as the module of the target. The suite stays as it is.
_ENTRY = """
import sys
from pathlib import Path

import syncbn

COPY = Path(__file__).resolve().parent
syncbn.__path__.insert(0, str(COPY / "syncbn"))
for name in ("contract", "protocol"):
    del sys.modules[f"syncbn.{name}"]
    delattr(syncbn, name)
import syncbn.torch

for module in (syncbn.torch, sys.modules["syncbn.contract"], sys.modules["syncbn.protocol"]):
    if not Path(module.__file__).is_relative_to(COPY):
        raise ImportError(f"{module.__name__} must be that of {COPY}, got {module.__file__}")
SyncBatchNorm = syncbn.torch.SyncBatchNorm
"""


# Changes


class Edit(NamedTuple):
    """`by` takes the place of the bytes from start to end."""

    start: int
    end: int
    by: bytes


class _Source:
    """A file, and where the nodes of its syntax tree stand; ast counts in bytes."""

    def __init__(self, text: bytes) -> None:
        self.text = text
        lengths = (len(line) for line in text.splitlines(keepends=True))
        self._starts = [0, *itertools.accumulate(lengths)]

    def span(self, node: Any) -> tuple[int, int]:
        start = self._starts[node.lineno - 1] + node.col_offset
        return start, self._starts[node.end_lineno - 1] + node.end_col_offset

    def of(self, node: ast.AST) -> bytes:
        start, end = self.span(node)
        return self.text[start:end]

    def replaced(self, node: ast.AST, by: bytes) -> list[Edit]:
        return [Edit(*self.span(node), by)]

    def exchanged(self, one: ast.AST, other: ast.AST) -> list[Edit]:
        return self.replaced(one, self.of(other)) + self.replaced(other, self.of(one))

    def after(self, edits: list[Edit]) -> bytes:
        text = self.text
        for start, end, by in sorted(edits, reverse=True):
            text = text[:start] + by + text[end:]
        return text


Kind: TypeAlias = Callable[[ast.AST, _Source], Iterator[list[Edit]]]


def _swap(function: ast.AST, source: _Source) -> Iterator[list[Edit]]:
    """Two statements of one body change places; a compound one takes its own body along."""
    for body in _bodies(function):
        for one, other in itertools.combinations(body, 2):
            yield source.exchanged(one, other)


def _drop(function: ast.AST, source: _Source) -> Iterator[list[Edit]]:
    for statement in itertools.chain.from_iterable(_bodies(function)):
        yield source.replaced(statement, b"pass")


def _arguments(function: ast.AST, source: _Source) -> Iterator[list[Edit]]:
    """Two positional arguments of a call change places."""
    for node in _walk(function):
        if isinstance(node, ast.Call):
            for one, other in itertools.combinations(node.args, 2):
                yield source.exchanged(one, other)


_OPPOSITES = (
    ((ast.Add, b"+"), (ast.Sub, b"-")),
    ((ast.Mult, b"*"), (ast.Div, b"/")),
    ((ast.Lt, b"<"), (ast.LtE, b"<=")),
    ((ast.Gt, b">"), (ast.GtE, b">=")),
    ((ast.Eq, b"=="), (ast.NotEq, b"!=")),
    ((ast.And, b"and"), (ast.Or, b"or")),
)
# The symbol of an operator, and what takes its place.
_SYMBOLS: dict[type[ast.AST], tuple[bytes, bytes]] = {
    operator: (symbol, other)
    for pair in _OPPOSITES
    for (operator, symbol), (_, other) in (pair, pair[::-1])
}


def _operator(function: ast.AST, source: _Source) -> Iterator[list[Edit]]:
    """An operator becomes its opposite, or its neighbour."""
    for left, operator, right in _operations(function):
        if type(operator) in _SYMBOLS:
            symbol, other = _SYMBOLS[type(operator)]
            at = source.text.index(symbol, source.span(left)[1], source.span(right)[0])
            yield [Edit(at, at + len(symbol), other)]


def _operations(function: ast.AST) -> Iterator[tuple[ast.AST, ast.AST, ast.AST]]:
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


def _negate(function: ast.AST, source: _Source) -> Iterator[list[Edit]]:
    """A condition becomes its contrary."""
    for node in _walk(function):
        if isinstance(node, (ast.If, ast.IfExp, ast.While)):
            yield source.replaced(node.test, b"(not (" + source.of(node.test) + b"))")


def _constant(function: ast.AST, source: _Source) -> Iterator[list[Edit]]:
    """A number becomes the next one, True becomes False."""
    for node in _walk(function):
        if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
            value = node.value
            other = not value if isinstance(value, bool) else value + 1
            yield source.replaced(node, repr(other).encode())


KINDS: dict[str, Kind] = {
    "swap": _swap,
    "arguments": _arguments,
    "operator": _operator,
    "drop": _drop,
    "negate": _negate,
    "constant": _constant,
}


def _bodies(function: ast.AST) -> Iterator[list[ast.stmt]]:
    """Every block of statements, without its docstring."""
    for node in _walk(function):
        for name in ("body", "orelse", "finalbody"):
            block = getattr(node, name, None)
            if isinstance(block, list):
                yield [statement for statement in block if not _is_string(statement)]


def _is_string(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    """As ast.walk, but not into f-strings, where Python before 3.12 counts columns wrongly."""
    yield node
    if not isinstance(node, ast.JoinedStr):
        for child in ast.iter_child_nodes(node):
            yield from _walk(child)


# Mutants


class MutateError(ConformanceError, RuntimeError):
    """Mutants cannot be judged; the text says why."""


@dataclass(frozen=True)
class Mutant:
    """A file of the layer, `text` as it becomes, and what was changed: line, function and kind."""

    path: str
    function: str
    line: int
    kind: str
    text: bytes
    diff: tuple[str, ...]

    @property
    def id(self) -> str:
        """8 hexadecimal digits of the SHA-256 of the path and the text."""
        return hashlib.sha256(self.path.encode() + self.text).hexdigest()[:8]


def draw(count: int, seed: int, kinds: Sequence[str]) -> list[Mutant]:
    """Different mutants, `count` of them or as many as there are to be found by drawing.

    Each time a kind is drawn, and then one of all places that it applies to. A change that Python
    would not compile, or that leaves the syntax tree as it was, is no mutant.
    """
    rng = random.Random(seed)
    places = {kind: list(_places(kind)) for kind in kinds}
    found: dict[str, Mutant] = {}
    for _ in range(_DRAWS_EACH * count):
        mutant = _mutant(*rng.choice(places[rng.choice(list(kinds))]))
        if mutant is not None:
            found.setdefault(mutant.id, mutant)
        if len(found) == count:
            break
    return list(found.values())


def _places(kind: str) -> Iterator[tuple[str, str, str, _Source, list[Edit]]]:
    for path in FILES:
        source = _Source((_ROOT / path).read_bytes())
        for node in ast.walk(ast.parse(source.text)):
            if isinstance(node, ast.FunctionDef):
                for edits in KINDS[kind](node, source):
                    yield path, node.name, kind, source, edits


def _mutant(
    path: str, function: str, kind: str, source: _Source, edits: list[Edit]
) -> Mutant | None:
    text = source.after(edits)
    try:
        compile(text, path, "exec")
    except SyntaxError:
        return None
    if ast.dump(ast.parse(text)) == ast.dump(ast.parse(source.text)):
        return None
    line = source.text.count(b"\n", 0, min(edits).start) + 1
    before, after = (t.decode().splitlines() for t in (source.text, text))
    _, _, *diff = difflib.unified_diff(before, after, n=1, lineterm="")
    return Mutant(path, function, line, kind, text, tuple(diff))


# Their fate


@dataclass(frozen=True)
class Kill:
    """What gave a mutant away: a case, or none if the layer could not even be loaded.

    how is "wrong" for a number or a fact, or "raised", "hang", "crash" or "load".
    """

    how: str
    case: Case | None
    message: str


@dataclass(frozen=True)
class Fate:
    """What killed a mutant, None if it survived."""

    mutant: Mutant
    kill: Kill | None
    seconds: float

    @property
    def how(self) -> str:
        return self.kill.how if self.kill else "survived"


def run(
    count: int = 20,
    seed: int = 0,
    kinds: Sequence[str] = ("swap",),
    ranks: int = 4,
    profile: str = "certify",
    progress: Callable[[Fate], None] = lambda fate: None,
) -> list[Fate]:
    """Draw mutants and put each to the suite, up to its first kill.

    Raises:
        MutateError: the copy without any change does not pass, so no kill would mean anything.
    """
    # The first case of every clause goes first: most mutants need no more.
    smoke, rest = catalogue(ranks, "smoke"), catalogue(ranks, profile)
    cases = list({case.id: case for case in (*smoke, *rest)}.values())
    with _copy() as target:
        if kill := next(_kills(target, cases), None):
            raise MutateError(f"a copy of the layer does not pass the suite: {kill}")
    fates = []
    for mutant in draw(count, seed, kinds):
        start = time.monotonic()
        with _copy(mutant) as target:
            kill = next(_kills(target, cases), None)
        fates.append(Fate(mutant, kill, time.monotonic() - start))
        progress(fates[-1])
    return fates


@contextmanager
def _copy(mutant: Mutant | None = None) -> Iterator[Target]:
    """The layer of a copy of syncbn/torch, as a target; _ENTRY makes sure that it is no other."""
    with tempfile.TemporaryDirectory(prefix="syncbn-mutant-") as name:
        folder = Path(name)
        skipped = shutil.ignore_patterns("__pycache__")
        shutil.copytree(_ROOT / "syncbn/torch", folder / "syncbn/torch", ignore=skipped)
        for file in ("contract.py", "protocol.py"):
            shutil.copy(_ROOT / "syncbn" / file, folder / "syncbn")
        if mutant is not None:
            (folder / mutant.path).write_bytes(mutant.text)
        entry = folder / "entry.py"
        entry.write_text(_ENTRY)
        layer = targets.parse("syncbn.torch")
        yield replace(layer, name="a copy of syncbn.torch", module=str(entry))


def _kills(target: Target, cases: Sequence[Case]) -> Iterator[Kill]:
    with RankPool(target, cases[0].ranks) as pool:
        try:
            for case in cases:
                found = _judge(pool, case)
                if found.verdict != "pass":
                    how = found.verdict if found.verdict in ("hang", "crash") else "wrong"
                    yield Kill("raised" if found.raised else how, case, found.message or "")
        except TargetError as error:
            yield Kill("load", None, str(error))


def _judge(pool: RankPool, case: Case) -> Verdict:
    hasty = replace(case, deadline=min(case.deadline, _PATIENCE_SECONDS))
    found = runner.run_case(pool, hasty).verdict
    return runner.run_case(pool, case).verdict if found.verdict == "hang" else found


# What is shown


def document(fates: Sequence[Fate]) -> list[dict[str, Any]]:
    """The fates as JSON values."""
    return [
        {
            "id": fate.mutant.id,
            "file": fate.mutant.path,
            "line": fate.mutant.line,
            "function": fate.mutant.function,
            "kind": fate.mutant.kind,
            "diff": list(fate.mutant.diff),
            "fate": fate.how,
            "clause": fate.kill and fate.kill.case and fate.kill.case.clause,
            "case": fate.kill and fate.kill.case and fate.kill.case.id,
            "message": fate.kill and fate.kill.message,
            "seconds": round(fate.seconds, 1),
        }
        for fate in fates
    ]


def summarize(fates: Sequence[Fate], console: Console) -> None:
    """Print a row per mutant, the diffs of the survivors, and the kill rate of each kind."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column in ("mutant", "place", "function", "kind", "fate", "clause", "case"):
        table.add_column(column, no_wrap=True)
    for fate in fates:
        mutant = fate.mutant
        case = fate.kill.case if fate.kill else None
        table.add_row(
            mutant.id,
            f"{mutant.path}:{mutant.line}",
            mutant.function,
            mutant.kind,
            fate.how,
            case.clause if case else "",
            case.id if case else "",
        )
    console.print(table)
    for fate in fates:
        if fate.kill is None:
            mutant = fate.mutant
            console.print(f"\nsurvived: {mutant.id} {mutant.path}:{mutant.line} ({mutant.kind})")
            console.print("\n".join(mutant.diff), markup=False, highlight=False, soft_wrap=True)
    console.print()
    for kind in dict.fromkeys(fate.mutant.kind for fate in fates):
        hows = Counter(fate.how for fate in fates if fate.mutant.kind == kind)
        killed = hows.total() - hows["survived"]
        listed = ", ".join(f"{how} {n}" for how, n in hows.most_common())
        console.print(f"{kind}: {killed} of {hows.total()} killed ({listed})", highlight=False)


def main(
    count: int = 20,
    seed: int = 0,
    kinds: Sequence[str] = ("swap",),
    ranks: int = 4,
    profile: str = "certify",
    out: Path = Path("reports/out/mutate.json"),
) -> int:
    """The command: exit status 0 whatever survives, for a random mutant may be an equivalent."""
    notes = Console(stderr=True)

    def progress(fate: Fate) -> None:
        notes.print(f"{fate.mutant.id} {fate.how} in {fate.seconds:.0f} s", highlight=False)

    fates = run(count, seed, kinds, ranks, profile, progress=progress)
    summarize(fates, Console(width=120))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(document(fates), indent=1) + "\n")
    print(f"report: {out}")
    return 0
