"""Rung `interpreted`: Triton's interpreter runs the kernels on CPU tensors.

Triton chooses the interpreter when the kernels are imported. So the rung runs in a process of its
own: `python -m audit.ladder.interpreted DTYPE [FAULT]` prints the ratios of `judged` as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

_PROGRAMS = 3


def ratios(dtype: str, fault: str | None = None) -> dict[str, dict[str, float]]:
    """The largest ratio by layout and kernel, of the kernels or of those with a planted fault."""
    command = [sys.executable, "-W", "ignore", "-m", __name__, dtype, *([fault] if fault else [])]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"the interpreter failed: {run.stderr.strip()[-2000:]}")
    found: dict[str, dict[str, float]] = json.loads(run.stdout.splitlines()[-1])
    return found


def _main(dtype: str, fault: str | None = None) -> None:
    from audit.ladder import judged, planted
    from syncbn.kernels import batch_norm
    from syncbn.kernels.operations import Operations
    from syncbn.kernels.variants import LAYOUTS, Variant

    with tempfile.TemporaryDirectory() as folder:
        kernels = planted.faulty_kernels(fault, Path(folder)) if fault else batch_norm

        def launch(variant: Variant, programs: int, arguments: list[Any]) -> None:
            getattr(kernels, variant.kernel)[(programs,)](*arguments, **variant.constants)

        operations = Operations(launch, lambda device: ("ascend", _PROGRAMS))
        print(json.dumps({name: judged.worst_ratios(operations, name, dtype) for name in LAYOUTS}))


if __name__ == "__main__":
    _main(*sys.argv[1:])
