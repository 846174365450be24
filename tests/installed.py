"""Wheels of this project, and virtual environments away from the checkout, without a network."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from tests.test_imports import ROOT


def python(*arguments: str | Path, at: Path) -> None:
    done = subprocess.run([sys.executable, *arguments], cwd=at, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def build(source: Path, folder: Path) -> Path:
    """Build a wheel with the setuptools that is installed."""
    options = ("--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--quiet")
    python("-m", "pip", "wheel", *options, "--wheel-dir", folder, source, at=source)
    (wheel,) = folder.glob("*.whl")
    return wheel


class Venv:
    """A virtual environment with some of the packages that are installed here, as links."""

    def __init__(self, folder: Path, packages: Iterable[str]) -> None:
        self.folder = folder
        python("-m", "venv", "--without-pip", folder, at=ROOT)
        (self.site,) = folder.glob("lib/python*/site-packages")
        for name in needed_by(packages):
            for place in {file.parts[0] for file in metadata.files(name) or ()} - {
                "..",
                "__pycache__",
            }:
                source = Path(str(metadata.distribution(name).locate_file(place)))
                if source.exists():
                    (self.site / place).symlink_to(source)

    def variables(self) -> dict[str, str]:
        """Those of this process, with a home and a place for temporary files of its own."""
        private = {name: self.folder / name for name in ("HOME", "TMPDIR")}
        for place in private.values():
            place.mkdir(exist_ok=True)
        kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        return kept | {key: str(place) for key, place in private.items()}

    def run(self, *arguments: str | Path, at: Path) -> subprocess.CompletedProcess[str]:
        """Run the environment's Python."""
        command = [str(self.folder / "bin" / "python"), *map(str, arguments)]
        return subprocess.run(command, cwd=at, env=self.variables(), capture_output=True, text=True)


class Environment(Venv):
    """One with the wheel as well."""

    def __init__(self, folder: Path, wheel: Path, packages: Iterable[str]) -> None:
        super().__init__(folder, packages)
        zipfile.ZipFile(wheel).extractall(self.site)
        ours = metadata.Distribution.at(next(self.site.glob("syncbn-*.dist-info")))
        (entry,) = ours.entry_points.select(group="console_scripts")
        self.script = folder / "bin" / entry.name
        self.script.write_text(
            f"import sys\nfrom {entry.module} import {entry.attr}\nsys.exit({entry.attr}())\n"
        )

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
