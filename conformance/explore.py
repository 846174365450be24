"""Exploration: cases that nobody thought of, drawn until time is up or one of them fails.

What failed is made as simple as it gets, stripped to the check that fails, and kept as a case
document, which replays without any of this. conformance.sequences says what is drawn.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console
from rich.text import Text

from syncbn.conformance import ConformanceError
from syncbn.conformance.case import Case, Step
from syncbn.conformance.cases import REGRESSIONS
from syncbn.conformance.checks import CHECKS
from syncbn.conformance.expected import expect
from syncbn.conformance.pool import RankPool
from syncbn.conformance.verdict import Verdict, judge, judgeable
from syncbn.reports.table import replay_command

# Cases that share a seed. After so many, Hypothesis would begin to repeat itself in variations.
_BATCH = 10
_SHRINK_SECONDS = 120.0
_FAILING = ("fail", "hang", "crash")


class ExploreError(ConformanceError, RuntimeError):
    """Exploration cannot start; the text says what to do."""


@dataclass(frozen=True)
class Finding:
    """The simplest case that failed, the file that keeps it, and its verdict when run again."""

    case: Case
    path: Path
    verdict: Verdict
    again: Verdict


@dataclass
class Exploration:
    """What was asked, and the finding that ended it, if any.

    verdicts counts those of the cases; not-run are those that cannot be judged.
    drawn counts what the cases held, by subject and value. seed is that of the last batch.
    left_out: why, by dtype, those that the target does not support.
    """

    seed: int
    seconds: float = 0.0
    verdicts: Counter[str] = field(default_factory=Counter)
    drawn: Counter[tuple[str, str]] = field(default_factory=Counter)
    left_out: dict[str, str] = field(default_factory=dict)
    finding: Finding | None = None


class _Failed(Exception):
    """A case has failed: Hypothesis is to look for a simpler one."""


class _TimeIsOver(BaseException):
    """Hypothesis is to stop looking; it catches mere exceptions."""


def explore(
    pool: RankPool,
    minutes: float,
    seed: int | None = None,
    folder: Path = REGRESSIONS,
    progress: Callable[[Exploration], None] = lambda found: None,
) -> Exploration:
    """Ask batches of drawn cases until one fails or the minutes are over, but at least one batch.

    Args:
        pool: the ranks that are asked, started, so that a target that cannot be used is known.
        minutes: after which no new batch begins. A finding is made simpler for 2 more at most.
        seed: of the first batch; each batch adds 1. None for a random one.
        folder: where a finding is kept, as ID.json.
        progress: called after each batch.

    Raises:
        ExploreError: Hypothesis is not installed.
    """
    try:
        from syncbn.conformance import sequences
    except ModuleNotFoundError as error:
        raise ExploreError(
            f"Hypothesis draws the cases: pip install hypothesis ({error})"
        ) from error
    found = Exploration(secrets.randbelow(10**6) if seed is None else seed)
    found.left_out = _unsupported(pool, sequences.DTYPES[1:])
    dtypes = [dtype for dtype in sequences.DTYPES if dtype not in found.left_out]
    asker = _Asker(pool, found)
    start = time.monotonic()
    while True:
        try:
            sequences.explore(pool.ranks, asker, found.seed, _BATCH, dtypes)
        except (_Failed, _TimeIsOver):
            found.finding = _keep(pool, *asker.simplest, folder)
        found.seconds = time.monotonic() - start
        progress(found)
        if found.finding or found.seconds >= 60 * minutes:
            return found
        found.seed += 1


def show(found: Exploration, pool: RankPool, console: Console) -> None:
    """Print what was drawn, what came of it, and how to replay the finding."""

    def line(text: str, style: str = "") -> None:
        console.print(Text(text, style), soft_wrap=True)

    for subject in sorted({subject for subject, _ in found.drawn}):
        counts = [(value, n) for (its, value), n in found.drawn.most_common() if its == subject]
        line(f"{subject:<20}" + ", ".join(f"{value} {n}" for value, n in counts))
    for dtype, reason in found.left_out.items():
        line(f"left out: {dtype}, {reason}")
    cases = sum(found.verdicts.values())
    verdicts = ", ".join(f"{verdict} {n}" for verdict, n in found.verdicts.most_common())
    line(
        f"{cases} cases on {pool.ranks} ranks in {found.seconds:.0f} s "
        f"({cases / found.seconds:.1f} a second), up to seed {found.seed}: {verdicts}"
    )
    if found.finding is None:
        line("nothing found", "green")
        return
    case, verdict, again = found.finding.case, found.finding.verdict, found.finding.again
    line(f"{verdict.verdict} of {case.clause}, {case.title}: {verdict.message}", "bold red")
    if again.verdict != verdict.verdict:
        line(f"but {again.verdict} when it was run once more", "yellow")
    run = {"target": pool.target.document, "launcher": pool.launcher, "ranks": pool.ranks}
    line(replay_command(run, {"id": os.path.relpath(found.finding.path)}), "cyan")


def _unsupported(pool: RankPool, dtypes: Sequence[str]) -> dict[str, str]:
    """Why, by dtype, a layer of it with an input of it cannot be asked."""
    reasons = {}
    for dtype in dtypes:
        step = Step(((2, 3),) * pool.ranks, mode="eval", dtype=dtype, backward=False)
        case = Case("EVAL-1", dtype, pool.ranks, {"num_features": 3, "dtype": dtype}, (step,))
        verdict = _ask(pool, case)
        if verdict.verdict == "unsupported":
            reasons[dtype] = verdict.message or ""
    return reasons


class _Asker:
    """Asks cases of a pool, and raises _Failed if one fails.

    From the first that fails on, only those count that fail alike in the same check.
    """

    def __init__(self, pool: RankPool, found: Exploration) -> None:
        self.pool = pool
        self.found = found
        self.known: dict[str, Verdict] = {}  # by id, so that nobody waits for the same hang twice
        self.failed: list[tuple[Case, Verdict]] = []
        self.checks: tuple[str, ...] = tuple(CHECKS)
        self.until = math.inf

    def __call__(self, case: Case) -> None:
        if not self.failed:
            new = case.id not in self.known
            verdict = self._verdict(case)
            if new:
                self.found.verdicts[verdict.verdict] += 1
                self.found.drawn.update(set(_content(case)))
            if verdict.verdict not in _FAILING:
                return
            self.checks = self._failing_checks(case, verdict)
            self.failed.append((case, verdict))
            self.until = time.monotonic() + _SHRINK_SECONDS
        if time.monotonic() > self.until:
            raise _TimeIsOver
        case = _with_checks(case, self.checks)
        verdict = self._verdict(case)
        if _alike(verdict, self.failed[0][1]):
            self.failed.append((case, verdict))
            raise _Failed

    @property
    def simplest(self) -> tuple[Case, Verdict]:
        """The shortest case that failed."""
        return min(self.failed, key=lambda one: len(json.dumps(one[0].document)))

    def _failing_checks(self, case: Case, verdict: Verdict) -> tuple[str, ...]:
        """None if the case fails without any check; or the first one in which it fails."""
        for checks in ((), *((check,) for check in case.checks)):
            if _alike(self._verdict(_with_checks(case, checks)), verdict):
                return checks
        return case.checks

    def _verdict(self, case: Case) -> Verdict:
        if case.id not in self.known:
            self.known[case.id] = _ask(self.pool, case)
        return self.known[case.id]


def _ask(pool: RankPool, case: Case) -> Verdict:
    expected = expect(case)
    if not judgeable(case, expected):
        return Verdict(
            "not-run", None, "a result is undefined, unbounded, or too large for its dtype"
        )
    return judge(case, pool.run(case), lambda: expected)


def _with_checks(case: Case, checks: tuple[str, ...]) -> Case:
    """The case with those of its checks only."""
    return replace(case, checks=tuple(check for check in case.checks if check in checks))


def _alike(one: Verdict, other: Verdict) -> bool:
    return (one.verdict, one.raised) == (other.verdict, other.raised)


def _keep(pool: RankPool, case: Case, verdict: Verdict, folder: Path) -> Finding:
    story = ", ".join(_told(step) for step in case.steps)
    case = replace(case, clause=_clause(case, verdict), title=f"explored: {story}")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{case.id}.json"
    path.write_text(json.dumps(case.document, indent=1) + "\n")
    return Finding(case, path, verdict, _ask(pool, case))


def _clause(case: Case, verdict: Verdict) -> str:
    """What the failure says of the contract; an error, a hang or a crash stands for ERR-9."""
    if len(case.checks) == 1 and verdict.verdict == "fail" and not verdict.raised:
        return CHECKS[case.checks[0]].clause
    return "ERR-9"


def _told(step: Step) -> str:
    words = [step.mode]
    words += ["in other groups"] * bool(step.groups) + ["from a checkpoint"] * step.reload
    words += ["recomputed"] * step.recompute + [f"{step.repeat} times"] * (step.repeat > 1)
    words += ["beside another layer"] * step.beside + ["with an error"] * bool(step.error)
    return " ".join(words)


def _content(case: Case) -> Iterator[tuple[str, str]]:
    """What is in a case, by subject and value; of what has a default, only what departs from it."""
    document = case.document
    for name, value in document["layer"].items():
        yield name, str(value)
    yield from (("case", name) for name in ("groups", "ddp", "state") if name in document)
    yield "steps", str(len(case.steps))
    yield from (("checks", check) for check in case.checks)
    for step, given in zip(case.steps, document["steps"], strict=True):
        yield "step", step.mode
        yield from (("step", name) for name in given if name not in ("shapes", "mode", "x"))
        yield from (("data", name) for name in given.get("x", ()))
        if step.error:
            yield "error", f"{step.error.type} in {step.mode}"
        for rank, shape in enumerate(step.shapes):
            yield "dimensions", str(len(shape))
            yield "batch", str(shape[0])
            yield "input", step.dtype_of(rank)
            yield "layout", step.layout_of(rank)
            yield "dy_layout", step.dy_layout_of(rank)
