"""Who may come in, and what the door says of itself."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping

import orjson
import pytest

from gateway.web.access import Access
from gateway.wire.errors import ApiError
from tests.house import HELLO, Household, turn

TOKEN = "a token of the tests"


def refusal(
    path: str = "/v1/messages",
    headers: Mapping[str, str] | None = None,
    *,
    token: str | None = None,
    hosts: tuple[str, ...] = (),
    host: str = "localhost",
) -> ApiError | None:
    """Why a request with these headers is refused."""
    return Access(token, hosts, 1024).refusal(path, {"host": host, **(headers or {})})


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "localhost:9090",
        "LocalHost:80",
        "127.0.0.1",
        "127.0.0.1:9090",
        "[::1]",
        "[::1]:9090",
    ],
)
def test_loopback_names_are_ours(host: str) -> None:
    """Each way to write loopback is let in, with a port and without."""
    assert refusal(host=host) is None


@pytest.mark.parametrize(
    "host",
    [
        "",
        ":9090",
        "example.org",
        "localhost.example.org",
        "example.org:9090",
        "localhost:9090:9090",
        "localhost@example.org",
        "user@localhost",
        "127.0.0.1.example.org",
        "127.1",
        "0.0.0.0",
        "[::]",
        "::1",
        "[::1",
        "localhost:port",
        "studio.local",
    ],
)
def test_other_names_are_not(host: str) -> None:
    """A name that is not ours is refused, even if it leads here (DNS rebinding)."""
    error = refusal(host=host)
    assert error is not None
    assert (error.status, error.kind) == (403, "permission_error")
    assert "hosts" in error.message


@pytest.mark.parametrize("host", ["10.0.0.7:9090", "[fe80::1]:9090"])
def test_a_page_under_an_address_is_at_home(host: str) -> None:
    """Where a token lets it be shown there its buttons work; another address is another place."""
    headers = {"origin": f"http://{host}", "x-api-key": TOKEN}
    assert refusal(headers=headers, host=host, token=TOKEN) is None
    for elsewhere in ("http://10.0.0.8:9090", "http://studio.local:9090"):
        error = refusal(headers=headers | {"origin": elsewhere}, host=host, token=TOKEN)
        assert error is not None
        assert error.status == 403


def test_no_host_is_refused() -> None:
    """A request that does not say whom it means is not let in."""
    error = Access(None, (), 1024).refusal("/v1/messages", {})
    assert error is not None
    assert error.status == 403


@pytest.mark.parametrize(
    "host", ["studio.local", "studio.local:9090", "STUDIO.local", "10.0.0.7:1"]
)
def test_names_of_the_configuration_are_ours_too(host: str) -> None:
    """`hosts` adds names to the loopback ones, whatever the port and the capitals."""
    hosts = ("Studio.local", "10.0.0.7")
    assert refusal(host=host, hosts=hosts) is None
    assert refusal(host="localhost", hosts=hosts) is None
    assert refusal(host="other.local", hosts=hosts) is not None


@pytest.mark.parametrize(
    "headers",
    [
        {"x-api-key": TOKEN},
        {"authorization": f"Bearer {TOKEN}"},
        {"authorization": TOKEN},
        {"x-api-key": "another one", "authorization": f"Bearer {TOKEN}"},
        {"x-api-key": TOKEN, "authorization": "Bearer another one"},
    ],
    ids=str,
)
def test_the_token_opens(headers: Mapping[str, str]) -> None:
    """The token may be shown as either header, also beside a key for somebody else."""
    assert refusal("/v1/messages", headers, token=TOKEN) is None


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"x-api-key": ""},
        {"authorization": ""},
        {"authorization": "Bearer "},
        {"x-api-key": "wrong"},
        {"x-api-key": TOKEN[:-1]},
        {"x-api-key": f"{TOKEN}x"},
        {"authorization": f"Basic {TOKEN}"},
        {"authorization": f"Bearer {TOKEN} {TOKEN}"},
        {"x-api-key": "t\xf6ken"},
        {"cookie": TOKEN},
    ],
    ids=str,
)
def test_nothing_else_does(headers: Mapping[str, str]) -> None:
    """Without the very token there is a 401 that says how to show it, and not what it is."""
    error = refusal("/v1/messages", headers, token=TOKEN)
    assert error is not None
    assert (error.status, error.kind) == (401, "authentication_error")
    assert "x-api-key" in error.message
    assert TOKEN not in error.message


def test_without_a_token_any_key_will_do() -> None:
    """Clients must send some key; a gateway without a token does not care which."""
    assert refusal("/v1/messages", {"x-api-key": "whatever"}) is None
    assert refusal() is None


def test_health_needs_no_token_but_a_name() -> None:
    """A watchdog need not know the token; a web page still cannot look."""
    assert refusal("/healthz", token=TOKEN) is None
    assert refusal("/healthz", token=TOKEN, host="example.org") is not None
    assert refusal("/healthz/", token=TOKEN) is not None
    assert refusal("/status", token=TOKEN) is not None


def test_access_does_not_show_its_token() -> None:
    """Who prints it learns nothing."""
    assert TOKEN not in repr(Access(TOKEN, (), 1024))


@pytest.mark.parametrize("path", ["/", "/api/hello"])
def test_warming_up(path: str) -> None:
    """HEAD on the client's two warm-up paths is a 200 without a body."""
    house = Household.built()
    browser = house.browser()
    browser.get(path, method="HEAD")
    house.settle()
    assert browser.status == 200
    assert browser.body == b""
    assert browser.headers["request-id"].startswith("req_")
    assert house.main.asked == house.small.asked == []


