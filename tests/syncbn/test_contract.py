"""The argument checks that every front end shares: what passes, what does not, and the errors."""

from __future__ import annotations

import itertools
import subprocess
import sys
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import syncbn
from syncbn import contract

INF, NAN = float("inf"), float("nan")


class Scalar:
    """Converts to every kind of number but is none, like a tensor of one element."""

    def __float__(self) -> float:
        return 0.5

    def __int__(self) -> int:
        return 1

    __index__ = __int__

    def __repr__(self) -> str:
        return "Scalar()"


NO_NUMBERS: list[Any] = [
    "1",
    b"1",
    1j,
    np.complex64(1),
    Decimal("0.5"),
    True,
    np.bool_(True),
    [1],
    np.array(1),
    np.array(0.5),
    Scalar(),
    object,
]
NO_BOOLS: list[Any] = [None, 0, 1, 1.0, "True", np.bool_(True), np.array(True)]

ACCEPTED: dict[str, list[Any]] = {
    "num_features": [1, 64, 2**70, np.int64(3), np.uint8(1)],
    "eps": [
        1e-5,
        0.0,
        5e-324,
        1.0,
        np.float16(0.1),
        np.float32(1e-5),
        np.float64(0),
        np.longdouble(1),
    ],
    "momentum": [None, 0, 1, 0.0, 1.0, 0.1, np.float32(0.1), np.int8(1), Fraction(1, 3)],
    "affine": [True, False],
    "track_running_stats": [True, False],
}
OF_WRONG_TYPE: dict[str, list[Any]] = {
    "num_features": [None, 1.0, INF, NAN, np.float64(1), Fraction(1), *NO_NUMBERS],
    "eps": [None, 0, 1, np.int64(1), Fraction(1, 2), *NO_NUMBERS],
    "momentum": NO_NUMBERS,
    "affine": NO_BOOLS,
    "track_running_stats": NO_BOOLS,
}
OF_WRONG_VALUE: dict[str, list[Any]] = {
    "num_features": [0, -1, -(2**70), np.int64(0), np.int8(-3)],
    "eps": [-1e-5, -5e-324, -INF, NAN, np.float32(-1e-5), np.float16(NAN)],
    "momentum": [-0.1, 1.1, -5e-324, 1 + 2**-52, 2, -1, INF, NAN, np.float32(NAN), Fraction(3, 2)],
}


def cases(table: dict[str, list[Any]]) -> list[Any]:
    """(argument, value), with different ids for 1 and np.int64(1)."""
    return [
        pytest.param(name, value, id=f"{name}-{type(value).__name__}-{value!r}"[:60])
        for name, values in table.items()
        for value in values
    ]


def check(name: str, value: Any) -> None:
    given = {
        "num_features": 3,
        "eps": 1e-5,
        "momentum": 0.1,
        "affine": True,
        "track_running_stats": True,
    }
    contract.check_arguments(**(given | {name: value}))


class TestArguments:
    @pytest.mark.parametrize(("name", "value"), cases(ACCEPTED))
    def test_accepted(self, name: str, value: Any) -> None:
        check(name, value)

    @pytest.mark.parametrize(("name", "value"), cases(OF_WRONG_TYPE))
    def test_wrong_type(self, name: str, value: Any) -> None:
        with pytest.raises(TypeError) as raised:
            check(name, value)
        message = str(raised.value)
        assert message.startswith(f"{name} must be ")
        assert message.endswith(f"got {value!r} of type {type(value).__name__}")

    @pytest.mark.parametrize(("name", "value"), cases(OF_WRONG_VALUE))
    def test_wrong_value(self, name: str, value: Any) -> None:
        with pytest.raises(ValueError, match="must be") as raised:
            check(name, value)
        message = str(raised.value)
        assert message.startswith(f"{name} must be ")
        assert message.endswith(f"got {value!r}")


