"""SyncBatchNorm for MindSpore: Ascend (HCCL) and CPU ranks, in PyNative and in graph mode."""

from syncbn.extras import require

require("syncbn.mindspore", "mindspore", "mindspore")

from syncbn.mindspore.checkpoints import arrays_of, load_arrays
from syncbn.mindspore.convert import convert_sync_batchnorm, revert_sync_batchnorm
from syncbn.mindspore.groups import create_group
from syncbn.mindspore.layer import SyncBatchNorm

__all__ = [
    "SyncBatchNorm",
    "arrays_of",
    "convert_sync_batchnorm",
    "create_group",
    "load_arrays",
    "revert_sync_batchnorm",
]
