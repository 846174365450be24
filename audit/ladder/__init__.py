"""The ladder: how far the kernels are proven for Ascend without an Ascend. `check` runs its rungs.

- interpreted: Triton's interpreter runs the kernels, and every value must be within its bound;
- lowered: triton-ascend and bishengir-compile take them to the last step before device code;
- twin: the code that triton-ascend makes of them is compiled for this CPU, with the same bounds;
- cuda: upstream triton compiles them ahead of time for three generations of GPUs;
- registered: the published torch_npu has the operators that the `aten` backend calls.

Every rung also gets kernels with a planted fault. The check fails if a rung does not refuse them.
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
    """Run the rungs and print what each shows; True if all of them hold.

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
    os.environ.pop("TRITON_INTERPRET", None)  # only the rung `interpreted` sets it
    warnings.filterwarnings("ignore", module="triton")  # it warns that CANN's compiler is missing
    # Imported here, because these import triton, which must be that of the tool-chain.
    from rich.console import Console

    from audit.ladder.rungs import check

    return check(list(rungs), Console())
