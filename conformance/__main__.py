"""The command syncbn-conformance: judge a layer, show reports and cases."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from syncbn.extras import interruptible, require_for_command

require_for_command("syncbn-conformance", "conformance", "numpy", "rich", "jsonschema")

with interruptible("syncbn-conformance"):
    from rich.console import Console

    from syncbn import reports
    from syncbn.conformance import (
        ConformanceError,
        checkout,
        explore,
        must_pass,
        progress,
        report,
        runner,
        sites,
        targets,
    )
    from syncbn.conformance import selection as selected
    from syncbn.conformance.case import Case
    from syncbn.conformance.cases import PROFILES, catalogue
    from syncbn.conformance.certification.make import Maker
    from syncbn.conformance.certification.plan import why_not_certified
    from syncbn.conformance.certification.product import load as load_product
    from syncbn.conformance.certification.verify import verify
    from syncbn.conformance.clauses import CLAUSES
    from syncbn.conformance.document import read
    from syncbn.conformance.place import Place
    from syncbn.conformance.pool import RankPool
    from syncbn.conformance.selection import Selection
    from syncbn.launchers.site import SiteError
    from syncbn.reports.commands import (
        add_baseline,
        add_commands,
        add_compare,
        add_gate,
        add_html,
        new_file,
    )
    from syncbn.reports.console import PatientConsole
    from syncbn.reports.schema import parse
    from syncbn.reports.text import one_line, printable

_OUT = Path("reports/out")
_STATUS = (
    "0 pass, 1 fail, 2 an error in the request, or nothing could start, 3 no verdict, because the "
    "suite or the machine failed in a case, 130 interrupted"
)
_VERIFIED = (
    "0 verified, 1 refused, 2 there is no package to read, 3 verified, and the package says that "
    "the layer FAILED"
)
_REASONS = 30  # of a refusal that are printed
_UNWIND_SECONDS = 10.0  # in which a run that is interrupted has ended
_STATUS_OF = {"pass": 0, "fail": 1, "error": 3, "incomplete": 130}


class UsageError(ConformanceError):
    """The options do not fit together, or name something that does not exist."""


class _Parser(argparse.ArgumentParser):
    """An argparse parser that reports an error in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


class _Interrupt:
    """A handler of signals. Those that follow the first one at once are part of it.

    Otherwise they would end what the first one has begun: to end the ranks and write the report.
    """

    def __init__(self) -> None:
        self._last = -_UNWIND_SECONDS
        self._numbers = [
            number
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
            if signal.getsignal(number) != signal.SIG_IGN  # as nohup ignores SIGHUP
        ]
        for number in self._numbers:
            signal.signal(number, self)

    def end(self) -> None:
        """After a first signal, ignore the rest: Python removes handlers before it has ended."""
        if self._last >= 0:
            for number in self._numbers:
                signal.signal(number, signal.SIG_IGN)

    def __call__(self, *_: object) -> None:
        now = time.monotonic()
        if now - self._last >= _UNWIND_SECONDS:
            self._last = now
            raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status, as _STATUS describes it."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(arguments)
    options.command_line = arguments
    # All unwind like Ctrl-C, so that a run which is ended leaves no rank behind.
    interrupt = _Interrupt()
    try:
        status: int = options.command(options)
        with _whatever_the_reader_does():
            sys.stdout.flush()
        return status
    except BrokenPipeError:  # as by `list | head`
        _discard_output()
        return 0
    except (ConformanceError, reports.ReportError, OSError) as error:
        print(f"syncbn-conformance: {one_line(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("syncbn-conformance: interrupted", file=sys.stderr)
        return 130
    finally:
        interrupt.end()


def _run(options: argparse.Namespace) -> int:
    sites.complete(options)
    if options.dry_run:
        for host, command in _pool(_target(options), options).plan():
            print(f"{host}: {command}")
        return 0
    out = options.out or _OUT / options.target.replace(":", "-").replace("/", "-")
    with Place(out) as place:
        if not options.resume:
            place.set_aside()
        document = _run_in(place, options)
        path = place.finish(document)
    if options.junit:
        reports.write(options.junit, reports.junit(document), "JUnit XML")
    with _whatever_the_reader_does():
        reports.summarize(document, _output())
        print(f"report: {path}")
        print(why_not_certified(document), flush=True)
    if document["summary"]["verdict"] == "incomplete":
        return _interrupted()
    return _STATUS_OF[document["summary"]["verdict"]]


def _interrupted() -> int:
    again = "the same command with --resume goes on"
    print(f"syncbn-conformance: interrupted; {again}", file=sys.stderr)
    return _STATUS_OF["incomplete"]


def _run_in(place: Place, options: argparse.Namespace) -> reports.Report:
    """Run the cases that are left, keep their results in the folder, and build the report."""
    target = _target(options)
    selection = Selection(
        selected.names(options.clause), selected.names(options.case), options.shard
    )
    cases = selection.of(options.ranks, options.profile)
    oracle = targets.oracle(options.oracle, target)
    asked = {
        "target": target.document,
        "ranks": options.ranks,
        "launcher": options.launcher,
        "profile": options.profile,
        "selection": selection.document,
        "oracle": oracle if isinstance(oracle, str) else oracle.document,
        "suite": report.suite(),
    }
    asked = json.loads(json.dumps(asked))  # as it is read back
    if options.resume:
        place.resume(asked)
    else:
        place.begin(asked, ["syncbn-conformance", *options.command_line])
    done = {row["id"] for row in place.rows}
    seconds = -time.monotonic() + sum(row["seconds"] for row in place.rows)
    stopped, kept = False, 0

    def keep(result: runner.Result) -> None:
        nonlocal kept
        place.add(report.row(result), report.restarts(pool)[kept:])
        kept = len(pool.restarts)
        if options.fail_fast and result.verdict.verdict in ("fail", "hang", "crash", "error"):
            raise progress.Enough

    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(_pool(target, options))
        oracle_pool: RankPool | str = (
            oracle
            if isinstance(oracle, str)
            else stack.enter_context(RankPool(oracle, options.ranks))
        )
        left = [case for case in cases if case.id not in done]
        try:
            progress.run(pool, left, oracle_pool, options.max_hangs, keep)
        except KeyboardInterrupt:
            if not place.rows:
                raise
            stopped = True
    return report.build(
        pool,
        place.rows,
        profile=options.profile,
        level=options.level,
        seconds=seconds + time.monotonic(),
        oracle=oracle_pool,
        run=place.about,
        selection=selection,
        stopped=stopped,
        restarts_before=place.restarts,
    )


@contextlib.contextmanager
def _whatever_the_reader_does() -> Iterator[None]:
    """A closed pipe or a full disk behind standard output changes no status and loses no report."""
    try:
        yield
    except BrokenPipeError:
        _discard_output()
    except OSError as error:
        _discard_output()
        print(f"syncbn-conformance: cannot print: {error.strerror}", file=sys.stderr)


def _discard_output() -> None:
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), sys.stdout.fileno())


