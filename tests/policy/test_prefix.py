"""The same bytes for the same past: each rule, and the property that they serve."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import attrs
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.policy.prefix import prepare
from gateway.policy.template import Template
from gateway.wire import chat
from gateway.wire.request import parse
from tests.house import turn

Json = Any

EYES = Template(vision=True)
MARK = {"cache_control": {"type": "ephemeral"}}
ATTRIBUTION = "x-anthropic-billing-header: cc_version=2.1.330.839; cc_entrypoint=cli;"
REMINDER = "<system-reminder>\nToday is Sunday.\n</system-reminder>"


def prepared(**more: Json) -> dict[str, Json]:
    return prepare(parse(orjson.dumps(turn() | more)), EYES)


def text(words: str, **more: Json) -> Json:
    return {"type": "text", "text": words, **more}


def user(*content: Json) -> Json:
    return {"role": "user", "content": list(content)}


def assistant(*content: Json) -> Json:
    return {"role": "assistant", "content": list(content)}


def system(content: Json) -> Json:
    return {"role": "system", "content": content}


def call(identity: str = "toolu_1") -> Json:
    return {"type": "tool_use", "id": identity, "name": "Bash", "input": {}}


def result(*content: Json, identity: str = "toolu_1") -> Json:
    return {"type": "tool_result", "tool_use_id": identity, "content": list(content)}


def conversation(*messages: Json) -> list[Json]:
    """These messages, prepared."""
    found: list[Json] = prepared(messages=list(messages))["messages"]
    return found


def later(*messages: Json) -> list[Json]:
    """These messages as what comes after a first turn and its answer."""
    return conversation(user(text("first")), assistant(text("y")), *messages)[2:]


# --- the rules, by their numbers --------------------------------------------------------------


def test_1_the_attribution_block_is_dropped() -> None:
    """It differs between conversations that are otherwise the same."""
    blocks = [text(ATTRIBUTION), text("You are a coder.")]
    assert prepared(system=blocks)["system"] == "You are a coder."
    assert "system" not in prepared(system=[text(ATTRIBUTION)])
    assert "system" not in prepared(system=ATTRIBUTION)
    assert prepared(system=f"Say {ATTRIBUTION}")["system"] == f"Say {ATTRIBUTION}"


def test_2_cache_control_is_dropped() -> None:
    """It is dropped wherever it may stand: it moves from message to message."""
    body = prepared(
        cache_control=MARK["cache_control"],
        system=[text("s", **MARK)],
        tools=[{"name": "Bash", "input_schema": {"type": "object"}, **MARK}],
        messages=[
            user(text("x", **MARK)),
            assistant(call() | MARK),
            user(result(text("done", **MARK)) | MARK),
        ],
    )
    assert b"cache_control" not in orjson.dumps(body)
    assert body["tools"] == [
        {"name": "Bash", "description": "", "input_schema": {"type": "object"}}
    ]
    assert body["messages"][2] == user(result(text("done")))


def test_3_system_blocks_are_joined_with_an_empty_line() -> None:
    """llama-server would join them with nothing."""
    assert prepared(system=[text("a"), text("b"), text("c")])["system"] == "a\n\nb\n\nc"
    assert prepared(system="a")["system"] == "a"


def test_4_content_is_always_a_list() -> None:
    """The two shapes of the same content become one."""
    shapes = [
        conversation({"role": "user", "content": a}, {"role": "assistant", "content": b}, user(r))
        for a, b, r in [
            ("x", "y", result(text("z"))),
            ([text("x")], [text("y")], result() | {"content": "z"}),
        ]
    ]
    expected = [user(text("x")), assistant(text("y")), user(result(text("z")))]
    assert shapes == [expected, expected]


def test_4_a_result_without_content_has_an_empty_list() -> None:
    """Null and nothing are the same as an empty list."""
    bare: Json = {"type": "tool_result", "tool_use_id": "toolu_1"}
    for shape in (bare, bare | {"content": None}, bare | {"content": []}):
        assert conversation(user(shape)) == [user(result())]


def test_5_a_reminder_belongs_to_the_turn_before_it() -> None:
    """A `system` message is appended to the user's words, apart from them."""
    assert later(user(text("x")), system("Today is Sunday.")) == [
        user(text("x"), text(f"\n\n{REMINDER}"))
    ]


