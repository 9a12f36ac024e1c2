"""What the figures of several rounds say."""

from __future__ import annotations

import math

import pytest

from bench.report import DIRECT, GATEWAY, Budget, Results, Spread, number, table


def results(**columns: list[float]) -> Results:
    """One row, with a figure of each round for each contestant."""
    found = Results()
    for name, figures in columns.items():
        for figure in figures:
            found.add("row", name, figure)
    return found


def the_gateways(found: Results) -> list[float]:
    return found.of("row")


def test_a_spread_is_the_middle_and_both_ends() -> None:
    """One slow round moves an end, and not the middle."""
    assert Spread.of([3.0, 1.0, 100.0]) == Spread(3.0, 1.0, 100.0)
    assert str(Spread(3.0, 1.0, 100.0)) == "3 (1-100)"
    assert str(Spread.of([2.5])) == "2.5"


@pytest.mark.parametrize(
    ("figure", "shown"),
    [
        (0.0, "0"),
        (0.08349, "0.083"),
        (1.2349, "1.23"),
        (70.46, "70.5"),
        (100.0, "100"),
        (-12.345, "-12.3"),
        (2_547_762.2, "2 547 762"),
        (math.inf, "never"),
    ],
)
def test_a_number_has_three_digits(figure: float, shown: str) -> None:
    """Or all that stand before the point."""
    assert number(figure) == shown


def test_what_is_added_is_added_in_the_same_round() -> None:
    """A round in which everything was slow says as much as any other."""
    found = results(direct=[1.0, 11.0], claudegw=[2.0, 13.0])
    assert found.against("row", lambda figure, direct: figure - direct) == [1.0, 2.0]


@pytest.mark.parametrize(
    ("figures", "at_least", "is_met"),
    [
        ([4.0, 5.0, 9.0], False, True),
        ([4.0, 5.1, 5.2], False, False),
        ([1.0, 5.0, 6.0], True, True),
        ([4.0, 4.9, 9.0], True, False),
        ([math.inf], False, False),
    ],
)
def test_the_middle_figure_meets_a_budget(
    figures: list[float], *, at_least: bool, is_met: bool
) -> None:
    """Whether the bound is an upper or a lower one; the bound itself is within."""
    budget = Budget("what", 5.0, the_gateways, at_least=at_least)
    verdict = budget.judged(results(claudegw=figures))
    assert verdict.is_met is is_met
    assert ("MISSED" in str(verdict)) is not is_met


def test_what_was_not_measured_is_not_met() -> None:
    """And the line says so."""
    verdict = Budget("what", 5.0, the_gateways).judged(results(direct=[1.0]))
    assert not verdict.is_met
    assert str(verdict).startswith("not measured")


def test_a_table_has_a_column_for_each_contestant() -> None:
    """A cell is empty where nothing was measured."""
    found = results(direct=[1.0], claudegw=[2.0, 4.0])
    found.add("more", GATEWAY, 7.0)
    assert table(found.rows, [DIRECT, GATEWAY]).splitlines() == [
        "      direct  claudegw",
        "row   1       3 (2-4)",
        "more          7",
    ]
