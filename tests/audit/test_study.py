"""The study of the bound: CANN's measures on numbers computed by hand, and its tables."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from audit.__main__ import main
from audit.markdown import PageError
from audit.mutants.layer import Alone, State
from audit.study import collect, families, measures, page, run
from audit.study.collect import Layer, Measurement, Study
from audit.study.families import ONE_PASS, family_of
from audit.study.layers import Chains, Float64, Welford
from syncbn.conformance import targets
from syncbn.conformance.case import Case, Data, Step
from syncbn.conformance.cases import catalogue
from syncbn.conformance.frameworks import FRAMEWORKS

TARGET = targets.parse("syncbn.torch")
PAGE = "Text.\n" + "".join(
    f"\n<!-- made: {name} -->\nstale\n<!-- end -->\n"
    for name in ("origin", "setup", "layers", "gap", "families", "cann")
)


# CANN's measures


def test_relative_errors_are_of_the_golden_value_and_a_little_more() -> None:
    golden = np.array([1.0, -4.0, 0.0])
    error = measures.errors(np.array([1.5, -3.0, 2e-7]), golden)
    np.testing.assert_allclose(error, [0.5, 1.0, 2e-7])
    assert measures.mare(error, golden) == pytest.approx(2.0)  # 2e-7 / (0 + 1e-7)
    assert measures.mere(error, golden) == pytest.approx((0.5 + 0.25 + 2.0) / 3, rel=1e-6)


def test_only_what_is_finite_in_the_golden_result_is_measured() -> None:
    golden = np.array([np.nan, np.inf, 1.0, 2.0, 3.0])
    error = measures.errors(np.array([1.0, 1.0, 1.0, np.nan, np.inf]), golden)
    assert error.tolist() == [0.0, np.inf, np.inf]


@pytest.mark.parametrize("dtype", measures.THRESHOLDS)
def test_mixed_tolerance_is_absolute_and_relative(dtype: str) -> None:
    threshold = measures.THRESHOLDS[dtype]
    golden = np.array([0.0, 3.0])
    allowed = np.array([threshold, 4 * threshold])
    assert measures.mixed(allowed, golden, dtype) <= 1
    assert measures.mixed(allowed * [1.01, 1], golden, dtype) == pytest.approx(50)  # half, not 1 %
    assert measures.mixed(allowed * [1, 1.01], golden, dtype) == pytest.approx(50)


def test_mixed_tolerance_lets_one_element_of_a_hundred_pass_up_to_a_cap() -> None:
    golden = np.ones(200)
    error = np.zeros(200)
    error[:2] = 0.009
    assert measures.mixed(error, golden, "float32") == pytest.approx(1.0)
    error[2] = 0.009
    assert measures.mixed(error, golden, "float32") == pytest.approx(1.5)
    error[:3] = [0.02, 0.0, 0.0]
    assert measures.mixed(error, golden, "float32") == pytest.approx(2.0)  # of 1e-2


def test_the_cap_of_large_values_is_32_units_in_the_last_place() -> None:
    golden = np.full(200, 2.0**20)  # float32: units of 2^-3
    error = np.zeros(200)
    error[0] = 4.0
    assert measures.mixed(error, golden, "float32") == pytest.approx(1.0)
    error[0] = 8.0
    assert measures.mixed(error, golden, "float32") == pytest.approx(2.0)


@pytest.mark.parametrize("scale", [1.0, 1e-200, 1e200])
def test_rms_neither_overflows_nor_underflows(scale: float) -> None:
    assert measures.rms(np.array([3.0, 4.0, 0.0, 0.0]) * scale) == pytest.approx(2.5 * scale)


def test_rms_of_nothing_and_of_infinities() -> None:
    assert measures.rms(np.zeros(3)) == 0
    assert measures.rms(np.array([])) == 0
    assert measures.rms(np.array([1.0, np.inf])) == np.inf


@pytest.mark.parametrize(
    ("of", "baseline", "ratio"),
    [(3.0, 2.0, 1.5), (0.0, 2.0, 0.0), (0.0, 0.0, 1.0), (1.0, 0.0, np.inf), (np.inf, 1.0, np.inf)],
)
def test_rms_ratio(of: float, baseline: float, ratio: float) -> None:
    assert measures.rms_ratio(of, baseline) == ratio


# The sound layers of the study itself

PLAIN = (3, 1e-5, 0.1, True, True, "float32")


@pytest.mark.parametrize("layer", [Chains, Welford])
@pytest.mark.parametrize("values", [1, 127, 128, 129, 1000])
def test_statistics_in_chains(layer: type[Chains] | type[Welford], values: int) -> None:
    x = np.random.default_rng(0).normal(5.0, 2.0, (values, 3)).astype(np.float32)
    mean, var = layer(*PLAIN).stats(x)
    assert mean.dtype == var.dtype == np.float32
    np.testing.assert_allclose(mean, x.mean(axis=0, dtype=np.float64), rtol=1e-5)
    np.testing.assert_allclose(var, x.var(axis=0, dtype=np.float64), rtol=1e-5, atol=1e-12)


def test_chains_add_up_one_value_after_the_other() -> None:
    values = np.array([[1.0, *[2.0**-24] * 127]], np.float32)
    assert Chains(*PLAIN).sum(values) == 1.0  # each is lost; in pairs they would not be
    assert values.sum() > 1.0


@pytest.mark.parametrize("scale", [1e-18, 1e18])
def test_welford_neither_overflows_nor_underflows(scale: float) -> None:
    x = (np.random.default_rng(0).normal(0, scale, (300, 3))).astype(np.float32)
    var = Welford(*PLAIN).stats(x)[1]
    np.testing.assert_allclose(var, x.var(axis=0, dtype=np.float64), rtol=1e-5)


def test_float64_layer_rounds_once() -> None:
    x = (1e5 + np.random.default_rng(0).normal(0, 1, (50, 3))).astype(np.float32)
    state = State(
        num_batches_tracked=0,
        weight=np.ones(3),
        bias=np.zeros(3),
        running_mean=np.zeros(3),
        running_var=np.ones(3),
    )
    y, saved = Float64(*PLAIN).forward(x, "float32", state, Alone(), True, True)
    wide = x.astype(np.float64)
    wanted = (wide - wide.mean(axis=0)) / np.sqrt(wide.var(axis=0) + 1e-5)
    assert y.astype(np.float32).astype(np.float64).tolist() == y.tolist()
    np.testing.assert_allclose(y, wanted, rtol=2.0**-24, atol=1e-12)
    assert saved.stats.mean.dtype == np.float64


# Tables

SOUND = Layer("two-pass float32", True, TARGET)
UNSOUND = Layer(ONE_PASS, False, TARGET, "OnePassVariance")


def case_of(mean_over_std: float, dtype: str = "float32") -> Case:
    step = Step(((50, 3),), dtype=dtype, x=Data(mean_over_std))
    return Case("NUM-1", f"mean/std {mean_over_std:g}", 1, {"num_features": 3}, (step,), ("y",))


NEAR, FAR, HALF = case_of(1.0), case_of(1e4), case_of(1.0, "float16")


def measured(
    layer: Layer, case: Case, quantity: str, ratio: float, **of_cann: float
) -> Measurement:
    numbers = {"mere": 0.1, "mare": 0.2, "mixed": 0.3, "rms": 1.0} | of_cann
    return Measurement(layer.name, case.id, quantity, ratio, **numbers)


def fake() -> Study:
    environment = {"ranks": "4", "processor": "x86_64 CPU", "cores": "2", "numpy": "1.26.4"}
    study = Study(environment, (SOUND, UNSOUND), {"torch twin": "it is not compiled"})
    study.cases = {case.id: case for case in (NEAR, FAR)}
    study.measurements = [
        measured(SOUND, NEAR, "y", 0.25),
        measured(SOUND, NEAR, "running_var", 0.125),
        measured(SOUND, FAR, "y", 0.5, mare=7.0),
        measured(UNSOUND, NEAR, "y", 0.3),
        measured(UNSOUND, FAR, "y", 123.0, mare=7.0, mixed=0.5, rms=40.0),
        measured(UNSOUND, FAR, "running_var", np.inf, mere=np.inf, mixed=np.inf, rms=np.inf),
    ]
    study.not_run = {UNSOUND.name: {"no bfloat16": 3}}
    return study


def test_setup() -> None:
    assert page.setup(fake()).splitlines() == [
        "- 2 cases on 4 ranks, x86_64 CPU, 2 cores; numpy 1.26.4",
        "- one-pass variance did not run 3 of them: no bfloat16",
        "- left out: torch twin, because it is not compiled",
    ]


def test_table_of_layers_has_halves_apart() -> None:
    made = fake()
    made.cases[HALF.id] = HALF
    made.measurements.append(measured(UNSOUND, HALF, "y", 4.0))
    header, _, *rows = page.layers(made).splitlines()
    assert header.startswith("| layer |  | 32, 64 bit: cases | 32, 64 bit: median |")
    assert rows == [
        "| two-pass float32 | sound | 2 | 0.38 | 0.5 | 0 | 0 |  |  | 0 |",
        "| one-pass variance | unsound | 2 | ∞ | ∞ | 1 | 1 | 4 | 4 | 1 |",
    ]


def test_gap() -> None:
    made = fake()
    made.cases[HALF.id] = HALF
    made.measurements.append(measured(SOUND, HALF, "y", 0.75))
    assert page.gap(made).splitlines() == [
        "- sound layers, float32 and float64: at most **0.5**",
        "- sound layers, float16 and bfloat16: at most **0.75**",
        "- the threshold: **3**",
        "- unsound layers, where their fault must show: at least **∞** "
        "(one-pass variance; mean/std 10000)",
    ]


def test_table_of_families() -> None:
    assert page.families(fake()).splitlines() == [
        "| data | cases | sound | which | one-pass variance |",
        "| --- | --: | --: | --- | --: |",
        "| mean/std 1 to 10 | 1 | 0.25 | two-pass float32 | 0.3 |",
        "| mean/std 10000 | 1 | 0.5 | two-pass float32 | **∞** † |",
    ]


def test_table_of_cann_counts_what_is_rejected_and_what_is_missed() -> None:
    lines = page.cann(fake()).splitlines()
    assert lines[:6] == [
        "`y`:",
        "",
        "| layer |  | cases | ratio over 3 | MERE/MARE | mixed | RMS ratio |",
        "| --- | --- | --: | --: | --: | --: | --: |",
        "| two-pass float32 | sound | 2 | 0 | 1 | 0 | 0 |",
        "| one-pass variance | unsound | 2 | 1 | 1 | 0 (misses 1) | 1 |",
    ]
    assert lines[-1] == "| one-pass variance | unsound | 1 | 1 | 1 | 1 | 1 |"


@pytest.fixture
def few_families(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the families that fake() has cases of."""
    few = {name: families.FAMILIES[name] for name in ("mean/std 1 to 10", "mean/std 10000")}
    monkeypatch.setattr(page, "FAMILIES", few)


