"""A tier that is made to rest; its server is in memory."""

from __future__ import annotations

from typing import Any, cast

import attrs
import pytest
from twisted.internet.defer import CancelledError, Deferred
from twisted.python.failure import Failure

from gateway.llama.child import Child, State
from gateway.policy.order import Rank
from gateway.tier.line import Permit, Ticket
from gateway.tier.tier import Tier
from gateway.wire.errors import ApiError, unavailable
from tests.house import FakeLlama, Household


@attrs.define(eq=False)
class Resting:
    """Somebody who wants all permits."""

    wanted: Deferred[list[Permit]]
    permits: list[Permit] | None = None
    failure: type[BaseException] | None = None

    @classmethod
    def of(cls, tier: Tier, *rank: Rank) -> Resting:
        self = cls(Deferred.fromCoroutine(tier.rest(*rank)))
        self.wanted.addCallbacks(
            lambda permits: setattr(self, "permits", permits),
            lambda failure: setattr(self, "failure", failure.type),
        )
        return self

    def over(self) -> None:
        for permit in self.permits or ():
            permit.finished()


@attrs.define(eq=False)
class Call:
    """One call in the tier's line."""

    turn: Deferred[Permit]
    permit: Permit | None = None

    @classmethod
    def in_line(cls, tier: Tier, rank: Rank = Rank.PERSON) -> Call:
        self = cls(tier.line.join(Ticket(rank)))
        self.turn.addCallback(lambda permit: setattr(self, "permit", permit))
        return self

    def over(self) -> None:
        assert self.permit is not None
        self.permit.finished()


@pytest.fixture
def tier() -> Any:
    """One of two slots."""
    return Household.built(main=FakeLlama(slots=2)).api.dispatch.tiers["main"]


def test_a_tier_rests_when_its_calls_are_over(tier: Tier) -> None:
    """The house goes before who waits, and after who runs; then the others go on."""
    running, waiting = [Call.in_line(tier) for _ in range(2)], Call.in_line(tier)
    rest = Resting.of(tier)
    running[0].over()
    assert rest.permits is None
    running[1].over()
    assert rest.permits is not None
    assert waiting.permit is None
    rest.over()
    assert waiting.permit is not None


def test_who_lets_a_tier_go_waits_for_everybody(tier: Tier) -> None:
    """In the background nobody is overtaken."""
    running, waiting = [Call.in_line(tier) for _ in range(2)], Call.in_line(tier)
    rest = Resting.of(tier, Rank.BACKGROUND)
    for call in (running[0], running[1]):
        call.over()
    assert waiting.permit is not None
    assert rest.permits is None
    waiting.over()
    assert rest.permits is not None


def test_two_who_want_all_permits_get_them_one_after_the_other(tier: Tier) -> None:
    """Neither waits for what the other holds."""
    running = [Call.in_line(tier) for _ in range(2)]
    first, second = Resting.of(tier), Resting.of(tier)
    for call in running:
        call.over()
    assert first.permits is not None
    assert second.permits is None
    first.over()
    assert second.permits is not None
    second.over()
    assert Call.in_line(tier).permit is not None


def test_who_wants_it_no_more_gives_back_what_he_has(tier: Tier) -> None:
    """A rest that is cancelled leaves the line as it was."""
    running = [Call.in_line(tier) for _ in range(2)]
    rest = Resting.of(tier)
    running[0].over()
    rest.wanted.cancel()
    assert rest.failure is CancelledError
    assert Call.in_line(tier).permit is not None
    assert Call.in_line(tier).permit is None


def test_a_full_line_does_not_keep_a_tier_from_resting(tier: Tier) -> None:
    """Whoever runs the house is not refused."""
    tier.line.max_waiting = 1
    running, waiting = [Call.in_line(tier) for _ in range(2)], Call.in_line(tier)
    rest = Resting.of(tier)
    for call in running:
        call.over()
    assert rest.permits is not None
    rest.over()
    assert waiting.permit is not None


