"""The five operations by this project's Triton kernels, on Ascend and CUDA.

How far they have been shown to work on which device is in docs/kernels.md. With TRITON_INTERPRET=1
in the environment they run on CPU tensors, slowly, for debugging.
"""

from __future__ import annotations

import functools
import os
from contextlib import nullcontext
from typing import Any

import torch
import triton

from syncbn.kernels import batch_norm
from syncbn.kernels.operations import Operations
from syncbn.kernels.variants import Variant
from syncbn.protocol import COUNT_HIGH
from syncbn.torch.messages import WORDS

_PROGRAMS_OF_INTERPRETER = 3  # they take turns, but share the work as on a device
_PROGRAMS_PER_MULTIPROCESSOR = 8  # CUDA; on an H100, 16 make columns slower


def _launch(variant: Variant, programs: int, arguments: list[Any]) -> None:
    # Triton launches on the current device, whichever the tensors are on.
    device = arguments[0].device
    there = (
        nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)
    )
    with there:
        options = variant.options if device.type == "cuda" else {}
        kernel = getattr(batch_norm, variant.kernel)
        kernel[(programs,)](*arguments, **variant.constants, **options)


def _machine(device: torch.device) -> tuple[str, int]:
    """The target of the kernels' plan, and how many programs run at a time."""
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return "ascend", _PROGRAMS_OF_INTERPRETER
    return _accelerator(device)


@functools.cache
def _accelerator(device: torch.device) -> tuple[str, int]:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return "cuda", _PROGRAMS_PER_MULTIPROCESSOR * properties.multi_processor_count
    if device.type == "npu":
        driver = triton.runtime.driver.active
        return "ascend", driver.utils.get_device_properties(device.index)["num_vectorcore"]
    raise RuntimeError(
        f"backend 'triton' runs on npu and cuda (on cpu with TRITON_INTERPRET=1), got a tensor on "
        f"{device.type}: move the layer and its input there, or choose backend='composed'"
    )


_operations = Operations(_launch, _machine, WORDS, COUNT_HIGH)

stats = _operations.stats
combine = _operations.combine
normalize = _operations.normalize
reduce_grad = _operations.reduce_grad
input_grad = _operations.input_grad
pack_stats = _operations.pack_stats
combine_ranks = _operations.combine_ranks
pack_grad = _operations.pack_grad
