"""
The ledger on the disk: one row for each call that is over, and nothing of what it said.

One thread writes, so that no call waits for a disk.  Rows wait for it in a queue that is bounded;
what finds it full is counted and left out.  The file is bounded by the age and the number of its
rows.  Whatever goes wrong with it costs rows and no call: they are counted, and it is logged, once
an hour at most.  A file that is broken, or somebody else's, is set aside, and a new one is begun.
"""

from __future__ import annotations

import math
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import Any, Final

import attrs
import orjson
from twisted.logger import Logger

Json = Any

#: Its name in the state folder.
FILE: Final = "ledger.db"

#: What SQLite calls the files that belong to one database.
_TAILS: Final = ("", "-wal", "-shm")

#: How a file says that it is ours, and of which form.
_OURS: Final = 0x636C6764
_FORM: Final = 1

#: The columns are the names of `gateway.ledger.Record.as_json`.
_SCHEMA: Final = f"""
BEGIN;
CREATE TABLE call (
    n INTEGER PRIMARY KEY,
    id TEXT NOT NULL,
    at REAL NOT NULL,
    kind TEXT NOT NULL,
    session TEXT NOT NULL,
    model TEXT NOT NULL,
    tier TEXT NOT NULL,
    rule TEXT NOT NULL,
    background INTEGER NOT NULL,
    waited REAL NOT NULL,
    first REAL,
    took REAL NOT NULL,
    resent INTEGER NOT NULL,
    input INTEGER,
    cached INTEGER NOT NULL,
    output INTEGER NOT NULL,
    cold TEXT,
    outcome TEXT NOT NULL
);
CREATE INDEX call_at ON call (at);
PRAGMA application_id = {_OURS};
PRAGMA user_version = {_FORM};
COMMIT;
"""
_NAMES: Final = (
    "id",
    "at",
    "kind",
    "session",
    "model",
    "tier",
    "rule",
    "background",
    "waited",
    "first",
    "took",
    "resent",
    "input",
    "cached",
    "output",
    "cold",
    "outcome",
)
_LISTED: Final = ", ".join(_NAMES)
_INSERT: Final = (
    f"INSERT INTO call ({_LISTED})"  # noqa: S608  # our own names
    f" VALUES ({', '.join(f':{name}' for name in _NAMES)})"
)
_TOO_OLD: Final = "DELETE FROM call WHERE at < ?"
_TOO_MANY: Final = "DELETE FROM call WHERE n <= (SELECT max(n) FROM call) - ?"
_RECENT: Final = (
    f"SELECT {_LISTED} FROM call WHERE n IN ("  # noqa: S608  # as above
    "SELECT n FROM call WHERE at >= ?"
    " UNION SELECT n FROM call WHERE n > (SELECT max(n) FROM call) - ?) ORDER BY n"
)
_LAST: Final = f"SELECT {_LISTED} FROM call ORDER BY n DESC LIMIT ?"  # noqa: S608  # as above

#: Rows that may wait for the disk, and that are written at once.
_QUEUE: Final = 4096
_BATCH: Final = 1024

#: Seconds from one write to the next, at least; each holds the reactor up for a moment.
_PAUSE: Final = 0.2

#: Seconds after which old rows go, also when no new ones come.
_TIDY: Final = 3600.0

#: Seconds for which nothing is said again of a file that cannot be written.
_QUIET: Final = 3600.0

#: Seconds that the last rows get to be written when the service stops.
_FLUSH: Final = 5.0

#: Seconds to wait for another process that writes.
_BUSY: Final = 1.0

#: Bytes that the log of writes may keep once its rows are in their place.
_WAL: Final = 4 * 1024 * 1024

_DAY: Final = 86400.0

log = Logger()


class _Broken(Exception):
    """The file is no ledger, or none any more."""


@attrs.frozen
class Bounds:
    """
    What the file may hold; 0 writes none.

    Attributes:
        days: age of the oldest row.
        rows: their number.
    """

    days: int
    rows: int

    def __bool__(self) -> bool:
        return bool(self.days and self.rows)


