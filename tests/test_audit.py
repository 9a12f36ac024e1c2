"""The audit of what a user installs: against a service of the test's own, never the real one."""

from __future__ import annotations

from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import orjson
import pytest

from bin import audit

KNOWN: dict[str, Any] = {
    "id": "GHSA-none-such-here",
    "summary": "It is made up.",
    "aliases": [],
    "modified": "2026-01-01T00:00:00Z",
    "affected": [
        {
            "package": {"name": "twisted", "ecosystem": "PyPI"},
            "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "999.1"}]}],
            "versions": [audit.needed()["twisted"]],
        }
    ],
}


class Service(BaseHTTPRequestHandler):
    """Says what it knows of each package that it is asked for."""

    known: dict[str, Any]
    asked: list[str]
    status = 200

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers["content-length"]))
        name = orjson.loads(raw)["package"]["name"]
        self.asked.append(name)
        body = orjson.dumps(self.known.get(name, {}))
        self.send_response(self.status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing: a test has nobody to tell."""


@pytest.fixture
def service() -> Iterator[tuple[type[Service], list[str]]]:
    """One on this machine, and the arguments that lead there."""
    kind = type("Fresh", (Service,), {"known": {}, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    thread = Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}/v1/query"
    yield kind, ["--vulnerability-service", "osv", "--osv-url", url]
    server.shutdown()
    thread.join()
    server.server_close()


def test_what_a_user_installs_is_looked_at() -> None:
    """What claudegw and its demo need, down to the last; not what tests and documentation do."""
    packages = audit.needed()
    assert {"twisted", "hyperlink", "klein", "cryptography", "xllamacpp"} <= packages.keys()
    assert not {"claudegw", "pytest", "sphinx", "pip-audit", "hypothesis"} & packages.keys()
    assert "xllamacpp" not in audit.needed("claudegw")


def test_nothing_that_is_known_is_no_error(
    service: tuple[type[Service], list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Each package is asked for, and one line says how many."""
    there, arguments = service
    count = len(audit.needed())
    assert audit.main(arguments) == 0
    assert sorted(there.asked) == sorted(audit.needed())
    assert capsys.readouterr().out == f"audit: {count} of {count} packages were looked at\n"


def test_a_known_vulnerability_is_an_error(
    service: tuple[type[Service], list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Its line says where it is, what it is called, and which version has it no more."""
    there, arguments = service
    there.known = {"twisted": {"vulns": [KNOWN]}}
    assert audit.main(arguments) == 1
    version = audit.needed()["twisted"]
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"audit: twisted {version}: {KNOWN['id']}, mended in 999.1"


@pytest.mark.parametrize("status", [None, 500])
def test_a_service_that_cannot_be_asked_is_said(
    status: int | None,
    service: tuple[type[Service], list[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Where nobody listens, or only an error comes back, the build goes on and a line tells."""
    there, arguments = service
    there.status = status or 200
    if status is None:
        arguments = [*arguments[:-1], "http://127.0.0.1:1/v1/query"]
    assert audit.main(arguments) == 0
    (said,) = capsys.readouterr().out.splitlines()
    assert said.startswith("audit: the service could not be asked, nothing was looked at: ")


def test_a_silence_does_not_look_like_an_answer() -> None:
    """A package that the service does not know is named, and not counted."""
    said: Any = [
        {"name": "a", "version": "1", "vulns": []},
        {"name": "b", "skip_reason": "Dependency not found"},
    ]
    assert list(audit.report(said, "", 2)) == [
        ("the service says nothing of 1 of 2: b", False),
        ("1 of 2 packages were looked at", False),
    ]
