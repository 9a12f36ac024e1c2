"""What a template is told."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.policy.template import SWITCHES, Template, probe, rewrites, switches
from gateway.wire.request import parse
from tests.house import turn

Json = Any

THINKS = "{% if enable_thinking %}<think>{% endif %}"
EFFORT = "Reasoning: {{ reasoning_effort }}"
SCHEMA = {"output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}}}
TOOL = {"name": "Bash", "input_schema": {}}


def told(text: str, **more: Json) -> dict[str, Json]:
    """What a template of this text is told for a request."""
    return switches(parse(orjson.dumps(turn() | more)), Template.of(text, vision=False))


@pytest.mark.parametrize(
    ("thinking", "thinks"),
    [
        ({"type": "adaptive"}, True),
        ({"type": "enabled", "budget_tokens": 1024}, True),
        ({"type": "disabled"}, False),
        (None, False),
    ],
)
def test_1_thinking_is_on_where_the_client_asks_for_it(thinking: Json, thinks: bool) -> None:
    """As the Messages API has it: who does not ask for thinking gets none."""
    assert told(THINKS, thinking=thinking) == {"enable_thinking": thinks}


def test_1_an_answer_under_a_schema_does_not_think() -> None:
    """The schema leaves no room for it; beside tools there is."""
    thinking = {"thinking": {"type": "adaptive"}}
    assert told(THINKS, **SCHEMA, **thinking) == {"enable_thinking": False}
    assert told(THINKS, **SCHEMA, **thinking, tools=[TOOL]) == {"enable_thinking": True}


@pytest.mark.parametrize(
    ("text", "effort", "word"),
    [
        (EFFORT, "low", "low"),
        (EFFORT, "medium", "medium"),
        (EFFORT, "high", "high"),
        (EFFORT, "xhigh", "high"),
        (EFFORT, "max", "high"),
        (EFFORT + "'max'", "max", "max"),
        (EFFORT + "'max'", "xhigh", "high"),
        (EFFORT + "'xhigh'", "max", "xhigh"),
        (EFFORT, "strange", None),
        (EFFORT, None, None),
    ],
)
def test_2_effort_is_a_word_that_the_template_knows(text: str, effort: Json, word: Json) -> None:
    """The three plain ones always; one above them only where it stands in the template."""
    config = {"output_config": {"effort": effort}}
    assert told(text, **config) == ({} if word is None else {"reasoning_effort": word})


def test_3_thinking_of_earlier_turns_stays() -> None:
    """Templates that can keep it are told to."""
    assert told("{{ clear_thinking }} {{ preserve_thinking }}") == {
        "clear_thinking": False,
        "preserve_thinking": True,
    }


def test_4_what_the_client_says_goes_first() -> None:
    """Its own words for the template are not overruled."""
    own = {"enable_thinking": True, "a": 1}
    assert told(THINKS, chat_template_kwargs=own) == own


def test_a_template_is_told_nothing_that_it_does_not_read() -> None:
    """A template without switches gets none."""
    assert (
        told("{{ messages }}", thinking={"type": "adaptive"}, output_config={"effort": "low"}) == {}
    )
    assert Template.of("", vision=True) == Template(vision=True)


def test_5_a_switch_at_the_end_rewrites_nothing() -> None:
    """What parts behind the user's last words is the beginning of the answer."""
    words = probe("enable_thinking", 0)["messages"][-1]["content"]
    assert not rewrites(f"One? One. {words}<think>", f"One? One. {words}</think>")
    assert rewrites(f"One? One. {words}", f"One? /nothink One. {words}")
    assert rewrites("", "")


def test_5_a_probe_differs_in_the_switch_alone() -> None:
    """The same conversation under both values, the thinking of an earlier turn included."""
    on, off = probe("enable_thinking", 0), probe("enable_thinking", 1)
    assert on.pop("chat_template_kwargs") == {"enable_thinking": True}
    assert off.pop("chat_template_kwargs") == {"enable_thinking": False}
    assert on == off
    assert any("reasoning_content" in message for message in on["messages"])


def test_5_only_switches_with_two_values_are_in_question() -> None:
    """What we always say in one way cannot change anything."""
    every = "enable_thinking reasoning_effort clear_thinking preserve_thinking"
    template = Template.of(every, vision=False)
    assert template.in_question == ("enable_thinking", "reasoning_effort")


_SOURCES = st.lists(st.sampled_from([*SWITCHES, "xhigh", "max", " ", "{{", "é", "_"])).map("".join)


@given(st.text() | _SOURCES, st.sampled_from(["low", "high", "xhigh", "max", "other", None]))
def test_a_template_is_told_only_what_it_knows(text: str, effort: str | None) -> None:
    """Whatever its text: it is told what it reads, and no effort that it has no word for."""
    wanted = {"output_config": {"effort": effort}} if effort else {}
    found, known = told(text, **wanted), Template.of(text, vision=False)
    assert found.keys() <= set(known.knows)
    assert set(known.in_question) <= set(known.knows)
    assert found.get("reasoning_effort", "low") in ("low", "medium", "high", *known.efforts)


@given(st.text(), st.text(), st.text())
def test_what_follows_the_last_words_rewrites_nothing(before: str, one: str, other: str) -> None:
    """Two renderings that part behind the last words of the user have the same past."""
    last = probe("enable_thinking", 0)["messages"][-1]["content"]
    assert not rewrites(before + last + one, before + last + other)
    assert rewrites(f"{before}a{last}", f"{before}b{last}")
