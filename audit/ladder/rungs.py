"""Run the rungs of the ladder: every kernel, layout and dtype, and the planted faults."""

from __future__ import annotations

import functools
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

from rich.console import Console
from rich.table import Table

from audit.ladder import (
    cuda,
    interpreted,
    judged,
    lowered,
    planted,
    toolchain,
    torch_npu,
    twin_build,
)
from syncbn.kernels import batch_norm, twin
from syncbn.kernels.plan import Tiles
from syncbn.kernels.variants import DTYPES, LAYOUTS, TILED, Variant, variants
from syncbn.reference.ratio import THRESHOLD

_FRONT_END = threading.Lock()

T = TypeVar("T")
U = TypeVar("U")


class Cell(NamedTuple):
    """The result of a rung for a kernel in one layout and dtype."""

    kernel: str
    layout: str
    dtype: str
    rung: str
    fault: str = ""  # empty if the rung holds
    # The largest ratio to the bound, or the most KiB on chip that a tile takes; None if the rung
    # measures nothing.
    measure: float | None = None


class Refusal(NamedTuple):
    """The result of a rung for a planted fault."""

    rung: str
    fault: str
    reason: str  # why the rung refused it; empty if it did not, and then the check fails


class Found(NamedTuple):
    """The results of a rung."""

    cells: list[Cell]
    refusals: list[Refusal]
    findings: Sequence[torch_npu.Finding] = ()

    @property
    def good(self) -> bool:
        """Whether every kernel and operator holds and every planted fault was refused."""
        faults = [cell.fault for cell in self.cells] + [finding.fault for finding in self.findings]
        return not any(faults) and all(refusal.reason for refusal in self.refusals)


def check(rungs: Sequence[str], console: Console) -> bool:
    """Run these rungs and print their results; True if all of them are good."""
    cells: list[Cell] = []
    refusals: list[Refusal] = []
    findings: list[torch_npu.Finding] = []
    for rung in rungs:
        started = time.monotonic()
        found = _run(rung)
        cells += found.cells
        refusals += found.refusals
        findings += found.findings
        verdict = "holds" if found.good else "DOES NOT HOLD"
        _print(console, f"{rung} {verdict}, {time.monotonic() - started:.0f} s")
    _print_cells(cells, console)
    _print_findings(findings, console)
    _print_refusals(refusals, console)
    good = Found(cells, refusals, findings).good
    left_out = [rung for rung in RUNGS if rung not in rungs]
    what = f"{len(cells)} cells, {len(findings)} operators, {len(refusals)} planted faults"
    _print(console, f"{'pass' if good else 'FAIL'}: {what} on {', '.join(rungs)}")
    if left_out:
        _print(console, f"not run: {', '.join(left_out)}")
    return good


def _run(rung: str) -> Found:
    """The results of a rung; a tool that fails counts as a fault of all kernels."""
    try:
        return RUNGS[rung]()
    except (lowered.Refused, twin_build.NotCompiled, RuntimeError) as error:
        if isinstance(error, toolchain.MissingTool):
            raise
        return Found([Cell("all", "", "", rung, str(error))], [])


def _interpreted() -> Found:
    plain = [(dtype, None) for dtype in DTYPES]
    faulty = [("fp16", fault) for fault in planted.FAULTS]
    ratios = _map(lambda task: interpreted.ratios(*task), [*plain, *faulty])
    cells, refusals = [], []
    for (dtype, fault), found in zip([*plain, *faulty], ratios, strict=True):
        if fault:
            refusals.append(Refusal("interpreted", fault, _beyond_the_bound(found)))
        else:
            cells += _cells_of_ratios("interpreted", dtype, found)
    return Found(_worst(cells), refusals)


def _lowered() -> Found:
    every = variants("ascend")
    cells = [
        Cell(v.kernel, v.layout, v.dtype, "lowered", fault, kib)
        for v, (fault, kib) in zip(every, _map(_accepted, every), strict=True)
    ]
    faults = {
        "float64": (planted.float64_sum, planted.SIGNATURE, planted.CONSTANTS),
        "tuple reduce": (planted.tuple_reduce, planted.SIGNATURE, planted.CONSTANTS),
        "over-large tile": _arguments(Variant("stats", Tiles(False, 16, 1024), "fp32"), batch_norm),
    }
    refusals = [
        Refusal("lowered", fault, _refused(*arguments)) for fault, arguments in faults.items()
    ]
    return Found(_worst(cells), refusals)


def _twin() -> Found:
    every = variants("ascend")
    _compile(every, _map(_linalg, every), twin.LIBRARY)
    operations = twin.operations()
    cells, refusals = [], []
    for dtype in DTYPES:
        found = {layout: judged.worst_ratios(operations, layout, dtype) for layout in LAYOUTS}
        cells += _cells_of_ratios("twin", dtype, found)
    halves = [v for v in every if v.dtype == "fp16" or v.tiles is None]
    for fault in planted.FAULTS:
        with tempfile.TemporaryDirectory() as folder:
            kernels = planted.faulty_kernels(fault, Path(folder))
            modules = [_lower(variant, kernels) for variant in halves]
            library = Path(folder) / "twin.so"
            _compile(halves, modules, library)
            faulty = twin.operations(library)
            found = {layout: judged.worst_ratios(faulty, layout, "fp16") for layout in LAYOUTS}
        refusals.append(Refusal("twin", fault, _beyond_the_bound(found)))
    return Found(_worst(cells), refusals)


