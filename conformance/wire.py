"""Messages between controller and ranks: JSON and arrays over a link, never pickle.

A message is one JSON object and named arrays. Its bytes are the length of the header (4 bytes,
little endian), the header (JSON: the object, and the name, dtype and shape of each array), and the
arrays. Bytes that are no message are a WireError. syncbn.launchers.link limits and proves them.
"""

from __future__ import annotations

import json
import math
import struct
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from syncbn.launchers.link import Link, WireError

_LENGTH = struct.Struct("<I")
_MAX_HEADER = 16 << 20  # bytes; that of a case with sweeps of shapes has some kilobytes
_MAX_ARRAY_COUNT = 10_000
_MAX_DIMENSION = 512 << 20
_DTYPES = ("float16", "float32", "float64", "int64", "bool")


class Message(NamedTuple):
    content: dict[str, Any]
    arrays: dict[str, npt.NDArray[Any]]


def encode(content: dict[str, Any], arrays: dict[str, npt.NDArray[Any]] | None = None) -> bytes:
    arrays = {name: np.asarray(array, order="C") for name, array in (arrays or {}).items()}
    described = [[name, str(a.dtype), a.shape] for name, a in arrays.items()]
    header = json.dumps({"content": content, "arrays": described}).encode()
    return b"".join([_LENGTH.pack(len(header)), header, *(a.tobytes() for a in arrays.values())])


class Channel:
    """Messages over one end of a link, in both directions."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def fileno(self) -> int:
        return self._link.fileno()

    def close(self) -> None:
        self._link.close()

    def round_trip(self) -> float:
        """See `Link.round_trip`."""
        return self._link.round_trip()

    def send(
        self,
        content: dict[str, Any],
        arrays: dict[str, npt.NDArray[Any]] | None = None,
        seconds: float | None = None,
    ) -> None:
        """Send a message: an object of JSON values, and arrays by name. See `Link.send`."""
        self._link.send(encode(content, arrays), seconds)

    def receive(self) -> Message:
        """Wait for the next message. See `Link.receive`."""
        return decode(self._link.receive())

    def arrived(self) -> Message | None:
        """The next message if all of it has arrived. See `Link.arrived`."""
        found = self._link.arrived()
        return None if found is None else decode(found)


def decode(message: bytes) -> Message:
    """The message of these bytes.

    Raises:
        WireError: they are none.
    """
    try:
        (of_header,) = _LENGTH.unpack_from(message)
        if of_header > min(_MAX_HEADER, len(message) - _LENGTH.size):
            raise WireError(f"a message must have at most {_MAX_HEADER} bytes of header, all there")
        data = message[_LENGTH.size + of_header :]
        document = json.loads(message[_LENGTH.size : _LENGTH.size + of_header])
        content, described = document["content"], document["arrays"]
        if not isinstance(content, dict):
            raise WireError(f"a message must hold an object, got a {type(content).__name__}")
        if len(described) > _MAX_ARRAY_COUNT:
            raise WireError(f"a message must have at most {_MAX_ARRAY_COUNT} arrays")
        arrays: dict[str, npt.NDArray[Any]] = {}
        offset = 0
        for name, dtype, shape in described:
            arrays[_name(name)] = array = _array(dtype, shape, data, offset)
            offset += array.nbytes
        if offset != len(data):
            raise WireError(f"the arrays of a message must fill it, got {offset} of {len(data)}")
    except WireError:
        raise
    except (struct.error, ValueError, TypeError, KeyError, RecursionError) as error:
        raise WireError(f"not a message: {type(error).__name__}: {error}"[:200]) from error
    return Message(content, arrays)


def _name(name: Any) -> str:
    if not isinstance(name, str):
        raise WireError(f"the name of an array must be a string, got a {type(name).__name__}")
    return name


def _array(dtype: Any, shape: Any, data: bytes, offset: int) -> npt.NDArray[Any]:
    if dtype not in _DTYPES:
        raise WireError(f"a message must hold arrays of {', '.join(_DTYPES)}, got {dtype!r}"[:200])
    if not isinstance(shape, list) or len(shape) > 32:
        raise WireError("a shape must be a list of at most 32 lengths")
    if not all(type(n) is int and 0 <= n <= _MAX_DIMENSION for n in shape):
        raise WireError(f"a shape must have lengths of 0 to {_MAX_DIMENSION}, got {shape}"[:200])
    count = math.prod(shape)
    if count * np.dtype(dtype).itemsize > len(data) - offset:
        raise WireError("an array ends after the message")
    return np.frombuffer(data, dtype, count, offset).reshape(shape)
