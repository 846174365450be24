"""The example and the benchmark run as their users run them, and the example's verdict can fail."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import layer

# examples/ holds scripts and is no package, which an import statement would need for mypy.
digits = importlib.import_module("examples.digits")

ROOT = Path(__file__).parents[2]
KEYS = list(digits.network(nn.BatchNorm2d, torch.float64).state_dict())


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture
def expected() -> dict[str, torch.Tensor]:
    """A state with a number other than 0 in every tensor."""
    state = digits.network(nn.BatchNorm2d, torch.float64).state_dict()
    return {key: value + 1 for key, value in state.items()}


def test_the_ranks_of_the_example_follow_the_single_process() -> None:
    run = python("-m", "examples.digits", "--ranks", "3", "--epochs", "1", "--steps", "3")
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("\nfollows full-batch BatchNorm: largest relative difference") == 2


def test_the_example_fails_if_the_ranks_are_further_apart_than_allowed() -> None:
    strict = "import sys; from examples import digits; digits.ALLOWED_EPSILONS = -1"
    few = ("--ranks", "1", "--dtype", "float32", "--epochs", "1", "--steps", "1")
    run = python("-c", f"{strict}; sys.exit(digits.main())", *few)
    assert run.returncode == 1, run.stdout + run.stderr
    assert "DOES NOT FOLLOW full-batch BatchNorm" in run.stdout, run.stderr


@pytest.mark.parametrize("key", KEYS)
def test_one_wrong_number_is_noticed(key: str, expected: dict[str, torch.Tensor]) -> None:
    state = {name: value.clone() for name, value in expected.items()}
    assert digits.largest_difference(state, expected) == 0
    allowed = digits.allowed_difference(torch.float64)
    state[key] = state[key].double()
    state[key].view(-1)[-1] += 2 * allowed * state[key].max()
    assert digits.largest_difference(state, expected) > allowed
    state[key].view(-1)[0] = math.nan
    assert not digits.largest_difference(state, expected) <= allowed


def test_states_with_other_keys_are_refused(expected: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="state must have the keys"):
        digits.largest_difference({**expected, "more": torch.ones(1)}, expected)


def test_one_wrong_epoch_is_reported(
    expected: dict[str, torch.Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    images, labels = torch.ones(1, 1, 8, 8, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    wrong = expected | {KEYS[0]: expected[KEYS[0]] * 1.001}
    assert digits.report([expected, expected], [expected, expected], images, labels)
    assert "\nfollows full-batch BatchNorm" in capsys.readouterr().out
    assert not digits.report([wrong, expected], [expected, expected], images, labels)
    assert "\nDOES NOT FOLLOW full-batch BatchNorm" in capsys.readouterr().out


def test_the_shards_of_a_batch_are_uneven_and_complete() -> None:
    batch = torch.arange(64)
    shards = [digits.shard(batch, rank, 4) for rank in range(4)]
    assert torch.cat(shards).equal(batch)
    assert len({len(shard) for shard in shards}) == 4


def test_the_benchmark_runs(tmp_path: Path) -> None:
    out = tmp_path / "new" / "layer.json"
    run = python("-m", "benchmarks.layer", "--quick", "--repeat", "2", "--out", str(out))
    assert run.returncode == 0, run.stdout + run.stderr
    assert ("warning: " in run.stdout) == (layer.cores() < 2)
    result = json.loads(out.read_text())
    assert (result["ranks"], result["repeat"]) == (2, 2)
    assert result["environment"]["torch"] == torch.__version__
    cases = [(tuple(case["shape"]), case["memory"]) for case in result["cases"]]
    assert cases == [(shape, memory) for memory in layer.MEMORY for shape in layer.QUICK_SHAPES]
    for case in result["cases"]:
        assert str(tuple(case["shape"])) in run.stdout
        for layout in layer.LAYOUTS:
            assert tuple(case[layout]["ratio"]) == layer.BACKENDS
            for ratio in case[layout]["ratio"].values():
                low, high = ratio["quartiles"]
                assert 0 < low <= ratio["median"] <= high
        assert min(case["collectives"].values()) > 0
