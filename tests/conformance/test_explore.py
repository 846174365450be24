"""Exploration: what it draws is defined, and what it finds is simple and replays by itself."""

from __future__ import annotations

import io
import json
import sys
from collections import Counter
from pathlib import Path

import pytest
from rich.console import Console

from syncbn import conformance
from syncbn.conformance import explore, sequences, targets
from syncbn.conformance.__main__ import main
from syncbn.conformance.case import Case, Data, Step
from syncbn.conformance.checks import CHECKS
from syncbn.conformance.clauses import CLAUSES
from syncbn.conformance.document import load
from syncbn.conformance.expected import expect
from syncbn.conformance.explore import Exploration, Finding
from syncbn.conformance.pool import RankPool
from syncbn.conformance.verdict import Verdict

PLANTED = "torch:tests/conformance/planted.py:LocalCount"
ROOT = Path(__file__).parents[2]
MOST_BATCHES = 300  # the rarest content is in one of four on average


def drawn(ranks: int, batches: int, first_seed: int = 0) -> list[Case]:
    cases: list[Case] = []
    for seed in range(first_seed, first_seed + batches):
        sequences.explore(ranks, cases.append, seed, 10)
    return cases


@pytest.fixture
def unstarted() -> RankPool:
    return RankPool(targets.parse("syncbn.torch"), 2)


@pytest.fixture
def run_cases(monkeypatch: pytest.MonkeyPatch) -> list[Case]:
    """The cases that were run, while every case with a training step hangs."""
    cases: list[Case] = []

    def judge(pool: RankPool, case: Case) -> Verdict:
        cases.append(case)
        hangs = any(step.mode == "train" and not step.error for step in case.steps)
        return Verdict("hang" if hangs else "pass", None, "planted")

    monkeypatch.setattr(explore, "_judge", judge)
    return cases


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_what_is_drawn_has_a_reference(ranks: int) -> None:
    cases = drawn(ranks, 6)
    assert len(cases) > 30
    for case in cases:
        assert load(json.loads(json.dumps(case.document))) == case
        expect(case)


def test_what_is_drawn_has_a_bit_of_everything() -> None:
    steps = {"backward", "frozen_input", "frozen_parameters", "present", "recompute", "repeat"}
    steps |= {
        "attributes",
        "recording",
        "autocast",
        "reload",
        "groups",
        "beside",
        "dy_zero_sum",
        "paired",
        "error",
    }
    data = {"ratio", "scale", "constant", "flat", "shared", "poison"}
    errors = {"ValueError in train", "ValueError in eval", "Exception in train"}
    wanted = {("step", name) for name in steps} | {("data", name) for name in data}
    wanted |= {("case", name) for name in ("groups", "ddp", "state")}
    wanted |= {("error", name) for name in errors}
    wanted |= {("input", name) for name in ("float16", "bfloat16", "float32", "float64", "int64")}
    wanted |= {("checks", name) for name in set(CHECKS) - {"signature", "defined"}}
    wanted |= {("dimensions", str(n)) for n in range(1, 7)} | {("batch", "0")}
    # Hypothesis takes constants from the modules that are loaded, so what a seed draws depends on
    # the tests that ran before. Batches are drawn until nothing is missing.
    for seed in range(MOST_BATCHES):
        if not wanted:
            break
        for case in drawn(4, 1, seed):
            wanted.difference_update(explore._content(case))
    assert not wanted, sorted(wanted)


def test_every_check_stands_for_a_clause() -> None:
    assert {check.clause for check in CHECKS.values()} <= set(CLAUSES)


def test_a_planted_bug_is_found_made_simple_and_replays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(explore, "_SHRINK_SECONDS", 600.0)  # whatever else the machine does
    folder = tmp_path / "regressions"
    with RankPool(targets.parse(PLANTED), 2) as pool:
        pool.start()
        found = explore.explore(pool, 5.0, 0, folder)
    finding = found.finding
    assert finding is not None
    case = finding.case
    assert (case.clause, case.checks) == ("STAT-2", ("running_var",))
    assert len(case.steps) <= 2
    assert max(len(shape) for step in case.steps for shape in step.shapes) <= 3
    assert finding.verdict.verdict == finding.again.verdict == "fail"
    assert [finding.path] == list(folder.iterdir())
    assert finding.path.name == f"{case.id}.json"
    assert load(json.loads(finding.path.read_text())) == case
    assert main(["replay", str(finding.path), "--target", PLANTED]) == 1
    assert str(finding.verdict.message) in capsys.readouterr().out
    assert main(["replay", str(finding.path)]) == 0


