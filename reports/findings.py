"""The findings of runs of one target, as a Markdown page: a section for each clause."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from syncbn.reports.document import Report
from syncbn.reports.files import ReportError
from syncbn.reports.table import replay_command
from syncbn.reports.text import code, markdown, one_line, shown

_SHOWN = 4  # failing cases of one clause in one run
_RUNGS = {
    "device": "the layer itself",
    "substituted": "the layer's own code, with substitutes for the kernels and collectives that "
    "only Ascend has (conformance/ranks/substitutes/mindspore.py); on one rank and in eval "
    "MindSpore's own operator uses none of them",
}
_INTRODUCTION = """\
For each clause of the [contract](contract.md): what the layer did in the runs below, and the
commands that show it again. First come the clauses that the operator's page states, then those that
the page leaves open and the contract decides.

"pass" means that the layer obeys the clause in all its cases. [conformance.md](conformance.md)
describes what a case is and how numbers are judged.
"""


def findings(reports: Sequence[Report], command: str) -> str:
    """The page of one or more runs of one target.

    Args:
        reports: the reports, for example of runs on different numbers of ranks.
        command: the command that makes the page, which names it.

    Raises:
        ReportError: there is no report, or the reports are of different targets.
    """
    names = {report["target"]["name"] for report in reports}
    if len(names) != 1:
        given = ", ".join(sorted(names)) or "none"
        raise ReportError(f"the reports must be of one target, got {one_line(given)}")
    reports = [shown(report) for report in reports]
    target = reports[0]["target"]
    title = one_line(f"{target['module']}.{target['class']}")
    title = title if re.fullmatch(r"[\w.]+", title) else markdown(title)
    lines = [
        f"# What {title} does",
        "",
        f"Made by {code(command)} from the runs below; not written by hand.",
        "",
        _INTRODUCTION,
        *_runs(reports),
        "## What the page states",
        "",
        *_clauses(reports, documented=True),
        "## What the page leaves open",
        "",
        *_clauses(reports, documented=False),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _runs(reports: Sequence[Report]) -> list[str]:
    lines = [
        "| ranks | ran | environment | suite | required clauses that pass |",
        "|---|---|---|---|---|",
    ]
    for report in reports:
        target, environment = report["target"], report["environment"]
        versions = ", ".join(
            _plain(f"{name} {environment[name]}")
            for name in (target["framework"], "python", "numpy", "processor")
            if name in environment
        )
        commit = (report["suite"]["commit"] or "unknown")[:12]
        dirty = " with local changes" if report["suite"]["dirty"] else ""
        mode = f", {target['mode']}" if target["mode"] else ""
        required = report["summary"]["required"]
        ran = f"{target['device']}{mode}, {target['rung']}"
        lines.append(
            f"| {report['ranks']} | {ran} | {versions} | {commit}{dirty} "
            f"| {required['pass']} of {sum(required.values())} |"
        )
    rungs = sorted({report["target"]["rung"] for report in reports})
    explained = [f"{rung}: {_RUNGS[rung]}." for rung in rungs if rung in _RUNGS]
    return [*lines, "", *explained, ""]


def _clauses(reports: Sequence[Report], documented: bool) -> list[str]:
    lines = []
    by_id = [{clause["id"]: clause for clause in report["clauses"]} for report in reports]
    for name, clause in by_id[0].items():
        if (clause["origin"] != "decided") == documented:
            lines += [f"### {name}: {_plain(clause['title'])}", ""]
            for report, clauses in zip(reports, by_id, strict=True):
                lines += _clause(report, clauses[name]) if name in clauses else []
            lines.append("")
    return lines


def _clause(report: Report, clause: Any) -> list[str]:
    ranks = f"{report['ranks']} rank{'s' * (report['ranks'] > 1)}"
    cases = [case for case in report["cases"] if case["clause"] == clause["id"]]
    if not cases:
        return [f"- {ranks}: not run ({_line(clause['reason'])})"]
    failing = [case for case in cases if case["verdict"] in ("fail", "hang", "crash", "error")]
    unsupported = [case for case in cases if case["verdict"] == "unsupported"]
    judged = len(cases) - len(unsupported)
    if failing:
        head = f"- {ranks}: **{clause['verdict']}** in {len(failing)} of {judged} cases"
    else:
        head = f"- {ranks}: pass, {judged} cases" if judged else f"- {ranks}: unsupported"
    if unsupported:
        head += f"; {len(unsupported)} unsupported ({_line(unsupported[0]['message'])})"
    lines = [head]
    for case in failing[:_SHOWN]:
        lines += [
            f"  - {_plain(case['spec']['title'])}: {case['verdict']}: {_line(case['message'])}",
            f"    {code(replay_command(report, case))}",
        ]
    if len(failing) > _SHOWN:
        lines.append(f"  - and {len(failing) - _SHOWN} more cases")
    return lines


def _plain(title: str) -> str:
    """A title of a case or a clause as Markdown; those of the suite stay as they are."""
    return re.sub(
        r"[\\`*<>|\[\]&]|(?<!\w)_|_(?!\w)", lambda found: f"\\{found[0]}", one_line(title)
    )


def _line(message: str | None) -> str:
    """A message as one line of Markdown."""
    text = one_line(message or "")
    # The same on every machine: no folder of an environment, no address of an object.
    text = re.sub(r'"[^"]*/site-packages/', '"', text)
    text = re.sub(r"\b0x[0-9a-f]{8,}", "0x...", text)
    return re.sub(r"[\\`*_<>|\[\]]", lambda found: f"\\{found[0]}", text)
