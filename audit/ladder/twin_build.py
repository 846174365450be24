"""Rung `twin`: compile the code that triton-ascend lowered the kernels to for this CPU.

    linalg --mlir-opt--> LLVM dialect --mlir-translate--> LLVM IR --llc--> object --cc--> one
    library

It shows that the lowering is right: masks, offsets, reductions. It shows nothing about
bishengir-compile or the device. `syncbn.kernels.twin` runs the library.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from audit.ladder import toolchain

# One thread per kernel, because several kernels are compiled at a time.
_OPTIONS = ("-allow-unregistered-dialect", "--mlir-disable-threading")
_PASSES = (
    "--convert-elementwise-to-linalg",
    "--one-shot-bufferize=allow-return-allocs-from-loops=true",
    "--buffer-deallocation-pipeline",
    "--convert-bufferization-to-memref",
    "--convert-linalg-to-loops",
    "--lower-affine",
    "--expand-strided-metadata",
    "--lower-affine",
    "--convert-scf-to-cf",
    "--convert-math-to-llvm",
    "--convert-math-to-libm",
    "--finalize-memref-to-llvm",
    "--arith-expand",
    "--convert-arith-to-llvm",
    "--convert-index-to-llvm",
    "--convert-cf-to-llvm",
    "--convert-func-to-llvm",
    "--reconcile-unrealized-casts",
)

# Calls at every load, store and copy. By default the pass leaves out a read before a write to the
# same address, and adds calls at the ends of functions.
_COUNTING = (
    "-passes=tsan",
    "-tsan-instrument-read-before-write",
    "-tsan-instrument-func-entry-exit=false",
)

# Functions that compiled MLIR calls. The first copies between two memrefs of one rank with any
# strides, each given by its descriptor (allocated, aligned, offset, sizes[rank], strides[rank]).
# The second rounds to bfloat16, to nearest even; only recent C libraries have it.
_HEADERS = """
#include <stdint.h>
#include <string.h>
"""
_PLAIN_COPY = """
#define move memcpy
"""
_RUNTIME = """
const char *twin_sources = "%s";

typedef struct { int64_t rank; int64_t *descriptor; } unranked;

static void copy(int64_t bytes, int64_t rank, const char *from, const int64_t *from_strides,
                 char *to, const int64_t *to_strides, const int64_t *sizes) {
  if (rank == 0) { move(to, from, bytes); return; }
  if (rank == 1 && from_strides[0] == 1 && to_strides[0] == 1) {
    move(to, from, bytes * sizes[0]);
    return;
  }
  for (int64_t i = 0; i < sizes[0]; i++)
    copy(bytes, rank - 1, from + i * from_strides[0] * bytes, from_strides + 1,
         to + i * to_strides[0] * bytes, to_strides + 1, sizes + 1);
}

void memrefCopy(int64_t bytes, unranked *from, unranked *to) {
  int64_t rank = from->rank, *f = from->descriptor, *t = to->descriptor;
  copy(bytes, rank, (char *)f[1] + f[2] * bytes, f + 3 + rank,
       (char *)t[1] + t[2] * bytes, t + 3 + rank, f + 3);
}

_Float16 __truncsfbf2(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  uint16_t half = (bits & 0x7fffffff) > 0x7f800000
      ? (bits >> 16) | 0x40 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  _Float16 result;
  memcpy(&result, &half, 2);
  return result;
}
"""


class NotCompiled(Exception):
    """A tool rejected its input."""


def build(lowered: dict[str, str], sources: str, library: Path, counters: str = "") -> None:
    """Compile linalg modules into a library.

    Args:
        lowered: modules of one function each, by the name that the function gets.
        sources: a hash of the kernels, which the library holds as `twin_sources`.
        library: the file to write.
        counters: C code of the functions that every load, store and copy calls, see `traffic`; by
            default there are no such calls.
    """
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        work = Path(folder)
        with ThreadPoolExecutor() as threads:  # the tools are processes
            counted = bool(counters)
            made_of = [threads.submit(_object, *item, work, counted) for item in lowered.items()]
            objects = [future.result() for future in made_of]
        (work / "runtime.c").write_text(_HEADERS + (counters or _PLAIN_COPY) + _RUNTIME % sources)
        made = work / "twin.so"
        c = [toolchain.c_compiler(), "-O2", "-shared", "-fPIC", "-o", str(made)]
        _run(*c, str(work / "runtime.c"), *map(str, objects), "-lm")
        made.rename(library)


def _object(symbol: str, linalg: str, work: Path, counted: bool) -> Path:
    source, dialect, ir, made = (work / f"{symbol}{end}" for end in (".mlir", ".llvm", ".ll", ".o"))
    linalg = re.sub(r"(func\.func\s+@)\w+", rf"\g<1>{symbol}", linalg)
    source.write_text(linalg.replace(" {hivm.unlikely_condition}", ""))
    _run(toolchain.llvm("mlir-opt"), str(source), *_OPTIONS, *_PASSES, "-o", str(dialect))
    _run(toolchain.llvm("mlir-translate"), "--mlir-to-llvmir", str(dialect), "-o", str(ir))
    # MLIR adds this function to every module; the library must not have it several times.
    public = "define void @dealloc_helper"
    ir.write_text(ir.read_text().replace(public, public.replace("define", "define internal")))
    if counted:
        text = re.sub(rf"(define void @{symbol}\(.*\)) {{", r"\1 sanitize_thread {", ir.read_text())
        ir.write_text(text)
        _run(toolchain.llvm("opt"), *_COUNTING, "-S", str(ir), "-o", str(ir))
    options = ("-O2", "-filetype=obj", "-relocation-model=pic")
    _run(toolchain.llvm("llc"), *options, str(ir), "-o", str(made))
    return made


def _run(*command: str) -> None:
    environment = toolchain.llvm_environment()
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    if run.returncode:
        raise NotCompiled(f"{Path(command[0]).name}: {run.stderr.strip()[:500]}")
