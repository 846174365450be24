"""Exploration: random cases, drawn until one fails or time is up.

A failing case is made as simple as possible, reduced to the check that fails, and kept as a case
document, which replays without Hypothesis. syncbn.conformance.sequences draws the cases.
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
from syncbn.conformance.checks import CHECKS
from syncbn.conformance.expected import expect
from syncbn.conformance.pool import RankPool
from syncbn.conformance.verdict import Verdict, judge, judgeable
from syncbn.reports.table import replay_command

# The number of cases with the same seed. With more, Hypothesis begins to vary earlier cases.
_BATCH = 10
_SHRINK_SECONDS = 120.0
_FAILING = ("fail", "hang", "crash")


class ExploreError(ConformanceError, RuntimeError):
    """Exploration cannot start; the text says what to do."""


@dataclass(frozen=True)
class Finding:
    """A case that failed, made as simple as possible.

    path: the file that keeps it.
    verdict: the verdict that it failed with.
    again: the verdict when it was run once more.
    """

    case: Case
    path: Path
    verdict: Verdict
    again: Verdict


@dataclass
class Exploration:
    """What was run, and the finding that ended it.

    seed: of the last batch.
    seconds: how long it took.
    verdicts: how many cases had each verdict; "not-run" is a case that cannot be judged.
    drawn: how many cases had a property, by subject and value.
    left_out: the dtypes that the target does not support, and why.
    finding: the case that failed; None if none did.
    """

    seed: int
    seconds: float = 0.0
    verdicts: Counter[str] = field(default_factory=Counter)
    drawn: Counter[tuple[str, str]] = field(default_factory=Counter)
    left_out: dict[str, str] = field(default_factory=dict)
    finding: Finding | None = None


class _Failed(Exception):
    """A case failed, and Hypothesis must look for a simpler one."""


class _TimeIsOver(BaseException):
    """Hypothesis must stop. It is no Exception, because Hypothesis catches those."""


def explore(
    pool: RankPool,
    minutes: float,
    seed: int | None,
    folder: Path,
    progress: Callable[[Exploration], None] = lambda exploration: None,
) -> Exploration:
    """Run batches of random cases until one fails or the time is over, but at least one batch.

    Args:
        pool: the ranks, already started.
        minutes: after which no new batch begins. Simplifying a finding takes 2 more at most.
        seed: of the first batch; each batch adds 1. None draws one.
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
    exploration = Exploration(secrets.randbelow(10**6) if seed is None else seed)
    exploration.left_out = _unsupported(pool, sequences.DTYPES[1:])
    dtypes = [dtype for dtype in sequences.DTYPES if dtype not in exploration.left_out]
    search = _Search(pool, exploration)
    start = time.monotonic()
    while True:
        try:
            sequences.explore(pool.ranks, search, exploration.seed, _BATCH, dtypes)
        except (_Failed, _TimeIsOver):
            exploration.finding = _keep(pool, *search.simplest, folder)
        exploration.seconds = time.monotonic() - start
        progress(exploration)
        if exploration.finding or exploration.seconds >= 60 * minutes:
            return exploration
        exploration.seed += 1


def show(exploration: Exploration, pool: RankPool, console: Console) -> None:
    """Print what was drawn, the verdicts, and the command that replays the finding."""

    def line(text: str, style: str = "") -> None:
        console.print(Text(text, style), soft_wrap=True)

    drawn = exploration.drawn
    for subject in sorted({subject for subject, _ in drawn}):
        counts = [(value, n) for (its, value), n in drawn.most_common() if its == subject]
        line(f"{subject:<20}" + ", ".join(f"{value} {n}" for value, n in counts))
    for dtype, reason in exploration.left_out.items():
        line(f"left out: {dtype}, {reason}")
    cases = sum(exploration.verdicts.values())
    verdicts = ", ".join(f"{verdict} {n}" for verdict, n in exploration.verdicts.most_common())
    line(
        f"{cases} cases on {pool.ranks} ranks in {exploration.seconds:.0f} s "
        f"({cases / exploration.seconds:.1f} a second), up to seed {exploration.seed}: {verdicts}"
    )
    finding = exploration.finding
    if finding is None:
        line("nothing found", "green")
        return
    case, verdict = finding.case, finding.verdict
    line(f"{verdict.verdict} of {case.clause}, {case.title}: {verdict.message}", "bold red")
    if finding.again.verdict != verdict.verdict:
        line(f"but {finding.again.verdict} when it was run once more", "yellow")
    run = {"target": pool.target.document, "launcher": pool.launcher, "ranks": pool.ranks}
    line(replay_command(run, {"id": os.path.relpath(finding.path)}), "cyan")


