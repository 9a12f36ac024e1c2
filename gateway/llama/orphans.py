"""
What a gateway that was killed has left running.

Each child is on record while it runs.  The next start reads the record, and ends that process
before it starts another, if it is still the one that was started: by its id, the time of its start
and its command line.  An id that belongs to somebody else by now is left alone, and so is a child
whose gateway still lives.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import attrs
import orjson
import psutil
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater
from twisted.logger import Logger

from gateway.files import write_private
from gateway.llama.command import without_key

#: Seconds by which a start that we noted and one that the system tells may differ: Linux tells
#: whole seconds, and a clock may be set.
_SAME_TIME: Final = 5.0

#: Seconds between two looks whether an orphan is gone, and for which one is looked for after KILL.
_LOOK: Final = 0.1
_KILLED: Final = 5.0

log = Logger()


class StillThere(Exception):
    """An orphan that does not end even when it is killed."""


@attrs.frozen
class Record:
    """
    The note of one child.

    Attributes:
        tier: whose server it is.
        path: where the note lies while the child runs.
    """

    tier: str
    path: Path
    _reactor: IReactorTime

    def write(self, pid: int, command: Sequence[str]) -> None:
        """Note that `command` was started just now as `pid`."""
        note = {
            "pid": pid,
            "parent": os.getpid(),
            "started": time.time(),
            "command": without_key(command),
        }
        try:  # after a power cut there is no process that it could tell of
            write_private(self.path, orjson.dumps(note), synced=False)
        except OSError:  # a server without a note is better than none
            log.failure("tier {tier}: cannot write {path}", tier=self.tier, path=self.path)

    def remove(self) -> None:
        """The child is gone."""
        try:
            self.path.unlink(missing_ok=True)
        except OSError:
            log.failure("tier {tier}: cannot remove {path}", tier=self.tier, path=self.path)

    async def end_orphan(self, grace: float) -> None:
        """
        End what an earlier gateway left behind: TERM, `grace` seconds, KILL.

        Raises:
            StillThere: it does not end.
        """
        orphan = self._orphan()
        if orphan is not None:
            log.warn(
                "tier {tier}: ending its server {pid}, left by a gateway that is gone",
                tier=self.tier,
                pid=orphan.pid,
            )
            await self._end(orphan, grace)
            self.remove()

    async def _end(self, orphan: psutil.Process, grace: float) -> None:
        for number, patience in ((signal.SIGTERM, grace), (signal.SIGKILL, _KILLED)):
            with suppress(psutil.NoSuchProcess):
                orphan.send_signal(number)
            until = self._reactor.seconds() + patience
            while _runs(orphan):
                if self._reactor.seconds() >= until:
                    break
                await deferLater(self._reactor, _LOOK)
            else:
                return
        raise StillThere(f"process {orphan.pid}, left by a gateway that is gone, does not end")

    def _orphan(self) -> psutil.Process | None:
        """The process on record, if it is still that one and nobody's child."""
        try:
            note = orjson.loads(self.path.read_bytes())
            process = psutil.Process(note["pid"])
            with process.oneshot():
                return process if _is_it(process, note) else None
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, LookupError, psutil.Error) as error:
            log.info("tier {tier}: nothing to end: {error}", tier=self.tier, error=error)
            return None


def _is_it(process: psutil.Process, note: Mapping[str, Any]) -> bool:
    return (
        _runs(process)
        and process.ppid() != note["parent"]
        and abs(process.create_time() - note["started"]) <= _SAME_TIME
        and _same_command(without_key(process.cmdline()), note["command"])
    )


def _same_command(running: Sequence[str], noted: Sequence[str]) -> bool:
    """Whether `running` is what became of `noted`: a script is run behind its interpreter."""
    before = len(running) - len(noted)
    return (
        before >= 0
        and running[before + 1 :] == noted[1:]
        and Path(running[before]).name == Path(noted[0]).name
    )


def _runs(process: psutil.Process) -> bool:
    """Whether it is more than an entry that nobody has collected yet."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
