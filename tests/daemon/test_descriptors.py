"""How many files may be open."""

from __future__ import annotations

import resource

import pytest
from twisted.internet.selectreactor import SelectReactor

from gateway.daemon.descriptors import allow


class Limits:
    """What the system says and is told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = (256, 4096)
        monkeypatch.setattr(resource, "getrlimit", lambda _: self.now)
        monkeypatch.setattr(resource, "setrlimit", lambda _, pair: setattr(self, "now", pair))


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> Limits:
    """256 files, and 4 096 for who asks."""
    return Limits(monkeypatch)


def test_enough_is_left_as_it_is(limits: Limits) -> None:
    """A limit is never lowered."""
    assert allow(100, None) == 256
    assert limits.now == (256, 4096)


def test_as_many_as_are_wanted_are_asked_for(limits: Limits) -> None:
    """And no more, since children get the same."""
    assert allow(1000, None) == 1000
    assert limits.now == (1000, 4096)


def test_no_more_can_be_had_than_the_system_allows(limits: Limits) -> None:
    """The hard limit is the end of it."""
    assert allow(10_000, None) == 4096
    assert limits.now == (4096, 4096)


def test_a_system_without_a_limit_allows_everything(limits: Limits) -> None:
    """A Mac's hard limit is none."""
    limits.now = (256, resource.RLIM_INFINITY)
    assert allow(10_000, None) == 10_000
    limits.now = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    assert allow(10_000, None) == 10_000
    assert limits.now == (resource.RLIM_INFINITY, resource.RLIM_INFINITY)


@pytest.mark.usefixtures("limits")
def test_select_takes_1024() -> None:
    """Twisted's reactor on a Mac cannot look after more, whatever the system allows."""
    assert allow(3000, SelectReactor.__new__(SelectReactor)) == 1024
