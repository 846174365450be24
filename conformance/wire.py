"""Messages between controller and ranks: JSON and arrays over a connection, never pickle.

A message is one JSON object and named arrays. Its bytes are the length of the header (4 bytes,
little endian), the header (JSON: the object, and the name, dtype and shape of each array), and the
arrays.
"""

from __future__ import annotations

import json
import math
import struct
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

_DTYPES = ("float16", "float32", "float64", "int64", "bool")


class Message(NamedTuple):
    content: dict[str, Any]
    arrays: dict[str, npt.NDArray[Any]]


def send(
    connection: Connection,
    content: dict[str, Any],
    arrays: dict[str, npt.NDArray[Any]] | None = None,
) -> None:
    arrays = {name: np.asarray(array, order="C") for name, array in (arrays or {}).items()}
    described = [[name, str(a.dtype), a.shape] for name, a in arrays.items()]
    header = json.dumps({"content": content, "arrays": described}).encode()
    parts = [struct.pack("<I", len(header)), header, *(a.tobytes() for a in arrays.values())]
    connection.send_bytes(b"".join(parts))


def receive(connection: Connection) -> Message:
    """The next message; EOFError or OSError if the other side is gone."""
    data = connection.recv_bytes()
    (length,) = struct.unpack_from("<I", data)
    header = json.loads(data[4 : 4 + length])
    arrays, offset = {}, 4 + length
    for name, dtype, shape in header["arrays"]:
        if dtype not in _DTYPES:
            raise ValueError(f"a message must hold arrays of {', '.join(_DTYPES)}, got {dtype}")
        count = math.prod(shape)
        arrays[name] = np.frombuffer(data, dtype, count, offset).reshape(shape)
        offset += arrays[name].nbytes
    return Message(header["content"], arrays)
