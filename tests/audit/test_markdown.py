"""Pages with generated tables."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from audit import markdown
from audit.markdown import PageError


def test_table() -> None:
    assert markdown.table(("a", "b"), [("x", "1"), ("y", "2")], right=[1]).splitlines() == [
        "| a | b |",
        "| --- | --: |",
        "| x | 1 |",
        "| y | 2 |",
    ]


def test_fill_replaces_only_what_is_between_the_comments(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("Before.\n<!-- made: one -->\nold\n<!-- end -->\nAfter.\n")
    markdown.fill(page, {"one": "new"})
    assert page.read_text() == "Before.\n<!-- made: one -->\nnew\n<!-- end -->\nAfter.\n"


@pytest.mark.parametrize("places", [[], ["other"], ["one", "one"], ["one", "other"]])
def test_a_page_must_have_one_place_for_each_table(tmp_path: Path, places: list[str]) -> None:
    page = tmp_path / "page.md"
    text = "".join(f"<!-- made: {place} -->\n<!-- end -->\n" for place in places)
    page.write_text(text)
    with pytest.raises(PageError, match=r"page\.md must have one place for each of one, got"):
        markdown.fill(page, {"one": "new"})
    assert page.read_text() == text


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=Test", "-c", "user.email=test@example.org")
    command = ["git", *identity, *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


def test_origin_names_the_command_the_commit_and_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(markdown, "_ROOT", tmp_path)
    monkeypatch.setattr("sys.argv", ["audit/__main__.py", "study", "--out", "a file"])
    git(tmp_path, "init", "-q")
    (tmp_path / "file").write_text("one")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-q", "-m", "First")
    commit = git(tmp_path, "rev-parse", "--short", "HEAD").strip()
    origin = f"made by `python -m audit study --out 'a file'` at commit {commit}"
    assert markdown.origin() == origin
    (tmp_path / "file").write_text("two")
    assert markdown.origin() == f"{origin} with uncommitted changes"


def test_origin_needs_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(markdown, "_ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(PageError, match="must be made in a git checkout"):
        markdown.origin()