@pytest.mark.usefixtures("few_families")
def test_nothing_is_wrong_if_the_unsound_layer_is_over_the_threshold() -> None:
    assert page.wrong(fake()) == []


@pytest.mark.usefixtures("few_families")
def test_each_wrong_result_has_a_line() -> None:
    made = fake()
    made.measurements = [measured(SOUND, NEAR, "y", 3.5), measured(UNSOUND, FAR, "y", 2.5)]
    made.not_run[SOUND.name] = {"no bfloat16": 3, "it hung": 2}
    assert page.wrong(made) == [
        "two-pass float32 is sound, but in 2 cases it hung",
        "two-pass float32 is sound, but 3.5 in mean/std 1 to 10",
        "one-pass variance is unsound, but 2.5 in mean/std 10000",
    ]


@pytest.mark.usefixtures("few_families")
def test_a_family_without_a_case_for_a_fault_that_it_must_show_is_wrong() -> None:
    made = fake()
    made.measurements = [at for at in made.measurements if at.case == NEAR.id]
    del made.cases[FAR.id]
    assert page.wrong(made) == ["one-pass variance has no case of mean/std 10000"]


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("profile", ["certify", "full"])
def test_every_case_has_a_family_and_every_family_a_case(ranks: int, profile: str) -> None:
    cases = filter(collect.is_about_rounding, catalogue(ranks, profile))
    assert {family_of(case) for case in (*cases, *collect.offset_cases(ranks))} == set(
        families.FAMILIES
    )


