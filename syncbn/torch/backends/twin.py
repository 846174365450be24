"""The five operations by the kernels as Ascend's compiler lowered them, on CPU tensors."""

from __future__ import annotations

from syncbn.kernels import twin
from syncbn.protocol import COUNT_HIGH
from syncbn.torch.messages import WORDS

_operations = twin.operations(header_words=WORDS, count_word=COUNT_HIGH)

stats = _operations.stats
combine = _operations.combine
normalize = _operations.normalize
reduce_grad = _operations.reduce_grad
input_grad = _operations.input_grad
pack_stats = _operations.pack_stats
combine_ranks = _operations.combine_ranks
pack_grad = _operations.pack_grad
