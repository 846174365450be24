"""One reader under Atheris: `python -m audit.fuzz.reader NAME FOLDER SECONDS [OPTION...]`.

The folder gets the inputs, and an option is one of libFuzzer. When the time is over, the last line
on stdout has the numbers of accepted and of refused inputs.

An input that is refused must be refused by the reader's own error, in a text that fits a line. One
that is accepted must be usable. Any other exception is a finding, and Atheris ends the process.
"""

from __future__ import annotations

import io
import json
import math
import os
import random
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import atheris
import numpy as np
from rich.console import Console

with atheris.instrument_imports(include=["syncbn"], enable_loader_override=False):
    from syncbn import reports
    from syncbn.conformance import document, report, targets, wire
    from syncbn.conformance.case import of_document
    from syncbn.conformance.cases import catalogue
    from syncbn.conformance.expected import expect
    from syncbn.conformance.pool import RankPool
    from syncbn.conformance.runner import Result
    from syncbn.conformance.verdict import VERDICTS, Verdict
    from syncbn.launchers.link import WireError
    from syncbn.reports import schema
    from syncbn.reports.text import one_line, printable

_LONGEST = 2000  # characters of a refusal
_LENGTH = struct.Struct("<I")
_MOST_VALUES = 2000  # of a case whose expected values are computed
_STRANGE: tuple[Any, ...] = (
    *(None, True, 0, -1, 1, 2**31, 2**64, 10**30, 0.5, -0.0, 1e-320, 1e308, math.nan, math.inf),
    *("", "nan", "x" * 5000, "\x1b[2J\u202e\n", "\ud800", "../../etc/passwd", "__class__"),
    *([], {}, [[]], [0] * 300, {"float": "nan"}, {"numpy": "int64", "value": 4}),
)


class Refused(Exception):
    """The reader's own error. Its text is the refusal."""


def read_report(text: bytes) -> None:
    """Read a report, and show it as the commands do."""
    try:
        found = schema.parse(text)
        reports.validate(found)
    except ValueError as error:
        raise Refused(str(error)) from error
    output = io.StringIO()
    reports.summarize(found, Console(file=output, width=100))
    _check(printable(output.getvalue()) == output.getvalue(), "a control character is shown")
    reports.findings([found], "command")


def read_case(text: bytes) -> None:
    """Read a case, and compute what is expected of it if it is small."""
    try:
        case = document.load(schema.parse(text))
    except ValueError as error:
        raise Refused(str(error)) from error
    again = of_document(json.loads(json.dumps(case.document)))
    _check(again.id == case.id, "a case differs from that of its document")
    if case.error is not None:  # nothing is expected except the error
        return
    values = [step.repeat * math.prod(shape) for step in case.steps for shape in step.shapes]
    if sum(values) <= _MOST_VALUES and sum(step.repeat for step in case.steps) <= 10:
        with np.errstate(all="ignore"):
            expect(case)


def read_wire(text: bytes) -> None:
    """Read a message, and encode it again."""
    try:
        message = wire.decode(text)
    except WireError as error:
        raise Refused(str(error)) from error
    again = wire.decode(wire.encode(*message))
    _check(again.content == message.content, "a message changed")


_READERS: dict[str, Callable[[bytes], None]] = {
    "report": read_report,
    "case": read_case,
    "wire": read_wire,
}


def _check(right: bool, what: str) -> None:
    if not right:
        raise AssertionError(what)


def seeds(name: str) -> Iterator[bytes]:
    """Valid inputs of a reader, from which the fuzzer starts."""
    cases = catalogue(2, "certify")
    if name == "case":
        yield from (json.dumps(case.document).encode() for case in cases)
    elif name == "wire":
        arrays: dict[str, Any] = {
            "0/y": np.ones((2, 3), np.float32),
            "0/grad_input": np.zeros((0, 4)),
        }
        content = {"epoch": 1, "steps": [{"modified": [], "format": None}]}
        yield wire.encode(content, arrays)
        yield wire.encode({"failed": "no", "epoch": 2})
    else:
        rows = [
            report.row(Result(case, Verdict(verdict, 0.5, "message"), 0.1))
            for case, verdict in zip(cases, VERDICTS, strict=False)
        ]
        run = {"id": "0" * 16, "started": "2026-01-01T00:00:00+00:00", "command": ["run"]}
        pool = RankPool(targets.parse("syncbn.torch"), 2)
        for count in (1, 2):  # a refused report takes the longer, the more it holds
            found = report.build(
                pool,
                rows[-count:],
                profile="smoke",
                level="decided",
                seconds=1.0,
                oracle="none",
                run=run,
            )
            found["clauses"] = [clause for clause in found["clauses"] if clause["cases"]]
            yield json.dumps(found).encode()


def mutated(name: str, text: bytes, largest: int, seed: int) -> bytes:
    """Change bytes, or a value of the JSON in them."""
    chance = random.Random(seed)
    start = end = b""
    if name == "wire" and len(text) >= _LENGTH.size:
        (of_header,) = _LENGTH.unpack_from(text)
        end = text[_LENGTH.size + of_header :]
        text = text[_LENGTH.size : _LENGTH.size + of_header]
    try:
        changed = json.dumps(_with_a_change(json.loads(text), chance)).encode()
    except (ValueError, RecursionError):
        return bytes(atheris.Mutate(text, largest))
    if chance.random() < 0.3:
        return bytes(atheris.Mutate(changed, largest))
    if name == "wire":
        start = _LENGTH.pack(len(changed))
    return (start + changed + end)[:largest]


def _with_a_change(document: Any, chance: random.Random) -> Any:
    """The document with one value removed, exchanged for another of it, or made strange."""
    root = [document]
    places = list(_places(root))
    holder, key = chance.choice(places)
    turn = chance.randrange(4)
    if turn == 0 and holder is not root:
        del holder[key]
    elif turn == 1:
        other, place = chance.choice(places)
        holder[key] = json.loads(json.dumps(other[place]))
    elif turn == 2 and type(holder[key]) in (int, float):
        holder[key] += chance.choice((-1, 1, 1000, -0.5))
    else:
        holder[key] = chance.choice(_STRANGE)
    return root[0]


def _places(holder: Any) -> Iterator[tuple[Any, Any]]:
    """The holder and the index or name of every value in a document."""
    for key in range(len(holder)) if isinstance(holder, list) else list(holder):
        yield holder, key
        if isinstance(holder[key], (list, dict)):
            yield from _places(holder[key])


def main(name: str, folder: Path, seconds: float, options: list[str]) -> None:
    for number, text in enumerate(seeds(name)):
        folder.joinpath(f"seed-{number}").write_bytes(text)
    counts: Counter[str] = Counter()
    end = time.monotonic() + seconds

    def read(text: bytes) -> None:
        try:
            _READERS[name](text)
            counts["accepted"] += 1
        except Refused as refusal:
            counts["refused"] += 1
            said = one_line(str(refusal))
            _check(0 < len(said) <= _LONGEST, f"a refusal of {len(said)} characters")
        if time.monotonic() > end:
            print(f"{counts['accepted']} accepted, {counts['refused']} refused", flush=True)
            os._exit(0)  # libFuzzer's own end prints nothing of this

    def mutate(text: bytes, largest: int, seed: int) -> bytes:
        return mutated(name, text, largest, seed)

    atheris.Setup(["fuzz", *options, str(folder)], read, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]), sys.argv[4:])
