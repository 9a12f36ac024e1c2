"""How a llama-server is asked to save and restore a slot."""

from __future__ import annotations

from typing import Any

import attrs
import orjson
import pytest
from treq.testing import RequestTraversalAgent
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Request

from gateway.llama.client import SLOT_PATIENCE, LlamaClient, Moved
from gateway.upstream import PATIENCE
from gateway.wire.errors import ApiError

Json = Any


class Server(Resource):
    """One that answers when the test tells it to."""

    isLeaf = True

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[str, Json]] = []
        self.request: Request | None = None
        self.left = False

    def render(self, request: Request) -> int:
        assert request.content is not None
        self.asked.append((request.uri.decode(), orjson.loads(request.content.read())))
        self.request = request
        request.notifyFinish().addErrback(lambda _: setattr(self, "left", True))
        return NOT_DONE_YET

    def answer(self, said: Json, status: int = 200) -> None:
        assert self.request is not None
        self.request.setResponseCode(status)
        self.request.write(orjson.dumps(said))
        self.request.finish()


@attrs.define(eq=False)
class Asked:
    """A question under way."""

    deferred: Deferred[Any]
    results: list[Any] = attrs.field(factory=list)

    def __attrs_post_init__(self) -> None:
        self.deferred.addCallbacks(self.results.append, lambda why: self.results.append(why.value))


@attrs.define(eq=False)
class Place:
    """A client in front of a server, and the only clock that there is."""

    server: Server = attrs.field(factory=Server)
    clock: Clock = attrs.field(factory=Clock)
    agent: RequestTraversalAgent = attrs.field(init=False)
    client: LlamaClient = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.agent = RequestTraversalAgent(self.server)
        self.client = LlamaClient.over(self.clock, "main", "http://main", None, self.agent)

    def ask(self, name: str, *arguments: Any) -> Asked:
        found = Asked(Deferred.fromCoroutine(getattr(self.client, name)(*arguments)))
        self.settle()
        return found

    def settle(self) -> None:
        for _ in range(10):
            self.agent.flush()
            self.clock.advance(0)


@pytest.fixture
def place() -> Place:
    return Place()


SAVED = {
    "id_slot": 1,
    "filename": "a.part",
    "n_saved": 853,
    "n_written": 19_667_540,
    "timings": {"save_ms": 15.0},
}
RESTORED = {
    "id_slot": 1,
    "filename": "a.kv",
    "n_restored": 853,
    "n_read": 19_667_540,
    "timings": {"restore_ms": 5.0},
}
QUESTIONS = (("save_slot", 1, "a.part"), ("restore_slot", 1, "a.kv"))


def test_a_slot_is_saved(place: Place) -> None:
    """By its number and the name of a file; what the server says of it comes back."""
    asked = place.ask("save_slot", 1, "a.part")
    assert place.server.asked == [("/slots/1?action=save", {"filename": "a.part"})]
    place.server.answer(SAVED)
    place.settle()
    assert asked.results == [Moved(tokens=853, size=19_667_540, seconds=0.015)]


def test_a_slot_is_restored(place: Place) -> None:
    """Likewise."""
    asked = place.ask("restore_slot", 1, "a.kv")
    assert place.server.asked == [("/slots/1?action=restore", {"filename": "a.kv"})]
    place.server.answer(RESTORED)
    place.settle()
    assert asked.results == [Moved(tokens=853, size=19_667_540, seconds=0.005)]


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("said", [{}, [], None, 7, {"n_saved": 1, "timings": []}])
def test_what_is_no_answer_of_llama_server(
    place: Place, question: tuple[Any, ...], said: Json
) -> None:
    """Whatever it is, it is an error of ours that says so."""
    asked = place.ask(*question)
    place.server.answer(said)
    place.settle()
    (error,) = asked.results
    assert isinstance(error, ApiError)
    assert "is no llama-server" in error.message


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("status", [400, 500, 501, 503])
def test_a_server_that_refuses(place: Place, question: tuple[Any, ...], status: int) -> None:
    """Its reason comes with the error."""
    asked = place.ask(*question)
    said = {"code": status, "message": "Unable to do that", "type": "invalid_request_error"}
    place.server.answer({"error": said}, status)
    place.settle()
    (error,) = asked.results
    assert isinstance(error, ApiError)
    assert "Unable to do that" in error.message


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_slow_disk_is_waited_for(place: Place, question: tuple[Any, ...]) -> None:
    """Longer than a short question may take, but not for ever."""
    asked = place.ask(*question)
    place.clock.advance(PATIENCE * 2)
    place.settle()
    assert asked.results == []
    place.clock.advance(SLOT_PATIENCE)
    place.settle()
    (error,) = asked.results
    assert isinstance(error, ApiError)
    assert "within 600 seconds" in error.message
    assert place.server.left


@pytest.mark.parametrize("question", QUESTIONS)
def test_who_gives_up_hangs_up(place: Place, question: tuple[Any, ...]) -> None:
    """Cancelling it closes the connection."""
    asked = place.ask(*question)
    asked.deferred.cancel()
    place.settle()
    assert isinstance(asked.results[0], CancelledError)
    assert place.server.left
