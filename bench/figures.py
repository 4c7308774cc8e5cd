"""One figure, and how all of them are shown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Figure:
    """What was measured, what it is compared with, and what it may be at most."""

    name: str
    unit: str
    bound: str
    """The bound in words."""
    measured: float | None = None
    """None: it was not measured; `note` says why."""
    floor: float | None = None
    """The median that it is compared with, of the same run and in the same unit."""
    limit: float | None = None
    """The bound as a number; None: it is shown for what it tells, and nothing is demanded."""
    note: str = ""
    samples: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Every single run, by what was run."""

    @property
    def ratio(self) -> float | None:
        """How many floors it is."""
        if self.measured is None or not self.floor:
            return None
        return self.measured / self.floor

    @property
    def ok(self) -> bool | None:
        """Whether the bound is kept; None where there is none, or nothing was measured."""
        if self.measured is None or self.limit is None:
            return None
        return self.measured <= self.limit


def missing(name: str, bound: str, why: str) -> Figure:
    """A figure that could not be had."""
    return Figure(name=name, unit="", bound=bound, note=why)


_VERDICTS = {True: "yes", False: "NO", None: "-"}


def table(figures: Sequence[Figure]) -> str:
    """All figures as lines of text, notes below."""
    rows = [("figure", "measured", "floor", "ratio", "bound", "limit", "ok?")]
    for figure in figures:
        ratio = figure.ratio
        rows.append(
            (
                figure.name,
                _number(figure.measured, figure.unit),
                _number(figure.floor, figure.unit),
                "" if ratio is None else f"{ratio:.2f}",
                figure.bound,
                _number(figure.limit, figure.unit),
                _VERDICTS[figure.ok],
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    right = (False, True, True, True, False, True, False)
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if on_right else cell.ljust(width)
            for cell, width, on_right in zip(row, widths, right, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "-" * len(max(lines, key=len)))
    notes = [f"{figure.name}: {figure.note}" for figure in figures if figure.note]
    return "\n".join([*lines, *([""] if notes else []), *notes])


def write(path: Path, figures: Sequence[Figure], about: Mapping[str, object]) -> None:
    """Write all of them as JSON, with every single run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{**asdict(figure), "ratio": figure.ratio, "ok": figure.ok} for figure in figures]
    path.write_text(json.dumps({"about": dict(about), "figures": rows}, indent=1) + "\n")


def _number(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    digits = 0 if abs(value) >= 100 else 1
    return f"{value:.{digits}f} {unit}".strip()
