"""
What a child says: read as it comes, written down, told line by line.

It is always read, whatever becomes of it: a pipe that is full would freeze llama-server.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from signal import Signals
from typing import Any, Final

import attrs
from twisted.internet.error import ProcessTerminated
from twisted.internet.interfaces import IDelayedCall
from twisted.internet.protocol import ProcessProtocol
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.python.logfile import LogFile

from gateway.llama.loglines import Lines

#: Bytes of a child's output that are kept to be told.
_LAST_WORDS: Final = 2000

#: Bytes of one log file of a child, and how many old ones are kept.
_LOG_SIZE: Final = 10 * 1024 * 1024
_OLD_LOGS: Final = 3

#: Seconds for which the rest of its output is waited for when a child is gone.
_REST: Final = 1.0

log = Logger()


@attrs.define(eq=False)
class Output(ProcessProtocol):
    """
    One process's output.

    Attributes:
        path: the file that it goes to.
        heard: told each line; what it raises is logged.
        gone: told why, in words, once the process is gone and all of its output is read.
        last_words: the end of what it said.
    """

    path: Path
    heard: Callable[[str], None]
    gone: Callable[[str], None]
    _reactor: Any
    _last: bytes = b""
    _file: LogFile | None = None
    _out: Lines = attrs.field(factory=Lines, init=False)
    _err: Lines = attrs.field(factory=Lines, init=False)
    _closing: IDelayedCall | None = attrs.field(default=None, init=False)

    @property
    def last_words(self) -> str:
        return self._last.decode("utf-8", "replace")

    def connectionMade(self) -> None:
        try:
            self._file = LogFile.fromFullPath(
                str(self.path), rotateLength=_LOG_SIZE, maxRotatedFiles=_OLD_LOGS, defaultMode=0o600
            )
        except OSError:
            log.failure("cannot open {path}, its server runs without", path=self.path)

    def outReceived(self, data: bytes) -> None:
        self._take(data, self._out)

    def errReceived(self, data: bytes) -> None:
        self._take(data, self._err)

    def _take(self, data: bytes, lines: Lines) -> None:
        self._write(data)
        self._last = (self._last + data)[-_LAST_WORDS:]
        self._tell(lines.feed(data))

    def _write(self, data: bytes) -> None:
        if self._file is None:
            return
        try:
            self._file.write(data)
            self._file.flush()
        except Exception:  # noqa: BLE001  # a full disk, say; the pipe must go on being read
            log.failure("cannot write {path}, its server goes on without", path=self.path)
            self._close()

    def _close(self) -> None:
        file, self._file = self._file, None
        if file is not None and not file.closed:
            file.close()

    def _tell(self, lines: Iterable[str]) -> None:
        for line in lines:
            try:
                self.heard(line)
            except Exception:  # noqa: BLE001  # whatever it is, the pipe must go on being read
                log.failure("cannot make use of what a server says ({path})", path=self.path)

    def processExited(self, reason: Failure) -> None:  # noqa: ARG002  # `processEnded` gets it too
        """The rest of its output is awaited, but not that of others who hold its pipes."""
        if self.transport is not None:
            self._closing = self._reactor.callLater(_REST, self.transport.loseConnection)

    def processEnded(self, reason: Failure) -> None:
        if self._closing is not None and self._closing.active():
            self._closing.cancel()
        self._close()
        self._tell((*self._out.end(), *self._err.end()))
        self.gone(_in_words(reason))


def _in_words(reason: Failure) -> str:
    """How a process ended."""
    ended = reason.value
    if not isinstance(ended, ProcessTerminated):
        return "it ended with status 0"
    if ended.signal is None:
        return f"it ended with status {ended.exitCode}"
    try:
        return f"it was ended by {Signals(ended.signal).name}"
    except ValueError:
        return f"it was ended by signal {ended.signal}"
