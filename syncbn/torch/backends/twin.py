"""The five operations by the kernels as Ascend's compiler lowered them, on CPU tensors."""

from __future__ import annotations

from syncbn.kernels import twin

_operations = twin.operations()

stats = _operations.stats
combine = _operations.combine
normalize = _operations.normalize
reduce_grad = _operations.reduce_grad
input_grad = _operations.input_grad
