"""A certification that was interrupted goes on: whole runs stay, and nothing else of it does."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from syncbn import reports
from syncbn.conformance import __main__ as command_line
from syncbn.conformance import targets
from syncbn.conformance.__main__ import main
from syncbn.conformance.certification import contents, raw
from syncbn.conformance.certification import make as maker_module
from syncbn.conformance.certification.environment import environment
from syncbn.conformance.certification.kept import CertificationError
from syncbn.conformance.certification.make import Maker
from syncbn.conformance.certification.verify import verify
from tests.conformance.certification.packages import PLAN, PRODUCT, load

COMMAND = ["syncbn-conformance", "certify"]


def maker(
    folder: Path,
    *,
    target: str = "syncbn.torch",
    product: dict[str, Any] = PRODUCT,
    level: str = "decided",
    command: list[str] = COMMAND,
    resume: bool = True,
) -> Maker:
    return Maker(
        targets.parse(target),
        product,
        folder,
        level=level,
        launcher="local",
        command=command,
        plan=PLAN,
        resume=resume,
    )


@pytest.fixture
def interrupted(passed: Path, tmp_path: Path) -> Path:
    """A certification that ended after its runs and before its certificate."""
    folder = tmp_path / "package"
    shutil.copytree(passed, folder)
    (folder / contents.CERTIFICATE).unlink()
    return folder


def left(folder: Path) -> list[int]:
    with maker(folder) as one:
        return one.left


def lines(folder: Path, change: Callable[[list[str]], object]) -> None:
    found = (folder / contents.LOG).read_text().splitlines(keepends=True)
    change(found)
    (folder / contents.LOG).write_text("".join(found))


def ran(found: list[str], ranks: int) -> int:
    return next(
        number
        for number, line in enumerate(found)
        if (one := json.loads(line))["event"] == "ran" and one["ranks"] == ranks
    )


def test_a_certification_that_is_interrupted_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command_line, "Maker", functools.partial(Maker, plan=PLAN))
    (tmp_path / "product.json").write_text(json.dumps(PRODUCT))
    folder = tmp_path / "package"
    command = ["certify", "--product", str(tmp_path / "product.json"), "--out", str(folder)]
    add, added = raw.RawWriter.add, []

    def interrupt(writer: Any, case: Any, *rest: Any) -> None:
        add(writer, case, *rest)
        added.append(case.ranks)
        if added.count(2) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(raw.RawWriter, "add", interrupt)
        assert main(command) == 130
    assert capsys.readouterr().err.endswith("interrupted; the same command with --resume goes on\n")
    assert not (folder / contents.CERTIFICATE).exists()
    before = {path: path.read_bytes() for path in (folder / "runs/1").iterdir()}
    begun = (folder / contents.LOG).read_text().splitlines()[0]

    assert main([*command, "--resume"]) == 0
    shown = capsys.readouterr().out
    assert "2 ranks" in shown
    assert shown.splitlines()[-2].startswith("PASSED at level decided: syncbn.torch")
    assert {path: path.read_bytes() for path in (folder / "runs/1").iterdir()} == before
    assert (folder / contents.LOG).read_text().splitlines()[0] == begun
    assert load(folder, contents.ENVIRONMENT)["command"] == ["syncbn-conformance", *command]
    assert verify(folder, plan=PLAN).refused == []
    assert main([*command, "--resume"]) == 2
    assert "is complete: there is nothing to resume" in capsys.readouterr().err


def test_only_the_certificate_is_left(interrupted: Path, passed: Path) -> None:
    with maker(interrupted) as one:
        assert one.left == []
        assert one.finish() == "PASSED"
    for name in (contents.CERTIFICATE, contents.LOG):
        assert (interrupted / name).read_bytes() == (passed / name).read_bytes()


def cut(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-5])


def without_line(ranks: int) -> Callable[[Path], object]:
    return lambda folder: lines(folder, lambda all: all.pop(ran(all, ranks)))


def other_verdict(found: list[str]) -> None:
    found[3] = found[3].replace('"pass"', '"fail"')


NOT_WHOLE: dict[str, tuple[Callable[[Path], object], list[int]]] = {
    "raw results that are cut": (cut("runs/2/raw.bin"), [2]),
    "raw results of an earlier run": (cut("runs/1/raw.bin"), [1, 2]),
    "raw results of another run": (
        lambda folder: shutil.copy(folder / "runs/1/raw.bin", folder / "runs/2/raw.bin"),
        [2],
    ),
    "a report that is missing": (lambda folder: (folder / "runs/2/report.json").unlink(), [2]),
    "a report that is cut": (cut("runs/2/report.json"), [2]),
    "a JUnit file that is cut": (cut("runs/2/junit.xml"), [2]),
    "no folder of a run": (lambda folder: shutil.rmtree(folder / "runs/2"), [2]),
    "the report of another run": (
        lambda folder: shutil.copy(folder / "runs/1/report.json", folder / "runs/2/report.json"),
        [2],
    ),
    "a log without the end of a run": (without_line(2), [2]),
    "a log without the end of the first run": (without_line(1), [1, 2]),
    "a log with another verdict": (lambda folder: lines(folder, other_verdict), [1, 2]),
    "a log whose last line is cut": (cut(contents.LOG), []),
    "a log of the beginning alone": (
        lambda folder: lines(folder, lambda all: all.__delitem__(slice(1, None))),
        [1, 2],
    ),
}


@pytest.mark.parametrize("name", NOT_WHOLE)
def test_a_run_that_is_not_whole_is_made_again(name: str, interrupted: Path) -> None:
    change, wanted = NOT_WHOLE[name]
    change(interrupted)
    assert left(interrupted) == wanted
    for ranks in PLAN.ranks:
        assert (interrupted / contents.name_of(ranks, "")).exists() == (ranks not in wanted)
    assert left(interrupted) == wanted  # also when it is interrupted again before it begins
    for line in (interrupted / contents.LOG).read_text().splitlines()[1:]:
        assert json.loads(line)["ranks"] not in wanted


def test_a_run_without_a_verdict_is_made_again(
    interrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = reports.load

    def error(path: Path) -> Any:
        report = read(path)
        report["summary"]["verdict"] = "error"
        return report

    monkeypatch.setattr(reports, "load", error)
    assert left(interrupted) == [1, 2]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"target": "torch:tests/conformance/planted.py:LocalCount"}, "target.name"),
        ({"level": "documented"}, "level"),
        ({"product": PRODUCT | {"version": "1.3"}}, "product.version"),
        (
            {"command": [*COMMAND, "--launcher", "torchrun"]},
            "command, which was syncbn-conformance certify",
        ),
    ],
)
def test_another_certification_is_refused_by_name(
    options: dict[str, Any], named: str, interrupted: Path
) -> None:
    before = {path: path.read_bytes() for path in interrupted.rglob("*") if path.is_file()}
    with (
        pytest.raises(CertificationError, match=f"these are not as they were: .*{named}"),
        maker(interrupted, **options),
    ):
        pass
    assert {path: path.read_bytes() for path in interrupted.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("place", "named"),
    [
        ("suite.files.conformance/verdict.py", r"here\.suite\.files\.conformance/verdict\.py"),
        ("suite.commit", r"here\.suite\.commit"),
        ("packages.torch", r"here\.packages\.torch"),
        ("host", r"here\.host"),
    ],
)
def test_another_suite_or_machine_is_refused_by_name(
    place: str, named: str, interrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = json.loads(json.dumps(environment()))
    inner, names = here, place.split(".", 2)
    for name in names[:-1]:
        inner = inner[name]
    inner[names[-1]] = "other"
    monkeypatch.setattr(maker_module, "environment", lambda: here)
    with pytest.raises(CertificationError, match=named), maker(interrupted):
        pass


def test_the_layer_must_not_change_between_the_runs(interrupted: Path) -> None:
    """The files of the layer of the runs that stay are compared with those of the others."""
    (interrupted / "runs/2/report.json").unlink()
    with maker(interrupted) as one:
        (name,) = [name for name in one._sources["files"] if name.endswith("torch/layer.py")]
        with pytest.raises(CertificationError, match=f"changed during the runs: {name}"):
            one._keep_sources({"files": {name: "0" * 64}, "distributions": {}})


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "there is no certification to resume in"),
        (b"", "it has no beginning"),
        (b'{"event": "beg', "it has no beginning"),
        (b"{}\n", "it has no beginning"),
        (b'{"product": {}, "environment": {"started": "", "command": [1]}}\n', "no beginning"),
        (b"{\n", "cannot resume the certification in"),
        (b"[]\n", "line 1 is no object"),
        (b"\xff\n", "cannot resume the certification in"),
    ],
)
def test_what_cannot_be_resumed(content: bytes | None, reason: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / contents.LOG).write_bytes(content)
    with pytest.raises(CertificationError, match=reason), maker(tmp_path):
        pass
    with pytest.raises(CertificationError, match="no certification"), maker(tmp_path / "missing"):
        pass
    assert not (tmp_path / "missing").exists()


def test_two_do_not_write_to_one_folder(tmp_path: Path) -> None:
    with (
        maker(tmp_path, resume=False),
        pytest.raises(CertificationError, match="another certification writes to"),
        maker(tmp_path),
    ):
        pass
