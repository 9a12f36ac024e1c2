"""
Conversations as Claude Code leads them, made up.

Each later request says again what was said before, but never in quite the same shape: marks of the
cache move, a string becomes a list, tools change places, switches are switched.  What is rendered
of a request must begin with what was rendered of the one before (docs/prompt-cache.md); `requests`
makes conversations for which that holds, or would, with the one exception that its name says.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any, Final

import attrs
from hypothesis import strategies as st

Json = Any

ATTRIBUTION: Final = "x-anthropic-billing-header: cc_version=2.1.330.{}; cc_entrypoint=cli;"
PLACEHOLDER: Final = "DeferredToolPlaceholder"
CLIENT: Final = "claude-cli/2.1.330 (external, cli)"

_MARK: Final = {"cache_control": {"type": "ephemeral"}}


@attrs.frozen
class Request:
    """
    One request of a conversation.

    Attributes:
        body: as the client sends it.
        after: the place in the conversation of the request that it goes on from, if there is one.
    """

    body: dict[str, Json]
    after: int | None


# --- the parts, also for conversations that are written by hand -----------------------------------


def text(words: str, **more: Json) -> Json:
    return {"type": "text", "text": words, **more}


def thinking(words: str) -> Json:
    return {"type": "thinking", "thinking": words, "signature": ""}


def call(identity: str, name: str = "Bash", **arguments: Json) -> Json:
    return {"type": "tool_use", "id": identity, "name": name, "input": arguments}


def result(identity: str, content: Json = "done", **more: Json) -> Json:
    return {"type": "tool_result", "tool_use_id": identity, "content": content, **more}


def user(*content: Json) -> Json:
    return {"role": "user", "content": list(content)}


def assistant(*content: Json) -> Json:
    return {"role": "assistant", "content": list(content)}


def system(content: Json) -> Json:
    return {"role": "system", "content": content}


def tool(name: str, **more: Json) -> Json:
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    return {"name": name, "description": f"Does {name}.", "input_schema": schema, **more}


TOOLS: Final = tuple(map(tool, ("Bash", "Read", "ToolSearch", "WebFetch")))
LATE: Final = ("Alarm", "Cron", "Notebook", "Zoom")


def body(messages: Sequence[Json], **more: Json) -> dict[str, Json]:
    """A request of Claude Code with these messages."""
    return {
        "model": "claudegw-main",
        "max_tokens": 8192,
        "stream": True,
        "system": [text("You are an agent."), text("Be careful.")],
        "tools": list(TOOLS),
        "thinking": {"type": "adaptive"},
        "messages": list(messages),
        **more,
    }


# --- words and blocks -----------------------------------------------------------------------------

#: Among them the marks of templates, which their users may write too.
_PIECES: Final = (
    *("word", "an", "other", " ", "  ", "\n", "\n\n", "é", "语", "😀", "<", "/nothink", "0.5"),
    *("<think>", "</think>", "<|im_end|>", "<tool_response>", "</tool_response>", "</arg_value>"),
)
WORDS: Final = st.lists(st.sampled_from(_PIECES), min_size=1, max_size=4).map("".join)

_REMINDERS: Final = st.builds("<system-reminder>\n{}\n</system-reminder>".format, WORDS)
_SYSTEM_TEXTS: Final = st.one_of(WORDS, _REMINDERS, _REMINDERS.map("\n{}\n".format))
_ARGUMENTS: Final = st.dictionaries(
    st.sampled_from(("b", "a", "é", "file_path")),
    st.one_of(
        *(WORDS, st.integers(-9, 9), st.booleans(), st.none(), st.just(1.5)),
        st.lists(st.integers(0, 9), max_size=2),
        st.dictionaries(st.sampled_from(("y", "x")), WORDS, max_size=2),
    ),
    max_size=3,
)
_DATA: Final = {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}
_IMAGE: Final = {"type": "image", "source": _DATA}
_PDF: Final = {"type": "document", "source": _DATA | {"media_type": "application/pdf"}}


def _document(words: str) -> Json:
    source = {"type": "text", "media_type": "text/plain", "data": words}
    return {"type": "document", "source": source, "title": "notes"}


def _found(words: str) -> Json:
    return {"type": "search_result", "title": "t", "source": "s", "content": [text(words)]}


_SHOWN: Final = st.one_of(
    WORDS.map(text),
    st.just(_IMAGE),
    st.just(_PDF),
    WORDS.map(_document),
    WORDS.map(_found),
)
_RESULTS: Final = st.one_of(WORDS, st.none(), st.just(""), st.lists(_SHOWN, max_size=2))
_SPOKEN: Final = st.one_of(WORDS.map(text), st.just(_IMAGE), WORDS.map(_document))


@st.composite
def _answers(draw: st.DrawFn, number: int, *, thinks: bool, calls: int) -> list[Json]:
    """What the model said in round `number`, with so many calls."""
    blocks: list[Json] = []
    if thinks:
        blocks += [thinking(words) for words in draw(st.lists(WORDS, max_size=2))]
        if draw(st.booleans()):
            blocks.append({"type": "redacted_thinking", "data": "x"})
    words = WORDS if thinks else WORDS.filter(lambda words: "</think>" not in words)
    said = draw(st.lists(words, min_size=0 if calls else 1, max_size=2))
    used = [
        call(f"toolu_{number}_{n}", draw(st.sampled_from(("Bash", "Read"))), **draw(_ARGUMENTS))
        for n in range(calls)
    ]
    return [*blocks, *map(text, said), *used]


@st.composite
def _turns(draw: st.DrawFn, asked: Sequence[Json], *, words: bool) -> list[Json]:
    """What the user's side said to an answer with the calls `asked`."""
    blocks: list[Json] = []
    for each in asked:
        more = {"is_error": draw(st.booleans())} if draw(st.booleans()) else {}
        blocks.append(result(each["id"], draw(_RESULTS), **more))
    blocks += map(text, draw(st.lists(_REMINDERS, max_size=2)))
    if words:
        blocks += draw(st.lists(_SPOKEN, min_size=0 if asked else 1, max_size=2))
    return draw(st.permutations(blocks))


