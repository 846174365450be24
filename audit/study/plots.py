"""The plots of the study: small SVG files, the same bytes whenever the numbers are the same."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from audit.study.collect import QUANTITIES, Implementation, Measured, Study, StudyError
from syncbn.reference.ratio import THRESHOLD

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SMALLEST, _LARGEST = 1e-4, 1e9  # what is beyond is drawn at the edge
_LINES, _MARKS = 10, 5  # places for a ratio in a decade
_SOUND, _UNSOUND, _LIMIT = "#2166ac", "#d95f02", "#b2182b"
_STYLE = {
    "font.size": 8.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.use": True,
    "svg.fonttype": "none",  # text as text, which is smaller and can be searched
    "svg.hashsalt": "syncbn",  # or the ids in the file would be random
}


def require_matplotlib() -> None:
    """Raise a StudyError if there is no matplotlib, before anything was asked."""
    if importlib.util.find_spec("matplotlib") is None:
        raise StudyError(
            "matplotlib must be installed to draw the study: pip install -c constraints.txt "
            "-e '.[dev]'"
        )


def draw(study: Study, folder: Path) -> list[Path]:
    """Write the plots into `folder`; their paths."""
    import matplotlib as mpl

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for plot in (cases, offsets, cann):
        path = folder / f"{plot.__name__}.svg"
        with mpl.rc_context(_STYLE):
            nothing = {"Date": None, "Creator": None}
            plot(study).savefig(path, format="svg", metadata=nothing)
        paths.append(path)
    return paths


def cases(study: Study) -> Figure:
    """The largest ratio of each case, one column per implementation."""
    figure = _figure(7.2, 4.2)
    axes = figure.subplots()
    for column, one in enumerate(study.implementations):
        ratios = [worst.ratio for worst in study.worst_by_case(one.name, QUANTITIES).values()]
        _histogram(axes, column, ratios, _SOUND if one.sound else _UNSOUND)
    _threshold(axes.axhline)
    names = [one.name for one in study.implementations]
    axes.set_xticks(range(len(names)), names, fontsize=7, rotation=30, ha="right")
    axes.set_yscale("log")
    axes.set_ylim(_SMALLEST / 2, _LARGEST * 2)
    axes.set_ylabel("largest ratio of a case")
    return figure


def offsets(study: Study) -> Figure:
    """The worst ratio of each implementation against mean/std, float32 of std 1."""
    offset = {
        case.id: case.mean_over_std
        for case in study.cases.values()
        if case.dtype == "float32" and case.scale == 1.0
    }
    places = sorted(set(offset.values()))
    quantities = ("y", "grad_input", "running_var")
    figure = _figure(7.2, 3.6)
    panels = figure.subplots(1, len(quantities), sharey=True)
    for axes, quantity in zip(panels, quantities, strict=True):
        for one in study.implementations:
            worst: dict[float, float] = {}
            for id, found in study.worst_by_case(one.name, (quantity,)).items():
                if id in offset:
                    worst[offset[id]] = max(found.ratio, worst.get(offset[id], 0.0))
            at = sorted(worst)
            ratios = _within([worst[place] for place in at])
            axes.plot([places.index(place) for place in at], ratios, **_line(study, one))
        _threshold(axes.axhline)
        axes.set_title(quantity, fontsize=8)
        axes.set_xticks(range(len(places)), [f"{place:g}" for place in places], fontsize=6)
        axes.tick_params(axis="x", rotation=90)
        axes.set_xlabel("mean/std")
        axes.set_yscale("log")
    panels[0].set_ylabel("worst ratio")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=5, frameon=False, fontsize=7)
    return figure


def cann(study: Study) -> Figure:
    """CANN's measures of y, as multiples of their limits, against the ratio of the same y."""
    figure = _figure(7.2, 3.2)
    panels = figure.subplots(1, 3, sharex=True, sharey=True)
    sound = {one.name for one in study.implementations if one.sound}
    ys = [one for one in study.measured if one.quantity == "y"]
    for axes, name in zip(panels, ("mere", "mare", "mixed"), strict=True):
        for color, marker, chosen in (
            (_SOUND, "o", [one for one in ys if one.implementation in sound]),
            (_UNSOUND, "x", [one for one in ys if one.implementation not in sound]),
        ):
            points = sorted(set(_points(chosen, name)))
            axes.plot(*zip(*points, strict=True), marker, color=color, markersize=2.5)
        _threshold(axes.axvline)
        axes.axhline(1, color=_LIMIT, linewidth=0.8, linestyle=":")
        axes.set_title({"mere": "MERE", "mare": "MARE"}.get(name, name), fontsize=8)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("ratio")
    panels[0].set_ylabel("multiple of CANN's limit")
    return figure


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height))


def _threshold(line: Any) -> None:
    line(THRESHOLD, color=_LIMIT, linewidth=0.8)


def _histogram(axes: Axes, column: int, ratios: Sequence[float], color: str) -> None:
    """One line for each place on the scale, as wide as cases are many, all as one path."""
    places, counts = np.unique([_place(r, _LINES) for r in ratios], return_counts=True)
    half = 0.08 + 0.34 * counts / counts.max()
    xs = np.stack([column - half, column + half, np.full(len(half), np.nan)], axis=1)
    ys = np.repeat(places, 3)
    axes.plot(xs.ravel(), ys, color=color, linewidth=1.2, solid_capstyle="butt")


def _points(measured: Iterable[Measured], name: str) -> Iterable[tuple[float, float]]:
    for one in measured:
        value = getattr(one, name)
        if value is not None:
            yield _place(one.ratio, _MARKS), _place(value, _MARKS)


def _place(value: float, per_decade: int) -> float:
    """The nearest place on a grid of equal ratios, so that many cases need few marks."""
    inside = float(_within([value])[0])
    return float(10 ** (round(math.log10(inside) * per_decade) / per_decade))


def _within(values: Sequence[float]) -> Any:
    return np.clip(values, _SMALLEST, _LARGEST)


def _line(study: Study, one: Implementation) -> dict[str, Any]:
    alike = [other for other in study.implementations if other.sound == one.sound]
    return {
        "label": one.name,
        "color": _SOUND if one.sound else _UNSOUND,
        "marker": "osD^v<>PX*"[alike.index(one)],
        "markersize": 3,
        "linewidth": 0.8,
    }
