"""
The page of the gateway, and what its buttons do.

The page is whole without a script.  With one it is live: an event stream brings each section anew
that has changed, about once a second.  All open pages share one clock and one drawing, and while
none is open there is neither.

A browser shows the token as the password of HTTP Basic authentication: it asks for it itself,
without a script, and keeps it for the stream and the buttons; there is no session to keep and no
cookie to lose.  But it also sends it along when another page posts here.  So that door is open to
the page alone (`gateway.web.access`), and a button counts only where the browser says that our own
page was its origin, token or not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from importlib.resources import files
from typing import Final

import attrs
import orjson
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IDelayedCall, IPushProducer
from twisted.python.filepath import FilePath
from twisted.web.server import Request
from twisted.web.template import Element, Tag, XMLFile, flattenString, renderer, tags
from zope.interface import implementer

from gateway.dispatch import Dispatch
from gateway.tier.tier import Tier
from gateway.web.access import BoundedRequest, is_own_page
from gateway.web.drawing import SECTIONS
from gateway.web.view import View, view
from gateway.wire.errors import ApiError, overloaded

#: Seconds between two looks at what has changed, so that it is seen within a second; and looks
#: after which a silent stream says that it is there still.
_LOOK: Final = 0.8
_STILL: Final = 20

#: Seconds for which the page that one was shown is shown to others: to draw it takes 20 ms.
_FRESH: Final = 0.25

#: Pages that may be open at once.
_OPEN: Final = 16

#: Nothing but our own files, nothing inline, no frame around it.
_HEADERS: Final = {
    "content-security-policy": (
        "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self';"
        " img-src data:; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
    ),
    "x-content-type-options": "nosniff",
    # Without a referrer at all a form would have no origin either.
    "referrer-policy": "same-origin",
    "cache-control": "no-store",
}

_HERE: Final = files("gateway.web")
_TEMPLATE: Final = XMLFile(FilePath(str(_HERE / "page.xml")))
_FILES: Final = {"page.css": "text/css", "page.js": "text/javascript"}


class _Page(Element):
    """The whole page, with a word to the person who looks at it."""

    loader = _TEMPLATE

    def __init__(self, shown: View, said: str) -> None:
        super().__init__()
        self.shown, self.said = shown, said

    @renderer
    def version(self, _request: object, tag: Tag) -> Tag:
        return tag(self.shown.version)

    @renderer
    def now(self, _request: object, tag: Tag) -> Tag:
        return tag("As of ", time.strftime("%H:%M:%S"))

    @renderer
    def content(self, _request: object, tag: Tag) -> Tag:
        if self.said:
            tag(tags.p(self.said, role="alert", class_="notice"))
        return tag(
            *(section.drawn(name, section.of(self.shown)) for name, section in SECTIONS.items())
        )


@implementer(IPushProducer)
@attrs.define(eq=False)
class _Reader:
    """An open page; what it does not read is not written, so that nothing piles up for it."""

    _request: Request
    _sent: dict[str, str] = attrs.field(factory=dict, init=False)
    _silent: int = attrs.field(default=0, init=False)
    _is_full: bool = attrs.field(default=False, init=False)

    def tell(self, drawn: Mapping[str, str]) -> None:
        """Send those sections that it has not as they are now."""
        if self._is_full:
            return
        news = {name: html for name, html in drawn.items() if self._sent.get(name) is not html}
        self._silent = 0 if news else self._silent + 1
        if news:
            self._sent |= news
            self._request.write(b"data: %b\n\n" % orjson.dumps(news))
        elif self._silent >= _STILL:
            self._silent = 0
            self._request.write(b":\n\n")

    def pauseProducing(self) -> None:
        self._is_full = True

    def resumeProducing(self) -> None:
        self._is_full = False

    def stopProducing(self) -> None:
        self._is_full = True


@attrs.define(eq=False)
class Dashboard:
    """
    The page.

    Attributes:
        dispatch: whose calls and tiers it shows.
        version: ours.
    """

    dispatch: Dispatch
    version: str
    _seen: dict[str, object] = attrs.field(factory=dict, init=False)
    _drawn: dict[str, str] = attrs.field(factory=dict, init=False)
    _readers: dict[_Reader, Deferred[None]] = attrs.field(factory=dict, init=False)
    _look_at: IDelayedCall | None = attrs.field(default=None, init=False)
    _page: bytes = attrs.field(default=b"", init=False)
    _page_at: float = attrs.field(default=-math.inf, init=False)

    async def page(self, request: Request, said: str = "") -> bytes:
        """The whole page, with something said to the person at its top."""
        for name, value in _HEADERS.items():
            request.setHeader(name, value)
        request.setHeader("content-type", "text/html; charset=utf-8")
        now = self.dispatch.reactor.seconds()
        if not said and now - self._page_at < _FRESH:
            return self._page
        whole = b"<!DOCTYPE html>\n" + await flattenString(request, _Page(self._view(), said))
        if not said:
            self._page, self._page_at = whole, now
        return whole

    def file(self, request: Request, name: str) -> bytes:
        """One of the page's own files; raises ApiError for any other."""
        if name not in _FILES:
            raise ApiError("not_found_error", f"The page has no {name[:100]!r}.")
        request.setHeader("content-type", f"{_FILES[name]}; charset=utf-8")
        request.setHeader("cache-control", "no-cache")
        return (_HERE / name).read_bytes()

    # --- live -------------------------------------------------------------------------------------

    async def events(self, request: BoundedRequest) -> None:
        """
        Tell an open page what changes, until it is left.

        Raises:
            ApiError: too many are open, or it is no page of ours.
        """
        _check(request, posted=False)
        if len(self._readers) >= _OPEN:
            raise overloaded(f"{_OPEN} pages are open already; close one.", retry_after=60)
        request.setHeader("content-type", "text/event-stream; charset=utf-8")
        request.setHeader("cache-control", "no-store")
        reader = _Reader(request)
        request.registerProducer(reader, True)
        ended = self._readers[reader] = Deferred()
        try:
            if self._look_at is None:
                self._look()
            else:
                reader.tell(self._drawn)
            with suppress(CancelledError):  # it was left
                await ended
        finally:
            del self._readers[reader]
            if request.channel is not None:  # it is None once the client has left
                request.unregisterProducer()
            if not self._readers:
                self._rest()

    def close(self) -> None:
        """End all streams: the gateway stops."""
        for ended in list(self._readers.values()):
            ended.callback(None)

    def _look(self) -> None:
        """Tell every open page what has changed, and come again."""
        self._look_at = self.dispatch.reactor.callLater(_LOOK, self._look)
        shown = self._view()
        for name, section in SECTIONS.items():
            part = section.of(shown)
            if name not in self._drawn or self._seen[name] != part:
                self._seen[name], self._drawn[name] = part, _html(section.drawn(name, part))
        for reader in list(self._readers):
            reader.tell(self._drawn)

    def _rest(self) -> None:
        """Nobody looks."""
        if self._look_at is not None:
            self._look_at.cancel()
        self._look_at = None
        self._seen.clear()
        self._drawn.clear()

    def _view(self) -> View:
        status = {"version": self.version, **self.dispatch.status()}
        return view(status, self.dispatch.ledger.chart())

    # --- what its buttons do ----------------------------------------------------------------------

    async def cancel(self, request: BoundedRequest, call: str) -> bytes:
        """End a call for good."""

        async def end() -> None:
            if not self.dispatch.end(call):
                raise ApiError("not_found_error", "This call has ended already.")

        return await self._do(request, end)

    async def save(self, request: BoundedRequest, tier: str) -> bytes:
        """Save a slot."""
        return await self._do(request, self._tier(tier).cache.save)

    async def restart(self, request: BoundedRequest, tier: str) -> bytes:
        """Start a server anew."""
        return await self._do(request, self._tier(tier).restart)

    def _tier(self, name: str) -> Tier:
        if name not in self.dispatch.tiers:
            raise ApiError("not_found_error", f"There is no tier {name[:100]!r}.")
        return self.dispatch.tiers[name]

    async def _do(self, request: BoundedRequest, what: Callable[[], Awaitable[None]]) -> bytes:
        """Do what a button says and show the page again, with what went wrong if anything did."""
        _check(request, posted=True)
        try:
            await what()
            self._page_at = -math.inf
        except ApiError as error:
            request.setResponseCode(error.status)
            return await self.page(request, error.message)
        request.setResponseCode(303)
        request.setHeader("location", "/")
        return b""


def _check(request: BoundedRequest, *, posted: bool) -> None:
    """Raise ApiError where a request does not come from the page itself."""
    if not is_own_page(request.header_values(), posted=posted):
        raise ApiError(
            "permission_error",
            "Only the gateway's own page may do this, and its browser must say so.",
        )


def _html(tag: Tag) -> str:
    """The section, which waits for nothing."""
    drawn: list[bytes] = []
    flattenString(None, tag).addCallback(drawn.append)
    return drawn[0].decode()
