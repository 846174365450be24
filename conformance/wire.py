"""Messages between controller and ranks: JSON and arrays over a socket, never pickle.

A message is one JSON object and named arrays. Its bytes are the lengths of the header (4 bytes,
little endian) and of the arrays (8 bytes), the header (JSON: the object, and the name, dtype and
shape of each array), and the arrays.

A layer shares its process with the rank and can write to the connection, so any bytes may arrive.
Bytes that are no message, or that are longer than a message may be, are a WireError.
"""

from __future__ import annotations

import json
import math
import select
import socket
import struct
import time
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

_LENGTHS = struct.Struct("<IQ")
_MAX_HEADER = 16 << 20  # bytes; that of a case with sweeps of shapes has some kilobytes
_MAX_ARRAYS = 512 << 20  # bytes; the largest answers have a few megabytes
_MAX_ARRAY_COUNT = 10_000
_PIECE = 1 << 18  # bytes that are read at once
_DTYPES = ("float16", "float32", "float64", "int64", "bool")


class WireError(ValueError):
    """Bytes that are no message."""


class Message(NamedTuple):
    content: dict[str, Any]
    arrays: dict[str, npt.NDArray[Any]]


def encode(content: dict[str, Any], arrays: dict[str, npt.NDArray[Any]] | None = None) -> bytes:
    arrays = {name: np.asarray(array, order="C") for name, array in (arrays or {}).items()}
    described = [[name, str(a.dtype), a.shape] for name, a in arrays.items()]
    header = json.dumps({"content": content, "arrays": described}).encode()
    lengths = _LENGTHS.pack(len(header), sum(a.nbytes for a in arrays.values()))
    return b"".join([lengths, header, *(a.tobytes() for a in arrays.values())])


class Decoder:
    """Messages from bytes that arrive in pieces of any size."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def feed(self, piece: bytes) -> None:
        self._bytes += piece

    def next(self) -> Message | None:
        """The next message; None until all of its bytes have arrived.

        Raises:
            WireError: the bytes are no message, whatever may follow.
        """
        if len(self._bytes) < _LENGTHS.size:
            return None
        of_header, of_arrays = _LENGTHS.unpack_from(self._bytes)
        if of_header > _MAX_HEADER or of_arrays > _MAX_ARRAYS:
            raise WireError(
                f"a message must have at most {_MAX_HEADER} bytes of header and {_MAX_ARRAYS} of "
                f"arrays, got {of_header} and {of_arrays}"
            )
        end = _LENGTHS.size + of_header + of_arrays
        if len(self._bytes) < end:
            return None
        header = bytes(self._bytes[_LENGTHS.size : _LENGTHS.size + of_header])
        arrays = bytes(self._bytes[_LENGTHS.size + of_header : end])
        del self._bytes[:end]
        return _decode(header, arrays)


class Channel:
    """One end of a connection. Messages travel in both directions."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._socket.setblocking(True)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._decoder = Decoder()

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def send(
        self,
        content: dict[str, Any],
        arrays: dict[str, npt.NDArray[Any]] | None = None,
        seconds: float | None = None,
    ) -> None:
        """Send a message.

        Args:
            content: the object, of JSON values.
            arrays: the arrays by name.
            seconds: the time in which the other side must take all bytes; None for any time.

        Raises:
            TimeoutError: the other side did not take all bytes.
            OSError: the other side is gone.
        """
        rest = memoryview(encode(content, arrays))
        end = None if seconds is None else time.monotonic() + seconds
        flags = 0 if end is None else socket.MSG_DONTWAIT
        while rest:
            try:
                rest = rest[self._socket.send(rest, flags) :]
            except BlockingIOError:
                left = 0.0 if end is None else end - time.monotonic()
                if left <= 0 or not select.select([], [self], [], left)[1]:
                    raise TimeoutError(f"{len(rest)} bytes of a message were not taken") from None

    def receive(self) -> Message:
        """Wait for the next message.

        Raises:
            EOFError, OSError: the other side is gone.
            WireError: what arrived is no message.
        """
        while (message := self._decoder.next()) is None:
            self._read(0)
        return message

    def arrived(self) -> Message | None:
        """The next message if all of it has arrived. It never waits.

        Raises:
            EOFError, OSError: the other side is gone.
            WireError: what arrived is no message.
        """
        message = self._decoder.next()
        if message is None:
            try:
                self._read(socket.MSG_DONTWAIT)
            except BlockingIOError:
                return None
            message = self._decoder.next()
        return message

    def _read(self, flags: int) -> None:
        piece = self._socket.recv(_PIECE, flags)
        if not piece:
            raise EOFError("the connection was closed")
        self._decoder.feed(piece)


def _decode(header: bytes, data: bytes) -> Message:
    try:
        document = json.loads(header)
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
    except (ValueError, TypeError, KeyError, RecursionError) as error:
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
    if not all(type(n) is int and 0 <= n <= _MAX_ARRAYS for n in shape):
        raise WireError(f"a shape must have lengths of 0 to {_MAX_ARRAYS}, got {shape}"[:200])
    count = math.prod(shape)
    if count * np.dtype(dtype).itemsize > len(data) - offset:
        raise WireError("an array ends after the message")
    return np.frombuffer(data, dtype, count, offset).reshape(shape)
