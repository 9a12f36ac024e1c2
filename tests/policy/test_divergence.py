"""Where two prompts part: ten breaks that were made on purpose, and what is kept of a prompt."""

from __future__ import annotations

import tracemalloc
from copy import deepcopy
from itertools import pairwise
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.policy.divergence import (
    MARKED,
    REMEMBERED,
    THRESHOLD,
    Divergence,
    Memory,
    Prompt,
    avoidable,
    diverge,
    shared,
    should_have,
    whole,
)
from gateway.policy.prefix import prepare
from gateway.policy.template import Template
from gateway.wire.request import parse
from tests.conversations import (
    assistant,
    body,
    call,
    requests,
    result,
    text,
    thinking,
    tool,
    user,
)

Json = Any

TEMPLATE = Template(knows=("enable_thinking",), vision=True)
IMAGE = {
    "type": "image",
    "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="},
}
REMINDER = "<system-reminder>\nToday is Sunday.\n</system-reminder>"
SYSTEM = "".join(f"Rule {number}: gates are counted by hand. " for number in range(40))
PAST = (
    user(text("How many gates has the old city?")),
    assistant(thinking("I must look."), text("I look."), call("toolu_1", path="gates.txt")),
    user(result("toolu_1", [text("north, east, south")])),
    assistant(text("There are three gates.")),
    user(text("And how many walls?")),
    assistant(text("One wall.")),
    user(text("And how many towers?")),
)


def prepared(**more: Json) -> dict[str, Json]:
    """A body as llama-server gets it."""
    wanted = body(deepcopy(list(PAST)), system=SYSTEM) | deepcopy(more)
    return prepare(parse(orjson.dumps(wanted)), TEMPLATE)


def parting(later: dict[str, Json], earlier: dict[str, Json] | None = None) -> Divergence:
    return diverge(Prompt.of(earlier or prepared()), Prompt.of(later))


def found(later: dict[str, Json], earlier: dict[str, Json] | None = None) -> tuple[str, str, str]:
    place = parting(later, earlier)
    return place.how, str(place.as_json()["path"]), place.sentence


# --- ten breaks -----------------------------------------------------------------------------------


def test_a_tool_was_added_in_the_middle() -> None:
    """It is named, and so is the tool that stood in its place."""
    tools = [tool(name) for name in ("Bash", "Glob", "Read", "ToolSearch", "WebFetch")]
    assert found(prepared(tools=tools)) == (
        "added",
        "tools.Glob",
        "the tool 'Glob' is new, before 'WebFetch'",
    )


def test_a_tool_is_gone() -> None:
    """It is named, the last one too, behind which comes the system prompt."""
    tools = [tool(name) for name in ("Bash", "Read", "ToolSearch")]
    assert found(prepared(tools=tools)) == (
        "removed",
        "tools.WebFetch",
        "the tool 'WebFetch' is gone",
    )


def test_a_tool_is_described_in_other_words() -> None:
    """The tool, and about where in its description."""
    long = "Runs a command in a shell and gives back what it printed. "
    tools = [tool("Bash") | {"description": long * 3}, tool("Read")]
    changed = [tool("Bash") | {"description": long * 2 + "Mind " + long}, tool("Read")]
    place = parting(prepared(tools=changed), prepared(tools=tools))
    assert place.path == ("tools", "Bash", "description")
    assert place.offset is not None
    assert 0 <= 2 * len(long) - place.offset < MARKED
    assert place.sentence.startswith("the description of the tool 'Bash' is another one from about")


def test_a_tool_takes_something_else() -> None:
    """Its schema is named, not its description."""
    tools = [tool("Bash"), tool("Read") | {"input_schema": {"type": "object", "required": ["a"]}}]
    place = parting(prepared(tools=tools), prepared(tools=[tool("Bash"), tool("Read")]))
    assert (place.how, place.path) == ("changed", ("tools", "Read", "input_schema"))


def test_the_tools_are_in_another_order() -> None:
    """A body whose tools nobody has put in order."""
    earlier, later = prepared(), prepared()
    later["tools"].reverse()
    assert found(later, earlier) == (
        "moved",
        "tools.ToolSearch",
        "the tool 'ToolSearch' is in another place",
    )


def test_the_system_prompt_was_changed() -> None:
    """With about where in it."""
    place = parting(prepared(system=SYSTEM.replace("Rule 7:", "Law 7:")))
    assert place.path == ("system",)
    assert place.offset is not None
    assert 0 <= SYSTEM.index("Rule 7:") - place.offset < MARKED
    assert place.sentence == (
        f"the system prompt is another one from about character {place.offset} on"
    )


