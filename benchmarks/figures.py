"""What a row reports: figures with their spread, the peer measured beside them, and the goal.

Only the ratio to the peer of the same run is comparable between machines; absolute values describe this run alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any, Literal

import attrs

from benchmarks.measure import Cost

Values = tuple[float, ...]


def _values(values: Sequence[float]) -> Values:
    return tuple(float(value) for value in values)


@attrs.frozen
class Goal:
    """A bound on our median, or on the ratio of ours to the peer's."""

    sense: Literal[">=", "<="]
    bound: float
    of: Literal["ours", "ratio"] = "ours"

    def __str__(self) -> str:
        """The bound as it stands in a table."""
        return f"{self.sense} {self.bound:g}{' x' if self.of == 'ratio' else ''}"


@attrs.frozen(kw_only=True)
class Figure:
    """One measured quantity: every repetition of ours and, where there is a peer, of the peer's, in the same order."""

    name: str
    unit: str
    ours: Values = attrs.field(converter=_values)
    peer: str = ""
    theirs: Values = attrs.field(default=(), converter=_values)
    goal: Goal | None = None

    @property
    def ratio(self) -> float | None:
        """Median over the rounds of ours / theirs: neighbours in time share the machine's mood."""
        if not self.theirs:
            return None
        if len(self.ours) != len(self.theirs):
            return median(self.ours) / median(self.theirs)
        return median(ours / theirs for ours, theirs in zip(self.ours, self.theirs, strict=True))

    @property
    def met(self) -> bool | None:
        """Whether the goal is reached; None where there is none."""
        value = None if self.goal is None else median(self.ours) if self.goal.of == "ours" else self.ratio
        if self.goal is None or value is None:
            return None
        return value >= self.goal.bound if self.goal.sense == ">=" else value <= self.goal.bound

    def to_dict(self) -> dict[str, Any]:
        """Everything, rounded to what is meaningful, for the JSON file."""
        return {
            "name": self.name,
            "unit": self.unit,
            "ours": _rounded(self.ours),
            "median": _digits(median(self.ours)),
            "spread": spread(self.ours),
            "peer": self.peer or None,
            "theirs": _rounded(self.theirs),
            "ratio": None if self.ratio is None else _digits(self.ratio),
            "goal": None if self.goal is None else str(self.goal),
            "met": self.met,
        }

    def cells(self) -> list[str]:
        """The figure as one line of a table: name, ours, peer, theirs, ratio, goal."""
        theirs = _shown(self.theirs) if self.theirs else ""
        ratio = "" if self.ratio is None else f"{self.ratio:.2f}"
        verdict = {None: "", True: " met", False: " MISSED"}[self.met]
        goal = f"{self.goal}{verdict}" if self.goal else ""
        return [self.name, f"{_shown(self.ours)} {self.unit}", self.peer, theirs, ratio, goal]


def throughput(
    name: str,
    tokens: Sequence[float],
    ours: Sequence[Cost],
    peer: str,
    theirs: Sequence[Cost],
    goal: Goal | None = None,
) -> list[Figure]:
    """Tokens per second on the clock, and per second of CPU time, which hardly moves when others want the cores."""
    per_clock = {"wall": (name, "tokens/s", goal), "cpu": (f"{name}, CPU", "tokens/CPU s", None)}
    return [
        Figure(
            name=title,
            unit=unit,
            ours=[count / getattr(one, clock) for count, one in zip(tokens, ours, strict=True)],
            peer=peer,
            theirs=[count / getattr(one, clock) for count, one in zip(tokens, theirs, strict=True)],
            goal=wanted,
        )
        for clock, (title, unit, wanted) in per_clock.items()
    ]


def spread(values: Values) -> float:
    """Half the distance between the second smallest and second largest value, relative to the median."""
    kept = sorted(values)[1:-1] if len(values) > 4 else sorted(values)
    middle = median(values)
    return round((kept[-1] - kept[0]) / 2 / middle, 3) if middle else 0.0


def _shown(values: Values) -> str:
    return (
        f"{_digits(median(values)):,g} ±{100 * spread(values):.0f} %" if len(values) > 1 else f"{_digits(values[0]):,g}"
    )


def _rounded(values: Values) -> list[float]:
    return [_digits(value) for value in values]


def _digits(value: float) -> float:
    return float(f"{value:.4g}")
