"""JUnit XML: what CI reads is what the report states."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from syncbn import reports
from syncbn.conformance.__main__ import main
from tests.reports.test_reports import case, clause, failing, passing, report_of
from tests.reports.test_text import evil_report


def parsed(report: dict[str, Any]) -> Element:
    return ElementTree.fromstring(reports.junit(report))


def results(root: Element) -> list[tuple[str, str]]:
    """Tag and type of every result that is no pass, in the order of the file."""
    found = [result for test in root.iter("testcase") for result in test]
    return [(result.tag, result.get("type", "")) for result in found]


def test_every_case_is_a_test_of_its_clause() -> None:
    report = failing()
    root = parsed(report)
    assert [suite.get("name") for suite in root] == [c["id"] for c in report["clauses"]] + ["run"]
    names = {
        (suite.get("name"), test.get("classname"), test.get("name"))
        for suite in root
        for test in suite
    }
    for one in report["cases"]:
        assert (one["clause"], one["clause"], f"{one['spec']['title']} [{one['id']}]") in names
    (first,) = root.findall("testsuite[@name='FWD-1']")
    (test,) = first
    assert test.get("time") == "0.250"
    assert len(test) == 0


def test_the_counts_are_those_of_the_tests() -> None:
    root = parsed(failing())
    assert results(root) == [
        ("skipped", "unsupported"),  # CTOR-5 has no case
        ("failure", "hang"),
        *[("failure", "fail")] * 5,
        ("skipped", "crash"),  # STAT-2 does not count
        ("skipped", "not-run"),
        ("failure", "fail"),  # the run
    ]
    for element in (root, *root):
        tags = [tag for tag, _ in results(element)]
        assert element.get("tests") == str(len(list(element.iter("testcase"))))
        for tag, name in (("failure", "failures"), ("error", "errors"), ("skipped", "skipped")):
            assert element.get(name) == str(tags.count(tag))


def test_a_result_has_its_message_and_the_command_that_shows_it_again() -> None:
    (hang,) = parsed(failing()).findall("testsuite[@name='ERR-9']/testcase/failure")
    assert (hang.get("message") or "").startswith("stack 0 stack 1")
    assert (hang.text or "").splitlines()[8] == "stack 8"
    assert "replay 000000000002 --target syncbn.torch" in (hang.text or "").splitlines()[-1]
    long = report_of([clause("FWD-1", "fail")], [case(1, "FWD-1", "fail", message="x" * 5000)])
    (failure,) = parsed(long).findall("testsuite[@name='FWD-1']/testcase/failure")
    assert len(failure.get("message") or "") == 200
    assert (failure.text or "").startswith("x" * 5000)


def test_a_clause_that_does_not_count_makes_nothing_red() -> None:
    clauses = [clause("FWD-1"), clause("STAT-2", "fail", required=False)]
    cases = [case(1, "FWD-1"), case(2, "STAT-2", "fail", message="off")]
    root = parsed(report_of(clauses, cases) | {"level": "documented"})
    assert (root.get("failures"), root.get("errors")) == ("0", "0")
    (skipped,) = root.iter("skipped")
    assert skipped.get("message") == "fail, does not count for level documented: off"


@pytest.mark.parametrize("verdict", ["fail", "error", "incomplete", "pass"])
def test_it_is_red_exactly_if_the_run_did_not_pass(verdict: str) -> None:
    report = passing()
    report["summary"]["verdict"] = verdict
    report["must_pass"]["missing"] = [] if verdict == "pass" else ["0123456789ab"]
    root = parsed(report)
    red = int(root.get("failures", "")) + int(root.get("errors", ""))
    assert red == (verdict != "pass")
    if red:
        (test,) = root.findall("testsuite[@name='run']/testcase")
        assert test[0].text == "0123456789ab"
        assert "1 case on the list did not run" in (test[0].get("message") or "")


def test_the_same_report_makes_the_same_text() -> None:
    assert reports.junit(failing()) == reports.junit(failing())


def test_hostile_text_stays_text() -> None:
    text = reports.junit(evil_report())
    assert not set(text) & set("\x1b\x07\x9b\u202e\u2028\r")
    assert "<script>" not in text
    ElementTree.fromstring(text)


@given(st.text())
@settings(max_examples=100, deadline=None, database=None, derandomize=True)
def test_any_text_is_xml(text: str) -> None:
    report = failing()
    report["cases"][1]["message"] = report["cases"][1]["spec"]["title"] = text
    report["target"]["name"] = text or "x"
    ElementTree.fromstring(reports.junit(report))


def test_run_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "junit.xml"
    run = ["run", "--ranks", "1", "--profile", "smoke", "--clause", "CTOR-1", "--oracle", "none"]
    assert main([*run, "--out", str(tmp_path), "--junit", str(out)]) == 0
    report = reports.load(tmp_path / "report.json")
    assert out.read_text() == reports.junit(report)
    with pytest.raises(SystemExit) as stopped:
        main([*run, "--junit", str(tmp_path / "missing" / "junit.xml")])
    assert stopped.value.code == 2
    assert "--junit: must be a file in a directory that exists" in capsys.readouterr().err
