"""
What kind of call this is, and of which conversation.

Behind a gateway Claude Code names most of its side calls after the main model, so the shape
decides.  `MARKS` is the whole of what we know of those shapes: a new client is a new row.  A kind
other than ``turn`` needs the client's own marks: anybody else's call, whatever it looks like, is a
``turn``, and so is what is not surely something else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from hashlib import blake2b
from typing import Any, Final, Literal, get_args

import attrs
import orjson

from gateway.wire.request import MessagesRequest

Json = Any

Kind = Literal[
    "turn",
    "subagent",
    "title",
    "hook",
    "fetch",
    "classifier",
    "compaction",
    "suggestion",
    "recap",
    "probe",
    "count",
    "other",
]
KINDS: Final[tuple[str, ...]] = get_args(Kind)

#: Those that a route can name: a count goes where the message would go.
ROUTED: Final = tuple(kind for kind in KINDS if kind != "count")

#: Kinds that are housekeeping: their answers are short, and bounded.
HOUSEKEEPING: Final = frozenset({"title", "hook", "fetch", "probe"})

#: Kinds that go on with a conversation, or are one.
_IN_CONVERSATION: Final = frozenset({"turn", "subagent", "compaction", "suggestion", "recap"})

#: Parts of the names under which Claude Code asks for the small model: its own, and the one that
#: `claudegw settings` gives it.
_SMALL_NAMES: Final = ("haiku", "claudegw-small")

#: Characters of a text in which a mark is looked for.
_HEAD: Final = 400


@attrs.frozen
class Call:
    """
    One call, understood.

    Attributes:
        kind: one of `KINDS`.
        why: the mark that decided, for the log.
        from_claude_code: whether the client is Claude Code.
        session: Claude Code's id of the session, or "".
        agent: Claude Code's id of the subagent, or "".
        conversation: the same for all calls of one conversation, and for no others.
    """

    kind: Kind
    why: str
    from_claude_code: bool = False
    session: str = ""
    agent: str = ""
    conversation: str = ""

    @property
    def is_housekeeping(self) -> bool:
        return self.kind in HOUSEKEEPING

    @property
    def is_in_conversation(self) -> bool:
        """Whether its prompt begins as the one before it in its conversation did."""
        return self.kind in _IN_CONVERSATION


def understand(request: MessagesRequest, headers: Mapping[str, str]) -> Call:
    """
    The call that `request` is.

    Args:
        request: a checked request.
        headers: the request's headers, names in lower case.
    """
    ours = headers.get("user-agent", "").startswith("claude-cli/")
    session = headers.get("x-claude-code-session-id", "")
    agent = headers.get("x-claude-code-agent-id", "")
    kind, why = _kind(request, agent) if ours else ("turn", "not Claude Code")
    return Call(kind, why, ours, session, agent, _conversation(request, session, agent))


def names_small(model: str) -> bool:
    """Whether this is a name of the small model."""
    lowered = model.lower()
    return any(part in lowered for part in _SMALL_NAMES)


def _conversation(request: MessagesRequest, session: str, agent: str) -> str:
    """The client's own ids; where it has none, its user and how the conversation begins."""
    if session:
        return f"{session}/{agent}"
    user = (request.body.get("metadata") or {}).get("user_id")
    beginning = orjson.dumps([user, *_texts(request.messages[0]["content"])])
    return blake2b(beginning, digest_size=16).hexdigest()


def _texts(content: str | list[Json]) -> tuple[str, ...]:
    if isinstance(content, str):
        return (content,)
    return tuple(block["text"] for block in content if block["type"] == "text")


# --- the marks ------------------------------------------------------------------------------------


@attrs.frozen(slots=False)
class _Shape:
    """What marks look at."""

    request: MessagesRequest
    agent: str

    @property
    def body(self) -> Mapping[str, Json]:
        return self.request.body

    @cached_property
    def has_tools(self) -> bool:
        return bool(self.request.tools)

    @property
    def tool_types(self) -> list[str]:
        return [tool.get("type") or "custom" for tool in self.request.tools]

    @cached_property
    def answers_with(self) -> frozenset[str]:
        """The names of the properties of the schema that the answer must fit."""
        properties = (self.request.schema or {}).get("properties")
        return frozenset(properties if isinstance(properties, dict) else ())

    @cached_property
    def system(self) -> tuple[str, ...]:
        """How each system text begins."""
        return tuple(text.lstrip()[:_HEAD] for text in self.request.system)

    @cached_property
    def last_words(self) -> tuple[str, ...]:
        """How each text of the last message that is the user's begins."""
        users = [message for message in self.request.messages if message["role"] == "user"]
        if not users:
            return ()
        return tuple(text.lstrip()[:_HEAD] for text in _texts(users[-1]["content"]))

    def system_says(self, words: str) -> bool:
        return any(words in text for text in self.system)

    def begins(self, words: str) -> bool:
        """Whether a text of the user's last message begins with these words."""
        return any(text.startswith(words) for text in self.last_words)


