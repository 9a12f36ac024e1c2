"""Asking a llama-server how it is; the server here is in memory."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

import attrs
import pytest
from treq.testing import RequestTraversalAgent
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock

from gateway.llama.client import LlamaClient
from gateway.policy import grammar
from gateway.policy.schema import read
from gateway.upstream import Health, Lost
from gateway.wire.errors import Unavailable
from tests.house import HELLO, FakeLlama


@attrs.define(eq=False)
class Scene:
    """A server, and what its client was told of its health."""

    server: FakeLlama = attrs.field(factory=FakeLlama)
    clock: Clock = attrs.field(factory=Clock)
    said: list[Any] = attrs.field(factory=list)

    def ask(self) -> Deferred[Any]:
        agent = RequestTraversalAgent(self.server)
        client = LlamaClient.over(self.clock, "main", "http://main", None, agent)
        asking = Deferred.fromCoroutine(client.health())
        asking.addCallbacks(self.said.append, lambda failure: self.said.append(failure.type))
        agent.flush()
        return asking


@pytest.mark.parametrize(
    ("status", "health"),
    [
        (200, Health.READY),
        (503, Health.LOADING),
        (None, Health.DOWN),
        (401, Health.DOWN),
        (500, Health.DOWN),
    ],
)
def test_health_is_what_the_status_says(status: int | None, health: Health) -> None:
    """200 and 503 are llama-server's; whoever says something else is none."""
    scene = Scene()
    scene.server.status = status
    scene.ask()
    assert scene.said == [health]
    assert scene.server.paths() == ["/health"]
    assert scene.clock.getDelayedCalls() == []


def test_a_server_that_does_not_answer_is_down() -> None:
    """It is not waited for longer than 10 seconds."""
    scene = Scene()
    scene.server.hangs.add("/health")
    scene.ask()
    scene.clock.advance(9.9)
    assert scene.said == []
    scene.clock.advance(0.2)
    assert scene.said == [Health.DOWN]


@pytest.mark.parametrize("begun", [False, True])
def test_the_loss_of_a_server_is_told_in_words(*, begun: bool) -> None:
    """The log shows them to people, who need no list of Python's objects."""
    server = FakeLlama()
    agent = RequestTraversalAgent(server)
    client = LlamaClient.over(Clock(), "main", "http://main", None, agent)

    async def ask() -> None:
        answer = await client.messages({})
        await answer.stream(lambda _: None)

    said: list[Any] = []
    Deferred.fromCoroutine(ask()).addErrback(said.append)
    agent.flush()
    if begun:
        server.held[0].begin()
        agent.flush()
    server.held[0].die()
    agent.flush()
    assert said[0].check(Lost)
    assert said[0].getErrorMessage().startswith("Connection was closed cleanly")


def test_a_question_that_is_not_wanted_any_more_is_cancelled() -> None:
    """Nothing is left on the clock, and no health is made up."""
    scene = Scene()
    scene.server.hangs.add("/health")
    scene.ask().cancel()
    assert scene.said == [CancelledError]
    assert scene.clock.getDelayedCalls() == []


# --- an answer under a schema ---------------------------------------------------------------------


def test_a_rendered_prompt_is_asked_under_a_grammar() -> None:
    """That of its form, for so many characters; nothing else ends the answer."""
    scene = Asked()
    scene.server.completions = ['{"ok": true}']
    form = read({"properties": {"ok": {"type": "boolean"}}, "required": ["ok"]})
    body = {"messages": [{"role": "user", "content": "Hi"}], "temperature": 0, "stop": ["}"]}
    scene.ask(scene.client.held(body, form, 200, 100))
    assert [each.text for each in scene.came] == ['{"ok": true}']
    assert dict(scene.server.asked)["/completion"] == {
        "prompt": scene.server.prompt_of(body),
        "grammar": grammar.write(form.shape, 200),
        "n_predict": 100,
        "cache_prompt": True,
        "stop": [],
        "temperature": 0,
    }


# --- a server that is about to be ended -----------------------------------------------------------


@attrs.define(eq=False)
class Asked:
    """A client in front of a server in memory, and what its questions came to."""

    server: FakeLlama = attrs.field(factory=FakeLlama)
    clock: Clock = attrs.field(factory=Clock)
    came: list[Any] = attrs.field(factory=list)
    received: list[bytes] = attrs.field(factory=list)
    client: LlamaClient = attrs.field(init=False)
    _agent: Any = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._agent = RequestTraversalAgent(self.server)
        self.client = LlamaClient.over(self.clock, "main", "http://main", None, self._agent)

    def ask(self, question: Coroutine[Deferred[Any], Any, Any]) -> Deferred[Any]:
        asking = Deferred.fromCoroutine(question)
        asking.addCallbacks(self.came.append, lambda failure: self.came.append(failure.value))
        self.settle()
        return asking

    async def stream(self) -> None:
        """A call that is read to its end."""
        answer = await self.client.messages({"messages": []})
        await answer.stream(self.received.append)

    def settle(self) -> None:
        for _ in range(5):
            self._agent.flush()

    def hang_up(self) -> None:
        self.client.hang_up()
        self.settle()


def test_who_waits_for_a_status_loses_the_server() -> None:
    """A call that has no status yet fails as if the server had gone, and the server sees it."""
    asked = Asked()
    asked.ask(asked.stream())
    asked.hang_up()
    (lost,) = asked.came
    assert isinstance(lost, Lost)
    assert asked.server.held[0].left


def test_who_reads_an_answer_loses_the_server() -> None:
    """What had come stays; the rest does not come, and the server sees it."""
    asked = Asked()
    asked.ask(asked.stream())
    asked.server.held[0].begin()
    asked.server.held[0].send(*HELLO[:3])
    asked.settle()
    assert asked.received
    asked.hang_up()
    (lost,) = asked.came
    assert isinstance(lost, Lost)
    assert asked.server.held[0].left


def test_a_short_question_becomes_a_server_that_is_not_there() -> None:
    """It is to be asked again once another server is there."""
    asked = Asked()
    asked.server.hangs.add("/slots")
    asked.ask(asked.client.slots())
    asked.hang_up()
    (error,) = asked.came
    assert isinstance(error, Unavailable)
    assert asked.clock.getDelayedCalls() == []


def test_who_leaves_is_not_told_that_the_server_is_gone() -> None:
    """A cancellation stays one, whether or not the client is hung up afterwards."""
    asked = Asked()
    asking = asked.ask(asked.stream())
    asking.cancel()
    asked.hang_up()
    (cancelled,) = asked.came
    assert isinstance(cancelled, CancelledError)


def test_nothing_of_a_hang_up_stays() -> None:
    """The next call is one like any other, and hanging up on nobody does nothing."""
    asked = Asked()
    asked.ask(asked.stream())
    asked.hang_up()
    asked.hang_up()
    asked.came.clear()
    asked.ask(asked.stream())
    asked.server.held[1].answer()
    asked.settle()
    asked.hang_up()
    assert asked.came == [None]
    assert b"message_stop" in b"".join(asked.received)
