"""
What sessions of `bench.load` ask: a conversation that goes on, and side calls of all kinds.

`bench.people` has the shorter ones of `bench.soak`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any, Final
from uuid import UUID

import attrs

from bench.people import Person, and_counted, no_count, text_of
from bench.persistent import Call, Ended, told_in_chunks

Json = Any

#: How often each kind is asked in a round.
OFTEN: Final = {
    "turn": 9,
    "count": 2,
    "title": 2,
    "haiku": 2,
    "subagent": 2,
    "schema": 1,
    "models": 1,
    "chat, stream": 1,
    "chat, whole": 1,
    "completion, stream": 1,
    "completion, whole": 1,
}

#: Messages after which a conversation begins anew.
LONGEST: Final = 12

#: What a client of OpenAI's API sends.
OPENAI: Final = {
    "content-type": "application/json",
    "user-agent": "OpenAI/Python 3.57",
    "authorization": "Bearer none",
}

#: What an SDK's own call sends.
SDK: Final = {"content-type": "application/json", "user-agent": "Anthropic/Python 2.12"}


@attrs.define(eq=False)
class Deck:
    """
    What is asked next, in an order that the dice decide; each round has every kind.

    All sessions have one, so that no kind is missing from a short run either.
    """

    dice: random.Random
    _cards: list[str] = attrs.field(factory=list, init=False)
    _lock: Lock = attrs.field(factory=Lock, init=False)

    def deal(self) -> str:
        """The next kind."""
        with self._lock:
            if not self._cards:
                self._cards = [kind for kind, many in OFTEN.items() for _ in range(many)]
                self.dice.shuffle(self._cards)
            return self._cards.pop()


@attrs.define(eq=False)
class Session(Person):
    """
    One session: a conversation that goes on, and what Claude Code asks beside it.

    Attributes:
        deck: says what comes next.
        messages: the conversation so far.
    """

    deck: Deck
    messages: list[Json] = attrs.field(factory=list, init=False)

    def ask(self, ask: Callable[[Call], Ended]) -> None:
        """Ask what comes next."""
        self.asked += 1
        match self.deck.deal():
            case "turn":
                self.goes_on(ask)
            case "count":
                self._counts(ask)
            case "title":
                ask(self.title())
            case "haiku":
                ask(self.haiku())
            case "subagent":
                ask(self.subagent())
            case "schema":
                ask(self.schema())
            case "models":
                ask(models())
            case "chat, stream" | "chat, whole" as kind:
                ask(self.chat(stream=kind.endswith("stream")))
            case kind:
                ask(self.completion(stream=kind.endswith("stream")))

    def every(self) -> Sequence[Call]:
        """One of each kind."""
        body = self.next()
        asked = [Call("count", body, "/v1/messages/count_tokens", fault=no_count)]
        asked += [turn({**body, "stream": stream}) for stream in (True, False)]
        asked += [self.title(), self.haiku(), self.subagent(), self.schema(), models()]
        for stream in (True, False):
            asked += [self.chat(stream=stream), self.completion(stream=stream)]
        return asked

    def next(self) -> Json:
        """The next turn, after all those before."""
        if len(self.messages) >= LONGEST:
            self.messages.clear()
        words = f"{self._mark()} Which gate is open?"
        return {
            "model": "any",
            "max_tokens": self.dice.randint(8, 40),
            "stream": self.dice.random() < 0.7,
            "system": self._rules(f"session {self.number % 4}"),
            "messages": [*self.messages, {"role": "user", "content": words}],
        }

    def goes_on(self, ask: Callable[[Call], Ended]) -> None:
        """Ask the next turn, and keep what is said."""
        body = self.next()
        ended = ask(turn(body))
        if ended.answer is not None:
            said = text_of(ended.answer).strip() or "None."
            self.messages[:] = [*body["messages"], {"role": "assistant", "content": said}]

    def _counts(self, ask: Callable[[Call], Ended]) -> None:
        body = self.next()
        counted = ask(Call("count", body, "/v1/messages/count_tokens", fault=no_count))
        ask(turn(body, counted.answer and counted.answer["input_tokens"]))

    def subagent(self) -> Call:
        """A task of its own, in the same session."""
        body = {
            "model": "any",
            "max_tokens": 24,
            "stream": True,
            "system": self._rules("agent"),
            "messages": [{"role": "user", "content": f"Look for gate {self._mark()}."}],
        }
        agent = str(UUID(int=self.number << 64 | self.asked))
        return Call(
            "subagent",
            body,
            headers={**self.headers, "x-claude-code-agent-id": agent},
            fault=unfinished,
        )

    def schema(self) -> Call:
        """An SDK's call with a schema: main answers it."""
        return attrs.evolve(self.title(), kind="schema, main", headers=SDK, is_dispensable=False)

    def chat(self, *, stream: bool) -> Call:
        """A chat completion."""
        body = {
            "model": "any",
            "max_tokens": 24,
            "stream": stream,
            "messages": [{"role": "user", "content": f"{self._mark()} What is a gate?"}],
        }
        return _openai("chat", body, "/v1/chat/completions")

    def completion(self, *, stream: bool) -> Call:
        """A completion of a bare prompt."""
        body = {
            "model": "any",
            "max_tokens": 16,
            "stream": stream,
            "prompt": f"{self._mark()} A gate is",
        }
        return _openai("completion", body, "/v1/completions")

    def _rules(self, mark: str) -> str:
        return " ".join(f"Gate {mark} {n} of the old city is open." for n in range(25))


def turn(body: Json, tokens: int | None = None) -> Call:
    """A turn; its usage must say `tokens`, where they were counted before."""
    name = f"turn, {'stream' if body['stream'] else 'whole'}"
    return Call(name, body, fault=and_counted(unfinished, tokens))


def unfinished(answer: Json) -> str:
    """What is wrong with an answer that may say anything, or nothing."""
    good = answer["type"] == "message" and answer["stop_reason"]
    return "" if good else f"no whole answer: {answer}"


def models() -> Call:
    """The list of models."""

    def fault(answer: Json) -> str:
        return "" if len(answer["data"]) == 2 else f"no list: {answer}"

    return Call("models", None, "/v1/models", fault=fault, headers=OPENAI)


def _openai(kind: str, body: Json, path: str) -> Call:
    def fault(answer: Json) -> str:
        ended = answer["reason"] if body["stream"] else answer["choices"][0]["finish_reason"]
        return "" if ended else f"no whole answer: {answer}"

    name = f"{kind}, {'stream' if body['stream'] else 'whole'}"
    return Call(name, body, path, headers=OPENAI, reads=told_in_chunks, fault=fault)
