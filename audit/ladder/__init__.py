"""How far the kernels are proven for Ascend without one: a ladder of rungs, run by `check`.

- interpreted: Triton's interpreter runs the kernels, and every value is held to its bound;
- lowered: triton-ascend and bishengir-compile take them to the last step before a device's code;
- twin: what triton-ascend lowered them to is compiled for this CPU and held to the same bounds;
- CUDA: upstream triton compiles them ahead of time for three generations of GPUs;
- registered: the published torch_npu has the operators that the `aten` backend calls.

Every rung is also given kernels that it must refuse, and the check fails if it does not.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence

from audit.ladder import toolchain
from audit.ladder.toolchain import install

__all__ = ["RUNGS", "check", "install"]

RUNGS = ("interpreted", "lowered", "twin", "cuda", "registered")


def check(rungs: Sequence[str]) -> bool:
    """Run the rungs and print what each shows; whether all of them hold.

    Raises:
        MissingTool: a tool is missing or outdated.
    """
    if missing := toolchain.missing():
        raise toolchain.MissingTool(
            f"missing or outdated in {toolchain.FOLDER}: {missing}. Run make kernels, or python -m "
            "audit kernels install"
        )
    toolchain.c_compiler()
    toolchain.use("triton-ascend")
    os.environ.pop("TRITON_INTERPRET", None)  # a rung of its own sets it
    warnings.filterwarnings("ignore", module="triton")  # there is no compiler of CANN here
    # Only now: they import triton, which must be the one of the tool-chain.
    from rich.console import Console

    from audit.ladder.check import check

    return check(list(rungs), Console())
