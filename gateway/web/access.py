"""
Who may come in, and how large.

Every request is checked before anything else sees it, by `Access.refusal`: a pure function of its
path and headers.  A web page that reaches loopback by a name of its own (DNS rebinding) is stopped
by the ``Host`` check, a body that is too large by `BoundedRequest`, which never holds more than the
limit.  How long a request may take to come, and how many may come, `gateway.web.connections` says.
"""

from __future__ import annotations

import hmac
from base64 import b64decode
from collections.abc import Collection, Mapping
from io import BytesIO
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote_to_bytes, urlsplit
from uuid import uuid4

import attrs
import orjson
from twisted.web.server import Request

from gateway.wire import completions
from gateway.wire.errors import ApiError, down, invalid

if TYPE_CHECKING:
    from gateway.web.connections import PoliteChannel

_LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "[::1]"})

#: A body that is longer than this many times the limit is not even read to its end.
_HARD: Final = 4

#: Pieces that a body may come in whatever their size, and bytes that they must have beyond that, on
#: average: a chunk takes the same time whether it has one byte or a thousand.
_PIECES: Final = 1024
_PIECE: Final = 16

#: Headers that we look at, and that must come at most once.
_ONCE: Final = (b"host", b"authorization", b"x-api-key", b"content-length")


@attrs.frozen
class Access:
    """
    The rule of the door.

    Attributes:
        token: what clients must show; None lets everybody in who is on this machine.
        hosts: names under which we may be addressed, beside the loopback ones.
        body_limit: bytes that a body may have.
    """

    token: str | None = attrs.field(repr=False)
    hosts: Collection[str]
    body_limit: int

    def refusal(self, path: str, headers: Mapping[str, str]) -> ApiError | None:
        """
        Why this request may not come in, or None.

        Args:
            path: what it asks for.
            headers: its headers, names in lower case.
        """
        host = _without_port(headers.get("host", "")).lower()
        known = _LOOPBACK.union(map(str.lower, self.hosts))
        # A name can be made to lead here by anybody (DNS rebinding), an address cannot.
        if self.token is not None and _is_address(host):
            known |= {host}
        if host not in known:
            return ApiError(
                "permission_error",
                f"This gateway does not answer to the name {host[:100]!r};"
                " add it to hosts in [gateway] if it should.",
            )
        if not _is_at_home(headers, known):
            return ApiError(
                "permission_error", "Web pages of other places may not use this gateway."
            )
        if path == "/healthz" or self.token is None:
            return None
        authorization = headers.get("authorization", "").removeprefix("Bearer ").strip()
        if is_of_page(path):
            authorization = _password(authorization) or authorization
        for shown in (headers.get("x-api-key", ""), authorization):
            if hmac.compare_digest(shown.encode("latin-1"), self.token.encode()):
                return None
        return ApiError(
            "authentication_error",
            "This gateway wants its token, as x-api-key or as Authorization: Bearer; a browser"
            " asks for it as a password.",
        )


def _is_at_home(headers: Mapping[str, str], known: Collection[str]) -> bool:
    """Whether no page of another place is behind a request; a link that led here is none."""
    origin = headers.get("origin", "")
    if origin:
        return _without_port(_place(origin)) in known
    # An image or a script has no origin, but its browser says this.
    is_from_elsewhere = headers.get("sec-fetch-site") == "cross-site"
    return not is_from_elsewhere or headers.get("sec-fetch-mode") == "navigate"


def is_of_page(path: str) -> bool:
    """Whether a browser asks there for the page, or for a part of it."""
    return path == "/" or path.startswith("/page/")


def is_own_page(headers: Mapping[str, str], *, posted: bool) -> bool:
    """
    Whether a browser says that a request comes from a page of ours.

    A page that another server on this machine shows is none.  A browser puts the origin to
    everything that is posted; of what it only gets it may keep silent.
    """
    if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        return False
    origin = headers.get("origin")
    if origin is None:
        return not posted
    return _place(origin) == headers.get("host", "").lower()


def _password(authorization: str) -> str:
    """What HTTP Basic authentication shows as the password; "" where it is something else."""
    scheme, _, shown = authorization.partition(" ")
    if scheme.lower() != "basic":
        return ""
    try:
        return b64decode(shown, validate=True).partition(b":")[2].decode("latin-1")
    except ValueError:
        return ""


def _is_address(host: str) -> bool:
    try:
        ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True


def _place(origin: str) -> str:
    """The host and the port of an origin; "-", which nobody is called, where it is none."""
    try:
        return urlsplit(origin).netloc.lower() or "-"
    except ValueError:
        return "-"


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdigit() else host


