"""Any one value of a package, changed or taken out at random: the package is refused."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from syncbn.conformance import report
from syncbn.conformance.certification import contents, verify
from syncbn.conformance.certification.environment import suite_files
from syncbn.conformance.expected import expect
from syncbn.conformance.wire import Message
from tests.conformance.certification.packages import PLAN, bind
from tests.conformance.certification.test_tampering import records, write_records

EDITS = 500
CERTIFICATE = contents.CERTIFICATE


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is the same for every package is computed once."""
    known: dict[str, Any] = {}

    def expect_once(case: Any) -> Any:
        if case.id not in known:
            known[case.id] = expect(case)
        return known[case.id]

    monkeypatch.setattr(verify, "expect", expect_once)
    monkeypatch.setattr(verify, "suite_files", functools.cache(suite_files))
    monkeypatch.setattr(report, "suite", functools.cache(report.suite))


def other(value: Any, draw: random.Random) -> Any:
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + draw.choice((-1, 1, 1000))
    if isinstance(value, float):
        return draw.choice((value * 2 + 1, -value - 1, value / 2 - 0.001))
    if value is None:
        return draw.choice((0, "", True))
    if not value:
        return "x"
    place = draw.randrange(len(value))
    return value[:place] + chr(ord(value[place]) ^ 1) + value[place + 1 :]


def places(document: Any) -> Iterator[tuple[Any, Any]]:
    """Every container of a document with the key of a value in it that is no container."""
    items: Any = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in items:
        if isinstance(value, (dict, list)) and value:
            yield from places(value)
        elif not isinstance(value, (dict, list)):
            yield document, key


def edit(document: Any, draw: random.Random) -> str:
    container, key = draw.choice(list(places(document)))
    before = container[key]
    if draw.random() < 0.2:
        del container[key]
        return f"{key}: {before!r} was taken out"
    container[key] = other(before, draw)
    return f"{key}: {before!r} became {container[key]!r}"


def edit_file(path: Path, draw: random.Random) -> str:
    """Change one value of a file, as its kind has values."""
    if path.suffix == ".json":
        document = json.loads(path.read_text())
        what = edit(document, draw)
        path.write_text(json.dumps(document))
        return what
    if path.suffix == ".jsonl":
        found = path.read_text().splitlines()
        number = draw.randrange(len(found))
        document = json.loads(found[number])
        what = edit(document, draw)
        found[number] = json.dumps(document)
        path.write_text("\n".join(found) + "\n")
        return f"line {number}: {what}"
    if path.suffix == ".bin":
        messages = records(path)
        number = draw.randrange(len(messages))
        content, arrays = messages[number]
        if arrays and draw.random() < 0.5:
            name = draw.choice([name for name in arrays if arrays[name].size])
            values = arrays[name].copy()
            place = draw.randrange(values.size)
            values.flat[place] = values.flat[place] * 2 + 1
            messages[number] = Message(content, arrays | {name: values})
            what = f"{name}[{place}]"
        else:
            what = edit(content, draw)
        write_records(path, messages)
        return f"record {number}: {what}"
    text = path.read_text()
    place = draw.randrange(len(text))
    path.write_text(text[:place] + chr(ord(text[place]) ^ 1) + text[place + 1 :])
    return f"character {place}"


def test_no_value_of_a_package_can_be_changed(passed: Path, failed: Path) -> None:
    draw = random.Random(15)
    accepted = []
    for number in range(EDITS):
        folder = draw.choice((passed, failed))
        name = draw.choice([*contents.names(PLAN.ranks), CERTIFICATE])
        before = {path: path.read_bytes() for path in (folder / name, folder / CERTIFICATE)}
        what = edit_file(folder / name, draw)
        changed = (folder / name).read_bytes() != before[folder / name]
        if draw.random() < 0.5 and name != CERTIFICATE:
            bind(folder)
        found = verify.verify(folder, plan=PLAN)
        if changed and not found.refused:
            accepted.append(f"{number}: {name}: {what}")
        for path, content in before.items():
            path.write_bytes(content)
    assert accepted == []
    assert verify.verify(passed, plan=PLAN).refused == []
