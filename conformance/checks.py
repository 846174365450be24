"""What a case can check, as data. syncbn.conformance.verdict judges by these names."""

from __future__ import annotations

from dataclasses import dataclass

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
SECOND_GRADIENTS = ("grad_grad_input", "grad_grad_output", "grad_grad_weight")
_RESULTS = ("y", "grad_input", "grad_weight", "grad_bias", *SECOND_GRADIENTS, *STATISTICS)


@dataclass(frozen=True)
class Check:
    """One thing that is judged.

    name: its name in a case.
    clause: the clause that a failure of this check alone stands for.
    arrays: the arrays of each step that a rank must answer with.
    numeric: whether these are compared with the reference, within its bound.
    always: whether exploration checks it in every case; it checks some others where they apply.
    """

    name: str
    clause: str
    arrays: tuple[str, ...] = ()
    numeric: bool = False
    always: bool = False


def _number(name: str, clause: str) -> Check:
    return Check(name, clause, (name,), numeric=True, always=True)


CHECKS = {
    check.name: check
    for check in (
        _number("y", "FWD-1"),
        _number("grad_input", "GRAD-1"),
        _number("grad_weight", "GRAD-2"),
        _number("grad_bias", "GRAD-2"),
        *(Check(name, "GRAD-5", (name,), numeric=True) for name in SECOND_GRADIENTS),
        _number("running_mean", "STAT-1"),
        _number("running_var", "STAT-2"),
        Check("num_batches_tracked", "STAT-5", ("num_batches_tracked",), always=True),
        Check("signature", "CTOR-1"),
        Check("parameters", "CTOR-4", always=True),
        Check("statistics_dtype", "CTOR-7", always=True),
        Check("initial_values", "CTOR-7"),
        Check("state_names", "CTOR-5", always=True),
        Check("format", "FWD-9", always=True),
        Check("grad_format", "FWD-9"),
        Check("defined", "NUM-1", _RESULTS),
        Check("input_unmodified", "FWD-9", always=True),
        Check("ranks_agree", "STAT-3", STATISTICS),
        Check("repeatable", "FWD-6", _RESULTS),
        Check("collectives", "COMM-1"),
        Check("communicators", "COMM-1", always=True),
    )
}


def arrays_of(checks: tuple[str, ...]) -> set[str]:
    """The arrays of each step that the checks of a case need."""
    return {name for check in checks for name in CHECKS[check].arrays}