def test_tables_replace_what_was_in_their_places(tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    document.write_text(PAGE)
    page.write(fake(), document)
    text = document.read_text()
    assert text.startswith("Text.\n")
    assert "stale" not in text
    assert f"<!-- made: layers -->\n{page.layers(fake())}\n<!-- end -->" in text
    page.write(fake(), document)
    assert document.read_text() == text


@pytest.mark.parametrize("text", ["", PAGE.replace("layers", "other"), PAGE + PAGE])
def test_a_page_must_have_a_place_for_each_table(tmp_path: Path, text: str) -> None:
    document = tmp_path / "page.md"
    document.write_text(text)
    with pytest.raises(PageError, match=r"page\.md must have one place for each of"):
        page.write(fake(), document)


def test_numbers_are_json() -> None:
    document = json.loads(json.dumps(run.numbers(fake()), allow_nan=False))
    assert document["measurements"][-1]["ratio"] == "inf"
    assert document["layers"][1]["mutant"] == "OnePassVariance"


def test_the_command_runs_measures_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    by_name = {layer.name: layer for layer in collect.LAYERS}
    framework = replace(FRAMEWORKS["torch"], name="lacking")
    monkeypatch.setitem(FRAMEWORKS, "lacking", framework)
    lacking = replace(by_name["torch composed"], target=replace(TARGET, framework="lacking"))
    chosen = (by_name[SOUND.name], by_name[UNSOUND.name], lacking)
    monkeypatch.setattr(collect, "LAYERS", chosen)
    document, out = tmp_path / "page.md", tmp_path / "study.json"
    document.write_text(PAGE)
    arguments = ["study", "--ranks", "2", "--profile", "smoke", "--out", str(out)]
    # A profile that small has no case of some families in which a fault must show.
    assert main([*arguments, "--document", str(document)]) == 1
    lines = capsys.readouterr().out.splitlines()
    wrong = [line for line in lines if line.startswith(UNSOUND.name)]
    assert wrong
    assert all(line.startswith("one-pass variance has no case of") for line in wrong)
    text = document.read_text()
    assert "- left out: torch composed, because lacking is not installed" in text
    assert "| two-pass float32 | sound |" in text
    numbers = json.loads(out.read_text())
    ratios: dict[str, list[float]] = {SOUND.name: [], UNSOUND.name: []}
    for at in numbers["measurements"]:
        ratios[at["layer"]].append(float(at["ratio"]))
        assert at["layer"] != SOUND.name or at["rms"] == 1.0
    assert 0 < max(ratios[SOUND.name]) < 1
    assert max(ratios[UNSOUND.name]) > 1000
