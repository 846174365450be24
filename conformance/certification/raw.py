"""Raw results: the answers of the ranks in a file, from which every verdict can be derived again.

The file is MAGIC and then one record for each case, in the order of the run. A record is two
numbers (4 bytes each, little endian), the sizes of what follows before and after it is expanded,
and a zlib stream: one message of syncbn.conformance.wire. Its JSON object holds the id of the case,
how the ranks ended, and the JSON answer of each rank. Its arrays are those of all ranks, by
"RANK:STEP/NAME".

An array with the shape of the input and more than LARGEST_WHOLE bytes is kept as its SHA-256 and as
the values at some places. SAMPLE of the places follow from the SHA-256, so that no one can choose
them. The run adds the places of the largest ratio and of the first NaN.
"""

from __future__ import annotations

import hashlib
import math
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from syncbn.conformance import ConformanceError
from syncbn.conformance.case import Case
from syncbn.conformance.expected import Expectations
from syncbn.conformance.pool import Outcome
from syncbn.conformance.verdict import OF_INPUT
from syncbn.conformance.wire import Message, decode, encode
from syncbn.launchers.link import WireError
from syncbn.reference import Bounded
from syncbn.reference.ratio import ratio
from syncbn.reports.schema import Schema

MAGIC = b"syncbn-raw/1\n"
LARGEST_WHOLE = 65536  # bytes
SAMPLE = 1024  # values
_SIZES = struct.Struct("<II")
_LARGEST_RECORD = 256 << 20  # bytes, expanded; those of 8 ranks have up to 1 MB
_MOST_VALUES = 2**26  # of a large array
_SCHEMA = Schema(
    {
        "type": "object",
        "additionalProperties": False,
        "required": ["case", "crashed", "hung", "details", "error", "changed", "answers", "large"],
        "properties": {
            "case": {"type": "string"},
            "crashed": {"type": "array", "items": {"type": "integer"}},
            "hung": {"type": "array", "items": {"type": "integer"}},
            "details": {"type": "string"},
            "error": {"type": "string"},
            "changed": {"type": "array", "items": {"type": "string"}},
            "answers": {"type": "array", "items": {"type": ["object", "null"]}},
            "large": {
                "type": "object",
                "additionalProperties": {
                    "type": "object",
                    "additionalProperties": False,
                    "required": ["shape", "sha256", "marked"],
                    "properties": {
                        "shape": {
                            "type": "array",
                            "maxItems": 32,
                            "items": {"type": "integer", "minimum": 0},
                        },
                        "sha256": {"type": "string", "pattern": "^[0-9a-f]{64}$"},
                        "marked": {
                            "type": "array",
                            "maxItems": 2,
                            "items": {"type": "integer", "minimum": 0},
                        },
                    },
                },
            },
        },
    }
)


class RawError(ConformanceError):
    """A file that holds no raw results as a run writes them. The message is one line."""


@dataclass(frozen=True)
class Record:
    """The raw results of one case.

    case: its id.
    sha256: of the record, expanded.
    message: what the file holds.
    """

    case: str
    sha256: str
    message: Message

    def outcome(self, case: Case, expected: Callable[[], Expectations]) -> Outcome:
        """The answers as the ranks gave them.

        Of a large array only some values are known. In the other places it gets the expected
        values, so that only the known ones are judged.

        Raises:
            RawError: the record is not one of this case on its number of ranks.
        """
        content = self.message.content
        if len(content["answers"]) != case.ranks:
            raise RawError(f"must have {case.ranks} answers, got {len(content['answers'])}")
        arrays: list[dict[str, npt.NDArray[Any]]] = [{} for _ in range(case.ranks)]
        for name, values in self.message.arrays.items():
            rank, _, own = name.partition(":")
            if not rank.isdecimal() or int(rank) >= case.ranks or not content["answers"][int(rank)]:
                raise RawError(f"array {name!r} must be of a rank that answered")
            if name in content["large"]:
                about = content["large"][name]
                values = _filled(about, values, _expected_at(expected, int(rank), own), name)
            arrays[int(rank)][own] = values
        answers = [
            None if answer is None else Message(answer, of_rank)
            for answer, of_rank in zip(content["answers"], arrays, strict=True)
        ]
        names = ("crashed", "hung", "details", "error", "changed")
        return Outcome(answers, **{name: content[name] for name in names})


