"""Pages that are partly written by hand: the tables between two comments are generated."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from syncbn.conformance import ConformanceError

_ROOT = Path(__file__).resolve().parent.parent


class PageError(ConformanceError, ValueError):
    """A page does not have exactly one place for each table; the text names the places."""


def table(header: Sequence[str], rows: Iterable[Sequence[str]], right: Iterable[int] = ()) -> str:
    """A Markdown table. The columns in `right` hold numbers and are aligned to the right."""
    columns = set(right)
    rule = ["--:" if column in columns else "---" for column in range(len(header))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


def origin() -> str:
    """The command line of this process and the commit of the checkout, for a page."""
    command = shlex.join(["python", "-m", "audit", *sys.argv[1:]])
    commit = _git("rev-parse", "--short", "HEAD")
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return f"made by `{command}` at commit {commit}{' with uncommitted changes' if changes else ''}"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=_ROOT, capture_output=True, text=True)
    if done.returncode:
        raise PageError(f"a page must be made in a git checkout, got {done.stderr.strip()!r}")
    return done.stdout.strip()


def fill(page: Path, tables: Mapping[str, str]) -> None:
    """Put the tables into the page, each between `<!-- made: NAME -->` and `<!-- end -->`.

    Raises:
        PageError: the page does not have exactly one place for each table.
    """
    text = page.read_text(encoding="utf-8")
    places = re.findall(r"<!-- made: (\w+) -->", text)
    if sorted(places) != sorted(tables):
        raise PageError(
            f"{page.name} must have one place for each of {', '.join(tables)}, got "
            f"{', '.join(places) or 'none'}"
        )
    for name, content in tables.items():
        start, end = f"<!-- made: {name} -->\n", "<!-- end -->"
        before, _, rest = text.partition(start)
        text = f"{before}{start}{content}\n{end}{rest.partition(end)[2]}"
    page.write_text(text, encoding="utf-8")
