"""SyncBatchNorm for Ascend NPUs, in PyTorch and in MindSpore.

Importing this package imports nothing else. `from syncbn.torch import SyncBatchNorm` and
`from syncbn.mindspore import SyncBatchNorm` are the layers; `syncbn-conformance` judges them.
"""

from syncbn.protocol import PeerError

__all__ = ["PeerError", "__version__"]

__version__ = "0.1.0"
