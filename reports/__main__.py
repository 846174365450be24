"""The command line: python -m syncbn.reports show FILE, or findings FILE..."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from syncbn.reports import ReportError, findings, load, summarize
from syncbn.reports.document import Report


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status, 2 if a report cannot be read."""
    options = _parser().parse_args(arguments)
    try:
        options.command(options)
    except (ReportError, OSError) as error:
        print(f"reports: {error}", file=sys.stderr)
        return 2
    return 0


def _show(options: argparse.Namespace) -> None:
    summarize(_load(options.file), Console())


def _findings(options: argparse.Namespace) -> None:
    command = shlex.join(["python", "-m", "syncbn.reports", "findings", *map(str, options.files)])
    text = findings([_load(path) for path in options.files], command)
    if options.out is None:
        print(text, end="")
    else:
        options.out.write_text(text)


def _load(path: Path) -> Report:
    return load(path / "report.json" if path.is_dir() else path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m syncbn.reports", description="Show what the conformance suite wrote."
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
    place = "the report, or the directory of a run, which holds it as report.json"
    show.add_argument("file", metavar="FILE", type=Path, help=place)
    show.set_defaults(command=_show)
    text = "Write what runs of one target found, clause by clause, as a Markdown document."
    found = commands.add_parser("findings", help="write a document", description=text)
    found.add_argument("files", metavar="FILE", type=Path, nargs="+", help=place)
    found.add_argument("--out", type=Path, help="where to (default: standard output)")
    found.set_defaults(command=_findings)
    return parser


if __name__ == "__main__":
    sys.exit(main())