def test_5_a_reminder_that_is_marked_is_not_marked_again() -> None:
    """What says already that it is a reminder stays as it is."""
    assert later(user(text("x")), system([text(REMINDER, **MARK)])) == [
        user(text("x"), text(f"\n\n{REMINDER}"))
    ]


def test_5_several_blocks_are_one_reminder() -> None:
    """The blocks of a `system` message are joined as those of the system prompt are."""
    (message,) = later(user(text("x")), system([text("a"), text("b")]))
    assert message["content"][1:] == [text("\n\n<system-reminder>\na\n\nb\n</system-reminder>")]


def test_5_several_reminders_keep_their_order() -> None:
    """Each is appended after the one before."""
    (message,) = later(user(text("x")), system("a"), system("b"))
    assert [block["text"].split("\n")[3:4] for block in message["content"][1:]] == [["a"], ["b"]]


def test_5_a_reminder_after_tool_results_belongs_to_the_last_one() -> None:
    """No user turn is opened in the middle of a loop."""
    assert conversation(
        user(text("x")),
        assistant(call("a"), call("b")),
        user(result(text("1"), identity="a"), result(text("2"), identity="b")),
        system("Today is Sunday."),
    )[2:] == [
        user(
            result(text("1"), identity="a"),
            result(text("2"), text(f"\n\n{REMINDER}"), identity="b"),
        )
    ]


def test_5_before_the_first_turn_it_is_part_of_the_system_prompt() -> None:
    """There is no turn that it could belong to."""
    body = prepared(system="a", messages=[system("b"), system([text("c")]), user(text("x"))])
    assert body["system"] == "a\n\nb\n\nc"
    assert body["messages"] == [user(text("x"))]


def test_5_after_an_answer_it_opens_a_turn() -> None:
    """The model's own words are not touched."""
    assert conversation(user(text("x")), assistant(text("y")), system(REMINDER))[1:] == [
        assistant(text("y")),
        user(text(REMINDER)),
    ]


def test_6_reminders_beside_results_belong_to_the_last_one() -> None:
    """They are appended to the result, in their order, wherever they stood."""
    other = "  <system-reminder>two</system-reminder>"
    assert conversation(
        user(
            text(REMINDER),
            result(text("1"), identity="a"),
            text(other),
            result(text("2"), identity="b"),
        )
    ) == [
        user(
            result(text("1"), identity="a"),
            result(text("2"), text(f"\n\n{REMINDER}"), text(f"\n\n{other}"), identity="b"),
        )
    ]


def test_6_without_results_reminders_stay_where_they_are() -> None:
    """A later turn of words is not taken apart."""
    blocks = [text(REMINDER), text("x"), text(REMINDER)]
    assert later(user(*blocks)) == [user(*blocks)]


def test_7_the_users_own_words_come_after_the_results() -> None:
    """They open a turn of their own; llama-server would put them before the results."""
    image = {"type": "image", "source": {"type": "url", "url": "http://127.0.0.1/a.png"}}
    assert conversation(
        user(text("stop"), result(text("1")), text(REMINDER), image),
    ) == [
        user(result(text("1"), text(f"\n\n{REMINDER}"))),
        user(text("stop"), image),
    ]


def test_7_a_reminder_after_such_words_belongs_to_them() -> None:
    """A `system` message belongs to the last turn there is."""
    found = conversation(user(result(text("1")), text("stop")), system("a"))
    assert found[0] == user(result(text("1")))
    assert found[1]["content"][0] == text("stop")
    assert len(found[1]["content"]) == 2


