"""The wheel, installed away from the checkout: what it holds, what it needs, and that it judges.

It is built from a copy of the tree, and installed into environments whose other packages are links
to those of this one: nothing is downloaded.
"""

from __future__ import annotations

import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import pytest

import syncbn
from syncbn.conformance.cases import catalogue
from syncbn.conformance.certification.environment import suite_files
from tests.test_imports import MODULES, ROOT, UNSHIPPED

RUN = ("run", "--profile", "smoke", "--target", "syncbn.torch", "--ranks", "2", "--oracle", "none")


def python(*arguments: str | Path, at: Path) -> None:
    done = subprocess.run([sys.executable, *arguments], cwd=at, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


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


def build(source: Path, folder: Path) -> Path:
    """Build a wheel with the setuptools that is installed."""
    options = ("--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--quiet")
    python("-m", "pip", "wheel", *options, "--wheel-dir", folder, source, at=source)
    (wheel,) = folder.glob("*.whl")
    return wheel


class Environment:
    """A virtual environment with the wheel and some of the packages that are installed here."""

    def __init__(self, folder: Path, wheel: Path, packages: Iterable[str]) -> None:
        self.folder = folder
        python("-m", "venv", "--without-pip", folder, at=ROOT)
        (self.site,) = folder.glob("lib/python*/site-packages")
        zipfile.ZipFile(wheel).extractall(self.site)
        for name in needed_by(packages):
            for place in {file.parts[0] for file in metadata.files(name) or ()} - {
                "..",
                "__pycache__",
            }:
                source = Path(str(metadata.distribution(name).locate_file(place)))
                if source.exists():
                    (self.site / place).symlink_to(source)

        ours = metadata.Distribution.at(next(self.site.glob("syncbn-*.dist-info")))
        (entry,) = ours.entry_points.select(group="console_scripts")
        self.script = folder / "bin" / entry.name
        self.script.write_text(
            f"import sys\nfrom {entry.module} import {entry.attr}\nsys.exit({entry.attr}())\n"
        )

    def run(self, *arguments: str | Path, at: Path) -> subprocess.CompletedProcess[str]:
        """Run the environment's Python, with a home and a place for temporary files of its own."""
        private = {name: self.folder / name for name in ("HOME", "TMPDIR")}
        for place in private.values():
            place.mkdir(exist_ok=True)
        kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        environment = kept | {key: str(place) for key, place in private.items()}
        command = [str(self.folder / "bin" / "python"), *map(str, arguments)]
        return subprocess.run(command, cwd=at, env=environment, capture_output=True, text=True)

    def command(self, *arguments: str, at: Path) -> subprocess.CompletedProcess[str]:
        """Run syncbn-conformance by the script that an installer writes."""
        return self.run(self.script, *arguments, at=at)


def needed_by(packages: Iterable[str]) -> set[str]:
    """The installed distributions of some names, with all that they need."""
    found: set[str] = set()
    todo = list(packages)
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if name in found:
            continue
        try:
            requirements = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # for another Python or system
            continue
        found.add(name)
        todo += [re.split(r"[^\w.-]", text)[0] for text in requirements if "extra ==" not in text]
    return found


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
