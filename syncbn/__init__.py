"""SyncBatchNorm for Ascend NPUs, in PyTorch and in MindSpore.

Importing this package imports no framework. The layer is `syncbn.torch.SyncBatchNorm`.
"""

from syncbn.protocol import PeerError

__all__ = ["PeerError", "__version__"]

__version__ = "0.1.0"
