"""
Every endpoint of a llama-server that we use.

Each call opens a connection of its own: llama-server closes idle ones after 5 s and each one after
a stream, and a fresh one on loopback costs 0.2 ms.  Each Deferred that is awaited here hangs up on
llama-server when it is cancelled; that is how a client's leaving stops the work
(docs/protocol.md, "Cancellation").
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from hashlib import blake2b
from typing import Any, Final, Protocol, cast

import attrs
import orjson
from hyperlink import EncodedURL
from treq.client import HTTPClient
from twisted.internet.defer import CancelledError, Deferred, succeed
from twisted.internet.defer import TimeoutError as TimedOut
from twisted.internet.endpoints import clientFromString
from twisted.internet.error import (
    ConnectError,
    ConnectingCancelledError,
    ConnectionClosed,
    DNSLookupError,
)
from twisted.internet.interfaces import (
    IConsumer,
    IPushProducer,
    IReactorTime,
    IStreamClientEndpoint,
)
from twisted.internet.protocol import Protocol as Receiver
from twisted.python.failure import Failure
from twisted.web.client import (
    Agent,
    HTTPConnectionPool,
    RequestGenerationFailed,
    RequestTransmissionFailed,
    ResponseDone,
    ResponseFailed,
    ResponseNeverReceived,
    _HTTP11ClientFactory,
)
from twisted.web.http import PotentialDataLoss
from twisted.web.http_headers import Headers
from twisted.web.iweb import IAgentEndpointFactory, IBodyProducer, IResponse
from zope.interface import implementer

from gateway.config import upstream_endpoint
from gateway.llama.child import Health
from gateway.policy.template import Template
from gateway.wire import bare
from gateway.wire.errors import ApiError, from_upstream, unavailable
from gateway.wire.sse import SSEEvent, SSEParser

Json = Any

#: Seconds that a short question (a count, the slots) may take.
PATIENCE: Final = 60.0

#: The same for the question how it is, which a thread of its own answers.
_HEALTH_PATIENCE: Final = 10.0

#: Seconds that the saving or restoring of a slot may take; a state may have tens of gigabytes.
SLOT_PATIENCE: Final = 600.0

#: Bytes that an answer to a short question may have; a template rendered is the longest.
_LONGEST_ANSWER: Final = 64 * 1024 * 1024

# Twisted would log the start and the end of each connection.
_HTTP11ClientFactory.noisy = False


class Lost(Exception):
    """The server went away after it had begun to answer."""


@attrs.frozen
class Props:
    """
    What a server says of itself (``GET /props``).

    Attributes:
        n_ctx: tokens that one slot holds, prompt and answer together.
        slots: how many calls it takes at once.
        alias: the name that it gives its model.
        build: its build; ``b0-unknown`` where it does not know.
        template: what its chat template can be told.
        template_digest: of the template's text.
        model_path: the model's file, as the server names it.
    """

    n_ctx: int
    slots: int
    alias: str
    build: str
    template: Template
    template_digest: str = ""
    model_path: str = ""


@attrs.frozen
class Completion:
    """
    One answer to a bare prompt.

    Attributes:
        text: what was generated.
        stopped: why: ``eos``, ``word`` or ``limit``.
        evaluated: prompt tokens that were evaluated.
        cached: prompt tokens that the slot still had.
        generated: tokens generated.
        prefill: seconds that the evaluation of the prompt took.
        generation: seconds that the generation took.
    """

    text: str
    stopped: str
    evaluated: int
    cached: int
    generated: int
    prefill: float = 0.0
    generation: float = 0.0


@attrs.frozen
class Moved:
    """
    A slot's state that was saved or restored.

    Attributes:
        tokens: that it holds; 0 for a slot that held none.
        size: bytes of its file.
        seconds: what it took the server.
    """

    tokens: int
    size: int
    seconds: float


class Parser(Protocol):
    """What makes a Messages stream of an upstream's bytes."""

    def feed(self, chunk: bytes) -> list[SSEEvent]:
        """The events that `chunk` completes, in order; raises `EventTooLong`."""


@implementer(IBodyProducer)
@attrs.frozen
class _BytesBody:
    """A request body that is all there."""

    body: bytes

    @property
    def length(self) -> int:
        return len(self.body)

    def startProducing(self, consumer: IConsumer) -> Deferred[None]:
        consumer.write(self.body)
        return succeed(None)

    def pauseProducing(self) -> None: ...

    def resumeProducing(self) -> None: ...

    def stopProducing(self) -> None: ...


_DONE: Final = Failure(ResponseDone())


