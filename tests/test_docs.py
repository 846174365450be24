"""The hand-written pages agree with the tree: links, commands, variables, the index."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import audit.__main__
import syncbn.conformance.__main__
from tests.test_imports import LINKED, ROOT

PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
LINK = re.compile(r"\]\((?!https?://)([^)#]*)(?:#([^)]*))?\)")


def names(path: Path) -> str:
    return str(path.relative_to(ROOT))


def headings(page: Path) -> set[str]:
    """The anchors of a page, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_links(page: Path) -> None:
    for target, anchor in LINK.findall(page.read_text()):
        path = (page.parent / target) if target else page
        assert path.exists(), f"{target} is not there"
        if anchor:
            assert anchor in headings(path), f"{target} has no heading #{anchor}"


def test_the_index_has_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    linked = {target for target, _ in LINK.findall(index)}
    pages = {path.name for path in ROOT.glob("docs/*.md")} - {"README.md"}
    assert pages <= linked


def commands() -> Iterator[tuple[str, str]]:
    """Every command of this project in a page that stands on a line of its own."""
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        for line in text.splitlines():
            line = line.strip().removeprefix("$ ")
            if line.startswith(("syncbn-conformance ", "python -m audit ", "make ")):
                yield names(page), re.split(r"\s{2,}|\s#| \| ", line)[0]


@pytest.mark.parametrize(("page", "command"), list(commands()))
def test_commands(page: str, command: str) -> None:
    """The targets of make exist, and the parsers take the options."""
    words = shlex.split(command)
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        for word in words[1:]:
            assert word in targets or re.match(r"[A-Z_]+=|\.\.\.$", word), f"no target {word}"
    elif words[0] == "python":
        audit.__main__._parser().parse_args(words[3:])
    else:
        syncbn.conformance.__main__._parser().parse_args(words[1:])


def test_the_example_of_the_readme(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    script = tmp_path / "example.py"
    script.write_text(code)
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = subprocess.run(
        [sys.executable, *launch, script],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    means = re.findall(r"tensor\(.*?\)", done.stdout, re.DOTALL)
    assert len(means) == 2
    assert means[0] == means[1]


def test_every_variable_is_documented() -> None:
    documented = set(re.findall(r"SYNCBN_[A-Z_]+", (ROOT / "docs/environment.md").read_text()))
    shipped = [path for top in ("syncbn", *LINKED) for path in (ROOT / top).rglob("*.py")]
    used = {name for path in shipped for name in re.findall(r"SYNCBN_[A-Z_]+", path.read_text())}
    assert used == documented


def test_the_table_of_clauses_names_what_exists() -> None:
    """The columns of PyTorch and MindSpore, the kernels and the rows of the bounds."""
    page = (ROOT / "docs/architecture.md").read_text()
    rows = re.findall(r"^\| ((?:CTOR|ERR|FWD|GRAD|STAT|EVAL|COMM)\b.*)\|$", page, re.MULTILINE)
    assert len(rows) >= 8
    kernels = (ROOT / "kernels/batch_norm.py").read_text()
    bounds = (ROOT / "reference/bounds.py").read_text()
    for row in rows:
        _, *code, bound, kernel = row.split("|")
        for package, names in zip(("torch", "mindspore"), code, strict=True):
            for module, name in re.findall(r"`(\w+)\.(\w+)`", names):
                text = (ROOT / "syncbn" / package / f"{module}.py").read_text()
                assert re.search(rf"^(def|class) {name}\b", text, re.MULTILINE), f"{module}.{name}"
        for name in re.findall(r"`(\w+)`", kernel):
            assert f"\ndef {name}(" in kernels, name
        for name in re.findall(r"`(m|v|s|y|S|X|gw|dx|r)`", bound):
            assert re.search(rf"^    {name} +\S", bounds, re.MULTILINE), name


# Words that CONTRIBUTING.md bans. Known failures quote other projects.
BANNED = re.compile(
    r"\b(anew|whoever|nobody|anybody|but for|what came of|leaf operations?)\b|, too[.,;:)]",
    re.IGNORECASE,
)
QUOTES = {"CONTRIBUTING.md", "audit/failures/known.toml", "docs/failure-modes.md"}


def test_no_banned_word() -> None:
    command = ["git", "ls-files", "*.py", "*.md", "*.toml", "Makefile", ".ci/run"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    found = []
    for name in sorted({*listed.split()} - QUOTES - {names(Path(__file__))}):
        for number, line in enumerate((ROOT / name).read_text().splitlines(), 1):
            found += [f"{name}:{number}: {match[0]}" for match in BANNED.finditer(line)]
    assert found == []
