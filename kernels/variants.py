"""Every kernel of `leaf` in every form that `Operations` may ask a compiler for."""

from __future__ import annotations

from typing import Any, NamedTuple

from syncbn.kernels.plan import CHANNELS, Tiles, all_tiles

DTYPES = ("fp32", "fp16", "bf16")  # of the data, as Triton writes them
LAYOUTS = ("planes", "columns")
TILED = ("stats", "normalize", "reduce_grad", "input_grad")

_DATA = ("x_ptr", "dy_ptr", "y_ptr", "dx_ptr")


class Variant(NamedTuple):
    """A kernel for one kind of tile (None for `combine`) and one dtype of the data."""

    kernel: str
    tiles: Tiles | None
    dtype: str

    @property
    def layout(self) -> str:
        if self.tiles is None:
            return "channels"
        return LAYOUTS[self.tiles.columns]

    @property
    def symbol(self) -> str:
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
        """Triton's types of the other arguments."""
        return {name: self._type(name) for name in argument_names if name not in self.constants}

    def _type(self, name: str) -> str:
        if name in _DATA:
            return "*" + self.dtype
        if name.endswith("_ptr"):
            return "*fp32"
        return "fp32" if name == "eps" else "i32"


def variants(target: str) -> list[Variant]:
    """All of them, for a target of `plan`."""
    tiled = [
        Variant(kernel, tiles, dtype)
        for kernel in TILED
        for tiles in all_tiles(target)
        for dtype in DTYPES
    ]
    return [*tiled, Variant("combine", None, "fp32")]
