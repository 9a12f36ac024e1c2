"""The two APIs over HTTP, and nothing else: read, hand to dispatch, write what comes back."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from typing import Any, ClassVar, Final

import attrs
import orjson
from klein import Klein
from twisted.internet.defer import CancelledError, Deferred, DeferredList
from twisted.internet.defer import TimeoutError as TimedOut
from twisted.internet.error import ConnectionClosed
from twisted.internet.interfaces import IPushProducer, IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure
from werkzeug.exceptions import HTTPException, MethodNotAllowed

from gateway.capture import MOST, Capture
from gateway.dispatch import Dispatch
from gateway.policy.routes import MODEL_PREFIX
from gateway.upstream import Props
from gateway.web.access import BoundedRequest, nothing_there, speaks_openai, write_error
from gateway.web.dashboard import Dashboard
from gateway.web.metrics import CONTENT_TYPE, Metrics
from gateway.wire import completions
from gateway.wire.errors import ApiError, stopping

Json = Any

#: Seconds that a server gets to say what it is; who asks for the list of models waits for it.
_INTRODUCES: Final = 3.0

log = Logger()


def _app() -> Klein:
    app = Klein()
    # A gateway must not redirect: "/v1//messages" is unknown, not a way to "/v1/messages".
    app.url_map.merge_slashes = False
    app.url_map.strict_slashes = False
    return app


@attrs.define(eq=False)
class Reply:
    """
    The client's side of one request (`gateway.tier.answer.Client`).

    Attributes:
        told: what it was told so far, for who keeps it; None where nobody does.
    """

    request: BoundedRequest
    begun: bool = False
    told: bytearray | None = None
    _producing: bool = False
    _severed: Deferred[None] | None = None

    @property
    def request_id(self) -> str:
        return self.request.request_id

    def routed(self, tier: str, kind: str, degraded: str = "") -> None:
        self.request.setHeader("x-claudegw-tier", tier)
        self.request.setHeader("x-claudegw-call", kind)
        if degraded:
            self.request.setHeader("x-claudegw-degraded", degraded)

    def begin(self) -> None:
        self.begun = True
        self.request.setHeader("content-type", "text/event-stream; charset=utf-8")
        self.request.setHeader("cache-control", "no-cache")
        self.request.write(b"")  # without it the status waits for the first byte of the body

    def write(self, data: bytes) -> None:
        if self.told is not None and len(self.told) < MOST:
            self.told += data
        self.request.write(data)

    def meet(self, producer: IPushProducer) -> None:
        if self.request.channel is not None:  # it is None once the client has left
            self._producing = True
            self.request.registerProducer(producer, True)

    def part(self) -> None:
        if self._producing and self.request.channel is not None:
            self._producing = False
            self.request.unregisterProducer()

    def cut(self) -> None:
        if self.request.channel is not None:
            self._severed = self.request.notifyFinish()
            self.request.channel.forceAbortClient()

    async def severed(self) -> None:
        """
        Wait until a connection that was cut is gone.

        Klein finishes what is not gone when its handler returns, and a broken answer must not
        look whole.
        """
        if self._severed is not None:
            with suppress(ConnectionClosed):
                await self._severed


@attrs.define(eq=False)
class Api:
    """
    The Klein app.

    Attributes:
        dispatch: answers the calls.
        version: ours, for ``/status``.
        metrics: what ``/metrics`` says.
        capture: keeps the bodies of calls; None, as a rule, keeps none.
        dashboard: the page.
    """

    dispatch: Dispatch
    version: str
    metrics: Metrics = attrs.field(init=False)
    capture: Capture | None = attrs.field(default=None, init=False)
    dashboard: Dashboard = attrs.field(init=False)
    _under_way: set[Deferred[bytes | None]] = attrs.field(factory=set, init=False)
    app: ClassVar[Klein] = _app()

    def __attrs_post_init__(self) -> None:
        self.metrics = Metrics(self.dispatch, self.version)
        self.dashboard = Dashboard(self.dispatch, self.version)

    # --- the Messages API -------------------------------------------------------------------------

    @app.route("/v1/messages", methods=["POST"])
    async def messages(self, request: BoundedRequest) -> bytes | None:
        reply = Reply(request)
        return await self._answer(reply, self.dispatch.message)

    @app.route("/v1/messages/count_tokens", methods=["POST"])
    async def count_tokens(self, request: BoundedRequest) -> bytes | None:
        reply = Reply(request)

        async def count(raw: bytes, headers: Mapping[str, str], reply: Reply) -> bytes:
            tokens = await self.dispatch.count(raw, headers, reply)
            return orjson.dumps({"input_tokens": tokens})

        return await self._answer(reply, count)

    @app.route("/v1/models", methods=["GET"])
    async def models(self, request: BoundedRequest) -> bytes:
        """Each tier as a model, with its true window while its server is up."""
        asked = [Deferred.fromCoroutine(self._model(request, name)) for name in self.dispatch.tiers]
        listed = []
        for is_there, found in await DeferredList(asked, consumeErrors=True):
            if not is_there:
                found.raiseException()
            listed.append(found)
        if speaks_openai(request):
            return _json(request, {"object": "list", "data": listed})
        ends = {"first_id": listed[0]["id"], "last_id": listed[-1]["id"]}
        return _json(request, {"data": listed, "has_more": False, **ends})

    @app.route("/v1/models/<identity>", methods=["GET"])
    async def model(self, request: BoundedRequest, identity: str) -> bytes:
        name = identity.removeprefix(MODEL_PREFIX)
        if name == identity or name not in self.dispatch.tiers:
            known = ", ".join(f"{MODEL_PREFIX}{tier}" for tier in self.dispatch.tiers)
            raise ApiError(
                "not_found_error", f"There is no model {identity[:100]!r}, only {known}."
            )
        return _json(request, await self._model(request, name))

    async def _model(self, request: BoundedRequest, name: str) -> Json:
        """The tier of this name as a model, in the shape that `request` wants."""
        tier = self.dispatch.tiers[name]
        asked = Deferred.fromCoroutine(tier.props())
        asked.addTimeout(_INTRODUCES, self.dispatch.reactor)
        try:
            props: Props | None = await asked
        except ApiError:
            props = None
        except TimedOut:  # it is there, and busy
            props = tier.met
        alias, window = "not running", None
        if props is not None:
            alias, window = props.alias.rpartition("/")[2], props.n_ctx
        identity = f"{MODEL_PREFIX}{name}"
        if speaks_openai(request):
            return completions.model(identity, window)
        return {
            "type": "model",
            "id": identity,
            "display_name": f"{name}: {alias}",
            "created_at": "2026-01-01T00:00:00Z",
            "max_input_tokens": window,
            "max_tokens": window,
        }

    # --- the OpenAI API ---------------------------------------------------------------------------

    @app.route("/v1/chat/completions", methods=["POST"])
    async def chat(self, request: BoundedRequest) -> bytes | None:
        return await self._answer(Reply(request), self.dispatch.chat)

    @app.route("/v1/completions", methods=["POST"])
    async def complete(self, request: BoundedRequest) -> bytes | None:
        return await self._answer(Reply(request), self.dispatch.complete)

    @app.route("/v1/embeddings", methods=["POST"])
    async def embed(self, request: BoundedRequest) -> bytes | None:
        return await self._answer(Reply(request), self.dispatch.embed)

    # --- for who runs the house -------------------------------------------------------------------

    @app.route("/", methods=["HEAD"])
    def warm_up(self, request: BoundedRequest) -> bytes:
        return b""

    @app.route("/api/hello", methods=["HEAD"])
    def hello(self, request: BoundedRequest) -> bytes:
        return b""

    @app.route("/healthz", methods=["GET"])
    def health(self, request: BoundedRequest) -> bytes:
        return _json(request, {"status": "ok"})

    @app.route("/status", methods=["GET"])
    def status(self, request: BoundedRequest) -> bytes:
        capture = None if self.capture is None else self.capture.status()
        said = {"version": self.version, **self.dispatch.status(), "capture": capture}
        return _json(request, said)

    @app.route("/metrics", methods=["GET"])
    def figures(self, request: BoundedRequest) -> bytes:
        request.setHeader("content-type", CONTENT_TYPE)
        return self.metrics.text()

    @app.route("/", methods=["GET"])
    async def page(self, request: BoundedRequest) -> bytes:
        return await self.dashboard.page(request)

    @app.route("/page/<name>", methods=["GET"])
    def page_file(self, request: BoundedRequest, name: str) -> bytes:
        return self.dashboard.file(request, name)

    @app.route("/page/events", methods=["GET"])
    async def page_events(self, request: BoundedRequest) -> None:
        await self.dashboard.events(request)

    @app.route("/page/calls/<call>/cancel", methods=["POST"])
    async def cancel(self, request: BoundedRequest, call: str) -> bytes:
        return await self.dashboard.cancel(request, call)

    @app.route("/page/tiers/<tier>/save", methods=["POST"])
    async def save(self, request: BoundedRequest, tier: str) -> bytes:
        return await self.dashboard.save(request, tier)

    @app.route("/page/tiers/<tier>/restart", methods=["POST"])
    async def restart(self, request: BoundedRequest, tier: str) -> bytes:
        return await self.dashboard.restart(request, tier)

    # --- the end of the day -----------------------------------------------------------------------

    async def drain(self, grace: float, reactor: IReactorTime) -> None:
        """Wait until no answer is under way any more, for `grace` seconds at most; then cut."""
        self.dashboard.close()
        ended = DeferredList([_end_of(answer) for answer in self._under_way])
        out_of_time = reactor.callLater(grace, self._cut)
        await ended
        if out_of_time.active():
            out_of_time.cancel()

    def _cut(self) -> None:
        for answer in list(self._under_way):
            answer.cancel()

    # --- errors -----------------------------------------------------------------------------------

    async def _answer(
        self,
        reply: Reply,
        answer: Callable[..., Coroutine[Deferred[Any], Any, bytes | None]],
    ) -> bytes | None:
        """The body to send; after a stream none, and no exception may leave either."""
        request = reply.request
        assert request.content is not None
        raw, capture = request.content.read(), self.capture
        reply.told = None if capture is None else bytearray()
        answering = answer(raw, request.header_values(), reply)
        answered: Deferred[bytes | None] = Deferred.fromCoroutine(answering)
        self._under_way.add(answered)
        body: bytes | None = None
        try:
            body = await answered
        except Exception as error:
            if not reply.begun:
                raise
            # An exception that left now would put an HTML page into the stream.
            if not isinstance(error, CancelledError):
                log.failure("{id} broke after its status was sent", id=reply.request_id)
            reply.cut()
        finally:
            self._under_way.discard(answered)
            if capture is not None:
                capture.keep(reply.request_id, raw, bytes(reply.told or body or b""))
        await reply.severed()
        if body is not None:
            request.setHeader("content-type", "application/json")
        return body

    @app.handle_errors(ApiError)
    def refused(self, request: Any, failure: Failure) -> bytes:
        assert isinstance(failure.value, ApiError)
        return write_error(request, failure.value)

    @app.handle_errors(CancelledError)
    def cancelled(self, request: Any, failure: Failure) -> bytes:
        """Reached only where the client is still there: the service stops."""
        return write_error(request, stopping())

    @app.handle_errors(HTTPException)
    def unknown(self, request: Any, failure: Failure) -> bytes:
        error = nothing_there(request)
        if isinstance(failure.value, MethodNotAllowed) and speaks_openai(request):
            error = attrs.evolve(error, status=405)
        return write_error(request, error)

    @app.handle_errors(Exception)
    def broken(self, request: Any, failure: Failure) -> bytes:
        log.failure("{id} failed", failure=failure, id=request.request_id)
        error = ApiError("api_error", "The gateway itself failed; its log says why.")
        return write_error(request, error)


def _end_of(answer: Deferred[bytes | None]) -> Deferred[None]:
    """Fires when `answer` does, whatever came of it, and leaves it as it is."""
    ended: Deferred[None] = Deferred()

    def end(result: Any) -> Any:
        if not ended.called:
            ended.callback(None)
        return result

    answer.addBoth(end)
    return ended


def _json(request: BoundedRequest, value: Json) -> bytes:
    request.setHeader("content-type", "application/json")
    return orjson.dumps(value)
