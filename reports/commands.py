"""The commands that show reports, as `syncbn-conformance report` offers them."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from syncbn.reports.console import PatientConsole
from syncbn.reports.document import Report, load
from syncbn.reports.files import write
from syncbn.reports.findings import findings
from syncbn.reports.table import summarize


def add_commands(parser: argparse.ArgumentParser) -> None:
    """Add the commands to a parser. Each sets `command`, a function of the parsed options.

    That function returns the exit status, or raises ReportError or OSError.
    """
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    place = "a report, or the directory of a run, which holds it as report.json"
    show = commands.add_parser(
        "show",
        help="print a report as a table",
        description="Print a report: the target, a row for each clause, the failing cases with "
        "the commands that replay them, and a last line with the verdict.",
        epilog="The exit status is 0 if the report could be read, whatever its verdict, and 2 if "
        "not. A table that is not printed to a terminal is plain text, 80 columns wide; the "
        "variable COLUMNS sets another width.",
    )
    show.add_argument("file", metavar="FILE", type=Path, help=place)
    show.set_defaults(command=_show)
    text = "Write what runs of one target found, clause by clause, as a Markdown page."
    page = commands.add_parser("findings", help="write a Markdown page", description=text)
    page.add_argument("files", metavar="FILE", type=Path, nargs="+", help=place)
    page.add_argument("--out", type=new_file, help="the file to write (default: standard output)")
    page.set_defaults(command=_findings)


def _show(options: argparse.Namespace) -> int:
    summarize(_load(options.file), PatientConsole())
    return 0


def _findings(options: argparse.Namespace) -> int:
    command = shlex.join(["syncbn-conformance", "report", "findings", *map(str, options.files)])
    text = findings([_load(path) for path in options.files], command)
    if options.out is None:
        print(text, end="")
    else:
        write(options.out, text, "findings")
    return 0


def new_file(text: str) -> Path:
    """The path of a file to write, so that a wrong one ends a command before it works."""
    path = Path(text)
    if not path.absolute().parent.is_dir() or path.is_dir():
        raise argparse.ArgumentTypeError(f"must be a file in a directory that exists, got {text!r}")
    return path


def _load(path: Path) -> Report:
    return load(path / "report.json" if path.is_dir() else path)