def test_health_is_well_whatever_the_servers_do() -> None:
    """`/healthz` is a 200 also while the servers load."""
    house = Household.built(token=TOKEN)
    house.main.status = house.small.status = 503
    browser = house.browser()
    browser.get("/healthz")
    house.settle()
    assert (browser.status, browser.json) == (200, {"status": "ok"})
    assert browser.headers["content-type"] == "application/json"


def test_status_shows_calls_and_none_of_their_words() -> None:
    """`/status` has the tiers, what is under way and what was; no token, no prompt, no answer."""
    house = Household.built(token=TOKEN)
    wrong = house.ask(turn("a secret", temperature="hot"), x_api_key=TOKEN)
    assert wrong.status == 400
    house.ask(turn("a secret", system="a secret", stream=True), x_api_key=TOKEN)
    house.ask(turn("a secret"), x_api_key=TOKEN)
    house.ask(turn("a secret"), x_api_key="not the token, but a secret")
    house.main.held[0].begin()
    house.main.held[0].send(*HELLO[:3])
    house.wait(2)
    browser = house.browser()
    browser.get("/status", x_api_key=TOKEN)
    house.settle()
    status = browser.json
    assert browser.status == 200
    assert browser.headers["content-type"] == "application/json"
    assert status.keys() >= {"version", "tiers", "calls", "last"}
    assert status["tiers"].keys() == {"main", "small"}
    main = status["tiers"]["main"]
    assert (main["slots"], main["running"], main["waiting"], main["settling"]) == (1, 1, 1, 0)
    assert main["server"]["n_ctx"] == 4096
    assert status["tiers"]["small"]["server"] is None
    running, waiting = status["calls"]
    assert running["outcome"] == "running"
    assert waiting["outcome"] == "waiting"
    assert (waiting["waited"], waiting["took"]) == (2, 0)
    assert running["id"].startswith("req_")
    assert running["tier"] == "main"
    (last,) = status["last"]
    assert last["outcome"] == "400 invalid_request_error"
    said = browser.raw
    for secret in (TOKEN, "secret", "Hello"):
        assert secret.encode() not in said


def test_status_wants_the_token() -> None:
    """What the house does is not everybody's business."""
    house = Household.built(token=TOKEN)
    browser = house.browser()
    browser.get("/status")
    house.settle()
    assert browser.status == 401
    assert orjson.loads(browser.body)["error"]["type"] == "authentication_error"


def test_no_web_page_may_read_an_answer() -> None:
    """No answer carries a header that would let a page of another origin read it."""
    house = Household.built()
    for method, path in (("GET", "/status"), ("OPTIONS", "/v1/messages"), ("HEAD", "/")):
        browser = house.browser()
        browser.get(path, method=method, origin="http://localhost:3000")
        house.settle()
        assert browser.status is not None
        assert not any(name.startswith("access-control") for name in browser.headers)


def test_the_token_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is shown, as a password too, goes whole into one that says only yes or no."""
    seen: list[tuple[bytes, bytes]] = []

    def compare(shown: bytes, token: bytes) -> bool:
        seen.append((shown, token))
        return False

    monkeypatch.setattr("hmac.compare_digest", compare)
    password = b64encode(f"me:{TOKEN}".encode()).decode()
    for headers in ({"x-api-key": TOKEN}, {"authorization": f"Bearer {TOKEN}"}):
        assert refusal(headers=headers, token=TOKEN) is not None
    assert refusal("/", {"authorization": f"Basic {password}"}, token=TOKEN) is not None
    assert [shown for shown, _ in seen if shown] == [TOKEN.encode()] * 3
    assert {token for _, token in seen} == {TOKEN.encode()}


@pytest.mark.parametrize(
    ("headers", "may"),
    [
        ({"origin": "http://localhost:9090"}, True),
        ({"origin": "http://example.org"}, False),
        ({"origin": "http://localhost.example.org"}, False),
        ({"origin": "null"}, False),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}, False),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "websocket"}, False),
        ({"sec-fetch-site": "cross-site"}, False),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, True),
        ({"sec-fetch-site": "same-origin", "sec-fetch-mode": "cors"}, True),
        ({"sec-fetch-site": "none", "sec-fetch-mode": "navigate"}, True),
    ],
    ids=str,
)
def test_a_page_of_another_place_is_refused(headers: Mapping[str, str], may: bool) -> None:
    """What it asks for, posts or shows as an image gets nothing; a link to our page leads there."""
    for token, shown in ((None, {}), (TOKEN, {"x-api-key": TOKEN})):
        error = refusal("/status", {**shown, **headers}, token=token)
        assert (error is None) is may


def test_an_address_is_no_name() -> None:
    """With a token any address may be asked for: nobody can make it lead elsewhere."""
    headers = {"host": "192.168.1.5:9090", "x-api-key": "sesame"}
    assert Access("sesame", (), 1024).refusal("/status", headers) is None
    without = Access(None, (), 1024).refusal("/status", headers)
    assert without is not None
    assert without.status == 403
