"""The result of running the suite on a random mutant."""

from __future__ import annotations

from dataclasses import dataclass

from audit.mutate.draw import Mutant
from syncbn.conformance.case import Case


@dataclass(frozen=True)
class Detection:
    """How the suite detected a mutant.

    how: "wrong" for a wrong number or fact, or "raised", "hang", "crash", "load".
    case: that detected it, or None if the layer could not be loaded.
    message: of the verdict.
    """

    how: str
    case: Case | None
    message: str


@dataclass(frozen=True)
class Result:
    """A mutant and how it was detected; None if it survived."""

    mutant: Mutant
    detection: Detection | None
    seconds: float

    @property
    def how(self) -> str:
        return self.detection.how if self.detection else "survived"
