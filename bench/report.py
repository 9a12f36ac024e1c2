"""
What the figures of several rounds say: the middle one, their spread, and which budgets are met.

Plain values; `bench.overhead` measures them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import attrs

Json = Any

DIRECT: Final = "direct"
GATEWAY: Final = "claudegw"


@attrs.frozen
class Spread:
    """
    What several rounds found.

    Attributes:
        median: the middle figure.
        low: the least.
        high: the greatest.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, figures: Sequence[float]) -> Spread:
        return cls(statistics.median(figures), min(figures), max(figures))

    def __str__(self) -> str:
        shown = [number(figure) for figure in (self.median, self.low, self.high)]
        return shown[0] if shown[1] == shown[2] else f"{shown[0]} ({shown[1]}-{shown[2]})"


def number(figure: float) -> str:
    """Three digits of it, or all that stand before the point."""
    if math.isinf(figure):
        return "never"
    if abs(figure) >= 1000:
        return f"{figure:,.0f}".replace(",", " ")
    before = len(str(int(abs(figure)))) if abs(figure) >= 1 else 0
    shown = f"{figure:.{3 - before if before else 3}f}"
    return shown.rstrip("0").rstrip(".") if "." in shown else shown


@attrs.define
class Results:
    """
    All figures.

    Attributes:
        rows: for each row of the table, for each contestant, its figure in each round.
    """

    rows: dict[str, dict[str, list[float]]] = attrs.field(factory=dict)

    def add(self, row: str, contestant: str, figure: float) -> None:
        """One figure of one round."""
        self.rows.setdefault(row, {}).setdefault(contestant, []).append(figure)

    def of(self, row: str, contestant: str = GATEWAY) -> list[float]:
        """Its figures, a round each; none if it was not measured."""
        return self.rows.get(row, {}).get(contestant, [])

    def against(
        self, row: str, compare: Callable[[float, float], float], contestant: str = GATEWAY
    ) -> list[float]:
        """Its figures, each compared with the direct one of the same round."""
        pairs = zip(self.of(row, contestant), self.of(row, DIRECT), strict=False)
        return [compare(figure, direct) for figure, direct in pairs]

    def json(self) -> Json:
        """Them as values."""
        return {
            row: {
                name: {**attrs.asdict(Spread.of(figures)), "rounds": figures}
                for name, figures in columns.items()
            }
            for row, columns in self.rows.items()
        }


@attrs.frozen
class Budget:
    """
    One line of what the gateway may cost.

    Attributes:
        what: it is about.
        bound: what the median may not pass.
        figures: those that count, a round each.
        at_least: the bound is a lower one.
    """

    what: str
    bound: float
    figures: Callable[[Results], Sequence[float]]
    at_least: bool = False

    def judged(self, results: Results) -> Verdict:
        """Whether it is met."""
        figures = self.figures(results)
        if not figures:
            return Verdict(self, None)
        return Verdict(self, Spread.of(figures))


@attrs.frozen
class Verdict:
    """
    A budget, and what was measured.

    Attributes:
        found: None where nothing was.
    """

    budget: Budget
    found: Spread | None

    @property
    def is_met(self) -> bool:
        if self.found is None:
            return False
        if self.budget.at_least:
            return self.found.median >= self.budget.bound
        return self.found.median <= self.budget.bound

    def __str__(self) -> str:
        bound = f"at {'least' if self.budget.at_least else 'most'} {number(self.budget.bound)}"
        said = "not measured" if self.found is None else "met" if self.is_met else "MISSED"
        return f"{said:12} {self.budget.what:58} {bound:16} {self.found or ''}"

    def json(self) -> Json:
        """It as values."""
        found = None if self.found is None else attrs.asdict(self.found)
        return {"what": self.budget.what, "bound": self.budget.bound, "met": self.is_met} | {
            "found": found
        }


def table(rows: Mapping[str, Mapping[str, Sequence[float]]], contestants: Sequence[str]) -> str:
    """A line a row, a column a contestant."""
    lines = [["", *contestants]]
    for row, columns in rows.items():
        cells = [columns.get(name, ()) for name in contestants]
        lines.append([row, *(str(Spread.of(cell)) if cell else "" for cell in cells)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
