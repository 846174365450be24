"""Tables of pages that are partly written by hand: each has its place between two comments."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from syncbn.conformance import ConformanceError


class PageError(ConformanceError, ValueError):
    """A page that has no place for a table, or one too many; the text says which it must have."""


def table(header: Sequence[str], rows: Iterable[Sequence[str]], right: Iterable[int] = ()) -> str:
    """A Markdown table; `right` are the columns of numbers."""
    columns = set(right)
    rule = ["--:" if place in columns else "---" for place in range(len(header))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


def fill(page: Path, tables: Mapping[str, str]) -> None:
    """Put the tables into the page, each between `<!-- made: NAME -->` and `<!-- end -->`.

    Raises:
        PageError: the page has not exactly one such place for each table.
    """
    text = page.read_text(encoding="utf-8")
    places = re.findall(r"<!-- made: (\w+) -->", text)
    if sorted(places) != sorted(tables):
        raise PageError(
            f"{page.name} must have one place for each of {', '.join(tables)}, got "
            f"{', '.join(places) or 'none'}"
        )
    for name, made in tables.items():
        start, end = f"<!-- made: {name} -->\n", "<!-- end -->"
        before, _, rest = text.partition(start)
        text = f"{before}{start}{made}\n{end}{rest.partition(end)[2]}"
    page.write_text(text, encoding="utf-8")