@st.composite
def _openings(draw: st.DrawFn) -> list[Json]:
    """The first turn: what the client knows of the place, and what the user wants."""
    commits = "<system-reminder>\ngitStatus: clean\n</system-reminder>"
    reminders = [*draw(st.lists(_REMINDERS, max_size=2)), commits]
    return draw(st.permutations([*map(text, reminders), *draw(st.lists(_SPOKEN, min_size=1))]))


def _systems(most: int = 2) -> st.SearchStrategy[list[Json]]:
    parts = st.one_of(_SYSTEM_TEXTS, st.lists(_SYSTEM_TEXTS.map(text), min_size=1, max_size=2))
    return st.lists(parts.map(system), max_size=most)


# --- the same again, in another shape -------------------------------------------------------------


def _reshaped(draw: st.DrawFn, message: Json) -> Json:
    """The same message as it may come another time: marks elsewhere, a string for a list."""
    content = deepcopy(message["content"])
    if isinstance(content, str):
        return {**message, "content": draw(st.sampled_from((content, [text(content, **_MARK)])))}
    for block in content:
        if block["type"] != "thinking" and draw(st.booleans()):
            block.update(_MARK)
        inner = block.get("content")
        if block["type"] == "tool_result":
            block["content"] = _other_shape(draw, inner)
    return {**message, "content": _other_shape(draw, content)}


def _other_shape(draw: st.DrawFn, content: Json) -> Json:
    """A text alone as a string or as a list, nothing at all in one of its three ways."""
    if not content:
        return draw(st.sampled_from((None, "", []))) if content is None else content
    if isinstance(content, str):
        return draw(st.sampled_from((content, [text(content)])))
    if len(content) == 1 and content[0]["type"] == "text":
        return draw(st.sampled_from((content, content[0]["text"])))
    return content


def _dressed(draw: st.DrawFn, said: Sequence[Json], tools: Sequence[Json]) -> dict[str, Json]:
    """A request with all that was said, and all that may differ from one to the next."""
    suffix = draw(st.sampled_from(("839", "3ef", "")))
    prompt = [text("You are an agent."), text("Be careful.", **_MARK)]
    if suffix:
        prompt.insert(0, text(ATTRIBUTION.format(suffix)))
    wanted = body(
        [_reshaped(draw, message) for message in said],
        system=prompt,
        tools=draw(st.permutations(tools)),
    )
    thinks = draw(st.sampled_from(("adaptive", "disabled", "enabled", None)))
    wanted["thinking"] = thinks and {"type": thinks}
    if thinks == "enabled":
        wanted["thinking"]["budget_tokens"] = 1024
    effort = draw(st.sampled_from(("low", "high", "max", None)))
    if effort:
        wanted["output_config"] = {"effort": effort}
    return wanted


# --- whole conversations --------------------------------------------------------------------------

_SIDE_CALLS: Final = (
    "CRITICAL: Respond with TEXT ONLY. Do NOT call any tools.",
    "The user stepped away and is coming back. Recap in under 40 words.",
)


@st.composite
def requests(
    draw: st.DrawFn, *, thinks: bool = True, words: bool = True, late_tools: bool = False
) -> list[Request]:
    """
    The requests of one conversation.

    Args:
        draw: Hypothesis's.
        thinks: whether answers hold thinking, or what templates take for it.
        words: whether the user speaks again after the first turn; without it the conversation is
            one long loop of tools.
        late_tools: whether tools are loaded on the way.
    """
    said: list[Json] = [*draw(_systems(1)), user(*draw(_openings())), *draw(_systems(3))]
    tools = [*TOOLS, tool(PLACEHOLDER, defer_loading=True)] if late_tools else list(TOOLS)
    unloaded = list(draw(st.permutations(LATE))) if late_tools else []
    found: list[Request] = []
    before: int | None = None
    rounds = draw(st.integers(2, 5))
    for number in range(rounds):
        found.append(Request(_dressed(draw, said, tools), before))
        before = len(found) - 1
        if words and draw(st.integers(0, 3)) == 0:
            aside = user(text(draw(st.sampled_from(_SIDE_CALLS))))
            answered = assistant(*draw(_answers(100 + number, thinks=False, calls=0)))
            found.append(Request(_dressed(draw, [*said, answered, aside], tools), before))
        loads = draw(st.booleans())
        if unloaded and loads:
            name = unloaded.pop()
            identity = f"toolu_late_{number}"
            loaded = {"type": "tool_reference", "tool_name": name}
            said.append(assistant(call(identity, "ToolSearch", query=name)))
            said.append(user(result(identity, [loaded])))
            tools.insert(draw(st.integers(0, len(tools))), tool(name, defer_loading=True))
            continue
        calls = draw(st.integers(0 if words else 1, 3))
        answer = draw(_answers(number, thinks=thinks, calls=calls))
        asked = [block for block in answer if block["type"] == "tool_use"]
        said.append(assistant(*answer))
        said.append(user(*draw(_turns(asked, words=words))))
        said += draw(_systems())
    return found
