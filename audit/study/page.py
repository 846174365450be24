"""The tables of the study, which stand between the written text of docs/tolerances.md."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from audit import markdown
from audit.study.collect import FAILED, Measurement, Study
from audit.study.families import FAMILIES, family_of, is_of_halves
from audit.study.measures import RMS_LIMIT
from syncbn.reference.ratio import THRESHOLD

_OF_LAYER = ("cases", "median", "worst", f"over {THRESHOLD:g}")
# By measure of CANN: whether it rejects a measurement.
_REJECTS: dict[str, Callable[[Measurement], bool]] = {
    "MERE/MARE": lambda at: not (at.mere < 1 and at.mare < 1),  # type: ignore[operator]
    "mixed": lambda at: at.mixed > 1,  # type: ignore[operator]
    "RMS ratio": lambda at: at.rms > RMS_LIMIT,
}


def write(study: Study, page: Path) -> None:
    """Put the tables into the page.

    Raises:
        PageError: the page has no place for one of them.
    """
    tables = {table.__name__: table(study) for table in (setup, layers, gap, families, cann)}
    origin = f"The tables of this page are {markdown.origin()}."
    markdown.fill(page, {"origin": origin, **tables})


def wrong(study: Study) -> list[str]:
    """A line for each failure of a sound layer, and for each fault that does not show."""
    lines = []
    for layer in study.layers:
        for reason, count in study.not_run.get(layer.name, {}).items():
            if layer.sound and reason in FAILED:
                lines.append(f"{layer.name} is sound, but in {count} cases {reason}")
        worst = _worst_by_family(study, layer.name)
        for family, must_show in FAMILIES.items():
            ratio = worst.get(family)
            if layer.sound and ratio is not None and ratio > THRESHOLD:
                lines.append(f"{layer.name} is sound, but {_number(ratio)} in {family}")
            if layer.name in must_show and ratio is None:
                lines.append(f"{layer.name} has no case of {family}")
            if layer.name in must_show and ratio is not None and ratio <= THRESHOLD:
                lines.append(f"{layer.name} is unsound, but {_number(ratio)} in {family}")
    return lines


def setup(study: Study) -> str:
    """The cases, the environment, and what did not run, as a list."""
    environment = dict(study.environment)
    ranks, processor, cores = (environment.pop(name) for name in ("ranks", "processor", "cores"))
    versions = ", ".join(f"{name} {version}" for name, version in environment.items())
    lines = [f"- {len(study.cases)} cases on {ranks} ranks, {processor}, {cores} cores; {versions}"]
    for layer in study.layers:
        for reason, count in study.not_run.get(layer.name, {}).items():
            lines.append(f"- {layer.name} did not run {count} of them: {reason}")
    lines += [f"- left out: {name}, because {reason}" for name, reason in study.left_out.items()]
    return "\n".join(lines)


def layers(study: Study) -> str:
    """A row for each layer. Cases of float16 and bfloat16 have columns of their own."""
    kinds = ("32, 64 bit", "16 bit")
    header = ("layer", "", *(f"{kind}: {column}" for kind in kinds for column in _OF_LAYER))
    rows = []
    for layer in study.layers:
        ratios: dict[bool, list[float]] = {False: [], True: []}
        for id, ratio in _worst_by_case(study, layer.name).items():
            ratios[is_of_halves(family_of(study.cases[id]))].append(ratio)
        cells = [cell for kind in ratios.values() for cell in _of_layer(kind)]
        rows.append((layer.name, _soundness(layer.sound), *cells))
    return markdown.table(header, rows, right=range(2, len(header)))


def gap(study: Study) -> str:
    """The largest ratio of sound layers and the smallest of unsound ones, as a list."""
    sound: dict[bool, float] = {False: 0.0, True: 0.0}
    shown = []
    for layer in study.layers:
        for family, ratio in _worst_by_family(study, layer.name).items():
            if layer.sound:
                halves = is_of_halves(family)
                sound[halves] = max(sound[halves], ratio)
            elif layer.name in FAMILIES[family]:
                shown.append((ratio, layer.name, family))
    smallest, name, family = min(shown)
    return "\n".join(
        (
            f"- sound layers, float32 and float64: at most **{_number(sound[False])}**",
            f"- sound layers, float16 and bfloat16: at most **{_number(sound[True])}**",
            f"- the threshold: **{THRESHOLD:g}**",
            f"- unsound layers, where their fault must show: at least **{_number(smallest)}** "
            f"({name}; {family})",
        )
    )


def families(study: Study) -> str:
    """A row for each family: the worst sound layer, and each unsound one."""
    sizes = Counter(map(family_of, study.cases.values()))
    worst = {layer: _worst_by_family(study, layer.name) for layer in study.layers}
    unsound = [layer for layer in study.layers if not layer.sound]
    header = ("data", "cases", "sound", "which", *(layer.name for layer in unsound))
    rows = []
    for family, must_show in FAMILIES.items():
        if not sizes[family]:
            continue
        sound = [
            (ratios[family], layer.name)
            for layer, ratios in worst.items()
            if layer.sound and family in ratios
        ]
        largest, name = max(sound)
        cells = []
        for layer in unsound:
            ratio = worst[layer][family]
            cell = f"**{_number(ratio)}**" if ratio > THRESHOLD else _number(ratio)
            cells.append(f"{cell} †" if layer.name in must_show else cell)
        rows.append((family, str(sizes[family]), _number(largest), name, *cells))
    return markdown.table(header, rows, right=(1, 2, *range(4, len(header))))


def cann(study: Study) -> str:
    """A table for each of three quantities: how many cases each measure of CANN rejects."""
    header = ("layer", "", "cases", f"ratio over {THRESHOLD:g}", *_REJECTS)
    parts = []
    for quantity in ("y", "grad_input", "running_var"):
        rows = []
        for layer in study.layers:
            limited = [
                at
                for at in study.measurements
                if (at.layer, at.quantity) == (layer.name, quantity) and at.mare is not None
            ]
            bad = [at for at in limited if at.ratio > THRESHOLD]
            cells = [_rejected(rejects, limited, bad) for rejects in _REJECTS.values()]
            counts = (str(len(limited)), str(len(bad)))
            rows.append((layer.name, _soundness(layer.sound), *counts, *cells))
        table = markdown.table(header, rows, right=range(2, len(header)))
        parts.append(f"`{quantity}`:\n\n{table}")
    return "\n\n".join(parts)


def _rejected(
    rejects: Callable[[Measurement], bool],
    measurements: Sequence[Measurement],
    bad: Sequence[Measurement],
) -> str:
    """The number that a measure rejects, and how many bad ones it misses."""
    count = sum(map(rejects, measurements))
    missed = sum(not rejects(at) for at in bad)
    return f"{count} (misses {missed})" if missed else str(count)


def _of_layer(ratios: Sequence[float]) -> tuple[str, ...]:
    """The cells of _OF_LAYER."""
    if not ratios:
        return ("0", "", "", "0")
    over = sum(ratio > THRESHOLD for ratio in ratios)
    return str(len(ratios)), _number(statistics.median(ratios)), _number(max(ratios)), str(over)


def _worst_by_case(study: Study, layer: str) -> dict[str, float]:
    """The largest ratio of all quantities in each case, by its id."""
    worst: dict[str, float] = {}
    for at in study.measurements:
        if at.layer == layer:
            worst[at.case] = max(at.ratio, worst.get(at.case, 0.0))
    return worst


def _worst_by_family(study: Study, layer: str) -> dict[str, float]:
    """The largest ratio in each family that the layer has a case of."""
    worst: dict[str, float] = {}
    for id, ratio in _worst_by_case(study, layer).items():
        family = family_of(study.cases[id])
        worst[family] = max(ratio, worst.get(family, 0.0))
    return worst


def _soundness(sound: bool) -> str:
    return "sound" if sound else "unsound"


def _number(ratio: float) -> str:
    """Two significant digits."""
    if not math.isfinite(ratio):
        return "∞"
    return f"{ratio:.2g}" if ratio < 100 else f"{float(f'{ratio:.2g}'):,.0f}"
