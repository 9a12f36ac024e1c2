"""
Real Claude Codes, as bin/get-clients installs them, in front of a gateway.

Each runs with a home of its own and an environment made from nothing, on the settings that
``claudegw settings`` prints.  Nothing it does reaches beyond 127.0.0.1: its proxy for everything
else is a port where nobody listens.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NoReturn

import attrs
import orjson
import pytest

from tests.e2e.stack import ROOT, Running

Json = Any

CLAUDEGW: Final = Path(sys.executable).with_name("claudegw")

#: Where bin/get-clients puts them: the newest one, and one of February 2026.
CLIENTS: Final = ROOT / ".cache/clients"
VERSIONS: Final = ("newest", "2.1.36")

#: Stands below the prompt of an interactive session that waits for its user.
READY: Final = "? for shortcuts"


def absent(what: str) -> NoReturn:
    """End the test: skipped on a machine that lacks `what`, failed in CI, which has everything."""
    why = f"{what} is not here: the tests with real clients do not run (bin/get-clients)"
    if os.environ.get("CI"):
        pytest.fail(why)
    pytest.skip(why)


def program(name: str) -> Path:
    """A program of this machine."""
    found = shutil.which(name)
    if found is None:
        absent(name)
    return Path(found)


def claude(version: str) -> Path:
    """Claude Code itself."""
    program("node")
    found = CLIENTS / version / "node_modules/.bin/claude"
    if not found.exists():
        absent(f"Claude Code {version}")
    return found


def printed_settings(gateway: Running) -> dict[str, Json]:
    """What ``claudegw settings`` prints for a gateway of `tests.e2e.stack.start_gateway`."""
    config = gateway.log.with_name("gw.toml")
    command = [str(CLAUDEGW), "settings", "--config", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    settings: dict[str, Json] = orjson.loads(done.stdout)
    del settings["statusLine"]  # it would stand where READY does
    return settings


@attrs.frozen
class Said:
    """What came of ``claude -p``."""

    status: int
    answer: str
    errors: str
    seconds: float


@attrs.frozen
class Client:
    """
    One Claude Code on one gateway.

    Attributes:
        program: its command.
        folder: the project that it works in; its home lies beside it.
        settings: its settings, in a file.
        trusted: a certificate that it trusts beside the usual ones.
    """

    program: Path
    folder: Path
    settings: Path
    trusted: Path | None = None

    @classmethod
    def of(
        cls,
        version: str,
        gateway: Running,
        place: Path,
        env: Mapping[str, str] | None = None,
        changes: Mapping[str, Json] | None = None,
        trusted: Path | None = None,
    ) -> Client:
        """
        A client that was never used before.

        Args:
            version: one of `VERSIONS`.
            gateway: where it is to send its calls.
            place: an empty folder for what it has.
            env: what to change in the ``env`` of the printed settings.
            changes: what to put in place of other keys of the printed settings.
            trusted: a certificate that it trusts beside the usual ones.
        """
        command = claude(version)
        settings = {**printed_settings(gateway), **(changes or {})}
        settings["env"] |= env or {}
        client = cls(command, place / "project", place / "settings.json", trusted)
        client.settings.write_bytes(orjson.dumps(settings))
        client.folder.mkdir()
        client.home.mkdir()
        # What its first start would ask for: a theme, and whether this folder is trusted.
        project = {"hasTrustDialogAccepted": True, "hasCompletedProjectOnboarding": True}
        known = {
            "hasCompletedOnboarding": True,
            "theme": "dark",
            "projects": {str(client.folder.resolve()): project},
        }
        (client.home / ".claude.json").write_bytes(orjson.dumps(known))
        return client

    @property
    def home(self) -> Path:
        return self.folder.with_name("home")

    @property
    def environment(self) -> dict[str, str]:
        """Made from nothing."""
        nowhere = "http://127.0.0.1:9"
        # It is read when the program starts, before any settings are.
        certificates = {} if self.trusted is None else {"NODE_EXTRA_CA_CERTS": str(self.trusted)}
        return {
            **certificates,
            "HOME": str(self.home),
            "PATH": f"{program('node').parent}:/usr/bin:/bin:/usr/sbin:/sbin",
            "TERM": "xterm-256color",
            "LANG": "C.UTF-8",
            "HTTPS_PROXY": nowhere,
            "HTTP_PROXY": nowhere,
            "NO_PROXY": "127.0.0.1,localhost",
            "DISABLE_TELEMETRY": "1",
            "DISABLE_ERROR_REPORTING": "1",
            "DISABLE_AUTOUPDATER": "1",
        }

    @property
    def command(self) -> list[str]:
        return [str(self.program), "--settings", str(self.settings)]

    def say(self, prompt: str, *options: str, seconds: float = 120) -> Said:
        """``claude -p`` with `prompt`, to its end."""
        began = time.monotonic()
        done = subprocess.run(
            [*self.command, "-p", prompt, *options],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=seconds,
        )
        return Said(done.returncode, done.stdout, done.stderr, time.monotonic() - began)

    @contextmanager
    def session(self, *options: str, ready: str = READY) -> Iterator[Session]:
        """An interactive session that waits for its user: it is `ready` when it shows that."""
        tmux = str(program("tmux"))
        # A folder of its own for the socket: its path must be short, and goes with it.
        with tempfile.TemporaryDirectory(prefix="claudegw-") as place:
            session = Session(tmux, {**self.environment, "TMUX_TMPDIR": place})
            size = ("-x", "120", "-y", "40")
            session.tmux(
                "new-session", "-d", *size, "-c", str(self.folder), *self.command, *options
            )
            try:
                session.wait_for(lambda screen: ready in screen)
                yield session
            finally:
                session.tmux("kill-server")


@attrs.frozen
class Session:
    """A terminal with a client in it."""

    _program: str
    _environment: Mapping[str, str]

    def tmux(self, *arguments: str) -> str:
        done = subprocess.run(
            [self._program, "-L", "claudegw", "-f", "/dev/null", *arguments],
            env=self._environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, f"tmux {arguments[0]}: {done.stderr}"
        return done.stdout

    @property
    def screen(self) -> str:
        return self.tmux("capture-pane", "-p")

    def wait_for(self, shown: Callable[[str], bool], seconds: float = 300) -> None:
        """Until the screen is as `shown` wants it."""
        if not eventually(lambda: shown(self.screen), seconds):
            raise AssertionError(f"the screen stays like this:\n{self.screen}")

    def type(self, text: str) -> None:
        """Type a prompt and send it."""
        self.tmux("send-keys", "-l", text)
        self.wait_for(lambda screen: text in screen)
        self.tmux("send-keys", "Enter")

    def press_escape(self) -> None:
        self.tmux("send-keys", "Escape")


def eventually(happened: Callable[[], bool], seconds: float, every: float = 0.1) -> bool:
    """Whether something happens within so many seconds."""
    end = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > end:
            return False
        time.sleep(every)
    return True
