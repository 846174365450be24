"""The variants of the kernels: every form in which `Operations` may launch one."""

from __future__ import annotations

from typing import Any, NamedTuple

from syncbn.kernels.plan import CHANNELS, Tiles, all_tiles

DTYPES = ("fp32", "fp16", "bf16")  # of the data, in Triton's spelling
LAYOUTS = ("planes", "columns")
TILED = ("stats", "normalize", "reduce_grad", "input_grad")

_DATA = ("x_ptr", "dy_ptr", "y_ptr", "dx_ptr")


class Variant(NamedTuple):
    """A kernel that is compiled for one tile and one dtype."""

    kernel: str  # its name in batch_norm.py
    tiles: Tiles | None  # None for `combine`
    dtype: str  # of the data, one of DTYPES

    @property
    def layout(self) -> str:
        """One of LAYOUTS, or "channels" for `combine`."""
        if self.tiles is None:
            return "channels"
        return LAYOUTS[self.tiles.columns]

    @property
    def symbol(self) -> str:
        """A name that no other variant has: that of its function in the twin's library."""
        size = "" if self.tiles is None else f"_{self.tiles.block_r}x{self.tiles.block}"
        return f"{self.kernel}_{self.layout}{size}_{self.dtype}"

    @property
    def constants(self) -> dict[str, Any]:
        """The values of the kernel's constexpr arguments."""
        if self.tiles is None:
            return {"BLOCK": CHANNELS}
        columns, block_r, block = self.tiles
        return {"COLUMNS": columns, "BLOCK_R": block_r, "BLOCK": block}

    def signature(self, argument_names: list[str]) -> dict[str, str]:
        """Triton's type of every argument that is not constexpr."""
        return {name: self._type(name) for name in argument_names if name not in self.constants}

    def _type(self, name: str) -> str:
        if name in _DATA:
            return "*" + self.dtype
        if name.endswith("_ptr"):
            return "*fp32"
        return "fp32" if name == "eps" else "i32"


def variants(target: str) -> list[Variant]:
    """All variants for a target of `plan`."""
    tiled = [
        Variant(kernel, tiles, dtype)
        for kernel in TILED
        for tiles in all_tiles(target)
        for dtype in DTYPES
    ]
    return [*tiled, Variant("combine", None, "fp32")]