class Equal:
    """Equal to everything, as an array would nearly be: only identity distinguishes dtypes."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return True


class TestDtype:
    FLOATING = (np.dtype("float32"), np.dtype("float64"))

    @pytest.mark.parametrize("dtype", [None, *FLOATING])
    def test_accepted(self, dtype: Any) -> None:
        contract.check_dtype(dtype, self.FLOATING)
        contract.check_dtype(dtype, iter(self.FLOATING))

    @pytest.mark.parametrize("dtype", ["float32", np.dtype("int32"), float, 32, True, Equal()])
    def test_refused(self, dtype: Any) -> None:
        with pytest.raises(TypeError) as raised:
            contract.check_dtype(dtype, iter(self.FLOATING))
        message = str(raised.value)
        assert message.startswith("dtype must be None or one of float32, float64, got ")
        assert message.endswith(f"got {dtype!r} of type {type(dtype).__name__}")


class TestRankIds:
    @pytest.mark.parametrize(
        ("given", "ranks"),
        [
            ([0], (0,)),
            ((0, 1), (0, 1)),
            ([3, 0, 2], (0, 2, 3)),
            ([np.int64(2), np.uint8(0)], (0, 2)),
        ],
    )
    def test_accepted(self, given: Any, ranks: tuple[int, ...]) -> None:
        got = contract.check_rank_ids(given, 4)
        assert got == ranks
        assert all(type(rank) is int for rank in got)

    @pytest.mark.parametrize(
        "given", [None, 0, "01", {0, 1}, {0: 1}, range(2), np.array([0, 1]), iter([0])]
    )
    def test_no_list(self, given: Any) -> None:
        with pytest.raises(TypeError) as raised:
            contract.check_rank_ids(given, 4)
        shown = f"{given!r} of type {type(given).__name__}"
        assert str(raised.value) == f"rank_ids must be a list of ints, got {shown}"

    @pytest.mark.parametrize("rank", [1.0, True, None, "1", Fraction(1), np.array(1), Scalar()])
    def test_no_int(self, rank: Any) -> None:
        with pytest.raises(TypeError) as raised:
            contract.check_rank_ids([0, rank], 4)
        shown = f"{rank!r} of type {type(rank).__name__}"
        assert str(raised.value) == f"rank_ids must be a list of ints, got {shown} in it"

    @pytest.mark.parametrize("rank", [-1, 4, 2**70, np.int64(-4)])
    def test_outside_the_world(self, rank: Any) -> None:
        with pytest.raises(ValueError, match="process_group") as raised:
            contract.check_rank_ids([0, rank], 4)
        message = str(raised.value)
        assert "in [0, 4)" in message
        assert message.endswith(f"got {rank!r} in {[0, rank]!r}")

    @pytest.mark.parametrize("given", [[1, 1], (0, 1, 0), [1, np.int64(1)]])
    def test_twice(self, given: Any) -> None:
        with pytest.raises(ValueError, match="rank_ids must be distinct") as raised:
            contract.check_rank_ids(given, 4)
        assert str(raised.value).endswith(f"got {list(given)!r}")

    @pytest.mark.parametrize("given", [[], ()])
    def test_empty(self, given: Any) -> None:
        with pytest.raises(ValueError, match=r"rank_ids must name .* got an empty list"):
            contract.check_rank_ids(given, 4)


class TestShape:
    @pytest.mark.parametrize("shape", [(2, 3), [2, 3], (0, 3), (2, 3, 0), (1, 3, 1, 1, 1, 1, 1)])
    def test_accepted(self, shape: Any) -> None:
        contract.check_shape(shape, 3)

    @pytest.mark.parametrize(
        ("shape", "rule"),
        [
            ((), "input must have at least 2 dimensions (N, C, +), got 0 "),
            ((3,), "input must have at least 2 dimensions (N, C, +), got 1 "),
            ((2, 0), "input must have at least 1 channel, got 0 "),
            ((0, 0, 3), "input must have at least 1 channel, got 0 "),
            ((2, 4), "input must have num_features=3 channels in dimension 1, got 4 "),
            ([3, 2, 3], "input must have num_features=3 channels in dimension 1, got 2 "),
        ],
    )
    def test_refused(self, shape: Any, rule: str) -> None:
        with pytest.raises(ValueError, match="input must have") as raised:
            contract.check_shape(shape, 3)
        assert str(raised.value) == f"{rule}in shape {tuple(shape)}"


def test_count() -> None:
    for count in (0, 2, 2**40):
        contract.check_count(count)
    with pytest.raises(ValueError, match=r"the group must have more than 1 value .* got 1 over"):
        contract.check_count(1)


# (dtype of the input, dtype of the parameters)
GO_TOGETHER: list[tuple[str, str]] = [
    *((dtype, dtype) for dtype in contract.FLOATING),
    ("float16", "float32"),
    ("bfloat16", "float32"),
]
APART = [pair for pair in itertools.product(contract.FLOATING, repeat=2) if pair not in GO_TOGETHER]


class TestInputDtype:
    @pytest.mark.parametrize(("dtype", "parameters"), GO_TOGETHER)
    def test_accepted(self, dtype: str, parameters: str) -> None:
        contract.check_input_dtype(dtype, parameters)
        contract.check_input_dtype(dtype, None)

    @pytest.mark.parametrize(("dtype", "parameters"), APART)
    def test_refused(self, dtype: str, parameters: str) -> None:
        with pytest.raises(TypeError, match=f"parameters, {parameters} .* got {dtype}$"):
            contract.check_input_dtype(dtype, parameters)

    @pytest.mark.parametrize("parameters", [None, "float32"])
    def test_not_floating(self, parameters: str | None) -> None:
        with pytest.raises(TypeError, match=r"dtypes float16, bfloat16, .* got int64$"):
            contract.check_input_dtype("int64", parameters)


@pytest.mark.parametrize(
    ("module", "imported"),
    [
        ("syncbn", "[]"),
        ("syncbn.contract", "[]"),
        ("syncbn.protocol", "[]"),
        ("numpy", "['numpy']"),  # the control: the test can see an import
    ],
)
def test_no_framework_is_imported(module: str, imported: str) -> None:
    script = f"import sys, {module}; "
    script += "print([name for name in ('torch', 'mindspore', 'numpy') if name in sys.modules])"
    root = Path(syncbn.__file__).parents[1]
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, timeout=60
    )
    assert run.stdout.strip() == imported, run.stderr


def test_layers_are_attributes_of_the_package() -> None:
    script = (
        "import sys, syncbn; print('torch' in sys.modules, syncbn.torch.SyncBatchNorm.__name__)"
    )
    root = Path(syncbn.__file__).parents[1]
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, timeout=60
    )
    assert run.stdout.split() == ["False", "SyncBatchNorm"], run.stderr
    with pytest.raises(AttributeError, match="'syncbn' has no attribute 'tensorflow'"):
        syncbn.tensorflow  # noqa: B018
