"""How the ranks of a group fail together (ERR-9): what they send, and what the others read in it.

No framework is imported here. In the forward of a training step every rank sends one message by an
all_gather. It starts with a header of fixed length, whatever the rank's layer looks like: the mark,
the two words of the count, and the settings of the layer. A rank that fails before the all_gather
joins it with the mark FAIL, so that every rank raises and none waits. The texts of the errors are
sent by a second all_gather, which only a failing step pays.

A word is a number that float32 holds exactly, whatever the dtype of the message: a backend may pass
it through float32, and an empty rank does not use its backend.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

from syncbn.contract import FLOATING

# The mark of a rank: what it does after the all_gather.
NOTHING, BACKWARD, FAIL = 0, 1, 2

COUNT_WORD = 2**20  # a count below 2**44 is sent as two words, each exact in float32
ERROR_BYTES = 512  # of the text that a failing rank sends

_NONE = -1.0  # the word of a setting that a layer does not have


class PeerError(RuntimeError):
    """Another rank of the group failed in a step that all its ranks take together (ERR-9).

    The rank at fault raises its own error; every other rank raises this one, which names it.
    """


class Settings(NamedTuple):
    """What the layers of a group must have in common."""

    num_features: int
    eps: float
    momentum: float | None  # also None if no running statistics are kept
    dtype: str | None  # of the parameters or running statistics, by name
    affine: bool
    track_running_stats: bool
    backend: str


class Verdict(NamedTuple):
    """Which ranks of a group, by global id, keep it from taking the step."""

    failed: tuple[int, ...]
    idle: tuple[int, ...]  # have nothing to differentiate, while other ranks have


HEADER_WORDS = 3 + len(Settings._fields)
MARK, COUNT_HIGH, COUNT_LOW = range(3)  # places in the header; the settings follow


def header(mark: int, count: int, settings: Settings, backends: Sequence[str]) -> list[float]:
    """The first HEADER_WORDS words of a rank's message.

    Args:
        mark: NOTHING, BACKWARD or FAIL.
        count: values per channel of this rank, below 2**44.
        settings: of this rank's layer.
        backends: the names of all backends, in the same order on all ranks.
    """
    return [
        mark,
        *divmod(count, COUNT_WORD),
        settings.num_features,
        _in_float32(settings.eps),
        _NONE if settings.momentum is None else _in_float32(settings.momentum),
        _NONE if settings.dtype is None else FLOATING.index(settings.dtype),
        settings.affine,
        settings.track_running_stats,
        backends.index(settings.backend),
    ]


def _in_float32(value: float) -> float:
    return ctypes.c_float(value).value


def verdict(marks: Sequence[float], ranks: Sequence[int]) -> Verdict:
    """What the marks of all ranks say; `ranks` are their global ids in the same order."""
    failed = tuple(rank for rank, mark in zip(ranks, marks, strict=True) if mark == FAIL)
    idle = tuple(rank for rank, mark in zip(ranks, marks, strict=True) if mark == NOTHING)
    return Verdict(failed, idle if len(idle) < len(ranks) else ())


def encode_error(error: BaseException | None) -> bytes:
    """Type and text of an error in ERROR_BYTES bytes; zeros if there is none."""
    text = f"{type(error).__name__}: {error}" if error else ""
    return text.encode()[:ERROR_BYTES].ljust(ERROR_BYTES, b"\0")


def decode_error(encoded: bytes) -> str:
    """The text that `encode_error` put there; a character cut in two is left out."""
    return encoded.rstrip(b"\0").decode(errors="ignore")


def peer_error(failed: Sequence[int], texts: Sequence[str]) -> PeerError:
    """The error of a rank whose peers failed, with the text of each one's error."""
    return PeerError(
        "; ".join(f"rank {rank} failed: {text}" for rank, text in zip(failed, texts, strict=True))
    )


def nothing_to_differentiate(idle: Sequence[int]) -> str:
    """The text of the error in a group in which only some ranks will run a backward (GRAD-4)."""
    names = ", ".join(f"rank {rank}" for rank in idle)
    return (
        f"{names} {'has' if len(idle) == 1 else 'have'} nothing to differentiate (no gradient is "
        "wanted of input, weight or bias, or gradients are off), but other ranks of the group "
        "have: their backward would wait for ever"
    )


def disagreement(
    headers: Sequence[Sequence[float]], ranks: Sequence[int], backends: Sequence[str]
) -> str | None:
    """In which setting the layers of a group differ, and who has what; None if they agree.

    Args:
        headers: one of HEADER_WORDS words for each rank.
        ranks: their global ids in the same order.
        backends: as given to `header`.
    """
    for place, name in enumerate(Settings._fields, start=COUNT_LOW + 1):
        words = [row[place] for row in headers]
        if len(set(words)) > 1:
            holders: dict[float, list[str]] = {}
            for rank, word in zip(ranks, words, strict=True):
                holders.setdefault(word, []).append(f"rank {rank}")
            found = "; ".join(
                f"{_shown(name, word, backends)} on {', '.join(names)}"
                for word, names in holders.items()
            )
            return f"the layers of a group must have the same {name} on all ranks, got {found}"
    return None


def _shown(setting: str, word: float, backends: Sequence[str]) -> str:
    """The value that a word of the header stands for."""
    names = {"dtype": FLOATING, "backend": backends}.get(setting)
    if word == _NONE:
        return "None"
    if names is not None:
        return names[int(word)]
    if setting in ("affine", "track_running_stats"):
        return str(bool(word))
    return f"{word:.7g}"
