"""A few hundred cases for each room that reads what others wrote; always the same ones."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz import Target
from tests.fuzz.targets import TARGETS


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS.keys())
def test_what_is_promised_holds_for_whatever_comes(target: Target) -> None:
    """What a target promises holds for changed cases, one or two changes from a seed."""

    @settings(
        max_examples=target.cases,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(st.sampled_from(target.seeds), st.integers(0, 2**64), st.integers(0, 2))
    def holds(seed: bytes, number: int, times: int) -> None:
        data, random = seed, Random(number)
        for _ in range(times):
            data = target.change(data, random)
        target.holds(data)

    holds()


@pytest.mark.parametrize(
    ("target", "case"),
    [(target, case) for target in TARGETS.values() for case in target.kept],
    ids=[f"{target.name}-{n}" for target in TARGETS.values() for n in range(len(target.kept))],
)
def test_what_once_broke_a_promise_holds(target: Target, case: bytes) -> None:
    """A case that was found by fuzzing stays mended."""
    target.holds(case)
