"""The command: make the study, and write its numbers and its tables."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from audit.study import collect, page
from audit.study.collect import Study
from syncbn.conformance.case import Case


def main(*, ranks: int, profile: str, out: Path, document: Path, console: Console) -> int:
    """Make the study, and write its numbers to `out` and its tables into `document`.

    Args:
        ranks: the number of ranks.
        profile: of the cases.
        out: a file for JSON.
        document: a Markdown file with a place for each table.
        console: for progress and the result.

    Returns:
        The exit status: 0 if every sound layer is under the threshold, and every unsound layer is
        over it wherever its fault must show.

    Raises:
        PageError: the document has no place for a table.
        TargetError: a layer cannot be loaded.
    """
    start = time.monotonic()
    with console.status(f"starting {ranks} ranks of every layer") as status:

        def progress(case: Case, number: int, count: int) -> None:
            status.update(f"{number} of {count}, {case.clause}: {case.title}")

        study = collect.run(ranks, profile, progress)
    out.write_text(json.dumps(numbers(study), indent=1, allow_nan=False) + "\n")
    page.write(study, document)
    console.print(page.layers(study), highlight=False, soft_wrap=True)
    wrong = page.wrong(study)
    for line in wrong:
        console.print(line, highlight=False, soft_wrap=True)
    seconds = time.monotonic() - start
    console.print(f"{seconds:.0f} s; wrote {out}, {document}", highlight=False)
    return 1 if wrong else 0


def numbers(study: Study) -> dict[str, Any]:
    """The study as JSON values."""
    return {
        "environment": study.environment,
        "left_out": study.left_out,
        "not_run": study.not_run,
        "layers": [
            {
                "name": layer.name,
                "sound": layer.sound,
                "mutant": layer.mutant,
                "target": layer.target.document,
            }
            for layer in study.layers
        ],
        "cases": {id: case.document for id, case in study.cases.items()},
        "measurements": [
            {key: _json(value) for key, value in asdict(measurement).items()}
            for measurement in study.measurements
        ],
    }


def _json(value: Any) -> Any:
    """JSON has no infinity."""
    return "inf" if isinstance(value, float) and math.isinf(value) else value
