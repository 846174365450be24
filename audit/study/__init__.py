"""The bound, calibrated: how far sound and unsound layers are from the reference on the same data.

measures.py   what CANN's published standards measure
layers.py     the layers that are no backend of ours
collect.py    asks the cases and measures the answers
page.py       the tables of docs/tolerances.md
plots.py      its plots
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from audit.study import collect, page, plots
from audit.study.collect import Study, StudyError
from syncbn.conformance.case import Case

__all__ = ["StudyError", "main"]


def main(ranks: int, profile: str, out: Path, document: Path, console: Console) -> int:
    """Make the study, and write its numbers to `out` and its tables and plots to the document.

    Args:
        out: a file for JSON.
        document: a Markdown file; the plots go into the folder of its name.

    Returns:
        The exit status: 0 if every sound layer is under the threshold and every unsound one is
        over it wherever its fault must show.

    Raises:
        StudyError: matplotlib is not installed.
        PageError: the document has no place for a table.
        TargetError: a layer cannot be loaded.
    """
    plots.require_matplotlib()
    start = time.monotonic()
    with console.status(f"starting {ranks} ranks of every layer") as status:

        def progress(case: Case, place: int, count: int) -> None:
            status.update(f"{place} of {count}, {case.clause}: {case.title}")

        study = collect.run(ranks, profile, progress)
    out.write_text(json.dumps(numbers(study), indent=1, allow_nan=False) + "\n")
    page.write(study, document)
    drawn = plots.draw(study, document.with_suffix(""))
    console.print(page.layers(study), highlight=False, soft_wrap=True)
    wrong = page.wrong(study)
    for line in wrong:
        console.print(line, highlight=False, soft_wrap=True)
    written = ", ".join(map(str, (out, document, *drawn)))
    console.print(f"{time.monotonic() - start:.0f} s; wrote {written}", highlight=False)
    return 1 if wrong else 0


def numbers(study: Study) -> dict[str, Any]:
    """The study as JSON values."""
    return {
        "environment": study.environment,
        "left_out": study.left_out,
        "unanswered": study.unanswered,
        "layers": [
            {
                "name": one.name,
                "sound": one.sound,
                "mutant": one.mutant,
                "target": one.target.document,
            }
            for one in study.implementations
        ],
        "cases": [asdict(case) for case in study.cases.values()],
        "measured": [
            {key: _value(value) for key, value in asdict(one).items()} for one in study.measured
        ],
    }


def _value(value: Any) -> Any:
    """JSON has no infinity."""
    return "inf" if isinstance(value, float) and math.isinf(value) else value
