"""The twin: the kernels as Ascend's compiler lowered them, compiled for this CPU.

The layer runs it with `backend="twin"`. It is for tests and not for training: the whole conformance
suite runs on the code that triton-ascend makes of the kernels. `python -m audit kernels check`
compiles the library (`audit.ladder.twin_build`). This module runs it and needs nothing else.
"""

from __future__ import annotations

import ctypes
import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from syncbn.kernels.operations import Operations
from syncbn.kernels.variants import Variant

_HERE = Path(__file__).resolve().parent  # the directory itself, also through syncbn/kernels
LIBRARY = _HERE.parent / ".toolchain" / "twin.so"

# Few programs, because they run one after the other; several, so that the kernels share work.
_PROGRAMS = 3


def sources() -> str:
    """A hash of the kernels that the twin is compiled from."""
    files = ("batch_norm.py", "plan.py", "variants.py")
    return hashlib.sha256(b"".join((_HERE / name).read_bytes() for name in files)).hexdigest()


def operations(library: Path = LIBRARY, header_words: int = 2, count_word: int = 0) -> Operations:
    """The operations on CPU tensors; header_words and count_word: see `Operations`.

    Raises:
        RuntimeError: the library is missing, or was compiled from other kernels than these.
    """
    if not library.is_file():
        raise RuntimeError(f"backend 'twin' needs {library}: make kernels compiles it")
    loaded = ctypes.CDLL(str(library))
    made_from = ctypes.c_char_p.in_dll(loaded, "twin_sources").value
    if made_from != sources().encode():
        raise RuntimeError(
            f"{library} was compiled from other kernels: make kernels compiles it again"
        )

    def launch(variant: Variant, programs: int, arguments: list[Any]) -> None:
        call(loaded, variant, programs, arguments)

    return Operations(launch, _machine, header_words, count_word)


def call(library: ctypes.CDLL, variant: Variant, programs: int, arguments: list[Any]) -> None:
    """Run the programs of a kernel of the library, one after the other."""
    kernel = getattr(library, variant.symbol)
    words = [word for argument in (None, None, *arguments) for word in _words(argument)]
    for program in range(programs):
        kernel(*words, *map(ctypes.c_int32, (programs, 1, 1, program, 0, 0)))


def _words(argument: Any) -> list[Any]:
    """An argument as MLIR passes it; a memref is (allocated, aligned, offset, size, stride).

    None is an empty memref. It stands for the lock and the workspace, which come first and which
    the kernels do not use.
    """
    if argument is None:
        return [ctypes.c_void_p(0), ctypes.c_void_p(0), *map(ctypes.c_int64, (0, 0, 1))]
    if isinstance(argument, Tensor):
        if argument.device.type != "cpu" or not argument.is_contiguous():
            raise ValueError("the twin takes contiguous CPU tensors")
        address = ctypes.c_void_p(argument.data_ptr())
        return [address, address, *map(ctypes.c_int64, (0, argument.numel(), 1))]
    return [ctypes.c_float(argument) if isinstance(argument, float) else ctypes.c_int32(argument)]


def _machine(device: torch.device) -> tuple[str, int]:
    return "ascend", _PROGRAMS
