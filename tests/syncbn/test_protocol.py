"""The messages by which the ranks of a group fail together: what is encoded, decoded and said."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import syncbn
from syncbn import protocol
from syncbn.protocol import BACKWARD, FAIL, NOTHING, Settings

BACKENDS = ("composed", "aten")
SETTINGS = Settings(
    num_features=4,
    eps=1e-5,
    momentum=0.1,
    dtype="float32",
    affine=True,
    track_running_stats=True,
    backend="composed",
)
OTHER: dict[str, Any] = {
    "num_features": 8,
    "eps": 1e-3,
    "momentum": None,
    "dtype": "bfloat16",
    "affine": False,
    "track_running_stats": False,
    "backend": "aten",
}


def header_of(**changed: Any) -> list[float]:
    return protocol.header(BACKWARD, 0, SETTINGS._replace(**changed), BACKENDS)


@pytest.mark.parametrize("count", [0, 1, 2**20 - 1, 2**24 + 1, 2**44 - 1])
def test_a_header_survives_float32(count: int) -> None:
    sent = protocol.header(FAIL, count, SETTINGS, BACKENDS)
    assert len(sent) == protocol.HEADER_WORDS
    got = [int(word) for word in np.array(sent, np.float32)[:3]]
    assert got[protocol.MARK] == FAIL
    words = got[protocol.COUNT_HIGH], got[protocol.COUNT_LOW]
    assert words[0] * protocol.COUNT_WORD + words[1] == count


@pytest.mark.parametrize(
    ("marks", "failed", "idle"),
    [
        ([BACKWARD, BACKWARD, BACKWARD], (), ()),
        ([NOTHING, NOTHING, NOTHING], (), ()),
        ([NOTHING, BACKWARD, NOTHING], (), (5, 3)),
        ([FAIL, BACKWARD, FAIL], (5, 3), ()),
        ([BACKWARD, FAIL, NOTHING], (7,), (3,)),
    ],
)
def test_verdict(marks: list[int], failed: tuple[int, ...], idle: tuple[int, ...]) -> None:
    assert protocol.verdict(marks, (5, 7, 3)) == (failed, idle)


class TestErrors:
    @pytest.mark.parametrize("text", ["", "short", "ü" * 600, "x" * 511 + "ü"])
    def test_encoded(self, text: str) -> None:
        encoded = protocol.encode_error(ValueError(text))
        assert len(encoded) == protocol.ERROR_BYTES
        got = protocol.decode_error(encoded)
        assert f"ValueError: {text}".startswith(got)
        assert len(got.encode()) >= min(len(f"ValueError: {text}".encode()), 511)

    def test_no_error(self) -> None:
        encoded = protocol.encode_error(None)
        assert encoded == b"\0" * protocol.ERROR_BYTES
        assert protocol.decode_error(encoded) == ""

    def test_peer_error(self) -> None:
        error = protocol.peer_error([1, 4], ["ValueError: no", "TypeError: nor"])
        assert str(error) == "rank 1 failed: ValueError: no; rank 4 failed: TypeError: nor"
        assert isinstance(error, RuntimeError)
        assert syncbn.PeerError is protocol.PeerError is type(error)

    @pytest.mark.parametrize(
        ("idle", "start"), [([2], "rank 2 has nothing"), ([0, 2], "rank 0, rank 2 have nothing")]
    )
    def test_nothing_to_differentiate(self, idle: list[int], start: str) -> None:
        assert protocol.nothing_to_differentiate(idle).startswith(start)


class TestDisagreement:
    def test_none(self) -> None:
        assert protocol.disagreement([header_of()] * 3, (0, 1, 2), BACKENDS) is None

    @pytest.mark.parametrize("name", Settings._fields)
    def test_names_the_setting_the_ranks_and_their_values(self, name: str) -> None:
        rows = [header_of(), header_of(**{name: OTHER[name]}), header_of()]
        for dtype in (np.float64, np.float32):
            headers = np.array(rows, dtype).tolist()
            text = protocol.disagreement(headers, (0, 3, 4), BACKENDS)
            first, second = getattr(SETTINGS, name), OTHER[name]
            assert text == (
                f"the layers of a group must have the same {name} on all ranks, "
                f"got {first} on rank 0, rank 4; {second} on rank 3"
            )

    def test_a_count_is_no_setting(self) -> None:
        headers = [protocol.header(mark, mark, SETTINGS, BACKENDS) for mark in range(3)]
        assert protocol.disagreement(headers, (0, 1, 2), BACKENDS) is None


def test_a_header_stays_the_same_in_float32() -> None:
    """A rank whose backend sends float32 agrees with one that sends float64."""
    settings = protocol.Settings(3, 1e-5, 0.1, "float32", True, True, "composed")
    words = protocol.header(protocol.BACKWARD, 2**21 + 1, settings, ["composed"])
    assert [float(np.float32(word)) for word in words] == words
    assert protocol.header(0, 1, settings._replace(eps=1e300), ["composed"])[4] == float("inf")
