"""Fuzz the readers one after the other, and show what was found."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from audit.fuzz import READERS
from syncbn.conformance import ConformanceError

_ROOT = Path(__file__).resolve().parents[2]
_SECONDS_EACH = 20  # in which a reader must answer to one input
_MEGABYTES = 4096  # of memory that a reader may have
_LARGEST = 100_000  # bytes of an input
_LINES_SHOWN = 30  # of what a process printed about a finding


class FuzzError(ConformanceError, RuntimeError):
    """The fuzzer cannot run."""


def main(*, readers: Sequence[str], seconds: float, seed: int, out: Path, console: Console) -> int:
    """Exit status: 0 if every input was accepted or cleanly refused, 1 if not.

    Args:
        readers: names of READERS.
        seconds: for how long each runs.
        seed: of the fuzzer; the time also decides what it tries.
        out: the folder for an input that is a finding.
        console: where to print.

    Raises:
        FuzzError: Atheris is not installed.
    """
    if importlib.util.find_spec("atheris") is None:
        raise FuzzError("the fuzzer needs Atheris: pip install -c constraints.txt atheris")
    out.mkdir(parents=True, exist_ok=True)
    found = [not _fuzz(name, seconds, seed, out, console) for name in readers]
    return 1 if any(found) else 0


def _fuzz(name: str, seconds: float, seed: int, out: Path, console: Console) -> bool:
    """Run one reader. Returns whether it has no finding."""
    assert name in READERS
    options = [
        f"-seed={seed}",
        f"-timeout={_SECONDS_EACH}",
        f"-rss_limit_mb={_MEGABYTES}",
        f"-max_len={_LARGEST}",
        f"-artifact_prefix={out}/{name}-",
        "-verbosity=0",
    ]
    with tempfile.TemporaryDirectory(prefix="syncbn-fuzz-") as folder:
        command = [sys.executable, "-m", "audit.fuzz.reader", name, folder, str(seconds), *options]
        done = subprocess.run(
            command, cwd=_ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
        )
    lines = done.stdout.decode(errors="replace").splitlines()
    if done.returncode == 0 and lines:
        console.print(f"{name}: {lines[-1]} in {seconds:g} s, no finding", highlight=False)
        return True
    console.print(f"{name}: a finding, whose input is in {out}", style="bold red")
    for line in lines[-_LINES_SHOWN:]:
        console.print(line[:300], markup=False, highlight=False)
    return False