@attrs.define(eq=False)
class _Reading(Receiver):
    """
    Hands a response's body on as it comes.  Cancelling `done` hangs up.

    `receive` may raise: the server is hung up on and `done` fails with what was raised.
    """

    receive: Callable[[bytes], None]
    meet: Callable[[IPushProducer], None]
    beside: set[_Reading]
    done: Deferred[None] | None = None

    def start(self, response: IResponse) -> Deferred[None]:
        # deliverBody may finish before it returns, so the Deferred is taken first.
        done = self.done = Deferred(self._hang_up)
        self.beside.add(self)
        response.deliverBody(self)
        return done

    def lose(self, why: str) -> None:
        """Hang up, as if the server had gone."""
        self._fail(Failure(Lost(why)))

    def _hang_up(self, _: object) -> None:
        self.done = None
        self._close()

    def _fail(self, failure: Failure) -> None:
        done, self.done = self.done, None
        self._close()
        if done is not None:
            done.errback(failure)

    def _close(self) -> None:
        self.beside.discard(self)
        if self.transport is not None:
            self.transport.loseConnection()

    def connectionMade(self) -> None:
        # What stands beneath a response's body is no whole transport, but it is a producer.
        self.meet(cast("IPushProducer", self.transport))

    def dataReceived(self, data: bytes) -> None:
        if self.done is None:
            return
        try:
            self.receive(data)
        except Exception:  # noqa: BLE001  # whatever it is, who awaits `done` gets it
            self._fail(Failure())

    def connectionLost(self, reason: Failure = _DONE) -> None:
        self.beside.discard(self)
        done, self.done = self.done, None
        if done is None:
            return
        if reason.check(ResponseDone, PotentialDataLoss):
            done.callback(None)
        else:
            done.errback(Failure(Lost(_in_words(reason.value))))


@attrs.frozen(eq=False)
class Answer:
    """
    An answer whose status is known and whose body is still to come.

    Attributes:
        response: as Twisted has it.
        parser: reads its body, where that is a stream.
    """

    response: IResponse
    _read: set[_Reading] = attrs.field(factory=set)
    parser: Parser = attrs.field(factory=SSEParser)

    @property
    def status(self) -> int:
        return int(self.response.code)

    def stream(
        self,
        receive: Callable[[bytes], None],
        meet: Callable[[IPushProducer], None] = lambda _: None,
    ) -> Deferred[None]:
        """
        Hand the body to `receive` as it comes.

        Args:
            receive: gets each chunk; what it raises ends the stream.
            meet: gets the producer, for back-pressure.

        Returns:
            A Deferred that fires at the body's end and hangs up when it is cancelled.  It fails
            with `Lost`, or with what `receive` raised.
        """
        return _Reading(receive, meet, self._read).start(self.response)

    async def read(self, limit: int = _LONGEST_ANSWER) -> bytes:
        """The whole body; raises ApiError if it has more than `limit` bytes, or `Lost`."""
        chunks: list[bytes] = []
        room = limit

        def receive(chunk: bytes) -> None:
            nonlocal room
            room -= len(chunk)
            if room < 0:
                raise ApiError("api_error", f"The model server sent more than {limit} bytes.")
            chunks.append(chunk)

        await self.stream(receive)
        return b"".join(chunks)


