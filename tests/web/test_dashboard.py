"""The page over HTTP: who may see it, what its stream says and costs, what its buttons do."""

from __future__ import annotations

from base64 import b64encode
from typing import Any, Final

import orjson
import pytest
from twisted.internet.defer import Deferred
from twisted.logger import LogEvent

from gateway.dispatch import Dispatch
from gateway.web.access import Access, is_own_page
from gateway.wire.errors import invalid
from tests.house import HELLO, Browser, Household, turn

TOKEN: Final = "sesame"

#: What a browser says of a form on our own page.
OURS: Final = {"origin": "http://localhost:9090", "sec_fetch_site": "same-origin"}


def get(house: Household, path: str, method: str = "GET", **headers: str) -> Browser:
    browser = house.browser()
    browser.get(path, method=method, **headers)
    house.settle()
    return browser


def post(house: Household, path: str, **headers: str) -> Browser:
    return house.ask(b"", path, **headers)


def news(browser: Browser) -> list[dict[str, str]]:
    """What a stream has said: sections by their names."""
    parts = browser.body.split(b"\n\n")
    return [orjson.loads(part.removeprefix(b"data: ")) for part in parts if part[:5] == b"data:"]


def producer(browser: Browser) -> Any:
    """What a connection that is full is to be paused by."""
    return browser.wire.producer


def basic(password: str) -> str:
    return "Basic " + b64encode(f"anybody:{password}".encode()).decode()


# --- the page -------------------------------------------------------------------------------------


def test_the_page_is_whole() -> None:
    """Without a script it has all its sections; nothing outside is loaded, nothing is inline."""
    house = Household.built()
    house.ask(turn(stream=True, model="<b>mine</b>"))
    page = get(house, "/")
    assert page.status == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    html = page.body.decode()
    assert html.startswith("<!DOCTYPE html>\n<html lang=")
    for heading in ("Tiers", "Under way", "In line", "Cold prompts", "Last calls"):
        assert f">{heading}</h2>" in html
    assert "&lt;b&gt;mine" in html
    assert "<b>mine" not in html
    assert "//" not in html.replace("http://www.w3.org/2000/svg", "")
    assert "style=" not in html
    assert "onclick" not in html
    assert 'role="alert"' not in html


def test_the_page_lets_nothing_in() -> None:
    """No foreign or inline code, no frame around it, nothing kept; and forms say their origin."""
    headers = get(Household.built(), "/").headers
    policy = headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert headers["referrer-policy"] == "same-origin"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] == "no-store"


def test_a_page_that_is_asked_for_without_end_costs_nothing() -> None:
    """It is drawn four times a second at most; to draw it takes as long as five calls."""
    house = Household.built()
    first = get(house, "/").body
    house.ask(turn(stream=True, model="mine"))
    assert get(house, "/").body == first
    house.clock.advance(0.25)
    assert b"mine" in get(house, "/").body


def test_after_a_button_the_page_is_drawn_anew() -> None:
    """Without a script the page that comes then would stay as it was before."""
    house = Household.built()
    call = house.ask(turn(stream=True, model="mine"))
    house.wait(1)
    path = f"/page/calls/{call.headers['request-id']}/cancel"
    assert path.encode() in get(house, "/").body
    assert post(house, path, **OURS).status == 303
    assert path.encode() not in get(house, "/").body


def test_a_head_is_empty_still() -> None:
    """A client that warms up gets no page."""
    browser = get(Household.built(), "/", method="HEAD")
    assert (browser.status, browser.body) == (200, b"")
    assert "content-security-policy" not in browser.headers


@pytest.mark.parametrize(
    ("name", "kind"), [("page.css", "text/css"), ("page.js", "text/javascript")]
)
def test_its_files(name: str, kind: str) -> None:
    """They come from the package, as what they are."""
    browser = get(Household.built(), f"/page/{name}")
    assert browser.status == 200
    assert browser.headers["content-type"] == f"{kind}; charset=utf-8"
    assert len(browser.body) > 500


@pytest.mark.parametrize("name", ["page.xml", "api.py", "..%2fapi.py", "nothing"])
def test_no_other_files(name: str) -> None:
    """Its template and the code beside it are nobody's business."""
    assert get(Household.built(), f"/page/{name}").status == 404


# --- the stream -----------------------------------------------------------------------------------


def test_the_stream_says_what_changes() -> None:
    """First everything, then only what is another now."""
    house = Household.built()
    page = get(house, "/page/events")
    assert page.headers["content-type"] == "text/event-stream; charset=utf-8"
    (first,) = news(page)
    assert list(first) == ["tiers", "running", "waiting", "cold", "charts", "last"]
    house.wait(1)
    assert len(news(page)) == 1
    house.ask(turn(stream=True))
    house.wait(1)
    assert list(news(page)[1]) == ["tiers", "running"]
    assert "my-model" in news(page)[1]["running"]


