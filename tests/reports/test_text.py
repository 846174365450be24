"""What a report shows cannot command a terminal or become Markdown; large reports are read."""

from __future__ import annotations

import copy
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from syncbn import reports
from syncbn.reference import ratio
from syncbn.reports import ReportError, document
from syncbn.reports.schema import Schema, _Validator
from syncbn.reports.text import code, markdown, printable
from tests.reports.test_reports import case, clause, failing, passing, report_of

EVIL = "\x1b]0;title\x07\x1b[2J\x9b1m\u202eevil\u2028\r`<script>|x|[a](b)"


def evil_report() -> dict[str, Any]:
    report = failing()
    for one in report["cases"]:
        one["message"] = one["spec"]["title"] = EVIL
    report["target"]["name"] = report["target"]["module"] = EVIL
    report["environment"]["python"] = EVIL
    report["launcher"] = EVIL
    for one in report["clauses"]:
        one["title"] = EVIL
        one["reason"] = EVIL
    return report


@pytest.mark.parametrize("terminal", [True, False])
def test_the_table_commands_no_terminal(terminal: bool) -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, color_system=None, width=100)
    reports.summarize(evil_report(), console)
    assert not set(text.getvalue()) & set("\x1b\x07\x9b\u202e\u2028\r")
    assert "\\x1b" in text.getvalue()


def test_the_page_has_no_html_and_no_terminal_code() -> None:
    page = reports.findings([evil_report()], f"show {EVIL}")
    assert not set(page) & set("\x1b\x07\x9b\u202e\u2028\r")
    outside = re.sub(r"(?<!\\)(`+)(?!`).*?(?<!`)\1(?!`)", "", page).replace("\\<", "")
    assert "<script>" not in outside


@given(st.text())
@settings(max_examples=200, deadline=None, database=None, derandomize=True)
def test_any_text_can_be_written(text: str) -> None:
    for shown in (printable(text), markdown(text), code(text)):
        shown.encode()
        assert not any(ord(c) < 32 and c not in "\t\n" for c in shown)


def test_what_shows_nothing_is_shown() -> None:
    """So that no two names look the same, and none looks empty."""
    for (
        hidden
    ) in "\u00ad\u034f\u115f\u180b\u200b\u2062\u3164\ufe0f\uffa0\U0001d173\U000e0001\U000e0100":
        escape = hidden.encode("unicode_escape").decode()
        assert printable(f"a{hidden}b") == f"a{escape}b"


SCHEMA = Schema(reports.SCHEMA)


def test_a_pattern_ends_where_the_text_does() -> None:
    """In Python, `$` also matches before a line feed at the end."""
    schema = Schema({"type": "string", "pattern": "^[0-9]+$"})
    assert schema.violation("12") is None
    assert schema.violation("12\n") == r"'12\n' does not match '^[0-9]+$'"


@given(data=st.data())
@settings(max_examples=100, deadline=None, database=None, derandomize=True)
def test_the_fast_answer_is_that_of_jsonschema(data: st.DataObject) -> None:
    report = copy.deepcopy(data.draw(st.sampled_from([passing(), failing()])))
    place: Any = report
    for _ in range(data.draw(st.integers(0, 4))):
        keys = list(place) if isinstance(place, dict) else range(len(place))
        inner = [k for k in keys if isinstance(place[k], (dict, list)) and place[k]]
        if inner:
            place = place[data.draw(st.sampled_from(inner))]
    keys = list(place) if isinstance(place, dict) else list(range(len(place)))
    values: st.SearchStrategy[Any] = st.sampled_from(
        [None, True, -1, 0, 1, 2.5, float("nan"), "", "inf", "pass", "FWD-1\n", [], {}]
    )
    place[data.draw(st.sampled_from(keys))] = data.draw(values)
    assert (SCHEMA.violation(report) is None) == _Validator(reports.SCHEMA).is_valid(report)
    error = ""
    try:
        reports.validate(report)
    except ReportError as refused:
        error = str(refused)
    assert "\n" not in error


def test_a_report_of_many_cases_is_read(tmp_path: Path) -> None:
    """jsonschema alone would need minutes."""
    count = 100_000
    cases = [case(number, "FWD-1") for number in range(count)]
    report = report_of([clause("FWD-1", cases=count)], cases)
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report))
    text = io.StringIO()
    reports.summarize(reports.load(path), Console(file=text, width=100))
    assert "100000 cases" in text.getvalue()


@pytest.mark.parametrize("levels", [300, 900, 5_000, 200_000])
def test_deep_documents_are_refused(tmp_path: Path, levels: int) -> None:
    path = tmp_path / "report.json"
    deep = "[" * levels + "]" * levels
    path.write_text(json.dumps(passing()).replace('"spec": {', f'"spec": {{"deep": {deep}, ', 1))
    with pytest.raises(ReportError, match="levels"):
        reports.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ranks": 10**4000}, "ranks: .*greater than the maximum"),
        ({"seconds": 1e308}, "seconds: .*greater than the maximum"),
        ({"clauses": [], "cases": []}, "summary.required.pass: must be the count 0"),
    ],
)
def test_numbers_have_limits(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ReportError, match=message):
        reports.validate(passing() | change)


def forged(change: Any) -> str:
    """Why a report is refused after a change by hand."""
    report = failing()
    change(report)
    with pytest.raises(ReportError) as refused:
        reports.validate(report)
    return str(refused.value)


def test_forgeries_contradict_themselves() -> None:
    def passes(report: Any) -> None:
        for one in report["cases"]:
            one["verdict"] = "pass"

    def twice(report: Any) -> None:
        report["cases"].append(report["cases"][0])

    def clause_passes(report: Any) -> None:
        report["clauses"][3]["verdict"] = "pass"

    def fewer(report: Any) -> None:
        del report["cases"][3]

    def nothing(report: Any) -> None:
        report["clauses"], report["cases"] = [], []
        for name in ("required", "cases"):
            report["summary"][name] = dict.fromkeys(report["summary"][name], 0)
        report["summary"]["verdict"] = "pass"

    assert "with a ratio of 812.4, above 3" in forged(passes)
    assert "must be there once" in forged(twice)
    assert "its cases have fail" in forged(clause_passes)
    assert "must be the count 5, got 6" in forged(fewer)
    assert "summary.verdict: must be 'fail'" in forged(nothing)


def test_the_threshold_is_that_of_the_verdicts() -> None:
    assert document.THRESHOLD == ratio.THRESHOLD
