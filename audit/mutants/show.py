"""The results of the mutants: on the terminal, as JSON, and as a table of docs/suite.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from audit import markdown
from audit.mutants import CONTROL, MUTANTS
from audit.mutants.results import FRAMEWORKS, KILLS, MARKS, NO_CASE, Row
from syncbn.conformance.clauses import CLAUSES


def table(rows: Sequence[Row]) -> Table:
    """A row for each mutant with its mark in each clause."""
    clauses = [clause for clause in CLAUSES if any(row.mark(clause) for row in rows)]
    shown = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    shown.add_column("mutant", vertical="bottom", no_wrap=True)
    for clause in clauses:
        shown.add_column("\n".join(clause), width=1, vertical="bottom")
    for row in rows:
        marks = (_colored(row, clause) for clause in clauses)
        shown.add_row(Text(row.mutant, style="bold red" if row.wrong else ""), *marks)
    return shown


def _colored(row: Row, clause: str) -> Text:
    declared = clause in row.dies_in
    mark = row.mark(clause)
    bad = any(at == clause for at, _ in row.wrong)
    return Text(mark, style="bold red" if bad else "bold green" if declared else "dim")


def summary(rows: Sequence[Row]) -> list[str]:
    """The number of mutants killed in each framework, and a line for each wrong result."""
    lines = []
    for framework in FRAMEWORKS:
        mine = [row for row in rows if row.framework == framework and row.mutant != CONTROL]
        if mine:
            dead = sum(not row.wrong for row in mine)
            lines.append(f"{framework}: {dead} of {len(mine)} mutants killed")
    for row in rows:
        for clause, seed in row.wrong:
            result = row.results.get((clause, seed), NO_CASE)
            what = "CONTROL FAILS" if row.mutant == CONTROL else "SURVIVES"
            detail = f": {result.message}" if result.message else ""
            lines.append(
                f"{what} {row.framework} {row.mutant}, {clause}, seed {seed}: "
                f"{MARKS[result.mark]}{detail}"
            )
    return lines


def document(rows: Sequence[Row], ranks: int, seeds: Sequence[int], seconds: float) -> Any:
    """The rows as JSON values."""
    return {
        "ranks": ranks,
        "seeds": list(seeds),
        "seconds": round(seconds, 1),
        "mutants": [
            {
                "name": row.mutant,
                "framework": row.framework,
                "fault": None if row.mutant == CONTROL else MUTANTS[row.mutant].__doc__,
                "dies_in": list(row.dies_in),
                "as_declared": not row.wrong,
                "results": [
                    {
                        "clause": clause,
                        "seed": seed,
                        "result": MARKS[result.mark],
                        "case": result.case.id if result.case else None,
                        "message": result.message,
                    }
                    for (clause, seed), result in row.results.items()
                ],
            }
            for row in rows
        ],
    }


def fill(rows: Sequence[Row], ranks: int, seeds: int, page: Path) -> None:
    """Put the summary and the table of the mutants into the page.

    Raises:
        PageError: the page has no place for one of them.
    """
    text = f"{ranks} ranks, {seeds} seed{'s' * (seeds > 1)}; {'; '.join(summary(rows))}."
    origin = f"- planted faults: {markdown.origin()}"
    markdown.fill(page, {"origin": origin, "summary": text, "mutants": page_table(rows)})


def page_table(rows: Sequence[Row]) -> str:
    """A row for each mutant: its fault, where that was seen, and the clauses that killed it."""
    by_name: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row.mutant != CONTROL:
            by_name.setdefault(row.mutant, {})[row.framework] = row
    frameworks = [name for name in FRAMEWORKS if any(row.framework == name for row in rows)]
    header = ("mutant", "fault", "source", *(f"killed in: {name}" for name in frameworks))
    return markdown.table(
        header,
        (
            (
                name,
                *_fault_and_source(name),
                *(_killed(row.get(framework)) for framework in frameworks),
            )
            for name, row in by_name.items()
        ),
    )


def _fault_and_source(mutant: str) -> tuple[str, str]:
    fault, _, source = (MUTANTS[mutant].__doc__ or "").partition("Source: ")
    return " ".join(fault.split()), " ".join(source.split()).removesuffix(".")


def _killed(row: Row | None) -> str:
    """The clauses that killed the mutant; those that must are bold."""
    if row is None:
        return "not built"
    killed = [clause for clause in CLAUSES if row.mark(clause) in KILLS]
    return (
        ", ".join(f"**{clause}**" if clause in row.dies_in else clause for clause in killed)
        or "SURVIVES"
    )