def test_an_early_message_was_edited() -> None:
    """The message, the block, and about where in it."""
    past = deepcopy(list(PAST))
    past[0]["content"][0]["text"] = "How many gates has the new city?"
    place = parting(prepared(messages=past))
    assert place.path == ("messages", 0, "content", 0)
    assert place.offset == 16
    assert place.sentence == (
        "messages[0].content[0] (user, text) is another one from about character 16 on"
    )


def test_earlier_messages_were_removed() -> None:
    """The first of them, and how many."""
    assert found(prepared(messages=[*PAST[:1], *PAST[3:]])) == (
        "removed",
        "messages[1]",
        "messages[1] (assistant) and 1 more are gone; 7 messages became 5",
    )


def test_a_conversation_was_compacted() -> None:
    """A summary in place of the first message, and far fewer messages than before."""
    summary = [user(text("This is a summary of what was said."))]
    place = parting(prepared(messages=summary))
    assert (place.how, place.path[:2]) == ("changed", ("messages", 0))
    assert place.sentence.endswith("; 7 messages became 1")


def test_thinking_was_dropped() -> None:
    """The block that is gone, with its kind."""
    past = deepcopy(list(PAST))
    del past[1]["content"][0]
    assert found(prepared(messages=past)) == (
        "removed",
        "messages[1].content[0]",
        "messages[1].content[0] (assistant, thinking) is gone",
    )


def test_a_switch_was_switched() -> None:
    """By its name; unless it changes no earlier turn, then it parts nothing."""
    earlier, later = prepared(), prepared(thinking={"type": "disabled"})
    assert found(later, earlier) == (
        "changed",
        "switches.enable_thinking",
        "the switch 'enable_thinking' is another one",
    )
    same = diverge(Prompt.of(earlier, ()), Prompt.of(later, ()))
    assert same.how == "continued"


def test_another_conversation_has_nothing_in_common() -> None:
    """No place is named where all is different."""
    other: Json = {"messages": [user(text("What is a gate?"))]}
    place = parting(other)
    assert (place.how, place.shared) == ("another", 0)
    assert place.sentence == "it has nothing in common with any earlier one"


def test_a_reminder_moved() -> None:
    """From one message to a later one."""
    past = deepcopy(list(PAST))
    past[0]["content"].insert(0, text(REMINDER))
    moved = deepcopy(list(PAST))
    moved[4]["content"].insert(0, text(REMINDER))
    assert found(prepared(messages=moved), prepared(messages=past)) == (
        "moved",
        "messages[0].content[0]",
        "messages[0].content[0] (user, text) is in another place",
    )


def test_an_image_moved() -> None:
    """Within its message."""
    words = text("And what is this?")
    earlier = prepared(messages=[*PAST, assistant(text("Two.")), user(IMAGE, words)])
    later = prepared(messages=[*PAST, assistant(text("Two.")), user(words, IMAGE)])
    place = parting(later, earlier)
    assert (place.how, place.path, place.kind) == ("moved", ("messages", 8, "content", 0), "image")


def test_a_result_has_something_else_in_it() -> None:
    """The block inside the result is named."""
    past = deepcopy(list(PAST))
    past[2]["content"][0]["content"][0]["text"] = "north, west, south"
    place = parting(prepared(messages=past))
    assert place.as_json()["path"] == "messages[2].content[0].content[0]"
    assert (place.how, place.role, place.kind) == ("changed", "user", "text")


def test_a_turn_that_was_sent_has_more_in_it() -> None:
    """The block that was added to it."""
    past = deepcopy(list(PAST))
    past[0]["content"].append(text("In the south?"))
    place = parting(prepared(messages=past))
    assert (place.how, place.path) == ("added", ("messages", 0, "content", 1))


# --- what does not part ---------------------------------------------------------------------------


def test_a_conversation_that_goes_on() -> None:
    """All of the earlier prompt is shared."""
    later = prepared(messages=[*PAST, assistant(text("Four.")), user(text("Why?"))])
    place = parting(later)
    assert place.how == "continued"
    assert place.shared == Prompt.of(prepared()).size


@given(requests(words=False, thinks=False))
@settings(max_examples=50, deadline=None)
def test_prepared_prompts_go_on(conversation: list[Any]) -> None:
    """Whatever shape the client sends its past in, the prompts that it becomes go on."""
    for one, other in pairwise(conversation):
        bodies = (
            prepare(parse(orjson.dumps(each.body)), Template(vision=True)) for each in (one, other)
        )
        assert diverge(*map(Prompt.of, bodies)).how == "continued"


