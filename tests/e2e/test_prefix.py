"""
The same tokens for the same past, with templates of several families.

Each request of a conversation is prepared as a call is, rendered by the server's own
``/apply-template`` and tokenized by its ``/tokenize``: what was rendered of the request before must
be the beginning of it, token by token.  `EXCEPTIONS` holds what cannot be kept, and why; each of
them is shown to be one (docs/prompt-cache.md lists them).
"""

from __future__ import annotations

from collections.abc import Coroutine, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, Final, TypeVar

import attrs
import orjson
import pytest
import pytest_twisted
from hypothesis import given, settings
from twisted.internet import reactor
from twisted.internet.task import Clock

from gateway.config import Tier as TierConfig
from gateway.llama.client import LlamaClient
from gateway.policy import calls
from gateway.preparation import Preparation
from gateway.tier.tier import Tier
from gateway.wire import chat
from gateway.wire import request as wire
from tests.conversations import (
    CLIENT,
    TOOLS,
    Request,
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
from tests.e2e.stack import SMOLLM, Running, start_server
from tests.redacted import Recording, recordings

pytestmark = pytest.mark.server

Json = Any
T = TypeVar("T")

TEMPLATES: Final = Path(__file__).with_name("templates")

#: Ends the tools in each of the templates.
END_OF_TOOLS: Final = "\n</tools>"

#: A number for each conversation: none may know the switches of another.
_SESSIONS: Final = count()


@attrs.frozen
class Rendered:
    """A prompt up to where the model would go on."""

    text: str
    tokens: list[int]

    def parts_from(self, later: Rendered) -> str:
        """Where `later` parts from it; "" where it is the beginning of `later`."""
        if later.tokens[: len(self.tokens)] == self.tokens:
            return ""
        pairs = zip(self.text, later.text, strict=False)
        place = next((n for n, (a, b) in enumerate(pairs) if a != b), len(self.text))
        start = max(0, place - 60)
        return f"{self.text[start : place + 60]!r} became {later.text[start : place + 60]!r}"


def at_once(coroutine: Coroutine[Any, Any, T]) -> T:
    """What a coroutine that has nothing to wait for gives."""
    try:
        coroutine.send(None)
    except StopIteration as stopped:
        value: T = stopped.value
        return value
    raise AssertionError("it waits")


@attrs.frozen(repr=False)
class Family:
    """A server with one template, behind the gateway's own rooms."""

    name: str
    server: Running
    tier: Tier
    preparation: Preparation

    def render(self, body: Json, headers: Mapping[str, str]) -> Rendered:
        """The prompt of a request, prepared as `Preparation` prepares it."""
        request = wire.parse(orjson.dumps(body))
        call = calls.understand(request, headers)
        prepared = at_once(self.preparation._body(request, call, self.tier))
        asked = {**chat.from_messages(prepared), "add_generation_prompt": False}
        status, said = self.server.ask("/apply-template", asked)
        assert status == 200, said
        wanted = {"content": said["prompt"], "add_special": True, "parse_special": True}
        status, tokenized = self.server.ask("/tokenize", wanted)
        assert status == 200, tokenized
        return Rendered(said["prompt"], tokenized["tokens"])

    @classmethod
    def of(cls, name: str, server: Running) -> Family:
        """The gateway's rooms in front of a server."""
        clock = Clock()  # it stands: what the server says of itself is asked for once
        client = LlamaClient.at(reactor, "main", server.url, None)
        tier = Tier.of("main", TierConfig(server.url), client, clock)
        return cls(name, server, tier, Preparation({"main": tier}, (), clock))

    @staticmethod
    def new_session() -> dict[str, str]:
        """The headers of a session of Claude Code whose switches nobody knows."""
        return {"user-agent": CLIENT, "x-claude-code-session-id": str(next(_SESSIONS))}

    def conversation(self, bodies: Sequence[Json]) -> list[Rendered]:
        """The prompts of the requests of one conversation."""
        headers = self.new_session()
        return [self.render(body, headers) for body in bodies]


#: Of a server that need not generate a single token.
FLAGS: Final = (
    *(*SMOLLM, "--ctx-size", "512", "--threads", "1", "--cache-ram", "0"),
    "--chat-template-file",
)

#: Each template of tests/e2e/templates, and one that is what Qwen 3 first came with.
FAMILIES: Final = {
    "glm": ("glm.jinja", ""),
    "glm-nothink": ("glm_nothink.jinja", ""),
    "chatml": ("chatml.jinja", ""),
    "qwen3": ("qwen3.jinja", ""),
    "qwen3-first": ("qwen3.jinja", "preserve_thinking"),
}

#: Those that drop the thinking of earlier turns, whatever they are told.
FORGETFUL: Final = ("glm-nothink", "qwen3-first")


@pytest.fixture(scope="module", params=FAMILIES)
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Family]:
    """Each family by turns."""
    file, unknown = FAMILIES[request.param]
    template = (TEMPLATES / file).read_text()
    if unknown:
        assert unknown in template
        template = template.replace(unknown, "nobody_says_this")
    folder = tmp_path_factory.mktemp("family")
    (folder / "template.jinja").write_text(template)
    server = start_server(folder, "server", *FLAGS, str(folder / "template.jinja"))
    try:
        yield Family.of(request.param, server)
    finally:
        server.stop()


