"""The wheel, installed away from the checkout: what it holds, what it needs, and that it judges.

It is built from a copy of the tree, and installed into environments whose other packages are links
to those of this one: nothing is downloaded. The steps of the templates for CI run in the repository
of somebody else, with a pip that finds the wheel.
"""

from __future__ import annotations

import configparser
import json
import os
import re
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

import syncbn
from syncbn.conformance.cases import catalogue
from syncbn.conformance.certification.environment import suite_files
from tests.installed import Environment, Venv, build, python
from tests.test_imports import MODULES, ROOT, UNSHIPPED

TEMPLATES = ROOT / "examples" / "ci"
RIGHT = "from syncbn.torch import SyncBatchNorm\n\n\nclass MySyncBatchNorm(SyncBatchNorm):\n    "
WRONG = RIGHT + (
    "def forward(self, x):\n        y = super().forward(x)\n"
    "        return y * 1.001 if self.training else y\n"
)
RIGHT += "pass\n"
PROJECT = """\
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "my_layer"
version = "1.0"
dependencies = ["syncbn[torch]"]

[tool.setuptools]
py-modules = ["my_module"]
"""
RUN = ("run", "--profile", "smoke", "--target", "syncbn.torch", "--ranks", "2", "--oracle", "none")


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


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout without what was built in it."""
    copy = tmp_path_factory.mktemp("wheel") / "tree"
    built = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "out")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=built)
    return copy


@pytest.fixture(scope="module")
def wheel(tree: Path) -> Path:
    return build(tree, tree.parent / "from_tree")


def files(folder: Path) -> list[str]:
    """The files below a folder, without compiled Python."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir())
    return sorted(str(path) for path in paths if path.suffix != ".pyc")


@pytest.fixture(scope="module")
def bare(wheel: Path) -> Environment:
    return Environment(wheel.parent / "bare", wheel, [])


@pytest.fixture(scope="module")
def without_torch(wheel: Path) -> Environment:
    return Environment(wheel.parent / "judge", wheel, ["numpy", "rich", "jsonschema"])


@pytest.fixture(scope="module")
def complete(wheel: Path) -> Environment:
    """All that is needed, below the git repository of a project that uses syncbn."""
    project = wheel.parent / "project"
    commit = ("-c", "user.name=user", "-c", "user.email=user@host", "commit", "--allow-empty")
    for arguments in (("init", project), ("-C", project, *commit, "-m", "of another project")):
        subprocess.run(["git", *arguments], check=True, capture_output=True)
    return Environment(project / "all", wheel, ["numpy", "rich", "jsonschema", "torch"])


def test_it_holds_the_shipped_packages_and_their_data(wheel: Path) -> None:
    modules = [path for name, path in MODULES.items() if name.split(".")[0] not in UNSHIPPED]
    data = [ROOT / "syncbn" / "py.typed", *ROOT.glob("conformance/profiles/*.txt")]
    data += [*ROOT.glob("conformance/regressions/*.json"), *ROOT.glob("reports/schema/*.json")]
    data += [*ROOT.glob("conformance/schema/*.json"), ROOT / "reports" / "page.css"]
    expected = {str(path.relative_to(ROOT)) for path in [*modules, *data]}
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == {name if name.startswith("syncbn/") else f"syncbn/{name}" for name in expected}


def test_pytest_finds_the_plugin(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith("/entry_points.txt"))
    points = configparser.ConfigParser()
    points.read_string(archive.read(name).decode())
    plugin = "syncbn.conformance.plugin"
    assert dict(points["pytest11"]) == {plugin: plugin}


