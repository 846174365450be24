"""The variants of the kernels: every form in which `Operations` may launch one."""

from __future__ import annotations

from typing import Any, NamedTuple

from syncbn.kernels.plan import CHANNELS, WARPS, Tiles, all_tiles

DTYPES = ("fp32", "fp16", "bf16")  # of the data, in Triton's spelling
LAYOUTS = ("planes", "columns")
RUNNING = ("none", "moving", "average")  # see `combine`
TILED = ("stats", "normalize", "reduce_grad", "input_grad")

# Pointers to tensors of the variant's dtype.
_OF_DTYPE = (
    *("x_ptr", "dy_ptr", "y_ptr", "dx_ptr"),
    *("running_mean_ptr", "running_var_ptr", "grad_weight_ptr", "grad_bias_ptr"),
)
_FLOATS = ("eps", "momentum", "kept")


class Variant(NamedTuple):
    """A kernel that is compiled for one tile and one dtype."""

    kernel: str  # its name in batch_norm.py
    tiles: Tiles | None  # None for the kernels for messages
    dtype: str  # of the data, of running statistics or of gradients: one of DTYPES
    running: str = ""  # of `combine`: one of RUNNING

    @property
    def layout(self) -> str:
        """One of LAYOUTS, or "channels" for the kernels for messages."""
        if self.tiles is None:
            return "channels"
        return LAYOUTS[self.tiles.columns]

    @property
    def symbol(self) -> str:
        """A name that no other variant has: that of its function in the twin's library."""
        size = "" if self.tiles is None else f"_{self.tiles.block_r}x{self.tiles.block}"
        running = self.running and f"_{self.running}"
        return f"{self.kernel}_{self.layout}{size}_{self.dtype}{running}"

    @property
    def constants(self) -> dict[str, Any]:
        """The values of the kernel's constexpr arguments."""
        if self.tiles is None:
            running = {"RUNNING": self.running} if self.running else {}
            return {**running, "BLOCK": CHANNELS}
        columns, block_r, block = self.tiles
        return {"COLUMNS": columns, "BLOCK_R": block_r, "BLOCK": block}

    @property
    def options(self) -> dict[str, int]:
        """Triton's options on CUDA."""
        return {"num_warps": WARPS[self.tiles is not None and self.tiles.columns]}

    def signature(self, argument_names: list[str]) -> dict[str, str]:
        """Triton's type of every argument that is not constexpr."""
        return {name: self._type(name) for name in argument_names if name not in self.constants}

    def _type(self, name: str) -> str:
        if name in _OF_DTYPE:
            return "*" + self.dtype
        if name == "steps_ptr" and self.running != "none":
            return "*i64"
        if name.endswith("_ptr"):
            return "*fp32"
        return "fp32" if name in _FLOATS else "i32"


def variants(target: str) -> list[Variant]:
    """All variants for a target of `plan`."""
    tiled = [
        Variant(kernel, tiles, dtype)
        for kernel in TILED
        for tiles in all_tiles(target)
        for dtype in DTYPES
    ]
    return [
        *tiled,
        Variant("pack_stats", None, "fp32"),
        Variant("combine", None, "fp32", "none"),
        *(Variant("combine", None, dtype, mode) for mode in RUNNING[1:] for dtype in DTYPES),
        *(Variant("pack_grad", None, dtype) for dtype in DTYPES),
    ]
