"""The line below Claude Code's prompt."""

from __future__ import annotations

import io
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.cli import main
from gateway.commands.statusline import drawn, where

Json = Any

PACE = {"prefill": 74.3, "generation": 10.24}
READY = {"main": {"pace": PACE, "process": {"state": "ready"}}, "small": {"pace": {}}}


def call(**about: Json) -> Json:
    """A turn of the session ``ours`` that runs."""
    known = {"kind": "turn", "session": "ours", "tier": "main", "outcome": "running"}
    return {**known, "input": None, "cached": 0, "place": None, "progress": None, **about}


def of(*calls: Json, last: Json = (), tiers: Json = None) -> str:
    """The line of the session ``ours``."""
    status = {"tiers": tiers or READY, "calls": list(calls), "last": list(last)}
    return drawn(status, "ours")


PREFILL = {"fraction": 0.634, "seconds_left": 125.2, "tokens_per_second": 74.0}
TITLE = {"kind": "title", "tier": "small"}


@pytest.mark.parametrize(
    ("about", "shown"),
    [
        ({"progress": PREFILL}, "main · prefill 63 % · 2:05 left · 74.0 tokens/s"),
        ({"progress": {"fraction": None, "seconds_left": 59.4}}, "main · prefill · 59 s left"),
        ({"progress": {"fraction": 1.2}}, "main · prefill 100 %"),
        ({"outcome": "waiting", "place": 2, "eta": 3723}, "main · place 2 in line · 1:02:03 to go"),
        ({"outcome": "waiting"}, "main · waiting"),
        # What is counted before the prefill says nothing of the cache.
        ({"outcome": "waiting", "place": 1, "input": 9}, "main · place 1 in line"),
        ({"input": 30, "cached": 970}, "main · answering · 97 % cached · 10.2 tokens/s"),
        ({}, "main · answering · 10.2 tokens/s"),
    ],
)
def test_what_a_call_does(about: Json, shown: str) -> None:
    """Its tier, how far it is or which place it has, its cached share, and its speed."""
    assert of(call(**about)) == shown


def test_the_turn_comes_first() -> None:
    """Of several calls it is the one that the user waits for, and of those the furthest."""
    waits = call(outcome="waiting", place=1)
    assert of(call(**TITLE), waits) == "main · place 1 in line"
    assert of(waits, call(progress=PREFILL)).startswith("main · prefill")
    assert of(call(outcome="waiting", place=3), waits) == "main · place 1 in line"
    assert of(call(**TITLE)) == "small · answering"
    assert of(call(kind="count")) == "main · ready · 10.2 tokens/s"


def test_another_session_is_none_of_ours() -> None:
    """A call of another session is not shown; one that does not say its session may be ours."""
    assert of(call(session="theirs")) == "main · ready · 10.2 tokens/s"
    assert of(call(session="")) == "main · answering · 10.2 tokens/s"
    assert "answering" in drawn({"tiers": READY, "calls": [call(session="theirs")]}, "")


def test_after_a_turn() -> None:
    """While nothing is under way, the last turn's cached share stands there."""
    past = [
        call(kind="title", tier="small", input=9, cached=1, outcome="answered"),
        call(session="theirs", input=1, cached=1),
        call(input=200, cached=800, outcome="answered"),
    ]
    assert of(last=past) == "main · 80 % cached · 10.2 tokens/s"
    assert of() == "main · ready · 10.2 tokens/s"


def test_a_server_that_is_not_ready() -> None:
    """Its state stands there instead."""
    assert of(tiers={"main": {"process": {"state": "loading"}}}) == "main · loading"
    waits = call(outcome="waiting", place=1)
    assert of(waits, tiers={"main": {"process": {"state": "failed"}}}) == "main · failed"


def test_nothing_steers_the_terminal() -> None:
    """What a name holds is shown, on one line, and nothing more."""
    assert of(call(tier="\x1b[2Jma\nin")) == "?[2Jma?in · answering"


words = st.sampled_from(["tiers", "calls", "last", "main", "progress", "outcome", "tier", "place"])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=4),
)


@given(json_values)
def test_whatever_a_gateway_says(status: Json) -> None:
    """Whatever it is, there is one line."""
    assert drawn(status, "ours").isprintable()


# --- the command ----------------------------------------------------------------------------------


@attrs.define(eq=False)
class Door:
    """
    A gateway.

    Attributes:
        config: a configuration that leads to it.
        said: what it answers.
        status: with which status.
        asked: what it was asked: path, key, host.
    """

    config: Path
    said: bytes = b""
    status: int = 200
    asked: list[tuple[str, str | None, str]] = attrs.field(factory=list)


