"""Every row of the tables is tried by something that exists, and only what ran counts as right."""

from __future__ import annotations

import io
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from rich.console import Console

from audit.weaknesses import run
from audit.weaknesses.run import RowError, load, outcomes
from syncbn.conformance import targets

JUNIT = """
<testsuites><testsuite>
<testcase classname="tests.audit.test_x" name="test_a[1]"/>
<testcase classname="tests.audit.test_x" name="test_a[2]"><failure message="no"/></testcase>
<testcase classname="tests.audit.test_x.TestC" name="test_b"><skipped message="no JAX"/></testcase>
<testcase classname="tests.audit.test_x" name="test_c"/>
</testsuite></testsuites>
"""


def test_every_row_is_tried_by_something_that_exists() -> None:
    rows = load()
    assert {row.table for row in rows} == {"vendor", "gate", "attacker"}
    assert len({row.did for row in rows}) == len(rows) >= 60


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ("", "must name a test or a case"),
        ("tests = ['tests/test_docs.py::test_missing']", "there is no test"),
        ("tests = ['tests/missing.py::test_missing']", "there is no test"),
        ("cases = { FWD-1 = 'missing' }", "FWD-1 has no case 'missing'"),
    ],
)
def test_a_row_that_is_tried_by_nothing(tmp_path: Path, row: str, text: str) -> None:
    path = tmp_path / "rows.toml"
    path.write_text(f"[[gate]]\ndid = 'this'\nright = 'that'\n{row}\n")
    with pytest.raises(RowError, match=text):
        load(path)


def test_the_worst_of_the_parameters_counts() -> None:
    file = "tests/audit/test_x.py"
    assert outcomes(ET.fromstring(JUNIT)) == {
        f"{file}::test_a": "failed",
        f"{file}::TestC::test_b": "skipped: no JAX",
        f"{file}::test_c": "passed",
    }


@pytest.mark.parametrize(
    ("outcome", "status", "text"),
    [
        ("passed", 0, "1 right, 0 WRONG, 0 not tried"),
        ("failed", 1, "0 right, 1 WRONG, 0 not tried"),
        ("skipped: no JAX", 1, "0 right, 0 WRONG, 1 not tried"),
        (None, 1, "0 right, 1 WRONG, 0 not tried"),
    ],
)
def test_what_did_not_run_is_not_right(
    monkeypatch: pytest.MonkeyPatch, outcome: str | None, status: int, text: str
) -> None:
    monkeypatch.setattr(run, "load", lambda: [run.Row("gate", "this", "that", ("a",))])
    monkeypatch.setattr(run, "_run", lambda _: {"a": outcome} if outcome else {})
    monkeypatch.setattr(run, "_run_cases", lambda _: {})
    output = io.StringIO()
    assert run.main(Console(file=output, width=100)) == status
    assert text in output.getvalue()


@pytest.mark.parametrize(("target", "status"), [("syncbn.torch", 0), ("torch.nn", 1)])
def test_the_cases_of_a_row_run(monkeypatch: pytest.MonkeyPatch, target: str, status: int) -> None:
    row = run.Row("gate", "this", "that", cases={"ERR-3": "num_features"})
    chosen = targets.parse(target)
    monkeypatch.setattr(run, "load", lambda: [row])
    monkeypatch.setattr(run, "_run", lambda _: {})
    monkeypatch.setattr("audit.weaknesses.run.targets.parse", lambda _: chosen)
    assert len(row.ids) == 2
    assert run.main(Console(file=io.StringIO())) == status
