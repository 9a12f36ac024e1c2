"""Bodies on the disk: nowhere unless they are wanted, bounded, private, and without a key."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
from twisted.internet.defer import Deferred, maybeDeferred
from twisted.logger import LogEvent, formatEvent

from gateway.capture import MOST, Capture, forms, secrets
from gateway.config import MIB, Config, parse
from gateway.policy.calls import KINDS
from tests.house import HELLO, Browser, Household, turn


def here(work: Callable[..., Any], *given: Any) -> Deferred[Any]:
    """In the thread of the test."""
    return maybeDeferred(work, *given)


def capturing(folder: Path, budget: int = MIB, *hidden: str) -> Capture:
    return Capture(folder / "capture", budget, forms(hidden), here)


def answered(house: Household, text: str = "hi", **more: Any) -> Browser:
    """One call, and its whole answer."""
    browser = house.ask(turn(text, **more), x_api_key="sesame")
    house.main.held.pop().answer()
    house.settle()
    return browser


def config(**gateway: Any) -> Config:
    """One with a key in each place where there may be one."""
    server = {
        "command": ["llama-server", "--api-key", "in-the-command", "--hf-token", "of-a-hub"],
        "env": {"HF_TOKEN": "in-the-env", "GGML_LOG": "plain-word", "A_KEY": "abc"},
    }
    main = {"url": "http://h:1", "api_key": "of-the-tier", "server": server}
    return parse({"gateway": {"token": "of-the-door", **gateway}, "tier": {"main": main}}, KINDS)


def test_nothing_is_kept_unless_it_is_wanted(tmp_path: Path) -> None:
    """By itself it is off, and /status says that it is."""
    assert Capture.of(config(state_dir=str(tmp_path))) is None
    house = Household.built()
    answered(house)
    browser = house.browser()
    browser.get("/status")
    house.settle()
    assert browser.json["capture"] is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stream", [True, False])
def test_what_was_asked_and_told_is_kept(tmp_path: Path, stream: bool) -> None:
    """As it came and as it went, for the owner alone, and without a header."""
    house = Household.built(token="sesame")
    house.api.capture = capturing(tmp_path)
    before = os.umask(0)
    try:
        if stream:  # a folder that was there, for everybody
            (tmp_path / "capture").mkdir(0o777)
        browser = answered(house, "a private word", stream=stream)
    finally:
        os.umask(before)
    folder = tmp_path / "capture"
    (path,) = folder.iterdir()
    assert path.name == f"{browser.headers['request-id']}.txt"
    assert (path.stat().st_mode & 0o777, folder.stat().st_mode & 0o777) == (0o600, 0o700)
    asked, told = path.read_bytes().split(b"\n\n--- the answer ---\n\n")
    assert asked == orjson.dumps(turn("a private word", stream=stream))
    assert told == browser.body
    assert b"sesame" not in path.read_bytes()
    status = house.api.capture.status()
    assert status == {"folder": str(folder), "budget": MIB, "written": 1, "lost": 0}


def test_a_refusal_and_a_client_that_leaves_are_kept(tmp_path: Path) -> None:
    """What was asked, and as much as was told."""
    house = Household.built()
    house.api.capture = capturing(tmp_path)
    house.ask(b"{broken")
    browser = house.ask(turn(stream=True))
    held = house.main.held.pop()
    held.begin()
    held.send(*HELLO[:3])
    house.settle()
    browser.leave()
    house.settle()
    kept = [path.read_bytes() for path in sorted((tmp_path / "capture").iterdir())]
    assert any(each.startswith(b"{broken\n\n") for each in kept)
    assert any(b"Hello" in each and b"message_stop" not in each for each in kept)


def test_a_long_answer_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept of one stays within a bound, in memory too."""
    monkeypatch.setattr("gateway.web.api.MOST", 300)
    assert MOST < 32 * MIB
    house = Household.built()
    house.api.capture = capturing(tmp_path)
    browser = answered(house, stream=True)
    (path,) = (tmp_path / "capture").iterdir()
    told = path.read_bytes().partition(b"--- the answer ---\n\n")[2]
    assert 300 <= len(told) < len(browser.body)
    assert browser.body.startswith(told)


def test_keys_are_blotted_out(tmp_path: Path) -> None:
    """Those of the configuration in either form, and those that look like one."""
    capture = capturing(tmp_path, MIB, 'pass"word', "pass", "of-the-door")
    body = orjson.dumps({"a": 'my pass"word is', "b": "of-the-door", "c": "no secret"})
    assert capture.without_keys(body) == b'{"a":"my *** is","b":"***","c":"no secret"}'
    for key in (
        *(b"sk-ant-api03-abcdefgh", b"Bearer abcdefgh.ijk", b"bearer  12345678"),
        *(b"ghp_0123456789abcdef", b"AKIA0123456789ABCDEF", b"hf_0123456789"),
        *(b"x-api-key: 0123456789", b"Basic dXNlcjpwYXNz"),
    ):
        assert b"***" in capture.without_keys(b'curl -H "x: %b"' % key)
        assert key[-8:] not in capture.without_keys(b'curl -H "x: %b"' % key)
    plain = b"a task-force, the bearer of news, sk-8"
    assert capture.without_keys(plain) == plain
    capture.keep("req_1", body, body)
    assert b"of-the-door" not in (tmp_path / "capture" / "req_1.txt").read_bytes()


