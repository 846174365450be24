"""Draws mutants: copies of a file of the layer with one change in one function."""

from __future__ import annotations

import ast
import difflib
import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from audit.mutate.changes import KINDS, Edit, Source

ROOT = Path(__file__).resolve().parents[2]
# Modules without a part in a step on CPU. The other backends have suites of their own.
_NOT_IN_A_STEP = ("syncbn/backends.py", "syncbn/extras.py", "syncbn/torch/convert.py")

_DRAWS_PER_MUTANT = 20  # after that many draws for each, fewer mutants than wanted are returned


@dataclass(frozen=True)
class Mutant:
    """One changed file.

    path: of the file, relative to the repository.
    function: the name of the function that the change is in.
    line: the first changed line.
    kind: one of KINDS.
    text: the whole file after the change.
    diff: the lines of a unified diff.
    """

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


class _Place(NamedTuple):
    """A possible change: `edits` in a function of a file."""

    path: str
    function: str
    kind: str
    source: Source
    edits: list[Edit]


def draw(count: int, seed: int, kinds: Sequence[str]) -> list[Mutant]:
    """Draw `count` different mutants, or fewer if there are not that many.

    Each draw takes a kind, and then one of all places to which it applies. A change is no mutant
    if Python does not compile it, or if the syntax tree stays as it was.
    """
    rng = random.Random(seed)
    places = {kind: list(_places(kind)) for kind in kinds}
    mutants: dict[str, Mutant] = {}
    for _ in range(_DRAWS_PER_MUTANT * count):
        mutant = _mutant(rng.choice(places[rng.choice(list(kinds))]))
        if mutant is not None:
            mutants.setdefault(mutant.id, mutant)
        if len(mutants) == count:
            break
    return list(mutants.values())


def files() -> list[str]:
    """The modules that a step on CPU runs, relative to the repository."""
    modules = [
        *(ROOT / "syncbn").glob("[!_]*.py"),
        *(ROOT / "syncbn/torch").glob("[!_]*.py"),
        ROOT / "syncbn/torch/backends/composed.py",
    ]
    paths = [module.relative_to(ROOT).as_posix() for module in modules]
    return sorted(path for path in paths if path not in _NOT_IN_A_STEP)


def _places(kind: str) -> Iterator[_Place]:
    for path in files():
        source = Source((ROOT / path).read_bytes())
        for node in ast.walk(ast.parse(source.text)):
            if isinstance(node, ast.FunctionDef):
                for edits in KINDS[kind](node, source):
                    yield _Place(path, node.name, kind, source, edits)


def _mutant(place: _Place) -> Mutant | None:
    path, function, kind, source, edits = place
    text = source.apply(edits)
    try:
        compile(text, path, "exec")
    except SyntaxError:
        return None
    if ast.dump(ast.parse(text)) == ast.dump(ast.parse(source.text)):
        return None
    line = source.text.count(b"\n", 0, min(edits).start) + 1
    before, after = (version.decode().splitlines() for version in (source.text, text))
    _, _, *diff = difflib.unified_diff(before, after, n=1, lineterm="")
    return Mutant(path, function, line, kind, text, tuple(diff))
