"""Compare launchers: the same cases on the same layer, and every bit of every answer.

The verdicts must not depend on what starts the ranks. This runs a profile by each launcher and
compares verdicts, ratios and answers with those of the first one.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from syncbn.conformance import ConformanceError, runner, targets
from syncbn.conformance.cases import catalogue
from syncbn.conformance.certification.raw import RawWriter, read
from syncbn.conformance.pool import RankPool
from syncbn.conformance.wire import Message
from syncbn.launchers import LAUNCHERS
from syncbn.launchers.site import LOOP_BACK, Site


@dataclass(frozen=True)
class _Answer:
    """What a case gave.

    verdict: as in a report.
    ratio: the largest of the case.
    bits: a digest of what all ranks answered.
    """

    verdict: str
    ratio: float | None
    bits: str


def main(*, names: list[str], target: str, ranks: int, profile: str, console: Console) -> int:
    """Exit status: 0 if every launcher gives the same verdicts and ratios, 1 if not.

    Args:
        names: of launchers, the first of which the others are compared with. NAME:N means N nodes,
            all of which are this machine.
        target: the layer.
        ranks: of each run.
        profile: of each run.
        console: where to print.
    """
    first = _answers(names[0], target, ranks, profile)
    console.print(f"{names[0]}: {len(first)} cases of {profile} on {ranks} ranks, {target}")
    same = True
    for name in names[1:]:
        found = _answers(name, target, ranks, profile)
        equal = {
            what: sum(getattr(first[case], what) == getattr(found[case], what) for case in first)
            for what in ("verdict", "ratio", "bits")
        }
        same = same and equal["verdict"] == equal["ratio"] == len(first)
        console.print(
            f"{name}: equal verdicts {equal['verdict']}, equal ratios {equal['ratio']}, "
            f"every bit of the answers {equal['bits']}"
        )
    return 0 if same else 1


def _answers(name: str, target: str, ranks: int, profile: str) -> dict[str, _Answer]:
    """By the id of the case."""
    with (
        tempfile.TemporaryDirectory(prefix="syncbn-launchers-") as folder,
        _pool(name, target, ranks) as pool,
    ):
        path = Path(folder, "raw")
        with RawWriter(path) as raw:
            cases = catalogue(ranks, profile)
            results = runner.run(pool, cases, lambda _: None, record=raw.add)
        with path.open("rb") as file:
            bits = {record.case: _digest(record.message) for record in read(file)}
    return {
        result.case.id: _Answer(
            result.verdict.verdict, result.verdict.ratio, bits.get(result.case.id, "")
        )
        for result in results
    }


def _digest(message: Message) -> str:
    """Of the answers. The order of their names differs from process to process."""
    found = hashlib.sha256(json.dumps(message.content, sort_keys=True).encode())
    for name, values in sorted(message.arrays.items()):
        found.update(f"{name} {values.dtype} {values.shape} ".encode())
        found.update(values.tobytes())
    return found.hexdigest()


def _pool(name: str, target: str, ranks: int) -> RankPool:
    launcher, _, number = name.partition(":")
    if launcher not in LAUNCHERS or not (number or "1").isdecimal() or number == "0":
        raise ConformanceError(f"must be NAME or NAME:NODES of {', '.join(LAUNCHERS)}, got {name}")
    nodes = int(number or 1)
    site = Site(nodes, (LOOP_BACK,) * nodes if nodes > 1 else ())
    return RankPool(targets.parse(target), ranks, launcher, site=site)