def told(*events: Any) -> bytes:
    """A stream of these events."""
    return b"".join(b"data: %b\n\n" % orjson.dumps(event) for event in events)


@pytest.mark.parametrize(
    "event",
    [
        lambda said: {"index": 1, "delta": {"type": "text_delta", "text": said}},
        lambda said: {"index": 1, "delta": {"partial_json": said}},
        lambda said: {"choices": [{"index": 0, "delta": {"content": said}}]},
        lambda said: {
            "choices": [{"delta": {"tool_calls": [{"index": 0, "function": {"arguments": said}}]}}]
        },
        lambda said: {"choices": [{"index": 0, "text": said}]},
    ],
)
def test_a_key_in_pieces_is_blotted_out(tmp_path: Path, event: Callable[[str], Any]) -> None:
    """A model says a few letters at a time; what is around the key, and other events, stay."""
    capture = capturing(tmp_path, MIB, "of-the-door")
    ping = {"type": "ping"}
    said = told(*map(event, ("it is of", "-the", "-d")), ping, event("oor, Bea"), event("rer 12"))
    said += told(*map(event, ("345678", " or höher"))) + b"data: {broken"
    blotted = told(*map(event, ("it is ***", "", "")), ping, event(", Bea"), event("rer ***"))
    blotted += told(*map(event, ("", " or höher"))) + b"data: {broken"
    capture.keep("req_1", b"", said)
    kept = (tmp_path / "capture" / "req_1.txt").read_bytes()
    assert kept.partition(b"--- the answer ---\n\n")[2] == blotted


def test_pieces_of_two_blocks_are_no_key(tmp_path: Path) -> None:
    """Only what one block says belongs together, whatever stands between."""
    capture = capturing(tmp_path, MIB, "of-the-door")
    pieces = [(0, "of-the"), (1, "of-the"), (1, "-door"), (0, "-hook")]
    events = [{"index": index, "delta": {"text": text}} for index, text in pieces]
    capture.keep("req_1", b"", told(*events))
    kept = (tmp_path / "capture" / "req_1.txt").read_bytes()
    events[1:3] = [{"index": 1, "delta": {"text": text}} for text in ("***", "")]
    assert kept.endswith(told(*events))


def test_all_keys_of_the_configuration_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the door, of each tier and of its server; not every word of its environment."""
    of_servers = {"in-the-command", "of-a-hub", "in-the-env"}
    assert set(secrets(config())) == {"of-the-door", "of-the-tier", *of_servers}
    monkeypatch.setenv("THEIR_KEY", "of-the-env")
    elsewhere = {"url": "http://h:1", "api_key_env": "THEIR_KEY"}
    assert [*secrets(parse({"tier": {"main": elsewhere}}, KINDS))] == ["of-the-env"]
    capture = Capture.of(config(capture=3))
    assert capture is not None
    assert capture.budget == 3 * MIB
    assert b"of-the-tier" not in capture.without_keys(b"it is of-the-tier")
    assert "of-the" not in repr(capture)


def test_the_folder_is_bounded(tmp_path: Path) -> None:
    """The oldest go; one that would not fit at all is not kept, and costs no other its place."""
    capture = capturing(tmp_path, 1000)
    folder = tmp_path / "capture"
    for number in range(5):
        capture.keep(f"req_{number}", b"a" * 200, b"b" * 200)
        os.utime(folder / f"req_{number}.txt", (number, number))
    assert sorted(path.name for path in folder.iterdir()) == ["req_3.txt", "req_4.txt"]
    capture.keep("req_5", b"a" * 2000, b"")
    assert sorted(path.name for path in folder.iterdir()) == ["req_3.txt", "req_4.txt"]
    assert (capture.written, capture.lost) == (5, 1)


def test_too_many_at_once_are_counted(tmp_path: Path) -> None:
    """A disk that hangs holds few of them in memory, and they are written one by one."""
    hangs: list[Deferred[None]] = []

    def hang(*_: Any) -> Deferred[None]:
        hangs.append(Deferred())
        return hangs[-1]

    capture = Capture(tmp_path, MIB, (), hang)
    for number in range(20):
        capture.keep(f"req_{number}", b"", b"")
    assert (len(hangs), capture.lost) == (1, 4)
    for number in range(16):
        hangs[number].callback(None)
    assert (len(hangs), capture.written) == (16, 16)
    capture.keep("req_20", b"", b"")
    assert len(hangs) == 17


def test_a_folder_that_cannot_be_written_harms_no_call(
    tmp_path: Path, logged: list[LogEvent]
) -> None:
    """It is answered, and the log says what is wrong, without a word of the call."""
    (tmp_path / "capture").write_text("a file in its place")
    house = Household.built()
    house.api.capture = capturing(tmp_path)
    assert answered(house, "a private word").status == 200
    assert house.api.capture.lost == 1
    said = "\n".join(formatEvent(event) or "" for event in logged)
    assert "a call's bodies are not kept" in said
    assert "private" not in said
