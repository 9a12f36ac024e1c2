"""
One model's server as a tier sees it, and how a server is asked over HTTP.

`Server` is what a tier needs of any server; `gateway.llama` and `gateway.remote` have those that
there are.  All of them ask through an `Upstream`: each call opens a connection of its own, and each
Deferred that is awaited here hangs up when it is cancelled; that is how a client's leaving stops
the work (docs/protocol.md, "Cancellation").
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, Final, Protocol, cast

import attrs
import orjson
from hyperlink import EncodedURL
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.defer import TimeoutError as TimedOut
from twisted.internet.error import (
    ConnectError,
    ConnectingCancelledError,
    ConnectionClosed,
    DNSLookupError,
)
from twisted.internet.interfaces import IPushProducer, IReactorTime
from twisted.internet.protocol import Protocol as Receiver
from twisted.python.failure import Failure
from twisted.web.client import (
    RequestGenerationFailed,
    RequestTransmissionFailed,
    ResponseDone,
    ResponseFailed,
    ResponseNeverReceived,
)
from twisted.web.http import PotentialDataLoss
from twisted.web.http_headers import Headers
from twisted.web.iweb import IAgent, IResponse

from gateway.connection import DONE, Whole
from gateway.policy.template import Template
from gateway.wire.errors import ApiError, unavailable
from gateway.wire.request import MessagesRequest
from gateway.wire.sse import SSEEvent, SSEParser

Json = Any

#: Seconds that a short question (a count, the slots) may take.
PATIENCE: Final = 60.0

#: The same for the question how it is.
_HEALTH_PATIENCE: Final = 10.0

#: Bytes that an answer to a short question may have; a template rendered is the longest.
_LONGEST_ANSWER: Final = 64 * 1024 * 1024

#: Headers that hold the key of a tier.
_KEYS: Final = ("authorization", "x-api-key")

#: Why nothing is read any more of what `Upstream.hang_up` ended.
_GONE: Final = "The server is gone, or is being stopped."


class Health(Enum):
    """How a server is; `DOWN` where nothing answers, or nothing that we know."""

    DOWN = "down"
    LOADING = "loading"
    READY = "ready"


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
        answer: tokens of an answer to a client that sets no bound, where the server must be told
            one; None for as many as fit.
    """

    n_ctx: int
    slots: int
    alias: str
    build: str
    template: Template
    template_digest: str = ""
    model_path: str = ""
    answer: int | None = None


