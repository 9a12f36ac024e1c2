"""Asking a llama-server how it is; the server here is in memory."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
from treq.client import HTTPClient
from treq.testing import RequestTraversalAgent
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock

from gateway.llama.child import Health
from gateway.llama.client import LlamaClient
from tests.house import FakeLlama


@attrs.define(eq=False)
class Scene:
    """A server, and what its client was told of its health."""

    server: FakeLlama = attrs.field(factory=FakeLlama)
    clock: Clock = attrs.field(factory=Clock)
    said: list[Any] = attrs.field(factory=list)

    def ask(self) -> Deferred[Any]:
        agent = RequestTraversalAgent(self.server)
        client = LlamaClient.over(self.clock, "main", "http://main", None, HTTPClient(agent))
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


def test_a_question_that_is_not_wanted_any_more_is_cancelled() -> None:
    """Nothing is left on the clock, and no health is made up."""
    scene = Scene()
    scene.server.hangs.add("/health")
    scene.ask().cancel()
    assert scene.said == [CancelledError]
    assert scene.clock.getDelayedCalls() == []
