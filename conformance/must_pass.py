"""The must-pass list: which cases a profile has, frozen by id in conformance/profiles/.

A run is compared with it, so that a case that got lost is a failure and no omission. One file per
number of ranks, as ids depend on it; a line has an id, the clause, the first profile that has the
case (the later ones have it, too) and its title, for whoever reviews a change.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from syncbn.conformance.cases import PROFILES, catalogue

RANKS = (1, 2, 4, 8)
FOLDER = Path(__file__).resolve().parent / "profiles"


def freeze() -> None:
    """Write the lists of what the catalogue has now."""
    for ranks in RANKS:
        (FOLDER / f"{ranks}.txt").write_text(_text(ranks))


def listed(ranks: int, profile: str) -> dict[str, str]:
    """Id and the rest of its line of every case of a profile; nothing for other `RANKS`."""
    if ranks not in RANKS:
        return {}
    lines = (FOLDER / f"{ranks}.txt").read_text().splitlines()
    fields = [line.split(maxsplit=3) for line in lines]
    wanted = PROFILES[: PROFILES.index(profile) + 1]
    return {id: f"{clause} {title}" for id, clause, first, title in fields if first in wanted}


def missing(ranks: int, profile: str, ran: Iterable[str]) -> list[str]:
    """The ids that are on the list of a profile and not among those that ran."""
    return sorted(set(listed(ranks, profile)) - set(ran))


def _text(ranks: int) -> str:
    first: dict[str, str] = {}
    for profile in PROFILES:
        for case in catalogue(ranks, profile):
            first.setdefault(case.id, profile)
    cases = catalogue(ranks, PROFILES[-1])
    return "".join(f"{c.id} {c.clause:<7} {first[c.id]:<7} {c.title}\n" for c in cases)
