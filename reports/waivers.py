"""Waivers: changes that a gate lets pass, each with its reason, an issue, an owner and an end."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from syncbn.reports.files import ReportError, read
from syncbn.reports.schema import Schema, parse
from syncbn.reports.text import one_line

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_SCHEMA = Schema(
    json.loads(Path(__file__).with_name("schema").joinpath("waivers-1.json").read_bytes())
)
_LARGEST = 10_000_000  # bytes


@dataclass(frozen=True)
class Waiver:
    """Changes of a case, or of a clause and all its cases, that a gate lets pass.

    case, clause: the id; exactly one of them is not None.
    expires: the last day on which it holds, in UTC.
    """

    case: str | None
    clause: str | None
    reason: str
    link: str
    owner: str
    expires: date

    @property
    def name(self) -> str:
        return f"case {self.case}" if self.case else f"clause {self.clause}"

    @property
    def text(self) -> str:
        return one_line(f"{self.reason} ({self.owner}, until {self.expires}, {self.link})")

    def covers(self, clause: str, case: str | None) -> bool:
        """Whether it is for this case of this clause; case None is the clause itself."""
        return self.clause == clause or (case is not None and self.case == case)


def load_waivers(path: str | os.PathLike[str]) -> list[Waiver]:
    """Read a file of waivers, TOML if its name ends in .toml, JSON otherwise.

    Raises:
        ReportError: the file cannot be read, or breaks a rule of schema/waivers-1.json.
    """
    content = read(path, _LARGEST, "waivers")
    try:
        document = _toml(content) if Path(path).suffix == ".toml" else parse(content)
    except (ValueError, RecursionError) as error:
        kind = "TOML" if Path(path).suffix == ".toml" else "JSON"
        raise ReportError(f"{path} is not {kind}: {error}") from error
    if violation := _SCHEMA.violation(document):
        raise ReportError(f"{path} holds no valid waivers: {violation}")
    return [_waiver(path, index, one) for index, one in enumerate(document["waiver"])]


def _toml(content: bytes) -> Any:
    """The document with its dates as text."""
    return json.loads(json.dumps(tomllib.loads(content.decode()), default=str))


def _waiver(path: str | os.PathLike[str], index: int, one: dict[str, str]) -> Waiver:
    try:
        expires = date.fromisoformat(one["expires"])
    except ValueError as error:
        place = f"waiver[{index}].expires"
        raise ReportError(
            f"{path} holds no valid waivers: {place}: must be a date, got {one['expires']!r}"
        ) from error
    return Waiver(
        one.get("case"), one.get("clause"), one["reason"], one["link"], one["owner"], expires
    )
