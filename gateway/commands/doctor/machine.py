"""
The machine, as the doctor touches it: questions over HTTP, ports, programs.

Whatever a server says is bounded in time and size, and nothing here raises for what it finds.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Mapping
from contextlib import closing, suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import attrs
import psutil

from gateway.llama.command import without_key

Json = Any

#: Bytes of an answer that are read.
_LONGEST: Final = 8 * 1024 * 1024

#: Seconds that a program may take to say its version.
_VERSION_PATIENCE: Final = 10.0

#: Seconds in which a connection on this machine is made.
_CONNECTS: Final = 2.0


@attrs.frozen
class Reply:
    """
    What came of a question.

    Attributes:
        status: the HTTP status; 0 where no HTTP answer came.
        said: the JSON of the body; None where it is none.
        why: what was wrong, where there was no answer.
        headers: by their names in lower case.
    """

    status: int
    said: Json = None
    why: str = ""
    headers: Mapping[str, str] = attrs.field(factory=dict)


@attrs.frozen
class Listener:
    """Who listens at a port; a `name` of "" and a `pid` of 0 where the machine does not say."""

    name: str = ""
    pid: int = 0
    command: tuple[str, ...] = ()


class _UnixConnection(HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


@attrs.define
class Machine:
    """
    This machine.

    Attributes:
        environ: the environment of who asks.
        home: their home.
        folder: where they are.
        user: their number.
        unit: the file that has systemd start us.
        until: when, by `time.monotonic`, no further question is asked.
    """

    environ: Mapping[str, str] = attrs.field(factory=lambda: dict(os.environ), repr=False)
    home: Path = attrs.field(factory=Path.home)
    folder: Path = attrs.field(factory=Path.cwd)
    user: int = attrs.field(factory=os.geteuid)
    unit: Path = Path("/etc/systemd/system/claudegw.service")
    until: float = attrs.field(factory=lambda: time.monotonic() + 600)

    def ask(
        self,
        url: str,
        path: str,
        body: Json = None,
        *,
        key: str | None = None,
        patience: float = 10.0,
    ) -> Reply:
        """
        Ask the server at `url`, as a tier's is written; a body is posted.

        It gets `patience` seconds for the whole answer, and sees `key`, if there is one.
        """
        end = min(time.monotonic() + patience, self.until)
        left = end - time.monotonic()
        if left <= 0:
            return Reply(0, why="the doctor's time is up")
        headers = {"content-type": "application/json", "user-agent": "claudegw-doctor"}
        if key is not None:
            headers["authorization"] = f"Bearer {key}"
        method, raw = ("GET", None) if body is None else ("POST", json.dumps(body).encode())
        connection = _connection(url, left)
        try:
            connection.request(method, path, raw, headers)
            answer = connection.getresponse()
            chunks, room = [], _LONGEST
            while chunk := answer.read1(65536):
                chunks.append(chunk)
                room -= len(chunk)
                if room < 0 or time.monotonic() > end:
                    return Reply(0, why="its answer does not end")
            names = {name.lower(): value for name, value in answer.getheaders()}
            said = None
            with suppress(ValueError, RecursionError):
                said = json.loads(b"".join(chunks))
            return Reply(answer.status, said, headers=names)
        except TimeoutError:
            return Reply(0, why=f"no answer within {left:.0f} s")
        except (OSError, HTTPException, ValueError) as error:
            return Reply(0, why=getattr(error, "strerror", None) or type(error).__name__)
        finally:
            connection.close()

    def listener(self, host: str, port: int) -> Listener | None:
        """Who listens there; None if nobody does."""
        try:
            with socket.create_connection((host, port), timeout=_CONNECTS):
                pass
        except OSError:
            return None
        with suppress(psutil.Error, OSError):
            for each in psutil.net_connections("tcp"):
                if (
                    each.laddr
                    and each.status == psutil.CONN_LISTEN
                    and each.laddr[1] == port
                    and each.pid
                ):
                    process = psutil.Process(each.pid)
                    command = tuple(without_key(process.cmdline()))
                    return Listener(process.name(), each.pid, command)
        return Listener()

    def has_address(self, host: str) -> bool:
        """Whether this machine can be reached under it."""
        try:
            for family, kind, protocol, _, where in socket.getaddrinfo(
                host, 0, type=socket.SOCK_STREAM
            ):
                with closing(socket.socket(family, kind, protocol)) as probe:
                    probe.bind(where)
        except OSError:
            return False
        return True

    def free_port(self) -> int:
        """A port of loopback that nobody listens at."""
        with closing(socket.socket()) as probe:
            probe.bind(("127.0.0.1", 0))
            return int(probe.getsockname()[1])

    def which(self, program: str, path: str | None = None) -> str | None:
        """Where a program is, on `path` or on the PATH of who asks."""
        return shutil.which(program, path=path or self.environ.get("PATH"))

    def version(self, program: str) -> str:
        """What a program says to ``--version``; "" where it says nothing."""
        with suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(  # noqa: S603  # it was looked up by `which`
                [program, "--version"],
                env=dict(self.environ),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=_VERSION_PATIENCE,
                check=True,
            )
            return done.stdout.decode("utf-8", "replace").strip()
        return ""

    def free(self, folder: Path) -> int:
        """Bytes that are free on the disk of `folder`, or of what will hold it."""
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        return shutil.disk_usage(folder).free


def _connection(url: str, seconds: float) -> HTTPConnection:
    if url.startswith("unix:"):
        return _UnixConnection(url.removeprefix("unix:"), seconds)
    parts = urlsplit(url)
    return HTTPConnection(parts.hostname or "", parts.port or 80, timeout=seconds)