class BoundedRequest(Request):
    """
    A request that is checked when all of it is there, and whose body stays within the limit.

    A refusal waits for the end of the body: an answer before that could be lost with the
    connection, since the client is still sending.  A client that asks first (``Expect``), or that
    sends far too much, is told at once.
    """

    access: Access
    channel: PoliteChannel
    length = 0
    pieces = 0

    def __init__(self, channel: PoliteChannel, *args: Any, **kwargs: Any) -> None:
        super().__init__(channel, *args, **kwargs)
        self.request_id = f"req_{uuid4().hex}"
        self.defaultContentType = None

    def gotLength(self, length: int | None) -> None:
        """All headers are there; raises ApiError where nothing more is wanted."""
        self.content = BytesIO()
        limit = self.access.body_limit
        if not self.requestHeaders.hasHeader(b"expect"):
            limit *= _HARD
        if length is not None and length > limit:
            raise self._too_large()

    def handleContentChunk(self, data: bytes) -> None:
        """A piece of the body is there; raises ApiError where nothing more is wanted."""
        self.length += len(data)
        self.pieces += 1
        if self.length <= self.access.body_limit:
            assert self.content is not None
            self.content.write(data)
        elif self.length > self.access.body_limit * _HARD:
            raise self._too_large()
        if self.pieces > _PIECES and self.length < self.pieces * _PIECE:
            raise invalid("The body comes in too many pieces of a few bytes.")

    def header_values(self) -> dict[str, str]:
        """The headers, names in lower case, each with its last value."""
        return header_values(self)

    def process(self) -> None:
        self.setHeader(b"request-id", self.request_id.encode())
        error = self._mistake()
        if error is None:
            super().process()
        else:
            if error.status == 401 and is_of_page(self.path.decode("latin-1")):
                self.setHeader(b"www-authenticate", b'Basic realm="claudegw", charset="UTF-8"')
            refuse(self, error)

    def _mistake(self) -> ApiError | None:
        if self.channel.is_one_too_many:
            return down(
                "As many calls are under way as may be (max_connections in [gateway]); try again."
            )
        if self.length > self.access.body_limit:
            return self._too_large()
        for name in _ONCE:
            if len(self.requestHeaders.getRawHeaders(name, [])) > 1:
                return invalid(f"The header {name.decode()} stands there more than once.")
        try:
            path = self.path.decode("ascii")
            self.method.decode("ascii")
            unquote_to_bytes(path).decode("utf-8")
        except UnicodeDecodeError:
            return invalid("The request line has characters that are not ASCII, or no UTF-8.")
        headers = self.header_values()
        return self.access.refusal(path, headers) or self._unknown(path, headers)

    def _unknown(self, path: str, headers: Mapping[str, str]) -> ApiError | None:
        """What we do not have, although what is below would not mind."""
        if not path.startswith("/") or path.startswith("//"):
            return nothing_there(self)
        encoding = headers.get("content-encoding", "identity").lower()
        if encoding not in ("", "identity"):
            # Nothing is ever unpacked here: a few bytes may be made to become any number of them.
            message = f"A body in the encoding {encoding[:50]!r} is not taken; send it plain."
            return attrs.evolve(invalid(message), status=415)
        return None

    def _too_large(self) -> ApiError:
        limit = self.access.body_limit
        has = f"has {self.length}" if self.length > limit else f"would have more than {limit}"
        return ApiError("request_too_large", f"The body {has} bytes; this gateway takes {limit}.")


def refuse(request: Request, error: ApiError) -> None:
    """Answer `request` with `error`."""
    body = write_error(request, error)
    request.write(body)
    request.finish()


def nothing_there(request: Request) -> ApiError:
    """What `request` asks for is not here."""
    path = request.path.decode("ascii", "replace")[:100]
    method = request.method.decode("ascii", "replace")[:20]
    return ApiError("not_found_error", f"There is no {method} {path} here.")


def speaks_openai(request: Request) -> bool:
    """Whether this request wants to be answered in the words of the OpenAI API."""
    return completions.is_meant(request.path.decode("latin-1"), header_values(request))


def header_values(request: Request) -> dict[str, str]:
    """The headers of `request`, names in lower case, each with its last value."""
    return {
        name.decode("latin-1").lower(): values[-1].decode("latin-1")
        for name, values in request.requestHeaders.getAllRawHeaders()
    }


def write_error(request: Request, error: ApiError) -> bytes:
    """Set the status and the headers that `error` wants, and give its body."""
    if speaks_openai(request):
        status, envelope = completions.status(error), completions.envelope(error)
    else:
        status, envelope = error.status, error.envelope(getattr(request, "request_id", ""))
    request.setResponseCode(status)
    request.setHeader(b"content-type", b"application/json")
    for name, value in error.headers().items():
        request.setHeader(name.encode(), value.encode())
    body = orjson.dumps(envelope)
    request.setHeader(b"content-length", b"%d" % len(body))
    return body