def test_8_the_opening_turn_goes_from_what_lasts_to_what_changes() -> None:
    """The place and its agents, reminders, those of the session, the user's words; each apart."""
    git = "<system-reminder>\ngitStatus: clean\n</system-reminder>"
    (opening,) = conversation(
        user(text("x"), text(git), text(REMINDER)), system("# Environment"), system("Agents")
    )
    place, agents = (
        f"<system-reminder>\n{t}\n</system-reminder>" for t in ("# Environment", "Agents")
    )
    assert opening == user(
        text(place),
        text(f"\n\n{agents}"),
        text(f"\n\n{REMINDER}"),
        text(f"\n\n{git}"),
        text("\n\nx"),
    )


def test_8_the_users_instructions_come_before_other_reminders() -> None:
    """Sessions in one folder share them, and so does what follows a summary."""
    told = "<system-reminder>\nCodebase and user instructions are shown below.\n</system-reminder>"
    git = "<system-reminder>\ngitStatus: clean\n</system-reminder>"
    (opening,) = conversation(user(text(REMINDER), text(git), text(told), text("x")))
    assert opening == user(text(told), text(f"\n\n{REMINDER}"), text(f"\n\n{git}"), text("\n\nx"))


def test_8_two_sessions_in_one_folder_part_at_the_users_words() -> None:
    """All that both sessions are told about the place comes before the first difference."""
    first, second = (
        conversation(user(text(REMINDER), text(words)), system("# Environment"))[0]["content"]
        for words in ("Mend the login.", "Write a test.")
    )
    assert first[:-1] == second[:-1]
    assert first[-1] != second[-1]


def test_8_words_alone_stay_as_they_are() -> None:
    """An opening turn without reminders is not touched."""
    image = {"type": "image", "source": {"type": "url", "url": "http://127.0.0.1/a.png"}}
    assert conversation(user(text("a"), image, text("b"))) == [user(text("a"), image, text("b"))]
    assert conversation(user(image, text(REMINDER))) == [user(text(REMINDER), image)]


def test_8_an_opening_turn_of_results_is_no_opening() -> None:
    """A conversation that begins with tool results keeps to the rules of a loop."""
    found = conversation(user(result(text("1")), text(REMINDER)), system("a"))
    (message,) = found
    assert len(message["content"]) == 1
    assert len(message["content"][0]["content"]) == 3


GIT = "gitStatus: This is the git status at the start of the conversation.\n{}\n\nCommits: a"


def opened(*blocks: str, messages: Sequence[Json] = ()) -> tuple[Json, list[Json]]:
    """The system prompt of these blocks, and the conversation after it."""
    said = list(messages) or [user(text("x"))]
    body = prepared(system=[text(block) for block in blocks], messages=said)
    return body["system"], body["messages"]


def test_9_the_state_at_the_end_of_the_system_prompt_is_a_reminder_of_the_session() -> None:
    """It stands where newer clients say it: after the other reminders, before the user's words."""
    state = f"<system-reminder>\n{GIT.format('clean')}\n</system-reminder>"
    said = user(text("x"), text(REMINDER))
    assert opened("a", f"b\n\n{GIT.format('clean')}", messages=[said]) == (
        "a\n\nb",
        [user(text(REMINDER), text(f"\n\n{state}"), text("\n\nx"))],
    )
    assert opened(f"b\n\n{GIT.format('clean')}") == (
        "b",
        [user(text(state), text("\n\nx"))],
    )


def test_9_a_commit_leaves_the_system_prompt_as_it_was() -> None:
    """Two sessions of an older client share all that comes before the state."""
    (first, one), (second, other) = (
        opened(f"a\n\n{GIT.format(state)}", messages=[user(text(REMINDER), text("x"))])
        for state in ("clean", "M gates.txt")
    )
    assert first == second
    assert one[0]["content"][0] == other[0]["content"][0]
    assert one != other


