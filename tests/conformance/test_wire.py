"""Whatever arrives: messages in pieces, bytes that are no message, and strangers who connect."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from syncbn.conformance import runner, targets, wire
from syncbn.conformance.case import Case, Step
from syncbn.conformance.pool import RankPool
from syncbn.conformance.wire import Message
from syncbn.launchers import handshake
from syncbn.launchers.handshake import HandshakeError, Reception
from syncbn.launchers.link import Link, Opener, Seal, WireError

UNRULY = "torch:tests/conformance/unruly.py:Unruly"
KEY = b"k" * 32
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


def sealed(messages: list[bytes], key: bytes = KEY) -> list[bytes]:
    """What a link sends: each message with its length and its proof."""
    seal = Seal(key)
    lengths = [struct.pack("<Q", len(message)) for message in messages]
    pairs = zip(lengths, messages, strict=True)
    return [length + message + seal.next(length, message) for length, message in pairs]


def opened(sent: bytes, key: bytes = KEY) -> list[bytes]:
    opener = Opener(Seal(key))
    opener.feed(sent)
    return list(iter(opener.next, None))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=20))
def test_messages_arrive_in_pieces_of_any_size(sizes: list[int]) -> None:
    sent = [Message({"n": n, "text": "\ud800\0"}, ARRAYS) for n in range(3)]
    rest = b"".join(sealed([wire.encode(*message) for message in sent]))
    opener, found, turn = Opener(Seal(KEY)), [], 0
    while rest:
        size, turn = sizes[turn % len(sizes)], turn + 1
        opener.feed(rest[:size])
        rest = rest[size:]
        while (message := opener.next()) is not None:
            found.append(wire.decode(message))
    assert all(map(same, found, sent))
    assert len(found) == 3


def change(parts: list[bytes]) -> list[bytes]:
    return [parts[0], parts[1].replace(b"pay 10", b"pay 99"), parts[2]]


@pytest.mark.parametrize(
    "tamper",
    [
        pytest.param(change, id="changed"),
        pytest.param(lambda parts: [parts[0], parts[0]], id="repeated"),
        pytest.param(lambda parts: [parts[1], parts[0], parts[2]], id="in another order"),
        pytest.param(lambda parts: [parts[0], parts[2]], id="left out"),
        pytest.param(lambda parts: [parts[0], parts[1][:-1] + b"?"], id="another proof"),
        pytest.param(lambda parts: [parts[0], b"\x01" + bytes(7) + parts[1][8:]], id="shortened"),
        pytest.param(lambda _: sealed([b"pay 10"], b"w" * 32), id="of another key"),
    ],
)
def test_what_was_tampered_with_is_refused(
    tamper: Callable[[list[bytes]], list[bytes]],
) -> None:
    sent = sealed([b"first", b"pay 10", b"last"])
    assert opened(b"".join(sent)) == [b"first", b"pay 10", b"last"]
    with pytest.raises(WireError, match="its proof is wrong"):
        opened(b"".join(tamper(sent)))


def test_a_length_beyond_the_limit_is_refused_before_the_bytes_arrive() -> None:
    with pytest.raises(WireError, match=r"at most 536870912 bytes, got 536870913"):
        opened(struct.pack("<Q", (512 << 20) + 1))


def test_a_message_belongs_to_one_direction_of_one_connection() -> None:
    with Reception(2, KEY) as reception, ThreadPoolExecutor(2) as threads:
        calls = [threads.submit(handshake.connect, reception.address, KEY, rank) for rank in (0, 1)]
        links = reception.gather(30.0, lambda _: None)
        ranks = [call.result() for call in calls]
    links[0].send(b"to rank 0")
    frame = os.read(ranks[0].fileno(), 1000)
    os.write(ranks[0].fileno(), frame)  # back to its sender
    os.write(links[1].fileno(), frame)  # to another rank
    for refuses in (links[0], ranks[1]):
        with pytest.raises(WireError, match="its proof is wrong"):
            refuses.receive()
    os.write(links[0].fileno(), frame)  # where it belongs
    assert ranks[0].receive() == b"to rank 0"
    for link in (*links.values(), *ranks):
        link.close()


def header(content: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<I", len(content)) + content + data


@pytest.mark.parametrize(
    "message",
    [
        b"",
        struct.pack("<I", 2**32 - 1),
        struct.pack("<I", 3) + b"{}",
        header(b""),
        header(b"\xff\xfe"),
        header(b"[]"),
        header(b"null"),
        header(b"[" * 100_000),
        header(b'{"content": 1, "arrays": []}'),
        header(b'{"content": {}}'),
        header(b'{"content": {}, "arrays": 3}'),
        header(b'{"content": {}, "arrays": [["a", "float32", [2]]]}', b"\0" * 7),
        header(b'{"content": {}, "arrays": [["a", "float32", [2]]]}', b"\0" * 9),
        header(b'{"content": {}, "arrays": [["a", "float32", [-2]]]}', b"\0" * 8),
        header(b'{"content": {}, "arrays": [["a", "float32", [99999999, 99999999]]]}'),
        header(b'{"content": {}, "arrays": [["a", "float32", [0, 99999999999]]]}'),
        header(b'{"content": {}, "arrays": [["a", "float32", [true]]]}', b"\0" * 4),
        header(b'{"content": {}, "arrays": [["a", "object", [1]]]}', b"\0" * 8),
        header(b'{"content": {}, "arrays": [["a", [], [1]]]}', b"\0" * 8),
        header(b'{"content": {}, "arrays": [[[], "bool", [1]]]}', b"\0"),
        header(json.dumps({"content": {}, "arrays": [["a", "bool", [1] * 64]]}).encode(), b"\0"),
        header(json.dumps({"content": {}, "arrays": [["a", "bool", [0]]] * 10_001}).encode()),
        header(b'{"content": {"epoch": ' + b"9" * 5000 + b'}, "arrays": []}'),
    ],
)
def test_what_is_no_message_is_refused(message: bytes) -> None:
    with pytest.raises(WireError) as caught:
        wire.decode(message)
    assert len(str(caught.value)) < 300


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_messages_are_refused_or_are_messages(data: st.DataObject) -> None:
    """No other exception, whatever bytes arrive from a rank that proves them."""
    damage(data)


def damage(data: st.DataObject) -> None:
    """Decode a message with random damage."""
    message = bytearray(wire.encode({"epoch": 3, "steps": [{}]}, ARRAYS))
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, len(message)))
        message[at : at + data.draw(st.integers(0, 5))] = data.draw(st.binary(max_size=5))
    with contextlib.suppress(WireError):
        assert isinstance(wire.decode(bytes(message)).content, dict)


@pytest.fixture
def reception() -> Iterator[Reception]:
    with Reception(2, KEY) as found:
        yield found


def connects(reception: Reception, rank: int, key: bytes = KEY) -> threading.Thread:
    def connect() -> None:
        with contextlib.suppress(OSError, EOFError):
            link = handshake.connect(reception.address, key, rank)
            with contextlib.closing(link):
                link.receive()

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
        links = reception.gather(30.0, lambda _: None)
        assert sorted(links) == [0, 1]
        for link in links.values():
            link.send(b"the end")
            link.close()
    for thread in (*ranks, *others):
        thread.join(20)
        assert not thread.is_alive()
    for connection in (*silent, *loud):
        connection.close()


def test_a_rank_can_connect_only_once(reception: Reception) -> None:
    connects(reception, 0)
    connects(reception, 0)
    links = reception.gather(1.0, lambda _: None)
    assert list(links) == [0]
    links[0].close()


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
        link = Link(server.accept()[0], sends=KEY, receives=KEY)
        with pytest.raises(TimeoutError):
            link.send(bytes(10_000_000), seconds=0.2)
        link.close()
        client.close()


@pytest.mark.parametrize(
    ("channels", "text"),
    [
        (60, "rank 1 sent what is no message: its proof is wrong"),
        (61, "rank 1 sent what is no message: an answer must have the epoch"),
        (62, "rank 1 sent what is no message: a message must have at most"),
        (63, "rank 1 did not answer, and no rank did anything"),
        (64, "rank 1 sent what is no message: not a message: "),
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
        addresses = [
            one.split(":")[0] for pid in descendants(os.getpid()) for one in listening(pid)
        ]
    assert addresses != []
    assert set(addresses) <= {"0100007F", "00000000000000000000000001000000"}


def test_strangers_where_the_ranks_meet_cost_nothing() -> None:
    """The store of PyTorch takes whatever connects."""
    said = (b"", b"\x00\xff" * 500, b"GET / HTTP/1.1\r\n\r\n", bytes(8) + b"\xff" * 8)
    with RankPool(targets.parse("syncbn.torch"), 2) as pool:
        assert runner.run_case(pool, case(3)).verdict.verdict == "pass"
        places = {one for pid in descendants(os.getpid()) for one in listening(pid)}
        ports = [int(place.split(":")[1], 16) for place in places]
        strangers = [socket.create_connection(("127.0.0.1", port)) for port in ports for _ in said]
        assert strangers
        for connection, words in zip(strangers, len(ports) * said, strict=True):
            connection.sendall(words)
        for connection in strangers[::2]:
            connection.close()
        for _ in range(2):
            pool._must_rejoin = True
            assert runner.run_case(pool, case(3)).verdict.verdict == "pass"
        assert pool.restarts == []
        for connection in strangers:
            connection.close()


def descendants(pid: int) -> list[int]:
    children = [
        int(child)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for child in (task / "children").read_text().split()
    ]
    return [*children, *(below for child in children for below in descendants(child))]


def listening(pid: int) -> list[str]:
    """ADDRESS:PORT where a process listens, in hexadecimal as the kernel shows them."""
    own = {os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir()}
    rows = [
        row.split()
        for table in ("tcp", "tcp6")
        for row in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]
    ]
    return [row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in own]
