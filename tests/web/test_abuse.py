"""
What is done to a port by those who mean no good, byte by byte, and what each gets.

`ABUSES` is what has an answer at once; `bench.abuse` throws it at a real gateway, with much more
that takes time or thousands of sockets.  Bodies and headers that are merely wrong are in
`tests.web.test_malformed`.
"""

from __future__ import annotations

import gc
import gzip
from typing import NamedTuple

import orjson
import pytest
from twisted.web.http_headers import _nameEncoder

from gateway.web.connections import BREATH, LINGER, SPARE, ConnectionLimits
from tests.house import HELLO, Browser, Household, turn

LIMIT = 20_000
TURN = orjson.dumps(turn())
STREAM = orjson.dumps(turn(stream=True))

POST = "POST /v1/messages HTTP/1.1"
HEALTH = "GET /healthz HTTP/1.1"


def head(first: str, *lines: str, host: str = "host: localhost") -> bytes:
    """A head, as it should be but for what is given."""
    return "".join(f"{line}\r\n" for line in (first, host, *lines)).encode("latin-1") + b"\r\n"


def post(body: bytes, *lines: str, version: str = "1.1") -> bytes:
    """A whole call."""
    return head(f"POST /v1/messages HTTP/{version}", f"content-length: {len(body)}", *lines) + body


def chunked(raw: bytes) -> bytes:
    """A call with these bytes as its chunks."""
    return head(POST, "transfer-encoding: chunked") + raw


def chunk(body: bytes, extension: bytes = b"") -> bytes:
    return b"%x%b\r\n%b\r\n" % (len(body), extension, body)


class Abuse(NamedTuple):
    """
    Something that gets its answer at once.

    Attributes:
        name: what it is called.
        raw: the bytes.
        status: of the answer.
        ends: whether the connection ends with it.
    """

    name: str
    raw: bytes
    status: int
    ends: bool = True


_TLS = bytes.fromhex("16030100f4010000f00303") + b"\x01" * 200

