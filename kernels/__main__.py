"""python -m syncbn.kernels install | check, in a checkout: the kernels, proven without a device."""

from __future__ import annotations

import argparse
import os
import sys
import warnings

try:
    from syncbn.kernels.ladder import toolchain
except ModuleNotFoundError:
    sys.exit("python -m syncbn.kernels needs a checkout: the installed package has no ladder")

_NAMES = ("interpreted", "lowered", "twin", "cuda", "registered")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m syncbn.kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("install", help="fetch the tools of the ladder into .toolchain")
    checking = commands.add_parser(
        "check", help="climb the ladder; the exit status is 0 if every rung holds"
    )
    checking.add_argument("--rungs", nargs="+", choices=_NAMES, default=list(_NAMES))
    options = parser.parse_args()
    try:
        if options.command == "install":
            toolchain.install()
            return 0
        return 0 if _check(options.rungs) else 1
    except (toolchain.MissingTool, FileNotFoundError) as error:
        print(f"python -m syncbn.kernels: {error}", file=sys.stderr)
        return 2


def _check(rungs: list[str]) -> bool:
    if missing := toolchain.missing():
        raise toolchain.MissingTool(
            f"{missing} is not in {toolchain.FOLDER} as it should be: make kernels, or python -m "
            "syncbn.kernels install"
        )
    toolchain.c_compiler()
    toolchain.use("triton-ascend")
    os.environ.pop("TRITON_INTERPRET", None)  # a rung of its own sets it
    warnings.filterwarnings("ignore", module="triton")  # that there is no compiler of CANN
    from rich.console import Console
    from syncbn.kernels.ladder.check import check

    return check(rungs, Console())


if __name__ == "__main__":
    sys.exit(main())
