"""Charts of a page: the map of clause and dtype, and the distributions of ratios, as HTML."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from syncbn.reports.document import THRESHOLD, Report
from syncbn.reports.table import ratio_text
from syncbn.reports.text import escaped

DTYPES = ("float32", "float16", "bfloat16", "float64")
_OTHER = "other"
_FAILING = ("fail", "hang", "crash", "error")

# The colours of the map: the class, the largest ratio, and what the legend calls it.
_LEVELS = (
    ("r0", 0.1, "up to 0.1"),
    ("r1", 0.3, "up to 0.3"),
    ("r2", 1.0, "up to 1, the bound"),
    ("r3", float(THRESHOLD), f"up to {THRESHOLD}, the threshold"),
    ("r4", math.inf, "above, or failed"),
)

# The axis of a histogram: powers of ten, with as many bars for each.
_FIRST, _LAST, _BARS = -4, 2, 8
_WIDTH, _HEIGHT, _FOOT = 340, 120, 22


def dtypes(case: Any) -> set[str]:
    """The dtypes of the inputs of a case; of its layer, if it has no steps."""
    spec = case["spec"]
    steps = spec.get("steps")
    steps = [step for step in steps if isinstance(step, dict)] if isinstance(steps, list) else []
    layer = spec.get("layer")
    given: list[Any] = [step.get("dtype", DTYPES[0]) for step in steps]
    if not given:
        given = [layer.get("dtype", DTYPES[0]) if isinstance(layer, dict) else DTYPES[0]]
    flat = [one for each in given for one in (each if isinstance(each, list) else [each])]
    return {one if one in DTYPES else _OTHER for one in map(str, flat)}


def heat_map(report: Report) -> str:
    """A table: a row for each clause, a column for each dtype, the worst ratio in each cell."""
    cells: defaultdict[tuple[str, str], list[Any]] = defaultdict(list)
    for case in report["cases"]:
        for dtype in dtypes(case):
            cells[case["clause"], dtype].append(case)
    columns = [name for name in (*DTYPES, _OTHER) if any(name == dtype for _, dtype in cells)]
    rows = "".join(
        f'<tr><th scope="row">{escaped(clause["id"])}</th>'
        + "".join(_cell(cells.get((clause["id"], name), [])) for name in columns)
        + "</tr>"
        for clause in report["clauses"]
        if any((clause["id"], name) in cells for name in columns)
    )
    head = "".join(f'<th scope="col">{name}</th>' for name in columns)
    return (
        f"{_legend()}<table class=map><thead><tr><th scope=col>clause</th>{head}</tr></thead>"
        f"<tbody>{rows}</tbody></table>"
    )


def _legend() -> str:
    marks = [(name, text) for name, _, text in _LEVELS] + [("facts", "no numbers compared")]
    return (
        "<div class=legend>"
        + "".join(f"<span><i class={name}></i>{text}</span>" for name, text in marks)
        + "</div>"
    )


def _cell(cases: Sequence[Any]) -> str:
    if not cases:
        return "<td></td>"
    verdicts = [case["verdict"] for case in cases]
    ratios = [float(case["ratio"]) for case in cases if case["ratio"] is not None]
    judged = [verdict for verdict in verdicts if verdict not in ("unsupported", "not-run")]
    failed = next((verdict for verdict in verdicts if verdict in _FAILING), None)
    title = f"{len(cases)} case{'s' * (len(cases) > 1)}"
    if not judged:
        return f'<td class=facts title="{title}">n/a</td>'
    if not ratios:
        name, text = ("r4", failed) if failed else ("facts", "pass")
        return f'<td class={name} title="{title}">{text}</td>'
    worst = max(ratios)
    name = "r4" if failed else next(name for name, most, _ in _LEVELS if worst <= most)
    text = failed if failed and worst <= THRESHOLD else ratio_text(worst)
    return f'<td class={name} title="{title}">{text}</td>'


def histograms(report: Report) -> str:
    """A histogram of the ratios for each dtype, on a logarithmic axis with bound and threshold."""
    ratios: defaultdict[str, list[float]] = defaultdict(list)
    for case in report["cases"]:
        if case["ratio"] is not None:
            for dtype in dtypes(case):
                ratios[dtype].append(float(case["ratio"]))
    charts = [_histogram(name, ratios[name]) for name in (*DTYPES, _OTHER) if ratios[name]]
    return f"<div class=charts>{''.join(charts)}</div>"


def _histogram(name: str, ratios: Sequence[float]) -> str:
    counts = [0] * (_BARS * (_LAST - _FIRST))
    for ratio in ratios:
        place = 10.0**_LAST if ratio > 10.0**_LAST else max(ratio, 10.0**_FIRST)
        bar = int((math.log10(place) - _FIRST) * _BARS)
        counts[min(bar, len(counts) - 1)] += 1
    most, width, high = max(counts), _WIDTH / len(counts), _HEIGHT - _FOOT
    bars = "".join(
        f'<rect x="{index * width + 0.5:.1f}" y="{high * (1 - count / most):.1f}" '
        f'width="{width - 1:.1f}" height="{high * count / most:.1f}" fill="{_color(index)}"/>'
        for index, count in enumerate(counts)
        if count
    )
    lines = "".join(
        f'<line x1="{_x(value):.1f}" x2="{_x(value):.1f}" y1="0" y2="{high}" stroke="{color}" '
        'stroke-dasharray="3 3"/>'
        for value, color in ((1.0, "#8a94a3"), (float(THRESHOLD), "#c0272d"))
    )
    labels = {0.001: "0.001", 0.01: "0.01", 0.1: "0.1", 1.0: "1", float(THRESHOLD): f"{THRESHOLD}"}
    text = f'<text x="0" y="{_HEIGHT - 6}">0</text>' + "".join(
        f'<text x="{_x(value):.1f}" y="{_HEIGHT - 6}" text-anchor="middle">{label}</text>'
        for value, label in labels.items()
    )
    count = f"{len(ratios)} case{'s' * (len(ratios) > 1)}, median {ratio_text(_median(ratios))}"
    count += f", largest {ratio_text(max(ratios))}"
    return (
        f"<figure><figcaption>{name} <span class=dim>{count}</span>"
        f'</figcaption><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="Distribution of the ratios of {name}">{lines}{bars}'
        f'<line x1="0" x2="{_WIDTH}" y1="{high}" y2="{high}" stroke="#c6ced8"/>'
        f"{text}</svg></figure>"
    )


def _color(bar: int) -> str:
    return "#c0272d" if _FIRST + bar / _BARS >= math.log10(THRESHOLD) else "#5b8def"


def _x(ratio: float) -> float:
    return (math.log10(ratio) - _FIRST) / (_LAST - _FIRST) * _WIDTH


def _median(ratios: Iterable[float]) -> float:
    ordered = sorted(ratios)
    return ordered[len(ordered) // 2]


def ratio_bar(ratio: float | str | None) -> str:
    """A bar that is full at the threshold, and the ratio."""
    if ratio is None:
        return ""
    share = min(float(ratio) / THRESHOLD, 1.0)
    over = " class=over" if float(ratio) > THRESHOLD else ""
    return (
        f'<span class=bar><i{over} style="width:{100 * share:.0f}%"></i></span>'
        f"<span class=ratio>{ratio_text(ratio)}</span>"
    )


def pairs(items: Mapping[str, str]) -> str:
    """A list of names and values."""
    rows = "".join(
        f"<dt>{escaped(name)}</dt><dd>{escaped(value)}</dd>" for name, value in items.items()
    )
    return f"<dl>{rows}</dl>"
