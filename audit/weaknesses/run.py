"""Run every row of rows.toml, and show which are right."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from syncbn.conformance import ConformanceError, runner, targets
from syncbn.conformance.cases import catalogue
from syncbn.conformance.pool import RankPool

try:
    import tomllib  # type: ignore[import-not-found]
except ModuleNotFoundError:  # before Python 3.11, where pytest installs its predecessor
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
_FILE = Path(__file__).with_name("rows.toml")
_RANKS = 4  # of the cases


class RowError(ConformanceError, ValueError):
    """A row that names a test or a case that does not exist."""


@dataclass(frozen=True)
class Row:
    """Something that was tried.

    table: vendor, gate or attacker.
    did: what was done.
    right: what must happen.
    tests: the tests that do it now, as pytest names them, without parameters.
    cases: by clause, the beginning of the titles of cases of `certify` that do it now. Our layer
        must pass them; that a wrong one does not is the business of the mutants.
    """

    table: str
    did: str
    right: str
    tests: tuple[str, ...] = ()
    cases: Mapping[str, str] = field(default_factory=dict)

    @property
    def ids(self) -> list[str]:
        """The ids of the cases."""
        return [id for clause, start in self.cases.items() for id in _ids_of(clause, start)]


def load(path: Path = _FILE) -> list[Row]:
    """The rows of the file.

    Raises:
        RowError: a row names nothing that tries it, or something that does not exist.
    """
    document = tomllib.loads(path.read_text(encoding="utf-8"))
    rows = [
        Row(table, one["did"], one["right"], tuple(one.get("tests", ())), one.get("cases", {}))
        for table, ones in document.items()
        for one in ones
    ]
    for row in rows:
        if not row.tests and not row.cases:
            raise RowError(f"{row.did!r}: must name a test or a case")
        for test in row.tests:
            if test not in _tests_of(ROOT / test.partition("::")[0]):
                raise RowError(f"{row.did!r}: there is no test {test}")
        for clause, start in row.cases.items():
            if not _ids_of(clause, start):
                raise RowError(f"{row.did!r}: {clause} has no case {start!r}")
    return rows


def main(console: Console) -> int:
    """Exit status: 0 if every row is right, 1 if one is wrong or was not tried here."""
    rows = load()
    found = _run(sorted({test for row in rows for test in row.tests}))
    found |= _run_cases(sorted({id for row in rows for id in row.ids}))
    counts = dict.fromkeys(("right", "WRONG", "not tried"), 0)
    for row in rows:
        tried = [*row.tests, *row.ids]
        outcomes = [found.get(one, "failed") for one in tried]
        verdict = "WRONG" if "failed" in outcomes else "right"
        if verdict == "right" and any(one != "passed" for one in outcomes):
            verdict = "not tried"
        counts[verdict] += 1
        console.print(f"{row.table:<8}  {verdict:<9}  {row.did}", markup=False, highlight=False)
        for one, outcome in zip(tried, outcomes, strict=True):
            if outcome != "passed":
                console.print(f"    {one}: {outcome}", markup=False, highlight=False)
    text = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    console.print(f"{len(rows)} rows: {text}", highlight=False)
    return 0 if counts["right"] == len(rows) else 1


def _run(tests: Sequence[str]) -> dict[str, str]:
    """By test: passed, failed, or why it was skipped."""
    with tempfile.TemporaryDirectory(prefix="syncbn-weaknesses-") as folder:
        path = Path(folder, "tests.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        subprocess.run(
            [*command, f"--junitxml={path}", *tests], cwd=ROOT, check=False, stdout=sys.stderr
        )
        return outcomes(ET.parse(path).getroot()) if path.exists() else {}


def _run_cases(ids: Sequence[str]) -> dict[str, str]:
    """By case: passed, or failed."""
    with RankPool(targets.parse("syncbn.torch"), _RANKS) as pool:
        cases = [case for case in catalogue(_RANKS, "certify") if case.id in ids]
        results = runner.run(pool, cases, lambda _: None)
    passed = {result.case.id for result in results if result.verdict.verdict == "pass"}
    return {id: "passed" if id in passed else "failed" for id in ids}


def outcomes(root: ET.Element) -> dict[str, str]:
    """By test, the worst outcome of its parameters in a file of JUnit."""
    found: dict[str, str] = {}
    for one in root.iter("testcase"):
        module = re.match(r"(tests(?:\.\w+)*?\.test_\w+)(.*)", one.get("classname", ""))
        if module is None:
            continue
        name = one.get("name", "").partition("[")[0]
        inner = module[2].strip(".").split(".") if module[2] else []
        node = "::".join([module[1].replace(".", "/") + ".py", *inner, name])
        outcome, skipped = "passed", one.find("skipped")
        if skipped is not None:
            outcome = f"skipped: {skipped.get('message')}"
        if one.find("failure") is not None or one.find("error") is not None:
            outcome = "failed"
        found[node] = max(found.get(node, outcome), outcome, key=_badness)
    return found


def _ids_of(clause: str, start: str) -> list[str]:
    cases = [case for case in catalogue(_RANKS, "certify") if case.clause == clause]
    return [case.id for case in cases if case.title.startswith(start)]


def _badness(outcome: str) -> int:
    return {"passed": 0, "failed": 2}.get(outcome, 1)


def _tests_of(path: Path) -> set[str]:
    """The names of the tests of a file, as pytest names them, without parameters."""
    if not path.is_file():
        return set()
    file, found = path.relative_to(ROOT).as_posix(), set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        inner = node.body if isinstance(node, ast.ClassDef) else [node]
        start = f"{file}::{node.name}" if isinstance(node, ast.ClassDef) else file
        found |= {f"{start}::{one.name}" for one in inner if isinstance(one, ast.FunctionDef)}
    return found