def _target(options: argparse.Namespace) -> targets.Target:
    target = targets.parse(
        options.target,
        options.device,
        options.backend,
        options.mode,
        collectives=options.collectives,
        share_device=options.share_device,
        layer_args=options.layer_args,
        setup=options.setup,
        framework_file=options.framework,
    )
    if options.memory and target.device != "cpu":
        raise UsageError(f"--memory must be left out on {target.device}: it limits ranks on cpu")
    return target


def _pool(target: targets.Target, options: argparse.Namespace) -> RankPool:
    try:
        return RankPool(
            target, options.ranks, options.launcher, memory=options.memory, site=options.site
        )
    except SiteError as error:
        raise UsageError(str(error)) from error


def _output() -> Console:
    """Standard output, wide enough for long messages if it is a pipe or a file."""
    console = PatientConsole()
    return console if console.is_terminal else PatientConsole(width=120)


def _certify(options: argparse.Namespace) -> int:
    site = sites.site_of(options)
    product = load_product(options.product)
    maker = Maker(
        _target(options),
        product,
        options.out,
        level=options.level,
        launcher=options.launcher,
        site=site,
        memory=options.memory,
        command=["syncbn-conformance", *options.command_line],
        devices=options.devices,
        resume=options.resume,
    )
    try:
        with maker:
            for ranks in maker.left:
                document = maker.run(ranks)
                with _whatever_the_reader_does():
                    reports.summarize(document, _output())
                if document["summary"]["verdict"] == "error":
                    print(f"no certificate: the run on {ranks} ranks has no verdict", flush=True)
                    return _STATUS_OF["error"]
            result = maker.finish(options.sign)
    except KeyboardInterrupt:
        return _interrupted()
    with _whatever_the_reader_does():
        print(maker.title)
        print(f"package: {options.out}", flush=True)
    return 0 if result == "PASSED" else 1


def _verify(options: argparse.Namespace) -> int:
    found = verify(options.folder, options.allowed_signers)
    with _whatever_the_reader_does():
        for reason in found.refused[:_REASONS]:
            print(f"refused: {reason}")
        if len(found.refused) > _REASONS:
            print(f"refused: {len(found.refused) - _REASONS} more reasons")
        if not found.refused:
            print(*found.notes, f"verified: {one_line(found.title)}", sep="\n")
        sys.stdout.flush()
    if found.refused:
        return 1
    return 0 if found.result == "PASSED" else 3


def _list(options: argparse.Namespace) -> int:
    for case in catalogue(options.ranks, options.profile):
        print(f"{case.id}  {case.clause:<8}  {case.title}")
    return 0


