"""
A server of the Messages API: another claudegw, vLLM, Ollama, LM Studio, a cloud.

It gets what the client sent, ``cache_control``, system prompt and betas included; only the model's
name may be another, and the answer is always asked for as a stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import attrs
from treq.client import HTTPClient
from twisted.internet.interfaces import IReactorTime

from gateway.config import Tier as Wanted
from gateway.remote.headers import passed_on
from gateway.remote.place import Place
from gateway.upstream import Answer, Health, Props
from gateway.wire.request import MessagesRequest

Json = Any


@attrs.define(eq=False)
class Anthropic:
    """One such server (`gateway.upstream.Remote`)."""

    _place: Place
    is_verbatim: bool = True

    @classmethod
    def over(cls, reactor: IReactorTime, http: HTTPClient, tier: str, config: Wanted) -> Self:
        """The one that `config` names, asked over `http`."""
        return cls(Place.over(reactor, http, tier, config))

    def hang_up(self) -> None:
        self._place.upstream.hang_up()

    async def props(self) -> Props:
        return await self._place.props()

    async def health(self) -> Health:
        return await self._place.health()

    async def busy_slots(self) -> int:
        """Nobody can know; a call that was hung up on is over for us."""
        return 0

    def prepare(self, request: MessagesRequest) -> dict[str, Json]:
        body = dict(request.body)
        if self._place.config.model:
            body["model"] = self._place.config.model
        return body

    async def count_body(self, body: Mapping[str, Json]) -> int | None:
        asked = {name: body[name] for name in body if name not in ("max_tokens", "stream")}
        return await self._place.count("/v1/messages/count_tokens", asked, "input_tokens")

    async def messages(
        self, body: Mapping[str, Json], headers: Mapping[str, str] | None = None
    ) -> Answer:
        asked = {**body, "stream": True}
        return await self._place.send("/v1/messages", asked, passed_on(headers or {}))
