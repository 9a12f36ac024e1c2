"""
The original burst, on real servers: many calls at once, and clients that leave at random.

An `Observer` stands between the gateway and the main server.
"""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator, Sequence
from itertools import cycle
from random import Random
from typing import Any, Final

import attrs
import pytest
import pytest_twisted
from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThread

from tests.e2e.conftest import HAIKU
from tests.e2e.observer import Observer, Visitor, reactor, until
from tests.e2e.stack import Running, start_gateway
from tests.house import CLAUDE_CODE

pytestmark = pytest.mark.server

COUNT: Final = "/v1/messages/count_tokens"
WORDS: Final = ("river", "stone", "cloud", "lamp", "garden", "winter", "table", "music", "bridge")
TOOL: Final = {
    "name": "look",
    "description": "Look something up.",
    "input_schema": {"type": "object", "properties": {"word": {"type": "string"}}},
}
TITLE: Final = {
    "type": "object",
    "properties": {"title": {"type": "string"}},
    "required": ["title"],
    "additionalProperties": False,
}

#: What a client can have read when it leaves: nothing, a status, the first words.
MOMENTS: Final = (b"content_block_delta", b"", b"HTTP/1.1 200")

#: One letter for each event, and the streams that are valid.
LETTERS: Final = {
    "message_start": "S",
    "content_block_start": "(",
    "content_block_delta": ".",
    "content_block_stop": ")",
    "message_delta": "D",
    "message_stop": "E",
    "ping": "",
}
VALID: Final = re.compile(r"S(\(\.*\))*DE")


# --- what is asked --------------------------------------------------------------------------------


@attrs.frozen
class Ask:
    """
    One call, different from all others.

    Attributes:
        tier: where it belongs.
        body: what is sent.
        path: where to.
        leaves: what its client reads before it leaves, and the seconds that it stays from then.
    """

    tier: str
    body: dict[str, Any]
    path: str = "/v1/messages"
    leaves: tuple[bytes, float] | None = None

    @property
    def counts(self) -> bool:
        return self.path == COUNT

    def leaving(self, mark: bytes, seconds: float) -> Ask:
        """The same call of a client that leaves, and would get a long answer."""
        body = self.body | {"stream": True, "max_tokens": 200}
        return attrs.evolve(self, body=body, leaves=(mark, seconds))


@attrs.frozen
class Asks:
    """Makes calls, no two alike."""

    name: str
    random: Random

    def _body(self, model: str, number: int, words: int, **more: Any) -> dict[str, Any]:
        said = " ".join(self.random.choices(WORDS, k=words))
        content = f"{self.name} {number}: {said}. Say one word."
        messages = [{"role": "user", "content": content}]
        return {"model": f"{model}-{self.name}-{number}", "messages": messages, **more}

    def _stream(self, number: int) -> bool:
        return number % 2 == 0

    def haiku(self, number: int) -> Ask:
        more: dict[str, Any] = {"tools": [TOOL]} if number % 5 == 0 else {}
        stream = self._stream(number)
        body = self._body("claude-haiku-4-5", number, 5 + number, max_tokens=12, stream=stream)
        return Ask("small", body | more)

    def title(self, number: int) -> Ask:
        wanted = {"format": {"type": "json_schema", "schema": TITLE}}
        stream = self._stream(number)
        body = self._body("claude-opus-4-5", number, 5 + number, max_tokens=32, stream=stream)
        return Ask("small", body | {"output_config": wanted})

    def turn(self, number: int, words: int | None = None) -> Ask:
        words, stream = words or 20 + 3 * number, self._stream(number)
        body = self._body("claude-opus-4-5", number, words, max_tokens=8, stream=stream)
        return Ask("main", body | {"tools": [TOOL]})

    def count(self, number: int) -> Ask:
        tier, model = ("main", "opus") if self._stream(number) else ("small", "haiku")
        return Ask(tier, self._body(f"claude-{model}-4-5", number, 50 + number), COUNT)


# --- who answers ----------------------------------------------------------------------------------


@attrs.frozen
class Scene:
    """A gateway between clients and two real servers, with an observer before the main one."""

    gateway: Running
    observer: Observer
    servers: dict[str, Running]

    async def visit(self, ask: Ask) -> Visitor:
        """The client of one call, when it has been answered or has left."""
        visitor = await Visitor.asking(self.gateway.port, ask.body, ask.path, CLAUDE_CODE)
        if ask.leaves is not None:
            mark, seconds = ask.leaves
            await visitor.until(mark)
            await deferLater(reactor, seconds)
            visitor.leave()
        await visitor.until_closed()
        return visitor

    async def visit_all(self, asks: Sequence[Ask]) -> list[Visitor]:
        """The clients of calls that are made at once."""
        visits = [Deferred.fromCoroutine(self.visit(ask)) for ask in asks]
        visitors: list[Visitor] = await gatherResults(visits, consumeErrors=True)
        return visitors

    def assert_answered(self, ask: Ask, visitor: Visitor) -> None:
        """The answer is whole, valid, and the one to this call."""
        assert visitor.status == 200, visitor.raw
        tokens = self.tokens(ask)
        if ask.counts:
            assert visitor.json == {"input_tokens": tokens}
            return
        assert visitor.headers["x-claudegw-tier"] == ask.tier
        message = told(visitor) if ask.body["stream"] else visitor.json
        usage = message["usage"]
        assert message["model"] == ask.body["model"]
        assert message["stop_reason"] in ("end_turn", "max_tokens", "tool_use")
        assert usage["input_tokens"] + usage["cache_read_input_tokens"] == tokens
        assert usage["output_tokens"] > 0

    def tokens(self, ask: Ask) -> int:
        """The prompt's tokens, by the server's own word."""
        status, said = self.servers[ask.tier].ask(COUNT, ask.body)
        assert status == 200
        return int(said["input_tokens"])

    def is_at_rest(self) -> bool:
        """Whether every permit is back and nobody waits."""
        tiers = self.gateway.ask("/status")[1]["tiers"].values()
        return not any(tier[key] for tier in tiers for key in ("running", "waiting", "settling"))


