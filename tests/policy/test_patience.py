"""Which safety checks are refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.policy.patience import client_waits, refuse, verdict_tokens
from tests.house import CLAUDE_CODE

LIMIT = 350.0


@pytest.mark.parametrize(("needed", "waited"), [(0.5, 0), (LIMIT - 20, 0), (100, LIMIT - 120)])
def test_a_check_that_comes_in_time_goes_on(needed: float, waited: float) -> None:
    """What it needs and what it has waited stay below the client's patience, with some to spare."""
    assert refuse(35_000, needed, waited, LIMIT) is None
    assert refuse(35_000, 10 * needed, waited, None) is None


@pytest.mark.parametrize(("needed", "waited"), [(LIMIT - 19, 0), (100, LIMIT - 119), (None, 0)])
def test_a_check_that_would_come_too_late_is_refused(needed: float | None, waited: float) -> None:
    """So is one of which nobody knows; the client is told not to try again, and what to change."""
    error = refuse(35_000, needed, waited, LIMIT)
    assert error is not None
    assert (error.status, error.should_retry) == (503, False)
    assert "35000 tokens" in error.message
    assert "disableAutoMode" in error.message
    assert "[[route]]" in error.message


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        (CLAUDE_CODE, 350),
        (CLAUDE_CODE | {"x-stainless-timeout": "600"}, 350),
        (CLAUDE_CODE | {"x-stainless-timeout": "3600"}, 3590),
        (CLAUDE_CODE | {"x-stainless-timeout": "60"}, 50),
        (CLAUDE_CODE | {"x-stainless-timeout": "soon"}, 350),
        (CLAUDE_CODE | {"x-stainless-timeout": "inf"}, 350),
        (CLAUDE_CODE | {"x-stainless-timeout": "1e300"}, 350),
        (CLAUDE_CODE | {"x-stainless-timeout": "nan"}, 350),
        (CLAUDE_CODE | {"x-stainless-timeout": "-5"}, 350),
        ({"x-stainless-timeout": "60"}, None),
        ({}, None),
    ],
)
def test_how_long_a_client_waits(headers: dict[str, str], seconds: float | None) -> None:
    """Claude Code cuts off after 360 s, or when its settings say so; others for themselves."""
    assert client_waits(headers) == seconds


@given(st.one_of(st.text(), st.floats().map(str), st.integers().map(str)))
def test_a_clock_can_count_whatever_a_client_says(said: str) -> None:
    """A limit is some seconds, and a month at most, whatever stands in the header."""
    found = client_waits(CLAUDE_CODE | {"x-stainless-timeout": said})
    assert found is not None
    assert 1 <= found <= 31 * 86400


@given(st.integers(0), st.none() | st.floats(0, 1e9), st.floats(0, 1e9), st.none() | st.floats(1))
def test_who_waits_longer_is_refused_less(
    tokens: int, needed: float | None, waited: float, limit: float | None
) -> None:
    """A refusal is one that is not to be tried again; a client without a limit gets none."""
    error = refuse(tokens, needed, waited, limit)
    assert error is None or error.should_retry is False
    assert (error is None) == (refuse(tokens, needed, waited, limit) is None)
    if limit is not None and error is None:
        assert refuse(tokens, needed, waited, 2 * limit) is None
    if limit is None and needed is not None:
        assert error is None


def test_a_verdict_is_short() -> None:
    """A check that may write 8 192 tokens writes far fewer; one of 64 no more than that."""
    assert verdict_tokens(8192) == 1024
    assert verdict_tokens(64) == 64
