"""A gateway whose tiers are servers elsewhere; these are in memory, and answer as they are told."""

from __future__ import annotations

from typing import Any, ClassVar

import attrs
import orjson
from treq.testing import RequestTraversalAgent
from twisted.internet.task import Clock
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Request

from gateway.config import Tier as TierConfig
from gateway.dispatch import Dispatch
from gateway.ledger import Ledger
from gateway.remote.anthropic import Anthropic
from gateway.remote.openai import OpenAI
from gateway.tier.tier import Tier
from gateway.upstream import Remote
from gateway.web.access import Access
from gateway.web.api import Api
from gateway.web.connections import site
from gateway.wire.pulse import Times
from tests.house import Held, Household

Json = Any


class Elsewhere(Resource):
    """A server of either API: it lists `models`, counts what `counts` says, and holds the rest."""

    isLeaf = True

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[str, Any, dict[str, str]]] = []
        self.held: list[Held] = []
        self.models: Json = [{"id": "theirs", "max_model_len": 5000}]
        self.counts: dict[str, Json] = {}
        self.retry_after: bytes | None = None
        self.gone = False

    def render(self, request: Request) -> Any:
        assert request.content is not None
        raw = request.content.read()
        path = request.uri.decode()
        headers = {
            name.decode().lower(): ", ".join(value.decode() for value in values)
            for name, values in request.requestHeaders.getAllRawHeaders()
        }
        body = orjson.loads(raw) if raw else None
        self.asked.append((path, body, headers))
        request.setHeader("set-cookie", "theirs=1; Path=/")
        if self.gone:
            request.channel.transport.abortConnection()  # type: ignore[union-attr]
            return NOT_DONE_YET
        if path.endswith("/v1/models"):
            if isinstance(self.models, int) and self.models >= 200:
                request.setResponseCode(self.models)
                if self.retry_after is not None:
                    request.setHeader(b"retry-after", self.retry_after)
                return b"{}"
            return orjson.dumps({"data": self.models})
        if path in self.counts:
            return orjson.dumps(self.counts[path])
        if path.endswith(("/v1/messages", "/v1/chat/completions")):
            held = Held(body or {}, request)
            self.held.append(held)
            request.notifyFinish().addErrback(lambda _: setattr(held, "left", True))
            return NOT_DONE_YET
        request.setResponseCode(404)
        return b'{"detail": "Not Found"}'

    def sent(self, path: str) -> list[tuple[Any, dict[str, str]]]:
        """Body and headers of each request for `path`."""
        return [(body, headers) for asked, body, headers in self.asked if asked == path]


@attrs.define(eq=False)
class Scene:
    """
    A gateway in front of one.

    Attributes:
        open: those that a test has made; conftest.py stops them.
    """

    house: Household
    there: Elsewhere
    open: ClassVar[list[Scene]] = []

    @classmethod
    def of(cls, kind: str, url: str = "http://there.example/prefix", **keys: Any) -> Scene:
        """One whose main tier has these further keys."""
        clock, there = Clock(), Elsewhere()
        agent = RequestTraversalAgent(there)
        config = TierConfig(url, kind, **keys)
        remote = Anthropic if kind == "anthropic" else OpenAI
        client: Remote = remote.over(clock, agent, "main", config)
        tier = Tier.of("main", config, client, clock)
        tier.start()
        dispatch = Dispatch({"main": tier}, (), Ledger(clock), Times(), clock)
        api = Api(dispatch, "0")
        door = site(api.app.resource(), Access(None, (), 1 << 20), clock)
        nobody: Any = None
        scene = cls(Household(clock, nobody, nobody, api, door, [agent]), there)
        cls.open.append(scene)
        return scene

    @property
    def tier(self) -> Tier:
        return self.house.api.dispatch.tiers["main"]