@pytest.fixture
def door(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Door]:
    """One that wants a key, and may be slow."""
    monkeypatch.setattr("gateway.commands.statusline._PATIENCE", 30.0)
    door = Door(tmp_path / "gw.toml")

    class Answering(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            door.asked.append((self.path, self.headers["x-api-key"], self.headers["host"]))
            self.send_response(door.status)
            self.end_headers()
            self.wfile.write(door.said)

        def log_message(self, *_: Any) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Answering) as server:
        door.config.write_text(
            f"[gateway]\nlisten = 'tcp:{server.server_port}:interface=127.0.0.1'\ntoken = 'key'\n"
        )
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield door
        server.shutdown()
        thread.join()


def shown(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], said: bytes
) -> str:
    """What the command prints when the client says `said`."""
    stdin = SimpleNamespace(isatty=lambda: False, buffer=io.BytesIO(said))
    monkeypatch.setattr("sys.stdin", stdin)
    assert main(["statusline", "--config", str(config)]) == 0
    written = capsys.readouterr()
    assert written.err == ""
    assert written.out.endswith("\n")
    assert written.out.count("\n") == 1
    return written.out.rstrip("\n")


SAID = json.dumps({"session_id": "ours", "model": {"id": "claudegw-main"}}).encode()


def test_the_running_gateway_is_asked(
    door: Door, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once, with the key of its configuration, and the session is the one that the client names."""
    calls = [call(session="theirs"), call(progress=PREFILL)]
    door.said = json.dumps({"tiers": READY, "calls": calls}).encode()
    line = shown(door.config, monkeypatch, capsys, SAID)
    assert line == "main · prefill 63 % · 2:05 left · 74.0 tokens/s"
    host, port, _ = where(str(door.config))
    assert door.asked == [("/status", "key", f"{host}:{port}")]


def test_in_any_locale(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line is UTF-8, as the client reads it."""
    door.said = json.dumps({"tiers": READY}).encode()
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, "ascii"))
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    assert main(["statusline", "--config", str(door.config)]) == 0
    assert written.getvalue().decode() == "main · ready · 10.2 tokens/s\n"


@pytest.mark.parametrize("said", [b"", b"no json", b"[1]", b'{"session_id": 3}', b"[" * 100_000])
def test_a_client_that_says_nothing_of_use(
    said: bytes, door: Door, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Then the line tells of all sessions."""
    door.said = json.dumps({"tiers": READY, "calls": [call()]}).encode()
    assert "answering" in shown(door.config, monkeypatch, capsys, said)


@pytest.mark.parametrize(("said", "status"), [(b"", 200), (b"<html>", 200), (b"{}", 401)])
def test_something_else_answers(
    said: bytes,
    status: int,
    door: Door,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is told, on one line."""
    door.said, door.status = said, status
    assert shown(door.config, monkeypatch, capsys, SAID) == "no gateway answers there"


def test_a_gateway_that_is_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody listens, or nobody answers in time: the line says so."""
    monkeypatch.setattr("gateway.commands.statusline._PATIENCE", 0.05)
    config = tmp_path / "gw.toml"
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        config.write_text(f"[gateway]\nurl = 'http://127.0.0.1:{silent.getsockname()[1]}'\n")
        assert shown(config, monkeypatch, capsys, SAID) == "gateway down"
        silent.listen()
        assert shown(config, monkeypatch, capsys, SAID) == "gateway down"


@pytest.mark.parametrize(
    "text", [None, "[gateway", "gateway = 3", "[gateway]\nlisten = 3", "[gateway]\nurl = 'http:'"]
)
def test_a_config_that_cannot_be_used(
    text: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The line names the file, and that is no error."""
    config = tmp_path / "gw.toml"
    if text is not None:
        config.write_text(text)
    assert str(config) in shown(config, monkeypatch, capsys, SAID)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("listen = 'tcp:9090'", ("127.0.0.1", 9090, None)),
        ("listen = 'tcp:80:interface=\\:\\:1'", ("::1", 80, None)),
        ("listen = 'launchd:x'\nurl = 'http://[::1]:81/'", ("::1", 81, None)),
        ("url = 'http://localhost'", ("localhost", 80, None)),
        ("token = 'x'", ("127.0.0.1", 9090, "x")),
    ],
)
def test_where_the_gateway_is(text: str, found: object, tmp_path: Path) -> None:
    """As the configuration says it."""
    (tmp_path / "gw.toml").write_text(f"[gateway]\n{text}\n")
    assert where(str(tmp_path / "gw.toml")) == found


def test_it_imports_little() -> None:
    """None of what would take longer than the 50 ms that the line has."""
    code = "import sys, gateway.cli, gateway.commands.statusline; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    slow = {"twisted", "klein", "rich", "attr", "attrs", "cattrs", "argparse", "http.client"}
    assert set(done.stdout.split()) & (slow | {"pathlib", "asyncio", "ssl", "subprocess"}) == set()
