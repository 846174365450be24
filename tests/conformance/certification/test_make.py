"""Making a package: what it holds, and what stops it."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import syncbn
from syncbn.conformance import __main__ as command_line
from syncbn.conformance import targets
from syncbn.conformance.__main__ import main
from syncbn.conformance.case import Case, Step
from syncbn.conformance.certification import contents, make, product, raw
from syncbn.conformance.certification.environment import suite_files
from syncbn.conformance.certification.kept import CertificationError
from syncbn.conformance.certification.make import Maker
from syncbn.conformance.expected import expect
from syncbn.conformance.pool import Outcome
from syncbn.conformance.wire import Message
from tests.conformance.certification.packages import PLAN, PRODUCT, load


def maker(folder: Path, target: str = "syncbn.torch", device: str = "cpu") -> Maker:
    options: dict[str, Any] = {"level": "decided", "launcher": "local", "command": ["x"]}
    return Maker(targets.parse(target, device), PRODUCT, folder, plan=PLAN, **options)


def test_what_a_package_holds(passed: Path) -> None:
    certificate = load(passed, contents.CERTIFICATE)
    assert certificate["_type"] == "https://in-toto.io/Statement/v1"
    assert certificate["predicate"]["result"] == "PASSED"
    assert "STAT-2 on 2 ranks" in certificate["predicate"]["passedTests"]
    bound = {one["name"]: one["digest"]["sha256"] for one in certificate["subject"]}
    files = {path for path in passed.rglob("*") if path.is_file()}
    assert {passed / name for name in bound} == files - {passed / contents.CERTIFICATE}
    for name, digest in bound.items():
        assert hashlib.sha256((passed / name).read_bytes()).hexdigest() == digest
    environment = load(passed, contents.ENVIRONMENT)
    layer = Path(syncbn.__file__).parent / "torch/layer.py"
    kept = environment["sources"]["files"]["syncbn/torch/layer.py"]
    assert kept == hashlib.sha256(layer.read_bytes()).hexdigest()
    assert environment["here"]["packages"]["torch"]
    assert environment["here"]["suite"]["files"] == suite_files()
    assert "made to deceive it" in (passed / contents.TEXT).read_text()


def test_where_a_layer_failed(failed: Path) -> None:
    certificate = load(failed, contents.CERTIFICATE)
    assert certificate["predicate"]["result"] == "FAILED"
    assert "STAT-2 on 2 ranks" in certificate["predicate"]["failedTests"]
    text = (failed / contents.TEXT).read_text()
    assert "**FAILED at level decided" in text
    assert "On 2 ranks: the verdict of the run is fail" in text
    assert "times the bound" in text
    environment = load(failed, contents.ENVIRONMENT)
    assert "planted.py" in environment["sources"]["files"]


def test_the_text_names_what_does_not_count(failed: Path) -> None:
    given = load(failed, contents.name_of(2, contents.REPORT))
    for clause in given["clauses"]:
        clause["required"] = clause["id"] == "FWD-1"
    environment = load(failed, contents.ENVIRONMENT)
    text = contents.text(PRODUCT, environment, {2: given}, "FAILED", PLAN)
    (line,) = [line for line in text.splitlines() if "do not count" in line]
    assert line.startswith("On 2 ranks, clauses that do not count: ")
    assert "STAT\\-2 fail" in line
    (row,) = [line for line in text.splitlines() if line.startswith("| 2 |")]
    assert float(row.split("|")[-2]) < 3  # that of FWD-1, not that of STAT-2


def test_the_folder_must_be_empty(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CertificationError, match="must be empty"), maker(tmp_path):
        pass
    with (
        pytest.raises(CertificationError, match="cannot write a package to"),
        maker(tmp_path / "file"),
    ):
        pass


def test_an_accelerator_must_be_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make, "environment", lambda: {"accelerator": {}})
    with pytest.raises(CertificationError, match="a certificate for npu needs npu-smi"):
        maker(tmp_path, device="npu")


def test_what_changes_during_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = iter([{"suite": {"files": {"a": "1"}}}, {"suite": {"files": {"a": "2"}}}])
    monkeypatch.setattr(make, "environment", lambda: next(states))
    with maker(tmp_path) as one:
        one._keep_sources({"files": {"b": "1"}, "distributions": {}})
        with pytest.raises(CertificationError, match="changed during the runs: b"):
            one._keep_sources({"files": {"b": "2"}, "distributions": {}})
        with pytest.raises(CertificationError, match=r"changed during the runs: suite.files.a"):
            one.finish()
    assert not (tmp_path / contents.CERTIFICATE).exists()


def test_the_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a plan of few cases in the place of the real one, on two nodes that are this machine."""
    for name in ("Maker", "verify"):
        few = functools.partial(getattr(command_line, name), plan=PLAN)
        monkeypatch.setattr(command_line, name, few)
    (tmp_path / "product.json").write_text(json.dumps(PRODUCT))
    where = ["--product", str(tmp_path / "product.json"), "--out", str(tmp_path / "package")]
    layer = "torch:tests/conformance/planted.py:LocalCount"
    target = ["--target", layer, "--launcher", "torchrun"]
    target += ["--nodes", "2", "--hosts", "127.0.0.1,127.0.0.1"]
    assert main(["certify", *target, *where]) == 1
    *_, title, last = capsys.readouterr().out.splitlines()
    assert title.startswith(
        "FAILED at level decided: torch:tests/conformance/planted.py:LocalCount"
    )
    assert last == f"package: {tmp_path / 'package'}"
    log = (tmp_path / "package" / contents.LOG).read_text().splitlines()
    runs = [line for line in map(json.loads, log) if line["event"] == "run"]
    assert [(run["ranks"], run["launcher"]) for run in runs] == [(1, "torchrun"), (2, "torchrun")]
    assert main(["verify", str(tmp_path / "package")]) == 3
    assert capsys.readouterr().out.splitlines()[-1] == f"verified: {title}"
    assert main(["certify", *target, *where]) == 2  # the folder is not empty


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "is not JSON"),
        ("[]", "is not of type 'object'"),
        ('{"name": "a"}', "is a required property"),
        (json.dumps(PRODUCT | {"name": ""}), "name: "),
        (json.dumps(PRODUCT | {"name": "a\x1b[2J"}), "name: "),
        (json.dumps(PRODUCT | {"name": 1}), "name: 1 is not of type 'string'"),
        (json.dumps(PRODUCT | {"price": "1"}), "price"),
        (" " * 100_001, "at most 100000 bytes"),
    ],
)
def test_a_bad_product(
    text: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "product.json"
    path.write_text(text)
    with pytest.raises(product.ProductError, match=reason.replace("[", r"\[")):
        product.load(path)
    assert main(["certify", "--product", str(path), "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("syncbn-conformance: product ")
    assert not (tmp_path / "out").exists()


CASE = Case(
    "NUM-1", "large", 2, {"num_features": 3}, (Step(((2, 3, 70, 71),) * 2),), ("y", "grad_input")
)


def answers(change: Any = None) -> Outcome:
    """What a right layer answers, rounded to float32."""
    messages = []
    for steps in expect(CASE):
        assert steps[0] is not None
        values = {name: steps[0].values[name] for name in CASE.checks}
        arrays = {f"0/{n}": v.value.astype(np.float32) for n, v in values.items() if v}
        messages.append(Message({"steps": [{}], "epoch": 7}, arrays))
    if change:
        change(messages)
    return Outcome(list(messages), changed=["rank 0: the default dtype"])


def read_again(outcome: Outcome, path: Path) -> Outcome:
    with raw.RawWriter(path) as writer:
        writer.add(CASE, outcome, lambda: expect(CASE))
    with path.open("rb") as file:
        (record,) = raw.read(file)
    assert record.sha256 == writer.digests[CASE.id]
    return record.outcome(CASE, lambda: expect(CASE))


def test_raw_results_of_a_large_array(tmp_path: Path) -> None:
    outcome = answers()
    again = read_again(outcome, tmp_path / "raw")
    assert again.changed == outcome.changed
    for one, other in zip(outcome.answers, again.answers, strict=True):
        assert one is not None
        assert other is not None
        assert other.content == {"steps": [{}]}
        for name, values in one.arrays.items():
            whole = other.arrays[name]
            assert whole.shape == values.shape
            np.testing.assert_allclose(whole, values, rtol=1e-6)
            digest = hashlib.sha256(values.tobytes()).hexdigest()
            places = raw.places(digest, values.size)
            assert len(places) == raw.SAMPLE
            assert len(np.unique(places)) > raw.SAMPLE * 0.9
            assert np.array_equal(whole.reshape(-1)[places], values.reshape(-1)[places])
    assert (tmp_path / "raw").stat().st_size < 40_000  # 4 arrays of 119 kB


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e6])
def test_the_worst_value_of_a_large_array_is_kept(bad: float, tmp_path: Path) -> None:
    def spoil(messages: list[Message]) -> None:
        messages[1].arrays["0/y"] = messages[1].arrays["0/y"].copy()
        messages[1].arrays["0/y"][1, 2, 33, 44] = bad

    again = read_again(answers(spoil), tmp_path / "raw")
    assert again.answers[1] is not None
    got = again.answers[1].arrays["0/y"][1, 2, 33, 44]
    assert got == bad or (np.isnan(bad) and np.isnan(got))


def test_crashes_and_hangs_are_kept(tmp_path: Path) -> None:
    outcome = Outcome([None, None], crashed=[1], hung=[0], details="rank 1 died", error="e")
    assert read_again(outcome, tmp_path / "raw") == outcome
