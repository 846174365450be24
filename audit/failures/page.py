"""The page docs/failure-modes.md: a table of failures for each section of the list."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from audit import markdown
from audit.failures.known import (
    SOURCE,
    Failure,
    FailureListError,
    Sections,
    cases_of,
    flat,
    problems,
)
from syncbn.conformance.case import Case

_SHOWN = 5  # ids of cases in a row; one more is shown instead of "and 1 more"


def write(path: Path, sections: Sections, cases: Sequence[Case]) -> None:
    """Write `document` to a file.

    Raises:
        FailureListError: the list does not fit the cases; no file is written.
    """
    path.write_text(document(sections, cases), encoding="utf-8")


def document(sections: Sections, cases: Sequence[Case]) -> str:
    """The page as Markdown. All cases have the same number of ranks.

    Raises:
        FailureListError: the list does not fit the cases.
    """
    if lines := problems(sections, cases):
        raise FailureListError("\n".join(lines))
    parts = [_introduction(flat(sections), cases[0].ranks)]
    for name, failures in sections.items():
        rows = [_row(failure, cases_of(failure, cases)) for failure in failures]
        parts.append(f"## {name}\n\n{markdown.table(('failure', 'sources', 'caught by'), rows)}\n")
    return "\n".join(parts)


def _introduction(failures: Sequence[Failure], ranks: int) -> str:
    caught = sum(bool(failure.caught_by) for failure in failures)
    return f"""\
# Known failures of SyncBatchNorm, and the cases that catch them

Generated from `audit/failures/known.toml` and the cases by `python -m audit failures`; a test holds
the page to both.

{len(failures)} ways in which this layer failed in public. They were found in issues, pull requests
and commits of other projects, and by reading source code ("OWNER/REPOSITORY: PATH, which part of
it"; that code was not always run). For {caught} of them the suite has a case that would have caught
the failure. For the others a row gives the reason, and names what shows something of it instead.

A row names clauses of the [contract](contract.md) and the ids of cases on {ranks} ranks.
`syncbn-conformance replay ID --target TARGET --ranks {ranks}` runs one of them on a layer;
[conformance.md](conformance.md) explains how a layer is judged.
"""


def _row(failure: Failure, cases: Sequence[Case]) -> tuple[str, str, str]:
    links = ", ".join(_link(source) for source in failure.sources)
    caught_by = _named(cases) if cases else f"no case. {failure.no_case}"
    return f"**{failure.id}**: {failure.went_wrong}", links, caught_by


def _named(cases: Sequence[Case]) -> str:
    clauses = ", ".join(dict.fromkeys(case.clause for case in cases))
    shown = cases if len(cases) <= _SHOWN + 1 else cases[:_SHOWN]
    ids = ", ".join(f"`{case.id}`" for case in shown)
    more = f" and {len(cases) - len(shown)} more" if len(shown) < len(cases) else ""
    return f"{clauses}: {ids}{more}"


def _link(source: str) -> str:
    match = SOURCE.fullmatch(source)
    assert match
    base = f"https://github.com/{match['repository']}"
    if match["number"]:  # GitHub redirects to pull requests
        return f"[{source}]({base}/issues/{match['number']})"
    if match["commit"]:
        return f"[{source}]({base}/commit/{match['commit']})"
    return f"[{source}]({base}/blob/HEAD/{match['path']})"
