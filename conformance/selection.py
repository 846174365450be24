"""A part of the cases of a profile: some clauses, some cases, one shard of several."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from syncbn.conformance import ConformanceError
from syncbn.conformance.case import Case
from syncbn.conformance.cases import catalogue
from syncbn.conformance.clauses import CLAUSES


class SelectionError(ConformanceError, ValueError):
    """A selection of cases that there is not. The message is one line."""


@dataclass(frozen=True)
class Selection:
    """Which cases of a profile run.

    clauses: only cases of these clauses; all if empty.
    cases: only cases with these ids, of whatever profile; all if empty.
    shard: this part of all, and the number of parts, counted from 1; None is everything. Every case
        is in exactly one shard.
    """

    clauses: tuple[str, ...] = ()
    cases: tuple[str, ...] = ()
    shard: tuple[int, int] | None = None

    @property
    def document(self) -> dict[str, Any] | None:
        """As a report has it; None if nothing is left out."""
        if not (self.clauses or self.cases or self.shard):
            return None
        shard = self.shard and f"{self.shard[0]}/{self.shard[1]}"
        return {"clauses": [*self.clauses], "cases": [*self.cases], "shard": shard}

    def of(self, ranks: int, profile: str) -> list[Case]:
        """The selected cases of a profile.

        Raises:
            SelectionError: there is no such clause or case, or no case is left.
        """
        for clause in self.clauses:
            if clause not in CLAUSES:
                raise SelectionError(f"clause must be one of the contract, got {clause!r}")
        found = catalogue(ranks, "full" if self.cases else profile)
        ids = {case.id for case in found}
        for wanted in self.cases:
            if wanted not in ids:
                raise SelectionError(
                    f"case must be the id of a case on {ranks} ranks (see `list --ranks {ranks} "
                    f"--profile full`), got {wanted!r}"
                )
        found = [case for case in found if not self.cases or case.id in self.cases]
        found = [case for case in found if not self.clauses or case.clause in self.clauses]
        if self.shard:
            part, parts = self.shard
            found = found[part - 1 :: parts]
        if not found:
            raise SelectionError(f"no case of profile {profile} on {ranks} ranks is selected")
        return found


EVERYTHING = Selection()


def shard(text: str) -> tuple[int, int]:
    """The shard of a text such as "1/4".

    Raises:
        ValueError: the text is no shard.
    """
    found = re.fullmatch(r"([0-9]{1,4})/([0-9]{1,4})", text)
    part, parts = (int(number) for number in found.groups()) if found else (0, 0)
    if not 1 <= part <= parts:
        raise ValueError(f"must be I/N with I from 1 to N, got {text!r}")
    return part, parts


def names(texts: Sequence[str]) -> tuple[str, ...]:
    """The names of options that may be given again, or with several names between commas."""
    return tuple(name for text in texts for name in text.split(",") if name)
