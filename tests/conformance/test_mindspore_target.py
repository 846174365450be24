"""MindSpore's rank workers: what they answer is the layer's doing, and nothing else's."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from syncbn import reports
from syncbn.conformance import runner, targets
from syncbn.conformance.__main__ import main
from syncbn.conformance.case import Case, ExpectedError, Step
from syncbn.conformance.cases import catalogue
from syncbn.conformance.pool import RankPool
from syncbn.conformance.ranks import worker
from syncbn.conformance.targets import TargetError
from syncbn.conformance.verdict import Verdict

PLANTED = "mindspore:tests/conformance/planted_mindspore.py"
MODES = ("pynative", "graph")
EVEN = Step(((3, 3, 4), (3, 3, 4)))

needs_mindspore = pytest.mark.skipif(
    importlib.util.find_spec("mindspore") is None, reason="MindSpore is not installed"
)


@pytest.fixture(scope="module")
def operator() -> Iterator[RankPool]:
    with RankPool(targets.parse("mindspore.mint"), 2) as ranks:
        yield ranks


def case(*steps: Step, checks: tuple[str, ...] = ("y",), **fields: Any) -> Case:
    layer = {"num_features": fields.pop("channels", 3), "track_running_stats": False}
    return Case("FWD-1", "planted", 2, layer, steps, checks, **fields)


def run_cases(cls: str, *cases: Case, mode: str = "pynative", starts: int = 1) -> list[Verdict]:
    """The verdicts on cases, one after the other, and how often ranks had to be started."""
    with RankPool(targets.parse(f"{PLANTED}:{cls}", mode=mode), 2) as pool:
        found = [runner.run_case(pool, one).verdict for one in cases]
        assert pool.starts == starts, found
    return found


class TestTargets:
    @pytest.mark.parametrize(
        ("name", "options", "mode", "rung"),
        [
            ("syncbn.torch", {}, None, "device"),
            ("syncbn.torch", {"backend": "composed"}, None, "device"),
            ("syncbn.torch", {"backend": "aten"}, None, "substituted"),
            ("syncbn.torch", {"backend": "triton"}, None, "interpreted"),
            ("syncbn.torch", {"backend": "twin"}, None, "twin"),
            ("syncbn.torch", {"device": "npu"}, None, "device"),
            ("syncbn.torch", {"device": "npu", "backend": "composed"}, None, "device"),
            ("syncbn.torch", {"device": "npu", "backend": "aten"}, None, "device"),
            ("syncbn.torch", {"device": "npu", "backend": "triton"}, None, "device"),
            ("syncbn.torch", {"device": "cuda", "backend": "triton"}, None, "device"),
            ("syncbn.mindspore", {}, "pynative", "device"),
            ("syncbn.mindspore", {"mode": "graph"}, "graph", "device"),
            ("syncbn.mindspore", {"backend": "aclnn"}, "pynative", "substituted"),
            ("syncbn.mindspore", {"backend": "aclnn", "device": "npu"}, "pynative", "device"),
            ("mindspore.mint", {}, "pynative", "substituted"),
            ("mindspore.mint", {"device": "npu", "mode": "graph"}, "graph", "device"),
            ("mindspore:a.b:C", {}, "pynative", "device"),
        ],
    )
    def test_mode_and_rung(
        self, name: str, options: dict[str, Any], mode: str | None, rung: str
    ) -> None:
        target = targets.parse(name, **options)
        assert (target.mode, target.rung) == (mode, rung)

    @pytest.mark.parametrize("name", ["syncbn.torch", "torch.nn", "torch:a:C"])
    def test_torch_has_no_mode(self, name: str) -> None:
        with pytest.raises(TargetError, match=r"mode must not be given, target .* has none"):
            targets.parse(name, mode="pynative")

    def test_the_operator_has_no_graph_on_cpu(self) -> None:
        with pytest.raises(TargetError, match=r"mode must be pynative for target mindspore.mint"):
            targets.parse("mindspore.mint", mode="graph")

    def test_without_mindspore(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "mindspore", None)
        text = r"target needs mindspore, which is not installed: pip install 'syncbn\[mindspore\]'"
        with pytest.raises(ModuleNotFoundError, match=text):
            worker._load(targets.parse("mindspore.mint").document, 0, 1, 0)

    @needs_mindspore
    @pytest.mark.parametrize(
        ("target", "options", "text"),
        [
            ("mindspore:mindspore:Tensor", {}, "Tensor must be a mindspore.nn.Cell"),
            ("mindspore:mindspore.nn:NoSuchCell", {}, "NoSuchCell"),
            (f"{PLANTED}:Local", {"device": "cuda"}, "device must be one of cpu, npu"),
        ],
    )
    def test_that_cannot_be_used(self, target: str, options: dict[str, Any], text: str) -> None:
        with pytest.raises(TargetError, match="cannot be used") as caught:
            RankPool(targets.parse(target, **options), 1).start()
        assert text in str(caught.value)


@needs_mindspore
class TestAnswers:
    @pytest.mark.parametrize("mode", MODES)
    def test_of_a_right_layer_pass(self, mode: str) -> None:
        gradients = ("y", "grad_input", "grad_weight", "grad_bias", "input_unmodified", "format")
        cases = [
            case(dataclasses.replace(EVEN, layout=one, dy_layout=one), checks=gradients)
            for one in ("contiguous", "permuted", "sliced", "expanded", "channels_last")
        ]
        frozen = [((), (0, 1)), ((0, 1), ())]
        cases += [
            case(dataclasses.replace(EVEN, frozen_input=x, frozen_parameters=p), checks=gradients)
            for x, p in frozen
        ]
        cases.append(case(EVEN, EVEN, checks=gradients, groups=((0,), (1,))))
        cases.append(case(dataclasses.replace(EVEN, beside=True), checks=gradients))
        assert [found.message for found in run_cases("Composed", *cases, mode=mode)] == [None] * 9

    @pytest.mark.parametrize("mode", MODES)
    def test_of_a_wrong_layer_fail(self, mode: str) -> None:
        (found,) = run_cases("Local", case(EVEN), mode=mode)
        assert found.verdict == "fail"
        assert "step 0: y[" in str(found.message)

    @pytest.mark.parametrize(
        ("cls", "mode", "counts"),
        [
            ("Composed", "pynative", "[2, 2]"),
            ("Composed", "graph", "[2, 2]"),
            ("Gathers", "pynative", "[3, 2]"),
            ("Local", "pynative", "[0, 0]"),
        ],
    )
    def test_count_collectives(self, cls: str, mode: str, counts: str) -> None:
        (found,) = run_cases(cls, case(EVEN, checks=("collectives",)), mode=mode)
        assert f"collectives in forward and backward is {counts}, expected" in str(found.message)

    def test_counting_leaves_the_layer_as_it_was(self, operator: RankPool) -> None:
        """A counted forward is one more, which must not show in the running statistics."""
        checks = ("collectives", "num_batches_tracked", "running_mean")
        one = dataclasses.replace(case(EVEN, checks=checks), layer={"num_features": 3})
        assert runner.run_case(operator, one).verdict.message is None

    def test_tell_a_platform_without_a_dtype_from_a_layer_that_refuses_it(self) -> None:
        halves = (dataclasses.replace(EVEN, dtype=one) for one in ("bfloat16", "float16"))
        lacking, refused = run_cases("NoFloat16", *map(case, halves))
        assert lacking.verdict == "unsupported"
        assert "has no bfloat16 on CPU: " in str(lacking.message)
        assert refused.verdict == "unsupported"
        assert "input must not be float16" in str(refused.message)

    @pytest.mark.parametrize("frozen", [{"frozen_parameters": (0,)}, {}])
    def test_a_graph_cannot_see_who_has_nothing_to_differentiate(
        self, frozen: dict[str, Any]
    ) -> None:
        error = ExpectedError("RuntimeError", (0,))
        one = case(dataclasses.replace(EVEN, frozen_input=(0,), error=error, **frozen))
        one = dataclasses.replace(one, layer=one.layer | {"affine": bool(frozen)})
        with RankPool(targets.parse("syncbn.mindspore", mode="graph"), 2) as pool:
            found = runner.run_case(pool, one).verdict
        assert found.verdict == "unsupported"
        assert "cannot see whether it will be differentiated" in str(found.message)

    def test_a_graph_that_can_raise_gets_strided_dy_as_it_is(self) -> None:
        error = ExpectedError("ValueError", (0, 1))
        refused = Step(((3, 4, 4), (3, 4, 4)), backward=False, error=error)
        strided = dataclasses.replace(EVEN, dy_layout=("permuted", "sliced"))
        one = case(strided, refused, checks=("grad_input",))
        with RankPool(targets.parse("syncbn.mindspore", mode="graph"), 2) as pool:
            assert runner.run_case(pool, one).verdict.message is None

    @pytest.mark.parametrize(
        ("dtype", "check", "message"),
        [
            ("float32", "collectives", "breaks a graph that raises"),
            ("float64", "y", "rounds float64 in a graph that can raise"),
        ],
    )
    def test_what_a_graph_that_raises_does_not_support(
        self, dtype: str, check: str, message: str
    ) -> None:
        failing = Step(((3, 3, 4), (3, 4, 4)), error=ExpectedError("ValueError", (1,)))
        steps = (dataclasses.replace(step, dtype=dtype) for step in (failing, EVEN))
        with RankPool(targets.parse("syncbn.mindspore", mode="graph"), 2) as pool:
            found = runner.run_case(pool, case(*steps, checks=(check,))).verdict
        assert found.verdict == "unsupported"
        assert message in str(found.message)

    def test_kernels_of_ascend_have_no_float64(self) -> None:
        step = dataclasses.replace(EVEN, dtype="float64")
        one = dataclasses.replace(case(step), layer={"num_features": 3, "dtype": "float64"})
        with RankPool(targets.parse("syncbn.mindspore", backend="aclnn"), 2) as pool:
            found = runner.run_case(pool, one).verdict
        assert found.verdict == "unsupported"
        assert str(found.message).endswith("no float64")


@needs_mindspore
class TestWorld:
    """After an error that all ranks survive, they form a world again."""

    @pytest.mark.parametrize("mode", MODES)
    def test_goes_on_after_an_error(self, mode: str) -> None:
        failing = case(
            dataclasses.replace(EVEN, mode="eval", error=ExpectedError("ValueError", (0, 1)))
        )
        groups = case(EVEN, groups=((0, 1),))
        found = run_cases("SpeaksOutOfTurn", groups, failing, groups, case(EVEN), mode=mode)
        assert [one.message for one in found] == [None] * 4

    def test_is_not_trusted_with_ranks_out_of_step(self) -> None:
        """What rank 0 sent last would be taken for the result of the next broadcast."""
        step = Step(((3, 4, 4), (3, 4, 4)), mode="eval", error=ExpectedError("ValueError", (0, 1)))
        found = run_cases(
            "SpeaksOutOfTurn", case(EVEN), case(step, channels=4), case(EVEN), starts=2
        )
        assert [one.message for one in found] == [None] * 3


@needs_mindspore
class TestOperator:
    """MindSpore's own operator on CPU: its algorithm, on substitutes for its kernels."""

    @pytest.mark.parametrize("clause", ["FWD-1", "FWD-3", "FWD-7", "STAT-2", "NUM-4"])
    def test_passes(self, operator: RankPool, clause: str) -> None:
        cases = [one for one in catalogue(2, "certify") if one.clause == clause]
        found = {one.title: runner.run_case(operator, one).verdict.message for one in cases}
        assert found == dict.fromkeys(found)

    @pytest.mark.parametrize(
        ("clause", "title", "message"),
        [
            ("ERR-5", "process_group=[0, 2]", "raised RuntimeError: Failed to create"),
            ("FWD-4", "rank 0 is empty, 2 dimensions", "y[0, 0] is nan"),
            ("NUM-1", "std 1e-06, far below sqrt(eps)", "running_var["),
            ("NUM-2", "float16, parameters float32, many values", "grad_input["),
            ("TRACK-2", "images, each rank a group", "running mean or running var can't be none"),
        ],
    )
    def test_fails(self, operator: RankPool, clause: str, title: str, message: str) -> None:
        one = next(c for c in catalogue(2) if (c.clause, c.title) == (clause, title))
        found = runner.run_case(operator, one).verdict
        assert found.verdict == "fail"
        assert message in str(found.message)

    def test_report_says_what_was_judged(self, tmp_path: Path) -> None:
        arguments = ["run", "--target", "mindspore.mint", "--ranks", "1", "--profile", "smoke"]
        assert main([*arguments, "--out", str(tmp_path)]) == 1
        target = reports.load(tmp_path / "report.json")["target"]
        assert (target["rung"], target["mode"]) == ("substituted", "pynative")
