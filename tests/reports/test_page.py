"""The HTML page: what it shows, that it is self-contained, and that a browser shows it well."""

from __future__ import annotations

import io
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from syncbn import reports
from syncbn.conformance.__main__ import main
from syncbn.reports.charts import dtypes, heat_map
from syncbn.reports.compare import as_html, as_markdown, compare, show
from syncbn.reports.page import page
from tests.reports.browser import overflow, printed
from tests.reports.test_reports import case, clause, failing, passing, report_of
from tests.reports.test_text import EVIL, evil_report

LONG = "x" * 300


def three_ways() -> dict[str, Any]:
    """A failing report with an oracle and long names, on a phone the widest page."""
    report = failing()
    target: dict[str, Any] = report["target"]
    report["oracle"] = {"target": target | {"name": "mindspore.mint"}, "left_out": None}
    oracle = {"verdict": "pass", "ratio": None, "apart": None, "message": None}
    for row in report["cases"]:
        finding = "target departs" if row["verdict"] == "fail" else "agree"
        row["oracle"] = oracle | {"finding": finding}
        row["spec"]["title"] = row["message"] = LONG
    report["target"] = target | {"name": f"torch:{LONG}:Layer", "backend": None}
    report["environment"] = {"python": LONG, LONG: "x"}
    for row in report["clauses"]:
        row["reason"] = LONG
    return report


class Elements(HTMLParser):
    """Checks that every element is closed where it must be, and collects tags and attributes."""

    EMPTY = ("meta", "link", "line", "rect", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.EMPTY:
            assert self.open.pop() == tag


PAGES = {
    "passing": lambda: page([passing()]),
    "failing": lambda: page([failing()]),
    "three ways": lambda: page([three_ways()]),
    "hostile": lambda: page([evil_report()], {"name": EVIL, "vendor": EVIL}),
    "two runs": lambda: page([passing(), failing()]),
    "compared": lambda: as_html(compare(passing(), three_ways())),
    "hostile, compared": lambda: as_html(compare(passing(), evil_report())),
}


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_whole_and_loads_nothing(name: str) -> None:
    text = PAGES[name]()
    elements = Elements(text).found
    assert not {tag for tag, _ in elements} & {"script", "img", "iframe", "object", "a", "base"}
    for tag, attributes in elements:
        assert not [given for given in attributes if given.startswith("on")], tag
        assert "src" not in attributes
        assert tag != "link" or attributes["href"] == "data:,"
    assert "url(" not in text
    assert "@import" not in text
    assert not set(text) & set("\x1b\x07\x9b\u202e\u2028\r")


def test_it_shows_the_verdict_the_failures_and_the_commands() -> None:
    text = page([failing()])
    assert "<h1>syncbn.torch</h1>" in text
    assert '<span class="stamp fail">FAIL</span>' in text
    assert "FWD-3 uneven shards <span class=dim>5 of 6 cases</span>" in text
    assert "y is [bold]nan[/bold]" in text
    assert "syncbn-conformance replay 000000000007 --target syncbn.torch" in text
    assert "and 3 more lines" not in text  # 9 lines are shown whole
    assert "There was no oracle: --oracle none." in text
    assert '<span class="stamp pass">PASS</span>' in page([passing()])


def test_the_product_stands_on_top() -> None:
    text = page([passing()], {"name": "Norm 9000", "vendor": "ACME"})
    assert "<h1>Norm 9000</h1>" in text
    assert "<dt>vendor</dt><dd>ACME</dd>" in text


def test_three_ways_are_counted() -> None:
    text = page([three_ways()])
    assert "mindspore.mint (cpu, twin), as the oracle" in text
    assert "<td class=id>target departs</td><td class=number>5</td>" in text
    assert "FWD-3 5</div>" in text


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"layer": {"dtype": "float16"}}, {"float16"}),
        (
            {"layer": {"dtype": "float16"}, "steps": [{}, {"dtype": "float64"}]},
            {"float32", "float64"},
        ),
        ({"steps": [{"dtype": ["float32", "bfloat16"]}]}, {"float32", "bfloat16"}),
        ({"steps": [{"dtype": "int8"}]}, {"other"}),
        ({"steps": 3, "layer": []}, {"float32"}),
        ({"steps": [None, {"dtype": [{}]}]}, {"other"}),
    ],
)
def test_the_dtypes_of_a_case(spec: dict[str, Any], expected: set[str]) -> None:
    assert dtypes({"spec": spec}) == expected


