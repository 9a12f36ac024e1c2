"""What is the same for every server elsewhere: where it is, what it says of itself, its key."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final, Self

import attrs
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.web.iweb import IAgent

from gateway.config import Tier as Wanted
from gateway.config import base_of
from gateway.policy.template import Template
from gateway.remote import refusals
from gateway.upstream import Answer, Health, Props, Upstream
from gateway.wire.errors import ApiError, Unavailable, down

Json = Any

#: Tokens of a window that neither the configuration nor the server says.
UNSAID: Final = 200_000

#: Tokens of an answer that neither the client nor the server bounds.
UNBOUNDED: Final = 8192

#: What the Messages API insists on; a client's own version goes before it.
_VERSION: Final = "2023-06-01"

#: Where servers say how long their context is.
_WINDOW: Final = (
    "max_input_tokens",
    "max_model_len",
    "context_length",
    "context_window",
    "max_context_length",
    "n_ctx",
)

#: Where servers of the Messages API say how long an answer may be.
_ANSWER: Final = ("max_tokens",)

log = Logger()


@attrs.define(eq=False)
class Place:
    """
    One server elsewhere.

    Attributes:
        tier: the name of its tier.
        config: the tier's part of the configuration.
        upstream: asks it.
    """

    tier: str
    config: Wanted
    upstream: Upstream
    _seconds: Callable[[], float]
    _told: bool = attrs.field(default=False, init=False)

    @classmethod
    def over(cls, reactor: IReactorTime, agent: IAgent, tier: str, config: Wanted) -> Self:
        """The server that `config` names, asked over `agent`."""
        headers: dict[str, str] = {}
        if (key := config.key) is not None:
            bearer = {"authorization": f"Bearer {key}"}
            headers = bearer if config.shows_bearer else {"x-api-key": key}
        if config.kind == "anthropic":
            headers["anthropic-version"] = _VERSION
        base = base_of(config.url)
        refusal = partial(_refusal, tier)
        return cls(
            tier,
            config,
            Upstream.over(reactor, agent, tier, config.url, refusal, headers, base),
            reactor.seconds,
        )

    def hang_up(self) -> None:
        """Nobody waits for its answers any more."""
        self.upstream.hang_up()

    async def busy_slots(self) -> int:
        """Nobody can know; a call that was hung up on is over for us."""
        return 0

    async def props(self) -> Props:
        """
        What is known of it, from ``GET /v1/models`` and the configuration.

        Raises:
            ApiError: it cannot be reached, loads, or refuses the gateway's key.
        """
        model = listed(await self._models(), self.config.model)
        window = self.config.window or _number(model, _WINDOW)
        if window is None:
            window = UNSAID
            if not self._told:
                self._told = True
                log.warn(
                    "tier {tier}: its server does not say how long its context is; {window} tokens"
                    " are assumed: set window in [tier.{tier}]",
                    tier=self.tier,
                    window=window,
                )
        name = self.config.model or str(model.get("id") or "any model")
        answer = None
        if self.config.kind == "anthropic":
            answer = _number(model, _ANSWER) or UNBOUNDED
        kind, sees = self.config.kind, Template(vision=True)
        return Props(window, self.config.slots, name, kind, sees, answer=answer)

    async def _models(self) -> Json:
        answer, body = await self.upstream.fetch("GET", "/v1/models")
        if answer.status == 200:
            return self.upstream.parsed(answer, body)
        refusal = self.upstream.refusal(answer, body)
        if isinstance(refusal, Unavailable) or answer.status in (401, 403):
            raise refusal
        return {}  # it has no such list, or none for us now

    async def health(self) -> Health:
        """How it is; cancelling it hangs up."""
        said = await self.upstream.status("/v1/models")
        if said is None:
            return Health.DOWN
        return Health.LOADING if said == 503 else Health.READY

    async def send(
        self, path: str, body: Mapping[str, Json], headers: Mapping[str, str] | None = None
    ) -> Answer:
        """
        Ask for a stream.

        Raises:
            ApiError: it cannot be reached, refuses, or answers with no stream.
            Lost: it went away before it answered.
        """
        answer = await self.upstream.request("POST", path, body, headers)
        if answer.status != 200:
            refusal = self.upstream.refusal(answer, await answer.read())
            # It is there, as its list of models shows: whoever asks again at once asks in vain.
            raise down(refusal.message) if isinstance(refusal, Unavailable) else refusal
        if not answer.header("content-type").startswith("text/event-stream"):
            await answer.read()
            raise ApiError(
                "api_error",
                f"The server of tier {self.tier!r} answers without a stream; it has to have one.",
                status=502,
                should_retry=False,
            )
        theirs = answer.header("request-id") or answer.header("x-request-id")
        if theirs:
            log.debug("tier {tier}: its server calls this {id}", tier=self.tier, id=theirs[:100])
        return answer

    async def count(
        self,
        path: str,
        body: Mapping[str, Json],
        key: str,
        headers: Mapping[str, str] | None = None,
    ) -> int | None:
        """The number that `key` has in an answer; None where there is no such endpoint."""
        answer, raw = await self.upstream.fetch("POST", path, body, headers=headers)
        if answer.status in (404, 405, 501):
            return None
        said = self.upstream.parsed(answer, raw)
        found = said.get(key) if isinstance(said, dict) else None
        return found if isinstance(found, int) else None


def _refusal(tier: str, answer: Answer, body: bytes) -> ApiError:
    return refusals.read(answer.status, body, answer.header, tier)


def listed(said: Json, wanted: str | None) -> Mapping[str, Json]:
    """What a list of models says of the one that is wanted, or of the first."""
    listed = said.get("data") if isinstance(said, dict) else None
    models = [each for each in listed if isinstance(each, dict)] if isinstance(listed, list) else []
    named = [each for each in models if each.get("id") == wanted]
    found = named or ([] if wanted else models)
    return found[0] if found else {}


def _number(model: Mapping[str, Json], keys: Sequence[str]) -> int | None:
    places = (model, model.get("meta") or {})
    said = (each.get(key) for each in places if isinstance(each, dict) for key in keys)
    return next((each for each in said if type(each) is int and each > 0), None)