def test_its_description_has_no_relative_link(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
    description = archive.read(name).decode()
    links = re.findall(r"\]\(([^)]*)\)", description)
    assert links
    assert all(link.startswith(("https://", "#")) for link in links)
    for label in ("Repository", "Documentation", "Changelog", "Issues"):
        assert f"Project-URL: {label}, https://" in description


def test_an_sdist_builds_the_same_wheel(tree: Path, wheel: Path) -> None:
    folder = wheel.parent.parent / "sdist"
    code = f"from setuptools.build_meta import build_sdist; build_sdist({str(folder)!r})"
    python("-c", code, at=tree)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    again = build(folder / archive.name.removesuffix(".tar.gz"), folder / "wheel")

    def contents(path: Path) -> dict[str, bytes]:
        archive = zipfile.ZipFile(path)
        return {name: archive.read(name) for name in archive.namelist()}

    assert contents(again) == contents(wheel)


class TestWithoutExtras:
    def test_import_syncbn(self, bare: Environment, tmp_path: Path) -> None:
        done = bare.run("-c", "import syncbn; print(syncbn.__version__)", at=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")

    @pytest.mark.parametrize(
        ("module", "text"),
        [
            (
                "torch",
                "syncbn.torch needs torch, which is not installed: pip install 'syncbn[torch]'",
            ),
            (
                "mindspore",
                "needs mindspore, which is not installed: pip install 'syncbn[mindspore]'",
            ),
            (
                "kernels",
                "syncbn.kernels needs torch, which is not installed: pip install 'syncbn[torch]'",
            ),
            ("reference", "needs numpy, which is not installed: pip install 'syncbn[conformance]'"),
            (
                "reports",
                "rich, jsonschema, which are not installed: pip install 'syncbn[conformance]'",
            ),
        ],
    )
    def test_a_part_names_its_extra(
        self, bare: Environment, tmp_path: Path, module: str, text: str
    ) -> None:
        done = bare.run("-c", f"import syncbn.{module}", at=tmp_path)
        assert done.returncode == 1
        last = done.stderr.splitlines()[-1]
        assert last.startswith("ModuleNotFoundError: ")
        assert last.endswith(text)

    def test_the_command_names_its_extra(self, bare: Environment, tmp_path: Path) -> None:
        text = "syncbn-conformance needs numpy, rich, jsonschema, which are not installed: "
        text += "pip install 'syncbn[conformance]'\n"
        for done in (
            bare.command(*RUN, at=tmp_path),
            bare.run("-m", "syncbn.conformance", *RUN, at=tmp_path),
        ):
            assert (done.returncode, done.stdout, done.stderr) == (2, "", text)
        assert files(tmp_path) == []


def test_it_has_the_suite_of_the_checkout(without_torch: Environment, tmp_path: Path) -> None:
    """So a package that one of them made is verified by the other."""
    code = (
        "import json; from syncbn.conformance.certification.environment import suite_files;"
        "print(json.dumps(suite_files()))"
    )
    done = without_torch.run("-c", code, at=tmp_path)
    assert json.loads(done.stdout) == suite_files()


def test_a_target_without_its_framework(without_torch: Environment, tmp_path: Path) -> None:
    done = without_torch.command(*RUN, at=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert "needs torch, which is not installed: pip install 'syncbn[torch]'" in last
    assert files(tmp_path) == []


def test_freeze_changes_no_installed_suite(without_torch: Environment, tmp_path: Path) -> None:
    before = files(without_torch.site)
    done = without_torch.command("freeze", at=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("syncbn-conformance: freeze needs a checkout")
    assert files(without_torch.site) == before


@pytest.fixture(params=["an empty folder", "a folder with packages called reference and reports"])
def workplace(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if "packages" in request.param:
        for name in ("reference", "reports"):
            (tmp_path / name).mkdir()
            text = f"raise RuntimeError('the {name} of somebody else was imported')\n"
            (tmp_path / name / "__init__.py").write_text(text)
    return tmp_path


def test_it_judges(complete: Environment, workplace: Path) -> None:
    """The same cases as in the checkout; only the report is written."""
    before = files(workplace), files(complete.site)
    done = complete.command(*RUN, at=workplace)
    assert done.returncode == 0, done.stdout + done.stderr
    path = "reports/out/syncbn.torch/report.json"
    assert f"report: {path}\n" in done.stdout
    report = json.loads((workplace / path).read_text())
    assert [case["id"] for case in report["cases"]] == [case.id for case in catalogue(2, "smoke")]
    assert report["suite"] == {"version": syncbn.__version__, "commit": None, "dirty": None}
    assert files(workplace) == sorted([*before[0], path])
    assert files(complete.site) == before[1]
    assert [files(complete.folder / name) for name in ("HOME", "TMPDIR")] == [[], []]


class Repository:
    """A repository with a layer and a baseline, and a machine of CI with pip and pytest."""

    def __init__(self, folder: Path, wheel: Path) -> None:
        self.folder = folder
        folder.mkdir()
        packages = ["numpy", "rich", "jsonschema", "torch", "pip", "setuptools", "pytest"]
        self.machine = Venv(folder.parent / "machine", packages)
        self.summary = folder.parent / "summary.md"
        self.variables = self.machine.variables() | {
            "PATH": f"{self.machine.folder / 'bin'}:{os.environ['PATH']}",
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(wheel.parent),
            "PIP_NO_BUILD_ISOLATION": "0",  # which means yes: pypa/pip#5735
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "GITHUB_STEP_SUMMARY": str(self.summary),
            "TARGET": "torch:my_module:MySyncBatchNorm",
            "RANKS": "1",  # a small run, so that the test is quick
            "PROFILE": "smoke",
        }
        (folder / "pyproject.toml").write_text(PROJECT)
        (folder / "test_own.py").write_text("def test_own():\n    pass\n")

    def steps(self, scripts: Sequence[str], layer: str, **variables: str) -> tuple[int, str]:
        """Run scripts until one fails, as CI does: its exit status, and what was printed."""
        (self.folder / "my_module.py").write_text(layer)
        printed = ""
        for script in scripts:
            done = subprocess.run(
                ["bash", "-e", "-o", "pipefail", "-c", script],
                cwd=self.folder,
                env=variables | self.variables,
                capture_output=True,
                text=True,
            )
            printed += done.stdout + done.stderr
            if done.returncode:
                return done.returncode, printed
        return 0, printed


@pytest.fixture(scope="module")
def repository(wheel: Path) -> Repository:
    """It is installed, and its right layer has a baseline."""
    made = Repository(wheel.parent / "repository", wheel)
    variables, (install, judge, *_) = github()
    write = 'syncbn-conformance baseline conformance --out "$BASELINE"'
    status, printed = made.steps([install, judge, write], RIGHT, **variables)
    assert status == 0, printed
    assert re.search(r"Successfully installed my.layer-1.0 syncbn-", printed), printed
    return made


class TestInCI:
    def test_the_github_workflow_is_green_and_shows_a_page(self, repository: Repository) -> None:
        variables, scripts = github()
        assert len(variables) == 5
        status, printed = repository.steps(scripts, RIGHT, **variables)
        assert status == 0, printed
        assert "gate: pass, no change of torch:my_module:MySyncBatchNorm" in printed
        assert (repository.folder / "conformance" / "page.html").is_file()

    @pytest.mark.parametrize("read", [github, gitlab])
    def test_a_wrong_layer_is_red(self, read: Any, repository: Repository) -> None:
        variables, scripts = read()
        status, printed = repository.steps(scripts, WRONG, **variables)
        assert status == 1, printed
        assert "gate: FAIL, changes in FWD-1" in printed
        junit = ElementTree.parse(repository.folder / "conformance-junit.xml").getroot()
        assert int(junit.get("failures", "")) > 0
        if read is github:
            assert "::error file=conformance-baseline.json,line=" in printed
            assert "**FWD-1**" in repository.summary.read_text()
        else:
            issues = json.loads((repository.folder / "gl-code-quality-report.json").read_text())
            assert issues[0]["check_name"] == "syncbn-conformance gate FWD-1"

    def test_pytest_has_the_cases_of_the_layer_as_tests(self, repository: Repository) -> None:
        plugin = "python -m pytest --syncbn-target my_module:MySyncBatchNorm --syncbn-ranks 1 "
        plugin += "--syncbn-profile smoke -p no:cacheprovider"
        status, printed = repository.steps([plugin], RIGHT)
        assert status == 0, printed
        passed, skipped = map(int, re.findall("([0-9]+) (?:passed|skipped)", printed))
        assert passed + skipped == len(catalogue(1, "smoke")) + 1  # and its own test
        status, printed = repository.steps([f"{plugin} -m 'FWD-1 or CTOR-1'"], WRONG)
        assert status == 1, printed
        assert "FAILED syncbn::FWD-1::" in printed
        assert "--target torch:my_module:MySyncBatchNorm" in printed  # the command that replays it
