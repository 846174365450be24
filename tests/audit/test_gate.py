"""The gate is red for a mutant in the place of the layer, and green for the control."""

from __future__ import annotations

from pathlib import Path

import pytest

from audit.__main__ import main
from syncbn import reports


def test_a_mutant_is_red_with_its_clause_first_and_one_that_is_green_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The smallest profile has no case that the second mutant fails."""
    options = ["--ranks", "2", "--profile", "smoke", "--out", str(tmp_path)]
    assert main(["gate", "BiasedRunningVar", "ConstantShardOverflows", *options]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "BiasedRunningVar red STAT-2 STAT-2 ConstantShardOverflows GREEN" in shown
    assert "Plain: green, 0 cases failed" in shown
    assert "1 of 2 mutants are red; a clause in which it must die comes first in 1" in shown
    report = reports.load(tmp_path / "BiasedRunningVar.json")
    assert report["summary"]["verdict"] == "fail"


def test_an_unknown_mutant(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gate", "Missing"]) == 2
    assert "mutant must be one of" in capsys.readouterr().err
