"""What "certified" means: the runs that a layer must pass, and what it may leave unsupported.

A certificate is about one layer on one kind of device, in one mode and with one backend. Its cases
hold every dtype that the device has.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from syncbn.conformance import ConformanceError
from syncbn.conformance.case import Case, of_document
from syncbn.conformance.cases import catalogue
from syncbn.conformance.clauses import CLAUSES
from syncbn.reports.document import Report


@dataclass(frozen=True)
class Plan:
    """The runs of a certificate.

    name: of the plan; a new number for every change.
    profile: the cases of each run.
    ranks: the number of ranks of each run.
    """

    name: str
    profile: str
    ranks: tuple[int, ...]

    def cases(self, ranks: int) -> list[Case]:
        """The cases of the run on this many ranks, in their order."""
        return catalogue(ranks, self.profile)

    def runs(self, device: str, devices: int | None) -> tuple[int, ...]:
        """The numbers of ranks on a kind of device.

        Args:
            device: cpu, or the type of an accelerator.
            devices: how many accelerators there are, each with one rank; None if every run can
                have its ranks, as on cpu.

        Raises:
            ConformanceError: there are too few accelerators for a certificate.
        """
        if devices is None:
            return self.ranks
        if device == "cpu":
            raise ConformanceError(f"devices must not be given for cpu, got {devices}")
        if devices < 2:
            raise ConformanceError(f"devices must be at least 2 for a certificate, got {devices}")
        return tuple(ranks for ranks in self.ranks if ranks <= devices)


CERTIFIED = Plan("syncbn-certification/1", "certify", (1, 2, 4, 8))


@dataclass(frozen=True)
class Reason:
    """Why a case may be unsupported. The suite gives the reason, and it is no fault of the layer.

    text: the reason as the ranks give it, a regular expression.
    holds: whether it can hold for a case.
    """

    text: str
    holds: Callable[[Case], bool]


def _records_less(case: Case) -> bool:
    return any(step.recording != "on" for step in case.steps)


def _raises(case: Case) -> bool:
    return "float64" in case.dtypes and any(step.error for step in case.steps)


def _counts(case: Case) -> bool:
    return "collectives" in case.checks


MAY_BE_UNSUPPORTED = (
    Reason(
        "the target takes a ProcessGroup, and torch checks the rank ids of that",
        lambda case: "process_group" in case.layer,
    ),
    Reason("Ascend and its kernels have no float64", lambda case: "float64" in case.dtypes),
    Reason(r"MindSpore \S+ has no bfloat16 on .*", lambda case: "bfloat16" in case.dtypes),
    Reason(r"MindSpore \S+ has no float64 on .*", lambda case: "float64" in case.dtypes),
    Reason(
        "the suite neither copies nor casts layers of MindSpore",
        lambda case: bool(case.cast) or any(step.copied for step in case.steps),
    ),
    Reason("the suite has no data parallelism of MindSpore, .*", lambda case: case.ddp),
    Reason(
        "the suite cannot make a backward of MindSpore fail",
        lambda case: any(step.lost for step in case.steps),
    ),
    Reason("MindSpore has no inference mode", _records_less),
    Reason("a graph of MindSpore records what is differentiated, .*", _records_less),
    Reason(
        "in a graph MindSpore recomputes operations, .*",
        lambda case: any(step.recompute for step in case.steps),
    ),
    Reason(
        "a compiled forward cannot see whether it will be differentiated",
        lambda case: any(step.error and step.frozen_input for step in case.steps),
    ),
    Reason("MindSpore rounds float64 in a graph that can raise: .*", _raises),
    Reason("collectives of MindSpore are counted on CPU only", _counts),
    Reason("MindSpore's profiler, .*, breaks a graph that raises", _counts),
    Reason(
        ".*no second derivative in training in a compiled graph.*",
        lambda case: any(step.second for step in case.steps),
    ),
    # The page names no dtypes. Only cases of clauses that it documents get this reason.
    Reason(r"rank \d+ refuses float16: .*", lambda case: "float16" in case.dtypes),
    Reason(r"rank \d+ refuses bfloat16: .*", lambda case: "bfloat16" in case.dtypes),
    Reason(r"rank \d+ refuses float64: .*", lambda case: "float64" in case.dtypes),
)
_LONGEST_REASON = 200  # characters
# The only clauses of the page that need not have a case which the layer supports.
MAY_LACK = ("ERR-5",)


def shortfalls(report: Report, plan: Plan, level: str) -> list[str]:
    """Why a run is not one of a certificate; each in one line. Empty if it is."""
    found = []
    if report["profile"] != plan.profile:
        found.append(f"profile is {report['profile']}, not {plan.profile}")
    if report["selection"] is not None:
        found.append("only a part of the cases was to run")
    if report["ranks"] not in plan.ranks:
        found.append(f"the run has {report['ranks']} ranks, not {_or(plan.ranks)}")
    if report["level"] != level:
        found.append(f"level is {report['level']}, not {level}")
    if report["summary"]["verdict"] != "pass":
        found.append(f"the verdict of the run is {report['summary']['verdict']}")
    for clause in report["clauses"]:
        none = clause["cases"] == clause["unsupported"] > 0
        if none and CLAUSES[clause["id"]].documented and clause["id"] not in MAY_LACK:
            found.append(f"{clause['id']} is unsupported")
    unlisted = Counter(
        (case["clause"], str(case["message"])[:_LONGEST_REASON])
        for case in report["cases"]
        if case["verdict"] == "unsupported" and not _may_be_unsupported(case)
    )
    for (clause, reason), count in unlisted.items():
        found.append(
            f"{count} case{'s' * (count > 1)} of {clause} unsupported for a reason that is not on "
            f"the list: {reason}"
        )
    return found


def why_not_certified(report: Report) -> str:
    """Why a single run is no certificate, in one line."""
    reasons = shortfalls(report, CERTIFIED, report["level"])
    numbers = ", ".join(map(str, CERTIFIED.ranks))
    more = f" ({reasons[0]})" if reasons else ""
    return (
        f"not certified: one run{more}; a certificate needs runs on {numbers} ranks: "
        "syncbn-conformance certify"
    )


def _may_be_unsupported(row: Mapping[str, Any]) -> bool:
    case, reason = of_document(row["spec"]), str(row["message"])
    return any(
        one.holds(case) and re.fullmatch(one.text, reason, re.DOTALL) for one in MAY_BE_UNSUPPORTED
    )


def _or(numbers: tuple[int, ...]) -> str:
    return " or ".join(map(str, numbers))
