"""The mutants are as they are documented, and `run` separates the killed from the survivors."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from audit.failures.known import SOURCE
from audit.mutants import CONTROL, MUTANTS, algorithm, run, show
from audit.mutants.faults import Fault
from audit.mutants.layer import Plain
from audit.mutants.results import FRAMEWORKS, Row
from syncbn.conformance import runner, targets
from syncbn.conformance.case import Case
from syncbn.conformance.cases import catalogue
from syncbn.conformance.clauses import CLAUSES
from syncbn.conformance.pool import Outcome, RankPool
from syncbn.conformance.targets import Target, TargetError
from syncbn.conformance.wire import Message

ROOT = Path(__file__).parents[2]
STEPS = {name for name, value in vars(Plain).items() if callable(value)}
PLACES = ("origin", "summary", "mutants")
FLAGS = {"keeps_dtype", "keeps_format", "keeps_gradient_format"}


def test_there_are_many() -> None:
    assert len(MUTANTS) >= 36
    assert algorithm(CONTROL) is Plain
    assert CONTROL not in MUTANTS


@pytest.mark.parametrize("mutant", MUTANTS.values())
def test_a_docstring_has_a_fault_and_sources(mutant: type[Fault]) -> None:
    what, _, sources = (mutant.__doc__ or "").partition("Source: ")
    assert what.strip().endswith(".")
    assert sources.strip().endswith(".")
    for source in sources.strip().removesuffix(".").split("; "):
        here = re.fullmatch(r"derived from (.+)", source)
        assert (ROOT / here[1]).is_file() if here else SOURCE.fullmatch(source), source


@pytest.mark.parametrize("mutant", MUTANTS.values())
def test_a_mutant_dies_in_clauses_that_have_cases(mutant: type[Fault]) -> None:
    assert mutant.dies_in
    assert len(set(mutant.dies_in)) == len(mutant.dies_in)
    for clause in mutant.dies_in:
        assert CLAUSES[clause].not_run is None
    assert mutant.frameworks
    assert set(mutant.frameworks) <= set(FRAMEWORKS)


@pytest.mark.parametrize("mutant", MUTANTS.values())
def test_a_mutant_replaces_a_step_or_two_of_the_right_layer(mutant: type[Fault]) -> None:
    assert 1 <= len(set(vars(mutant)) & (STEPS | FLAGS)) <= 2


def test_a_mutant_is_a_target() -> None:
    module = importlib.import_module("audit.mutants.torch")
    layer = module.LocalCount(3)
    assert type(layer).__name__ == "LocalCount"
    assert type(layer.plain) is MUTANTS["LocalCount"]
    assert type(module.SyncBatchNorm(3).plain) is Plain
    assert type(module.SyncBatchNorm(3, mutant="LocalCount").plain) is MUTANTS["LocalCount"]
    with pytest.raises(AttributeError, match="NoSuchMutant"):
        module.NoSuchMutant  # noqa: B018


def test_the_control_passes() -> None:
    target = targets.parse("torch:audit.mutants.torch:SyncBatchNorm")
    with RankPool(target, 2) as pool:
        for case in catalogue(2, "smoke"):
            found = runner.run_case(pool, case).verdict
            assert found.verdict == ("unsupported" if case.clause == "ERR-5" else "pass"), case


frameworks = [
    "torch",
    pytest.param(
        "mindspore",
        marks=pytest.mark.skipif(
            importlib.util.find_spec("mindspore") is None, reason="MindSpore is not installed"
        ),
    ),
]


@pytest.mark.parametrize("framework", frameworks)
def test_a_mutant_is_killed_where_it_errs_and_survives_elsewhere(
    framework: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MUTANTS["BiasedRunningVar"], "dies_in", ("STAT-1", "STAT-2"))
    names = ["BiasedRunningVar", "LocalCount"]
    rows = run_mutants(names, framework=framework, ranks=2, seeds=[0, 1], profile="smoke")
    control, biased, local = rows
    assert control.wrong == local.wrong == []
    assert biased.wrong == [("STAT-1", 0), ("STAT-1", 1)]
    assert biased.killed("STAT-2", 0)
    assert biased.killed("STAT-2", 1)
    assert [biased.mark(clause) for clause in ("STAT-1", "STAT-2", "STAT-3")] == [".", "X", ""]
    assert show.summary(rows) == [
        f"{framework}: 1 of 2 mutants killed",
        f"SURVIVES {framework} BiasedRunningVar, STAT-1, seed 0: passed or unsupported",
        f"SURVIVES {framework} BiasedRunningVar, STAT-1, seed 1: passed or unsupported",
    ]


def run_mutants(
    names: Sequence[str],
    *,
    framework: str = "torch",
    ranks: int = 1,
    seeds: Sequence[int] = (0,),
    only_declared: bool = True,
    profile: str = "certify",
) -> list[Row]:
    return run.run(
        framework,
        names,
        ranks=ranks,
        seeds=seeds,
        only_declared=only_declared,
        profile=profile,
        progress=lambda row, clause, seed: None,
    )


class FakePool:
    """Ranks whose answer depends on the mutant; `runs` lists the cases that they ran."""

    starts: int
    answers: dict[str, Callable[[Case], Outcome]]
    runs: list[tuple[str, str, int]]  # mutant, title and seed

    def __init__(self, target: Target, ranks: int) -> None:
        type(self).runs = []

    def __enter__(self) -> FakePool:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def run(self, case: Case) -> Outcome:
        mutant = case.layer["mutant"]
        self.runs.append((mutant, case.title, case.seed))
        return self.answers.get(mutant, right)(case)


def answer(*types: str) -> Outcome:
    error: dict[str, Any] = {"error": {"types": types, "message": ""}} if types else {}
    return Outcome([Message({"steps": [], **error}, {})])


def right(case: Case) -> Outcome:
    return answer("ValueError")


def silent(case: Case) -> Outcome:
    return answer()


def silent_at_minus_1(case: Case) -> Outcome:
    return answer() if "-1" in case.title else right(case)


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> type[FakePool]:
    """One fake rank. All mutants must die in ERR-3, which has two cases, num_features=0 and -1."""
    monkeypatch.setattr(run, "RankPool", FakePool)
    for mutant in MUTANTS.values():
        monkeypatch.setattr(mutant, "dies_in", ("ERR-3",))
    FakePool.answers = {}
    FakePool.starts = 1
    return FakePool


@pytest.mark.parametrize(
    ("given", "mark", "killed"),
    [
        (answer(), "X", True),
        (answer("TypeError"), "r", False),
        (Outcome([None], hung=[0]), "h", True),
        (Outcome([None], crashed=[0]), "c", False),
        (answer("ValueError"), ".", False),
    ],
)
def test_what_is_a_kill(ranks: type[FakePool], given: Outcome, mark: str, killed: bool) -> None:
    ranks.answers["LocalCount"] = lambda case: given
    _, row = run_mutants(["LocalCount"])
    assert row.mark("ERR-3") == mark
    assert row.wrong == ([] if killed else [("ERR-3", 0)])


def test_fresh_ranks_are_proven_before_a_hang_on_them_counts(ranks: type[FakePool]) -> None:
    def slow_on_fresh_ranks(case: Case) -> Outcome:
        if ranks.starts == 1:
            ranks.starts = 2
            return Outcome([None], hung=[0])
        return right(case)

    ranks.answers["LocalCount"] = slow_on_fresh_ranks
    _, row = run_mutants(["LocalCount"], profile="smoke")
    assert row.mark("ERR-3") == "."
    warm_up, *proof = [CONTROL, CONTROL, CONTROL]
    assert [name for name, *_ in ranks.runs] == [warm_up, *proof, "LocalCount"] * 2


def test_a_kill_of_one_seed_is_not_enough(ranks: type[FakePool]) -> None:
    ranks.answers["LocalCount"] = lambda case: answer() if case.seed < 1000 else right(case)
    _, row = run_mutants(["LocalCount"], seeds=[0, 1, 2])
    assert row.wrong == [("ERR-3", 1), ("ERR-3", 2)]
    assert row.mark("ERR-3") == "."


def test_the_case_that_killed_comes_first_with_the_next_seed(ranks: type[FakePool]) -> None:
    ranks.answers["LocalCount"] = silent_at_minus_1
    run_mutants(["LocalCount"], seeds=[0, 1])
    mine = [(title, seed) for mutant, title, seed in ranks.runs if mutant == "LocalCount"]
    assert mine == [("num_features=0", 0), ("num_features=-1", 0), ("num_features=-1", 1000)]


def test_a_case_that_the_control_does_not_pass_kills_no_mutant(ranks: type[FakePool]) -> None:
    ranks.answers = {CONTROL: silent, "LocalCount": silent}
    control, row = run_mutants(["LocalCount"])
    assert row.wrong == [("ERR-3", 0)]
    assert control.wrong == [("ERR-3", 0)]
    assert "CONTROL FAILS torch Plain, ERR-3, seed 0: killed" in show.summary([control, row])[1]


def test_without_only_declared_the_first_seed_runs_everything(ranks: type[FakePool]) -> None:
    ranks.answers["LocalCount"] = silent
    _, row = run_mutants(["LocalCount"], seeds=[0, 1], only_declared=False)
    constructed = {"ERR-1", "ERR-2", "ERR-3", "ERR-4", "ERR-8"}
    assert constructed <= {clause for clause, seed in row.results if seed == 0}
    assert {clause for clause, seed in row.results if seed == 1} == {"ERR-3"}
    titles = {case.title for case in catalogue(1, "certify") if case.clause in constructed}
    assert titles <= {title for mutant, title, _ in ranks.runs if mutant == CONTROL}


def main(**options: Any) -> int:
    """run.main with most of its options given."""
    defaults: dict[str, Any] = {
        "frameworks": ["torch"],
        "ranks": 1,
        "seeds": 1,
        "only_declared": True,
        "profile": "certify",
        "out": None,
        "page": None,
    }
    return run.main(**(defaults | options))


def test_the_table_and_the_exit_status(ranks: type[FakePool], tmp_path: Path) -> None:
    ranks.answers["LocalCount"] = silent
    out, page = tmp_path / "mutants.json", tmp_path / "page.md"
    page.write_text("".join(f"<!-- made: {name} -->\n<!-- end -->\n" for name in PLACES))
    names = ["LocalCount", "EpsClamp"]

    def status(*chosen: str) -> int:
        return main(names=chosen, seeds=2, out=out, page=page, console=console)

    with (tmp_path / "table.txt").open("w") as file:
        console = Console(file=file, width=120)
        assert status("LocalCount") == 0
        assert status(*names) == 1
    lines = (tmp_path / "table.txt").read_text().splitlines()
    assert "LocalCount X" in [line.strip() for line in lines]
    assert "EpsClamp   ." in [line.strip() for line in lines]
    assert "torch: 1 of 2 mutants killed" in lines
    assert "SURVIVES torch EpsClamp, ERR-3, seed 0: passed or unsupported" in lines
    text = page.read_text()
    assert "- planted faults: made by `python -m audit" in text
    assert "1 ranks, 2 seeds; torch: 1 of 2 mutants killed; SURVIVES torch EpsClamp" in text
    assert "| mutant | fault | source | killed in: torch |" in text
    fault = "running_var is made unbiased with the rank's own count."
    source = "pytorch/pytorch#22192; NVIDIA/apex#387"
    assert f"| LocalCount | {fault} | {source} | **ERR-3** |" in text
    assert text.count("SURVIVES |") == 1
    document = json.loads(out.read_text())
    assert [row["as_declared"] for row in document["mutants"]] == [True, True, False]
    dead = document["mutants"][1]
    assert dead["fault"].startswith("running_var is made unbiased")
    assert [result["result"] for result in dead["results"]] == ["killed", "killed"]


@pytest.mark.parametrize(
    ("frameworks", "names", "text"),
    [(["jax"], [], "framework must be one of torch, mindspore, got 'jax'"),
     (["torch"], ["Plain"], "mutant must be one of .*, got 'Plain'")],
)  # fmt: skip
def test_unknown_names(frameworks: list[str], names: list[str], text: str) -> None:
    with pytest.raises(TargetError, match=text):
        main(frameworks=frameworks, names=names, profile="smoke", console=Console(quiet=True))


@pytest.mark.parametrize("layer", [{}, {"affine": False}, {"track_running_stats": False}])
@pytest.mark.parametrize("training", [True, False])
def test_the_control_can_be_differentiated_twice(layer: dict[str, bool], training: bool) -> None:
    module = importlib.import_module("audit.mutants.torch")
    control = module.SyncBatchNorm(3, dtype=torch.float64, **layer).train(training)
    x = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    inputs = (x, *control.parameters())
    assert torch.autograd.gradcheck(lambda x, *parameters: control(x), inputs)
    assert torch.autograd.gradgradcheck(lambda x, *parameters: control(x), inputs)
