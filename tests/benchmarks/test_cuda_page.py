"""docs/cuda.md is the page of the kept results."""

from __future__ import annotations

from pathlib import Path

from benchmarks import cuda_page

ROOT = Path(__file__).resolve().parent.parent.parent


def test_the_page_is_that_of_the_kept_results() -> None:
    assert cuda_page.text(ROOT / "benchmarks/kept/cuda") == (ROOT / "docs/cuda.md").read_text()