@pytest_twisted.async_fixture
async def family(served: Family) -> Family:
    """A family whose server was asked what its template does."""
    await served.tier.template()
    return served


# --- what holds -----------------------------------------------------------------------------------


def examples(most: int) -> settings:
    return settings(max_examples=most, deadline=None)


def test_a_later_prompt_begins_with_the_earlier(family: Family) -> None:
    """Whatever the client changes of the past's shape, its tokens stay."""
    whole = requests()
    if family.name in FORGETFUL:
        whole = requests(thinks=False) | requests(words=False)

    @examples(100)
    @given(whole)
    def check(conversation: list[Request]) -> None:
        prompts = family.conversation([request.body for request in conversation])
        for request, prompt in zip(conversation, prompts, strict=True):
            if request.after is not None:
                assert prompts[request.after].parts_from(prompt) == ""

    check()


def test_a_late_tool_stands_behind_all_others(family: Family) -> None:
    """What is said before the late tool and what is said after the tools stays, word by word."""

    @examples(50)
    @given(requests(thinks=False, late_tools=True))
    def check(conversation: list[Request]) -> None:
        prompts = family.conversation([request.body for request in conversation])
        for request, prompt in zip(conversation, prompts, strict=True):
            if request.after is not None:
                before, _, after = prompts[request.after].text.partition(END_OF_TOOLS)
                tools, _, rest = prompt.text.partition(END_OF_TOOLS)
                assert tools.startswith(before)
                assert rest.startswith(after)

    check()


def test_switches_that_rewrite_the_past_are_found(family: Family) -> None:
    """What must keep its first value is seen by rendering, and where nothing must, nothing does."""
    asked = at_once(family.tier.template()).in_question
    assert tuple(name for name in asked if name not in family.tier.cache.free) == (
        ("enable_thinking", "reasoning_effort") if family.name == "glm-nothink" else ()
    )


# --- what does not --------------------------------------------------------------------------------


@attrs.frozen
class Exemption:
    """
    A change of the client's that costs a part of the prefix, whatever we do.

    Attributes:
        what: is changed.
        why: nothing can be done about it.
        families: where it is so.
        earlier: a request.
        later: the request after it.
        restarted: whether the gateway was started anew between the two.
    """

    what: str
    why: str
    families: Sequence[str]
    earlier: Json
    later: Json
    restarted: bool = False


ASKED: Final = [user(text("Look."))]
LOOKED: Final = [*ASKED, assistant(thinking("Hm."), call("a")), user(result("a"))]
TOLD: Final = [*LOOKED, assistant(thinking("So."), text("Done."))]
ALL: Final = tuple(FAMILIES)