def _unsupported(pool: RankPool, dtypes: Sequence[str]) -> dict[str, str]:
    """The dtypes that the target does not support for a layer and its input, and why."""
    reasons = {}
    for dtype in dtypes:
        step = Step(((2, 3),) * pool.ranks, mode="eval", dtype=dtype, backward=False)
        case = Case("EVAL-1", dtype, pool.ranks, {"num_features": 3, "dtype": dtype}, (step,))
        verdict = _judge(pool, case)
        if verdict.verdict == "unsupported":
            reasons[dtype] = verdict.message or ""
    return reasons


class _Search:
    """Runs cases, and raises _Failed if one fails.

    After the first failure, only cases count that fail in the same way in the same check.
    """

    def __init__(self, pool: RankPool, exploration: Exploration) -> None:
        self.pool = pool
        self.exploration = exploration
        self.known: dict[str, Verdict] = {}  # by id, so that the same hang costs time only once
        self.failed: list[tuple[Case, Verdict]] = []
        self.checks: tuple[str, ...] = tuple(CHECKS)
        self.until = math.inf

    def __call__(self, case: Case) -> None:
        if not self.failed:
            new = case.id not in self.known
            verdict = self._verdict(case)
            if new:
                self.exploration.verdicts[verdict.verdict] += 1
                self.exploration.drawn.update(set(_content(case)))
            if verdict.verdict not in _FAILING:
                return
            self.checks = self._failing_checks(case, verdict)
            self.failed.append((case, verdict))
            self.until = time.monotonic() + _SHRINK_SECONDS
        if time.monotonic() > self.until:
            raise _TimeIsOver
        case = _with_checks(case, self.checks)
        verdict = self._verdict(case)
        if _same_kind(verdict, self.failed[0][1]):
            self.failed.append((case, verdict))
            raise _Failed

    @property
    def simplest(self) -> tuple[Case, Verdict]:
        """The shortest case that failed."""
        return min(self.failed, key=lambda failed: len(json.dumps(failed[0].document)))

    def _failing_checks(self, case: Case, verdict: Verdict) -> tuple[str, ...]:
        """The first check that fails alone; none if the case fails without any check."""
        for checks in ((), *((check,) for check in case.checks)):
            if _same_kind(self._verdict(_with_checks(case, checks)), verdict):
                return checks
        return case.checks

    def _verdict(self, case: Case) -> Verdict:
        if case.id not in self.known:
            self.known[case.id] = _judge(self.pool, case)
        return self.known[case.id]


def _judge(pool: RankPool, case: Case) -> Verdict:
    expected = expect(case)
    if not judgeable(case, expected):
        return Verdict(
            "not-run", None, "a result is undefined, unbounded, or too large for its dtype"
        )
    return judge(case, pool.run(case), lambda: expected)


def _with_checks(case: Case, checks: tuple[str, ...]) -> Case:
    """The case with only those of its checks that are in `checks`."""
    return replace(case, checks=tuple(check for check in case.checks if check in checks))


def _same_kind(verdict: Verdict, other: Verdict) -> bool:
    return (verdict.verdict, verdict.raised) == (other.verdict, other.raised)


def _keep(pool: RankPool, case: Case, verdict: Verdict, folder: Path) -> Finding:
    story = ", ".join(_describe(step) for step in case.steps)
    case = replace(case, clause=_clause(case, verdict), title=f"explored: {story}")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{case.id}.json"
    path.write_text(json.dumps(case.document, indent=1) + "\n")
    return Finding(case, path, verdict, _judge(pool, case))


def _clause(case: Case, verdict: Verdict) -> str:
    """The clause that the failure is about: ERR-9 for an error, a hang or a crash."""
    if len(case.checks) == 1 and verdict.verdict == "fail" and not verdict.raised:
        return CHECKS[case.checks[0]].clause
    return "ERR-9"


def _describe(step: Step) -> str:
    words = [step.mode]
    words += ["in other groups"] * bool(step.groups) + ["from a checkpoint"] * step.reload
    words += ["recomputed"] * step.recompute + [f"{step.repeat} times"] * (step.repeat > 1)
    words += ["next to another layer"] * step.beside + ["with an error"] * bool(step.error)
    return " ".join(words)


def _content(case: Case) -> Iterator[tuple[str, str]]:
    """The properties of a case that are not its defaults, by subject and value."""
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
