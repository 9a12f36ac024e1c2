"""Which safety checks are refused."""

from __future__ import annotations

import pytest

from gateway.policy.patience import CLIENT_WAITS, refuse, verdict_tokens


@pytest.mark.parametrize(
    ("needed", "waited"), [(0.5, 0), (CLIENT_WAITS - 30, 0), (100, CLIENT_WAITS - 130)]
)
def test_a_check_that_comes_in_time_goes_on(needed: float, waited: float) -> None:
    """What it needs and what it has waited stay below the client's patience, with some to spare."""
    assert refuse(35_000, needed, waited) is None


@pytest.mark.parametrize(
    ("needed", "waited"), [(CLIENT_WAITS - 29, 0), (100, CLIENT_WAITS - 129), (None, 0)]
)
def test_a_check_that_would_come_too_late_is_refused(needed: float | None, waited: float) -> None:
    """So is one of which nobody knows; the client is told not to try again, and what to change."""
    error = refuse(35_000, needed, waited)
    assert error is not None
    assert (error.status, error.should_retry) == (503, False)
    assert "35000 tokens" in error.message
    assert "disableAutoMode" in error.message
    assert "[[route]]" in error.message


def test_a_verdict_is_short() -> None:
    """A check that may write 8 192 tokens writes far fewer; one of 64 no more than that."""
    assert verdict_tokens(8192) == 1024
    assert verdict_tokens(64) == 64
