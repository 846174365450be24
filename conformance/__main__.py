"""The command line of the suite: judge a layer, explore, show cases."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

from syncbn.extras import require_for_command

require_for_command("syncbn-conformance", "conformance", "numpy", "rich", "jsonschema")

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from syncbn import reports
from syncbn.conformance import ConformanceError, explore, must_pass, report, runner, targets
from syncbn.conformance.case import Case, load
from syncbn.conformance.cases import PROFILES, catalogue
from syncbn.conformance.clauses import CLAUSES
from syncbn.conformance.pool import RankPool
from syncbn.conformance.runner import Result
from syncbn.launchers import LAUNCHERS

_OUT = Path("reports/out")


class UsageError(ConformanceError):
    """The options do not fit together, or name something that is not there."""


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 all required clauses passed, 1 some did not, 2 bad input, 130 interrupted."""
    options = _parser().parse_args(arguments)
    # SIGTERM unwinds like Ctrl-C, so that a run which is ended leaves no rank behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        status: int = options.command(options)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # as by `list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ConformanceError, reports.ReportError) as error:
        print(f"syncbn-conformance: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # standard output is full, say
        print(f"syncbn-conformance: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("syncbn-conformance: interrupted", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace) -> int:
    target = targets.parse(options.target, options.device, options.backend, options.mode)
    cases = catalogue(options.ranks, options.profile)
    out = options.out or _OUT / target.name.replace(":", "-").replace("/", "-")
    _make_directory(out)
    oracle = targets.oracle(options.oracle, target)
    start = time.monotonic()
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(RankPool(target, options.ranks, options.launcher))
        oracle_pool: RankPool | str = (
            oracle
            if isinstance(oracle, str)
            else stack.enter_context(RankPool(oracle, options.ranks))
        )
        results = _with_progress(pool, cases, oracle_pool)
    document = report.build(
        pool,
        results,
        profile=options.profile,
        level=options.level,
        seconds=time.monotonic() - start,
        oracle=oracle_pool,
    )
    reports.summarize(document, _output())
    reports.save(document, out / "report.json")
    print(f"report: {out / 'report.json'}")
    return 0 if document["summary"]["verdict"] == "pass" else 1


def _output() -> Console:
    """Standard output; wide enough for long messages if it is a pipe or a file."""
    console = Console()
    return console if console.is_terminal else Console(width=120)


def _with_progress(pool: RankPool, cases: list[Case], oracle: RankPool | str) -> list[Result]:
    """Run the cases under a progress bar, or with a line now and then if this is no terminal."""
    console = Console(stderr=True)
    console.print(f"{pool.target.name}: starting {pool.ranks} ranks", highlight=False)
    pool.start()
    if isinstance(oracle, RankPool):
        console.print(
            f"oracle {oracle.target.name}: starting {oracle.ranks} ranks", highlight=False
        )
        oracle.start()
    else:
        console.print(f"no oracle: {oracle}", highlight=False)
    bar = Progress(
        TextColumn("{task.fields[clause]:<8}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[failed]} not passed"),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )
    failed = done = 0
    with bar:
        task = bar.add_task("", total=len(cases), clause="", failed=0)

        def progress(result: Result) -> None:
            nonlocal failed, done
            done += 1
            failed += result.verdict.verdict != "pass"
            bar.update(task, advance=1, clause=result.case.clause, failed=failed)
            if not console.is_terminal and done % 50 == 0:
                print(f"{done} of {len(cases)} cases, {failed} not passed", file=sys.stderr)

        return runner.run(pool, cases, progress, oracle if isinstance(oracle, RankPool) else None)


def _list(options: argparse.Namespace) -> int:
    for case in catalogue(options.ranks, options.profile):
        print(f"{case.id}  {case.clause:<8}  {case.title}")
    return 0


def _show(options: argparse.Namespace) -> int:
    print(json.dumps(_find(options.case, options.ranks).document, indent=1))
    return 0


def _replay(options: argparse.Namespace) -> int:
    case = _find(options.case, options.ranks)
    target = targets.parse(options.target, options.device, options.backend, options.mode)
    with RankPool(target, case.ranks, options.launcher) as pool:
        pool.start()
        result = runner.run_case(pool, case)
    found = result.verdict
    ratio = "" if found.ratio is None else f", largest ratio {found.ratio:.3g}"
    print(f"{case.id} {case.clause} ({CLAUSES[case.clause].title}): {case.title}")
    print(f"{found.verdict}{ratio} in {result.seconds:.2f} s on {case.ranks} ranks")
    if found.message:
        print(found.message)
    return 0 if found.verdict == "pass" else 1


def _explore(options: argparse.Namespace) -> int:
    target = targets.parse(options.target, options.device, options.backend, options.mode)
    with RankPool(target, options.ranks, options.launcher) as pool:
        pool.start()

        def progress(found: explore.Exploration) -> None:
            status.update(f"{found.verdicts.total()} cases in {found.seconds:.0f} s")

        with Console(stderr=True).status("exploring") as status:
            found = explore.explore(pool, options.minutes, options.seed, progress=progress)
        explore.show(found, pool, _output())
    return 1 if found.finding else 0


def _freeze(_: argparse.Namespace) -> int:
    must_pass.freeze()
    numbers = ", ".join(map(str, must_pass.RANKS))
    print(f"wrote the lists of {numbers} ranks to {must_pass.FOLDER}; review what changed")
    return 0


def _targets(_: argparse.Namespace) -> int:
    for name, description in targets.descriptions().items():
        print(f"{name:<22}  {description}")
    return 0


def _find(wanted: str, ranks: int) -> Case:
    """A case by its id on this many ranks, or from a file with a case document."""
    path = Path(wanted)
    if path.is_file():
        try:
            return load(json.loads(path.read_text()))
        except ValueError as error:
            raise UsageError(f"{path} holds no case: {error}") from error
    for case in catalogue(ranks):
        if case.id == wanted:
            return case
    raise UsageError(
        f"case must be a file or the id of a case on {ranks} ranks (ids depend on --ranks; see "
        f"`list --ranks {ranks}`), got {wanted!r}"
    )


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise UsageError(f"cannot write reports to {path}: it is not a directory") from error
    except OSError as error:
        raise UsageError(f"cannot write reports to {path}: {error.strerror}") from error


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an int of at least 1, got {text!r}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="syncbn-conformance", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: object, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command)
        return sub

    def add_target(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--target", default="syncbn.torch", help="see `targets`")
        sub.add_argument("--device", default="cpu", choices=("cpu", "cuda", "npu"))
        sub.add_argument("--backend", help="of the target, if it has several")
        sub.add_argument("--mode", choices=targets.MODES, help="of MindSpore (default pynative)")
        sub.add_argument("--launcher", default="local", choices=tuple(LAUNCHERS))

    def add_ranks(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--ranks", type=_positive, default=4, help="default 4")

    def add_profile(sub: argparse.ArgumentParser, default: str = "certify") -> None:
        help = f"default {default}"
        sub.add_argument("--profile", default=default, choices=PROFILES, help=help)

    run = add("run", _run, "Judge a target, clause by clause.")
    for more in (add_target, add_ranks, add_profile):
        more(run)
    run.add_argument(
        "--level",
        default="decided",
        choices=("decided", "documented"),
        help="which clauses count for the exit status: all, or the documented ones",
    )
    run.add_argument(
        "--oracle",
        default="auto",
        choices=("auto", targets.ORACLE, "none"),
        help="another layer to compare every case with (auto: mindspore.mint if it is installed)",
    )
    run.add_argument("--out", type=Path, help="where report.json goes (default reports/out/TARGET)")
    listing = add("list", _list, "The cases: id, clause, title.")
    add_ranks(listing)
    add_profile(listing)
    show = add("show", _show, "The document of a case.")
    show.add_argument("case", help="an id, or a file")
    add_ranks(show)
    replay = add("replay", _replay, "Run one case again.")
    replay.add_argument("case", help="an id, or a file")
    add_target(replay)
    add_ranks(replay)
    add("targets", _targets, "What can be given as --target.")
    search = add("explore", _explore, "Ask drawn cases until one fails; keep the simplest.")
    add_target(search)
    add_ranks(search)
    search.add_argument("--minutes", type=float, default=10.0, help="default 10")
    search.add_argument("--seed", type=int, help="of the first batch of cases (default random)")
    add("freeze", _freeze, "Write the must-pass lists of all profiles from the cases there are.")
    return parser


if __name__ == "__main__":
    sys.exit(main())