MEMORY = "# Memory\n\nYou have a persistent file-based memory at `{}`.\n\n```\nx\n```\n\nKeep it."
ENV = "Here is useful information about the environment you are running in:\n<env>\n{}\n\n</env>"


@pytest.mark.parametrize("passage", [MEMORY, ENV, MEMORY.replace("# M", "# auto m")])
def test_9_what_the_system_prompt_says_of_a_folder_is_a_reminder(passage: str) -> None:
    """It begins the opening turn; what stands before and behind it is the same in every folder."""
    for folder in ("/home/a", "/srv/b"):
        said = passage.format(folder)
        found, messages = opened(f"a\n\n{said}\n# B\n\nb", messages=[user(text("x")), system("c")])
        assert found == "a\n\n# B\n\nb"
        first, second, words = (block["text"] for block in messages[0]["content"])
        assert first == f"<system-reminder>\n{said}\n</system-reminder>"
        assert "c" in second
        assert words == "\n\nx"


def test_9_a_passage_at_the_end_is_taken_too() -> None:
    """What is left blank is no system prompt."""
    said = f"<system-reminder>\n{ENV}\n</system-reminder>"
    assert opened(f"a\n{ENV}") == ("a", [user(text(said), text("\n\nx"))])
    assert "system" not in prepared(system=ENV)


def test_9_other_words_stay_where_they_are() -> None:
    """So does what another client says, and what has no opening turn to go to."""
    others = (
        "a\n\ngitStatus: mine",
        "# Memory\n\nThere is none.",
        "<env>\nx\n</env>",
        "Say: # Memory\n\nYou have a persistent file-based memory at `/a`.",
    )
    for words in others:
        assert opened(words) == (words, [user(text("x"))])
    results = [user(result(text("1")))]
    for said in (GIT, MEMORY, ENV):
        assert opened(f"a\n\n{said}", messages=results) == (f"a\n\n{said}", results)


# --- rule 10: tools ---------------------------------------------------------------------------


def in_order(*names: str, late: Sequence[str] = ()) -> list[str]:
    """The names of these tools, prepared."""
    schema: Json = {"input_schema": {"type": "object"}}
    offered: list[Json] = [{"name": name, **schema} for name in names]
    offered += [{"name": name, "defer_loading": True, **schema} for name in late]
    return [tool["name"] for tool in prepared(tools=offered)["tools"]]


#: What two clients give every agent, also those that do anything, and only the main conversation.
#: The newest gives TaskStop to every agent; it is the last of those that do anything.
KITS = {
    "newest": (
        "Bash EnterWorktree ExitWorktree Monitor Read SendMessage Skill WebFetch WebSearch",
        "Agent Edit NotebookEdit TaskStop Write",
        "AskUserQuestion CronCreate DesignSync EnterPlanMode ExitPlanMode ListAgents Workflow",
    ),
    "2.1.36": (
        "Bash Glob Grep Read Skill TaskCreate TaskGet TaskList TaskUpdate WebFetch WebSearch",
        "Edit NotebookEdit Write",
        "AskUserQuestion EnterPlanMode ExitPlanMode Task TaskOutput TaskStop",
    ),
}


@pytest.mark.parametrize("client", KITS)
def test_10_an_agents_tools_are_the_beginning_of_the_main_conversations(client: str) -> None:
    """What an agent has begins what has more, so nothing of its tools is evaluated again."""
    of_all, of_doers, of_main = (kit.split() for kit in KITS[client])
    searcher = in_order(*of_all)
    doer = in_order(*sorted(of_all + of_doers))
    main = in_order(*sorted(of_all + of_doers + of_main))
    assert doer[: len(searcher)] == searcher
    assert main[: len(doer)] == doer


def test_10_tools_that_we_do_not_know_come_after_those_that_we_know() -> None:
    """In the order of their names; servers of tools may join and leave, and stand last."""
    known = ["Read", "Bash", "Edit"]
    others = ["AskUserQuestion", "ToolSearch", "mcp__a__b", "mcp__b__a"]
    assert in_order(*reversed(others), *reversed(known)) == known + others


