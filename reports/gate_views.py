"""The result of a gate: as lines for the terminal, Markdown, annotations of CI, and JUnit XML."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from syncbn.reports.gate import ABSENT, Change, ClauseChange, Gated
from syncbn.reports.junit import Test, xml
from syncbn.reports.table import replay_command, subject
from syncbn.reports.text import code, markdown, one_line
from syncbn.reports.waivers import Waiver

_CASES_SHOWN = 3  # of each clause
_CLAUSES_SHOWN = 5  # in detail; GitHub shows ten annotations of a step
_MESSAGE = 300  # characters of the message of a case


def lines(gated: Gated) -> Iterator[str]:
    """Every clause that changed, the most important first, and a last line with the verdict."""
    for place, clause in enumerate(gated.clauses):
        yield f"{clause.id}  {clause.title}: {_clause(clause)}"
        if place >= _CLAUSES_SHOWN:
            continue
        for change in clause.changes[:_CASES_SHOWN]:
            yield f"  {change.case} {_change(change)}: {change.title}"
            if change.message:
                # Not at the start of a line, where CI would take `::` for a command.
                yield f"    message: {_short(change.message)}"
            if change.row:
                yield f"    {replay_command(gated.report, change.row)}"
        if len(clause.changes) > _CASES_SHOWN:
            yield f"  and {len(clause.changes) - _CASES_SHOWN} more cases"
    yield from (f"waived: {name}: {waiver.text}" for name, waiver in _waived(gated))
    yield from gated.problems
    yield from (f"warning: {line}" for line in gated.warnings)
    yield headline(gated)


def headline(gated: Gated) -> str:
    """The verdict of the gate in one line."""
    name = subject(gated.report)
    if gated.no_verdict:
        return f"gate: NO VERDICT, the suite or the machine failed in the run of {name}"
    if not gated.red:
        return f"gate: pass, no change of {name}" + ", except what is waived" * bool(gated.clauses)
    parts = []
    if red := [clause.id for clause in gated.clauses if clause.red]:
        more = f" and {len(red) - _CLAUSES_SHOWN} more" if len(red) > _CLAUSES_SHOWN else ""
        parts.append(f"changes in {', '.join(red[:_CLAUSES_SHOWN])}{more}")
    if gated.problems:
        parts.append(f"{len(gated.problems)} bad waiver{'s' * (len(gated.problems) > 1)}")
    return f"gate: FAIL, {', '.join(parts)} of {name}"


def summary(gated: Gated) -> str:
    """A page for a pull request, in Markdown: a row for each clause that changed, then cases."""
    found = [f"### {markdown(headline(gated))}", ""]
    if gated.clauses:
        found += ["| clause | | was | is | cases that changed |", "|---|---|---|---|---|"]
    for clause in gated.clauses:
        name = f"**{clause.id}**" if clause.red else f"{clause.id}, waived"
        counts = f"{len(clause.changes)} of {max(clause.cases, len(clause.changes))}"
        title = markdown(clause.title)
        found.append(f"| {name} | {title} | {clause.before} | {clause.after} | {counts} |")
    for clause in [clause for clause in gated.clauses if clause.red][:_CLAUSES_SHOWN]:
        found += ["", f"**{clause.id}: {markdown(clause.title)}**", ""]
        for change in clause.changes[:_CASES_SHOWN]:
            text = f": {markdown(_short(change.message))}" if change.message else ""
            title = markdown(change.title)
            found.append(f"- {code(change.case)} {title}: {markdown(_change(change))}{text}")
            if change.row:
                found.append(f"  {code(replay_command(gated.report, change.row))}")
        if len(clause.changes) > _CASES_SHOWN:
            found.append(f"- and {len(clause.changes) - _CASES_SHOWN} more cases")
    rest = [f"waived: {name}: {waiver.text}" for name, waiver in _waived(gated)]
    rest += [*gated.problems, *(f"warning: {line}" for line in gated.warnings)]
    if rest:
        found += ["", *(f"- {markdown(line)}" for line in rest)]
    return "\n".join(found) + "\n"


def github(gated: Gated, baseline: Path) -> str:
    """Workflow commands of GitHub: an annotation for each clause and waiver, on the baseline."""
    found = []
    for clause, line in _places(gated, baseline):
        title = f"{clause.id}: {clause.title}"
        where = f"file={_escape(str(baseline), ':,')},line={line},title={_escape(title, ':,')}"
        found.append(f"::error {where}::{_escape(_detail(gated, clause))}\n")
    found += [f"::error title=waiver::{_escape(line)}\n" for line in gated.problems]
    found += [f"::warning title=gate::{_escape(line)}\n" for line in gated.warnings]
    return "".join(found)


def gitlab(gated: Gated, baseline: Path) -> str:
    """A code quality report of GitLab, which shows it in a merge request: an issue per clause."""
    issues = [
        _issue(f"{clause.id} {clause.title}: {_detail(gated, clause)}", clause.id, baseline, line)
        for clause, line in _places(gated, baseline)
    ]
    issues += [_issue(line, "waiver", baseline, 1) for line in gated.problems]
    return json.dumps(issues, indent=1) + "\n"


# By the name of the option: the text, and the file that it goes into; None for standard output.
ANNOTATIONS: dict[str, tuple[Callable[[Gated, Path], str], str | None]] = {
    "github": (github, None),
    "gitlab": (gitlab, "gl-code-quality-report.json"),
}


def gate_junit(gated: Gated) -> str:
    """JUnit XML: a suite for each clause that changed, a test for each of its changes, and one."""
    suites = [(clause.id, list(_tests(gated, clause))) for clause in gated.clauses]
    verdict = Test("gate", "verdict")
    if gated.no_verdict:
        verdict = verdict._replace(result="error", kind="error", message=headline(gated))
    elif gated.red:
        verdict = verdict._replace(
            result="failure", kind="fail", message=headline(gated), text="\n".join(gated.problems)
        )
    return xml(f"gate of {subject(gated.report)}", [*suites, ("gate", [verdict])])


def _tests(gated: Gated, clause: ClauseChange) -> Iterator[Test]:
    if not clause.changes:
        result = "failure" if clause.red else "skipped"
        yield Test(clause.id, clause.title, 0.0, result, clause.after, _clause(clause))
    for change in clause.changes:
        result, message = "failure", _change(change)
        if change.waiver:
            result, message = "skipped", f"waived: {change.waiver.text}"
        text = [change.message] * bool(change.message)
        text += [replay_command(gated.report, change.row)] if change.row else []
        seconds = change.row["seconds"] if change.row else 0.0
        name = f"{change.title} [{change.case}]"
        yield Test(
            clause.id, name, seconds, result, change.after.split(",")[0], message, "\n".join(text)
        )


def _clause(clause: ClauseChange) -> str:
    verdict = clause.after
    if clause.before != clause.after:
        verdict = f"{clause.before} -> {clause.after}"
    return f"{verdict}, {len(clause.changes)} of {clause.cases} cases changed"


def _change(change: Change) -> str:
    better = change.before.split(",")[0] in ("fail", "hang", "crash", "error")
    hint = ""
    if better and change.after == "pass":
        hint = " (an unexpected pass: write a new baseline)"
    elif change.before == ABSENT:
        hint = " (a new case: write a new baseline)"
    return f"{change.before} -> {change.after}{hint}"


def _detail(gated: Gated, clause: ClauseChange) -> str:
    """The clause and its first change in one line."""
    text = _clause(clause)
    if clause.changes:
        first = next((c for c in clause.changes if c.fails and not c.waiver), clause.changes[0])
        text += f". {first.case} {_change(first)}: {first.title}. {_short(first.message)}"
        text += f" Run {replay_command(gated.report, first.row)}" if first.row else ""
    return one_line(text)


def _places(gated: Gated, baseline: Path) -> Iterator[tuple[ClauseChange, int]]:
    """The clauses that fail the gate, and the lines of the baseline that they are about."""
    text = baseline.read_text(encoding="utf-8").splitlines()
    for clause in gated.clauses:
        if clause.red:
            names = [f'"{change.case}"' for change in clause.changes] + [f'"{clause.id}"']
            yield clause, next((n for n, line in enumerate(text, 1) if names[0] in line), 1)


def _issue(text: str, name: str, path: Path, line: int) -> dict[str, object]:
    return {
        "description": text,
        "check_name": f"syncbn-conformance gate {name}",
        "fingerprint": hashlib.sha256(f"{path}:{name}:{text}".encode()).hexdigest(),
        "severity": "critical",
        "location": {"path": str(path), "lines": {"begin": line}},
    }


def _waived(gated: Gated) -> Iterator[tuple[str, Waiver]]:
    for clause in gated.clauses:
        if clause.waiver:
            yield clause.id, clause.waiver
        for change in clause.changes:
            if change.waiver:
                yield f"{clause.id} {change.case} {_change(change)}", change.waiver


def _short(message: str) -> str:
    message = one_line(message)
    return message if len(message) <= _MESSAGE else f"{message[: _MESSAGE - 3]}..."


def _escape(text: str, more: str = "") -> str:
    """Text as a workflow command of GitHub takes it."""
    return re.sub(f"[%\r\n{more}]", lambda found: f"%{ord(found[0]):02X}", text)
