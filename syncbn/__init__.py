"""SyncBatchNorm for Ascend NPUs, in PyTorch and in MindSpore.

Importing this package imports nothing else. `syncbn.torch.SyncBatchNorm` and
`syncbn.mindspore.SyncBatchNorm` are the layers; the framework is imported when the first of its
names is used. `syncbn-conformance` judges layers.
"""

import importlib
from types import ModuleType

from syncbn.protocol import PeerError

__all__ = ["PeerError", "__version__"]

__version__ = "0.1.0"


def __getattr__(name: str) -> ModuleType:
    if name in ("torch", "mindspore"):
        return importlib.import_module(f"syncbn.{name}")
    raise AttributeError(f"module 'syncbn' has no attribute {name!r}")