def test_a_silent_stream_is_there_still() -> None:
    """A comment now and then, so that one that is gone is found out."""
    house = Household.built()
    page = get(house, "/page/events")
    for _ in range(40):
        house.wait(1)
    assert len(news(page)) == 1
    assert page.body.count(b"\n\n:\n\n") == 1


def test_no_clock_without_a_page() -> None:
    """One for all pages, from the first that comes to the last that leaves."""
    house = Household.built()

    def looks() -> int:
        return sum("Dashboard" in str(call) for call in house.clock.getDelayedCalls())

    get(house, "/").leave()
    assert looks() == 0
    one, other = get(house, "/page/events"), get(house, "/page/events")
    assert len(news(other)) == 1
    assert looks() == 1
    one.leave()
    assert looks() == 1
    other.leave()
    assert looks() == 0
    again = get(house, "/page/events")
    assert len(news(again)) == 1
    assert looks() == 1


def test_nothing_piles_up_for_a_page_that_does_not_read() -> None:
    """It gets the latest when it reads again, and nothing of what was between."""
    house = Household.built()
    slow, page = get(house, "/page/events"), get(house, "/page/events")
    house.ask(turn(stream=True))
    producer(slow).pauseProducing()
    for _ in range(30):
        house.wait(1)
    assert len(news(slow)) == 1
    assert len(news(page)) > 20
    producer(slow).resumeProducing()
    house.wait(1)
    assert len(news(slow)) == 2
    assert news(slow)[1]["running"] == news(page)[-1]["running"]
    producer(slow).stopProducing()


def test_only_so_many_pages() -> None:
    """One more is refused, until one leaves."""
    house = Household.built()
    pages = [get(house, "/page/events") for _ in range(16)]
    assert [page.status for page in pages] == [200] * 16
    assert get(house, "/page/events").status == 529
    pages[3].leave()
    assert get(house, "/page/events").status == 200


def _bug(*_: object) -> None:
    raise KeyError("bug")


def test_a_page_that_cannot_be_drawn_takes_no_place(
    monkeypatch: pytest.MonkeyPatch, logged: list[LogEvent]
) -> None:
    """However often it is asked for, those that come after get theirs."""
    house = Household.built()
    with monkeypatch.context() as patched:
        patched.setattr(Dispatch, "status", _bug)
        for _ in range(20):
            get(house, "/page/events")
    assert get(house, "/page/events").status == 200
    assert logged
    logged.clear()


def test_the_stream_ends_with_the_gateway() -> None:
    """Nobody waits for a page when the gateway stops."""
    house = Household.built()
    page = get(house, "/page/events")
    drained = Deferred.fromCoroutine(house.api.drain(30, house.clock))
    assert drained.called
    assert page.ended
    page.leave()
    assert house.clock.getDelayedCalls() == []


# --- who may --------------------------------------------------------------------------------------


def test_the_token_is_a_password() -> None:
    """A browser is asked for it, and shows it for all of the page; its name does not matter."""
    house = Household.built(token=TOKEN)
    for path in ("/", "/page/events", "/page/page.css"):
        refused = get(house, path)
        assert refused.status == 401
        assert refused.headers["www-authenticate"].startswith("Basic realm=")
        assert get(house, path, authorization=basic(TOKEN)).status == 200
        assert get(house, path, authorization=basic("wrong")).status == 401
        assert get(house, path, x_api_key=TOKEN).status == 200


@pytest.mark.parametrize("path", ["/v1/messages", "/status", "/v1/models", "/pages"])
def test_elsewhere_it_is_none(path: str) -> None:
    """A browser sends a password along for any page that posts here; that must open nothing."""
    headers = {"host": "localhost", "authorization": basic(TOKEN)}
    refusal = Access(TOKEN, (), 1024).refusal(path, headers)
    assert refusal is not None
    assert refusal.status == 401
    browser = get(Household.built(token=TOKEN), path, authorization=basic(TOKEN))
    assert "www-authenticate" not in browser.headers


@pytest.mark.parametrize(
    "shown",
    ["Basic", "Basic ", "Basic !", "Basic " + b64encode(TOKEN.encode()).decode(), "Basic \xe9"],
)
def test_no_password_is_no_token(shown: str) -> None:
    """What cannot be read is refused like what is wrong."""
    headers = {"host": "localhost", "authorization": shown}
    assert Access(TOKEN, (), 1024).refusal("/", headers) is not None


def test_a_password_of_any_letters() -> None:
    """As browsers encode it."""
    headers = {"host": "localhost", "authorization": basic("s\xe9same")}
    assert Access("s\xe9same", (), 1024).refusal("/", headers) is None


