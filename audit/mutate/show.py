"""The results of random mutants on the terminal and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from audit.mutate.result import Result


def document(results: Sequence[Result]) -> list[dict[str, Any]]:
    """The results as JSON values."""
    return [
        {
            "id": result.mutant.id,
            "file": result.mutant.path,
            "line": result.mutant.line,
            "function": result.mutant.function,
            "kind": result.mutant.kind,
            "diff": list(result.mutant.diff),
            "result": result.how,
            "clause": result.detection and result.detection.case and result.detection.case.clause,
            "case": result.detection and result.detection.case and result.detection.case.id,
            "message": result.detection and result.detection.message,
            "seconds": round(result.seconds, 1),
        }
        for result in results
    ]


def summarize(results: Sequence[Result], console: Console) -> None:
    """Print a row for each mutant, the diffs of the survivors, and the share killed by kind."""
    console.print(_table(results))
    for result in results:
        if result.detection is None:
            mutant = result.mutant
            console.print(f"\nsurvived: {mutant.id} {mutant.path}:{mutant.line} ({mutant.kind})")
            console.print("\n".join(mutant.diff), markup=False, highlight=False, soft_wrap=True)
    console.print()
    for kind in dict.fromkeys(result.mutant.kind for result in results):
        counts = Counter(result.how for result in results if result.mutant.kind == kind)
        killed = counts.total() - counts["survived"]
        listed = ", ".join(f"{how} {count}" for how, count in counts.most_common())
        console.print(f"{kind}: {killed} of {counts.total()} killed ({listed})", highlight=False)


def _table(results: Sequence[Result]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column in ("mutant", "place", "function", "kind", "result", "clause", "case"):
        table.add_column(column, no_wrap=True)
    for result in results:
        mutant = result.mutant
        case = result.detection.case if result.detection else None
        table.add_row(
            mutant.id,
            f"{mutant.path}:{mutant.line}",
            mutant.function,
            mutant.kind,
            result.how,
            case.clause if case else "",
            case.id if case else "",
        )
    return table
