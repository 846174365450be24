"""Rung `lowered`: Ascend's compilers take the kernels as far as they can without CANN.

    batch_norm.py --triton-ascend--> linalg --bishengir-compile--> HIVM --hivmc--> device code

The first step (`lower`) gives linalg on memrefs, which the twin executes. The second (`accept`)
plans the on-chip memory, 192 KiB on every 910B, and inserts synchronization. hivmc is closed source
and part of CANN. A stand-in that copies its input takes its place, so "accepted" covers every step
before hivmc and never means that there is a binary.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from audit.ladder import toolchain

DEVICE = "Ascend910B3"
ON_CHIP_BYTES = 192 * 1024

_HIVMC = """#!/bin/sh
# Stands in for CANN's hivmc: copies the module to where the device code would be.
while [ $# -gt 0 ]; do
  case "$1" in
    --version) echo "stand-in for hivmc"; exit 0 ;;
    -o) out=$2; shift ;;
    -*) ;;
    *) in=$1 ;;
  esac
  shift
done
cp "$in" "$out" && cp "$in" "${out%.o}.o" 2>/dev/null || true
"""

# Bits of the element types in HIVM's memory plan.
_BITS = {
    **{"i1": 1, "i8": 8, "ui8": 8, "i16": 16, "f16": 16, "bf16": 16},
    **{"i32": 32, "ui32": 32, "f32": 32, "i64": 64, "f64": 64},
}


class Refused(Exception):
    """A compiler rejects the kernel, or accepts it only in a form that is not wanted."""


def lower(kernel: Any, signature: dict[str, str], constants: dict[str, Any]) -> str:
    """The kernel (a triton.jit function) as linalg.

    Raises:
        Refused: Triton's front end or triton-ascend rejects it, or leaves operations of Triton.
    """
    from triton._C.libtriton import ir
    from triton.backends.ascend.compiler import AscendBackend, make_ttir, ttir_to_linalg
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import ASTSource

    target = GPUTarget("npu", DEVICE, 0)
    backend = AscendBackend(target)
    options = backend.parse_options({})
    metadata = {"target": target, "hash": "", **options.__dict__}
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    try:
        source = ASTSource(kernel, signature, constants=constants)
        helpers = backend.get_codegen_implementation()
        module = source.make_ir(options, helpers, backend.get_module_map(), context)
        module = make_ttir(module, metadata, options)
        linalg: str = _again(lambda: ttir_to_linalg(module, metadata, options, named_ops=True))
    except subprocess.CalledProcessError as error:
        raise Refused(f"triton-ascend: {_first_error(error.stderr.decode())}") from error
    except Exception as error:
        raise Refused(f"Triton: {str(error).strip().splitlines()[-1]}") from error
    # triton-ascend exits with 0 even if it could not convert everything.
    left = sorted(set(re.findall(r"\btt\.(?!divisibility|tensor_kind)[a-z_]+", linalg)))
    if left:
        raise Refused(f"triton-ascend left {', '.join(left)} unlowered")
    return re.sub(r', mix_mode\s*=\s*"[^"]*"', "", linalg)


def accept(linalg: str) -> int:
    """Compile the kernel as far as hivmc; the high-water mark of its on-chip memory, in bytes.

    Raises:
        Refused: bishengir-compile rejects it, or double buffering does not fit on chip; then
            bishengir-compile accepts it, but the kernel waits for every load.
    """
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "kernel.mlir").write_text(linalg)
        stand_in = work / "hivmc"
        stand_in.write_text(_HIVMC)
        stand_in.chmod(0o755)
        command = [
            toolchain.bishengir_compile(),
            str(work / "kernel.mlir"),
            f"--target={DEVICE}",
            "--enable-auto-multi-buffer=True",
            "--enable-auto-bind-sub-block=True",
            "--enable-hfusion-compile=true",
            "--enable-hivm-compile=true",
            "--enable-triton-kernel-compile=true",
            f"--save-temps={folder}",
            "-o",
            str(work / "kernel"),
        ]
        environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
        run = subprocess.run(command, capture_output=True, text=True, env=environment)
        output = run.stdout + run.stderr
        if "ub overflow" in output.lower():  # even if it then compiled without double buffering
            raise Refused("bishengir-compile: on-chip memory does not hold it twice")
        if run.returncode:
            raise Refused(f"bishengir-compile: {_first_error(output)}")
        used = _on_chip_bytes((work / "module.hivm.opt.mlir").read_text())
    if not 0 < used <= ON_CHIP_BYTES:
        raise Refused(f"bishengir-compile: planned {used} of {ON_CHIP_BYTES} bytes on chip")
    return used


def _again(run: Callable[[], str]) -> str:
    """The result of `run`, which is repeated up to three times if its process dies of a signal.

    On a busy machine triton-adapter-opt sometimes ends in an assertion about MLIR's types
    (Malformed type storage object), and accepts the same kernel when it runs again. A kernel on
    which it always dies is refused.
    """
    for _ in range(3):
        try:
            return run()
        except subprocess.CalledProcessError as error:
            if error.returncode >= 0:
                raise
    return run()


def _on_chip_bytes(hivm: str) -> int:
    """The end of the highest buffer: casts of constant addresses to memrefs in `ub`."""
    constants = dict(re.findall(r"(%\w+) = arith\.constant (\d+) : i64", hivm))
    cast = r"hivm\.hir\.pointer_cast\(([^)]*)\)[^:\n]*: memref<([^,>]*),[^\n]*address_space<ub>"
    end = 0
    for addresses, shape in re.findall(cast, hivm):
        *sizes, element = shape.split("x")
        bits = _BITS[element]
        for size in sizes:
            bits *= int(size)
        for address in re.findall(r"%\w+", addresses):
            end = max(end, int(constants[address]) + (bits + 7) // 8)
    return end


def _first_error(text: str) -> str:
    lines = text.strip().splitlines() or ["no message"]
    errors = (line for line in lines if re.search(r"error:|ERROR|Assertion|overflow", line))
    return next(errors, lines[0]).strip()[-200:]