_NO_HTTP = [
    Abuse("a TLS hello", _TLS, 400),
    Abuse("bytes without meaning", b"\x80\x81\x00\xff" * 500, 400),
    Abuse("HTTP/0.9", b"GET /healthz\r\n", 400),
    Abuse("the preface of HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    Abuse("another protocol", b"SSH-2.0-OpenSSH_9.9\r\n", 400),
    Abuse("empty lines", b"\r\n" * 50, 400),
]

_HEADERS = [
    Abuse("a header of 20 kB", head(HEALTH, f"x: {'a' * 20_000}"), 400),
    Abuse("a header's name of 15 kB", head(HEALTH, f"{'a' * 15_000}: x"), 400),
    Abuse("headers of 1 MB", head(HEALTH, *[f"x: {'a' * 1000}"] * 1000), 400),
    Abuse("501 headers", head(HEALTH, *["x: y"] * 501), 400),
    Abuse("NUL in a header", head(HEALTH, "x: a\0b"), 400),
    Abuse("NUL in a header's name", head(HEALTH, "x\0: a"), 400),
    Abuse("CR in a header", head(HEALTH, "x: a\rb"), 400),
    Abuse("LF in a header", head(HEALTH, "x: a\nhost: evil.example"), 400),
    Abuse("a folded header", head(HEALTH, "x: a", " b"), 200, ends=False),
    Abuse("a folded first header", head(HEALTH, host=" host: localhost"), 400),
    Abuse("no Host", head(HEALTH, host="x: y"), 403, ends=False),
    Abuse("two Hosts", head(HEALTH, "host: localhost"), 400, ends=False),
    Abuse("a Host of elsewhere", head(HEALTH, host="host: evil.example"), 403, ends=False),
    Abuse("a web page's Origin", head(HEALTH, "origin: https://evil.example"), 403, ends=False),
    Abuse("a sandbox's Origin", head(HEALTH, "origin: null"), 403, ends=False),
    Abuse("an Origin that is none", head(HEALTH, "origin: http://["), 403, ends=False),
    Abuse("garbage for cookies", head(HEALTH, "cookie: =;;\xff=\xfe; a"), 200, ends=False),
    Abuse("an upgrade to HTTP/2", head(HEALTH, "upgrade: h2c"), 200, ends=False),
    Abuse("an upgrade to WebSocket", head(HEALTH, "upgrade: websocket"), 200, ends=False),
    Abuse("gzip", post(gzip.compress(b" " * 10**6), "content-encoding: gzip"), 415, ends=False),
]

_LENGTHS = [
    Abuse("a negative length", head(POST, "content-length: -1"), 400),
    Abuse("a length that is no number", head(POST, "content-length: many"), 400),
    Abuse("a length of 4 000 digits", head(POST, f"content-length: {'9' * 4000}"), 413),
    Abuse("a length of 5 000 digits", head(POST, f"content-length: {'9' * 5000}"), 400),
    Abuse("two lengths", head(POST, "content-length: 2", "content-length: 3") + b"{}", 400),
    Abuse(
        "a length and chunks",
        head(POST, "content-length: 2", "transfer-encoding: chunked") + b"{}",
        400,
    ),
    Abuse(
        "too much, with Expect",
        head(POST, "expect: 100-continue", f"content-length: {LIMIT + 1}"),
        413,
    ),
]

_CHUNKS = [
    Abuse("a chunk of negative size", chunked(b"-2\r\n{}\r\n0\r\n\r\n"), 400),
    Abuse("a chunk of size 0x2", chunked(b"0x2\r\n{}\r\n0\r\n\r\n"), 400),
    Abuse("a chunk that has more than it says", chunked(b"1\r\n{}\r\n0\r\n\r\n"), 400),
    Abuse("a chunk extension of 5 kB", chunked(chunk(b"{}", b";" + b"a" * 5000)), 400),
    Abuse("trailers of 100 kB", chunked(chunk(TURN) + b"0\r\n" + b"x: y\r\n" * 20_000), 400),
    Abuse("100 000 chunks of a byte", chunked(chunk(b" ") * 100_000), 400),
    Abuse("chunked twice", head(POST, "transfer-encoding: chunked, chunked"), 400),
]

_PATHS = [
    Abuse(f"the path {path[:20]}", head(f"GET {path} HTTP/1.1"), 404, ends=False)
    for path in (
        *("//", "//healthz", "/../healthz", "/%2e%2e/healthz", "/page/..%2f..%2fetc%2fpasswd"),
        *("/healthz%00", "\\healthz", "healthz", "?", "*", f"/{'a' * 15_000}", "/healthz#x"),
        *("http://evil.example/healthz", "http://localhost/healthz", "/page/%0d%0ax:%20y"),
    )
] + [
    Abuse("a path of 20 kB", head(f"GET /{'a' * 20_000} HTTP/1.1"), 400),
    Abuse("CONNECT", head("CONNECT evil.example:443 HTTP/1.1"), 404, ends=False),
    Abuse("TRACE", head("TRACE / HTTP/1.1"), 404, ends=False),
    Abuse("OPTIONS of all", head("OPTIONS * HTTP/1.1"), 404, ends=False),
    Abuse("a method of nobody", head("FROB /v1/messages HTTP/1.1"), 404, ends=False),
]

ABUSES = [*_NO_HTTP, *_HEADERS, *_LENGTHS, *_CHUNKS, *_PATHS]


def household(limits: ConnectionLimits | None = None) -> Household:
    return Household.built(body_limit=LIMIT, limits=limits)


def send(house: Household, raw: bytes) -> Browser:
    """Send these bytes on a connection of their own, as much at a time as a socket gives."""
    browser = house.browser()
    for start in range(0, len(raw), 65_536):
        browser.send(raw[start : start + 65_536])
    house.settle()
    return browser


def is_refusal(browser: Browser, status: int) -> bool:
    """Whether the answer, and there is one alone, is an error in Anthropic's envelope."""
    said = browser.json
    return (
        browser.status == status
        and browser.raw.count(b"HTTP/1.") == 1
        and said["type"] == "error"
        and said["request_id"] == browser.headers["request-id"]
        and len(said["error"]["message"]) > 20
    )


def begun(house: Household) -> Browser:
    """A call whose answer has begun."""
    browser = send(house, post(STREAM))
    house.main.held[0].begin()
    house.main.held[0].send(*HELLO[:3])
    house.settle()
    assert b"Hello" in browser.raw
    return browser


def ended_well(house: Household, browser: Browser) -> bool:
    """Whether such a call goes on and ends as if nothing had been."""
    house.main.held[0].send(*HELLO[3:])
    house.main.held[0].finish()
    house.settle()
    return browser.ended and browser.events[-1] == {"type": "message_stop"}


@pytest.mark.parametrize("abuse", ABUSES, ids=lambda abuse: abuse.name)
def test_an_abuse_gets_its_answer_and_nobody_else_notices(abuse: Abuse) -> None:
    """One answer, a refusal in Anthropic's envelope, while a stream goes on beside it."""
    house = household()
    beside = begun(house)
    browser = send(house, abuse.raw)
    assert browser.status == abuse.status
    assert abuse.status == 200 or is_refusal(browser, abuse.status)
    assert browser.wire.finished is abuse.ends
    assert ended_well(house, beside)


@pytest.mark.parametrize(
    "abuse", [abuse for abuse in ABUSES if abuse.ends], ids=lambda abuse: abuse.name
)
def test_who_was_turned_away_is_read_no_more(abuse: Abuse) -> None:
    """What comes after a refusal that ends the connection is dropped, and then so is the client."""
    house = household()
    browser = send(house, abuse.raw)
    browser.send(head(HEALTH) * 100)
    house.settle()
    assert browser.raw.count(b"HTTP/1.") == 1
    house.wait(LINGER)
    assert browser.wire.aborted
    assert house.site.connections == set()
    assert house.clock.getDelayedCalls() == []


def test_a_client_that_leaves_once_it_is_turned_away_leaves_nothing() -> None:
    """Its connection ends at once, and no timer waits for that."""
    house = household()
    browser = send(house, _TLS)
    browser.half_close()
    assert house.site.connections == set()
    assert house.clock.getDelayedCalls() == []


# --- slowness -------------------------------------------------------------------------------------


def drip(house: Household, browser: Browser, raw: bytes, every: float) -> None:
    """Send a byte now and then, until the gateway has enough of it."""
    for byte in raw:
        if browser.raw:
            break
        browser.send(bytes([byte]))
        house.wait(every)


def test_headers_that_come_a_byte_at_a_time_get_a_408() -> None:
    """The time limit of a head runs from its first byte; a further byte buys no time."""
    house = household(ConnectionLimits(head=20))
    browser = house.browser()
    drip(house, browser, head(HEALTH), 3)
    assert house.clock.seconds() <= 21
    assert is_refusal(browser, 408)
    assert browser.wire.finished


def test_a_body_that_comes_a_byte_at_a_time_gets_a_408() -> None:
    """The time limit of a body runs from the end of its headers."""
    house = household(ConnectionLimits(body=120))
    browser = send(house, head(POST, f"content-length: {len(TURN)}"))
    drip(house, browser, TURN, 10)
    assert house.clock.seconds() == 120
    assert is_refusal(browser, 408)
    assert house.main.asked == []


@pytest.mark.parametrize(
    "raw",
    [
        post(TURN).replace(b"content-length: ", b"content-length: 1"),
        chunked(b"f" * 900 + b"\r\n{}\r\n0\r\n\r\n"),
        chunked(b"10000000000000002\r\n{}\r\n0\r\n\r\n"),
        head(HEALTH).replace(b"\r\n", b"\n"),
        b"G",
    ],
    ids=["a length too long", "a size of 900 digits", "2^64 + 2", "no CR", "one byte"],
)
def test_what_never_ends_gets_a_408(raw: bytes) -> None:
    """Who promises more than comes waits for its time limit, and costs nothing until then."""
    house = household()
    browser = send(house, raw)
    assert browser.raw == b""
    house.wait(ConnectionLimits().body)
    assert is_refusal(browser, 408)


def test_a_length_that_is_too_short_ends_the_connection() -> None:
    """The body is refused for what it is, and what is beyond it is no request."""
    house = household()
    browser = send(house, head(POST, f"content-length: {len(TURN) - 3}") + TURN + head(HEALTH))
    house.wait(BREATH)
    statuses = [each[:3] for each in browser.raw.split(b"HTTP/1.1 ")[1:]]
    assert statuses == [b"400", b"400"]
    assert browser.wire.finished
    assert house.main.asked == []


def test_an_idle_connection_is_closed_without_a_word() -> None:
    """Nothing was asked, so nothing is said; the next client of a pool would read it."""
    house = household(ConnectionLimits(idle=60))
    never, again = house.browser(), send(house, head(HEALTH))
    house.wait(59)
    assert not never.wire.disconnecting
    house.wait(1)
    assert never.wire.disconnecting
    assert again.wire.disconnecting
    assert never.raw == b""
    assert again.raw.count(b"HTTP/1.1") == 1


def test_an_answer_may_take_any_time() -> None:
    """No time limit runs while a request is being answered."""
    house = household()
    beside = begun(house)
    for _ in range(10):
        house.wait(300)
        house.main.held[0].send({"type": "ping"})
    assert not beside.wire.finished
    assert not beside.wire.disconnecting
    assert ended_well(house, beside)


def test_a_client_that_stops_reading_its_stream_gives_its_slot_back() -> None:
    """It counts as gone in the end; until then a call behind it waits."""
    house = household(ConnectionLimits(unread=600))
    browser = begun(house)
    behind = send(house, post(TURN))
    for _ in range(599):  # as the transport does whose buffer is full, whenever a ping is written
        browser.protocol.pauseProducing()
        house.wait(1)
    assert not browser.wire.aborted
    assert len(house.main.held) == 1
    house.wait(1)
    assert browser.wire.aborted
    browser.leave()  # as the transport says of a connection that is no more
    house.settle()
    house.wait(3)
    house.main.held[1].answer()
    house.settle()
    assert behind.status == 200


def test_a_client_that_reads_again_may_take_any_time() -> None:
    """Only a silence counts, however many there are."""
    house = household(ConnectionLimits(unread=600))
    browser = begun(house)
    for _ in range(5):
        browser.protocol.pauseProducing()
        house.wait(500)
        browser.protocol.resumeProducing()
        house.wait(500)
    assert ended_well(house, browser)
    assert not browser.wire.aborted


def test_who_does_not_read_the_last_answer_is_cut() -> None:
    """An answer after which the connection ends cannot hold it for ever."""
    house = household()
    browser = send(house, head(HEALTH, "connection: close"))
    assert browser.wire.disconnecting
    assert not browser.wire.aborted
    house.wait(30)
    assert browser.wire.aborted


# --- several requests at once ---------------------------------------------------------------------


def test_pipelined_requests_are_answered_in_their_order() -> None:
    """A stream, and what came in the same segment behind it."""
    house = household()
    browser = send(house, post(STREAM) + head(HEALTH) + post(b"{}"))
    house.main.held[0].answer()
    for _ in range(3):
        house.wait(BREATH)
    statuses = [each[:3] for each in browser.raw.split(b"HTTP/1.1 ")[1:]]
    assert statuses == [b"200", b"200", b"400"]
    stream, health, _ = browser.raw.split(b"HTTP/1.1 ")[1:]
    assert b"message_stop" in stream
    assert b'{"status":"ok"}' in health


def test_between_many_pipelined_requests_others_have_their_turn() -> None:
    """There is a short time between two of them, however many there are."""
    house = household()
    browser = house.browser()
    browser.send(head(HEALTH) * 100)
    for answered in range(1, 100):
        house.settle()
        assert browser.raw.count(b"HTTP/1.1 200") == answered
        house.clock.advance(BREATH)
    assert browser.raw.count(b"HTTP/1.1 200") == 100


def test_answers_that_are_not_read_do_not_pile_up() -> None:
    """The next of many requests is answered once the client has taken what it got."""
    house = household(ConnectionLimits(idle=60))
    browser = house.browser()
    browser.protocol.pauseProducing()  # as the transport does whose buffer is full
    browser.send(head(HEALTH) * 2)
    house.wait(1)
    assert browser.raw.count(b"HTTP/1.1 200") == 1
    browser.protocol.resumeProducing()
    house.wait(BREATH)
    assert browser.raw.count(b"HTTP/1.1 200") == 2


def test_who_never_reads_its_answers_is_cut() -> None:
    """Such a client counts as idle, not as one that is being answered."""
    house = household(ConnectionLimits(idle=60))
    browser = house.browser()
    browser.protocol.pauseProducing()
    browser.send(head(HEALTH) * 100)
    assert house.site.working == 0
    house.wait(60)
    assert browser.wire.disconnecting
    house.wait(30)
    assert browser.wire.aborted
    assert house.clock.getDelayedCalls() == []


def test_pipelined_requests_of_a_client_that_leaves_are_forgotten() -> None:
    """Also in the moment between two of them."""
    house = household()
    browser = house.browser()
    browser.send(head(HEALTH) * 3)
    browser.leave()
    house.wait(1)
    assert browser.raw.count(b"HTTP/1.1 200") == 1
    assert house.site.connections == set()


def test_what_waits_behind_a_stream_is_not_kept_without_bound() -> None:
    """A client that goes on sending while it is answered is read a few kilobytes further."""
    house = household()
    browser = begun(house)
    sent = 0
    while browser.wire.producerState == "producing" and sent < 10**6:
        browser.send(b"x" * 4096)
        sent += 4096
    assert browser.wire.producerState == "paused"
    assert sent < 30_000


def test_what_waits_behind_a_stream_that_is_not_read_is_bounded_too() -> None:
    """A client that sends on and on, and reads nothing, is read a few kilobytes further as well."""
    house = household()
    browser = begun(house)
    browser.protocol.pauseProducing()  # as the transport does whose buffer is full
    sent = 0
    while browser.wire.producerState == "producing" and sent < 10**6:
        browser.send(b"x" * 4096)
        sent += 4096
    assert sent < 30_000


def test_a_request_that_comes_while_answers_are_not_read_has_to_wait() -> None:
    """However little of it was there when the last answer ended."""
    house = household()
    browser = house.browser()
    browser.protocol.pauseProducing()  # as the transport does whose buffer is full
    for _ in range(3):
        browser.send(head(HEALTH))
        house.wait(1)
    assert browser.raw.count(b"HTTP/1.1 200") == 1
    browser.protocol.resumeProducing()
    for _ in range(2):
        house.wait(BREATH)
    assert browser.raw.count(b"HTTP/1.1 200") == 3


# --- half-closes ----------------------------------------------------------------------------------


def test_a_client_that_half_closes_after_its_answer_gets_all_of_it() -> None:
    """What has been answered still goes out, and then the connection ends."""
    house = household()
    browser = send(house, head(HEALTH))
    browser.half_close()
    assert browser.status == 200
    assert browser.wire.disconnecting


def test_a_client_that_half_closes_while_it_waits_has_left() -> None:
    """Its call is ended, since this is all that is seen of one that left; it is told so."""
    house = household()
    browser = send(house, post(TURN))
    browser.half_close()
    house.settle()
    assert house.main.held[0].left
    assert is_refusal(browser, 400)
    assert "leaving" in browser.json["error"]["message"]
    assert browser.wire.disconnecting


def test_a_client_that_half_closes_within_its_stream_has_left() -> None:
    """The slot is free, and the stream ends without the end that a whole one has."""
    house = household()
    browser = begun(house)
    browser.half_close()
    house.settle()
    assert house.main.held[0].left
    assert browser.raw.count(b"HTTP/1.1") == 1
    assert not browser.ended
    assert browser.wire.disconnecting
    house.wait(10)
    assert house.line().running == 0


@pytest.mark.parametrize("raw", [head(HEALTH)[:-2], post(TURN)[:-5]], ids=["a head", "a body"])
def test_a_request_that_ends_with_a_half_close_is_refused(raw: bytes) -> None:
    """Nothing was asked, and that is what is said."""
    house = household()
    browser = send(house, raw)
    browser.half_close()
    assert is_refusal(browser, 400)
    assert house.main.asked == []
    assert browser.wire.disconnecting


def test_a_half_close_without_a_request_ends_the_connection() -> None:
    """Nothing was asked, so nothing is said."""
    house = household()
    browser = house.browser()
    browser.half_close()
    assert browser.raw == b""
    assert browser.wire.disconnecting


# --- other versions, other ways -------------------------------------------------------------------


def test_http_1_0_gets_a_stream_that_ends_with_the_connection() -> None:
    """No chunks, which it does not know."""
    house = household()
    browser = send(house, post(STREAM, version="1.0"))
    house.main.held[0].answer()
    house.settle()
    assert browser.raw.startswith(b"HTTP/1.0 200")
    assert "transfer-encoding" not in browser.headers
    assert browser.raw.endswith(b'data: {"type":"message_stop"}\n\n')
    assert browser.wire.disconnecting


def test_expect_is_answered_before_the_body() -> None:
    """A client that asks whether it may send is told so, and then answered."""
    house = household()
    browser = send(house, head(POST, "expect: 100-continue", f"content-length: {len(TURN)}"))
    assert browser.raw == b"HTTP/1.1 100 Continue\r\n\r\n"
    browser.send(TURN)
    house.settle()
    house.main.held[0].answer()
    house.settle()
    assert b"HTTP/1.1 200 OK" in browser.raw


def test_trailers_change_nothing() -> None:
    """What stands behind the last chunk is no header: no Host, no key, no length."""
    house = Household.built(token="a token of the tests")
    raw = chunked(chunk(TURN) + b"0\r\nx-api-key: a token of the tests\r\n\r\n")
    browser = send(house, raw)
    assert browser.status == 401


def test_a_chunk_extension_changes_nothing() -> None:
    """A short one is read and ignored."""
    house = household()
    browser = send(house, chunked(chunk(TURN, b";a=b") + b"0\r\n\r\n"))
    house.main.held[0].answer()
    house.settle()
    assert browser.status == 200


# --- very many ------------------------------------------------------------------------------------


def test_of_too_many_idle_connections_the_longest_idle_goes() -> None:
    """There is a bound, and a new client always gets in."""
    house = household(ConnectionLimits(most=10))
    beside = begun(house)
    idle = [house.browser() for _ in range(10_000)]
    assert len(house.site.connections) == 10 + SPARE
    assert not any(browser.wire.aborted for browser in idle[-SPARE:])
    assert all(browser.wire.aborted for browser in idle[: -10 - SPARE])
    assert send(house, head(HEALTH)).status == 200
    assert ended_well(house, beside)


def test_of_too_many_half_requests_the_oldest_goes() -> None:
    """Who has sent a part of a request waits as well, however much it was."""
    house = household(ConnectionLimits(most=10))
    halves = [send(house, post(TURN)[:-5]) for _ in range(100)]
    assert len(house.site.connections) == 10 + SPARE
    assert halves[0].wire.aborted
    assert not halves[-1].wire.aborted


def test_a_connection_that_was_used_goes_after_one_that_was_not() -> None:
    """An answer makes it new again."""
    house = household(ConnectionLimits(most=10))
    used, idle = house.browser(), house.browser()
    used.send(head(HEALTH))
    for _ in range(10 + SPARE - 1):
        house.browser()
    assert idle.wire.aborted
    assert not used.wire.aborted


def test_of_too_many_calls_the_last_is_refused() -> None:
    """Who works is never closed; one more call is told to come back, and nobody else notices."""
    house = household(ConnectionLimits(most=3))
    calls = [send(house, post(TURN)) for _ in range(3)]
    late = send(house, post(TURN))
    assert is_refusal(late, 503)
    assert late.headers["retry-after"] == "5"
    assert "max_connections" in late.json["error"]["message"]
    for number, call in enumerate(calls):
        house.main.held[number].answer()
        house.wait(3)
        assert call.status == 200
    late.send(head(HEALTH))
    house.settle()
    assert b"HTTP/1.1 200" in late.raw


def test_connections_leave_nothing_behind() -> None:
    """Of a thousand clients in every state there is, no connection and no timer stays."""
    house = household()
    for number in range(1000):
        browser = house.browser()
        browser.send((post(TURN) + head(HEALTH))[: number % 199 + 1])
        browser.leave()
    house.settle()
    house.wait(10)
    assert house.site.connections == set()
    assert house.site.working == 0
    assert house.clock.getDelayedCalls() == []


def test_names_of_headers_are_not_kept() -> None:
    """Twisted remembers ten thousand names that it saw; none of them may be long."""
    house = household()
    send(house, head(HEALTH, f"{'y' * 10_000}: x"))
    gc.collect()
    assert max(map(len, _nameEncoder._canonicalHeaderCache)) <= 256