@attrs.frozen
class Completion:
    """
    One whole answer.

    Attributes:
        text: what was generated.
        stopped: why: ``eos``, ``word`` or ``limit``.
        evaluated: prompt tokens that were evaluated.
        cached: prompt tokens that the server still had.
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


class Server(Protocol):
    """What a tier needs of its server, whatever speaks there."""

    def hang_up(self) -> None:
        """The server will not answer any more: what waits for an answer fails with `Lost`."""

    async def props(self) -> Props:
        """What the server says of itself.  Raises ApiError while it is down or loading."""

    async def health(self) -> Health:
        """How the server is; cancelling it hangs up."""

    async def busy_slots(self) -> int:
        """How many calls it works on, as far as that can be asked."""

    async def count_body(
        self, body: Mapping[str, Json], headers: Mapping[str, str] | None = None
    ) -> int | None:
        """
        The tokens of the prompt of a prepared body; None where it counts none.

        Args:
            body: a prepared body, Messages-shaped.
            headers: the client's own, names in lower case.
        """

    async def messages(
        self, body: Mapping[str, Json], headers: Mapping[str, str] | None = None
    ) -> Answer:
        """
        Send a call, to be streamed.

        Args:
            body: a prepared body, Messages-shaped.
            headers: the client's own, names in lower case.

        Raises:
            ApiError: the server cannot be reached, or refuses.
            Lost: it went away before it answered.
        """


class Remote(Server, Protocol):
    """
    A server whose prompts, slots and cache are its own business.

    Attributes:
        is_verbatim: whether it gets what the client sent, and nothing is bounded or mended.
    """

    is_verbatim: bool

    def prepare(self, request: MessagesRequest) -> dict[str, Json]:
        """The body for `messages`; raises ApiError where it cannot be had there."""


class Parser(Protocol):
    """What makes a Messages stream of an upstream's bytes."""

    def feed(self, chunk: bytes) -> list[SSEEvent]:
        """The events that `chunk` completes, in order; raises `EventTooLong`."""


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

    def connectionLost(self, reason: Failure = DONE) -> None:
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

    def header(self, name: str) -> str:
        """The first of its headers of this name; "" where there is none."""
        values: list[bytes] = self.response.headers.getRawHeaders(name.encode("ascii")) or [b""]
        return values[0].decode("utf-8", "replace")

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
class Upstream:
    """
    One server, asked.

    Attributes:
        tier: the name of its tier, for the wording of errors.
        url: where it listens, as in the configuration.
        base: what stands before each path, in its own words.
        refusal: what an answer with another status than 200, and this body, means to a client.
    """

    tier: str
    url: str
    base: str
    refusal: Callable[[Answer, bytes], ApiError]
    _reactor: IReactorTime
    _agent: IAgent
    _headers: Headers
    _awaited: set[Deferred[Any]] = attrs.field(factory=set, init=False)
    _read: set[_Reading] = attrs.field(factory=set, init=False)

    @classmethod
    def over(
        cls,
        reactor: IReactorTime,
        agent: IAgent,
        tier: str,
        url: str,
        refusal: Callable[[Answer, bytes], ApiError],
        headers: Mapping[str, str],
        base: str = "http://localhost",
    ) -> Upstream:
        """One that is asked over `agent`, with `headers` in each request."""
        sent = {name: [value] for name, value in headers.items()}
        plain = {"content-type": ["application/json"], "accept-encoding": ["identity"]}
        always = Headers({**plain, **sent})
        keys = [value.rpartition(" ")[2].encode() for value in map(headers.get, _KEYS) if value]

        def without_key(answer: Answer, body: bytes) -> ApiError:
            for key in keys:  # a server may say what it was shown
                body = body.replace(key, b"***")
            return refusal(answer, body)

        written = EncodedURL.from_text(base).to_uri().to_text()  # any letter may stand in a URL
        return cls(tier, url, written, without_key, reactor, agent, always)

    def hang_up(self) -> None:
        """The server will not answer any more: what waits for an answer fails with `Lost`."""
        awaited, self._awaited = self._awaited, set()
        for request in awaited:
            request.cancel()
        for reading in list(self._read):
            reading.lose(_GONE)

    # --- how it is asked --------------------------------------------------------------------------

    async def fetch(
        self,
        method: str,
        path: str,
        body: Json = None,
        patience: float = PATIENCE,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[Answer, bytes]:
        """
        The answer to a question and its body, within so many seconds.

        Raises:
            ApiError: the server cannot be reached, or went away.
        """

        async def asking() -> tuple[Answer, bytes]:
            answer = await self.request(method, path, body, headers)
            return answer, await answer.read()

        asked = Deferred.fromCoroutine(asking())
        asked.addTimeout(patience, self._reactor)
        try:
            return await asked
        except TimedOut:
            raise unavailable(
                f"The model server of tier {self.tier!r} did not answer {path}"
                f" within {patience:.0f} seconds."
            ) from None
        except Lost:
            raise self.gone() from None

    async def ask(
        self, method: str, path: str, body: Json = None, patience: float = PATIENCE
    ) -> Json:
        """As `fetch`, the JSON; raises ApiError also where it is a refusal, or no JSON."""
        return self.parsed(*await self.fetch(method, path, body, patience))

    async def json(self, answer: Answer) -> Json:
        """The JSON that an answer holds; raises ApiError where it is a refusal, or no JSON."""
        return self.parsed(answer, await answer.read())

    def parsed(self, answer: Answer, body: bytes) -> Json:
        """As `json`, of a body that is there."""
        if answer.status != 200:
            raise self.refusal(answer, body)
        try:
            return orjson.loads(body)
        except ValueError:
            raise ApiError(
                "api_error", f"What listens at {self.url} (tier {self.tier!r}) does not speak JSON."
            ) from None

    async def status(self, path: str) -> int | None:
        """The status of an answer to GET `path`; None where none comes in a short time."""
        try:
            answer, _ = await self.fetch("GET", path, patience=_HEALTH_PATIENCE)
        except ApiError:
            return None
        return answer.status

    async def request(
        self, method: str, path: str, body: Json = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        """
        Send a request; cancelling it hangs up.

        Args:
            method: of HTTP.
            path: after the base.
            body: what is sent as JSON; None for nothing.
            headers: what is sent beside the headers of each request, or in the place of one.

        Raises:
            ApiError: the server cannot be reached.
            Lost: it went away before it answered.
        """
        awaited: Deferred[Any] = self._agent.request(
            method.encode("ascii"),
            (self.base + path).encode("ascii"),
            self._beside(headers or {}),
            None if body is None else Whole(orjson.dumps(body)),
        )
        self._awaited.add(awaited)
        try:
            response = await awaited
        except (ConnectingCancelledError, CancelledError):
            raise self._cancelled(awaited) from None
        except (ConnectError, DNSLookupError):
            raise self.gone() from None
        except (
            ResponseNeverReceived,
            ResponseFailed,
            RequestGenerationFailed,
            RequestTransmissionFailed,
        ) as error:
            if any(reason.check(CancelledError) for reason in error.reasons):
                raise self._cancelled(awaited) from None
            if any(_is_about_trust(reason.value) for reason in error.reasons):
                raise self._untrusted() from None
            raise Lost(_in_words(error)) from None
        except ConnectionClosed as error:
            raise Lost(_in_words(error)) from None
        except OSError:  # of a socket in the file system, where no more files may be open
            raise self.gone() from None
        finally:
            self._awaited.discard(awaited)
        return Answer(response, self._read)

    def _cancelled(self, awaited: Deferred[Any]) -> Exception:
        """What became of a request that was cancelled: by its caller, or by `hang_up`."""
        return CancelledError() if awaited in self._awaited else Lost(_GONE)

    def _beside(self, headers: Mapping[str, str]) -> Headers:
        if not headers:
            return self._headers
        sent = self._headers.copy()
        for name, value in headers.items():
            sent.setRawHeaders(name, [value])
        return sent

    def _untrusted(self) -> ApiError:
        return ApiError(
            "api_error",
            f"There is no safe connection to {self.url}: nobody vouches for its certificate; set"
            f" ca_file in [tier.{self.tier}], or another name in its url.",
            status=502,
            should_retry=False,
        )

    def gone(self) -> ApiError:
        """Nobody answers."""
        return unavailable(f"No model server answers at {self.url} (tier {self.tier!r}).")


def _is_about_trust(error: BaseException) -> bool:
    """Whether this is OpenSSL's, or of the check of a certificate's name."""
    return type(error).__module__.startswith(("OpenSSL", "service_identity"))


def _in_words(error: object) -> str:
    """Why a connection broke: of several reasons the first, which the others follow from."""
    reasons = getattr(error, "reasons", None)
    return str(reasons[0].value if reasons else error)
