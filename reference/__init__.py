"""The reference: SyncBatchNorm in float64 NumPy, with an error bound for every value."""

from syncbn.extras import require

require("syncbn.reference", "conformance", "numpy")

from syncbn.reference.bounds import Bounded, Precision
from syncbn.reference.layer import (
    Cotangents,
    Gradients,
    SecondGradients,
    SyncBatchNorm,
    averaged,
)

__all__ = [
    "Bounded",
    "Cotangents",
    "Gradients",
    "Precision",
    "SecondGradients",
    "SyncBatchNorm",
    "averaged",
]
