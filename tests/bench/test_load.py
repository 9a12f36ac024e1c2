"""What `bench.load` asks, and what it makes of what it saw."""

from __future__ import annotations

import random
from typing import Any

import attrs
import pytest

from bench.house import House, Size
from bench.load import BUDGETS, Load, calls, least, results, stage_of
from bench.persistent import Call, Ended, Outcome
from bench.sessions import LONGEST, OFTEN, Deck, Session

DECK = Deck(random.Random(1))

AT_REST = Size(memory=70.0, files=20, threads=2, children=2, timers=3)


class Quiet(House):
    """A gateway whose log has nothing bad."""

    def cries(self) -> list[str]:
        return []


def status(**tier: Any) -> dict[str, Any]:
    """What a gateway with one tier says when nobody calls, but for what is given."""
    shown = {"running": 0, "waiting": 0, "settling": 0, "process": {"pid": 7}, **tier}
    return {"calls": [], "tiers": {"main": shown}}


def run(**more: Any) -> Load:
    """A run in which all went well, but for what is given."""
    load = Load(Quiet(None), random.Random(1))  # type: ignore[arg-type]  # nobody asks it
    well = {"sizes": [AT_REST, AT_REST], "pids": {7}, "status": status()}
    for name, value in (well | more).items():
        setattr(load, name, value)
    return load


def ended(kind: str, outcome: Outcome, seconds: float = 1.0, *again: str) -> Ended:
    return Ended(Call(kind, None), outcome, again, seconds)


def missed(load: Load, exit_status: int = 0) -> list[str]:
    """The budgets that are not met."""
    found = results(load, exit_status)
    return [each.what for each in BUDGETS if not each.judged(found).is_met]


def test_a_gateway_that_gives_all_back_meets_every_budget() -> None:
    """Calls that were left by their clients are none that were lost."""
    assert missed(run(ended=[ended("turn", Outcome.RIGHT), ended("leaves", Outcome.LEFT)])) == []


@pytest.mark.parametrize(
    ("what", "more"),
    [
        ("calls lost", {"ended": [ended("turn", Outcome.LOST)]}),
        ("calls not ended", {"unended": 1}),
        ("kinds of calls without an answer", {"missing": {"title"}}),
        ("permits out at the end", {"status": status(settling=1)}),
        ("records open at the end", {"status": {**status(), "calls": [{}]}}),
        ("servers started anew", {"status": status(process={"pid": 8})}),
        ("file descriptors left", {"sizes": [AT_REST, attrs.evolve(AT_REST, files=21)]}),
        ("timers left", {"sizes": [AT_REST, attrs.evolve(AT_REST, timers=4)]}),
        ("children left", {"sizes": [AT_REST, attrs.evolve(AT_REST, children=3)]}),
        ("threads more", {"sizes": [AT_REST, attrs.evolve(AT_REST, threads=11)]}),
        ("memory grows, MB", {"sizes": [AT_REST, attrs.evolve(AT_REST, memory=90.5)]}),
    ],
)
def test_what_is_not_given_back_is_said(what: str, more: dict[str, Any]) -> None:
    """And nothing else is, so that the line says where to look."""
    assert missed(run(**more)) == [what]


def test_a_gateway_that_does_not_stop_well_is_said() -> None:
    """A signal ends it as little as a status may."""
    assert missed(run(), 1) == missed(run(), -9) == ["exit status"]


def test_calls_are_told_by_kind() -> None:
    """Times are of those that were answered."""
    row = calls(
        [
            ended("turn", Outcome.RIGHT, 1.0),
            ended("turn", Outcome.RIGHT, 3.0, "529"),
            ended("turn", Outcome.LOST, 100.0),
        ]
    )["turn"]
    assert (row["calls"], row["answered"], row["lost"], row["sent again"]) == (3, 2, 1, 1)
    assert (row["p50, s"], row["p95, s"]) == (2.0, 3.0)


def test_a_stage_is_that_of_the_one_call() -> None:
    """Its model's name says which one it is."""
    waiting: dict[str, Any] = {"model": "a", "outcome": "waiting", "first": None}
    said = {"calls": [waiting, {**waiting, "model": "b", "outcome": "running"}]}
    assert [stage_of(said, model) for model in "abc"] == ["in line", "in prefill", None]
    waiting.update(outcome="running", first=0.5)
    assert stage_of(said, "a") == "mid-stream"


def test_a_conversation_goes_on_with_what_was_answered() -> None:
    """Until it is long; then it begins anew."""
    session, bodies = Session(1, random.Random(1), deck=DECK), list[Any]()

    def ask(call: Call) -> Ended:
        bodies.append(call.body)
        answer = {"content": [{"type": "text", "text": "The north gate."}]}
        return attrs.evolve(ended(call.kind, Outcome.RIGHT), answer=answer)

    for _ in range(LONGEST):
        session.goes_on(ask)
    lengths = [len(body["messages"]) for body in bodies]
    assert lengths[: LONGEST // 2 + 1] == [*range(1, LONGEST, 2), 1]
    assert bodies[1]["messages"][1] == {"role": "assistant", "content": "The north gate."}


def test_a_seed_says_what_is_asked() -> None:
    """Twice the same; and each round has every kind."""

    def asked() -> list[str]:
        dice, kinds = random.Random(5), list[str]()
        session = Session(1, dice, deck=Deck(dice))

        def ask(call: Call) -> Ended:
            kinds.append(call.kind)
            return ended(call.kind, Outcome.LEFT)

        for _ in range(sum(OFTEN.values())):
            session.ask(ask)
        return kinds

    every = {call.kind for call in Session(1, random.Random(1), deck=DECK).every()}
    assert asked() == asked()
    assert set(asked()) == every


def test_at_rest_is_the_least_that_was_seen() -> None:
    """A look that meets the gateway's own question to a server counts for nothing; memory does."""
    asks = attrs.evolve(AT_REST, files=21, timers=4, memory=71.0)
    assert least([asks, AT_REST, asks]) == attrs.evolve(AT_REST, memory=71.0)
