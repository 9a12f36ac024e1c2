"""The doctor, where real servers are not what Claude Code needs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, Final
from urllib.request import Request, urlopen

import pytest

from tests.e2e.stack import (
    GEMMA,
    ROOT,
    SMOLLM,
    Running,
    configure,
    free_port,
    run_gateway,
    start_gateway,
    start_server,
)

pytestmark = pytest.mark.server

CLAUDEGW: Final = Path(sys.executable).with_name("claudegw")

Found = Mapping[str, list[dict[str, str]]]


def doctor(folder: Path) -> tuple[int, Found]:
    """The exit status, and what was found by each check that is not as it should be."""
    words = [str(CLAUDEGW), "doctor", "--json", "--config", str(folder / "gw.toml")]
    env = {"PATH": os.environ["PATH"], "HOME": str(folder)}
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, timeout=300, check=False)
    assert not done.stderr, done.stderr
    found: dict[str, list[dict[str, str]]] = {}
    for each in json.loads(done.stdout):
        found.setdefault(each["check"], [])
        if each["status"] != "ok":
            found[each["check"]].append(each)
    return done.returncode, found


def wrong_answers(found: Found) -> list[dict[str, str]]:
    """Of the round-trips those that are not right; whether it calls a tool is the model's."""
    return [each for each in found["main.round-trip"] if not each["found"].startswith("tool: the")]


def miscounts(found: Found) -> list[dict[str, str]]:
    """Of the round-trips those whose count is not what the call used."""
    return [each for each in found["main.round-trip"] if each["found"].startswith("count")]


@contextmanager
def gateway_on(folder: Path, **flags: Any) -> Iterator[Running]:
    """A gateway in front of one real server with these flags."""
    server = start_server(folder, "main", *flags.pop("server"))
    try:
        gateway = start_gateway(folder, {"main": {"url": server.url, **flags}})
        try:
            yield gateway
        finally:
            gateway.stop()
    finally:
        server.stop()


def test_a_real_server_of_all_faults(tmp_path: Path) -> None:
    """Gemma without a template, with two slots and a small window: each fault is named."""
    small = (*GEMMA[:2], "--ctx-size", "8192", "--parallel", "2")
    with gateway_on(tmp_path, server=small, slots=1):
        status, found = doctor(tmp_path)
    assert status == 1
    [window] = found["main.window"]
    assert "4096 tokens a slot" in window["found"]
    [slots] = found["main.slots"]
    assert "`--parallel 1`" in slots["remedy"]
    [template] = found["main.template"]
    assert "does not take tools" in template["found"]
    assert "etc/demo-template.jinja" in template["remedy"]
    [kv] = found["main.kv"]
    assert kv["found"].startswith("sliding-window")
    assert any("--slot-prompt-similarity" in each["found"] for each in found["main.flags"])


def test_its_remedies_followed(tmp_path: Path) -> None:
    """With what it advised the same server has none of these faults, and answers rightly."""
    flags = ("--ctx-size", "65536", "--parallel", "1", "--batch-size", "256")
    better = (*GEMMA, *flags, "--slot-prompt-similarity", "0", "--sse-ping-interval", "5")
    with gateway_on(tmp_path, server=better, slots=1):
        _, found = doctor(tmp_path)
    for check in ("server", "slots", "template"):
        assert not found[f"main.{check}"], found
    assert not wrong_answers(found)
    assert not [each for each in found["main.flags"] if "the server has no" in each["found"]]


def test_a_supervised_server_and_a_gateway_that_is_down(tmp_path: Path) -> None:
    """Down, it says how to start it; started so, the gateway answers, and so does its server."""
    gateway_port, port = free_port(), free_port()
    words = ["python", "-m", "gateway.llama.embedded", *SMOLLM, "--ctx-size", "8192"]
    tier = {"url": f"http://127.0.0.1:{port}", "server": {"command": words}}
    configure(tmp_path, gateway_port, {"main": tier})
    status, found = doctor(tmp_path)
    assert status == 1
    assert "twistd -n claudegw --config" in found["gateway"][0]["remedy"]
    assert "which starts it" in found["main.server"][0]["remedy"]
    gateway = run_gateway(tmp_path, gateway_port)
    try:
        gateway.ask("/v1/messages", {"model": "x", "max_tokens": 1, "messages": [_HI]})
        _, found = doctor(tmp_path)
    finally:
        gateway.stop()
    assert not found["gateway"]
    assert not found["main.server"]
    assert not wrong_answers(found)
    assert not found["main.kv"]
    assert not found["main.flags"]


_HI: Final = {"role": "user", "content": "hi"}


@contextmanager
def lying(server: Running) -> Iterator[str]:
    """The URL of one in front of `server` that finds a token more in each prompt."""

    class Liar(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._pass(None)

        def do_POST(self) -> None:
            self._pass(self.rfile.read(int(self.headers["content-length"])))

        def _pass(self, body: bytes | None) -> None:
            asked = Request(server.url + self.path, body, {"content-type": "application/json"})
            with urlopen(asked) as answer:
                raw, kind = answer.read(), answer.headers["content-type"]
            if self.path == "/tokenize":
                said = json.loads(raw)
                raw = json.dumps({"tokens": [*said["tokens"], 1]}).encode()
            elif self.path == "/v1/messages/count_tokens":
                raw = json.dumps({"input_tokens": json.loads(raw)["input_tokens"] + 1}).encode()
            self.send_response(200)
            self.send_header("content-type", kind)
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Liar) as door:
        thread = Thread(target=door.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"http://127.0.0.1:{door.server_address[1]}"
        door.shutdown()
        thread.join()


def test_a_server_that_counts_wrongly(small_server: Running, tmp_path: Path) -> None:
    """A count that is not the usage of the call is found; without what stands between it is not."""
    with lying(small_server) as url:
        gateway = start_gateway(tmp_path, {"main": {"url": url, "slots": 2}})
        try:
            # Now and then llama-server forgets to say what a call used; its count stands for it.
            for _ in range(3):
                status, found = doctor(tmp_path)
                if wrong := miscounts(found):
                    break
        finally:
            gateway.stop()
    assert status == 1
    assert ["nothing between it and the gateway" in each["remedy"] for each in wrong] == [True]
    gateway = start_gateway(tmp_path, {"main": {"url": small_server.url, "slots": 2}})
    try:
        _, found = doctor(tmp_path)
    finally:
        gateway.stop()
    assert not miscounts(found)
