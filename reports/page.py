"""A report as one self-contained HTML page, for a screen, a phone and paper."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from syncbn.reports.charts import heat_map, histograms, pairs, ratio_bar
from syncbn.reports.document import THRESHOLD, Report
from syncbn.reports.files import ReportError, read
from syncbn.reports.importance import explained, importance
from syncbn.reports.schema import parse
from syncbn.reports.table import facts, ratio_text, replay_command, subject
from syncbn.reports.text import escaped, one_line

_CSS = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
_FAILING = ("fail", "hang", "crash", "error")
_LARGEST_PRODUCT = 100_000  # bytes
_CASES_SHOWN = 5  # failing cases of a clause
_LINES_SHOWN = 12  # of the message of a case
_STAMPS = {"pass": "PASS", "fail": "FAIL", "error": "NO VERDICT", "incomplete": "INCOMPLETE"}
_FINDINGS = {
    "agree": "target, oracle and reference agree",
    "target departs": "only the target is out of bound",
    "oracle departs": "only the oracle is out of bound",
    "both depart": "both are out of bound, and differ from each other",
    "reference departs": "target and oracle agree, but not with the reference: look at it first",
    "no answer": "the oracle raised, hung, crashed or does not support the case",
    "not asked": "the case expects an error, at which the oracle might hang",
}


def page(reports: Sequence[Report], product: Mapping[str, str] | None = None) -> str:
    """The page of one or more runs, without scripts and without anything from elsewhere.

    Args:
        reports: at least one valid report.
        product: what was judged, in the words of its maker; None to name the target.
    """
    target = reports[0]["target"]["name"]
    title = (product or {}).get("name") or target
    body = "".join(_run(report, title, product) for report in reports)
    return shell(f"{title}: conformance", body + _reading())


def load_product(path: Path) -> dict[str, str]:
    """What a certificate names as its product: texts by name.

    Raises:
        ReportError: the file cannot be read, or holds something else.
    """
    try:
        product = parse(read(path, _LARGEST_PRODUCT, "product"))
    except ReportError:
        raise
    except ValueError as error:
        raise ReportError(f"product {path} is not JSON: {error}") from error
    if not isinstance(product, dict) or not all(isinstance(one, str) for one in product.values()):
        raise ReportError(f"product {path}: must be an object of texts")
    return {str(name): str(value) for name, value in product.items()}


def shell(title: str, body: str) -> str:
    """A whole page around its sections."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escaped(one_line(title))}</title>'
        f"<style>\n{_CSS}</style></head>\n<body><main>\n{body}\n</main></body></html>\n"
    )


def section(title: str, text: str, body: str) -> str:
    """A section with a heading and a sentence that explains it."""
    return f"<section><h2>{title}</h2><p class=dim>{text}</p>{body}</section>\n"


def stamp(report: Report) -> str:
    """The verdict of a run, large."""
    verdict = report["summary"]["verdict"]
    return f'<span class="stamp {verdict}">{_STAMPS[verdict]}</span>'


def pill(verdict: str) -> str:
    """The verdict of a clause or case."""
    return f'<span class="verdict {verdict}">{verdict.replace("-", " ")}</span>'


def _run(report: Report, title: str, product: Mapping[str, str] | None) -> str:
    return (
        _header(report, title, product)
        + _failures(report)
        + _clauses(report)
        + section(
            "Clause by dtype",
            "The largest ratio of each clause, by the dtype of the input.",
            heat_map(report),
        )
        + section(
            "Distribution of the ratios",
            "The largest ratio of each case, by dtype, on a logarithmic axis. The dashed lines are "
            f"the bound, 1, and the threshold, {THRESHOLD}.",
            histograms(report),
        )
        + _three_ways(report)
        + _environment(report)
    )


def _header(report: Report, title: str, product: Mapping[str, str] | None) -> str:
    summary = report["summary"]
    required, cases = summary["required"], summary["cases"]
    worst = max(
        (float(c["worst_ratio"]) for c in report["clauses"] if c["worst_ratio"] is not None),
        default=None,
    )
    failing = sum(cases[name] for name in _FAILING)
    figures = {
        f"of {sum(required.values())} required clauses pass": str(required["pass"]),
        f"of {sum(cases.values())} cases pass": str(cases["pass"]),
        "cases fail": str(failing or ""),
        "cases are unsupported": str(cases["unsupported"] or ""),
        f"largest ratio; {THRESHOLD} is the threshold": ratio_text(worst),
    }
    boxes = "".join(
        f"<div class=figure><b>{value}</b><span class=dim>{name}</span></div>"
        for name, value in figures.items()
        if value
    )
    missing = len(report["must_pass"]["missing"])
    note = (
        f"<p><b>{missing} cases on the list of the profile did not run.</b></p>" if missing else ""
    )
    about = {name: value for name, value in (product or {}).items() if name != "name"}
    return (
        f"<header><div class=head><div><h1>{escaped(one_line(title))}</h1>"
        f"<p class=lead>{escaped(subject(report))}</p></div>{stamp(report)}</div>{note}"
        f"<div class=figures>{boxes}</div>{pairs(about | facts(report))}</header>\n"
    )