WORDS = st.text(max_size=40)
BLOCKS = st.one_of(
    st.builds(lambda words: {"type": "text", "text": words}, WORDS),
    st.builds(lambda words: {"type": "thinking", "thinking": words}, WORDS),
    st.builds(lambda words: {"type": words}, WORDS),
    st.just(IMAGE),
    st.builds(
        lambda inside: {"type": "tool_result", "tool_use_id": "a", "content": inside},
        st.lists(st.builds(lambda words: {"type": "text", "text": words}, WORDS), max_size=2),
    ),
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(("user", "assistant")),
            "content": st.one_of(WORDS, st.lists(BLOCKS, max_size=3)),
        }
    ),
    min_size=1,
    max_size=5,
)
NAMED = st.lists(st.sampled_from("abcd"), unique=True)
BODIES = st.builds(
    lambda tools, system, switches, messages: {
        "tools": [tool(name) for name in tools],
        "system": system,
        "chat_template_kwargs": switches,
        "messages": messages,
    },
    NAMED,
    WORDS,
    st.dictionaries(st.sampled_from("xyz"), st.booleans()),
    MESSAGES,
)


@given(BODIES, BODIES)
@settings(max_examples=300, deadline=None)
def test_any_two_prompts_part_somewhere(one: Json, other: Json) -> None:
    """Whatever they are, there is a place, a sentence, and no more shared than either has."""
    earlier, later = Prompt.of(one), Prompt.of(other)
    place = diverge(earlier, later)
    assert place.sentence
    assert 0 <= place.shared <= min(earlier.size, later.size)
    assert (place.how == "continued") >= (one == other)
    assert shared(earlier.fingerprint, later.fingerprint) <= place.shared
    assert orjson.dumps(place.as_json())


# --- what is kept, and what is said ---------------------------------------------------------------


def test_nothing_of_a_prompt_is_kept_but_digests() -> None:
    """No four letters of what was said can be found in what is kept or said of it."""
    secret = "correct horse battery staple " * 5
    earlier = prepared(system=secret, messages=[user(text(secret))])
    later = prepared(system=secret, messages=[user(text(secret + "x"))])
    kept = Prompt.of(earlier)
    place = diverge(kept, Prompt.of(later))
    said = repr(kept) + place.sentence + orjson.dumps(place.as_json()).decode()
    said += repr([part.marks for part in kept.parts]) + repr(kept.fingerprint)
    assert not [word for word in secret.split() if word in said]


def test_names_are_cut_short_in_what_is_said() -> None:
    """A tool's name is its client's; a log line is no place for a long one."""
    place = parting(prepared(tools=[tool("A" * 10_000), *map(tool, ("Bash", "Read"))]))
    assert len(place.sentence) < 200
    assert len(orjson.dumps(place.as_json())) < 500


def test_marks_end_somewhere() -> None:
    """A part of 32 MiB has no more than 64 KiB of marks."""
    long = "x" * (32 * 1024 * 1024)
    (part,) = Prompt.of({"messages": [user(text(long))]}).parts
    assert len(part.marks) == 64 * 1024


# --- fingerprints ---------------------------------------------------------------------------------


def test_a_fingerprint_tells_what_is_shared() -> None:
    """Bytes of the parts that both begin with; twelve bytes for each part."""
    earlier = Prompt.of(prepared())
    later = Prompt.of(prepared(messages=[*PAST[:3], user(text("Stop."))]))
    parts = len(earlier.parts)
    assert len(earlier.fingerprint) == 12 * parts
    assert whole(earlier.fingerprint) == earlier.size
    both = shared(earlier.fingerprint, later.fingerprint)
    assert both == sum(part.size for part in later.parts[:-1])
    assert shared(b"", later.fingerprint) == shared(b"garbage", later.fingerprint) == 0


# --- tokens ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("same", "size", "tokens", "expected"),
    [
        (0, 4000, 1000, 0),
        (2000, 4000, 1000, 450),
        (4000, 4000, 1000, 936),
        (3900, 4000, 1000, 877),
        (3960, 4000, 1000, 891),
        (99_900, 100_000, 24_557, 24_368),
        (9, 9, 3, 2),
        (1, 0, 9, 8),
        (0, 0, 9, 0),
    ],
)
def test_what_should_have_been_cached(same: int, size: int, tokens: int, expected: int) -> None:
    """The share in bytes, less a tenth; or all but what the bytes that are new can be at most."""
    assert should_have(same, size, tokens) == expected


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
