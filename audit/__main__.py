"""The command line of the audit: judge the suite and the kernels. It needs a checkout."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from audit import gate, ladder, launchers, versions
from audit.failures import known, page
from audit.fuzz import READERS
from audit.fuzz import run as fuzz
from audit.mutants import run as mutants
from audit.mutants.results import FRAMEWORKS
from audit.mutate import run as mutate
from audit.mutate.changes import KINDS
from audit.storm import run as storm
from audit.study import run as study
from audit.weaknesses import run as weaknesses
from syncbn.conformance import ConformanceError
from syncbn.conformance.cases import PROFILES, catalogue

_OUT = Path("reports/out")


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 if the audit holds, 1 if not, 2 for bad input, 130 if interrupted."""
    options = _parser().parse_args(arguments)
    # SIGTERM unwinds like Ctrl-C, so that a run which is ended leaves no rank behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        status: int = options.command(options)
        return status
    except (ConformanceError, OSError) as error:
        print(f"python -m audit: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("python -m audit: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m audit", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(
        name: str, command: Callable[[argparse.Namespace], int], text: str
    ) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(command=command)
        return added

    _mutants_options(add("mutants", _mutants, "Run the suite on layers with one planted fault."))
    _gate_options(add("gate", _gate, "Gate layers with one planted fault: all must be red."))
    _mutate_options(add("mutate", _mutate, "Run the suite on random changes to syncbn.torch."))
    _failures_options(add("failures", _failures, "Write which cases catch which known failure."))
    _study_options(add("study", _study, "Calibrate the bound on sound and unsound layers."))
    _versions_options(add("versions", _versions, "Judge the oldest and the newest torch."))
    _storm_options(add("storm", _storm, "Run the suite under random faults."))
    _launchers_options(add("launchers", _launchers, "Compare launchers bit by bit."))
    _fuzz_options(add("fuzz", _fuzz, "Give random bytes to what reads files and connections."))
    add("weaknesses", _weaknesses, "Try again what the judge once did wrong.")
    _kernels_steps(
        commands.add_parser("kernels", help="Prove the Triton kernels without a device.")
    )
    return parser


def _mutants_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("mutant", nargs="*", help="names (default all)")
    parser.add_argument("--framework", action="append", choices=FRAMEWORKS, help="default both")
    parser.add_argument("--seeds", type=_positive, default=3, help="default 3")
    parser.add_argument(
        "--declared", action="store_true", help="run only the clauses in which a mutant must die"
    )
    parser.add_argument("--out", type=Path, default=_OUT / "mutants.json")
    parser.add_argument("--document", type=Path, help="a page to put the table into")
    _case_options(parser)


def _mutants(options: argparse.Namespace) -> int:
    options.out.parent.mkdir(parents=True, exist_ok=True)
    return mutants.main(
        frameworks=options.framework or FRAMEWORKS,
        names=options.mutant,
        ranks=options.ranks,
        seeds=options.seeds,
        only_declared=options.declared,
        profile=options.profile,
        out=options.out,
        page=options.document,
        console=_console(),
    )


def _gate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("mutant", nargs="*", help="names (default all)")
    parser.add_argument("--framework", default="torch", choices=FRAMEWORKS, help="default torch")
    parser.add_argument("--out", type=Path, default=_OUT / "gate", help="folder of the reports")
    _case_options(parser)


def _gate(options: argparse.Namespace) -> int:
    options.out.mkdir(parents=True, exist_ok=True)
    return gate.main(
        framework=options.framework,
        names=options.mutant,
        ranks=options.ranks,
        profile=options.profile,
        out=options.out,
        console=_console(),
    )


def _mutate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--count", type=_positive, default=20, help="default 20")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument("--kind", action="append", choices=tuple(KINDS), help="default swap")
    parser.add_argument("--out", type=Path, default=_OUT / "mutate.json")
    _case_options(parser)


def _mutate(options: argparse.Namespace) -> int:
    options.out.parent.mkdir(parents=True, exist_ok=True)
    return mutate.main(
        count=options.count,
        seed=options.seed,
        kinds=options.kind or ("swap",),
        ranks=options.ranks,
        profile=options.profile,
        out=options.out,
        console=_console(),
    )


def _failures_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("docs/failure-modes.md"))