def test_10_a_tool_that_was_loaded_late_is_the_last_whatever_it_is() -> None:
    """What an agent has too would otherwise move all that stands behind it."""
    assert in_order("Zoom", "Read", late=["Bash"]) == ["Read", "Zoom", "Bash"]


# --- what else is in the body -----------------------------------------------------------------


def test_only_what_llama_server_takes_is_sent() -> None:
    """Everything else would be dropped there, or means something else."""
    tools = [{"name": "Bash", "description": "", "input_schema": {}}]
    kept = {
        "tools": tools,
        "tool_choice": {"type": "auto"},
        "stop_sequences": ["x"],
        "max_tokens": 7,
        "temperature": 0.5,
        "top_p": 0.5,
        "top_k": 5,
        "chat_template_kwargs": {"a": 1},
        "thinking": {"type": "enabled", "budget_tokens": 5},
    }
    dropped = {
        "stream": True,
        "metadata": {},
        "output_config": {"effort": "high"},
        "context_management": {},
        "service_tier": "auto",
        "id_slot": 0,
        "cache_prompt": False,
        "n_predict": 5,
        "grammar": "root ::= x",
    }
    body = prepared(**kept, **dropped)
    assert body == {**kept, "messages": [user(text("hi"))]}


@pytest.mark.parametrize("thinking", [{"type": "adaptive"}, {"type": "disabled"}])
def test_only_a_budget_is_told_as_thinking(thinking: Json) -> None:
    """llama-server reads nothing else there; the template is told the rest."""
    assert prepared(thinking=thinking) == prepared()


def test_null_is_not_sent() -> None:
    """A field that is null is one that is not there."""
    assert prepared(temperature=None, tool_choice=None, tools=None, system=None) == prepared()


def test_a_choice_without_tools_is_not_sent() -> None:
    """There is nothing to choose from."""
    assert prepared(tool_choice={"type": "none"}, tools=[]) == prepared()


@given(
    st.permutations(["Bash", "Read", "Zoom", "Alarm", "WebFetch"]),
    st.sets(st.sampled_from(["Zoom", "Alarm", "Read"])),
)
def test_tools_stand_in_an_order_of_their_own(names: list[str], late: set[str]) -> None:
    """Wherever the client puts a tool, and whatever it marks in it, what is offered is the same."""
    schema = {"type": "object"}
    plain = [
        {"name": name, "input_schema": schema, "defer_loading": name in late}
        for name in sorted(names)
    ]
    shuffled = [
        {**tool, **MARK, "description": ""}
        for name in names
        for tool in plain
        if tool["name"] == name
    ]
    assert prepared(tools=shuffled) == prepared(tools=plain)


# --- the property -----------------------------------------------------------------------------


@attrs.frozen
class Round:
    """What one request adds to a conversation: the answer before it, the turn, the reminders."""

    answer: list[Json]
    turn: list[Json]
    reminders: list[str]

    def messages(self) -> list[Json]:
        reminders = [system(reminder) for reminder in self.reminders]
        before = [assistant(*self.answer)] if self.answer else []
        return [*before, user(*self.turn), *reminders]


_WORDS = st.text("ab \n<é", min_size=1, max_size=6)
_REMINDERS = st.one_of(_WORDS, st.just(REMINDER), st.just(f"\n{REMINDER}"))
_TEXTS = st.builds(text, _REMINDERS)


