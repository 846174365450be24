"""The must-pass lists: they are what the suite has, and a run notices what it lost."""

from __future__ import annotations

import pytest

from syncbn.conformance import must_pass
from syncbn.conformance.cases import PROFILES, catalogue


@pytest.mark.parametrize("ranks", must_pass.RANKS)
def test_the_lists_are_of_the_cases_there_are(ranks: int) -> None:
    """If not, `syncbn-conformance freeze` writes them; the difference is to be reviewed."""
    for profile in PROFILES:
        cases = {case.id: f"{case.clause} {case.title}" for case in catalogue(ranks, profile)}
        assert must_pass.listed(ranks, profile) == cases


def test_profiles_hold_the_ones_before_them() -> None:
    smoke, certify, full = (set(must_pass.listed(4, profile)) for profile in PROFILES)
    assert smoke < certify < full
    assert len(full) >= 2000


def test_a_lost_case_is_missing() -> None:
    ran = list(must_pass.listed(2, "certify"))
    assert must_pass.missing(2, "certify", ran) == []
    assert must_pass.missing(2, "certify", ran[1:-1]) == sorted([ran[0], ran[-1]])
    assert len(must_pass.missing(2, "full", ran)) == len(must_pass.listed(2, "full")) - len(ran)


def test_there_is_no_list_for_other_numbers_of_ranks() -> None:
    assert must_pass.listed(3, "full") == {}
    assert must_pass.missing(3, "full", []) == []
