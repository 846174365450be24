"""Count the bytes that the kernels move to and from device memory, in their lowered code.

The twin of a kernel (see `twin_build`) is compiled with a call at every load, store and copy, by
LLVM's ThreadSanitizer pass, which instruments memory accesses and nothing else. A runtime of our
own replaces that of the tool. It counts the bytes of the accesses whose address is in a tensor of
the launch; other addresses are on-chip memory.
"""

from __future__ import annotations

import ctypes
import functools
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from audit.ladder import lowered, toolchain, twin_build
from syncbn.kernels import batch_norm
from syncbn.kernels.twin import call
from syncbn.kernels.variants import Variant

_MOST_TENSORS = 16

_RUNTIME = (
    f"#define MOST_TENSORS {_MOST_TENSORS}"
    """
typedef struct { char *begin, *end; int64_t read, written; } tensor;
tensor tensors[MOST_TENSORS];
int tensor_count;

static void count(const char *address, int64_t bytes, int write) {
  for (int i = 0; i < tensor_count; i++)
    if (tensors[i].begin <= address && address < tensors[i].end) {
      *(write ? &tensors[i].written : &tensors[i].read) += bytes;
      return;
    }
}

#define ACCESS(bytes) \\
  void __tsan_read##bytes(char *a) { count(a, bytes, 0); } \\
  void __tsan_write##bytes(char *a) { count(a, bytes, 1); } \\
  void __tsan_unaligned_read##bytes(char *a) { count(a, bytes, 0); } \\
  void __tsan_unaligned_write##bytes(char *a) { count(a, bytes, 1); }
ACCESS(1) ACCESS(2) ACCESS(4) ACCESS(8) ACCESS(16)

void __tsan_init(void) {}

static void move(char *to, const char *from, int64_t bytes) {
  count(from, bytes, 0);
  count(to, bytes, 1);
  memmove(to, from, bytes);
}
void *__tsan_memcpy(char *to, const char *from, size_t n) { move(to, from, n); return to; }
void *__tsan_memmove(char *to, const char *from, size_t n) { move(to, from, n); return to; }
void *__tsan_memset(char *to, int value, size_t n) {
  count(to, n, 1);
  return memset(to, value, n);
}
"""
)


class Traffic(NamedTuple):
    """Bytes that a launch reads from device memory and writes to it."""

    read: int
    written: int


def run(variant: Variant, programs: int, arguments: list[Any]) -> Traffic:
    """Run that many programs of a kernel on CPU tensors, and count what they move.

    Raises:
        Refused, NotCompiled: the kernel cannot be lowered or compiled.
    """
    library = _library(variant)
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    if len(tensors) > _MOST_TENSORS:
        raise ValueError(f"a kernel must have at most {_MOST_TENSORS} tensors, got {len(tensors)}")
    counters = (_Tensor * _MOST_TENSORS).in_dll(library, "tensors")
    for counter, tensor in zip(counters, tensors, strict=False):
        begin = tensor.data_ptr()
        counter.begin, counter.end = begin, begin + tensor.numel() * tensor.element_size()
        counter.read = counter.written = 0
    ctypes.c_int.in_dll(library, "tensor_count").value = len(tensors)
    call(library, variant, programs, arguments)
    used = list(counters)[: len(tensors)]
    return Traffic(sum(counter.read for counter in used), sum(c.written for c in used))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("begin", ctypes.c_size_t),
        ("end", ctypes.c_size_t),
        ("read", ctypes.c_int64),
        ("written", ctypes.c_int64),
    )


@functools.cache
def _library(variant: Variant) -> ctypes.CDLL:
    """The kernel alone, compiled with its counters; it stays loaded."""
    kernel = getattr(batch_norm, variant.kernel)
    linalg = lowered.lower(kernel, variant.signature(kernel.arg_names), variant.constants)
    with tempfile.TemporaryDirectory(dir=toolchain.FOLDER) as folder:
        path = Path(folder) / "counted.so"
        twin_build.build({variant.symbol: linalg}, "", path, counters=_RUNTIME)
        return ctypes.CDLL(str(path))
