"""The commands that show reports, as `syncbn-conformance report` offers them."""

from __future__ import annotations

import argparse
import math
import re
import shlex
from datetime import datetime, timezone
from pathlib import Path

from syncbn.reports import compare
from syncbn.reports.baseline import baseline, load_baseline, text
from syncbn.reports.console import PatientConsole
from syncbn.reports.document import Report, load
from syncbn.reports.files import ReportError, write
from syncbn.reports.findings import findings
from syncbn.reports.gate import MAX_GROWTH, MAX_SLOWDOWN, RATIO_FLOOR, gate
from syncbn.reports.gate_views import ANNOTATIONS, gate_junit, lines, summary
from syncbn.reports.page import load_product, page
from syncbn.reports.table import summarize
from syncbn.reports.waivers import load_waivers

_PLACE = "a report, or the directory of a run, which holds it as report.json"


def add_commands(parser: argparse.ArgumentParser) -> None:
    """Add the commands to a parser. Each sets `command`, a function of the parsed options.

    That function returns the exit status, or raises ReportError or OSError.
    """
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    show = commands.add_parser(
        "show",
        help="print a report as a table",
        description="Print a report: the target, a row for each clause, the failing cases with "
        "the commands that replay them, and a last line with the verdict.",
        epilog="The exit status is 0 if the report could be read, whatever its verdict, and 2 if "
        "not. A table that is not printed to a terminal is plain text, 80 columns wide; the "
        "variable COLUMNS sets another width.",
    )
    show.add_argument("file", metavar="FILE", type=Path, help=_PLACE)
    show.set_defaults(command=_show)
    text = "Write what runs of one target found, clause by clause, as a Markdown page."
    made = commands.add_parser("findings", help="write a Markdown page", description=text)
    made.add_argument("files", metavar="FILE", type=Path, nargs="+", help=_PLACE)
    made.add_argument("--out", type=new_file, help="the file to write (default: standard output)")
    made.set_defaults(command=_findings)


def _show(options: argparse.Namespace) -> int:
    summarize(_load(options.file), PatientConsole())
    return 0


def _findings(options: argparse.Namespace) -> int:
    command = shlex.join(["syncbn-conformance", "report", "findings", *map(str, options.files)])
    found = findings([_load(path) for path in options.files], command)
    if options.out is None:
        print(found, end="")
    else:
        write(options.out, found, "findings")
    return 0


def add_baseline(parser: argparse.ArgumentParser) -> None:
    """Add the options of `baseline`, which are as those of `add_commands`."""
    parser.epilog = "The exit status is 0, or 2 if the report has no verdict or cannot be read."
    parser.add_argument("report", metavar="REPORT", type=Path, help=_PLACE)
    parser.add_argument("--out", type=new_file, required=True, help="the file to write")
    parser.set_defaults(command=_baseline)


def add_gate(parser: argparse.ArgumentParser) -> None:
    """Add the options of `gate`, which are as those of `add_commands`."""
    parser.epilog = (
        "Exit status: 0 no change, or all are waived; 1 something changed, or a waiver is expired "
        "or matches nothing; 2 an input cannot be read, or the report is of something else than "
        "the baseline; 3 no verdict, because the suite or the machine failed in the run."
    )
    parser.add_argument("report", metavar="REPORT", type=Path, help=_PLACE)
    parser.add_argument(
        "--baseline", type=Path, required=True, metavar="FILE", help="what `baseline` wrote"
    )
    parser.add_argument(
        "--waivers", type=Path, metavar="FILE", help="changes that may pass, as TOML or JSON"
    )
    parser.add_argument(
        "--max-growth",
        type=_factor,
        default=MAX_GROWTH,
        metavar="F",
        help="fail if the ratio of a case that passes is more than F times what it was; ratios "
        f"below {RATIO_FLOOR} count as {RATIO_FLOOR} (default {MAX_GROWTH:g})",
    )
    parser.add_argument(
        "--max-slowdown",
        type=_factor,
        default=MAX_SLOWDOWN,
        metavar="F",
        help=f"warn if the cases took more than F times as long (default {MAX_SLOWDOWN:g})",
    )
    parser.add_argument(
        "--junit", type=new_file, metavar="FILE", help="also write the changes as JUnit XML"
    )
    parser.add_argument(
        "--markdown",
        type=new_file,
        metavar="FILE",
        help="also write a summary for a pull request, the most important clause first",
    )
    parser.add_argument(
        "--annotations",
        choices=tuple(ANNOTATIONS),
        help="github: also print workflow commands; gitlab: also write a code quality report, "
        "gl-code-quality-report.json",
    )
    parser.set_defaults(command=_gate)


