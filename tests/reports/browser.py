"""A headless Chromium for the tests of pages."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
from pathlib import Path

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_MEASURE = """
<iframe id=page style="border:0" width={width} height=900 srcdoc="{page}"></iframe>
<script>onload = () => {{
  const inner = document.getElementById("page").contentDocument.documentElement;
  document.title = inner.scrollWidth + " of " + inner.clientWidth;
}}</script>
"""


def overflow(page: str, width: int, folder: Path) -> int:
    """By how many pixels a page is wider than a screen of this width.

    A frame stands for the screen, because the window of a headless browser has a least width. An
    error on the console fails the test.
    """
    wrapper = folder / "wrapper.html"
    wrapper.write_text(_MEASURE.format(width=width, page=html.escape(page)))
    done = _run(folder, "--dump-dom", str(wrapper))
    assert "CONSOLE" not in done.stderr, done.stderr
    (found,) = re.findall(r"<title>(\d+) of (\d+)</title>", done.stdout)
    assert int(found[1]) == width
    return int(found[0]) - int(found[1])


def printed(page: str, folder: Path) -> bytes:
    """The PDF of a page."""
    (folder / "page.html").write_text(page)
    pdf = folder / "page.pdf"
    _run(folder, f"--print-to-pdf={pdf}", "--no-pdf-header-footer", str(folder / "page.html"))
    return pdf.read_bytes()


def _run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    found = next((path for name in _NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(_NAMES)} is installed")
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    options += ["--hide-scrollbars"]
    options += ["--disable-dev-shm-usage", "--virtual-time-budget=5000"]
    options += [f"--user-data-dir={folder / 'profile'}"]
    command = [found, *options, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True)
