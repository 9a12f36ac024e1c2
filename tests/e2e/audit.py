"""
What a server evaluates of each prompt, and what of that it had evaluated before.

Each call is rendered and tokenized by a real llama-server, as the client sent it and as the gateway
prepares it, and compared with what a server of one slot still holds that puts aside what its slot
held (`Memory`).  No model evaluates anything.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import attrs
import orjson

from gateway.policy import calls, prefix
from gateway.policy.template import Template
from gateway.wire import chat
from gateway.wire import request as wire
from tests.e2e.stack import SMOLLM, Running, start_server

Json = Any

#: So many tokens in a row that were evaluated before are no coincidence.
RUN: Final = 64

#: Tokens with which a template may open an answer; the next prompt may say them otherwise.
OPENING: Final = 8

#: The least share of what was put aside that must fit for llama-server to take it back (llama.cpp
#: `tools/server/server-task.cpp`, `server_prompt_cache::load`).
_LEAST: Final = 0.25

_SIZE: Final = array("I").itemsize


# --- a server's memory ----------------------------------------------------------------------------


@attrs.frozen(eq=False, slots=False)
class Prompt:
    """A prompt in tokens, and the body that it was rendered of."""

    tokens: Sequence[int]
    body: Json
    _packed: bytes

    @classmethod
    def of(cls, tokens: Sequence[int], body: Json) -> Prompt:
        return cls(tokens, body, array("I", tokens).tobytes())

    def __len__(self) -> int:
        return len(self.tokens)

    def shared(self, other: Prompt) -> int:
        """With how many of the same tokens both begin."""
        least, most = 0, min(len(self), len(other))
        while least < most:
            middle = (least + most + 1) // 2
            if self._packed[: middle * _SIZE] == other._packed[: middle * _SIZE]:
                least = middle
            else:
                most = middle - 1
        return least


@attrs.define(eq=False)
class Memory:
    """
    What llama-server holds with one slot, ``--slot-prompt-similarity 0`` and RAM enough.

    The slot is put aside before each prompt; what fits better than the slot, and of which more is
    kept, is taken back, and what does not fit of it is lost.
    """

    _slot: Prompt | None = None
    _aside: list[Prompt] = attrs.field(factory=list)

    def take(self, prompt: Prompt) -> tuple[Prompt | None, int]:
        """The one that shares most with `prompt` of all it holds, and what the slot has of it."""
        self._put_aside()
        best = max(self._aside, key=prompt.shared, default=None)
        self._take_back(prompt)
        kept = prompt.shared(self._slot) if self._slot is not None else 0
        self._slot = prompt
        return best, kept

    def _put_aside(self) -> None:
        slot = self._slot
        if slot is None or any(each.shared(slot) == len(slot) for each in self._aside):
            return
        self._aside = [each for each in self._aside if each.shared(slot) < len(each)]
        self._aside.append(slot)

    def _take_back(self, prompt: Prompt) -> None:
        slot, found = self._slot, None
        fits = kept = -1.0
        if slot is not None:
            kept, fits = prompt.shared(slot) / len(slot), prompt.shared(slot) / len(prompt)
        for each in self._aside:
            same = prompt.shared(each)
            of_it, of_new = same / len(each), same / len(prompt)
            if of_it >= _LEAST and of_it > kept and of_new > fits:
                found, kept, fits = each, of_it, of_new
        if found is not None:
            self._aside.remove(found)
            self._slot = found


@attrs.define(eq=False)
class Known:
    """Every run of `RUN` tokens that was ever evaluated."""

    _runs: set[int] = attrs.field(factory=set)

    def again(self, tokens: Sequence[int], start: int) -> int:
        """How many of the tokens from `start` on stand in such a run; all are known from now on."""
        found = bytearray(len(tokens))
        new = []
        for place in range(max(0, start - RUN + 1), len(tokens) - RUN + 1):
            run = hash(tuple(tokens[place : place + RUN]))
            if run in self._runs:
                found[place : place + RUN] = b"\1" * RUN
            new.append(run)
        self._runs.update(new)
        return sum(found[start:])


# --- prompts --------------------------------------------------------------------------------------


@attrs.frozen(eq=False)
class Renderer:
    """
    A server that is asked for nothing but prompts and tokens.

    Attributes:
        template: of the server.
        tools_first: whether the template says the tools before the system prompt.
    """

    server: Running
    template: Template
    tools_first: bool

    @classmethod
    def of(cls, folder: Path, template: Path) -> Renderer:
        """Start it; who asks for it stops its `server`."""
        flags = ("--ctx-size", "512", "--threads", "1", "--chat-template-file", str(template))
        server = start_server(folder, "renderer", *SMOLLM, *flags)
        text = server.ask("/props")[1]["chat_template"]
        made = cls(server, Template.of(text, vision=False), tools_first=True)
        tool = {"name": "first_or_second", "input_schema": {"type": "object"}}
        messages = [{"role": "user", "content": "x"}]
        prompt = made.text({"system": "In between.", "tools": [tool], "messages": messages})
        tools_first = prompt.index("first_or_second") < prompt.index("In between.")
        return attrs.evolve(made, tools_first=tools_first)

    def text(self, body: Json) -> str:
        """The prompt of a Messages body, as the server alone converts it."""
        status, said = self.server.ask("/apply-template", chat.from_messages(body))
        assert status == 200, said
        prompt: str = said["prompt"]
        return prompt

    def tokens(self, text: str) -> list[int]:
        wanted = {"content": text, "add_special": True, "parse_special": True}
        found: list[int] = self.server.ask("/tokenize", wanted)[1]["tokens"]
        return found

    def prompt(self, body: Json) -> Prompt:
        return Prompt.of(self.tokens(self.text(body)), body)

    def prepared(self, body: Json) -> Json:
        """The body that the gateway makes of a client's."""
        return prefix.prepare(wire.parse(orjson.dumps(body)), self.template)