@st.composite
def rounds(draw: st.DrawFn) -> list[Round]:
    """A conversation as Claude Code leads it: words, calls, results, reminders anywhere."""
    found: list[Round] = []
    asked: list[str] = []
    for number in range(draw(st.integers(1, 5))):
        results = []
        for identity in asked:
            parts = draw(st.lists(_TEXTS, max_size=2))
            results.append(result(*parts, identity=identity))
        words = draw(st.lists(_TEXTS, min_size=0 if results else 1, max_size=3))
        turn_ = draw(st.permutations([*results, *words]))
        answer: list[Json] = []
        if found:
            thinking = draw(st.lists(_WORDS, max_size=1))
            answer = [{"type": "thinking", "thinking": each} for each in thinking]
            answer += [text(each) for each in draw(st.lists(_WORDS, max_size=1))]
            answer += [call(identity) for identity in asked] or [text("y")]
        found.append(Round(answer, turn_, draw(st.lists(_REMINDERS, max_size=2))))
        asked = [f"toolu_{number}_{n}" for n in range(draw(st.integers(0, 2)))]
    return found


def _reshaped(message: Json, draw: st.DrawFn) -> Json:
    """The same message as the client may send it another time: marks elsewhere, another shape."""
    content = deepcopy(message["content"])
    if isinstance(content, str):
        return {**message, "content": draw(st.sampled_from([content, [text(content, **MARK)]]))}
    for block in content:
        if draw(st.booleans()):
            block.update(MARK)
        inner = block.get("content")
        if inner and len(inner) == 1 and draw(st.booleans()):
            block["content"] = inner[0]["text"]
    if len(content) == 1 and content[0]["type"] == "text" and draw(st.booleans()):
        return {**message, "content": content[0]["text"]}
    return {**message, "content": content}


@st.composite
def requests(draw: st.DrawFn) -> list[dict[str, Json]]:
    """The requests of one conversation, each with all that was said before it."""
    said: list[Json] = []
    found = []
    for each in draw(rounds()):
        said += each.messages()
        suffix = draw(st.sampled_from(["839", "3ef"]))
        found.append(
            turn()
            | {
                "messages": [_reshaped(message, draw) for message in said],
                "system": [text(ATTRIBUTION.replace("839", suffix)), text("s"), text("t")],
                "tools": [{"name": "Bash", "input_schema": {"type": "object"}}],
            }
        )
    return found


@settings(max_examples=200, deadline=None)
@given(requests())
def test_a_later_request_only_adds_to_the_end(bodies: list[dict[str, Json]]) -> None:
    """What was prepared for one turn is, message by message, the beginning of the next one's."""
    past: list[Json] = []
    for body in bodies:
        now = prepare(parse(orjson.dumps(body)), Template())
        assert now["system"] == "s\n\nt"
        assert now["messages"][: len(past)] == past
        assert len(now["messages"]) > len(past)
        past = now["messages"]


@settings(max_examples=100, deadline=None)
@given(requests())
def test_nothing_is_left_for_llama_server_to_misplace(bodies: list[dict[str, Json]]) -> None:
    """No `system` message, no words beside results, and no word lost on the way to the template."""
    body = bodies[-1]
    request = parse(orjson.dumps(body))
    before = deepcopy(request.body)
    now = prepare(request, Template())
    assert request.body == before
    for message in now["messages"]:
        kinds = {block["type"] for block in message["content"]}
        assert message["role"] in ("user", "assistant")
        assert kinds == {"tool_result"} or "tool_result" not in kinds
    rendered = chat.from_messages(now)["messages"][1:]
    told = "".join(_words(message["content"]) for message in rendered)
    said = "".join(_words(message["content"]) for message in body["messages"])
    for letter in "abé":  # none of them is in the tags of a reminder
        assert told.count(letter) == said.count(letter)


def _words(content: Json) -> str:
    """The texts of a content of either shape, those within tool results too."""
    if isinstance(content, str):
        return content
    inner = (block.get("text") or _words(block.get("content", "")) for block in content)
    return "".join(inner)


def test_a_passage_that_begins_again_and_again_is_looked_at_once() -> None:
    """A system prompt of five million characters is read to its end, whatever it says."""
    said = "Here is useful information about the environment\n<env>\nx\n" * 100_000 + "y"
    assert prepared(system=said)["system"] == said
