"""
The order of a full line, and what it saves, on a real server.

A main session, two subagents and the main session's suggestions ask for one slot, thirty calls at
once, while another call holds it.  The server keeps nothing but what its slot holds, so each change
of conversation costs a whole prompt.  The same calls in order of arrival (``ageing = 0``) are what
it is compared with.  The figures are logged: ``pytest --log-cli-level=INFO`` shows them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Final

import attrs
import orjson
import pytest

from gateway.config import Tier
from tests.e2e.clients import eventually
from tests.e2e.stack import GLM_ORDER, SMOLLM, Running, start_gateway, start_server

Json = Any

figures = logging.getLogger(__name__)

pytestmark = pytest.mark.server

MAIN, ONE, TWO, SUGGESTION = "main", "agent 1", "agent 2", "suggestion"

#: In the order in which they ask, again and again; their ranks are in the same order.
WHO: Final = (MAIN, ONE, TWO, SUGGESTION)

#: What each conversation is about; a suggestion is asked for behind the main one.
TOPICS: Final = {
    MAIN: "the gates of the old city",
    ONE: "a harbour in winter",
    TWO: "how bread is baked in the hills",
    SUGGESTION: "the gates of the old city",
}

#: Seconds after which a call goes before all others, where nothing else is said.
AGEING: Final = Tier("http://127.0.0.1:1").ageing


# --- what is asked --------------------------------------------------------------------------------


@attrs.frozen
class Call:
    """
    One of the calls.

    Attributes:
        who: one of `WHO`.
        turn: how many turns its conversation has, from 1.
    """

    who: str
    turn: int

    @property
    def headers(self) -> dict[str, str]:
        """Those by which Claude Code says whose call it is."""
        agent = {} if self.who in (MAIN, SUGGESTION) else {"x-claude-code-agent-id": self.who}
        return {**agent, **claude_code("session")}

    @property
    def body(self) -> Json:
        """A prompt of one to three hundred tokens, longer with each turn."""
        topic = TOPICS[self.who]
        told = " ".join(f"Fact {number} is about {topic}." for number in range(1, 11))
        messages = [said("user", f"{topic.capitalize()} is what we talk about. {told}")]
        for turn in range(2, self.turn + 1):
            messages += [
                said("assistant", f"Answer {turn - 1}."),
                said("user", f"What is {turn}?"),
            ]
        if self.who == SUGGESTION:
            messages += [said("assistant", "So it is."), said("user", "[SUGGESTION MODE] Next?")]
        return short(messages)


def claude_code(session: str) -> dict[str, str]:
    return {"user-agent": "claude-cli/2.1.330 (external)", "x-claude-code-session-id": session}


def said(role: str, text: str) -> Json:
    return {"role": role, "content": text}


def short(messages: Sequence[Json]) -> Json:
    """A body that asks for a few tokens."""
    return {"model": "any", "max_tokens": 4, "stream": True, "messages": messages}


#: In the order in which they come.
ARRIVAL: Final = [
    Call(who, 1 + number // len(WHO)) for number, who in enumerate(islice(cycle(WHO), 30))
]

#: Persons, then subagents, each conversation at once, then what nobody waits for.
BY_RULE: Final = sorted(ARRIVAL, key=lambda call: WHO.index(call.who))

#: Holds the slot while the others come: a long prompt of somebody else, who leaves then.
HOLDER: Final = short([said("user", " ".join(f"Wait for number {n}." for n in range(600)))])


# --- how it is played -----------------------------------------------------------------------------


@attrs.frozen
class Played:
    """
    What became of the calls.

    Attributes:
        ran: the calls in the order in which they ran.
        records: what the ledger says of each, in the same order.
    """

    ran: Sequence[Call]
    records: Sequence[Json]

    @property
    def prompt(self) -> int:
        """Tokens of all prompts."""
        return sum(record["input"] + record["cached"] for record in self.records)

    @property
    def cached(self) -> int:
        """Those of them that were not evaluated."""
        return sum(record["cached"] for record in self.records)

    @property
    def share(self) -> float:
        return self.cached / self.prompt

    @property
    def longest_wait(self) -> float:
        return max(float(record["waited"]) for record in self.records)

    def show(self, what: str) -> None:
        took = sum(record["took"] for record in self.records)
        figures.info(
            "%s: %d of %d tokens cached (%.0f %%), %.1f s in the slot, longest wait %.1f s",
            *(what, self.cached, self.prompt, 100 * self.share, took, self.longest_wait),
        )
        for call, record in zip(self.ran, self.records, strict=True):
            shown = (call.who, call.turn, record["kind"], record["waited"], record["cached"])
            figures.info("%-10s %d %-10s waited %6.2f s, cached %3d of %3d", *shown, _all(record))


def _all(record: Json) -> int:
    return int(record["input"] + record["cached"])


def line(gateway: Running) -> Json:
    return gateway.ask("/status")[1]["tiers"]["main"]


def under_way(gateway: Running) -> Sequence[Json]:
    calls: Sequence[Json] = gateway.ask("/status")[1]["calls"]
    return calls


@contextmanager
def asking(gateway: Running, body: Json, headers: Mapping[str, str]) -> Iterator[HTTPConnection]:
    """A call that is sent; its answer may be read or not."""
    connection = HTTPConnection("127.0.0.1", gateway.port, timeout=300)
    try:
        connection.request("POST", "/v1/messages", orjson.dumps(body), dict(headers))
        yield connection
    finally:
        connection.close()


def ask(gateway: Running, call: Call) -> str:
    """The ``request-id`` of a call, once all of its answer is there."""
    with asking(gateway, call.body, call.headers) as connection:
        answer = connection.getresponse()
        raw = answer.read()
    assert answer.status == 200, raw
    assert b'"message_stop"' in raw, raw
    return str(answer.headers["request-id"])


@attrs.frozen
class Crowd:
    """Calls that wait while somebody else holds the slot."""

    gateway: Running
    _pool: ThreadPoolExecutor
    _asked: list[tuple[Call, Future[str]]] = attrs.field(factory=list, init=False)

    def send(self, call: Call) -> None:
        """Send a call, and wait until it waits behind all others."""
        self._asked.append((call, self._pool.submit(ask, self.gateway, call)))
        assert eventually(lambda: self.waits(len(self._asked)), 60, 0.01)

    def waits(self, calls: int) -> bool:
        now = line(self.gateway)
        assert now["running"] == 1, "the slot was free before all had come"
        return bool(now["waiting"] == calls)

    def played(self) -> Played:
        """What became of all of them."""
        calls = {future.result(): call for call, future in self._asked}
        last = self.gateway.ask("/status")[1]["last"]  # the newest first; there is one slot
        records = [record for record in reversed(last) if record["id"] in calls]
        assert [record["outcome"] for record in records] == ["answered"] * len(calls)
        return Played([calls[record["id"]] for record in records], records)


@contextmanager
def crowd(server: Running, folder: Path, **keys: float) -> Iterator[Crowd]:
    """A gateway whose main tier has these keys, and a crowd before it."""
    folder.mkdir()
    gateway = start_gateway(folder, {"main": {"url": server.url, "slots": 1, **keys}})
    try:
        with ThreadPoolExecutor(len(ARRIVAL)) as pool:
            yield Crowd(gateway, pool)
    finally:
        gateway.stop()


@contextmanager
def slot_held(gateway: Running) -> Iterator[None]:
    """Somebody else's call runs, until this is left."""
    with asking(gateway, HOLDER, claude_code("another session")):
        assert eventually(lambda: line(gateway)["running"] == 1, 60, 0.01)
        yield


