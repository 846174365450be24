"""Layers with one planted fault each, and whether the suite finds the fault.

layer.py     a plain and right SyncBatchNorm in NumPy
faults.py    the mutants: each replaces a step of it by a wrong one
wrapper.py, torch.py, mindspore.py   make framework layers of them
run.py       runs the suite on the mutants; a mutant that survives is a failure of the suite
results.py, show.py   the results, and how they are shown
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
