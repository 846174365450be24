"""How the work of a kernel is divided: the size of a tile, the parts, the grid."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

# Values in a tile. Arithmetic is float32 for every dtype of the data, so one size serves all.
# Ascend: with larger tiles, some kernels do not fit twice (double buffering) into 192 KiB on chip;
# `python -m audit kernels check` measures it. CUDA: half of that; on an H100, twice as many make
# small images slower and large ones no faster (docs/cuda.md).
TILE = {"ascend": 4096, "cuda": 2048}

# Warps of a program on CUDA, by whether the layout is columns. There a sum crosses warps, which is
# slow: on an H100, `stats` of large images takes 1.6 (float32) to 2.3 (bfloat16) times as long by 4
# warps as by 2, while planes are as fast by either.
WARPS = {False: 4, True: 2}

# Values in a row of a tile. There are few widths, because each one costs compilations; images of
# 7, 14, 28, 56 and 112 pixels square fill at least three quarters of a width.
WIDTHS = (16, 64, 256, 1024)
_ROWS = 16  # the fewest rows of a tile in the layout `columns`: _RUN of batch_norm.py

CHANNELS = 128  # channels that a program of the kernels for messages takes at a time

_LONGEST_PART = 256  # tiles: _RUN runs of _RUN tiles
_MOST_ROUNDS = 8  # parts that a program takes, unless there are more blocks of channels
_BUSY = 0.9  # the share of the programs' time that should go into tiles

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


@functools.lru_cache(maxsize=4096)
def plan(shape: tuple[int, int, int], target: str, cores: int) -> Plan:
    """How to divide the work on x: in the fewest parts that keep the programs busy.

    A reduction gives numbers of each part, which must be merged. All kernels have the same parts,
    so that one can begin where the one before it ended.

    Args:
        shape: (R, C, S) of x, each at least 1.
        target: "ascend" or "cuda".
        cores: the number of programs that the device runs at a time.
    """
    rows, channels, spatial = shape
    columns = spatial == 1
    width = _width(channels if columns else spatial, _widest(columns, target))
    tiles = Tiles(columns, TILE[target] // width, width)
    if columns:
        blocks, count = _ceil(channels, width), _ceil(rows, tiles.block_r)
    else:
        blocks, count = channels, _ceil(rows, tiles.block_r) * _ceil(spatial, width)
    programs = min(cores, _LARGEST_GRID)
    per_part = _tiles_per_part(blocks, count, programs)
    parts = _ceil(count, per_part)
    return Plan(tiles, per_part, parts, min(blocks * parts, programs))


def _tiles_per_part(blocks: int, count: int, programs: int) -> int:
    """How many of the `count` tiles of a block make a part."""
    fewest = _ceil(count, _LONGEST_PART)
    best, shortest = count, math.inf
    for rounds in range(_MOST_ROUNDS + 1):
        per_part = _ceil(count, min(count, max(fewest, rounds * programs // blocks)))
        # Tiles that the busiest program takes, one after the other.
        longest = _ceil(blocks * _ceil(count, per_part), programs) * per_part
        if longest < shortest:
            best, shortest = per_part, longest
        if blocks * count >= _BUSY * shortest * programs:
            break
    return best


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
