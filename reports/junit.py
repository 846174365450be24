"""A report as JUnit XML, which CI systems show."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from syncbn.reports.document import Report
from syncbn.reports.table import replay_command, subject
from syncbn.reports.text import one_line, shown

_FAILING = ("fail", "hang", "crash")
_TITLE = 200  # characters of the `message` of a result; its text is whole


class Test(NamedTuple):
    """A test case of JUnit. Its texts are printable.

    result: "failure", "error", "skipped", or "" for a pass.
    """

    classname: str
    name: str
    seconds: float = 0.0
    result: str = ""
    kind: str = ""
    message: str = ""
    text: str = ""


def junit(report: Report) -> str:
    """A report as JUnit XML: a suite for each clause, a test for each case, and one for the run.

    The name of a test is the title and the id of its case. A fail, hang or crash is a `failure`, an
    error is an `error`; an unsupported case and a clause without cases are `skipped`, each with
    the reason. A bad case of a clause that does not count for the verdict, as with the level
    "documented", is `skipped` with its verdict. The last suite, `run`, has one test, which
    passes if the verdict of the run is "pass"; so a file has a failure if and only if the run did
    not pass.

    Args:
        report: a valid report, as `load` returns it. The same report makes the same text.
    """
    report = shown(report)
    suites = [(clause["id"], list(_of_clause(report, clause))) for clause in report["clauses"]]
    suites.append(("run", [_of_run(report)]))
    return xml(subject(report), suites)


def xml(title: str, suites: Sequence[tuple[str, Sequence[Test]]]) -> str:
    """The XML of suites of tests, each with its name."""
    every = [test for _, tests in suites for test in tests]
    root = Element("testsuites", {"name": title} | _counts(every))
    for name, tests in suites:
        suite = SubElement(root, "testsuite", {"name": name} | _counts(tests))
        for test in tests:
            _add(suite, test)
    indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + tostring(root, encoding="unicode") + "\n"


def _of_clause(report: Report, clause: Any) -> Iterator[Test]:
    name = clause["id"]
    cases = [case for case in report["cases"] if case["clause"] == name]
    if not cases:
        reason = clause["reason"] or "no case"
        yield Test(name, clause["title"], 0.0, "skipped", clause["verdict"], reason)
    for case in cases:
        title, verdict = f"{case['spec']['title']} [{case['id']}]", case["verdict"]
        if verdict == "pass":
            yield Test(name, title, case["seconds"])
            continue
        message = case["message"] or verdict
        text = f"{message}\n{replay_command(report, case)}"
        result = "failure" if verdict in _FAILING else "error" if verdict == "error" else "skipped"
        if result == "failure" and not clause["required"]:
            result = "skipped"
            message = f"{verdict}, does not count for level {report['level']}: {message}"
        yield Test(name, title, case["seconds"], result, verdict, message, text)


def _of_run(report: Report) -> Test:
    verdict, missing = report["summary"]["verdict"], report["must_pass"]["missing"]
    if verdict == "pass":
        return Test("run", "verdict")
    required = report["summary"]["required"]
    message = f"{verdict}: {required['pass']} of {sum(required.values())} required clauses pass"
    if missing:
        message += f", {len(missing)} case{'s' * (len(missing) > 1)} on the list did not run"
    result = "failure" if verdict == "fail" else "error"
    return Test("run", "verdict", 0.0, result, verdict, message, "\n".join(missing))


def _counts(tests: Sequence[Test]) -> dict[str, str]:
    results = [test.result for test in tests]
    return {
        "tests": str(len(tests)),
        "failures": str(results.count("failure")),
        "errors": str(results.count("error")),
        "skipped": str(results.count("skipped")),
        "time": f"{sum(test.seconds for test in tests):.3f}",
    }


def _add(suite: Element, test: Test) -> None:
    case = SubElement(
        suite,
        "testcase",
        {"classname": test.classname, "name": test.name, "time": f"{test.seconds:.3f}"},
    )
    if test.result:
        message = one_line(test.message)
        if len(message) > _TITLE:
            message = message[: _TITLE - 3] + "..."
        result = SubElement(case, test.result, {"type": test.kind, "message": message})
        result.text = test.text or None
