"""The check of torch_npu: on its wheel, if the toolchain is there, and on planted ones anywhere."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from audit.ladder.torch_npu import Call, build_stand_ins, check, judge

TOOLCHAIN = Path(__file__).parents[2] / ".toolchain"
LIST = "torch_npu/csrc/aten/npu_native_functions_by_codegen.yaml"
STATS = "aten::batch_norm_stats"
CALLED = {f"aten::batch_norm_{name}" for name in ("stats", "elemt", "backward_reduce")} | {
    "aten::batch_norm_backward_elemt"
}

needs_toolchain = pytest.mark.skipif(
    not (TOOLCHAIN / "torch_npu").is_dir(), reason="no torch_npu in .toolchain"
)
needs_compiler = pytest.mark.skipif(
    not all(map(shutil.which, ("cc", "nm", "readelf"))), reason="no C compiler or binutils"
)


class TestJudge:
    CALL = Call(STATS, (("input", "Tensor"), ("eps", "float")), 2)

    def fault(self, declared: str, call: Call = CALL) -> str:
        (finding,) = judge("2.0", [call], {STATS: f"{STATS}{declared}"}, [STATS])
        assert (finding.subject, finding.version, finding.evidence) == (STATS, "2.0", "registered")
        return finding.fault

    @pytest.mark.parametrize(
        ("declared", "fault"),
        [
            ("(Tensor input, float eps) -> (Tensor, Tensor)", ""),
            ("(Tensor? input, float eps) -> (Tensor, Tensor)", ""),
            (
                "(Tensor self, float eps) -> (Tensor, Tensor)",
                "takes (self, eps), is called with (input, eps)",
            ),
            (
                "(float eps, Tensor input) -> (Tensor, Tensor)",
                "takes (eps, input), is called with (input, eps)",
            ),
            ("(Tensor input) -> (Tensor, Tensor)", "takes (input), is called with (input, eps)"),
            (
                "(Tensor input, float eps, bool exact) -> (Tensor, Tensor)",
                "takes (input, eps, exact), is called with (input, eps)",
            ),
            (
                "(Tensor input, int eps) -> (Tensor, Tensor)",
                "takes eps as int, is called with float",
            ),
            ("(Tensor input, float eps) -> Tensor", "has 1 results, is called for 2"),
        ],
    )
    def test_schema(self, declared: str, fault: str) -> None:
        assert self.fault(declared) == fault

    def test_none_needs_an_optional_argument(self) -> None:
        call = Call(STATS, (("input", "None"),), 1)
        assert self.fault("(Tensor? input) -> Tensor", call) == ""
        wrong = "takes input as Tensor, is called with None"
        assert self.fault("(Tensor input) -> Tensor", call) == wrong

    def test_missing(self) -> None:
        schemas = {STATS: f"{STATS}(Tensor input, float eps) -> (Tensor, Tensor)"}
        (finding,) = judge("2.0", [self.CALL], {}, [STATS])
        assert finding.fault == "is not listed"
        (finding,) = judge("2.0", [self.CALL], schemas, [])
        assert finding.fault == "has no PrivateUse1 kernel"
        (finding,) = judge("2.0", [self.CALL], schemas)
        assert (finding.fault, finding.evidence) == ("", "declared")

    def test_one_bad_call_among_good_ones(self) -> None:
        other = Call(STATS, (("input", "None"), ("eps", "float")), 2)
        for calls in ((self.CALL, other), (other, self.CALL)):
            schemas = {STATS: f"{STATS}(Tensor input, float eps) -> (Tensor, Tensor)"}
            (finding,) = judge("2.0", calls, schemas)
            assert finding.fault == "takes input as Tensor, is called with None"


PLANTED = """
import types
import torch

torch.utils.rename_privateuse1_backend("npu")
module = types.ModuleType("npu")
module.is_initialized = lambda: False
torch._register_device_module("npu", module)
__version__ = "0.planted"
library = torch.library.Library("aten", "IMPL")
for name in ("stats", "elemt", "backward_elemt"):
    library.impl(f"batch_norm_{name}", lambda *_: None, "PrivateUse1")