def test_a_cell_of_the_map_has_the_worst_ratio() -> None:
    rows = [
        case(1, "FWD-1", ratio=0.25),
        case(2, "FWD-1", ratio=0.5),
        case(3, "FWD-1", "fail", ratio=7.5, message="off"),
        case(4, "STAT-2", "unsupported", message="none"),
        case(5, "STAT-2"),
    ]
    for row, dtype in zip(
        rows, ("float32", "float32", "float16", "float64", "float32"), strict=True
    ):
        row["spec"]["steps"] = [{"dtype": dtype}]
    clauses = [clause("FWD-1", "fail", cases=3), clause("STAT-2", cases=2, unsupported=1)]
    text = heat_map(report_of(clauses, rows))
    cells = re.findall(r"<td(?: class=(\w+) [^>]*)?>([^<]*)</td>", text)
    fwd = [("r2", "0.500"), ("r4", "7.50"), ("", "")]
    assert cells == [*fwd, ("facts", "pass"), ("", ""), ("facts", "n/a")]


def test_compare_counts_what_differs(tmp_path: Path) -> None:
    a, b = failing(), failing()
    b["cases"][2] |= {"verdict": "pass", "ratio": 0.5, "message": None}
    del b["cases"][0]
    b["environment"] = {"python": "3.12.0"}
    compared = compare(a, b)
    assert {(one.id, one.verdicts) for one in compared.differing} == {
        ("000000000003", ("fail", "pass")),
        ("000000000001", ("pass", "absent")),
    }
    assert [row.id for row in compared.clauses if row.differ] == ["FWD-1", "FWD-3"]
    assert ("python", "3.11.7", "3.12.0") in compared.settings
    headline = "7 of 8 common cases have the same verdict; 1 cases are in one report only"
    assert headline in as_markdown(compared)
    assert headline in as_html(compared)


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "runs" / "2").mkdir(parents=True)
    (tmp_path / "runs" / "16").mkdir()
    reports.save(passing() | {"ranks": 2}, tmp_path / "runs" / "2" / "report.json")
    reports.save(failing() | {"ranks": 16}, tmp_path / "runs" / "16" / "report.json")
    html = ["html", str(tmp_path), "--out", str(tmp_path / "page.html")]
    for content in (None, "{", "[]", '{"name": 1}'):
        if content:
            (tmp_path / "product.json").write_text(content)
        assert main(html) == 2
        assert "product" in capsys.readouterr().err
    (tmp_path / "product.json").write_text('{"name": "Norm 9000", "vendor": "ACME"}')
    assert main(html) == 0
    text = (tmp_path / "page.html").read_text()
    assert text.count("<h1>Norm 9000</h1>") == 2
    assert text.index("on 2 cpu ranks") < text.index("on 16 cpu ranks")
    sides = [str(tmp_path / "runs" / ranks) for ranks in ("2", "16")]
    files = ["--html", str(tmp_path / "c.html"), "--markdown", str(tmp_path / "c.md")]
    assert main(["compare", *sides, *files]) == 0
    assert "common cases have the same verdict" in capsys.readouterr().out
    assert (tmp_path / "c.md").read_text().startswith("# Two runs compared")
    assert main(["html", str(tmp_path / "runs"), "--out", str(tmp_path / "page.html")]) == 2
    assert main(["compare", sides[0], str(tmp_path / "none")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2


@pytest.mark.parametrize("name", ["runs/2/report.json", "runs/2", "runs", "product.json"])
def test_no_link_in_a_package_is_followed(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere, package = tmp_path / "elsewhere", tmp_path / "package"
    for folder in (elsewhere, package):
        (folder / "runs/2").mkdir(parents=True)
        reports.save(passing(), folder / "runs/2/report.json")
        (folder / "product.json").write_text("{}")
    command = ["html", str(package), "--out", str(tmp_path / "page.html")]
    assert main(command) == 0
    (package / name).rename(tmp_path / "moved")
    (package / name).symlink_to(elsewhere / name)
    assert main(command) == 2
    assert "no link may lead to it" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["runs/2/report.json", "product.json"])
def test_no_pipe_in_a_package_is_read(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would wait for ever."""
    (tmp_path / "runs/2").mkdir(parents=True)
    reports.save(passing(), tmp_path / "runs/2/report.json")
    (tmp_path / "product.json").write_text("{}")
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    assert main(["html", str(tmp_path), "--out", str(tmp_path / "page.html")]) == 2
    assert f"{name} must be a regular file" in capsys.readouterr().err


def test_compare_commands_no_terminal() -> None:
    text = io.StringIO()
    show(compare(evil_report(), passing()), Console(file=text, width=100, force_terminal=True))
    plain = re.sub("\x1b\\[[0-9;]*m", "", text.getvalue())  # the colours of the table
    assert not set(plain) & set("\x1b\x07\x9b\u202e\u2028\r")


@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("name", ["passing", "three ways", "compared"])
def test_a_browser_shows_it_without_overflow(name: str, width: int, tmp_path: Path) -> None:
    assert overflow(PAGES[name](), width, tmp_path) == 0


def test_a_browser_prints_it(tmp_path: Path) -> None:
    assert printed(page([three_ways()]), tmp_path).startswith(b"%PDF")


def test_the_measure_sees_an_overflow(tmp_path: Path) -> None:
    wide = page([passing()]).replace("<main>", "<main><div style='width:500px'>wide</div>")
    assert overflow(wide, 390, tmp_path) > 100
