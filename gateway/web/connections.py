"""
How long a request may take to come, and how many connections may be there.

A connection is either working, from the end of a request to the end of its answer, or it waits:
for a request, or for the rest of one.  Who works is never hurried, unless it is the client who is
waited for; who waits has a time limit, and where there are too many the one that has waited longest
has to go.  So whoever opens connections and says nothing shuts out nobody but himself.

What cannot be read gets an answer as well (`PoliteChannel.turn_away`), and then nothing more is
read but to throw it away: a connection that is closed on a client that still sends takes the answer
with it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, Final, cast
from uuid import uuid4

import attrs
import orjson
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import IDelayedCall, IHalfCloseableProtocol, IReactorTime
from twisted.internet.protocol import connectionDone
from twisted.python.failure import Failure
from twisted.web.http import RESPONSES, HTTPChannel
from twisted.web.http import Request as AnyRequest
from twisted.web.server import Site
from zope.interface import implementer

from gateway.connection import write_now
from gateway.web.access import Access, BoundedRequest
from gateway.wire.errors import ApiError, invalid

#: Connections beyond the limit: those that are told so, and those that are on their way out.
SPARE: Final = 32

#: Seconds in which a client that was turned away can read why.
LINGER: Final = 2.0

#: Seconds between two requests that were sent at once; in them others have their turn.
BREATH: Final = 0.005

#: Seconds that the last bytes of an answer get once the connection is to end.
_FLUSH: Final = 30

#: The longest name of a header; Twisted keeps ten thousand of those that it has seen.
_LONGEST_NAME: Final = 256

#: Bytes of lines behind the last chunk, which nobody looks at; Twisted's 64 KB keep it busy.
_TRAILERS: Final = 4096

#: What the first byte of a request can be: the end of a line, or a letter of a method.
_FIRST: Final = b"\r\n" + bytes(range(33, 127))


@attrs.frozen
class ConnectionLimits:
    """
    What clients get.

    Attributes:
        most: connections that there may be.
        idle: seconds that one may stay without a request.
        head: seconds from the first byte of a request to the end of its headers.
        body: seconds from there to its last byte.
        unread: seconds that an answer may wait for its client to read what there is of it.
    """

    most: int = 2000
    idle: float = 60.0
    head: float = 20.0
    body: float = 120.0
    unread: float = 600.0


@implementer(IHalfCloseableProtocol)
class PoliteChannel(HTTPChannel):
    """
    A connection on which also what is no HTTP gets an answer in our words.

    Attributes:
        turned_away: whether nothing that still comes is wanted.
    """

    factory: QuietSite
    transport: Any
    abortTimeout = _FLUSH
    turned_away = False
    _limit: float | None = None  # seconds that what is being read gets, if more of it must come
    _partial = False  # a request has begun and is not all there
    _answered: AnyRequest | None = None  # behind which another one waits
    _next: IDelayedCall | None = None

    @property
    def is_one_too_many(self) -> bool:
        """Whether more requests are being answered than there may be connections."""
        return self.factory.working > self.factory.limits.most

    # --- in ---------------------------------------------------------------------------------------

    def connectionMade(self) -> None:
        super().connectionMade()
        self.factory.came(self)

    def dataReceived(self, data: bytes) -> None:
        if self.turned_away:
            return
        if not self._handlingRequest and not self._partial:
            self._partial = True
            self.setTimeout(None)
            self._limit = self.factory.limits.head
            if data[0] not in _FIRST:  # TLS, for one, would wait for an answer to its greeting
                self._respondToBadRequestAndDisconnect()
                return
        super().dataReceived(data)
        limit, self._limit = self._limit, None
        if limit is not None:  # mostly it was all there
            self._within(limit)

    def resetTimeout(self) -> None:
        """Nothing: a byte now and then buys no time."""

    def _within(self, seconds: float) -> None:
        """Let it take so long from now; to make a timer sooner, Twisted looks through them all."""
        self.setTimeout(None)
        self.setTimeout(seconds)

    def headerReceived(self, line: bytes) -> bool:
        try:
            if line.find(b":") <= _LONGEST_NAME:
                return bool(super().headerReceived(line))
        except ValueError:  # a Content-Length of more digits than Python reads
            pass
        self._respondToBadRequestAndDisconnect()
        return False

    def allHeadersReceived(self) -> None:
        try:
            super().allHeadersReceived()
        except ApiError as error:
            self.turn_away(error)
            return
        if self.length is None:
            decoder: Any = self._transferDecoder
            decoder._maxTrailerHeadersSize = _TRAILERS  # noqa: SLF001  # there is no other way
        if self.length != 0:
            self._limit = self.factory.limits.body

    def rawDataReceived(self, data: bytes) -> None:
        try:
            super().rawDataReceived(data)
        except ApiError as error:
            self.turn_away(error)
        waiting = sum(map(len, self._dataBuffer)) if self._handlingRequest else 0
        if waiting > self._optimisticEagerReadSize:
            self._networkProducer.pauseProducing()  # Twisted does not, if the client reads nothing

    def allContentReceived(self) -> None:
        self._partial, self._limit = False, None
        self.factory.works(self)
        self.timeOut = cast(Any, self.factory.limits.idle)  # which is what Twisted comes back to
        super().allContentReceived()

    def requestDone(self, request: AnyRequest) -> None:
        """
        Go on to the next request: if it is there already, a little later.

        Who sends a thousand at once would else be answered a thousand times before anybody is.  And
        who does not take the answers so far gets no further ones.
        """
        self._answered = request
        self.setTimeout(None)
        more = self._waitingForTransport or self._buffer or any(self._dataBuffer)
        if self.persistent and more:
            self._go_on_soon()
        else:
            self._go_on()

    def pauseProducing(self) -> None:
        """The client does not read; its server is kept waiting, and others with it."""
        super().pauseProducing()
        if self._is_unread and self.timeOut is None:  # each write comes here while none leaves
            self._within(self.factory.limits.unread)

    def resumeProducing(self) -> None:
        if self._is_unread:
            self.setTimeout(None)
        super().resumeProducing()
        if self._answered is not None:
            self._go_on_soon()

    @property
    def _is_unread(self) -> bool:
        """Whether an answer is under way that its client does not read."""
        return self._handlingRequest and self._answered is None and self._waitingForTransport

    def _go_on_soon(self) -> None:
        """Once the answers so far are taken: of who does not read them none must pile up."""
        if self._waitingForTransport:
            self.factory.waits(self)
            self._within(self.factory.limits.idle)
        elif self._next is None:
            self.factory.works(self)
            self.setTimeout(None)
            self._next = self.callLater(BREATH, self._go_on)

    def _go_on(self) -> None:
        request, self._answered, self._next = self._answered, None, None
        self.factory.waits(self)
        super().requestDone(request)

    # --- out --------------------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        write_now(self.transport, data)

    def writeSequence(self, iovec: Iterable[bytes]) -> None:
        write_now(self.transport, b"".join(iovec))

    def turn_away(self, error: ApiError) -> None:
        """Answer `error` to a request of which the rest is not wanted, and end the connection."""
        if self.turned_away:
            return
        self._say(error)
        self.turned_away, self._limit = True, None
        self.clearLineBuffer()
        self._transferDecoder = None
        self.setTimeout(None)
        self.transport.loseWriteConnection()
        if self._abortingCall is None:
            self._abortingCall = self.callLater(LINGER, self.forceAbortClient)

    def _say(self, error: ApiError) -> None:
        """Write an answer that no request of ours goes with."""
        identity = f"req_{uuid4().hex}"
        body = orjson.dumps(error.envelope(identity))
        reason = RESPONSES.get(error.status, b"Error").decode()
        head = (
            f"HTTP/1.1 {error.status} {reason}\r\n"
            f"request-id: {identity}\r\n"
            "content-type: application/json\r\n"
            f"content-length: {len(body)}\r\n"
            "connection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)

    def _respondToBadRequestAndDisconnect(self) -> None:
        """Twisted's place for all that it cannot read; its own answer has no body."""
        self.turn_away(
            invalid(
                "The request is no HTTP that can be read; see its first line and headers. (TLS is"
                " not spoken here: http, not https.)"
            )
        )

    def lineLengthExceeded(self, line: bytes) -> None:  # noqa: ARG002  # its length is all
        """A header that is too long would be left without an answer."""
        self._respondToBadRequestAndDisconnect()

    def timeoutConnection(self) -> None:
        if self._partial:
            self.turn_away(_TOO_SLOW)
        elif self._is_unread:
            self.forceAbortClient()
        else:
            self.loseConnection()

    # --- the end ----------------------------------------------------------------------------------

    def loseConnection(self) -> None:
        """End the connection once all is written; in the end also of who does not read it."""
        if self._abortingCall is None:  # first, as the end may come at once
            self._abortingCall = self.callLater(self.abortTimeout, self.forceAbortClient)
        if not self.transport.disconnecting:
            super().loseConnection()

    def forceAbortClient(self) -> None:
        """Twisted's own would log each."""
        aborting, self._abortingCall = self._abortingCall, None
        if aborting is not None and aborting.active():
            aborting.cancel()
        self.transport.abortConnection()

    def readConnectionLost(self) -> None:
        """
        The client sends no more.

        That is all that is seen of one that has left, too.  So what it asked for is ended; what it
        has been answered still goes out.
        """
        silent = self.turned_away or not (self._partial or self._handlingRequest)
        if self._handlingRequest:
            silent = self._answered is not None or bool(self.requests[0].startedWriting)
        self._forget(Failure(ConnectionDone()))
        if not silent:
            self._say(_LEFT)
        self.loseConnection()

    def writeConnectionLost(self) -> None:
        """All that was to be said is said; `LINGER` runs."""

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self._forget(reason)
        super().connectionLost(reason)
        self.factory.gone(self)

    def _forget(self, reason: Failure) -> None:
        """Let nothing that was asked for go on."""
        self.setTimeout(None)
        if self._next is not None:
            self._next.cancel()
        self._answered = self._next = None
        requests, self.requests = self.requests, []
        for request in requests:
            request.connectionLost(reason)