def _show(options: argparse.Namespace) -> int:
    print(json.dumps(_find(options.case, options.ranks).document, indent=1))
    return 0


def _replay(options: argparse.Namespace) -> int:
    sites.complete(options)
    case = _find(options.case, options.ranks)
    options.ranks = case.ranks
    with _pool(_target(options), options) as pool:
        pool.start()
        result = runner.run_case(pool, case)
    verdict = result.verdict
    ratio = "" if verdict.ratio is None else f", largest ratio {verdict.ratio:.3g}"
    print(f"{case.id} {case.clause} ({CLAUSES[case.clause].title}): {one_line(case.title)}")
    print(f"{verdict.verdict}{ratio} in {result.seconds:.2f} s on {case.ranks} ranks")
    if verdict.message:
        print(printable(verdict.message))
    return _STATUS_OF.get(verdict.verdict, 1)


def _explore(options: argparse.Namespace) -> int:
    sites.complete(options)
    with _pool(_target(options), options) as pool:
        pool.start()

        def show_progress(exploration: explore.Exploration) -> None:
            cases = exploration.verdicts.total()
            status.update(f"{cases} cases in {exploration.seconds:.0f} s")

        with Console(stderr=True).status("exploring") as status:
            exploration = explore.explore(
                pool, options.minutes, options.seed, options.out, show_progress
            )
        explore.show(exploration, pool, _output())
    return 1 if exploration.finding else 0


def _freeze(_: argparse.Namespace) -> int:
    if checkout() is None:
        raise UsageError(
            f"freeze needs a checkout, whose lists it writes, but this suite is installed in "
            f"{must_pass.FOLDER.parent}"
        )
    must_pass.freeze()
    numbers = ", ".join(map(str, must_pass.RANKS))
    print(f"wrote the lists of {numbers} ranks to {must_pass.FOLDER}; review what changed")
    return 0


def _targets(_: argparse.Namespace) -> int:
    for name, description in targets.descriptions().items():
        print(f"{name:<22}  {description}")
    return 0


def _find(wanted: str, ranks: int) -> Case:
    """The case of an id on this many ranks, or of a file with a case document."""
    path = Path(wanted)
    if path.is_file():
        return read(path)
    for case in catalogue(ranks):
        if case.id == wanted:
            return case
    raise UsageError(
        f"case must be a file or the id of a case on {ranks} ranks (ids depend on --ranks; see "
        f"`list --ranks {ranks}`), got {wanted!r}"
    )


def _arguments(text: str) -> dict[str, Any]:
    try:
        found = parse(text.encode())
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be JSON, got {text!r}: {error}") from error
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"must be an object by name, got {text!r}")
    return found