@attrs.define(eq=False)
class LlamaClient:
    """
    One llama-server, asked.

    Attributes:
        tier: the name of its tier, for the wording of errors.
        url: where it listens, as in the configuration.
    """

    tier: str
    url: str
    _reactor: IReactorTime
    _http: HTTPClient
    _headers: Headers
    _awaited: set[Deferred[Any]] = attrs.field(factory=set, init=False)
    _read: set[_Reading] = attrs.field(factory=set, init=False)

    @classmethod
    def at(cls, reactor: Any, tier: str, url: str, api_key: str | None) -> LlamaClient:
        """The client of the server at `url`."""
        endpoint = clientFromString(reactor, upstream_endpoint(url))
        pool = HTTPConnectionPool(reactor, persistent=False)
        agent = Agent.usingEndpointFactory(reactor, _Always(endpoint), pool)
        return cls.over(reactor, tier, url, api_key, HTTPClient(agent))

    @classmethod
    def over(
        cls, reactor: IReactorTime, tier: str, url: str, api_key: str | None, http: HTTPClient
    ) -> LlamaClient:
        """As `at`, over an HTTP client that is there already."""
        headers = Headers({"content-type": ["application/json"]})
        if api_key is not None:
            headers.addRawHeader("authorization", f"Bearer {api_key}")
        return cls(tier, url, reactor, http, headers)

    def hang_up(self) -> None:
        """The server will not answer any more: what waits for an answer fails with `Lost`."""
        awaited, self._awaited = self._awaited, set()
        for request in awaited:
            request.cancel()
        for reading in list(self._read):
            reading.lose("The server is being stopped.")

    async def props(self) -> Props:
        """What the server says of itself.  Raises ApiError while it is down or loading."""
        said = await self._ask("GET", "/props")
        try:
            text = str(said.get("chat_template") or "")
            return Props(
                n_ctx=int(said["default_generation_settings"]["n_ctx"]),
                slots=int(said["total_slots"]),
                alias=str(said.get("model_alias") or said.get("model_path") or ""),
                build=str(said.get("build_info", "")),
                template=Template.of(text, vision=bool(said.get("modalities", {}).get("vision"))),
                template_digest=blake2b(text.encode(), digest_size=16).hexdigest(),
                model_path=str(said.get("model_path") or ""),
            )
        except (KeyError, TypeError, ValueError, AttributeError):
            raise self._no_llama() from None

    async def health(self) -> Health:
        """How the server is (``GET /health``); cancelling it hangs up."""

        async def status() -> int:
            answer = await self._request("GET", "/health")
            await answer.read()
            return answer.status

        asked = Deferred.fromCoroutine(status())
        asked.addTimeout(_HEALTH_PATIENCE, self._reactor)
        try:
            said = await asked
        except (ApiError, Lost, TimedOut):
            return Health.DOWN
        return {200: Health.READY, 503: Health.LOADING}.get(said, Health.DOWN)

    async def busy_slots(self) -> int:
        """
        How many slots work.

        Ask at most every 2 s: each answer restarts the second after which llama-server looks
        whether the clients of its other calls are still there.
        """
        try:
            return sum(bool(slot["is_processing"]) for slot in await self.slots())
        except (KeyError, TypeError):
            raise self._no_llama() from None

    async def slots(self) -> Sequence[Mapping[str, Json]]:
        """What ``GET /slots`` says of each slot; ask as seldom as for `busy_slots`."""
        said = await self._ask("GET", "/slots")
        if not isinstance(said, list):
            raise self._no_llama()
        return said

    async def apply_template(self, chat: Mapping[str, Json]) -> str:
        """The prompt that a chat-shaped body renders to."""
        said = await self._ask("POST", "/apply-template", chat)
        return str(said["prompt"])

    async def count(self, prompt: str) -> int:
        """The tokens of a rendered prompt, tokenized as a completion's prompt is."""
        wanted = {"content": prompt, "add_special": True, "parse_special": True}
        return len((await self._ask("POST", "/tokenize", wanted))["tokens"])

    async def count_tokens(self, body: Mapping[str, Json]) -> int:
        """The server's own count of a Messages-shaped body."""
        said = await self._ask("POST", "/v1/messages/count_tokens", body)
        return int(said["input_tokens"])

    async def messages(self, body: Mapping[str, Json]) -> Answer:
        """
        Send a call, to be streamed: a Messages call, or a bare prompt (`gateway.wire.bare`).

        Raises:
            ApiError: the server cannot be reached, or refuses.
            Lost: it went away before it answered.
        """
        if bare.is_meant(body):
            answer = await self._streamed("/completion", bare.completion(body))
            return attrs.evolve(answer, parser=bare.Continuation())
        return await self._streamed("/v1/messages", body)

    async def embeddings(self, body: Mapping[str, Json]) -> dict[str, Json]:
        """What the server says to a body of ``/v1/embeddings``; raises as `messages` does."""
        said = await self._json(await self._request("POST", "/v1/embeddings", body))
        if not isinstance(said, dict):
            raise self._no_llama()
        return said

    async def complete(self, wanted: Mapping[str, Json]) -> Completion:
        """The answer to a bare prompt (``POST /completion``, not streamed)."""
        answer = await self._request("POST", "/completion", wanted)
        said = await self._json(answer)
        timings = said.get("timings", {})
        return Completion(
            text=str(said["content"]),
            stopped=str(said.get("stop_type", "")),
            evaluated=int(timings.get("prompt_n", said.get("tokens_evaluated", 0))),
            cached=int(timings.get("cache_n", 0)),
            generated=int(said.get("tokens_predicted", 0)),
            prefill=float(timings.get("prompt_ms", 0)) / 1000,
            generation=float(timings.get("predicted_ms", 0)) / 1000,
        )

    async def save_slot(self, slot: int, filename: str) -> Moved:
        """
        Write a slot's state to a file in the server's ``--slot-save-path``.

        A slot that works is saved when it is done, and the server answers nobody else meanwhile:
        hold its permit.  Cancelling this hangs up; the server writes on.  Raises ApiError: 501
        without a folder, 400 for a name with separators.
        """
        said = await self._slot(slot, "save", {"filename": filename})
        try:
            seconds = float(said["timings"]["save_ms"]) / 1000
            return Moved(int(said["n_saved"]), int(said["n_written"]), seconds)
        except (KeyError, TypeError, ValueError):
            raise self._no_llama() from None

    async def restore_slot(self, slot: int, filename: str) -> Moved:
        """
        Read a slot's state from a file that `save_slot` wrote; hold its permit, likewise.

        Raises ApiError (400) where the server cannot read the file; the slot is empty then.
        """
        said = await self._slot(slot, "restore", {"filename": filename})
        try:
            seconds = float(said["timings"]["restore_ms"]) / 1000
            return Moved(int(said["n_restored"]), int(said["n_read"]), seconds)
        except (KeyError, TypeError, ValueError):
            raise self._no_llama() from None

    async def _slot(self, slot: int, action: str, wanted: Mapping[str, Json]) -> Json:
        path = f"/slots/{slot}?action={action}"
        return await self._ask("POST", path, wanted, patience=SLOT_PATIENCE)

    # --- how it is asked --------------------------------------------------------------------------

    async def _ask(
        self, method: str, path: str, body: Json = None, patience: float = PATIENCE
    ) -> Json:
        """The JSON answer to a question, within so many seconds."""

        async def ask() -> Json:
            return await self._json(await self._request(method, path, body))

        asked = Deferred.fromCoroutine(ask())
        asked.addTimeout(patience, self._reactor)
        try:
            return await asked
        except TimedOut:
            raise unavailable(
                f"The model server of tier {self.tier!r} did not answer {path}"
                f" within {patience:.0f} seconds."
            ) from None
        except Lost:
            raise self._gone() from None

    async def _streamed(self, path: str, body: Mapping[str, Json]) -> Answer:
        answer = await self._request("POST", path, {**body, "stream": True})
        if answer.status != 200:
            raise from_upstream(answer.status, await answer.read(), self.tier)
        return answer

    async def _json(self, answer: Answer) -> Json:
        body = await answer.read()
        if answer.status != 200:
            raise from_upstream(answer.status, body, self.tier)
        try:
            return orjson.loads(body)
        except ValueError:
            raise ApiError(
                "api_error", f"What listens at {self.url} (tier {self.tier!r}) does not speak JSON."
            ) from None

    async def _request(self, method: str, path: str, body: Json = None) -> Answer:
        awaited: Deferred[Any] = self._http.request(
            method,
            _url(path),
            headers=self._headers,
            data=None if body is None else _BytesBody(orjson.dumps(body)),
            unbuffered=True,
            allow_redirects=False,
        )
        self._awaited.add(awaited)
        try:
            response = await awaited
        except (ConnectingCancelledError, CancelledError):
            raise self._cancelled(awaited) from None
        except (ConnectError, DNSLookupError):
            raise self._gone() from None
        except (
            ResponseNeverReceived,
            ResponseFailed,
            RequestGenerationFailed,
            RequestTransmissionFailed,
        ) as error:
            if any(reason.check(CancelledError) for reason in error.reasons):
                raise self._cancelled(awaited) from None
            raise Lost(_in_words(error)) from None
        except ConnectionClosed as error:
            raise Lost(_in_words(error)) from None
        finally:
            self._awaited.discard(awaited)
        return Answer(response, self._read)

    def _cancelled(self, awaited: Deferred[Any]) -> Exception:
        """What became of a request that was cancelled: by its caller, or by `hang_up`."""
        return (
            CancelledError() if awaited in self._awaited else Lost("The server is being stopped.")
        )

    def _no_llama(self) -> ApiError:
        return ApiError(
            "api_error",
            f"What listens at {self.url} (tier {self.tier!r}) is no llama-server.",
            status=502,
            should_retry=False,
        )

    def _gone(self) -> ApiError:
        return unavailable(f"No model server answers at {self.url} (tier {self.tier!r}).")


def _in_words(error: object) -> str:
    """Why a connection broke: of several reasons the first, which the others follow from."""
    reasons = getattr(error, "reasons", None)
    return str(reasons[0].value if reasons else error)


@cache
def _url(path: str) -> EncodedURL:
    """The URL of an endpoint; treq would take it apart anew for each call."""
    return EncodedURL.from_text(f"http://localhost{path}")


@implementer(IAgentEndpointFactory)
@attrs.frozen
class _Always:
    """One endpoint for every URL; the stock Agent would resolve even 127.0.0.1 in a thread."""

    endpoint: IStreamClientEndpoint

    def endpointForURI(self, uri: object) -> IStreamClientEndpoint:  # noqa: ARG002  # any
        return self.endpoint
