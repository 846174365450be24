"""The example of ResNet-18 runs as its users run it, and its verdict can fail."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from examples import resnet_digits

ROOT = Path(__file__).parents[2]
FEW = ("--ranks", "2", "--steps", "2", "--width", "4")


def run(allowed: float, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The example with another limit."""
    code = (
        "import sys; from examples import resnet_digits; "
        f"resnet_digits.ALLOWED = {allowed}; sys.exit(resnet_digits.main())"
    )
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


def test_the_ranks_follow_the_single_process_eager_and_compiled() -> None:
    done = run(resnet_digits.ALLOWED, *FEW, "--compile", "aot_eager")
    assert done.returncode == 0, done.stdout + done.stderr
    follow = "the losses follow the single process"
    assert f"SyncBatchNorm, 2 ranks: {follow}" in done.stdout
    assert f"SyncBatchNorm, 2 ranks, aot_eager: {follow}" in done.stdout


def test_the_example_fails_if_the_losses_are_further_apart_than_allowed() -> None:
    done = run(-1, "--ranks", "1", "--steps", "1", "--width", "4")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "SyncBatchNorm, 1 rank: the losses DO NOT FOLLOW" in done.stdout, done.stderr


@pytest.mark.parametrize("wrong", [1 + 1e-5, math.nan])
def test_one_wrong_loss_is_noticed(wrong: float) -> None:
    assert resnet_digits.largest_difference([2.0, 1.0], [2.0, 1.0]) == 0
    assert not resnet_digits.largest_difference([2.0, wrong], [2.0, 1.0]) <= resnet_digits.ALLOWED


def test_the_network_has_the_names_and_shapes_of_torchvision() -> None:
    """Counted on resnet18(num_classes=10) of torchvision 0.28.0."""
    state = resnet_digits.ResNet18(width=64).state_dict()
    assert len(state) == 122
    assert sum(p.numel() for p in resnet_digits.ResNet18(width=64).parameters()) == 11_181_642
    assert state["layer4.0.downsample.0.weight"].shape == torch.Size([512, 256, 1, 1])


# Of torch's exporter, by way of copyreg.
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_onnxruntime_gives_the_scores_of_pytorch(tmp_path: Path) -> None:
    for needed in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(needed, reason=f"{needed} is not installed")
    images, labels = torch.rand(6, 3, 16, 16, dtype=torch.float64), torch.arange(6)
    plan = resnet_digits.Plan(images, labels, steps=2, width=4)
    model = resnet_digits.network(plan)
    resnet_digits.train(model, plan)
    state = model.state_dict()
    assert resnet_digits.export(state, plan, tmp_path / "network.onnx") < 1e-5


def test_the_curves_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    resnet_digits.plot({"one": [2.0, 1.0], "other": [2.0, 1.5]}, tmp_path / "losses.svg")
    drawn = (tmp_path / "losses.svg").read_text()
    assert ">one<" in drawn
    assert ">other<" in drawn
