"""What "certified" means: the runs that a layer must pass, and what it may leave unsupported.

A certificate is about one layer on one kind of device, in one mode and with one backend. Its cases
hold every dtype that the device has.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from syncbn.conformance import ConformanceError
from syncbn.conformance.case import Case
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

# Why a case may be unsupported: the reasons that the suite itself gives, and why each is no fault
# of the layer.
MAY_BE_UNSUPPORTED = {
    "the target takes a ProcessGroup, and torch checks the rank ids of that": "PyTorch has no "
    "argument of rank ids",
    "Ascend and its kernels have no float64": "the device has none",
    r"MindSpore \S+ has no \w+ on \w+: .*": "the framework has no such dtype there",
    "the suite neither copies nor casts layers of MindSpore": "the suite has no such case",
    "the suite has no data parallelism of MindSpore, which has none on CPU": "likewise",
    "the suite cannot make a backward of MindSpore fail": "likewise",
    "MindSpore has no inference mode": "the framework has none",
    "a graph of MindSpore records what is differentiated, and has no other switch": "likewise",
    "in a graph MindSpore recomputes operations, not the forward of a layer": "likewise",
    "a compiled forward cannot see whether it will be differentiated": "likewise",
    "MindSpore rounds float64 in a graph that can raise: its TensorMove has none": "likewise",
    "collectives of MindSpore are counted on CPU only": "the suite cannot count them",
    "MindSpore's profiler, which counts collectives, breaks a graph that raises": "likewise",
    r"rank \d+ refuses (float16|bfloat16|float64): .*": "the page names no dtypes; only in clauses "
    "that it documents",
    r".*second derivative.*": "a graph of MindSpore has none",
}
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
    found += [
        f"case {case['id']} of {case['clause']} is unsupported for a reason that is not on the list"
        for case in report["cases"]
        if case["verdict"] == "unsupported" and not _may_be_unsupported(case["message"])
    ]
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


def _may_be_unsupported(reason: Any) -> bool:
    return any(re.fullmatch(known, str(reason), re.DOTALL) for known in MAY_BE_UNSUPPORTED)


def _or(numbers: tuple[int, ...]) -> str:
    return " or ".join(map(str, numbers))