@attrs.define(eq=False)
class History:
    """
    The file, and the thread that writes it.

    Attributes:
        path: where it is.
        bounds: what it may hold; may be changed at any time.
        written: rows that were written.
        dropped: rows that found the queue full.
        lost: rows that could not be written.
    """

    path: Path
    bounds: Bounds
    _reactor: Any
    _wall: Callable[[], float] = time.time
    written: int = attrs.field(default=0, init=False)
    dropped: int = attrs.field(default=0, init=False)
    lost: int = attrs.field(default=0, init=False)
    _queue: SimpleQueue[Mapping[str, Json] | None] = attrs.field(factory=SimpleQueue, init=False)
    _thread: Thread | None = attrs.field(default=None, init=False)
    _stopping: Event = attrs.field(factory=Event, init=False)
    _connection: sqlite3.Connection | None = attrs.field(default=None, init=False)
    _said_at: float = attrs.field(default=-math.inf, init=False)

    # --- in the reactor's thread ------------------------------------------------------------------

    def start(self, since: float = 0.0, count: int = 0) -> list[dict[str, Json]]:
        """
        Begin to write, if the bounds let anything be written.

        Returns:
            The calls that came after `since`, in seconds of the epoch, and the last `count`,
            oldest first; none where they cannot be read.
        """
        if not self.bounds or self._thread is not None:
            return []
        found: list[dict[str, Json]] = []
        self._safely(lambda connection: found.extend(_calls(connection, _RECENT, since, count)))
        self._stopping.clear()
        self._thread = Thread(target=self._run, name="ledger", daemon=True)
        self._thread.start()
        return found

    def adopt(self, bounds: Bounds) -> None:
        """Go by other bounds."""
        self.bounds = bounds
        self.start(since=math.inf)  # nobody wants to know what came before

    def put(self, call: Mapping[str, Json]) -> None:
        """Write `call`, as `Record.as_json` has it, soon; or never, if too many are waiting."""
        if self._thread is None:
            return
        if self._queue.qsize() < _QUEUE:
            self._queue.put(call)
        else:
            self.dropped += 1

    def stop(self) -> None:
        """
        Write what is waiting, and close the file.

        It waits for the disk, `_FLUSH` seconds at most: nothing else is left to do by then.
        """
        thread, self._thread = self._thread, None
        if thread is not None:
            self._queue.put(None)
            self._stopping.set()
            thread.join(_FLUSH)

    def status(self) -> Mapping[str, Json]:
        """For ``/status``; rows since the gateway was started."""
        return {
            "file": str(self.path) if self.bounds else None,
            "written": self.written,
            "dropped": self.dropped,
            "lost": self.lost,
        }

    # --- in the thread that writes ----------------------------------------------------------------

    def _run(self) -> None:
        self._safely(_check)
        goes_on = True
        while goes_on:
            calls = list(self._waiting())
            goes_on = None not in calls
            rows = [_row(call) for call in calls if call is not None]
            bounds = self.bounds
            oldest = self._wall() - bounds.days * _DAY
            if not bounds:
                continue
            if self._safely(partial(_write, rows, oldest, bounds.rows)):
                self.written += len(rows)
            else:
                self.lost += len(rows)
            self._stopping.wait(_PAUSE)
        self._close()

    def _waiting(self) -> Iterator[Mapping[str, Json] | None]:
        """Those that wait, as soon as there is one; none when it is time for old rows to go."""
        with suppress(Empty):
            yield self._queue.get(timeout=_TIDY)
            for _ in range(_BATCH):
                yield self._queue.get_nowait()

    # --- in either --------------------------------------------------------------------------------

    def _safely(self, work: Callable[[sqlite3.Connection], None]) -> bool:
        """Do `work` in one transaction, on a new file if this one is broken; whether it is done."""
        try:
            try:
                self._do(work)
            except (_Broken, sqlite3.DatabaseError) as error:
                self._close()
                if not _is_broken(error):
                    raise
                aside = _set_aside(self.path)
                self._say(log.warn, "{path} is no ledger ({why}); it is {aside} now", error, aside)
                self._do(work)
        except Exception as error:  # noqa: BLE001  # whatever it is, no call may feel it
            self._close()
            # A disk that is nearly full takes one row and not the next.
            if self._wall() - self._said_at > _QUIET:
                self._said_at = self._wall()
                self._say(log.warn, "{path} cannot be written, calls go on: {why}", error)
            return False
        return True

    def _do(self, work: Callable[[sqlite3.Connection], None]) -> None:
        if self._connection is None:
            self._connection = _opened(self.path)
        with self._connection:
            work(self._connection)

    def _close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(sqlite3.Error):
                connection.close()

    def _say(self, how: Any, what: str, why: object = "", aside: object = "") -> None:
        """Log it where the log may be written."""
        self._reactor.callFromThread(how, what, path=str(self.path), why=str(why), aside=str(aside))