EXCEPTIONS: Final = (
    Exemption(
        "a tool is loaded late",
        "templates render the tools before the conversation; the new one is the last of them, and"
        " all that stands behind the tools is evaluated anew",
        ALL,
        body(LOOKED),
        body(LOOKED, tools=[tool("Alarm", defer_loading=True), *TOOLS]),
    ),
    Exemption(
        "a tool goes, or is described in other words",
        "as above, from the place of that tool on",
        ALL,
        body(LOOKED),
        body(LOOKED, tools=TOOLS[:-1]),
    ),
    Exemption(
        "tool_choice becomes none, or names a tool",
        "llama-server enforces neither: the other tools are not offered, so they are not rendered;"
        " Claude Code does neither within a conversation",
        ALL,
        body(LOOKED),
        body(TOLD + ASKED, tool_choice={"type": "none"}),
    ),
    Exemption(
        "the user speaks again after the model has thought",
        "the template drops the thinking of earlier turns, and reads nothing that would keep it;"
        " what is lost is the last loop, from its first thought on",
        FORGETFUL,
        body(LOOKED),
        body(TOLD + ASKED),
    ),
    Exemption(
        "a summary or a recap is asked for after the model has thought",
        "the same: what asks for it is a user's turn",
        FORGETFUL,
        body(LOOKED),
        body([*TOLD, user(text("CRITICAL: Respond with TEXT ONLY."))]),
    ),
    Exemption(
        "words are added to a turn that was sent already",
        "a mark ends each turn; what is lost is that mark",
        ("chatml", "qwen3", "qwen3-first"),
        body(ASKED),
        body([user(text("Look."), text("Wait."))]),
    ),
    Exemption(
        "the client writes the past anew: /compact, /rewind, a folder or a day that changed",
        "it is another prompt",
        ALL,
        body(TOLD + ASKED),
        body([user(text("This session goes on from another one.")), *ASKED]),
    ),
    Exemption(
        "thinking or effort is switched, and the gateway was started anew since the first turn",
        "the switch rewrites earlier turns, so it keeps its first value; which one that was is"
        " known to the running gateway only",
        ("glm-nothink",),
        body(ASKED),
        body(LOOKED, thinking={"type": "disabled"}),
        restarted=True,
    ),
)


@pytest.mark.parametrize("exemption", EXCEPTIONS, ids=lambda each: each.what)
def test_what_cannot_be_kept(family: Family, exemption: Exemption) -> None:
    """Each exception is one where the table says so, and is none with the other templates."""
    headers = family.new_session()
    earlier = family.render(exemption.earlier, headers)
    later = family.render(exemption.later, family.new_session() if exemption.restarted else headers)
    parts = earlier.parts_from(later)
    assert bool(parts) == (family.name in exemption.families), parts


def test_a_switch_keeps_its_first_value(family: Family) -> None:
    """The same two requests of a gateway that was not started anew."""
    (restarted,) = (each for each in EXCEPTIONS if each.restarted)
    earlier, later = family.conversation([restarted.earlier, restarted.later])
    assert earlier.parts_from(later) == ""


# --- what the real clients sent -------------------------------------------------------------------


@attrs.frozen
class Step:
    """Two requests of a recorded conversation, one after the other."""

    name: str
    earlier: Rendered
    later: Rendered
    is_anew: bool


def steps(family: Family, recording: Recording) -> Iterator[Step]:
    """All that go on from another request, whatever their client changed between the two."""
    for session in recording.sessions:
        last: dict[str, tuple[Json, Rendered]] = {}
        for each in session.calls:
            if "count_tokens" in each.path:
                continue
            request = wire.parse(orjson.dumps(each.body))
            call = calls.understand(request, each.headers)
            if not call.is_in_conversation or request.is_bound:
                continue
            body = _thoughtless(each.body) if family.name in FORGETFUL else each.body
            prompt = family.render(body, each.headers)
            if call.conversation in last:
                before, earlier = last[call.conversation]
                name = f"{session.name}, {each.step}"
                yield Step(name, earlier, prompt, _is_anew(before, each.body))
            if call.kind in ("turn", "subagent"):
                last[call.conversation] = each.body, prompt


def _thoughtless(body: Json) -> Json:
    """A body without thinking, which some templates drop anyway when the user speaks again."""
    messages = [
        {**message, "content": [each for each in message["content"] if each["type"] != "thinking"]}
        if isinstance(message["content"], list)
        else message
        for message in body["messages"]
    ]
    return {**body, "messages": messages}


def _is_anew(earlier: Json, later: Json) -> bool:
    """Whether it is one of the `EXCEPTIONS` for all families: other tools, or another past."""
    return _names(earlier) != _names(later) or _first(earlier) != _first(later)


def _names(body: Json) -> set[str]:
    return {each["name"] for each in body["tools"]}


def _first(body: Json) -> list[str]:
    """The texts of the opening turn, which only a client that writes the past anew changes."""
    content = body["messages"][0]["content"]
    return [content] if isinstance(content, str) else [block.get("text") for block in content]


@pytest.mark.parametrize("recording", recordings(), ids=lambda each: each.client)
def test_what_real_clients_sent(family: Family, recording: Recording) -> None:
    """The same of Claude Code's own requests: what differs is an exception, and is one."""
    found = list(steps(family, recording))
    assert len(found) > 20
    for step in found:
        parts = step.earlier.parts_from(step.later)
        assert bool(parts) == step.is_anew, f"{step.name}: {parts}"