def told(visitor: Visitor) -> dict[str, Any]:
    """The message that a stream told, without its content; the stream must be a valid one."""
    events = visitor.events
    assert VALID.fullmatch("".join(LETTERS[event["type"]] for event in events)), events
    assert visitor.ended
    start, end = (
        next(event for event in events if event["type"] == kind)
        for kind in ("message_start", "message_delta")
    )
    return {**start["message"], **end["delta"], "usage": end["usage"]}


@pytest_twisted.async_yield_fixture(scope="module")
async def scene(
    main_server: Running, small_server: Running, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Scene]:
    observer = Observer.before(main_server.port)
    tiers = {
        "main": {"url": observer.url, "slots": 1},
        "small": {"url": small_server.url, "slots": 2},
    }
    gateway = await deferToThread(start_gateway, tmp_path_factory.mktemp("burst"), tiers, HAIKU)
    yield Scene(gateway, observer, {"main": main_server, "small": small_server})
    await deferToThread(gateway.stop)
    await observer.stop()


def show(figures: str) -> None:
    print(f"\n{figures}")  # noqa: T201  # what pytest -s is for


# --- the burst ------------------------------------------------------------------------------------


async def test_a_burst_loses_nothing(scene: Scene) -> None:
    """37 haiku calls and 30 counts are answered while one long turn is still in its prefill."""
    asks = Asks("burst", Random(37))
    turn = asks.turn(0, words=2000)
    small = [asks.haiku(number) for number in range(37)]
    counts = [asks.count(number) for number in range(30)]
    begun = time.monotonic()
    visitors = await scene.visit_all([turn, *small, *counts])
    seconds = time.monotonic() - begun

    for ask, visitor in zip([turn, *small, *counts], visitors, strict=True):
        scene.assert_answered(ask, visitor)
    prefilled = visitors[0].came_at(b"message_delta")  # a few words later: it may have said none
    in_prefill = sum(visitor.ended_at < prefilled for visitor in visitors[1:38])
    show(
        f"burst: {len(visitors)} calls, {scene.observer.most_at_once()} at once on main,"
        f" {seconds:.1f} s, prefill of {prefilled - begun:.1f} s,"
        f" {in_prefill} of 37 small calls and"
        f" {sum(visitor.ended_at < prefilled for visitor in visitors[38:])} of 30 counts during it"
    )
    assert scene.observer.most_at_once() == 1
    assert in_prefill >= 5
    await until(scene.is_at_rest)


async def test_clients_that_leave_at_random_take_nobody_with_them(scene: Scene) -> None:
    """Of 40 mixed calls 8 clients leave; the others are answered, one at a time on main."""
    random = Random(40)
    asks = Asks("mixed", random)
    kinds = (asks.turn, asks.haiku, asks.title, asks.turn, asks.count)
    mixed = [kinds[number % len(kinds)](number) for number in range(40)]
    turns = [number for number, ask in enumerate(mixed) if ask.tier == "main" and not ask.counts]
    side = [number for number, ask in enumerate(mixed) if ask.tier == "small" and not ask.counts]
    leavers = [*random.sample(turns, 5), *random.sample(side, 3)]
    for number, mark in zip(leavers, cycle(MOMENTS), strict=False):
        mixed[number] = mixed[number].leaving(mark, random.uniform(0, 0.2))
    before = len(scene.observer.completions)
    begun = time.monotonic()
    visitors = await scene.visit_all(mixed)
    seconds = time.monotonic() - begun

    on_main = scene.observer.completions[before:]
    cut_off = sum(not exchange.is_whole for exchange in on_main)
    show(
        f"mixed: {len(visitors)} calls, {scene.observer.most_at_once()} at once on main,"
        f" {seconds:.1f} s, {sum(visitor.has_left for visitor in visitors)} clients left,"
        f" {len(on_main)} completions on main,"
        f" {cut_off} of them cut off"
    )
    for ask, visitor in zip(mixed, visitors, strict=True):
        if not visitor.has_left:
            scene.assert_answered(ask, visitor)
    assert sum(visitor.has_left for visitor in visitors) >= len(leavers) / 2
    assert scene.observer.most_at_once() == 1
    assert cut_off
    assert not scene.observer.too_early()
    await until(scene.is_at_rest)
