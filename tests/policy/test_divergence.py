"""Where two prompts part: ten breaks that were made on purpose, and what is said of them."""

from __future__ import annotations

from copy import deepcopy
from itertools import pairwise
from typing import Any

import orjson
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.policy.divergence import Divergence, diverge
from gateway.policy.prefix import prepare
from gateway.policy.prompt import MARKED, Prompt, shared
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
