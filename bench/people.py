"""
What people ask in `bench.soak` and `bench.load`: turns, titles, side calls and counts.

Every call carries what must be true of its answer.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any
from uuid import UUID

import attrs
import orjson

from bench.persistent import Call, Ended

Json = Any


@attrs.define(eq=False)
class Person:
    """
    One client: a session with a long text that comes again, and with ever new questions.

    Attributes:
        number: which one.
        dice: decides what is asked.
    """

    number: int
    dice: random.Random
    asked: int = attrs.field(default=0, init=False)

    @property
    def headers(self) -> dict[str, str]:
        """What Claude Code sends."""
        session = UUID(int=self.number)
        return {
            "content-type": "application/json",
            "user-agent": "claude-cli/2.1.330 (external, cli)",
            "x-claude-code-session-id": str(session),
        }

    def ask(self, ask: Callable[[Call], Ended]) -> None:
        """Ask what comes next."""
        self.asked += 1
        which = self.dice.random()
        if which < 0.15:
            ask(self.title())
        elif which < 0.30:
            ask(self.haiku())
        elif which < 0.45:
            body = self.turn()
            counted = ask(Call("count", body, "/v1/messages/count_tokens", fault=no_count))
            ask(a_turn(body, counted.answer and counted.answer["input_tokens"]))
        elif which < 0.65:
            call = a_turn(self.turn())
            leaves = self.dice.choice((0.05, 0.3, 1.0, 2.0, 4.0))
            ask(attrs.evolve(call, kind=f"{call.kind}, to be left", leaves=leaves))
        else:
            ask(a_turn(self.turn()))

    def turn(self) -> Json:
        """A turn; one of three has 1 000 to 2 000 tokens, and one of three of these a new text."""
        body = {
            "model": "any",
            "max_tokens": self.dice.randint(8, 40),
            "stream": self.dice.random() < 0.7,
            "messages": [{"role": "user", "content": f"{self._mark()} Which gate is open?"}],
        }
        if self.dice.randrange(3) == 0:
            body["system"] = self._text("session" if self.dice.randrange(3) else self._mark())
        return body

    def title(self) -> Call:
        """A title that only this call has."""
        title = f"Session {self._mark()}"
        schema = {
            "type": "object",
            "properties": {"title": {"const": title}},
            "required": ["title"],
            "additionalProperties": False,
        }
        body = {
            "model": "any",
            "max_tokens": 32000,
            "stream": True,
            "messages": [{"role": "user", "content": f"Name this session: {title}."}],
            "output_config": {"format": {"type": "json_schema", "schema": schema}},
        }

        def fault(answer: Json) -> str:
            said = text_of(answer)
            return (
                "" if said and orjson.loads(said) == {"title": title} else f"{said!r} for {title}"
            )

        return Call("title", body, fault=fault, is_dispensable=True)

    def haiku(self) -> Call:
        """A side call without a schema."""
        body = {
            "model": "claude-haiku-4-5",
            "max_tokens": 24,
            "stream": self.dice.random() < 0.5,
            "messages": [{"role": "user", "content": f"{self._mark()} Say what a gate is."}],
        }
        return Call("haiku", body, fault=silence, is_dispensable=True)

    def _mark(self) -> str:
        return f"{self.number}-{self.asked}"

    def _text(self, mark: str) -> str:
        sentences = 60 + 15 * self.number
        return " ".join(f"Gate {mark} {n} of the old city is open." for n in range(sentences))


def text_of(message: Json) -> str:
    """The words of an answer."""
    return "".join(block.get("text", "") for block in message["content"])


def a_turn(body: Json, tokens: int | None = None) -> Call:
    """A turn; its usage must say `tokens`, where they were counted before."""
    size = "long" if "system" in body else "short"
    how = "stream" if body["stream"] else "whole"
    return Call(f"turn, {size}, {how}", body, fault=and_counted(silence, tokens))


def and_counted(fault: Callable[[Json], str], tokens: int | None) -> Callable[[Json], str]:
    """As `fault`; and the usage must say `tokens`, where they were counted before."""

    def both(answer: Json) -> str:
        usage = answer["usage"]
        seen = usage["input_tokens"] + (usage.get("cache_read_input_tokens") or 0)
        miscounted = "" if tokens in (None, seen) else f"{seen} tokens in, not {tokens}"
        return fault(answer) or miscounted

    return both


def silence(answer: Json) -> str:
    """What is wrong with an answer that may say anything."""
    good = answer["type"] == "message" and text_of(answer) and answer["stop_reason"]
    return "" if good else f"an answer that says nothing: {answer}"


def no_count(answer: Json) -> str:
    """What is wrong with an answer that should be a count."""
    return "" if answer.get("input_tokens", 0) > 0 else f"no count: {answer}"
