"""Rung `cuda`: upstream triton compiles the kernels ahead of time, to PTX and to a GPU's code.

Upstream triton has its own folder (see `toolchain`), which must come first on the path. So it runs
in a process of its own: `python -m audit.ladder.cuda CAPABILITY` prints the results as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from audit.ladder import toolchain

CAPABILITIES = (80, 90, 100)  # A100; H100 and H200; B200


def compile_all(capability: int) -> dict[str, str | None]:
    """Why each variant, by symbol, and each planted fault was refused; None if it was compiled."""
    folders = [str(toolchain.wheel("triton")), os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(filter(None, folders))
    command = [sys.executable, "-W", "ignore", "-m", __name__, str(capability)]
    run = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    if run.returncode:
        raise RuntimeError(f"triton for CUDA failed: {run.stderr.strip()[-2000:]}")
    found: dict[str, str | None] = json.loads(run.stdout.splitlines()[-1])
    return found


def _main(capability: int) -> None:
    from audit.ladder import planted
    from syncbn.kernels import batch_norm
    from syncbn.kernels.variants import variants

    found = {}
    for variant in variants("cuda"):
        kernel = getattr(batch_norm, variant.kernel)
        signature = variant.signature(kernel.arg_names)
        found[variant.symbol] = _refusal(
            kernel, signature, variant.constants, capability, variant.options
        )
    found["run-time range"] = _refusal(
        planted.run_time_range, planted.SIGNATURE, planted.CONSTANTS, capability
    )
    large = {"COLUMNS": False, "BLOCK_R": 1024, "BLOCK": 2048}
    signature = variants("cuda")[0].signature(batch_norm.stats.arg_names)
    found["over-large tile"] = _refusal(batch_norm.stats, signature, large, capability)
    print(json.dumps(found))


def _refusal(
    kernel: Any,
    signature: dict[str, str],
    constants: dict[str, Any],
    capability: int,
    options: dict[str, int] | None = None,
) -> str | None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(kernel, {**signature, **dict.fromkeys(constants, "constexpr")}, constants)
    try:
        made = triton.compile(
            source, target=GPUTarget("cuda", capability, 32), options=options or {}
        )
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__:  # the outer ones quote the source
            cause = cause.__cause__
        return str(cause).strip().splitlines()[-1]
    target = f".target sm_{capability}"
    if target not in made.asm["ptx"] or not made.asm["cubin"].startswith(b"\x7fELF"):
        return f"no code for sm_{capability}"
    return None


if __name__ == "__main__":
    _main(int(sys.argv[1]))
