"""
A llama-server as a child process: started with the gateway, stopped with it.

Its output is always read (an undrained pipe would freeze llama-server) and goes to a log of its own
in the state folder, and line by line to whoever wants to hear it.  A child that ends by itself is
started again after a pause that grows.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import attrs
from twisted.application.internet import backoffPolicy
from twisted.application.service import Service
from twisted.internet.defer import Deferred, succeed
from twisted.internet.error import ProcessExitedAlready
from twisted.internet.interfaces import IDelayedCall, IProcessTransport
from twisted.internet.protocol import ProcessProtocol
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.python.logfile import LogFile

from gateway.config import Server, Tier
from gateway.llama.loglines import Lines

#: Seconds that a child gets to end by itself before it is killed.
_GRACE: Final = 10.0

#: Bytes of a child's output that are told when it ends by itself.
_LAST_WORDS: Final = 1000

#: Bytes of one log file of a child, and how many old ones are kept.
_LOG_SIZE: Final = 10 * 1024 * 1024
_OLD_LOGS: Final = 3

log = Logger()


def command(tier: Tier, server: Server, state_dir: Path) -> list[str]:
    """
    The command line of a tier's server.

    A llama-server, or our embedded one, gets the flags that the tier needs and that its command
    does not set; any other command stays as it is.
    """
    given = list(server.command)
    if given[:3] == ["python", "-m", "gateway.llama.embedded"]:
        given[0] = sys.executable
    elif Path(given[0]).name != "llama-server":
        return given
    if not server.manage_flags:
        return given
    parts = urlsplit(tier.url)
    host = tier.url.removeprefix("unix:") if tier.url.startswith("unix:") else parts.hostname
    wanted = {
        "--host": host,
        "--port": None if parts.port is None else str(parts.port),
        "--parallel": str(tier.slots),
        # Side calls that share a beginning must not cut the main conversation's end off.
        "--slot-prompt-similarity": "0",
        "--slot-save-path": str(state_dir / "slots"),
        "--sse-ping-interval": "5",
        "--api-key": tier.api_key,
    }
    short = {"--parallel": "-np", "--slot-prompt-similarity": "-sps"}
    for flag, value in wanted.items():
        if value is not None and flag not in given and short.get(flag) not in given:
            given += [flag, value]
    return given


@attrs.define(eq=False)
class Child(Service):
    """
    The service that keeps one child running.

    Attributes:
        tier: whose server it is.
        command: what is run.
        env: added to our own environment.
        log_file: where its output goes.
        on_line: hears each line of it.
    """

    tier: str
    command: Sequence[str]
    env: Mapping[str, str]
    log_file: Path
    _reactor: Any
    on_line: Callable[[str], None] = lambda _: None
    _process: IProcessTransport | None = attrs.field(default=None, init=False)
    _ended: Deferred[None] | None = attrs.field(default=None, init=False)
    _again: IDelayedCall | None = attrs.field(default=None, init=False)
    _failures: int = attrs.field(default=0, init=False)
    _pause: Callable[[int], float] = attrs.field(factory=backoffPolicy, init=False)

    def startService(self) -> None:
        super().startService()
        log.info("tier {tier}: starting {command}", tier=self.tier, command=self._shown())
        self._spawn()

    def stopService(self) -> Deferred[None]:
        """Fires when the process is gone."""
        super().stopService()
        if self._again is not None and self._again.active():
            self._again.cancel()
        if self._process is None:
            return succeed(None)
        self._ended = Deferred()
        self._signal("TERM")
        kill = self._reactor.callLater(_GRACE, self._signal, "KILL")

        def ended(_: None) -> None:
            if kill.active():
                kill.cancel()

        return self._ended.addCallback(ended)

    def _shown(self) -> str:
        """The command line without its key."""
        shown = list(self.command)
        for index, word in enumerate(shown[:-1]):
            if word == "--api-key":
                shown[index + 1] = "***"
        return shlex.join(shown)

    def _spawn(self) -> None:
        self._process = self._reactor.spawnProcess(
            _Output(self._gone, self._heard, self.log_file),
            self.command[0],
            list(self.command),
            env={**os.environ, **self.env},
        )

    def _signal(self, name: str) -> None:
        if self._process is None:
            return
        with suppress(ProcessExitedAlready):  # then `_gone` is on its way
            self._process.signalProcess(name)

    def _heard(self, line: str) -> None:
        try:
            self.on_line(line)
        except Exception:  # noqa: BLE001  # whatever it is, the pipe must go on being read
            log.failure("tier {tier}: cannot make use of what its server says", tier=self.tier)

    def _gone(self, reason: Failure, last_words: str) -> None:
        self._process = None
        if self._ended is not None:
            ended, self._ended = self._ended, None
            ended.callback(None)
            return
        pause = self._pause(self._failures)
        self._failures += 1
        log.error(
            "tier {tier}: its server ended ({reason}), starting it again in {pause:.0f} s."
            " Its last words:\n{last_words}",
            tier=self.tier,
            reason=reason.getErrorMessage(),
            pause=pause,
            last_words=last_words,
        )
        self._again = self._reactor.callLater(pause, self._spawn)


@attrs.define(eq=False)
class _Output(ProcessProtocol):
    """Writes down what a child says, and tells it; knows its last words on the day it ends."""

    gone: Callable[[Failure, str], None]
    heard: Callable[[str], None]
    path: Path
    _file: LogFile = attrs.field(init=False)
    _out: Lines = attrs.field(factory=Lines, init=False)
    _err: Lines = attrs.field(factory=Lines, init=False)
    _last: bytes = b""

    def connectionMade(self) -> None:
        self._file = LogFile.fromFullPath(
            str(self.path), rotateLength=_LOG_SIZE, maxRotatedFiles=_OLD_LOGS, defaultMode=0o600
        )

    def outReceived(self, data: bytes) -> None:
        self._write(data, self._out)

    def errReceived(self, data: bytes) -> None:
        self._write(data, self._err)

    def _write(self, data: bytes, lines: Lines) -> None:
        self._file.write(data)
        self._file.flush()
        self._last = (self._last + data)[-_LAST_WORDS:]
        self._tell(lines.feed(data))

    def _tell(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.heard(line)

    def processEnded(self, reason: Failure) -> None:
        self._file.close()
        self._tell((*self._out.end(), *self._err.end()))
        self.gone(reason, self._last.decode("utf-8", "replace"))
