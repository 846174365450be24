"""Layers with one fault each, and whether the suite finds it.

layer.py    a plain, right SyncBatchNorm in NumPy
faults.py   the mutants: each replaces a step of it by a wrong one
torch.py, mindspore.py   make layers of them that the ranks can build
run.py      runs the suite against the mutants; a mutant that survives is a failure of the suite
found.py, show.py   what came of them, and how that is shown
lines.py    mutants that nobody planned: random changes to the source of syncbn.torch
"""

from audit.mutants.faults import MUTANTS
from audit.mutants.layer import Plain

__all__ = ["CONTROL", "MUTANTS", "algorithm"]

CONTROL = "Plain"


def algorithm(name: str) -> type[Plain]:
    """The mutant of that name, or the control, which is right.

    Raises:
        KeyError: there is none.
    """
    return Plain if name == CONTROL else MUTANTS[name]