def _failures(report: Report) -> str:
    failing: defaultdict[str, list[Any]] = defaultdict(list)
    for case in report["cases"]:
        if case["verdict"] in _FAILING:
            failing[case["clause"]].append(case)
    if not failing:
        return ""
    order = []
    for place, clause in enumerate(report["clauses"]):
        if bad := failing[clause["id"]]:
            count = sum(not explained(case) for case in bad)
            key = importance(clause["id"], count, clause["cases"], clause["required"], place)
            order.append((key, clause))
    order.sort(key=lambda entry: entry[0])
    text = "What went wrong, the most important clause first, and the commands that run it again."
    found = [_failing_clause(report, clause, failing[clause["id"]]) for _, clause in order]
    return section("Failures", text, "".join(found))


def _failing_clause(report: Report, clause: Any, bad: Sequence[Any]) -> str:
    count = f"{len(bad)} of {clause['cases']} cases"
    mark = "" if clause["required"] else "; does not count for the verdict"
    title = f"{clause['id']} {escaped(clause['title'])} <span class=dim>{count}{mark}</span>"
    cases = "".join(_case(report, case) for case in bad[:_CASES_SHOWN])
    rest = len(bad) - _CASES_SHOWN
    more = f"<p class=dim>and {rest} more in the report</p>" if rest > 0 else ""
    return f"<h3>{title}</h3>{cases}{more}"


def _case(report: Report, case: Any) -> str:
    lines = (case["message"] or "").splitlines()
    if len(lines) > _LINES_SHOWN:
        lines = [*lines[:_LINES_SHOWN], f"and {len(lines) - _LINES_SHOWN} more lines"]
    title = escaped(one_line(str(case["spec"].get("title", ""))))
    message = escaped("\n".join(lines))
    command = escaped(one_line(replay_command(report, case)))
    return (
        f"<div class=case>{pill(case['verdict'])} {title} <span class=dim>{case['id']}</span>"
        f"<pre class=mono>{message}</pre><code class=run>{command}</code></div>"
    )


def _clauses(report: Report) -> str:
    rows = []
    for clause in report["clauses"]:
        some = clause["verdict"] == "pass" and clause["unsupported"]
        reason = clause["reason"] if clause["verdict"] not in _FAILING else None
        text = f"{clause['unsupported']} unsupported: {reason}" if some else reason or ""
        note = f"<div class=reason>{escaped(one_line(text))}</div>" if text else ""
        mark = "" if clause["required"] else "*"
        rows.append(
            f"<tr><td class=id>{clause['id']}{mark}</td><td>{escaped(clause['title'])}{note}</td>"
            f"<td class='origin wide'>{clause['origin']}</td><td>{pill(clause['verdict'])}</td>"
            f"<td class='number wide'>{clause['cases']}</td>"
            f"<td class=number>{ratio_bar(clause['worst_ratio'])}</td></tr>"
        )
    head = "<th>clause</th><th>title</th><th class=wide>origin</th><th>verdict</th>"
    head += "<th class='number wide'>cases</th><th class=number>ratio</th>"
    star = " A clause with * does not count for the verdict."
    text = "The rules of the contract, with the largest ratio of their cases."
    text += star if any(not clause["required"] for clause in report["clauses"]) else ""
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return section("Clauses", text, table)


def _three_ways(report: Report) -> str:
    oracle = report["oracle"]["target"]
    if oracle is None:
        text = f"There was no oracle: {escaped(one_line(str(report['oracle']['left_out'])))}."
        return section("Three ways", text, "")
    found: Counter[str] = Counter()
    where: Counter[tuple[str, str]] = Counter()
    for case in report["cases"]:
        if case["oracle"]:
            found[case["oracle"]["finding"]] += 1
            where[case["oracle"]["finding"], case["clause"]] += 1
    rows = "".join(
        f"<tr><td class=id>{name}</td><td class=number>{found[name]}</td><td>{text}"
        f"<div class=reason>{_places(name, where)}</div></td></tr>"
        for name, text in _FINDINGS.items()
        if found[name]
    )
    name = escaped(one_line(f"{oracle['name']} ({oracle['device']}, {oracle['rung']})"))
    text = f"The same cases on {name}, as the oracle: which of three departs from the others."
    head = "<th>finding</th><th class=number>cases</th><th>meaning, and where</th>"
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return section("Three ways", text, table)


def _places(finding: str, where: Counter[tuple[str, str]]) -> str:
    if finding == "agree":
        return ""
    return ", ".join(f"{clause} {n}" for (name, clause), n in where.items() if name == finding)


def _environment(report: Report) -> str:
    items = dict(sorted(report["environment"].items()))
    if run := report.get("run"):
        items |= {"command": " ".join(run["command"])}
    return section("Environment", "The machine and the software of the run.", pairs(items))


def _reading() -> str:
    return (
        "<footer><p>A ratio is the largest error of a case in multiples of the bound that is "
        f"derived for each value. A case passes up to {THRESHOLD}. The rung states what stands for "
        "the hardware: only <i>device</i> is the layer itself on the device that is named. "
        "This page is made from a report and proves nothing by itself.</p></footer>"
    )
