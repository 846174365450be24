"""SyncBatchNorm for PyTorch: Ascend (torch_npu, HCCL), CUDA (NCCL) and CPU (Gloo) ranks."""

from syncbn.extras import require

require("syncbn.torch", "torch", "torch")

from syncbn.torch import functional
from syncbn.torch.checkpoints import arrays_of, load_arrays
from syncbn.torch.convert import convert_sync_batchnorm, revert_sync_batchnorm
from syncbn.torch.groups import create_group
from syncbn.torch.layer import SyncBatchNorm

__all__ = [
    "SyncBatchNorm",
    "arrays_of",
    "convert_sync_batchnorm",
    "create_group",
    "functional",
    "load_arrays",
    "revert_sync_batchnorm",
]
