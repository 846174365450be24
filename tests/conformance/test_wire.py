"""Whatever arrives: messages in pieces, bytes that are no message, and strangers who connect."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from syncbn.conformance import handshake, runner, targets, wire
from syncbn.conformance.case import Case, Step
from syncbn.conformance.handshake import HandshakeError, Reception
from syncbn.conformance.pool import RankPool
from syncbn.conformance.wire import Channel, Decoder, Message, WireError

UNRULY = "torch:tests/conformance/unruly.py:Unruly"
KEY = b"k" * 32
LENGTHS = struct.Struct("<IQ")
ARRAYS: dict[str, npt.NDArray[Any]] = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "none": np.zeros((0, 4), np.int64),
    "one": np.float64(2.5) * np.ones(()),
    "yes": np.array([True, False]),
}


def case(channels: int) -> Case:
    step = Step(((2, channels, 3), (3, channels, 3)), backward=False)
    return Case("FWD-1", f"{channels}", 2, {"num_features": channels}, (step,), ("y",))


def same(one: Message, other: Message) -> bool:
    def parts(message: Message) -> Any:
        arrays = {n: (a.dtype, a.shape, a.tobytes()) for n, a in message.arrays.items()}
        return message.content, arrays

    return bool(parts(one) == parts(other))


def framed(header: bytes, data: bytes = b"") -> bytes:
    return LENGTHS.pack(len(header), len(data)) + header + data


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=20))
def test_messages_arrive_in_pieces_of_any_size(sizes: list[int]) -> None:
    sent = [Message({"n": n, "text": "\ud800\0"}, ARRAYS) for n in range(3)]
    rest = b"".join(wire.encode(*message) for message in sent)
    decoder, found, turn = Decoder(), [], 0
    while rest:
        size, turn = sizes[turn % len(sizes)], turn + 1
        decoder.feed(rest[:size])
        rest = rest[size:]
        while (message := decoder.next()) is not None:
            found.append(message)
    assert all(map(same, found, sent))
    assert len(found) == 3


@pytest.mark.parametrize(
    "frame",
    [
        LENGTHS.pack(2**32 - 1, 0),
        LENGTHS.pack(2, 2**64 - 1),
        framed(b""),
        framed(b"\xff\xfe"),
        framed(b"[]"),
        framed(b"null"),
        framed(b"[" * 100_000),
        framed(b'{"content": 1, "arrays": []}'),
        framed(b'{"content": {}}'),
        framed(b'{"content": {}, "arrays": 3}'),
        framed(b'{"content": {}, "arrays": [["a", "float32", [2]]]}', b"\0" * 7),
        framed(b'{"content": {}, "arrays": [["a", "float32", [2]]]}', b"\0" * 9),
        framed(b'{"content": {}, "arrays": [["a", "float32", [-2]]]}', b"\0" * 8),
        framed(b'{"content": {}, "arrays": [["a", "float32", [99999999, 99999999]]]}'),
        framed(b'{"content": {}, "arrays": [["a", "float32", [0, 99999999999]]]}'),
        framed(b'{"content": {}, "arrays": [["a", "float32", [true]]]}', b"\0" * 4),
        framed(b'{"content": {}, "arrays": [["a", "object", [1]]]}', b"\0" * 8),
        framed(b'{"content": {}, "arrays": [["a", [], [1]]]}', b"\0" * 8),
        framed(b'{"content": {}, "arrays": [[[], "bool", [1]]]}', b"\0"),
        framed(json.dumps({"content": {}, "arrays": [["a", "bool", [1] * 64]]}).encode(), b"\0"),
        framed(json.dumps({"content": {}, "arrays": [["a", "bool", [0]]] * 10_001}).encode()),
        framed(b'{"content": {"epoch": ' + b"9" * 5000 + b'}, "arrays": []}'),
    ],
)
def test_what_is_no_message_is_refused(frame: bytes) -> None:
    decoder = Decoder()
    decoder.feed(frame)
    with pytest.raises(WireError) as caught:
        decoder.next()
    assert len(str(caught.value)) < 300


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_messages_are_refused_or_are_messages(data: st.DataObject) -> None:
    """No other exception, whatever bytes arrive."""
    damage(data)


def damage(data: st.DataObject) -> None:
    """Feed a message with random damage to a decoder."""
    frame = bytearray(wire.encode({"epoch": 3, "steps": [{}]}, ARRAYS))
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, len(frame)))
        frame[at : at + data.draw(st.integers(0, 5))] = data.draw(st.binary(max_size=5))
    decoder = Decoder()
    with contextlib.suppress(WireError):
        for start in range(0, len(frame), 7):
            decoder.feed(bytes(frame[start : start + 7]))
            while (message := decoder.next()) is not None:
                assert isinstance(message.content, dict)


@pytest.fixture
def reception() -> Iterator[Reception]:
    with Reception(2, KEY) as found:
        yield found


def connects(reception: Reception, rank: int, key: bytes = KEY) -> threading.Thread:
    def connect() -> None:
        with contextlib.suppress(OSError, EOFError):
            channel = handshake.connect(reception.address, key, rank)
            with contextlib.closing(channel):
                channel.receive()

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    return thread


def stranger(reception: Reception, sends: bytes = b"") -> socket.socket:
    host, port = reception.address.split(":")
    connection = socket.create_connection((host, int(port)))
    with contextlib.suppress(OSError):
        connection.sendall(sends)
    return connection


def test_strangers_delay_no_rank() -> None:
    with Reception(2, KEY) as reception:
        silent = [stranger(reception) for _ in range(150)]
        loud = [stranger(reception, bytes([n]) * 1000) for n in range(20)]
        stranger(reception).close()
        others = [connects(reception, 0, b"w" * 32), connects(reception, 2)]
        ranks = [connects(reception, rank) for rank in (1, 0)]
        channels = reception.gather(30.0, lambda _: None)
        assert sorted(channels) == [0, 1]
        for channel in channels.values():
            channel.send({"do": "end"})
            channel.close()
    for thread in (*ranks, *others):
        thread.join(20)
        assert not thread.is_alive()
    for connection in (*silent, *loud):
        connection.close()


def test_a_rank_can_connect_only_once(reception: Reception) -> None:
    connects(reception, 0)
    connects(reception, 0)
    channels = reception.gather(1.0, lambda _: None)
    assert list(channels) == [0]
    channels[0].close()


def test_a_rank_refuses_what_is_not_its_controller() -> None:
    with socket.create_server(("127.0.0.1", 0)) as impostor:

        def answer() -> None:
            connection, _ = impostor.accept()
            with connection:
                connection.sendall(b"n" * 32)
                connection.recv(1000)
                connection.sendall(b"p" * 32)

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(HandshakeError, match="does not have the key"):
            handshake.connect(f"127.0.0.1:{impostor.getsockname()[1]}", KEY, 0)


def test_a_peer_that_takes_nothing_costs_a_time_out() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        channel = Channel(server.accept()[0])
        with pytest.raises(TimeoutError):
            channel.send({}, {"a": np.zeros(10_000_000, bool)}, seconds=0.2)
        channel.close()
        client.close()


@pytest.mark.parametrize(
    ("channels", "text"),
    [
        (60, "rank 1 sent what is no message: not a message: "),
        (61, "rank 1 sent what is no message: an answer must have the epoch"),
        (62, "rank 1 sent what is no message: a message must have at most"),
        (63, "rank 1 did not answer, and no rank did anything"),
    ],
)
def test_garbage_from_a_rank_costs_one_case(channels: int, text: str) -> None:
    with RankPool(targets.parse(UNRULY), 2) as pool:
        found = runner.run_case(pool, case(channels)).verdict
        assert found.verdict == ("hang" if channels == 63 else "crash")
        assert text in str(found.message)
        assert runner.run_case(pool, case(3)).verdict.verdict == "pass"


@pytest.mark.parametrize("framework", ["torch", "mindspore"])
def test_ranks_listen_on_loop_back_only(framework: str) -> None:
    pytest.importorskip(framework, reason=f"{framework} is not installed")
    with RankPool(targets.parse(f"syncbn.{framework}"), 2) as pool:
        assert runner.run_case(pool, case(3)).verdict.verdict == "pass"
        addresses = [address for pid in descendants(os.getpid()) for address in listening(pid)]
    assert addresses != []
    assert set(addresses) <= {"0100007F", "00000000000000000000000001000000"}


def descendants(pid: int) -> list[int]:
    children = [
        int(child)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for child in (task / "children").read_text().split()
    ]
    return [*children, *(below for child in children for below in descendants(child))]


def listening(pid: int) -> list[str]:
    """The addresses on which a process listens, in hexadecimal as the kernel shows them."""
    own = {os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir()}
    rows = [
        row.split()
        for table in ("tcp", "tcp6")
        for row in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]
    ]
    return [row[1].split(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in own]