def test_a_server_that_goes_away_rests(tier: Tier) -> None:
    """Who waits for its slots waits no longer, and gets those that he has."""
    running = [Call.in_line(tier) for _ in range(2)]
    rest = Resting.of(tier)
    running[0].over()
    assert rest.permits is None
    tier.line.server_down(unavailable("it is gone"))
    assert rest.permits is not None
    assert len(rest.permits) == 1
    rest.over()
    running[1].over()
    tier.line.server_up()
    assert [Call.in_line(tier).permit is not None for _ in range(3)] == [True, True, False]


# --- a restart that a person wants ----------------------------------------------------------------


@attrs.define(eq=False)
class Ours:
    """A server of ours: it says what was done to it, and how many permits were out then."""

    tier: Tier
    did: list[tuple[str, int]] = attrs.field(factory=list)

    @classmethod
    def of(cls, tier: Tier, monkeypatch: pytest.MonkeyPatch) -> Ours:
        ours = cls(tier)
        tier.child, tier._is_open = cast(Child, ours), True

        async def save(*_: object) -> None:
            ours.note("saved")

        monkeypatch.setattr("gateway.tier.cache.Cache.rest", save)
        return ours

    def note(self, what: str) -> None:
        self.did.append((what, self.tier.line.running))

    def restart(self) -> None:
        self.note("restarted")


def restart(tier: Tier) -> Deferred[None]:
    return Deferred.fromCoroutine(tier.restart())


def test_a_server_at_rest_is_saved_and_restarted(
    tier: Tier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody gets in between; afterwards all permits are back."""
    ours = Ours.of(tier, monkeypatch)
    assert restart(tier).called
    assert ours.did == [("saved", 2), ("restarted", 2)]
    assert tier.line.running == 0


def test_a_server_that_works_is_restarted_at_once(
    tier: Tier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asks for it may be tired of waiting for that very call."""
    ours = Ours.of(tier, monkeypatch)
    running = Call.in_line(tier)
    assert restart(tier).called
    assert ours.did[-1] == ("restarted", 1)
    running.over()


def test_a_server_that_is_away_is_restarted_at_once(
    tier: Tier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no slot whose permit would come."""
    ours = Ours.of(tier, monkeypatch)
    tier._is_open = False
    assert restart(tier).called
    assert ours.did[-1] == ("restarted", 0)
    tier._is_open = True


@attrs.define(eq=False)
class Started:
    """A server of ours in some state, for a reason."""

    state: State

    def status(self) -> Any:
        return {"reason": "it broke"}


@pytest.mark.parametrize(("state", "patience"), [(State.FAILED, 60), (State.LOADING, 0)])
def test_nobody_waits_for_a_server_that_will_not_come(
    tier: Tier, state: State, patience: float
) -> None:
    """Each call is told at once; and when it does come, they go on."""
    child = Started(state)
    tier.child, tier._is_open = cast(Child, child), False
    tier.config = attrs.evolve(tier.config, startup_patience=patience)
    told: list[str] = []

    def refused(failure: Failure) -> None:
        told.append(cast(ApiError, failure.value).message)

    for _ in range(3):
        Deferred.fromCoroutine(tier.ready()).addErrback(refused)
    assert told == ["The model server of tier 'main' is not there: it broke."] * 3
    child.state, tier.config = State.LOADING, attrs.evolve(tier.config, startup_patience=60)
    ready = Deferred.fromCoroutine(tier.ready())
    assert not ready.called
    tier._is_open = True
    tier._nudge()
    clock: Any = tier._reactor
    clock.advance(0)
    assert ready.called
    tier.child = None


def test_why_a_server_says_nothing_of_itself() -> None:
    """The status keeps the sentence until the server answers, or is another one."""
    house = Household.built()
    tier = house.api.dispatch.tiers["main"]

    def asked() -> Any:
        Deferred.fromCoroutine(tier.props()).addErrback(lambda failure: failure.trap(ApiError))
        house.settle()
        return tier.status()["error"]

    assert tier.status()["error"] is None
    house.main.status = 503
    said = "The model of tier 'main' is not ready: Loading model"
    assert asked() == {"message": said, "passes": True}
    house.main.status = 401
    assert asked()["passes"] is False
    house.main.status = None
    assert asked() is None
    tier.lost()
    house.main.status = 503
    asked()
    tier.lost()
    assert tier.status()["error"] is None