class RawWriter:
    """Writes the raw results of a run as they come. Use it as a context manager."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.digests: dict[str, str] = {}  # SHA-256 of the record of each case

    def __enter__(self) -> RawWriter:
        self._file: IO[bytes] = open(self._path, "xb")
        self._file.write(MAGIC)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def add(self, case: Case, outcome: Outcome, expected: Callable[[], Expectations]) -> None:
        """Keep the answers to a case.

        Args:
            case: the case.
            outcome: the answers of its ranks.
            expected: returns the expected results; called only if there is a large array.
        """
        arrays: dict[str, npt.NDArray[Any]] = {}
        large: dict[str, Any] = {}
        for rank, answer in enumerate(outcome.answers):
            for name, values in answer.arrays.items() if answer else ():
                key = f"{rank}:{name}"
                arrays[key] = values
                if values.nbytes > LARGEST_WHOLE and name.partition("/")[2] in OF_INPUT:
                    at = _expected_at(expected, rank, name)
                    large[key], arrays[key] = _reduced(values, at)
        answers = [None if a is None else _without_epoch(a.content) for a in outcome.answers]
        record = encode(
            {
                "case": case.id,
                "crashed": outcome.crashed,
                "hung": outcome.hung,
                "details": outcome.details,
                "error": outcome.error,
                "changed": outcome.changed,
                "answers": answers,
                "large": large,
            },
            arrays,
        )
        packed = zlib.compress(record)
        self._file.write(_SIZES.pack(len(packed), len(record)) + packed)
        self._file.flush()
        self.digests[case.id] = hashlib.sha256(record).hexdigest()


def read(file: IO[bytes]) -> Iterator[Record]:
    """The records of a file, one after the other.

    Raises:
        RawError: the file, or a record of it, is not as RawWriter writes it.
    """
    if file.read(len(MAGIC)) != MAGIC:
        raise RawError(f"must start with {MAGIC!r}")
    number = 0
    while header := file.read(_SIZES.size):
        try:
            yield _record(header, file)
        except (RawError, WireError, zlib.error) as error:
            raise RawError(f"record {number}: {error}") from error
        number += 1


def places(sha256: str, size: int) -> npt.NDArray[np.uint64]:
    """The places at which the values of a large array are kept, as indices of the flat array."""
    key = np.frombuffer(bytes.fromhex(sha256)[:16], np.uint64)
    drawn: npt.NDArray[np.uint64] = np.random.Philox(key=key).random_raw(SAMPLE) % np.uint64(size)
    return drawn


def _record(header: bytes, file: IO[bytes]) -> Record:
    if len(header) < _SIZES.size:
        raise RawError("the file ends within it")
    packed_size, size = _SIZES.unpack(header)
    if max(packed_size, size) > _LARGEST_RECORD:
        raise RawError(f"must have at most {_LARGEST_RECORD} bytes")
    packed = file.read(packed_size)
    stream = zlib.decompressobj()
    data = stream.decompress(packed, size + 1)
    if len(data) != size or not stream.eof or stream.unused_data or len(packed) != packed_size:
        raise RawError(f"must expand to {size} bytes and end there")
    message = decode(data)
    if violation := _SCHEMA.violation(message.content):
        raise RawError(violation)
    # What is read must be all that is there: no name twice, for example.
    if encode(*message) != data:
        raise RawError("must be a message as the suite writes it")
    if unknown := sorted(set(message.content["large"]) - set(message.arrays)):
        raise RawError(f"large array {unknown[0]!r} has no values")
    return Record(message.content["case"], hashlib.sha256(data).hexdigest(), message)


def _reduced(
    values: npt.NDArray[Any], expected: Bounded | None
) -> tuple[dict[str, Any], npt.NDArray[Any]]:
    """What is kept of a large array: a description, and the values at the places."""
    flat = np.ascontiguousarray(values).reshape(-1)
    sha256 = hashlib.sha256(flat.tobytes()).hexdigest()
    marked = set(np.flatnonzero(np.isnan(flat))[:1].tolist())
    if expected is not None and expected.value.shape == values.shape:
        marked.add(int(np.argmax(ratio(values, expected))))
    about = {"shape": list(values.shape), "sha256": sha256, "marked": sorted(marked)}
    return about, flat[_places(about)]


def _filled(
    about: dict[str, Any], kept: npt.NDArray[Any], expected: Bounded | None, name: str
) -> npt.NDArray[Any]:
    """A large array with the values that are kept, and the expected ones elsewhere."""
    shape = tuple(about["shape"])
    size = math.prod(shape)
    if size * kept.itemsize <= LARGEST_WHOLE or size > _MOST_VALUES:
        raise RawError(f"the shape {list(shape)} of {name!r} is not one of a large array")
    if max(about["marked"], default=0) >= size or kept.shape != _places(about).shape:
        raise RawError(f"{name!r} must have a value at each of its places")
    flat = np.zeros(size)
    if expected is not None and expected.value.shape == shape:
        value = expected.value.reshape(-1)
        # Infinity is right where the reference is NaN, and is no NaN.
        flat = np.where(np.isnan(value), np.inf, value)
    flat[_places(about)] = kept
    return flat.reshape(shape)


def _places(about: dict[str, Any]) -> npt.NDArray[np.uint64]:
    drawn = places(about["sha256"], math.prod(about["shape"]))
    return np.concatenate([drawn, np.array(about["marked"], np.uint64)])


def _expected_at(expected: Callable[[], Expectations], rank: int, name: str) -> Bounded | None:
    """The expected value of the array STEP/NAME of a rank; None if there is none."""
    index, _, quantity = name.partition("/")
    steps = expected()[rank]
    at = steps[int(index)] if index.isdecimal() and int(index) < len(steps) else None
    return at.values.get(quantity) if at is not None else None


def _without_epoch(content: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in content.items() if name != "epoch"}