def play(server: Running, folder: Path, **keys: float) -> Played:
    """All calls of `ARRIVAL` at once."""
    with crowd(server, folder, **keys) as calls:
        with slot_held(calls.gateway):
            for call in ARRIVAL:
                calls.send(call)
        return calls.played()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """SmolLM2 with one slot, which keeps nothing of a conversation that is not in it."""
    flags = (*SMOLLM, *GLM_ORDER, "--ctx-size", "8192", "--parallel", "1", "--batch-size", "256")
    keeps_nothing = ("--cache-ram", "0", "--slot-prompt-similarity", "0")
    running = start_server(tmp_path_factory.mktemp("server"), "server", *flags, *keeps_nothing)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def by_rule(server: Running, tmp_path_factory: pytest.TempPathFactory) -> Played:
    """The calls on a gateway as it comes."""
    played = play(server, tmp_path_factory.mktemp("order") / "by_rule")
    played.show("by the rules")
    return played


# --- what is shown --------------------------------------------------------------------------------


def test_the_order_is_that_of_the_rules(by_rule: Played) -> None:
    """Persons, then each subagent's calls at once, then suggestions; nobody waits too long."""
    assert by_rule.ran == BY_RULE
    assert by_rule.longest_wait < AGEING
    kinds = {
        call.who: record["kind"] for call, record in zip(BY_RULE, by_rule.records, strict=True)
    }
    assert kinds == {MAIN: "turn", ONE: "subagent", TWO: "subagent", SUGGESTION: "suggestion"}


def test_the_rules_save_prefill(server: Running, by_rule: Played, tmp_path: Path) -> None:
    """More of the same prompts is cached than in order of arrival."""
    arrival = play(server, tmp_path / "arrival", ageing=0)
    arrival.show("in order of arrival")
    assert arrival.ran == ARRIVAL
    assert arrival.prompt == by_rule.prompt
    assert by_rule.cached > arrival.cached


def test_who_waited_too_long_goes_first(server: Running, tmp_path: Path) -> None:
    """Calls that have waited longer than the bound go before a person's, the oldest first."""
    bound = 1.0
    old, young = [Call(SUGGESTION, 1), Call(ONE, 1)], [Call(MAIN, 1), Call(MAIN, 2)]
    with crowd(server, tmp_path / "aged", ageing=bound) as calls:
        with slot_held(calls.gateway):
            for call in old:
                calls.send(call)
            _, *waiting = (call["id"] for call in under_way(calls.gateway))
            assert eventually(lambda: have_waited(calls.gateway, waiting, bound), 60)
            for call in young:
                calls.send(call)
        aged = calls.played()
    aged.show(f"with a bound of {bound:.0f} s")
    assert aged.ran == old + young


def have_waited(gateway: Running, calls: Sequence[str], seconds: float) -> bool:
    """Whether these calls wait for longer than so many seconds."""
    waited = {call["id"]: call["waited"] for call in under_way(gateway)}
    return all(waited[call] > seconds for call in calls)
