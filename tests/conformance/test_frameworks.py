"""The table of the frameworks is complete, and the names of targets follow from it."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

from syncbn.conformance import frameworks, runner, targets
from syncbn.conformance.cases import catalogue
from syncbn.conformance.frameworks import FRAMEWORKS, Framework, FrameworkError
from syncbn.conformance.pool import RankPool
from syncbn.conformance.targets import TargetError

each_framework = pytest.mark.parametrize("framework", FRAMEWORKS.values(), ids=FRAMEWORKS)


@each_framework
def test_what_a_record_names_exists(framework: Framework) -> None:
    module, _, name = framework.rank.partition(":")
    assert importlib.util.find_spec(module) is not None
    assert importlib.util.find_spec(f"syncbn.{framework.name}") is not None
    if not framework.installed:
        pytest.skip(f"{framework.title} is not installed")
    assert framework.rank_class().__name__ == name


@each_framework
def test_targets_of_a_framework(framework: Framework) -> None:
    assert framework.own is not None
    ours, own = targets.parse(f"syncbn.{framework.name}"), targets.parse(framework.own.name)
    assert (ours.framework, ours.backend, ours.rank_ids) == (framework.name, "auto", True)
    assert (own.module, own.backend, own.rank_ids) == (framework.own.module, None, False)
    assert own.rung == framework.own.on_cpu
    for target in (ours, own):
        assert target.mode == (framework.modes[0] if framework.modes else None)
        assert target.name in targets.descriptions()
    assert f"{framework.name}:MODULE:CLASS" in targets.descriptions()


@each_framework
@pytest.mark.parametrize("device", ["cpu", "cuda", "npu"])
def test_every_backend_is_a_target(framework: Framework, device: str) -> None:
    for name, backend in framework.backends.items():
        target = targets.parse(f"syncbn.{framework.name}", device, name)
        assert target.rung == (backend.on_cpu if device == "cpu" else "device")
        assert target.float64 == (device in backend.float64_on)


@each_framework
def test_auto_is_the_default_of_the_device(
    framework: Framework, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever SYNCBN_BACKEND is in the controller, because the ranks set it themselves."""
    monkeypatch.setenv("SYNCBN_BACKEND", "no such backend")
    for name, backend in framework.backends.items():
        for device in backend.default_on:
            chosen = targets.parse(f"syncbn.{framework.name}", device, name)
            default = targets.parse(f"syncbn.{framework.name}", device)
            assert (default.rung, default.float64) == (chosen.rung, chosen.float64)


def test_no_name_is_that_of_two_targets() -> None:
    names = [*targets.descriptions()]
    assert len(names) == 3 * len(FRAMEWORKS)
    with pytest.raises(TargetError, match=r"target must be one of syncbn\.torch, "):
        targets.parse("syncbn.jax")


@pytest.mark.parametrize(
    ("device", "arguments", "message"),
    [
        ("cpu", {"collectives": "nccl"}, "collectives must be one of gloo for target syncbn.torch"),
        ("cuda", {"collectives": "mpi"}, "collectives must be one of nccl, gloo for target"),
        ("cpu", {"share_device": True}, "share-device must be left out on cpu"),
    ],
)
def test_collectives_and_sharing_fit_the_device(
    device: str, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(TargetError, match=re.escape(message)):
        targets.parse("syncbn.torch", device, **arguments)


def test_ranks_can_share_a_cuda_device_by_either_transport() -> None:
    target = targets.parse("syncbn.torch", "cuda", collectives="gloo", share_device=True)
    assert (target.collectives, target.share_device) == ("gloo", True)


def test_a_framework_without_a_choice_of_collectives_takes_none() -> None:
    with pytest.raises(TargetError, match=r"collectives must be left out for target syncbn\.minds"):
        targets.parse("syncbn.mindspore", collectives="gloo")


PLANTED = str(Path(__file__).with_name("planted.py"))
CASES = [one for one in catalogue(1, "certify") if one.clause in ("CTOR-2", "FWD-2")]

RECORD = """
from syncbn.conformance.frameworks import Framework
from syncbn.conformance.ranks.torch import TorchRank

class OwnRank(TorchRank):
    def versions(self):
        return super().versions() | {"own": "1.0"}

FRAMEWORK = Framework("own", "A framework of one's own", f"{__file__}:OwnRank")
"""


def verdicts(pool: RankPool) -> set[str]:
    return {runner.run_case(pool, case).verdict.verdict for case in CASES}


def test_a_layer_gets_arguments_and_a_set_up() -> None:
    target = targets.parse(
        f"torch:{PLANTED}:NeedsMore",
        layer_args={"unit": "three"},
        setup=f"{PLANTED}:set_up_unit",
    )
    with RankPool(target, 1) as pool:
        assert verdicts(pool) == {"pass"}


def test_a_layer_without_its_arguments_is_refused_by_name() -> None:
    with (
        RankPool(targets.parse(f"torch:{PLANTED}:NeedsMore"), 1) as pool,
        pytest.raises(TargetError, match="unit"),
    ):
        pool.start()


def test_a_framework_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(RECORD)
    try:
        target = targets.parse("own:syncbn.torch:SyncBatchNorm", framework_file=str(path))
        with RankPool(target, 1) as pool:
            assert verdicts(pool) == {"pass"}
            assert pool.versions["own"] == "1.0"
    finally:
        FRAMEWORKS.pop("own", None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "AttributeError"),
        ("FRAMEWORK = 3", "got 3 from"),
        ("1 / 0", "ZeroDivisionError"),
        (None, "no file"),
    ],
)
def test_what_is_no_framework(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "none.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(FrameworkError, match=message):
        frameworks.add_file(str(path))
