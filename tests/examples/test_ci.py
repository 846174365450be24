"""The templates for CI, run step by step in a repository of somebody else, without a network."""

from __future__ import annotations

import json
import os
import shlex
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from tests.test_imports import ROOT

TEMPLATES = ROOT / "examples" / "ci"
# A small run, so that the test is quick.
SETTINGS = {"TARGET": "torch:my_module:MySyncBatchNorm", "RANKS": "1", "PROFILE": "smoke"}
RIGHT = "from syncbn.torch import SyncBatchNorm\n\n\nclass MySyncBatchNorm(SyncBatchNorm):\n    "
WRONG = RIGHT + (
    "def forward(self, x):\n        y = super().forward(x)\n"
    "        return y * 1.001 if self.training else y\n"
)
RIGHT += "pass\n"


def template(name: str) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((TEMPLATES / name).read_text())
    return document


def github() -> tuple[dict[str, str], list[str]]:
    """The variables and the scripts of the GitHub workflow."""
    document = template("github.yml")
    assert set(document) == {"name", True, "env", "jobs"}  # YAML 1.1 reads `on` as true
    steps = document["jobs"]["conformance"]["steps"]
    assert all(("run" in step) != ("uses" in step) for step in steps)
    return document["env"], [step["run"] for step in steps if "run" in step]


def gitlab() -> tuple[dict[str, str], list[str]]:
    job = template("gitlab.yml")["conformance"]
    assert job["artifacts"]["reports"]["codequality"] == "gl-code-quality-report.json"
    return job["variables"], [*job["before_script"], *job["script"]]


class Repository:
    """A repository with a layer, and machines of CI that have the suite installed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        programs = folder.parent / "programs"
        programs.mkdir()
        # `pip install` has nothing to fetch here: the suite is that of this checkout.
        run = f'exec {shlex.quote(sys.executable)} -m syncbn.conformance "$@"'
        pip = f'test "$1 $2 $3" = "-m pip install" && echo "$@" > {folder.parent}/installed'
        for name, command in (("syncbn-conformance", run), ("python", pip)):
            (programs / name).write_text(f"#!/bin/sh\n{command}\n")
            (programs / name).chmod(0o755 | stat.S_IXUSR)
        self.environment = os.environ | {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "GITHUB_STEP_SUMMARY": str(folder.parent / "summary.md"),
        }

    def steps(self, variables: dict[str, str], scripts: list[str]) -> tuple[int, str]:
        """Run scripts until one fails, as CI does: its exit status, and what was printed."""
        printed = ""
        for script in scripts:
            done = subprocess.run(
                ["bash", "-e", "-o", "pipefail", "-c", script],
                cwd=self.folder,
                env=self.environment | variables,
                capture_output=True,
                text=True,
            )
            printed += done.stdout + done.stderr
            if done.returncode:
                return done.returncode, printed
        return 0, printed


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    folder = tmp_path_factory.mktemp("ci") / "repository"
    folder.mkdir()
    made = Repository(folder)
    (folder / "my_module.py").write_text(RIGHT)
    run = 'syncbn-conformance run --target "$TARGET" --ranks $RANKS --profile $PROFILE'
    run += " --oracle none --out conformance"
    write = "syncbn-conformance baseline conformance --out conformance-baseline.json"
    status, printed = made.steps(SETTINGS, [run, write])
    assert status == 0, printed
    return made


def test_the_github_workflow_is_green_and_shows_a_page(repository: Repository) -> None:
    variables, scripts = github()
    assert len(variables) == 5
    (repository.folder / "my_module.py").write_text(RIGHT)
    status, printed = repository.steps(variables | SETTINGS, scripts)
    assert status == 0, printed
    assert "gate: pass, no change of torch:my_module:MySyncBatchNorm" in printed
    installed = (repository.folder.parent / "installed").read_text()
    assert installed == "-m pip install syncbn[torch,conformance] .\n"
    assert (repository.folder / "conformance" / "page.html").is_file()


@pytest.mark.parametrize("read", [github, gitlab])
def test_a_wrong_layer_is_red(read: Any, repository: Repository) -> None:
    variables, scripts = read()
    (repository.folder / "my_module.py").write_text(WRONG)
    status, printed = repository.steps(variables | SETTINGS, scripts)
    assert status == 1, printed
    assert "gate: FAIL, changes in FWD-1" in printed
    junit = ElementTree.parse(repository.folder / "conformance-junit.xml").getroot()
    assert int(junit.get("failures", "")) > 0
    if read is github:
        assert "::error file=conformance-baseline.json,line=" in printed
        assert "**FWD-1**" in (repository.folder.parent / "summary.md").read_text()
    else:
        issues = json.loads((repository.folder / "gl-code-quality-report.json").read_text())
        assert issues[0]["check_name"] == "syncbn-conformance gate FWD-1"
