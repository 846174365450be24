"""The tables of the study, which stand between hand-written text in docs/tolerances.md."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from audit import markdown
from audit.study.collect import (
    FAILED,
    QUANTITIES,
    Asked,
    Implementation,
    Measured,
    Study,
)
from audit.study.measures import RMS_LIMIT
from syncbn.reference.ratio import THRESHOLD

_FEW = 1000  # values per channel
_OF_LAYER = ("cases", "median", "worst", f"over {THRESHOLD:g}")
_OF_CANN: dict[str, Callable[[Measured], bool]] = {
    "MERE/MARE": lambda one: not (one.mere < 1 and one.mare < 1),  # type: ignore[operator]
    "mixed": lambda one: one.mixed > 1,  # type: ignore[operator]
    "RMS ratio": lambda one: one.rms > RMS_LIMIT,
}


@dataclass(frozen=True)
class Family:
    """A kind of data. shows: the unsound layers whose fault it must bring out.

    of_halves: whether it is of float16 or bfloat16.
    """

    name: str
    holds: Callable[[Asked], bool]
    shows: tuple[str, ...] = ()
    of_halves: bool = False


_ONE_PASS, _RAW = "one-pass variance", "raw-moment gradients"
_IN_FLOAT16 = ("float16 statistics", "float16 gradient sums")


def _of_halves() -> Iterable[Family]:
    for dtype in ("float16", "bfloat16"):
        for few in (True, False):

            def holds(case: Asked, dtype: str = dtype, few: bool = few) -> bool:
                return case.dtype == dtype and (case.values <= _FEW) == few

            size = f"{'up to' if few else 'more than'} {_FEW:,} values"
            yield Family(f"{dtype}, {size} per channel", holds, _IN_FLOAT16, of_halves=True)


def _of_offsets() -> Iterable[Family]:
    bounds = ((0, 0), (1, 10), (30, 30), (100, 100), (300, 300), (1e3, 1e3), (1e4, 1e4), (1e5, 1e5))
    for low, high in bounds:

        def holds(case: Asked, low: float = low, high: float = high) -> bool:
            return low <= case.mean_over_std <= high

        name = f"{low:g}" if low == high else f"{low:g} to {high:g}"
        yield Family(f"mean/std {name}", holds, (_ONE_PASS,) if low >= 1e3 else ())


# A case is of the first family that holds it; those that name no dtype are of float32.
FAMILIES = (
    Family("float64", lambda case: case.dtype == "float64", (_ONE_PASS,)),
    *_of_halves(),
    Family(
        "scale 1e-18 or 1e18",
        lambda case: not 1e-18 < case.scale < 1e18,
        (_ONE_PASS,),
    ),
    Family("std 1e-8 to 1e-2, eps 1e-5", lambda case: case.scale < 1 and case.eps > 0),
    Family(
        "equal values on each rank, mean/std to 300",
        lambda case: case.alike and case.mean_over_std <= 300,
    ),
    Family("the same, mean/std from 1e3", lambda case: case.alike, (_ONE_PASS, _RAW)),
    Family(
        "dy orthogonal to x, mean/std from 1e3", lambda case: case.orthogonal, (_ONE_PASS, _RAW)
    ),
    *_of_offsets(),
)


def write(study: Study, page: Path) -> None:
    """Put the tables into the page.

    Raises:
        PageError: the page has no place for one of them.
    """
    made = (asked, layers, gap, families, cann)
    markdown.fill(page, {table.__name__: table(study) for table in made})


def wrong(study: Study) -> list[str]:
    """Where a sound layer failed or is over the threshold, or an unsound one is not and must be."""
    found = []
    for one in study.implementations:
        for reason, count in study.unanswered.get(one.name, {}).items():
            if one.sound and reason in FAILED:
                found.append(f"{one.name} is sound, but in {count} cases {reason}")
        worst = {family: measured.ratio for family, measured in _by_family(study, one).items()}
        for family in FAMILIES:
            ratio = worst.get(family)
            if one.sound and ratio is not None and ratio > THRESHOLD:
                found.append(f"{one.name} is sound, but {_number(ratio)} in {family.name}")
            if one.name in family.shows and ratio is None:
                found.append(f"{one.name} was not asked about {family.name}")
            if one.name in family.shows and ratio is not None and ratio <= THRESHOLD:
                found.append(f"{one.name} is unsound, but {_number(ratio)} in {family.name}")
    return found


def asked(study: Study) -> str:
    """What was asked of which layers, on what, as a list."""
    environment = dict(study.environment)
    ranks, processor, cores = (environment.pop(name) for name in ("ranks", "processor", "cores"))
    versions = ", ".join(f"{name} {version}" for name, version in environment.items())
    lines = [f"- {len(study.cases)} cases on {ranks} ranks, {processor}, {cores} cores; {versions}"]
    for one in study.implementations:
        for reason, count in study.unanswered.get(one.name, {}).items():
            lines.append(f"- {one.name} could not be asked {count} of them: {reason}")
    lines += [f"- left out: {name}, {reason}" for name, reason in study.left_out.items()]
    return "\n".join(lines)


def layers(study: Study) -> str:
    """A row for each layer: its cases of halves apart from the others."""
    kinds = ("32, 64 bit", "16 bit")
    header = ("layer", "", *(f"{kind}: {what}" for kind in kinds for what in _OF_LAYER))
    rows = []
    for one in study.implementations:
        ratios: dict[bool, list[float]] = {False: [], True: []}
        for id, found in study.worst_by_case(one.name, QUANTITIES).items():
            ratios[_family(study.cases[id]).of_halves].append(found.ratio)
        cells = [cell for of in ratios.values() for cell in _of_layer(of)]
        rows.append((one.name, "sound" if one.sound else "unsound", *cells))
    return markdown.table(header, rows, right=range(2, len(header)))


def gap(study: Study) -> str:
    """How near to the threshold sound and unsound layers come, as a list."""
    worst = {one: _by_family(study, one) for one in study.implementations}
    sound = [of for one, of in worst.items() if one.sound]
    shown = [
        (found.ratio, one.name, family.name)
        for one, of in worst.items()
        for family, found in of.items()
        if one.name in family.shows
    ]

    def largest(halves: bool) -> str:
        ratios = [r.ratio for of in sound for f, r in of.items() if f.of_halves == halves]
        return _number(max(ratios, default=0.0))

    smallest, name, data = min(shown)
    return "\n".join(
        (
            f"- sound layers, float32 and float64: at most **{largest(False)}**",
            f"- sound layers, float16 and bfloat16: at most **{largest(True)}**",
            f"- the threshold: **{THRESHOLD:g}**",
            f"- unsound layers, where their fault must show: at least **{_number(smallest)}** "
            f"({name}; {data})",
        )
    )


def families(study: Study) -> str:
    """A row for each family: the worst sound layer, and each unsound one."""
    by_layer = {one: _by_family(study, one) for one in study.implementations}
    unsound = [one for one in study.implementations if not one.sound]
    header = ("data", "cases", "sound", "which", *(one.name for one in unsound))
    sizes = dict.fromkeys(FAMILIES, 0)
    for case in study.cases.values():
        sizes[_family(case)] += 1
    rows = []
    for family, size in sizes.items():
        sound = [
            (by_layer[one][family].ratio, one.name)
            for one in by_layer
            if one.sound and family in by_layer[one]
        ]
        if not size or not sound:
            continue
        largest = max(sound)
        cells = []
        for one in unsound:
            ratio = by_layer[one][family].ratio
            cell = f"**{_number(ratio)}**" if ratio > THRESHOLD else _number(ratio)
            cells.append(f"{cell} †" if one.name in family.shows else cell)
        rows.append((family.name, str(size), _number(largest[0]), largest[1], *cells))
    return markdown.table(header, rows, right=(1, 2, *range(4, len(header))))


def cann(study: Study) -> str:
    """A table for each of three quantities: how many cases each measure rejects."""
    parts = []
    for quantity in ("y", "grad_input", "running_var"):
        header = ("layer", "", "cases", f"ratio over {THRESHOLD:g}", *_OF_CANN)
        rows = []
        for one in study.implementations:
            # float64 has no limits
            found = [
                measured
                for measured in study.measured
                if measured.implementation == one.name
                and measured.quantity == quantity
                and measured.mare is not None
            ]
            bad = [measured for measured in found if measured.ratio > THRESHOLD]
            cells = []
            for rejects in _OF_CANN.values():
                missed = sum(not rejects(measured) for measured in bad)
                count = str(sum(map(rejects, found)))
                cells.append(f"{count} (misses {missed})" if missed else count)
            kind = "sound" if one.sound else "unsound"
            rows.append((one.name, kind, str(len(found)), str(len(bad)), *cells))
        table = markdown.table(header, rows, right=range(2, 4 + len(_OF_CANN)))
        parts.append(f"`{quantity}`:\n\n{table}")
    return "\n\n".join(parts)


def _of_layer(ratios: Sequence[float]) -> tuple[str, ...]:
    """What _OF_LAYER names."""
    if not ratios:
        return ("0", "", "", "0")
    over = sum(ratio > THRESHOLD for ratio in ratios)
    return str(len(ratios)), _number(statistics.median(ratios)), _number(max(ratios)), str(over)


def _family(case: Asked) -> Family:
    return next(family for family in FAMILIES if family.holds(case))


def _by_family(study: Study, one: Implementation) -> dict[Family, Measured]:
    """The largest ratio of a layer in each family."""
    worst: dict[Family, Measured] = {}
    for id, found in study.worst_by_case(one.name, QUANTITIES).items():
        family = _family(study.cases[id])
        if family not in worst or found.ratio > worst[family].ratio:
            worst[family] = found
    return worst


def _number(ratio: float) -> str:
    """Two significant digits."""
    if not math.isfinite(ratio):
        return "∞"
    return f"{ratio:.2g}" if ratio < 100 else f"{float(f'{ratio:.2g}'):,.0f}"
