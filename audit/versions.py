"""Judge the PyTorch layer on the oldest and the newest torch that it supports.

Each version gets a virtual environment of its own. The suite and the tests of the layer run there,
from this checkout.
"""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from audit import markdown
from syncbn.conformance import ConformanceError

VERSIONS = ("2.7.1", "2.13.0")  # the lower bound in pyproject.toml, the version in constraints.txt
TESTS = tuple(
    f"tests/syncbn/test_{name}.py"
    for name in ("torch_layer", "torch_groups", "convert", "contract")
)
_NEEDED = ("numpy", "rich", "jsonschema", "pytest", "hypothesis", "mpmath")
_ROOT = Path(__file__).resolve().parent.parent


class InstallError(ConformanceError, RuntimeError):
    """The packages of an environment could not be installed."""


@dataclass(frozen=True)
class Outcome:
    """What a version of torch gave.

    certify and tests are one line each; right says whether both passed.
    """

    torch: str
    python: str
    numpy: str
    certify: str
    tests: str
    right: bool


def main(folder: Path, ranks: int, document: Path, console: Console) -> int:
    """Judge every version and put the table into the document.

    Returns:
        0 if every case and every test passed on each version, else 1.

    Raises:
        InstallError: pip failed.
        PageError: the document has no place for the table.
    """
    outcomes = []
    for version in VERSIONS:
        console.print(f"torch {version}: environment in {folder / version}")
        python = environment(folder / version, version)
        outcomes.append(judge(python, folder / version, ranks))
        console.print(f"torch {version}: {outcomes[-1].certify}; tests: {outcomes[-1].tests}")
    today = datetime.date.today().isoformat()
    origin = f"The table is {markdown.origin()}, on {today}, with {ranks} ranks on CPU."
    markdown.fill(document, {"origin": origin, "versions": table(outcomes)})
    return 0 if all(outcome.right for outcome in outcomes) else 1


def environment(folder: Path, version: str) -> Path:
    """The Python of an environment with this torch, which is made if it is not there."""
    python = folder.resolve() / "bin" / "python"
    ready = folder / ".ready"
    if not ready.exists():
        _run(Path(sys.executable), "venv", "--clear", str(folder.resolve()))
        # The versions that were tested together, except torch.
        pins = (_ROOT / "constraints.txt").read_text().splitlines()
        constraints = folder / "constraints.txt"
        constraints.write_text("\n".join(pin for pin in pins if not pin.startswith("torch==")))
        pip = ("pip", "install", "--quiet", "-c", str(constraints))
        if not _run(python, *pip, f"torch=={version}", *_NEEDED):
            raise InstallError(f"torch {version} must be installable in {folder}, but pip failed")
        ready.touch()
    return python


def judge(python: Path, folder: Path, ranks: int) -> Outcome:
    """Run certify and the tests of the layer with this Python, from the checkout."""
    out, junit = folder.resolve() / "report", folder.resolve() / "junit.xml"
    certify = "syncbn.conformance run --target syncbn.torch --profile certify --oracle none"
    certified = _run(python, *certify.split(), "--ranks", str(ranks), "--out", str(out))
    tested = _run(python, "pytest", "-q", f"--junit-xml={junit}", *TESTS)
    report = json.loads((out / "report.json").read_bytes())
    return Outcome(
        torch=report["environment"]["torch"],
        python=report["environment"]["python"],
        numpy=report["environment"]["numpy"],
        certify=_counts(report["summary"]["required"]) + " required clauses",
        tests=_counts(_of_junit(junit)),
        right=certified and tested,
    )


def table(outcomes: list[Outcome]) -> str:
    header = ("torch", "Python", "NumPy", "certify", "tests of the layer")
    rows = [(o.torch, o.python, o.numpy, o.certify, o.tests) for o in outcomes]
    return markdown.table(header, rows)


def _run(python: Path, *module: str) -> bool:
    """Whether `python -m MODULE` in the checkout ended with status 0; it writes to our stderr."""
    return subprocess.run([python, "-m", *module], cwd=_ROOT, stdout=sys.stderr).returncode == 0


def _of_junit(path: Path) -> dict[str, int]:
    suite = ET.parse(path).getroot()[0]
    failed = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
    skipped = int(suite.get("skipped", 0))
    return {"pass": int(suite.get("tests", 0)) - failed - skipped, "fail": failed, "skip": skipped}


def _counts(counts: dict[str, int]) -> str:
    """As in "44 pass, 2 not-run"; what did not happen is left out."""
    return ", ".join(f"{number} {name}" for name, number in counts.items() if number)
