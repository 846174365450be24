"""Text of a report as it may be shown: nothing of it can command a terminal or become Markdown."""

from __future__ import annotations

import html
import re
from typing import Any

from syncbn.reports.document import Report

# Control characters except tab and line feed, the line separators of Unicode, what changes the
# direction of text, what Unicode calls ignorable because it shows nothing, halves of surrogate
# pairs, which no encoding can write, and the two characters that XML has not.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f"
    "\u2028-\u202e\u2060-\u206f\u3164\ud800-\udfff\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\ufffe\uffff"
    "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
_MARKDOWN = re.compile(r"[\\`*_{}<>\[\]()#+!|~&$-]")


def printable(text: str) -> str:
    """The text with every character that could act on a terminal as its escape, such as \\x1b."""
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def one_line(text: str) -> str:
    """The same as one line."""
    return " ".join(printable(text).split())


def markdown(text: str) -> str:
    """The text as one line of Markdown that shows it, in a paragraph or in a cell of a table."""
    return _MARKDOWN.sub(lambda found: f"\\{found[0]}", one_line(text))


def code(text: str) -> str:
    """The text as a code span of Markdown."""
    text = one_line(text)
    ticks = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    space = " " if "`" in text else ""
    return f"{ticks}{space}{text}{space}{ticks}"


def escaped(text: str) -> str:
    """The text in HTML, also in the value of an attribute."""
    return html.escape(printable(text))


def shown(report: Report) -> Report:
    """A copy of a report in which every text that a table shows is printable."""
    return _printable({name: value for name, value in report.items() if name != "cases"}) | {
        "cases": [_case(case) for case in report["cases"]]
    }


def _case(case: Any) -> Any:
    """A case whose document is reduced to its title."""
    oracle = case["oracle"]
    return case | {
        "spec": {"title": one_line(str(case["spec"].get("title", "")))},
        "message": case["message"] and printable(case["message"]),
        "oracle": oracle
        and oracle | {"message": oracle["message"] and printable(oracle["message"])},
    }


def _printable(value: Any) -> Any:
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, list):
        return [_printable(one) for one in value]
    if isinstance(value, dict):
        return {printable(name): _printable(one) for name, one in value.items()}
    return value
