"""The gate: a run compared with its baseline. Every change is named, and fails unless waived."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import Any

from syncbn.reports.baseline import Baseline, seconds, subject, title, versions
from syncbn.reports.document import Report
from syncbn.reports.files import ReportError
from syncbn.reports.importance import explained, importance
from syncbn.reports.text import one_line, shown
from syncbn.reports.waivers import Waiver

# On one machine ratios repeat exactly. With other vector instructions the growth was at most 1.75
# in the 3,523 cases of `full` (docs/gate.md), where RATIO_FLOOR stands for every smaller ratio.
MAX_GROWTH = 3.0
RATIO_FLOOR = 0.1
MAX_SLOWDOWN = 3.0
ABSENT = "absent"  # the verdict of what one side does not have
_BAD = ("fail", "hang", "crash", "error")


@dataclass(frozen=True)
class Change:
    """What is different in one case.

    before, after: the verdicts, with the ratios if the verdict is the same; "absent" for a case
        that one side does not have.
    message: what went wrong in the run; "" if nothing did.
    row: the case in the report; None if it is absent.
    waiver: what lets it pass; None if nothing does.
    """

    case: str
    title: str
    before: str
    after: str
    message: str
    row: Any | None
    waiver: Waiver | None

    @property
    def fails(self) -> bool:
        """Whether the case fails in the run."""
        return self.after.split(",")[0] in _BAD


@dataclass
class ClauseChange:
    """What is different in a clause.

    before, after: its verdict; "absent" if one side does not have it.
    required: whether it counts for the verdict of the run.
    cases: how many it has in the run.
    changes: of its cases, in the order of the run.
    waiver: what lets the change of its verdict pass, apart from those of its cases.
    """

    id: str
    title: str
    before: str
    after: str
    required: bool
    cases: int
    changes: list[Change] = field(default_factory=list)
    waiver: Waiver | None = None

    @property
    def failing(self) -> int:
        """The number of changed cases that fail in the run and are neither waived nor explained."""
        return sum(
            change.fails and not change.waiver and not explained(change.row)
            for change in self.changes
        )

    @property
    def red(self) -> bool:
        """Whether something is different that no waiver lets pass."""
        if self.changes:  # from which the verdict of the clause follows
            return not all(change.waiver for change in self.changes)
        return self.waiver is None


@dataclass
class Gated:
    """The result of a gate.

    clauses: those with a difference, the most important first.
    problems: waivers that fail the gate, one line each.
    warnings: what does not fail it, one line each.
    no_verdict: whether the suite or the machine failed in the run, which then judges nothing.
    """

    report: Report
    clauses: list[ClauseChange]
    problems: list[str]
    warnings: list[str]
    no_verdict: bool

    @property
    def red(self) -> bool:
        return bool(self.problems) or any(clause.red for clause in self.clauses)


def gate(
    baseline: Baseline,
    report: Report,
    waivers: Sequence[Waiver] = (),
    *,
    max_growth: float = MAX_GROWTH,
    max_slowdown: float = MAX_SLOWDOWN,
    today: date,
) -> Gated:
    """Compare a run with its baseline.

    Args:
        max_growth: a case that passes on both sides may have a ratio this many times larger.
            Ratios below RATIO_FLOOR count as RATIO_FLOOR.
        max_slowdown: a run that takes this many times longer is warned of.
        today: the date in UTC, on which waivers must hold.

    Raises:
        ReportError: the report is not of what the baseline is of, or of a part of its profile.
    """
    check_subject(baseline, report)
    report = shown(report)
    clauses = _clauses(baseline, report)
    rows = {row["id"]: row for row in report["cases"]}
    valid = [waiver for waiver in waivers if waiver.expires >= today]
    for id in [*rows, *(id for id in baseline["cases"] if id not in rows)]:
        old, row = baseline["cases"].get(id), rows.get(id)
        clause = clauses[row["clause"] if row else old[0]]
        if found := _difference(old, row, max_growth):
            before, after = found
            waiver = _waiver(valid, clause.id, id)
            named = title(row) if row else one_line(old[3])
            message = (row and row["message"]) or ""
            clause.changes.append(Change(id, named, before, after, message, row, waiver))
    for clause in clauses.values():
        if clause.before != clause.after and not clause.changes:
            clause.waiver = _waiver(valid, clause.id, None)
    changed = [one for one in clauses.values() if one.changes or one.before != one.after]
    order = {id: place for place, id in enumerate(clauses)}
    changed.sort(key=lambda clause: _importance(order[clause.id], clause))
    return Gated(
        report,
        changed,
        _problems(waivers, changed, today),
        _warnings(baseline, report, max_slowdown),
        report["summary"]["verdict"] == "error",
    )


def check_subject(baseline: Baseline, report: Report) -> None:
    """Refuse a report that is not of what the baseline is of.

    Raises:
        ReportError: with the field that differs.
    """
    if report.get("selection"):
        raise ReportError("selection: the report must be of the whole profile, not of a part")
    new = subject(report)
    for name, old in baseline["of"].items():
        if new[name] != old:
            raise ReportError(f"{name}: the baseline is of {old!r}, the report of {new[name]!r}")


def _clauses(baseline: Baseline, report: Report) -> dict[str, ClauseChange]:
    found = {
        clause["id"]: ClauseChange(
            clause["id"],
            clause["title"],
            baseline["clauses"].get(clause["id"], [ABSENT])[0],
            clause["verdict"],
            clause["required"],
            clause["cases"],
        )
        for clause in report["clauses"]
    }
    for id, (verdict, named) in baseline["clauses"].items():
        found.setdefault(id, ClauseChange(id, one_line(named), verdict, ABSENT, True, 0))
    return found


def _difference(old: Any, row: Any, max_growth: float) -> tuple[str, str] | None:
    """What a case was and is now, in words; None if that is the same."""
    before = old[1] if old else ABSENT
    after = row["verdict"] if row else ABSENT
    if before != after:
        return before, after
    if after == "pass" and _grew(old[2], row["ratio"], max_growth):
        return f"pass, {_ratio(old[2])}", f"pass, {_ratio(row['ratio'])}"
    return None


def _grew(old: float | str | None, new: float | str | None, factor: float) -> bool:
    """Whether a ratio grew by more than a factor, or is there on one side only."""
    if old is None or new is None:
        return old is not new
    return float(new) > factor * max(float(old), RATIO_FLOOR)


def _ratio(ratio: float | str | None) -> str:
    return "no ratio" if ratio is None else f"ratio {float(ratio):.3g}"


def _waiver(waivers: Sequence[Waiver], clause: str, case: str | None) -> Waiver | None:
    return next((waiver for waiver in waivers if waiver.covers(clause, case)), None)


def _importance(place: int, clause: ClauseChange) -> tuple[Any, ...]:
    cases = max(clause.cases, len(clause.changes))
    return not clause.red, *importance(clause.id, clause.failing, cases, clause.required, place)


def _problems(waivers: Sequence[Waiver], clauses: Sequence[ClauseChange], today: date) -> list[str]:
    """A line for each waiver that is expired, or that nothing needs."""
    used = {clause.waiver for clause in clauses}
    used |= {change.waiver for clause in clauses for change in clause.changes}
    found = []
    for waiver in waivers:
        if waiver.expires < today:
            found.append(f"the waiver of {waiver.name} has expired: {waiver.text}")
        elif waiver not in used:
            found.append(f"the waiver of {waiver.name} matches no change: {waiver.text}")
    return found


def _warnings(baseline: Baseline, report: Report, max_slowdown: float) -> list[str]:
    found = []
    old, new = baseline["seconds"], seconds(report)
    if new > max_slowdown * old:
        found.append(f"slower: the cases took {new:.1f} s, {old:.1f} s in the baseline")
    now = {**versions(report), "suite": report["suite"]["version"]}
    before = {**baseline["environment"], "suite": baseline["suite"]}
    found += [
        one_line(f"other {name}: {now[name]}, {before[name]} in the baseline")
        for name in before
        if name in now and now[name] != before[name]
    ]
    return found