def _shard(text: str) -> tuple[int, int]:
    try:
        return selected.shard(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _positive(text: str) -> int:
    if not text.isdigit() or not 1 <= len(text) <= 9 or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an int of 1 to 999999999, got {text[:20]!r}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="syncbn-conformance",
        description="Judge whether a synchronized batch normalization layer is right.",
        epilog=f"Exit status: {_STATUS}.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")

    def add(name: str, function: object, text: str) -> argparse.ArgumentParser:
        sub = command(name, text)
        sub.set_defaults(command=function)
        return sub

    run = add("run", _run, "judge a target, clause by clause")
    _add_target(run)
    sites.add_options(run)
    _add_profile(run)
    _add_level(run)
    run.add_argument(
        "--oracle",
        default="auto",
        choices=("auto", targets.ORACLE, "none"),
        help=f"a layer to compare the target with in every case (default auto: {targets.ORACLE} "
        "if it is installed)",
    )
    run.add_argument(
        "--out", type=Path, help="the directory of report.json (default reports/out/TARGET)"
    )
    run.add_argument(
        "--junit", type=new_file, metavar="FILE", help="also write the report as JUnit XML"
    )
    run.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run that was interrupted in that directory",
    )
    run.add_argument(
        "--clause",
        action="append",
        default=[],
        metavar="CLAUSE",
        help="only the cases of this clause; may be given again, or with commas",
    )
    run.add_argument(
        "--case",
        action="append",
        default=[],
        metavar="ID",
        help="only this case, of whatever profile; may be given again, or with commas",
    )
    run.add_argument(
        "--shard",
        type=_shard,
        metavar="I/N",
        help="only part I of N of the cases; all N parts together are all of them",
    )
    run.add_argument(
        "--dry-run",
        action="store_true",
        help="only print the command that would start ranks on each host",
    )
    run.add_argument(
        "--fail-fast", action="store_true", help="run no more cases after one that fails"
    )
    run.add_argument(
        "--max-hangs",
        type=_positive,
        default=runner.MAX_HANGS,
        metavar="N",
        help="run no more cases after N hangs, each of which costs seconds (default "
        f"{runner.MAX_HANGS})",
    )
    certify = add("certify", _certify, "make all runs of a certificate, and a package of them")
    _add_target(certify)
    sites.add_site(certify)
    _add_level(certify)
    certify.add_argument(
        "--product",
        type=Path,
        required=True,
        metavar="FILE",
        help="a JSON file with the name, vendor, version and contact of the product",
    )
    certify.add_argument(
        "--out", type=Path, required=True, help="the directory of the package, new or empty"
    )
    certify.add_argument(
        "--resume",
        action="store_true",
        help="go on with the certification that was interrupted in that directory: the runs that "
        "are whole stay",
    )
    certify.add_argument(
        "--devices",
        type=_positive,
        metavar="N",
        help="the number of accelerators: runs with more ranks are left out (default: all runs)",
    )
    certify.add_argument("--sign", type=Path, metavar="KEY", help="sign with this SSH key")
    check = add("verify", _verify, "derive the verdicts of a package again, and compare all of it")
    check.epilog = f"Exit status: {_VERIFIED}."
    check.add_argument("folder", type=Path, metavar="DIR", help="the directory of the package")
    check.add_argument(
        "--allowed-signers",
        type=Path,
        metavar="FILE",
        help="refuse a package that none of these SSH keys signed; see ssh-keygen(1)",
    )
    replay = add("replay", _replay, "run one case again")
    replay.add_argument("case", metavar="CASE", help="an id, or a file with a case document")
    _add_target(replay)
    sites.add_options(replay)
    add_commands(commands.add_parser("report", help="show the report of a run"))
    add_baseline(command("baseline", "write what the gate expects of later runs"))
    add_gate(command("gate", "compare a run with its baseline: whatever changed fails"))
    add_compare(command("compare", "show two reports next to each other"))
    add_html(command("html", "write a report as one HTML page"))
    add("targets", _targets, "list what --target accepts")
    listing = add("list", _list, "list the cases: id, clause, title")
    _add_ranks(listing)
    _add_profile(listing)
    show = add("show", _show, "print the document of a case")
    show.add_argument("case", metavar="CASE", help="an id, or a file with a case document")
    _add_ranks(show)
    search = add("explore", _explore, "run random cases until one fails, and keep the simplest")
    _add_target(search)
    sites.add_options(search)
    search.add_argument(
        "--minutes", type=float, default=10.0, help="how long to search (default 10)"
    )
    search.add_argument("--seed", type=int, help="the seed of the first cases (default random)")
    search.add_argument(
        "--out",
        type=Path,
        default=_OUT / "explored",
        metavar="DIR",
        help=f"where a case that fails is kept (default {_OUT / 'explored'})",
    )
    add("freeze", _freeze, "write the must-pass lists, after a change of the cases")
    return parser


def _add_target(parser: argparse.ArgumentParser) -> None:
    modes = " or ".join(targets.MODES)
    parser.add_argument(
        "--target",
        default="syncbn.torch",
        help="the layer: a name of `targets`, or FRAMEWORK:MODULE:CLASS (default syncbn.torch)",
    )
    parser.add_argument(
        "--device",
        default="cpu",
        help="where the ranks run: cpu, cuda, npu, or any other type of device that the framework "
        "has (default cpu)",
    )
    parser.add_argument(
        "--share-device",
        action="store_true",
        help="let several ranks use one cuda device, if there are more ranks than devices",
    )
    parser.add_argument(
        "--collectives",
        help="what carries the collectives of a PyTorch target: gloo on cpu, nccl or gloo on cuda, "
        "hccl on npu (default the first)",
    )
    parser.add_argument(
        "--layer-args",
        type=_arguments,
        metavar="JSON",
        help="arguments that every layer gets unless a case gives others: an object by name",
    )
    parser.add_argument(
        "--setup",
        metavar="MODULE:FUNCTION",
        help="a function that every rank calls at its start with its id on its machine; MODULE is "
        "importable, or a path that ends in .py",
    )
    parser.add_argument(
        "--framework",
        metavar="FILE",
        help="a Python file with a framework of your own, which TARGET may name",
    )
    parser.add_argument("--backend", help="of syncbn.torch and syncbn.mindspore (default auto)")
    parser.add_argument("--mode", help=f"how MindSpore runs the layer: {modes} (default the first)")


def _add_level(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--level",
        default="decided",
        choices=("decided", "documented"),
        help="the clauses that count for the exit status: all of them, or those that the "
        "operator's page documents (default decided)",
    )


def _add_ranks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ranks",
        type=sites.number_of_ranks,
        default=4,
        metavar="N",
        help="the number of ranks (default 4)",
    )


def _add_profile(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--profile",
        default="certify",
        choices=PROFILES,
        help="the cases: one of each clause, all written ones, or all sweeps as well "
        "(default certify)",
    )


if __name__ == "__main__":
    sys.exit(main())