@pytest.mark.parametrize(
    ("headers", "gets", "posts"),
    [
        ({}, True, False),
        ({"origin": "http://localhost:9090"}, True, True),
        ({"origin": "http://LOCALHOST:9090", "sec-fetch-site": "same-origin"}, True, True),
        ({"origin": "https://localhost:9090"}, True, True),
        ({"origin": "http://localhost:3000"}, False, False),
        ({"origin": "http://localhost"}, False, False),
        ({"origin": "http://127.0.0.1:9090"}, False, False),
        ({"origin": "null"}, False, False),
        ({"origin": ""}, False, False),
        ({"sec-fetch-site": "same-origin"}, True, False),
        ({"sec-fetch-site": "none"}, True, False),
        ({"sec-fetch-site": "same-site"}, False, False),
        ({"sec-fetch-site": "cross-site"}, False, False),
        ({"origin": "http://localhost:9090", "sec-fetch-site": "cross-site"}, False, False),
    ],
    ids=str,
)
def test_whose_page_it_is(headers: Any, gets: bool, posts: bool) -> None:
    """The same name and port; a page of another port on this machine is another's."""
    said = {"host": "localhost:9090", **headers}
    assert is_own_page(said, posted=False) is gets
    assert is_own_page(said, posted=True) is posts


# --- the buttons ----------------------------------------------------------------------------------


BUTTONS: Final = ("/page/calls/req_1/cancel", "/page/tiers/main/save", "/page/tiers/main/restart")


@pytest.mark.parametrize("path", BUTTONS)
@pytest.mark.parametrize("origin", ["", "http://localhost:3000", "null"])
def test_only_our_own_page_has_buttons(path: str, origin: str) -> None:
    """Neither another page nor one that does not say which it is; and a GET does nothing."""
    house = Household.built()
    headers = {"origin": origin} if origin else {}
    assert post(house, path, **headers).status == 403
    assert get(house, path).status == 404


@pytest.mark.parametrize("path", BUTTONS)
def test_a_button_wants_the_token(path: str) -> None:
    """Our own page alone is not enough where there is one."""
    house = Household.built(token=TOKEN)
    assert post(house, path, **OURS).status == 401
    shown = post(house, path, **OURS, authorization=basic(TOKEN))
    assert shown.status in (400, 404)


def test_a_call_is_cancelled() -> None:
    """The page comes back without it."""
    house = Household.built()
    call = house.ask(turn(stream=True))
    house.wait(1)
    path = f"/page/calls/{call.headers['request-id']}/cancel"
    done = post(house, path, **OURS)
    assert (done.status, done.headers["location"], done.body) == (303, "/", b"")
    assert house.main.held[0].left
    again = post(house, path, **OURS)
    assert again.status == 404
    assert b'<p role="alert" class="notice">This call has ended already.</p>' in again.body
    assert b"</html>" in again.body


def test_a_count_has_no_button() -> None:
    """It is over before anybody could press it."""
    house = Household.built()
    with house.api.dispatch.ledger.call("req_1") as record:
        record.kind = "count"
        shown = get(house, "/").body
    assert b">count<" in shown
    assert b"/cancel" not in shown


def test_a_slot_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page comes back once it is; or says why it is not."""
    house = Household.built()
    saving: Deferred[None] = Deferred()

    async def save(self: object) -> None:
        assert self is house.api.dispatch.tiers["main"].cache
        await saving

    with monkeypatch.context() as patched:
        patched.setattr("gateway.tier.cache.Cache.save", save)
        done = post(house, "/page/tiers/main/save", **OURS)
    assert done.raw == b""
    saving.callback(None)
    assert (done.status, done.headers["location"]) == (303, "/")
    refused = post(house, "/page/tiers/small/save", **OURS)
    assert refused.status == 400
    assert b"No snapshots are taken of tier" in refused.body


def test_a_server_of_somebody_else_is_not_restarted() -> None:
    """The page says so."""
    refused = post(Household.built(), "/page/tiers/main/restart", **OURS)
    assert refused.status == 400
    assert b"is started by somebody else" in refused.body


def test_a_tier_that_is_gone() -> None:
    """A reload may have taken it away."""
    assert post(Household.built(), "/page/tiers/large/restart", **OURS).status == 404


def test_a_restart_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the tier makes of it."""
    house, asked = Household.built(), []

    async def restart(self: object) -> None:
        asked.append(self)
        if len(asked) > 1:
            raise invalid("no")

    monkeypatch.setattr("gateway.tier.tier.Tier.restart", restart)
    assert post(house, "/page/tiers/small/restart", **OURS).status == 303
    assert asked == [house.api.dispatch.tiers["small"]]
    assert post(house, "/page/tiers/small/restart", **OURS).status == 400


def test_last_calls_are_shown() -> None:
    """A call that was answered stands there with what it cost."""
    house = Household.built()
    house.ask(turn())
    house.main.held[0].answer(*HELLO)
    house.settle()
    html = get(house, "/").body.decode()
    assert ">answered<" in html
    assert 'data-name="share">43 %<' in html