@attrs.frozen
class Group:
    """
    A part of a prompt.

    Attributes:
        cause: what a prompt that parts here from an earlier one has, in words.
        parts: the texts of which it is made.
        free: whether the gateway may choose their order.
    """

    cause: str
    parts: Sequence[str]
    free: bool


PAST: Final = "the past, said otherwise"


def groups(body: Json, *, tools_first: bool) -> Iterator[Group]:
    """The groups of a prepared body in the order of the prompt."""
    tools = [orjson.dumps(tool).decode() for tool in body.get("tools", ())]
    first = [Group("other tools", tools, free=True)]
    first.append(Group("another system prompt", [body.get("system", "")], free=False))
    yield from first if tools_first else reversed(first)
    opening, *others = body["messages"]
    said = [block.get("text", "").lstrip() for block in opening["content"]]
    yield Group("another opening turn", said, free=True)
    yield Group(PAST, [orjson.dumps(each).decode() for each in others], free=False)


# --- the audit ------------------------------------------------------------------------------------


@attrs.frozen
class Figures:
    """
    What became of one prompt, in tokens.

    Attributes:
        prompt: its length.
        again: evaluated, though it was evaluated before.
        cause: where it parts from the longest that was held, in words; "" where it does not.
        avoidable: of `again`, what another order of its parts would have saved.
        left: held, but not taken back: the server chose something else.
    """

    prompt: int
    again: int
    cause: str
    avoidable: int
    left: int


@attrs.define(eq=False)
class Audit:
    """
    One server's memory, and what was asked of it.

    Attributes:
        renderer: makes its prompts.
        behind_gateway: whether the gateway prepares them; otherwise clients ask it directly.
    """

    renderer: Renderer
    behind_gateway: bool = True
    _memory: Memory = attrs.field(factory=Memory)
    _known: Known = attrs.field(factory=Known)
    _last: dict[str, Prompt] = attrs.field(factory=dict)

    def take(self, body: Json, headers: Mapping[str, str]) -> Figures:
        """The figures of the next call."""
        call = calls.understand(wire.parse(orjson.dumps(body)), headers)
        prompt = self.renderer.prompt(self.renderer.prepared(body) if self.behind_gateway else body)
        best, kept = self._memory.take(prompt)
        held = 0 if best is None else min(prompt.shared(best), len(prompt) - 1)
        again = self._known.again(prompt.tokens, held)
        if held >= len(prompt) - OPENING:
            again = 0  # the same again, but for how it opens the answer
        before = self._last.get(call.conversation)
        if call.kind in ("turn", "subagent"):
            self._last[call.conversation] = prompt
        left = max(0, held - kept)
        if before is not None and before.shared(prompt) >= len(before) - OPENING:
            return Figures(len(prompt), 0, "", 0, left)  # what comes after is new, if not its words
        if best is None or again == 0:
            return Figures(len(prompt), 0, "", 0, left)
        if not self.behind_gateway:
            return Figures(len(prompt), again, "as the client sent it", 0, left)
        cause, avoidable = self._why(best, prompt)
        return Figures(len(prompt), again, cause, min(again, avoidable), left)

    def _why(self, earlier: Prompt, later: Prompt) -> tuple[str, int]:
        """Where `later` parts from `earlier`, and the tokens that another order would save."""
        first = self.renderer.tools_first
        pairs = zip(
            groups(earlier.body, tools_first=first),
            groups(later.body, tools_first=first),
            strict=True,
        )
        for one, other in pairs:
            if one.parts == other.parts:
                continue
            if other.cause == PAST:
                break
            if not other.free:
                return other.cause, 0
            both = zip(one.parts, other.parts, strict=False)
            same = next((n for n, (a, b) in enumerate(both) if a != b), len(other.parts))
            moved = [part for part in other.parts[same:] if part in one.parts[same:]]
            return other.cause, sum(len(self.renderer.tokens(part)) for part in moved)
        return PAST, len(later)
