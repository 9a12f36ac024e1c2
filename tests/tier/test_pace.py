"""How long a call would take."""

from __future__ import annotations

from typing import Any

import pytest
from twisted.internet.task import Clock

from gateway.tier.pace import Pace
from gateway.wire.events import Usage

Json = Any


def body(*words: str, system: str = "s" * 1000) -> Json:
    return {"system": system, "messages": [{"role": "user", "content": each} for each in words]}


def paced(*learnt: tuple[int, float, int, float]) -> Pace:
    """A pace that has learnt from answers: tokens and seconds of prefill and of generation."""
    pace = Pace(Clock().seconds)
    for tokens, prefill, generated, generation in learnt:
        pace.learn(body("x"), Usage(tokens, 0, generated), prefill, generation)
    return pace


def test_nothing_is_known_of_a_model_that_has_not_answered() -> None:
    """There is no estimate, and no number in the status."""
    pace = paced()
    assert pace.estimate(1000, 0, 10) is None
    assert pace.status() == {"prefill": None, "generation": None}


def test_an_estimate_is_prefill_and_generation() -> None:
    """At 100 tokens/s in and 10 out, 1 000 and 20 take 12 s; of what was seen nothing."""
    pace = paced((1000, 10.0, 11, 1.0))
    assert pace.estimate(1000, 0, 20) == pytest.approx(12)
    assert pace.estimate(1000, 0.5, 20) == pytest.approx(7)
    assert pace.estimate(1000, 1, 0) == pytest.approx(0)
    assert pace.status() == {"prefill": 100.0, "generation": 10.0}


def test_long_measurements_count_for_more() -> None:
    """A handful of tokens after a warm prompt says little of a cold one."""
    pace = paced((10_000, 100.0, 11, 1.0), (10, 1.0, 11, 1.0))
    prefill = pace.status()["prefill"]
    assert prefill is not None
    assert prefill == pytest.approx(100, rel=0.02)


def test_later_measurements_count_for_more() -> None:
    """A model that has become slow is slow after a few answers."""
    pace = paced((1000, 10.0, 11, 1.0), *[(1000, 100.0, 11, 10.0)] * 8)
    assert pace.status() == {
        "prefill": pytest.approx(10, rel=0.1),
        "generation": pytest.approx(1, rel=0.1),
    }


def test_an_answer_without_tokens_teaches_nothing() -> None:
    """One token of output comes with the prefill, a warm prompt has none to evaluate."""
    assert paced((0, 1.0, 1, 1.0)).estimate(1, 0, 1) is None


def test_the_share_that_was_seen() -> None:
    """As far as a prompt that went through begins with the same parts."""
    pace = paced()
    assert pace.seen(body("a" * 1000)) == 0
    pace.learn(body("a" * 1000, "b"), Usage(1, 0, 2), 1, 1)
    assert pace.seen(body("a" * 1000, "b")) == 1
    assert 0.9 < pace.seen(body("a" * 1000, "c" * 20)) < 1
    assert 0.4 < pace.seen(body("d" * 1000, "b")) < 0.6
    assert pace.seen(body("a" * 1000, system="else")) < 0.01


def test_few_prompts_are_remembered() -> None:
    """The oldest goes first."""
    pace = paced()
    for number in range(40):
        pace.learn(body(system=str(number) * 1000), Usage(1, 0, 2), 1, 1)
    assert pace.seen(body(system="0" * 1000)) < 0.1
    assert pace.seen(body(system="39" * 1000)) == 1


def test_another_model_has_another_pace() -> None:
    """All is forgotten."""
    pace = paced((1000, 10.0, 11, 1.0))
    pace.forget()
    assert pace.estimate(1, 0, 1) is None
    assert pace.seen(body("x")) == 0


def test_a_watch_measures_from_the_start_to_the_first_token_to_the_end() -> None:
    """Only the first token ends the prefill."""
    clock = Clock()
    pace = Pace(clock.seconds)
    watch = pace.watch(body("x"))
    clock.advance(10)
    watch.token()
    clock.advance(2)
    watch.token()
    clock.advance(3)
    watch.ended(Usage(1000, 7, 11))
    assert pace.status() == {"prefill": 100.0, "generation": 2.0}