def test_nothing_is_found_in_our_layer_in_no_time(pool: RankPool, tmp_path: Path) -> None:
    batches: list[int] = []
    found = explore.explore(pool, 0.0, 7, tmp_path, lambda so_far: batches.append(so_far.seed))
    assert batches == [7]
    assert found.finding is None
    assert 1 <= sum(found.verdicts.values()) <= 10
    assert not list(tmp_path.iterdir())


def test_what_a_target_does_not_support_is_counted(
    unstarted: RankPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(explore, "_judge", lambda pool, case: Verdict("unsupported", None, "no"))
    found = explore.explore(unstarted, 0.0, 0, tmp_path)
    assert found.finding is None
    assert set(found.verdicts) == {"unsupported"}
    assert found.left_out == dict.fromkeys(("float16", "bfloat16", "float64"), "no")
    assert {dtype for subject, dtype in found.drawn if subject == "input"} <= {"float32", "int64"}


def test_the_same_hang_costs_time_only_once(
    unstarted: RankPool, run_cases: list[Case], tmp_path: Path
) -> None:
    finding = explore.explore(unstarted, 0.0, 0, tmp_path).finding
    assert finding is not None
    assert (finding.case.clause, finding.case.checks) == ("ERR-9", ())
    assert len(finding.case.steps) == 1
    *ids, again = [case.id for case in run_cases]
    assert len(ids) == len(set(ids))
    assert again == finding.case.id


def test_the_search_for_a_simpler_case_ends_when_time_is_over(
    unstarted: RankPool, run_cases: list[Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(explore, "_SHRINK_SECONDS", -1.0)
    found = explore.explore(unstarted, 0.0, 0, tmp_path)
    assert found.finding is not None
    assert found.finding.verdict.verdict == "hang"
    # Three dtypes; the first to fail, the same without its checks, and that once more.
    assert found.verdicts["hang"] == 1
    assert len(run_cases) == 3 + sum(found.verdicts.values()) + 2


def test_results_that_cannot_be_judged_are_not_asked_for(unstarted: RankPool) -> None:
    def verdict(layer: dict[str, object], x: Data, dtype: str = "float32") -> Verdict:
        step = Step(((2, 3), (2, 3)), dtype=dtype, x=x)
        case = Case("FWD-1", "t", 2, {"num_features": 3, **layer}, (step,), ("y",))
        return explore._judge(unstarted, case)

    constant = verdict({"eps": 0.0}, Data(constant=True))
    large = verdict({"dtype": "float16", "momentum": 1.0}, Data(scale=1e4), "float16")
    # All but 0 is rounding, and 1e12 of it may be beyond float16.
    wide = verdict({"dtype": "float16", "eps": 1e-24}, Data(1e3, constant=True), "float16")
    assert constant.verdict == large.verdict == wide.verdict == "not-run"
    assert unstarted.starts == 0


def test_what_is_shown(unstarted: RankPool) -> None:
    def shown(found: Exploration) -> str:
        out = io.StringIO()
        explore.show(found, unstarted, Console(file=out, width=200))
        return out.getvalue()

    found = Exploration(5, 2.0, Counter({"pass": 3, "unsupported": 1}))
    found.drawn.update([("input", "float16"), ("input", "float32"), ("input", "float32")])
    found.left_out = {"bfloat16": "there is none"}
    text = shown(found)
    assert "left out: bfloat16, there is none\n" in text
    assert "input               float32 2, float16 1\n" in text
    assert "4 cases on 2 ranks in 2 s (2.0 a second), up to seed 5: pass 3, unsupported 1" in text
    assert "nothing found" in text
    case = Case("STAT-2", "explored: train", 2, {"num_features": 2})
    path = Path("conformance", "regressions", "0123.json")
    found.finding = Finding(case, path.resolve(), Verdict("fail", 4.0, "bad"), Verdict("pass"))
    text = shown(found)
    assert "fail of STAT-2, explored: train: bad\n" in text
    assert "but pass when it was run once more" in text
    assert f"syncbn-conformance replay {path} --target syncbn.torch --ranks 2\n" in text


def test_without_hypothesis(
    unstarted: RankPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    monkeypatch.delitem(sys.modules, "syncbn.conformance.sequences")
    monkeypatch.delattr(conformance, "sequences")
    with pytest.raises(explore.ExploreError, match="pip install hypothesis"):
        explore.explore(unstarted, 0.0, 0, tmp_path)