def _cuda() -> Found:
    cells, refusals = [], []
    reasons = _map(cuda.compile_all, cuda.CAPABILITIES)
    for capability, refused in zip(cuda.CAPABILITIES, reasons, strict=True):
        rung = f"sm_{capability}"
        for v in variants("cuda"):
            cells.append(Cell(v.kernel, v.layout, v.dtype, rung, refused.pop(v.symbol) or ""))
        refusals += [Refusal(rung, fault, reason or "") for fault, reason in refused.items()]
    return Found(_worst(cells), refusals)


def _registered() -> Found:
    faults = torch_npu.planted(toolchain.FOLDER)
    refusals = [Refusal("registered", fault, reason) for fault, reason in faults.items()]
    return Found([], refusals, torch_npu.check(toolchain.FOLDER))


RUNGS: dict[str, Callable[[], Found]] = {
    "interpreted": _interpreted,
    "lowered": _lowered,
    "twin": _twin,
    "cuda": _cuda,
    "registered": _registered,
}


@functools.cache
def _linalg(variant: Variant) -> str:
    return _lower(variant, batch_norm)


def _lower(variant: Variant, kernels: ModuleType) -> str:
    """The kernel as linalg; one at a time, because Triton's front end is not thread-safe."""
    with _FRONT_END:
        return lowered.lower(*_arguments(variant, kernels))


def _accepted(variant: Variant) -> tuple[str, float | None]:
    """The fault and None, or "" and the KiB on chip that the kernel takes."""
    try:
        return "", lowered.accept(_linalg(variant)) / 1024
    except lowered.Refused as refused:
        return str(refused), None


def _refused(kernel: Any, signature: dict[str, str], constants: dict[str, Any]) -> str:
    try:
        lowered.accept(lowered.lower(kernel, signature, constants))
    except lowered.Refused as refused:
        return str(refused)
    return ""


def _arguments(variant: Variant, kernels: ModuleType) -> tuple[Any, dict[str, str], dict[str, Any]]:
    kernel = getattr(kernels, variant.kernel)
    return kernel, variant.signature(kernel.arg_names), variant.constants


def _compile(of: list[Variant], modules: list[str], library: Path) -> None:
    by_symbol = dict(zip((variant.symbol for variant in of), modules, strict=True))
    twin_build.build(by_symbol, twin.sources(), library)


def _cells_of_ratios(rung: str, dtype: str, found: dict[str, dict[str, float]]) -> list[Cell]:
    def fault(ratio: float) -> str:
        return "" if ratio <= THRESHOLD else f"{ratio:.3g} times the bound"

    def place(kernel: str, layout: str) -> tuple[str, str]:
        return (layout, dtype) if kernel in TILED else ("channels", dtype)

    return [
        Cell(kernel, *place(kernel, layout), rung, fault(ratio), ratio)
        for layout, kernels in found.items()
        for kernel, ratio in kernels.items()
    ]


def _beyond_the_bound(found: dict[str, dict[str, float]]) -> str:
    worst, where = max(
        (ratio, f"{kernel} of {layout}")
        for layout, kernels in found.items()
        for kernel, ratio in kernels.items()
    )
    return f"{where}: {worst:.3g} times the bound" if worst > THRESHOLD else ""


def _worst(cells: list[Cell]) -> list[Cell]:
    """One cell per kernel, layout, dtype and rung: a tile that is refused, or the largest."""
    ordered = sorted(cells, key=lambda cell: (bool(cell.fault), cell.measure or 0.0))
    return list({cell[:4]: cell for cell in ordered}.values())


def _map(function: Callable[[T], U], values: Iterable[T]) -> list[U]:
    """In threads, because the work is in other processes."""
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return list(threads.map(function, values))


def _print(console: Console, line: str) -> None:
    """Print a line without markup or wrapping."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def _print_cells(cells: list[Cell], console: Console) -> None:
    rungs = list(dict.fromkeys(cell.rung for cell in cells))
    units = {"interpreted": "ratio", "lowered": "KiB", "twin": "ratio"}
    table = Table(box=None, pad_edge=False)
    for title in ("kernel", "layout", "dtype"):
        table.add_column(title)
    for rung in rungs:
        table.add_column(f"{rung}\n{units.get(rung, '')}", justify="right")
    by_row: dict[tuple[str, str, str], dict[str, Cell]] = {}
    for cell in cells:
        by_row.setdefault((cell.kernel, cell.layout, cell.dtype), {})[cell.rung] = cell
    for row, found in sorted(by_row.items()):
        table.add_row(*row, *(_text(found.get(rung)) for rung in rungs))
    if cells:
        console.print(table)
    for cell in cells:
        if cell.fault:
            where = " ".join(filter(None, cell[:3]))
            _print(console, f"{cell.rung} of {where}: {cell.fault}")


def _text(cell: Cell | None) -> str:
    if cell is None:
        return ""
    if cell.fault:
        return "REFUSED"
    return "code" if cell.measure is None else f"{cell.measure:.3g}"


def _print_findings(findings: list[torch_npu.Finding], console: Console) -> None:
    for finding in findings:
        result = f"FAULT: {finding.fault}" if finding.fault else finding.evidence
        _print(console, f"torch_npu {finding.version}: {finding.subject} {result}")


def _print_refusals(refusals: list[Refusal], console: Console) -> None:
    for rung, fault, reason in refusals:
        result = f"refused: {reason}" if reason else "NOT REFUSED"
        _print(console, f"planted on {rung}, {fault}: {result}")
