"""How the kernels cut their work: the size of a tile, and who takes which."""

from __future__ import annotations

from typing import NamedTuple

# Values in a tile. Arithmetic is float32 whatever the dtype of the data, so the size is one for
# all. Ascend: with more, not every kernel fits twice (double buffering) into 192 KiB on chip;
# `check` of this package measures it. CUDA: half of it, not tuned on a device.
TILE = {"ascend": 4096, "cuda": 2048}

# Values side by side in a tile. A few sizes are enough, for each costs compilations; images of
# 7, 14, 28, 56 and 112 pixels square fill at least three quarters of one.
WIDTHS = (16, 64, 256, 1024)
_ROWS = 16  # that a tile of channels has at least, to add them up

CHANNELS = 128  # that a program of `combine` takes at a time

# Items for each program, so that the last round of a grid costs little. A reduction has fewer, for
# its parts are merged afterwards.
_ROUNDS = 4
_ROUNDS_OF_REDUCTION = 1

_LARGEST_GRID = 65535  # of Ascend


class Tiles(NamedTuple):
    """What a kernel is compiled for: how a tile is laid (see `leaf`), its rows and its width."""

    columns: bool
    block_r: int
    block: int


class Plan(NamedTuple):
    """Tiles, how many of them make a part, how many parts there are, and the grid."""

    tiles: Tiles
    per_part: int
    parts: int
    programs: int


def plan(shape: tuple[int, int, int], target: str, cores: int, reduction: bool) -> Plan:
    """How to cut x of shape (R, C, S), with R, C, S >= 1.

    Args:
        target: "ascend" or "cuda".
        cores: how many programs the device runs at a time.
        reduction: whether each part gives numbers that must be merged.
    """
    rows, channels, spatial = shape
    columns = spatial == 1
    width = _width(channels if columns else spatial, _widest(columns, target))
    tiles = Tiles(columns, TILE[target] // width, width)
    if columns:
        blocks, count = _ceil(channels, width), _ceil(rows, tiles.block_r)
    else:
        blocks, count = channels, _ceil(rows, tiles.block_r) * _ceil(spatial, width)
    items = cores * (_ROUNDS_OF_REDUCTION if reduction else _ROUNDS)
    per_part = _ceil(count, min(count, _ceil(items, blocks)))
    parts = _ceil(count, per_part)
    return Plan(tiles, per_part, parts, min(blocks * parts, cores, _LARGEST_GRID))


def all_tiles(target: str) -> list[Tiles]:
    """Every kind of tile that `plan` may ask for."""
    return [
        Tiles(columns, TILE[target] // width, width)
        for columns in (False, True)
        for width in WIDTHS
        if width <= _widest(columns, target)
    ]


def _widest(columns: bool, target: str) -> int:
    return max(w for w in WIDTHS if w <= TILE[target] // _ROWS) if columns else WIDTHS[-1]


def _width(values: int, widest: int) -> int:
    return next((width for width in WIDTHS if values <= width <= widest), widest)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
