"""The must-pass lists: the cases of each profile, frozen by id in conformance/profiles/.

A run is compared with its list, so that a case that got lost fails the run. There is one file for
each number of ranks, because ids depend on it. A line has the id, the clause, the first profile
that has the case (later profiles have it as well), and the title, for the review of a change.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from syncbn.conformance.cases import PROFILES, catalogue

RANKS = (1, 2, 4, 8)
FOLDER = Path(__file__).resolve().parent / "profiles"


def freeze() -> None:
    """Write the lists from the cases that the catalogue has now."""
    for ranks in RANKS:
        (FOLDER / f"{ranks}.txt").write_text(_text(ranks))


def listed(ranks: int, profile: str) -> dict[str, str]:
    """Clause and title of every case of a profile, by id. Empty if `ranks` is not in RANKS."""
    if ranks not in RANKS:
        return {}
    lines = (FOLDER / f"{ranks}.txt").read_text().splitlines()
    fields = [line.split(maxsplit=3) for line in lines]
    wanted = PROFILES[: PROFILES.index(profile) + 1]
    return {id: f"{clause} {title}" for id, clause, first, title in fields if first in wanted}


def missing(ranks: int, profile: str, ran: Iterable[str]) -> list[str]:
    """The ids on the list of a profile that are not among those that ran."""
    return sorted(set(listed(ranks, profile)) - set(ran))


def _text(ranks: int) -> str:
    first: dict[str, str] = {}
    for profile in PROFILES:
        for case in catalogue(ranks, profile):
            first.setdefault(case.id, profile)
    cases = catalogue(ranks, PROFILES[-1])
    return "".join(f"{c.id} {c.clause:<7} {first[c.id]:<7} {c.title}\n" for c in cases)