_TOO_SLOW: Final = attrs.evolve(
    invalid("The rest of the request did not come in time; each line of it ends with CR LF."),
    status=408,
)

_LEFT: Final = invalid(
    "The client's side of the connection was closed before the answer was there, which counts as"
    " leaving: the call was ended. Keep it open until the answer has come."
)


class QuietSite(Site):
    """
    A site that leaves the log to the ledger.

    Attributes:
        connections: all that there are.
        limits: what they get.
    """

    protocol = cast(Any, PoliteChannel)  # HTTP/1 alone, so that there is nothing to negotiate
    noisy = False  # the service says where it listens

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.connections: set[PoliteChannel] = set()
        self.access: Access
        self.adopt(ConnectionLimits())
        self._waiting: OrderedDict[PoliteChannel, None] = OrderedDict()
        self._empty: Deferred[None] | None = None

    def adopt(self, limits: ConnectionLimits) -> None:
        """Go by other limits from now on."""
        self.limits, self.timeOut = limits, limits.idle

    def log(self, request: Any) -> None:
        """Nothing: each call has a line of its own."""

    @property
    def working(self) -> int:
        """How many connections have a request that is being answered."""
        return len(self.connections) - len(self._waiting)

    def came(self, connection: PoliteChannel) -> None:
        """A connection has begun; if that is one too many, it is another's end."""
        self.connections.add(connection)
        self._waiting[connection] = None
        if len(self.connections) > self.limits.most + SPARE:
            longest, _ = self._waiting.popitem(last=False)
            self.connections.discard(longest)
            longest.forceAbortClient()

    def works(self, connection: PoliteChannel) -> None:
        """All of a request is there."""
        self._waiting.pop(connection, None)

    def waits(self, connection: PoliteChannel) -> None:
        """It is answered."""
        if connection in self.connections:
            self._waiting[connection] = None

    def gone(self, connection: PoliteChannel) -> None:
        """A connection has ended."""
        self.connections.discard(connection)
        self._waiting.pop(connection, None)
        if not self.connections and self._empty is not None:
            empty, self._empty = self._empty, None
            empty.callback(None)

    async def hang_up(self, seconds: float, reactor: IReactorTime) -> None:
        """Close every connection, those last that still send, for `seconds` at most."""
        if not self.connections:
            return
        empty = self._empty = Deferred()
        for connection in list(self.connections):
            connection.loseConnection()
        out_of_time = reactor.callLater(seconds, self._abort)
        await empty
        if out_of_time.active():
            out_of_time.cancel()

    def _abort(self) -> None:
        for connection in list(self.connections):
            connection.forceAbortClient()


def site(
    resource: Any, access: Access, reactor: Any, limits: ConnectionLimits | None = None
) -> QuietSite:
    """The site in front of `resource`, with `access` at its door."""
    factory = QuietSite(resource, reactor=reactor, parsePOSTFormSubmission=False)
    factory.access = access
    factory.adopt(limits or ConnectionLimits())

    def guarded(channel: PoliteChannel, *args: Any, **kwargs: Any) -> BoundedRequest:
        request = BoundedRequest(channel, *args, **kwargs)
        request.access = factory.access
        return request

    factory.requestFactory = cast(Any, guarded)
    return factory
