"""Runs the suite on random mutants, each until a case detects it.

The ranks import a copy of the layer with the change. The process that judges them keeps the layer
and the suite unchanged.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from audit.mutate import show
from audit.mutate.draw import ROOT, Mutant, draw
from audit.mutate.result import Detection, Result
from syncbn.conformance import ConformanceError, runner, targets
from syncbn.conformance.case import Case
from syncbn.conformance.cases import catalogue
from syncbn.conformance.pool import RankPool
from syncbn.conformance.targets import Target, TargetError
from syncbn.conformance.verdict import Verdict

# A case gets this long at first. Only a case that is still a hang with its own deadline is one.
_FIRST_DEADLINE_SECONDS = 5.0

# The module of the target, which the ranks load from the folder of the copy.
_ENTRY = """
import sys
from pathlib import Path

import syncbn

COPY = Path(__file__).resolve().parent
NAMES = [f"syncbn.{path.stem}" for path in (COPY / "syncbn").glob("[!_]*.py")]
syncbn.__path__.insert(0, str(COPY / "syncbn"))
for name in NAMES:  # the rank has imported some of the originals
    if sys.modules.pop(name, None):
        delattr(syncbn, name.partition(".")[2])
import syncbn.torch

for name in ["syncbn.torch", *NAMES]:
    if name in sys.modules and not Path(sys.modules[name].__file__).is_relative_to(COPY):
        raise ImportError(f"{name} must come from {COPY}, got {sys.modules[name].__file__}")
SyncBatchNorm = syncbn.torch.SyncBatchNorm
"""


class MutateError(ConformanceError, RuntimeError):
    """No mutant can be judged; the text gives the reason."""


def run(
    *,
    count: int,
    seed: int,
    kinds: Sequence[str],
    ranks: int,
    profile: str,
    progress: Callable[[Result], None],
) -> list[Result]:
    """Draw mutants and judge each until the first case that detects it.

    Raises:
        MutateError: the copy without a change does not pass, so a detection would mean nothing.
    """
    # The first case of every clause comes first: most mutants need no more.
    smoke, rest = catalogue(ranks, "smoke"), catalogue(ranks, profile)
    cases = list({case.id: case for case in (*smoke, *rest)}.values())
    with copy_of_layer() as target:
        if detection := next(detections(target, cases), None):
            raise MutateError(f"an unchanged copy of the layer does not pass: {detection}")
    results = []
    for mutant in draw(count, seed, kinds):
        start = time.monotonic()
        with copy_of_layer(mutant) as target:
            detection = next(detections(target, cases), None)
        results.append(Result(mutant, detection, time.monotonic() - start))
        progress(results[-1])
    return results


@contextmanager
def copy_of_layer(mutant: Mutant | None = None) -> Iterator[Target]:
    """A target whose layer is a copy of syncbn.torch, changed as `mutant` is."""
    with tempfile.TemporaryDirectory(prefix="syncbn-mutant-") as name:
        folder = Path(name)
        skipped = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "syncbn/torch", folder / "syncbn/torch", ignore=skipped)
        for path in (ROOT / "syncbn").glob("[!_]*.py"):
            shutil.copy(path, folder / "syncbn")
        if mutant is not None:
            (folder / mutant.path).write_bytes(mutant.text)
        entry = folder / "entry.py"
        entry.write_text(_ENTRY)
        layer = targets.parse("syncbn.torch")
        yield replace(layer, name="a copy of syncbn.torch", module=str(entry))


def detections(target: Target, cases: Sequence[Case]) -> Iterator[Detection]:
    """Every case that the target does not pass."""
    with RankPool(target, cases[0].ranks) as pool:
        try:
            pool.start()
            for case in cases:
                verdict = _judge(pool, case)
                if verdict.verdict != "pass":
                    how = verdict.verdict if verdict.verdict in ("hang", "crash") else "wrong"
                    how = "raised" if verdict.raised or verdict.verdict == "error" else how
                    yield Detection(how, case, verdict.message or "")
        except TargetError as error:
            yield Detection("load", None, str(error))


def _judge(pool: RankPool, case: Case) -> Verdict:
    short = replace(case, deadline=min(case.deadline, _FIRST_DEADLINE_SECONDS))
    verdict = runner.run_case(pool, short).verdict
    return runner.run_case(pool, case).verdict if verdict.verdict == "hang" else verdict


def main(
    *,
    count: int,
    seed: int,
    kinds: Sequence[str],
    ranks: int,
    profile: str,
    out: Path,
    console: Console,
) -> int:
    """Run, print the results and write them to `out`.

    Returns:
        Exit status 0, also if mutants survive: a random mutant may be equivalent to the layer.
    """

    def progress(result: Result) -> None:
        console.print(f"{result.mutant.id} {result.how} in {result.seconds:.0f} s", highlight=False)

    results = run(
        count=count, seed=seed, kinds=kinds, ranks=ranks, profile=profile, progress=progress
    )
    show.summarize(results, console)
    out.write_text(json.dumps(show.document(results), indent=1) + "\n")
    console.print(f"report: {out}", highlight=False, soft_wrap=True)
    return 0
