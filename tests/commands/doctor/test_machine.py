"""What the doctor asks is bounded, whatever answers."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import pytest

from gateway.commands.doctor.machine import Machine

OK = b"HTTP/1.1 200 OK\r\n"


@contextmanager
def saying(*parts: bytes) -> Iterator[str]:
    """The URL of a server that reads one request, says this, and hangs until the test is over."""
    with socket.create_server(("127.0.0.1", 0)) as door:
        over: list[socket.socket] = []

        def serve() -> None:
            connection, _ = door.accept()
            over.append(connection)
            connection.recv(65536)
            for part in parts:
                try:
                    connection.sendall(part)
                except OSError:
                    return

        thread = Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{door.getsockname()[1]}"
        thread.join()
        for connection in over:
            connection.close()


def test_a_whole_answer() -> None:
    """Status, JSON and headers are there."""
    with saying(OK + b'X-Tier: main\r\ncontent-length: 8\r\n\r\n{"a": 1}') as url:
        reply = Machine().ask(url, "/props", key="secret")
    assert (reply.status, reply.said, reply.headers["x-tier"]) == (200, {"a": 1}, "main")


def test_what_is_no_json() -> None:
    """A page of HTML is an answer that says nothing."""
    with saying(OK + b"content-length: 6\r\n\r\n<html>") as url:
        reply = Machine().ask(url, "/")
    assert (reply.status, reply.said) == (200, None)


@pytest.mark.parametrize(
    "parts",
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n",),
        (OK + b"content-length: 99999\r\n\r\n{",),
        (OK + b"content-length: 9000000\r\n\r\n", bytes(9_000_000)),
        (),
    ],
    ids=["no HTTP", "half an answer", "a flood", "silence"],
)
def test_what_does_not_end(parts: tuple[bytes, ...]) -> None:
    """It is no answer, and says why."""
    with saying(*parts) as url:
        reply = Machine().ask(url, "/props", patience=0.3)
    assert reply.status == 0
    assert reply.why


def test_nobody() -> None:
    """A port at which nobody listens is told from one at which somebody does."""
    machine = Machine()
    port = machine.free_port()
    assert machine.listener("127.0.0.1", port) is None
    assert machine.ask(f"http://127.0.0.1:{port}", "/").why
    with socket.create_server(("127.0.0.1", 0)) as door:
        found = machine.listener("127.0.0.1", door.getsockname()[1])
    assert found is not None


@pytest.mark.parametrize(
    ("host", "is_here"),
    [("127.0.0.1", True), ("192.0.2.1", False), ("no.such.host.invalid", False)],
)
def test_an_address(host: str, is_here: bool) -> None:
    """Whether it is one of this machine shows who tries to listen there."""
    assert Machine().has_address(host) is is_here


def test_time_that_is_up() -> None:
    """Past its end nothing is asked."""
    with saying() as url:
        assert Machine(until=0.0).ask(url, "/").why == "the doctor's time is up"
        socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))).close()


def test_a_unix_socket(tmp_path: Path) -> None:
    """A server on a unix socket is asked there."""
    path = tmp_path / "llama.sock"
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(str(path))
        door.listen()

        def serve() -> None:
            connection, _ = door.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(OK + b"content-length: 2\r\n\r\n{}")

        thread = Thread(target=serve)
        thread.start()
        assert Machine().ask(f"unix:{path}", "/props").said == {}
        thread.join()


def test_a_version(tmp_path: Path) -> None:
    """A program says its version; one that fails says nothing."""
    good, bad = tmp_path / "good", tmp_path / "bad"
    good.write_text("#!/bin/sh\necho 2.1.330\n")
    bad.write_text("#!/bin/sh\nexit 3\n")
    for program in (good, bad):
        program.chmod(0o755)
    machine = Machine()
    assert machine.version(str(good)) == "2.1.330"
    assert machine.version(str(bad)) == ""
    assert machine.which(sys.executable) == sys.executable
    assert machine.free(tmp_path / "not/there") > 0
