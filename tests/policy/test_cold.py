"""Why a call was cold: what its server lost or its client wrote anew, and what tells that."""

from __future__ import annotations

import tracemalloc

import orjson
import pytest

from gateway.policy.cold import REMEMBERED, THRESHOLD, Memory, avoidable
from gateway.policy.prompt import Prompt
from tests.conversations import assistant, text, tool, user
from tests.policy.test_divergence import PAST, prepared


@pytest.mark.parametrize(
    ("expected", "cached", "lost"),
    [
        (9000, 0, 9000),
        (9000, 9000 - THRESHOLD, 0),
        (9000, 8999 - THRESHOLD, THRESHOLD + 1),
        (9000, 12_000, 0),
    ],
)
def test_what_was_avoidable(expected: int, cached: int, lost: int) -> None:
    """What is missing, where that is beyond the threshold."""
    assert avoidable(expected, cached) == lost


def test_a_server_that_lost_the_past_is_named() -> None:
    """The prompt goes on, and yet little was cached."""
    memory = Memory()
    memory.remember("a", Prompt.of(prepared()))
    later = Prompt.of(prepared(messages=[*PAST, assistant(text("Four.")), user(text("Why?"))]))
    cold = memory.judge("a", later, tokens=20_000, cached=100)
    assert cold.divergence is not None
    assert cold.divergence.how == "continued"
    assert cold.rewritten == 0
    assert 17_000 < cold.avoidable <= 20_000
    assert "no longer held" in cold.sentence
    warm = memory.judge("a", later, tokens=20_000, cached=19_900)
    assert (warm.avoidable, warm.sentence) == (0, "")


def test_a_client_that_writes_the_past_anew_is_named() -> None:
    """Nothing was avoidable on the server; what was rewritten is said, and where."""
    memory = Memory()
    memory.remember("a", Prompt.of(prepared()))
    later = Prompt.of(prepared(tools=[tool("Bash")]))
    cold = memory.judge("a", later, tokens=20_000, cached=5)
    assert cold.avoidable == 0
    assert cold.rewritten > THRESHOLD
    assert "the tool 'Read'" in cold.sentence
    assert "gone" in cold.sentence
    assert orjson.dumps(cold.as_json())


def test_a_second_session_is_held_against_the_nearest_prompt() -> None:
    """It has no past of its own, but shares the tools and the system prompt with another."""
    memory = Memory()
    memory.remember("far", Prompt.of({"messages": [user(text("What is a gate?"))]}))
    memory.remember("near", Prompt.of(prepared()))
    new = Prompt.of(prepared(messages=[user(text("Hello."))]))
    cold = memory.judge("new", new, tokens=10_000, cached=0)
    assert cold.rewritten == 0
    assert cold.avoidable > 8000
    assert cold.divergence is not None
    assert cold.divergence.path == ("messages", 0, "content", 0)


def test_who_remembers_nothing_says_nothing() -> None:
    """The first call of all is cold, and that is nobody's fault."""
    cold = Memory().judge("a", Prompt.of(prepared()), tokens=20_000, cached=0)
    assert (cold.should_have, cold.avoidable, cold.divergence, cold.sentence) == (0, 0, None, "")
    assert cold.as_json()["divergence"] is None


# --- memory ---------------------------------------------------------------------------------------


def test_memory_is_bounded() -> None:
    """Few prompts, of few bytes, whatever comes; what it says it weighs is what it weighs."""
    memory = Memory()
    long = prepared(messages=[user(text(f"{n} " * 40)) for n in range(300)])
    tracemalloc.start()
    for number in range(200):
        memory.remember(f"c{number}", Prompt.of(long | {"system": f"{number}"}))
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 0 < len(memory) <= REMEMBERED
    assert memory.weight <= 4 * 1024 * 1024
    assert used < 8 * 1024 * 1024
    memory.remember("huge", Prompt.of({"messages": [user(text("x" * 300_000))] * 100}))
    assert memory.weight <= 4 * 1024 * 1024
    memory.forget()
    assert (len(memory), memory.weight) == (0, 0)


def test_a_conversation_is_remembered_once() -> None:
    """Its last prompt takes the place of the one before."""
    memory = Memory()
    for _ in range(3):
        memory.remember("a", Prompt.of(prepared()))
    assert len(memory) == 1
    assert memory.weight == Prompt.of(prepared()).weight


def test_what_was_cached_was_not_written_anew() -> None:
    """A switch that a template renders at the very end changes a prompt's parts and no tokens."""
    memory = Memory()
    past = {"system": "s" * 40_000, "messages": [{"role": "user", "content": "m" * 40_000}]}
    switched = past | {"chat_template_kwargs": {"enable_thinking": False}}
    memory.remember("one", Prompt.of(past))
    assert memory.judge("one", Prompt.of(switched), 20_000, 19_990).rewritten == 0
    assert memory.judge("one", Prompt.of(switched), 20_000, 0).rewritten > 1000