def last(path: Path, count: int) -> list[dict[str, Json]]:
    """
    The last `count` calls in the file at `path`, newest first; a gateway may be writing it.

    Raises:
        OSError: there is no such file.
        sqlite3.Error: it cannot be read.
    """
    path.stat()
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", timeout=_BUSY, uri=True)) as found:
        return list(_calls(found, _LAST, count))


# --- the file -------------------------------------------------------------------------------------


def _opened(path: Path) -> sqlite3.Connection:
    """The file at `path`, begun if there is none; raises _Broken, sqlite3.Error, OSError."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    path.chmod(0o600)
    connection = sqlite3.connect(path, timeout=_BUSY, check_same_thread=False)
    try:
        is_new = _is_new(connection)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")  # a row may go with the power
        connection.execute(f"PRAGMA journal_size_limit = {_WAL}")
        if is_new:
            connection.executescript(_SCHEMA)
    except BaseException:
        connection.close()
        raise
    return connection


def _is_new(connection: sqlite3.Connection) -> bool:
    """Whether nothing is in the file; raises _Broken if what is there is not ours."""
    (ours,) = connection.execute("PRAGMA application_id").fetchone()
    (form,) = connection.execute("PRAGMA user_version").fetchone()
    (parts,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if (ours, form) != (_OURS, _FORM) and (ours or form or parts):
        raise _Broken("another program's, or another version's")
    return not parts


def _check(connection: sqlite3.Connection) -> None:
    """Raises _Broken if any page of the file is."""
    (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if found != "ok":
        raise _Broken(found)


def _write(
    rows: Sequence[Mapping[str, Json]], oldest: float, most: int, connection: sqlite3.Connection
) -> None:
    """Add `rows`; those from before `oldest`, and those before the last `most`, go."""
    connection.executemany(_INSERT, rows)
    connection.execute(_TOO_OLD, (oldest,))
    connection.execute(_TOO_MANY, (most,))


def _is_broken(error: Exception) -> bool:
    """Whether another try with the same file would fail as well."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the rest says where it was found
    return isinstance(error, _Broken) or code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def _set_aside(path: Path) -> Path:
    """Give the file at `path` another name, in the place of one that had it before."""
    aside = path.with_suffix(".aside")
    for tail in _TAILS:
        there = Path(f"{aside}{tail}")
        there.unlink(missing_ok=True)
        with suppress(FileNotFoundError):
            Path(f"{path}{tail}").rename(there)
    return aside


def _row(call: Mapping[str, Json]) -> Mapping[str, Json]:
    cold = call["cold"]
    return {**call, "cold": None if cold is None else orjson.dumps(cold).decode()}


def _calls(connection: sqlite3.Connection, what: str, *given: float) -> Iterator[dict[str, Json]]:
    """The calls that a statement finds, each as it was put."""
    for row in connection.execute(what, given):
        call = dict(zip(_NAMES, row, strict=True))
        call["background"] = bool(call["background"])
        call["cold"] = None if call["cold"] is None else orjson.loads(call["cold"])
        yield call
