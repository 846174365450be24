"""Two reports next to each other: two devices, versions, backends or targets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from syncbn.reports.charts import pairs, ratio_bar
from syncbn.reports.document import Report
from syncbn.reports.page import pill, section, shell, stamp
from syncbn.reports.table import facts, ratio_text, subject
from syncbn.reports.text import code, escaped, markdown, one_line, shown

_ABSENT = "absent"
_CASES_SHOWN = 50


@dataclass(frozen=True)
class ClauseRow:
    """A clause in both reports.

    verdicts, ratios, failing: of A and of B: the verdict, the largest ratio, the failing cases.
    differ: the number of cases that have another verdict in B, or are only in one.
    """

    id: str
    title: str
    verdicts: tuple[str, str]
    ratios: tuple[float | str | None, float | str | None]
    differ: int


@dataclass(frozen=True)
class CaseRow:
    """A case with another verdict in B, or in one report only.

    message: what went wrong, in B if something did there.
    """

    id: str
    clause: str
    title: str
    verdicts: tuple[str, str]
    message: str


@dataclass(frozen=True)
class Compared:
    """Two reports next to each other.

    cases: how many cases are in both.
    settings: what was judged, how and on what, where it differs: name, in A, in B.
    """

    a: Report
    b: Report
    clauses: list[ClauseRow]
    differing: list[CaseRow]
    common: int
    settings: list[tuple[str, str, str]]


def compare(a: Report, b: Report) -> Compared:
    """Compare two valid reports of any targets, profiles and numbers of ranks."""
    a, b = shown(a), shown(b)
    cases_a, cases_b = _by_id(a["cases"]), _by_id(b["cases"])
    differing = [
        _case(cases_a.get(id), cases_b.get(id))
        for id in cases_a | cases_b
        if _verdict(cases_a.get(id)) != _verdict(cases_b.get(id))
    ]
    clauses_a, clauses_b = _by_id(a["clauses"]), _by_id(b["clauses"])
    clauses = [
        _clause(clauses_a.get(id), clauses_b.get(id), sum(one.clause == id for one in differing))
        for id in clauses_a | clauses_b
    ]
    common = len(cases_a.keys() & cases_b.keys())
    return Compared(a, b, clauses, differing, common, list(_settings(a, b)))


def _by_id(rows: Any) -> dict[str, Any]:
    return {row["id"]: row for row in rows}


def _verdict(row: Any | None) -> str:
    return row["verdict"] if row else _ABSENT


def _case(a: Any, b: Any) -> CaseRow:
    """A case of one report or of both; None for a report that does not have it."""
    row = b or a
    message = next((one["message"] for one in (b, a) if one and one["message"]), "")
    title = row["spec"]["title"]
    return CaseRow(row["id"], row["clause"], title, (_verdict(a), _verdict(b)), one_line(message))


def _clause(a: Any, b: Any, differ: int) -> ClauseRow:
    row = a or b
    ratios = (a and a["worst_ratio"], b and b["worst_ratio"])
    return ClauseRow(row["id"], row["title"], (_verdict(a), _verdict(b)), ratios, differ)


def _settings(a: Report, b: Report) -> Iterator[tuple[str, str, str]]:
    sides = [facts(one) | one["environment"] for one in (a, b)]
    for name in sides[0] | sides[1]:
        values = [one_line(side.get(name, "")) for side in sides]
        if values[0] != values[1]:
            yield one_line(name), values[0], values[1]


def _headline(compared: Compared) -> str:
    same = compared.common - sum(_ABSENT not in one.verdicts for one in compared.differing)
    only = sum(_ABSENT in one.verdicts for one in compared.differing)
    text = f"{same} of {compared.common} common cases have the same verdict"
    return text + (f"; {only} cases are in one report only" if only else "")


def show(compared: Compared, console: Console) -> None:
    """Print the comparison. As everywhere, only a terminal gets colours."""
    for name, report in (("A", compared.a), ("B", compared.b)):
        console.print(Text(f"{name}  {report['summary']['verdict']:<5} {subject(report)}"))
    for name, *values in compared.settings:
        console.print(Text(f"   {name}: {values[0] or 'none'} | {values[1] or 'none'}", "dim"))
    console.print()
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for head in ("clause", "title", "A", "B", "ratio A", "ratio B", "differ"):
        right = head.startswith(("ratio", "differ"))
        table.add_column(head, justify="right" if right else "left", no_wrap=head != "title")
    for row in compared.clauses:
        style = "bold" if row.verdicts[0] != row.verdicts[1] else ""
        texts = (*row.verdicts, *map(ratio_text, row.ratios), str(row.differ or ""))
        table.add_row(row.id, Text(row.title), *texts, style=style)
    console.print(table)
    for case in compared.differing[:_CASES_SHOWN]:
        line = f"{case.clause} {case.id} {' | '.join(case.verdicts)}: {case.title}"
        console.print(Text(line + (f": {case.message}" if case.message else "")), soft_wrap=True)
    if len(compared.differing) > _CASES_SHOWN:
        console.print(f"and {len(compared.differing) - _CASES_SHOWN} more cases")
    console.print(_headline(compared), soft_wrap=True, highlight=False)


def as_markdown(compared: Compared) -> str:
    """The comparison as a Markdown page."""
    lines = ["# Two runs compared", ""]
    for name, report in (("A", compared.a), ("B", compared.b)):
        lines.append(f"- {name}: **{report['summary']['verdict']}**, {markdown(subject(report))}")
    lines += ["", f"{_headline(compared)}.", "", "| | A | B |", "|---|---|---|"]
    lines += [f"| {' | '.join(markdown(one) for one in row)} |" for row in compared.settings]
    lines += ["", "| clause | | A | B | ratio A | ratio B | cases that differ |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for row in compared.clauses:
        a, b = row.verdicts
        name = f"**{row.id}**" if a != b else row.id
        ratios = " | ".join(ratio_text(ratio) for ratio in row.ratios)
        title = markdown(row.title)
        lines.append(f"| {name} | {title} | {a} | {b} | {ratios} | {row.differ or ''} |")
    lines.append("")
    for case in compared.differing[:_CASES_SHOWN]:
        text = f"- {case.clause} {code(case.id)} {case.verdicts[0]} | {case.verdicts[1]}: "
        text += markdown(case.title) + (f": {markdown(case.message)}" if case.message else "")
        lines.append(text)
    if len(compared.differing) > _CASES_SHOWN:
        lines.append(f"- and {len(compared.differing) - _CASES_SHOWN} more cases")
    return "\n".join(lines).rstrip() + "\n"


def as_html(compared: Compared) -> str:
    """The comparison as a self-contained HTML page."""
    sides = "".join(
        f"<div><div class=head><h2>{name}: {escaped(one_line(report['target']['name']))}</h2>"
        f"{stamp(report)}</div><p>{escaped(subject(report))}</p></div>"
        for name, report in (("A", compared.a), ("B", compared.b))
    )
    settings = pairs({name: f"{a or 'none'} | {b or 'none'}" for name, a, b in compared.settings})
    head = f"<header><div class=charts>{sides}</div><p class=lead>{_headline(compared)}.</p>"
    body = head + f"{settings}</header>\n" + _html_clauses(compared)
    if compared.differing:
        text = "The cases whose verdict differs, or that are in one report only."
        body += section("Cases that differ", text, _html_cases(compared))
    return shell("Two runs compared", body)


def _html_clauses(compared: Compared) -> str:
    rows = "".join(
        f"<tr><td class=id>{row.id}</td><td class=wide>{escaped(row.title)}</td>"
        f"<td>{pill(row.verdicts[0])}</td><td>{pill(row.verdicts[1])}</td>"
        f"<td class=number>{ratio_bar(row.ratios[0])}</td>"
        f"<td class=number>{ratio_bar(row.ratios[1])}</td>"
        f"<td class='number wide'>{row.differ or ''}</td></tr>"
        for row in compared.clauses
    )
    head = "<th>clause</th><th class=wide>title</th><th>A</th><th>B</th>"
    head += "<th class=number>ratio A</th><th class=number>ratio B</th>"
    head += "<th class='number wide'>differ</th>"
    text = "Verdict and largest ratio on both sides, and the number of cases that differ."
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return section("Clauses", text, table)


def _html_cases(compared: Compared) -> str:
    parts = [
        f"<div class=case>{pill(case.verdicts[0])} {pill(case.verdicts[1])} {case.clause} "
        f"{escaped(case.title)} <span class=dim>{case.id}</span>"
        f"<pre class=mono>{escaped(case.message)}</pre></div>"
        for case in compared.differing[:_CASES_SHOWN]
    ]
    if len(compared.differing) > _CASES_SHOWN:
        parts.append(f"<p class=dim>and {len(compared.differing) - _CASES_SHOWN} more cases</p>")
    return "".join(parts)
