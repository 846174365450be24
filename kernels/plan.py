"""How the work of a kernel is divided: the size of a tile, the parts, the grid."""

from __future__ import annotations

from typing import NamedTuple

# Values in a tile. Arithmetic is float32 for every dtype of the data, so one size serves all.
# Ascend: with larger tiles, some kernels do not fit twice (double buffering) into 192 KiB on chip;
# `python -m audit kernels check` measures it. CUDA: half of that, not tuned on a device.
TILE = {"ascend": 4096, "cuda": 2048}

# Values in a row of a tile. There are few widths, because each one costs compilations; images of
# 7, 14, 28, 56 and 112 pixels square fill at least three quarters of a width.
WIDTHS = (16, 64, 256, 1024)
_ROWS = 16  # the fewest rows of a tile in the layout `columns`: _RUN of batch_norm.py

CHANNELS = 128  # channels that a program of `combine` takes at a time

# Items per program. With several, the last round of a grid costs little. A reduction has one,
# because its parts must be merged afterwards.
_ROUNDS = 4
_ROUNDS_OF_REDUCTION = 1

_LARGEST_GRID = 65535  # Ascend's limit


class Tiles(NamedTuple):
    """The tile that a kernel is compiled for."""

    columns: bool  # the layout, see batch_norm.py
    block_r: int  # rows
    block: int  # values in a row


class Plan(NamedTuple):
    """How the work of one launch is divided."""

    tiles: Tiles
    per_part: int  # tiles in a part
    parts: int  # of each channel or block of channels
    programs: int  # the size of the grid


def plan(shape: tuple[int, int, int], target: str, cores: int, reduction: bool) -> Plan:
    """How to divide the work on x.

    Args:
        shape: (R, C, S) of x, each at least 1.
        target: "ascend" or "cuda".
        cores: the number of programs that the device runs at a time.
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
    """Every tile that `plan` may choose."""
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