@attrs.frozen
class Mark:
    """
    How a kind of call is known.

    Attributes:
        kind: the kind.
        why: the mark in words, for the log.
        seen: versions of Claude Code in which it was seen, the first and the last.
        holds: whether a call has it.
    """

    kind: Kind
    why: str
    seen: str
    holds: Callable[[_Shape], bool]


#: The first that holds decides.  Their source is what the clients were seen to send
#: (docs/protocol.md, "What a call is").
MARKS: Final[tuple[Mark, ...]] = (
    Mark(
        "title",
        "a schema with a title and no tools",
        "2.1.36 to 2.1.330",
        lambda call: "title" in call.answers_with and not call.has_tools,
    ),
    Mark(
        "hook",
        "a schema with a verdict and no tools",
        "2.1.330",
        lambda call: "ok" in call.answers_with and not call.has_tools,
    ),
    Mark(
        "hook",
        "a schema with a verdict, and a hook to evaluate",
        "2.1.36 to 2.1.330",
        lambda call: "ok" in call.answers_with and call.system_says("You are evaluating a hook"),
    ),
    Mark(
        "other",
        "a schema and no tools",
        "none",
        lambda call: call.request.is_bound,
    ),
    Mark(
        "classifier",
        "an answer that ends with </block>, and no tools",
        "2.1.330",
        lambda call: not call.has_tools and "</block>" in (call.body.get("stop_sequences") or ()),
    ),
    Mark(
        "classifier",
        "a monitor of agents, and no tools",
        "2.1.330",
        lambda call: not call.has_tools and call.system_says("You are a security monitor"),
    ),
    Mark(
        "probe",
        "an answer of one token, and no tools",
        "2.1.330",
        lambda call: call.request.max_tokens == 1 and not call.has_tools,
    ),
    Mark(
        "fetch",
        "the content of a web page, and no tools",
        "2.1.36 to 2.1.330",
        lambda call: not call.has_tools and call.begins("Web page content:"),
    ),
    Mark(
        "other",
        "nothing but tools that Anthropic runs",
        "2.1.36 to 2.1.330",
        lambda call: (
            call.has_tools and all(kind.startswith("web_search_") for kind in call.tool_types)
        ),
    ),
    Mark(
        "compaction",
        "a summary is asked for, in text only",
        "2.1.330",
        lambda call: call.begins("CRITICAL: Respond with TEXT ONLY"),
    ),
    Mark(
        "compaction",
        "a conversation is to be summarized",
        "2.1.36",
        lambda call: call.system_says("tasked with summarizing conversations"),
    ),
    Mark(
        "recap",
        "the user is coming back",
        "2.1.330",
        lambda call: call.begins("The user stepped away and is coming back"),
    ),
    Mark(
        "suggestion",
        "a suggestion is asked for",
        "2.1.36",
        lambda call: call.begins("[SUGGESTION MODE"),
    ),
    Mark(
        "other",
        "the name of the small model, and no tools",
        "2.1.36 to 2.1.330",
        lambda call: names_small(call.request.model) and not call.has_tools,
    ),
    Mark(
        "subagent",
        "an agent id",
        "2.1.330",
        lambda call: bool(call.agent),
    ),
    Mark(
        "subagent",
        "an agent's system prompt",
        "2.1.36 to 2.1.330",
        lambda call: call.system_says("for Claude Code, Anthropic's official CLI"),
    ),
)


def _kind(request: MessagesRequest, agent: str) -> tuple[Kind, str]:
    shape = _Shape(request, agent)
    for mark in MARKS:
        if mark.holds(shape):
            return mark.kind, mark.why
    return "turn", "no mark of a side call"
