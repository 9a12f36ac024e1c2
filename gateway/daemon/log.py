"""
The log of a process that runs for months: one file, rotated, of which few old ones are kept.

twistd rotates the file of its ``--logfile`` as well, but keeps every old one for ever.

What is logged holds words of clients and servers.  They stay words: what would steer the terminal
of who reads them is written as an escape, and a further line begins with a tab.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, TextIO

import attrs
from twisted.application.service import MultiService
from twisted.logger import (
    FileLogObserver,
    ILogObserver,
    LogEvent,
    formatEventAsClassicLogText,
)
from twisted.python.logfile import LogFile
from twisted.python.usage import Options

from gateway.daemon import BEFORE_THE_LOG

#: Bytes of one log file, and how many old ones are kept.
_SIZE: Final = 10 * 1024 * 1024
_OLD: Final = 3

#: Bytes of what launchd writes down itself.
_BEFORE_SIZE: Final = 1024 * 1024

#: Characters that do something to a terminal, or to the order of a line, and half ones.
_STEERING: Final = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def log_file(twistd: Options | None) -> Path | None:
    """
    The file that twistd was told to log to, with `twistd` its own options.

    None for a log that goes elsewhere: to a terminal, to systemd's journal, to syslog.
    """
    name = _name(twistd)
    if name in (None, "-"):
        return None
    path = Path(str(name)).absolute()
    _cut(path.with_name(BEFORE_THE_LOG))
    return path


def output(twistd: Options | None) -> TextIO | None:
    """The standard output, where twistd was told to log there: to a terminal, to the journal."""
    return sys.stdout if _name(twistd) == "-" else None


def _name(twistd: Options | None) -> str | None:
    """As in ``--logfile``; None for a log that goes elsewhere."""
    if twistd is None or twistd.get("logger") or twistd.get("syslog"):
        return None
    foreground = twistd.get("nodaemon") or twistd.get("debug")
    return str(twistd.get("logfile") or ("-" if foreground else "twistd.log"))


def _cut(path: Path) -> None:
    """Empty the file at `path` if it is our output and long; launchd appends to it."""
    with suppress(OSError):  # mostly there is none
        found = path.stat()
        if os.path.samestat(found, os.fstat(1)) and found.st_size > _BEFORE_SIZE:
            os.truncate(path, 0)


@attrs.define(eq=False)
class Logged(MultiService):
    """
    A process whose log goes to a file that is bounded.

    Attributes:
        path: the file.
        output: where there is none: what it is written to; None leaves the log to twistd.
    """

    path: Path | None
    output: TextIO | None = None

    def __attrs_post_init__(self) -> None:
        super().__init__()

    def setServiceParent(self, parent: Any) -> None:
        if self.path is not None:
            parent.setComponent(ILogObserver, observer(self.path))
        elif self.output is not None:
            parent.setComponent(ILogObserver, FileLogObserver(self.output, in_words))
        super().setServiceParent(parent)


def observer(path: Path) -> ILogObserver:
    """What writes the log to the file at `path`; as twistd's own, it rotates on SIGUSR1, too."""
    file = LogFile.fromFullPath(
        str(path), rotateLength=_SIZE, maxRotatedFiles=_OLD, defaultMode=0o600
    )

    def rotate(*_: Any) -> None:
        from twisted.internet import reactor  # importing it installs it

        reactor.callFromThread(file.rotate)  # type: ignore[attr-defined]  # Twisted puts it there

    signal.signal(signal.SIGUSR1, rotate)
    return FileLogObserver(file, in_words)


def in_words(event: LogEvent) -> str | None:
    """The event as twistd writes it, without what would steer a terminal."""
    text = formatEventAsClassicLogText(event)
    return None if text is None else _STEERING.sub(_escaped, text)


def _escaped(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode()