"""
LISTED = """
- func: batch_norm_backward_elemt(Tensor grad_out, Tensor input, Tensor mean, Tensor invstd, \
Tensor? weight, Tensor sum_dy, Tensor sum_dy_xmu, Tensor count) -> Tensor
  device_check: NoCheck
- func: batch_norm_backward_reduce(Tensor grad_out, Tensor input, Tensor mean, Tensor invstd, \
Tensor? weight, bool input_g, bool weight_g, bool bias_g) -> (Tensor, Tensor, Tensor, Tensor)
- func: batch_norm_elemt(Tensor input, Tensor? weight, Tensor? bias, Tensor mean, \
Tensor invstd, float eps) -> Tensor
"""


class TestPlanted:
    def test_faults_are_named(self, tmp_path: Path) -> None:
        """A torch_npu of Python that lacks a kernel and hccl, and lists an operator too few."""
        listing = tmp_path / "torch_npu" / LIST
        listing.parent.mkdir(parents=True)
        listing.write_text(LISTED)
        (tmp_path / "torch_npu" / "torch_npu" / "__init__.py").write_text(PLANTED)
        with zipfile.ZipFile(tmp_path / "torch_npu-1.5-cp311-none-any.whl", "w") as wheel:
            wheel.writestr(LIST, LISTED.replace("Tensor mean, Tensor invstd", "Tensor mean"))
        faults = {(f.version, f.subject): f.fault for f in check(tmp_path) if f.fault}
        assert {name for version, name in faults if version == "1.5"} == CALLED
        assert {name: fault for (version, name), fault in faults.items() if version != "1.5"} == {
            STATS: "is not listed",
            "aten::batch_norm_backward_reduce": "has no PrivateUse1 kernel",
            "hccl": "is not a backend of torch.distributed",
        }

    def test_no_wheel(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="pip install --no-deps --target"):
            check(tmp_path)

    def test_wheel_that_cannot_be_imported(self, tmp_path: Path) -> None:
        package = tmp_path / "torch_npu" / "torch_npu"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("raise ImportError('no such symbol')")
        with pytest.raises(RuntimeError, match=r"cannot be checked:\n[^$]*no such symbol"):
            check(tmp_path)


@needs_compiler
def test_stand_ins(tmp_path: Path) -> None:
    """A library whose dependency is gone can be loaded with the stand-in, which returns 0."""
    package, stand_ins = tmp_path / "torch_npu", tmp_path / "stand_ins"
    (package / "lib").mkdir(parents=True)
    stand_ins.mkdir()
    cann, middle = package / "lib" / "libcann.so", package / "lib" / "libmiddle.so"
    _compile(cann, "int acl_one(void) { return 1; }")
    _compile(middle, "int acl_one(void); int middle(void) { return acl_one(); }", cann)
    top = package / "_C.so"
    _compile(top, "int middle(void); int top(void) { return 40 + middle(); }", middle)
    cann.unlink()
    build_stand_ins(tmp_path, stand_ins)
    assert [file.name for file in stand_ins.iterdir()] == ["libcann.so"]
    ctypes.CDLL(str(stand_ins / "libcann.so"))
    ctypes.CDLL(str(middle))
    assert ctypes.CDLL(str(top)).top() == 40


def _compile(library: Path, source: str, *linked: Path) -> None:
    command = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-x", "none", *map(str, linked)]
    command += [f"-Wl,-soname,{library.name}", "-o", str(library)]
    subprocess.run(command, input=source, text=True, check=True)


@needs_toolchain
@needs_compiler
class TestWheel:
    def test_fits(self) -> None:
        findings = check(TOOLCHAIN)
        assert [finding for finding in findings if finding.fault] == []
        registered = {f.subject for f in findings if f.evidence == "registered"}
        assert registered == CALLED | {"hccl"}
