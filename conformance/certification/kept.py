"""What a certification that was interrupted left: the runs that are whole, and their log."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from syncbn import reports
from syncbn.conformance import ConformanceError
from syncbn.conformance.certification import contents, raw
from syncbn.conformance.certification.environment import differences
from syncbn.reports.junit import junit
from syncbn.reports.schema import Schema, parse

RESUME = "--resume"
_SHOWN = 5  # differences
_LINE = Schema(
    {
        "type": "object",
        "required": ["product", "environment"],
        "properties": {
            "product": {"type": "object"},
            "environment": {
                "type": "object",
                "required": ["started", "command"],
                "properties": {"command": {"type": "array", "items": {"type": "string"}}},
            },
        },
    }
)


class CertificationError(ConformanceError):
    """A package that cannot be made. The message is one line."""


@dataclass
class Kept:
    """The runs that need not be made again.

    started, command: as the log begins with them.
    size: the bytes of the log up to the end of the last whole run.
    reports: by number of ranks.
    sources: the files of the layer that each of the runs had loaded.
    """

    started: str
    command: list[str]
    size: int
    reports: dict[int, reports.Report] = field(default_factory=dict)
    sources: list[dict[str, Any]] = field(default_factory=list)


def whole_runs(folder: Path, begun: dict[str, Any], runs: tuple[int, ...]) -> Kept:
    """The whole runs in the folder of a certification that was interrupted.

    Args:
        begun: the first line of the log, as a certification that begins now would write it.
        runs: the numbers of ranks, in the order of the runs. All before one that is not whole stay.

    Raises:
        CertificationError: there is no such certification, or it was another one.
    """
    if (folder / contents.CERTIFICATE).exists():
        raise CertificationError(f"the package in {folder} is complete: there is nothing to resume")
    (first, size), *rest = _lines(folder)
    _compare(folder, first, begun)
    found = Kept(first["environment"]["started"], first["environment"]["command"], size)
    for ranks in runs:
        report = _whole(folder, ranks, [line for line, _ in rest])
        if report is None:
            break
        count = len(report["cases"]) + 2
        line, found.size = rest[count - 1]
        found.reports[ranks] = report
        found.sources.append(line["sources"])
        rest = rest[count:]
    return found


def _lines(folder: Path) -> list[tuple[dict[str, Any], int]]:
    """The lines of the log, each with the place of its end. The last one may be cut off."""
    path, end = folder / contents.LOG, 0
    found: list[tuple[dict[str, Any], int]] = []
    try:
        *whole, _ = path.read_bytes().split(b"\n")
        for text in whole:
            line, end = parse(text), end + len(text) + 1
            if not isinstance(line, dict):
                raise ValueError(f"line {len(found) + 1} is no object")
            found.append((line, end))
    except (OSError, ValueError) as error:
        raise CertificationError(f"cannot resume the certification in {path}: {error}") from error
    if not found or _LINE.violation(found[0][0]):
        raise CertificationError(f"cannot resume the certification in {path}: it has no beginning")
    return found


def _compare(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to go on with a certification of something else, or by another suite."""
    sides = [line["environment"] | {"product": line["product"]} for line in (before, now)]
    commands = [shlex.join(one for one in side["command"] if one != RESUME) for side in sides]
    ignored = {"started": "", "command": ""}
    changed = [f"command, which was {commands[0]}"] * (commands[0] != commands[1])
    changed += differences(sides[0] | ignored, sides[1] | ignored)
    if changed:
        raise CertificationError(
            f"cannot resume the certification in {folder}: these are not as they were: "
            + ", ".join(changed[:_SHOWN])
        )


def _whole(folder: Path, ranks: int, lines: list[dict[str, Any]]) -> reports.Report | None:
    """The report of a run whose files and first lines agree; None if it must be made again."""
    place = folder / contents.name_of(ranks, "")
    try:
        report = reports.load(place / contents.REPORT)
        with (place / contents.RAW).open("rb") as file:
            digests = {record.case: record.sha256 for record in raw.read(file)}
        text = (place / contents.JUNIT).read_text(encoding="utf-8")
    except (reports.ReportError, raw.RawError, OSError, ValueError):
        return None
    if report["summary"]["verdict"] not in ("pass", "fail") or text != junit(report):
        return None
    cases = [contents.case_line(ranks, row, digests.get(row["id"])) for row in report["cases"]]
    wanted = [contents.run_line(report), *cases]
    if report["ranks"] != ranks or lines[: len(wanted)] != wanted or len(lines) == len(wanted):
        return None
    ran = lines[len(wanted)]
    return report if ran == contents.ran_line(report, ran.get("sources", {})) else None