def _failures(options: argparse.Namespace) -> int:
    page.write(options.out, known.load(), catalogue(4, "certify"))
    print(f"wrote {options.out}")
    return 0


def _study_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=_OUT / "study.json")
    parser.add_argument("--document", type=Path, default=Path("docs/tolerances.md"))
    _case_options(parser)


def _study(options: argparse.Namespace) -> int:
    options.out.parent.mkdir(parents=True, exist_ok=True)
    return study.main(
        ranks=options.ranks,
        profile=options.profile,
        out=options.out,
        document=options.document,
        console=_console(),
    )


def _versions_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", type=Path, default=Path(".versions"), help="of environments")
    parser.add_argument("--ranks", type=_positive, default=4, help="default 4")
    parser.add_argument("--document", type=Path, default=Path("docs/versions.md"))


def _versions(options: argparse.Namespace) -> int:
    return versions.main(options.folder, options.ranks, options.document, _console())


def _storm_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=30.0, help="default 30")
    parser.add_argument("--seed", type=int, default=0, help="of the faults (default 0)")
    parser.add_argument(
        "--rate",
        type=float,
        default=0.02,
        help="the share of forwards in which the layer misbehaves (default 0.02)",
    )
    parser.add_argument(
        "--every",
        type=float,
        default=4.5,
        metavar="SECONDS",
        help="the mean time between two faults from outside (default 4.5)",
    )
    parser.add_argument(
        "--two-hosts",
        action="store_true",
        help="each run is on two hosts, as network namespaces, by torchrun; needs root",
    )
    _case_options(parser)


def _storm(options: argparse.Namespace) -> int:
    return storm.main(
        minutes=options.minutes,
        seed=options.seed,
        ranks=options.ranks,
        profile=options.profile,
        rate=options.rate,
        every=options.every,
        two_hosts=options.two_hosts,
        console=_console(),
    )


def _launchers_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name",
        nargs="*",
        default=["local", "torchrun", "torchrun:2"],
        help="of a launcher, or NAME:NODES, where all nodes are this machine; the others are "
        "compared with the first (default local torchrun torchrun:2)",
    )
    parser.add_argument("--target", default="syncbn.torch", help="default syncbn.torch")
    _case_options(parser)


def _launchers(options: argparse.Namespace) -> int:
    return launchers.main(
        names=options.name,
        target=options.target,
        ranks=options.ranks,
        profile=options.profile,
        console=_console(),
    )


def _fuzz_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("reader", nargs="*", choices=(*READERS, []), help="default all")
    parser.add_argument(
        "--seconds", type=_positive, default=600, help="for each reader (default 600)"
    )
    parser.add_argument("--seed", type=_positive, default=1, help="of the fuzzer (default 1)")
    parser.add_argument("--out", type=Path, default=_OUT / "fuzz", help="for an input that fails")


def _fuzz(options: argparse.Namespace) -> int:
    return fuzz.main(
        readers=options.reader or READERS,
        seconds=options.seconds,
        seed=options.seed,
        out=options.out,
        console=_console(),
    )


def _weaknesses(_: argparse.Namespace) -> int:
    return weaknesses.main(_console())


def _kernels_steps(parser: argparse.ArgumentParser) -> None:
    steps = parser.add_subparsers(required=True, metavar="STEP")
    install = steps.add_parser("install", help="fetch the tools into .toolchain (2.5 GB)")
    install.set_defaults(command=_kernels_install)
    check = steps.add_parser("check", help="run the rungs; exit status 0 if every rung holds")
    check.add_argument("--rungs", nargs="+", choices=ladder.RUNGS, default=list(ladder.RUNGS))
    check.set_defaults(command=_kernels_check)


def _kernels_install(_: argparse.Namespace) -> int:
    ladder.install()
    return 0


def _kernels_check(options: argparse.Namespace) -> int:
    return 0 if ladder.check(options.rungs) else 1


def _case_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=_positive, default=4, help="default 4")
    parser.add_argument("--profile", default="certify", choices=PROFILES, help="default certify")


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an int of at least 1, got {text!r}")
    return int(text)


def _console() -> Console:
    return Console() if sys.stdout.isatty() else Console(width=120)


if __name__ == "__main__":
    sys.exit(main())