def add_compare(parser: argparse.ArgumentParser) -> None:
    """Add the options of `compare`, which are as those of `add_commands`."""
    parser.epilog = "The exit status is 0 whatever differs, and 2 if a report cannot be read."
    parser.add_argument("a", metavar="A", type=Path, help=_PLACE)
    parser.add_argument("b", metavar="B", type=Path, help="the same")
    parser.add_argument("--markdown", type=new_file, metavar="FILE", help="also write Markdown")
    parser.add_argument("--html", type=new_file, metavar="FILE", help="also write an HTML page")
    parser.set_defaults(command=_compare)


def add_html(parser: argparse.ArgumentParser) -> None:
    """Add the options of `html`, which are as those of `add_commands`."""
    parser.epilog = "The exit status is 0 whatever the verdict, and 2 if a report cannot be read."
    parser.add_argument(
        "place",
        metavar="REPORT_OR_DIR",
        type=Path,
        help="a report, the directory of a run, or the package of a certificate",
    )
    parser.add_argument("--out", type=new_file, required=True, help="the file to write")
    parser.set_defaults(command=_html)


def _compare(options: argparse.Namespace) -> int:
    compared = compare.compare(_load(options.a), _load(options.b))
    if options.markdown:
        write(options.markdown, compare.as_markdown(compared), "comparison")
    if options.html:
        write(options.html, compare.as_html(compared), "comparison")
    console = PatientConsole()
    compare.show(compared, console if console.is_terminal else PatientConsole(width=120))
    return 0


def _html(options: argparse.Namespace) -> int:
    runs = sorted(options.place.glob("runs/*/report.json"), key=_by_number)
    product = options.place / "product.json"
    for path in [*runs, product] if runs else ():
        _check_regular(path, options.place)
    found = [_load(path) for path in runs or [options.place]]
    write(options.out, page(found, load_product(product) if runs else None), "page")
    print(f"wrote {options.out}")
    return 0


def _check_regular(path: Path, package: Path) -> None:
    """Refuse a link or a pipe in a package, which a stranger may have made.

    Raises:
        ReportError: with the path.
    """
    linked = path.resolve() != package.resolve() / path.relative_to(package)
    if linked or (path.exists() and not path.is_file()):
        raise ReportError(f"{path} must be a regular file, and no link may lead to it")


def _by_number(path: Path) -> tuple[int, str]:
    """Runs on 8 ranks come before those on 16."""
    name = path.parent.name
    return int(name) if re.fullmatch("[0-9]{1,9}", name) else 0, name


def _baseline(options: argparse.Namespace) -> int:
    write(options.out, text(baseline(_load(options.report))), "baseline")
    print(f"wrote {options.out}; review what changed")
    return 0


def _gate(options: argparse.Namespace) -> int:
    gated = gate(
        load_baseline(options.baseline),
        _load(options.report),
        load_waivers(options.waivers) if options.waivers else (),
        max_growth=options.max_growth,
        max_slowdown=options.max_slowdown,
        today=datetime.now(timezone.utc).date(),
    )
    if options.junit:
        write(options.junit, gate_junit(gated), "JUnit XML")
    if options.markdown:
        write(options.markdown, summary(gated), "summary")
    if options.annotations:
        annotations, file = ANNOTATIONS[options.annotations]
        content = annotations(gated, options.baseline)
        if file:
            write(file, content, "annotations")
        else:
            print(content, end="")
    print(*lines(gated), sep="\n")
    return 3 if gated.no_verdict else 1 if gated.red else 0


def _factor(text: str) -> float:
    try:
        factor = float(text)
    except ValueError:
        factor = 0.0
    if not 1 <= factor < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of at least 1, got {text!r}")
    return factor


def new_file(text: str) -> Path:
    """The path of a file to write, so that a wrong one ends a command before it works."""
    path = Path(text)
    if not path.absolute().parent.is_dir() or path.is_dir():
        raise argparse.ArgumentTypeError(f"must be a file in a directory that exists, got {text!r}")
    return path


def _load(path: Path) -> Report:
    return load(path / "report.json" if path.is_dir() else path)
