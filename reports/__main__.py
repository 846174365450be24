"""The command line: python -m reports show FILE."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from reports import ReportError, load, summarize


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status, 2 if the report cannot be read."""
    path: Path = _parser().parse_args(arguments).file
    try:
        report = load(path / "report.json" if path.is_dir() else path)
    except ReportError as error:
        print(f"reports: {error}", file=sys.stderr)
        return 2
    summarize(report, Console())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m reports", description="Show what the conformance suite wrote."
    )
    commands = parser.add_subparsers(title="commands", required=True)
    show = commands.add_parser(
        "show",
        help="print a report as a table",
        description="Print a report: what was judged, a row per clause, the failing cases with "
        "the commands that replay them, and one line that says it all.",
        epilog="Exit status: 0 if the report could be read, whatever its verdict (showing is not "
        "judging); 2 if not, with one line on standard error. A table that is not printed to a "
        "terminal is plain text, 80 columns wide unless the variable COLUMNS says otherwise.",
    )
    show.add_argument(
        "file",
        metavar="FILE",
        type=Path,
        help="the report, or the directory of a run, which holds it as report.json",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
