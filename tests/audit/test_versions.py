"""The command that judges the layer on the oldest and the newest torch."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from audit import versions

ROOT = Path(__file__).parents[2]
JUNIT = '<testsuites><testsuite tests="9" failures="{}" errors="0" skipped="2"/></testsuites>'


class Runs:
    """In the place of `versions._run`: writes what the real programs would have written."""

    def __init__(self, failures: int = 0, certified: bool = True, installed: bool = True) -> None:
        self.failures, self.certified, self.installed = failures, certified, installed
        self.commands: list[tuple[str, ...]] = []

    def __call__(self, python: Path, *module: str) -> bool:
        self.commands.append(module)
        if module[0] == "venv":
            Path(module[-1]).mkdir(parents=True)
            return True
        if module[0] == "pip":
            return self.installed
        if module[0] == "pytest":
            (junit,) = (part for part in module if part.startswith("--junit-xml="))
            Path(junit.partition("=")[2]).write_text(JUNIT.format(self.failures))
            return not self.failures
        out = Path(module[module.index("--out") + 1])
        out.mkdir(exist_ok=True)
        report = {
            "environment": {"torch": "2.7.1+cpu", "python": "3.11.7", "numpy": "1.26.4"},
            "summary": {"required": {"fail": 0 if self.certified else 1, "pass": 44}},
        }
        (out / "report.json").write_text(json.dumps(report))
        return self.certified


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "versions.md"
    path.write_text((ROOT / "docs/versions.md").read_text())
    return path


def run(runs: Runs, page: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(versions, "_run", runs)
    return versions.main(page.parent / "envs", 4, page, Console(file=sys.stderr))


def test_each_version_is_installed_once_and_judged(
    page: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = Runs()
    assert run(runs, page, monkeypatch) == 0
    expected = ["venv", "pip", "syncbn.conformance", "pytest"] * len(versions.VERSIONS)
    assert [command[0] for command in runs.commands] == expected
    assert page.read_text().count("| 2.7.1+cpu | 3.11.7 | 1.26.4 | 44 pass required clauses |") == 2
    assert page.read_text().count("| 7 pass, 2 skip |") == 2
    assert run(runs, page, monkeypatch) == 0
    assert sum(command[0] == "pip" for command in runs.commands) == 2


@pytest.mark.parametrize("broken", [{"failures": 1}, {"certified": False}])
def test_a_failure_is_shown_and_is_the_status(
    broken: dict[str, Any], page: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(Runs(**broken), page, monkeypatch) == 1
    assert "1 fail" in page.read_text()


def test_what_cannot_be_installed(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        versions.InstallError, match=r"torch 2\.7\.1 must be installable in .*2\.7\.1"
    ):
        run(Runs(installed=False), page, monkeypatch)
    assert not list(page.parent.glob("envs/*/.ready"))


def test_the_versions_are_those_of_the_project() -> None:
    bounds = set(re.findall(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text()))
    (pinned,) = re.findall(
        r"^torch==([\d.]+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE
    )
    assert (*bounds, pinned) == versions.VERSIONS
    assert all((ROOT / test).is_file() for test in versions.TESTS)
