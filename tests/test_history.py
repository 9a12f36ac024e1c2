"""The ledger on the disk: sound whatever happens to it, and no call ever feels it."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from threading import Event
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.task import Clock
from twisted.logger import LogEvent, formatEvent

from gateway import history
from gateway.history import Bounds, History, last
from gateway.ledger import Ledger, Record
from gateway.wire.events import Usage
from tests.house import Household, turn

NOW = 1_800_000_000.0
DAY = 86400.0
ALL = Bounds(30, 1_000_000)


class Reactor:
    """One whose thread is the caller's."""

    def callFromThread(self, call: Callable[..., None], *args: Any, **named: Any) -> None:
        call(*args, **named)


class Pause(Event):
    """What ends a pause, and knows when there is one."""

    def __init__(self) -> None:
        super().__init__()
        self.begun = Event()

    def wait(self, timeout: float | None = None) -> bool:
        self.begun.set()
        return super().wait(timeout)


@attrs.define(eq=False)
class Desk:
    """
    A state folder in which ledgers are kept, one after the other.

    Attributes:
        now: seconds of the epoch.
    """

    folder: Path
    now: float = NOW
    _open: list[History] = attrs.field(factory=list, init=False)

    @property
    def path(self) -> Path:
        return self.folder / history.FILE

    def opens(self, bounds: Bounds = ALL) -> History:
        found = History(self.path, bounds, Reactor(), lambda: self.now)
        self._open.append(found)
        return found

    def keeps(self, *calls: dict[str, Any], bounds: Bounds = ALL) -> History:
        """One that was started, given `calls` and stopped."""
        found = self.opens(bounds)
        found.start(2 * NOW, 1)
        for each in calls:
            found.put(each)
        found.stop()
        return found

    def clear(self) -> None:
        for found in self._open:
            found.stop()

    @property
    def ids(self) -> list[str]:
        """Of the calls in the file, oldest first."""
        return [each["id"] for each in reversed(last(self.path, 1_000_000))]

    def is_sound(self) -> bool:
        with closing(sqlite3.connect(self.path)) as connection:
            return bool(connection.execute("PRAGMA integrity_check").fetchone() == ("ok",))


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    desk = Desk(tmp_path)
    yield desk
    desk.clear()


def call(identity: str = "req_1", at: float = NOW, **more: Any) -> dict[str, Any]:
    """A call that is over."""
    record = Record(identity, at, 0.0, ended=1.0, outcome="answered", **more)
    return record.as_json(1.0)


def said(logged: list[LogEvent]) -> str:
    return "\n".join(formatEvent(event) or "" for event in logged)


# --- what is written ------------------------------------------------------------------------------


def test_what_comes_in_a_pause_is_written_at_once(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each write holds the reactor up, so there are a few in a second; a stop waits for none."""
    rows, write = [], history._write

    def written(calls: Any, *more: Any) -> None:
        write(calls, *more)
        rows.append(len(calls))

    monkeypatch.setattr(history, "_write", written)
    monkeypatch.setattr(history, "_PAUSE", 3600.0)
    found, pause = desk.opens(), Pause()
    found._stopping = pause
    found.start()
    found.put(call("req_1"))
    assert pause.begun.wait(10)
    for number in (2, 3, 4):
        found.put(call(f"req_{number}"))
    found.stop()
    assert rows == [1, 3]
    assert desk.ids == ["req_1", "req_2", "req_3", "req_4"]


def test_a_call_comes_back_as_it_was(desk: Desk) -> None:
    """Every figure of it, also those that are not known."""
    cold = {"cached": 3, "divergence": {"how": "edited", "sentence": "the tools changed"}}
    whole = Record(
        "req_1",
        NOW + 0.25,
        0.0,
        kind="turn",
        model="claude-…",
        tier="main",
        rule="route 1",
        background=True,
        started=1.5,
        first=2.25,
        resent=2,
        ended=9.0,
        usage=Usage(10, 20, 30),
        cold=cold,
        outcome="529 overloaded_error",
    ).as_json(9.0)
    bare = call("req_2")
    desk.keeps(whole, bare)
    assert last(desk.path, 9) == [bare, whole]
    assert list(last(desk.path, 1)[0]) == list(bare)


def test_the_file_is_for_its_owner_alone(desk: Desk) -> None:
    """Those that SQLite keeps beside it, too, whatever the umask is, and whatever it was before."""
    before = os.umask(0)
    try:
        desk.path.touch(0o666)
        writer = desk.opens()
        writer.start()
        modes = {path.name: path.stat().st_mode & 0o777 for path in desk.folder.iterdir()}
    finally:
        os.umask(before)
    assert modes == dict.fromkeys(["ledger.db", "ledger.db-shm", "ledger.db-wal"], 0o600)


def test_a_clean_stop_leaves_one_whole_file(desk: Desk) -> None:
    """All that was put is in it."""
    writer = desk.keeps(*(call(f"req_{number}") for number in range(3000)))
    assert (writer.written, writer.dropped, writer.lost) == (3000, 0, 0)
    assert [path.name for path in desk.folder.iterdir()] == ["ledger.db"]
    assert len(desk.ids) == 3000


def test_it_is_bounded_by_rows(desk: Desk) -> None:
    """The oldest go."""
    desk.keeps(*(call(f"req_{number}") for number in range(10)), bounds=Bounds(30, 4))
    assert desk.ids == ["req_6", "req_7", "req_8", "req_9"]


def test_it_is_bounded_by_age(desk: Desk) -> None:
    """What is older goes, also when a gateway comes back after a long time."""
    desk.keeps(call("old"), call("young", NOW + 2 * DAY))
    desk.now += 31 * DAY
    desk.keeps()
    assert desk.ids == ["young"]


@pytest.mark.parametrize("bounds", [Bounds(0, 100), Bounds(30, 0)])
def test_none_is_written_where_none_is_wanted(desk: Desk, bounds: Bounds) -> None:
    """No file, and no thread."""
    writer = desk.keeps(call(), bounds=bounds)
    assert writer.status()["file"] is None
    assert not list(desk.folder.iterdir())


def test_bounds_change_while_it_writes(desk: Desk) -> None:
    """From none to some and back."""
    writer = desk.opens(Bounds(0, 0))
    writer.start()
    writer.put(call("before"))
    writer.adopt(ALL)
    writer.put(call("meanwhile"))
    writer.stop()
    writer.start()
    writer.adopt(Bounds(0, 0))
    writer.put(call("after"))
    writer.stop()
    assert desk.ids == ["meanwhile"]


def test_a_full_queue_drops_and_counts(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that hangs delays no call; what it could not take is counted."""
    hangs, goes_on = Event(), Event()
    really = history._write

    def write(*args: Any) -> None:
        hangs.set()
        assert goes_on.wait(60)
        really(*args)

    monkeypatch.setattr(history, "_write", write)
    monkeypatch.setattr(history, "_QUEUE", 3)
    writer = desk.opens()
    writer.start()
    writer.put(call("first"))
    assert hangs.wait(60)
    for number in range(5):
        writer.put(call(f"req_{number}"))
    assert writer.status()["dropped"] == 2
    goes_on.set()
    writer.stop()
    assert desk.ids == ["first", "req_0", "req_1", "req_2"]


# --- the next process -----------------------------------------------------------------------------


def test_a_new_ledger_knows_what_the_last_one_knew(desk: Desk) -> None:
    """The last calls, newest first, and the chart."""
    clock = Clock()
    clock.advance(NOW)

    def ledger() -> Ledger:
        found = Ledger(clock, clock.seconds, desk.opens())
        found.start()
        return found

    before = ledger()
    for number in range(150):
        with before.call(f"req_{number}") as record:
            record.usage = Usage(number, 1, 2)
            before.started(record)
            clock.advance(200)
            before.content(record)
    before.stop()
    after = ledger()
    assert after.status()["last"] == before.status()["last"]
    assert len(after.status()["last"]) == 100
    assert after.chart() == before.chart()
    assert after.status()["ledger"] == {
        "file": str(desk.path),
        "written": 0,
        "dropped": 0,
        "lost": 0,
    }


def test_it_is_read_while_it_is_written(desk: Desk) -> None:
    """By another process, and newest first."""
    writer = desk.keeps(call("one"))
    writer.start()
    assert [each["id"] for each in last(desk.path, 5)] == ["one"]


def test_nothing_to_read_is_said(desk: Desk) -> None:
    """And no file is made by looking for one."""
    with pytest.raises(FileNotFoundError):
        last(desk.path, 1)
    assert not desk.path.exists()


# --- what can happen to it ------------------------------------------------------------------------

WRITES_FOR_EVER = """
import sys
import time
from pathlib import Path
from gateway.history import History
from tests.test_history import ALL, Reactor, call

path = Path(sys.argv[1])
writer = History(path, ALL, Reactor())
writer.start()
number = 0
while True:
    if writer._queue.qsize() < 1000:
        writer.put(call(f"req_{number}"))
        number += 1
        if number % 100 == 0:
            print(writer.written, flush=True)
    else:
        time.sleep(0.001)
"""


def test_a_kill_in_the_middle_leaves_a_sound_file(desk: Desk) -> None:
    """All that was written before is there, in order and without a hole, and it goes on."""
    writing = subprocess.Popen(
        [sys.executable, "-c", WRITES_FOR_EVER, str(desk.path)], stdout=subprocess.PIPE, text=True
    )
    with writing:
        assert writing.stdout is not None
        written = next(int(line) for line in writing.stdout if int(line) > 2000)
        writing.send_signal(signal.SIGKILL)
    assert Path(f"{desk.path}-wal").exists()
    found = desk.ids
    assert len(found) >= written
    assert found == [f"req_{number}" for number in range(len(found))]
    assert desk.is_sound()
    desk.keeps(call("next"))
    assert desk.ids == [*found, "next"]


def test_a_hundred_thousand_rows(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """They fit, the bound holds, and a new process has the last of them."""
    most = 100_000
    monkeypatch.setattr(history, "_QUEUE", 2 * most)
    monkeypatch.setattr(history, "_FLUSH", 600.0)
    writer = desk.opens(Bounds(30, most))
    writer.start()
    for number in range(most + 5000):
        writer.put(call(f"req_{number}", NOW - most + number))
    writer.stop()
    assert (writer.written, writer.dropped, writer.lost) == (most + 5000, 0, 0)
    assert (len(desk.ids), desk.ids[0]) == (most, "req_5000")
    assert desk.is_sound()
    assert desk.path.stat().st_size < 40_000_000
    known = desk.opens().start(NOW + 5000, 100)
    assert [each["id"] for each in known] == [f"req_{most + 4900 + n}" for n in range(100)]


def test_a_full_disk_costs_rows_alone(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, logged: list[LogEvent]
) -> None:
    """It is said once an hour; once there is room again, rows are written again."""
    is_full = True
    really = history._opened

    def opened(path: Path) -> sqlite3.Connection:
        connection = really(path)
        if is_full:
            connection.execute("PRAGMA max_page_count = 3")
        return connection

    monkeypatch.setattr(history, "_opened", opened)
    big: dict[str, Any] = {"rule": "r" * 8000}
    first = desk.keeps(*(call(f"req_{number}", **big) for number in range(20)))
    second = desk.keeps(call("one", **big))
    assert first.lost == 20
    assert second.lost == 1
    assert said(logged).count("database or disk is full") == 2
    assert desk.is_sound()
    assert desk.ids == []
    is_full = False
    second.start()
    second.put(call("two", **big))
    second.stop()
    assert (second.written, second.lost) == (1, 1)
    assert desk.ids == ["two"]
    is_full = True
    for hours, times in ((0, 2), (0.9, 2), (1.1, 3)):
        desk.now = NOW + hours * 3600
        second.start()
        second.put(call("three", **big))
        second.stop()
        assert said(logged).count("database or disk is full") == times


FILLS_THE_DISK = """
import resource
import sys
from pathlib import Path
from gateway.history import History
from tests.test_history import ALL, Reactor, call

path = Path(sys.argv[1])
writer = History(path, ALL, Reactor())
writer.start()
for number in range(100):
    writer.put(call(f"req_{number}"))
writer.stop()
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
writer.start()
for number in range(100, 4000):
    writer.put(call(f"req_{number}"))
writer.stop()
print(writer.written, writer.lost)
"""


def test_a_write_that_fails_leaves_a_sound_file(desk: Desk) -> None:
    """By the system's own refusal in the middle of a write; what was written before is there."""
    command = [sys.executable, "-c", FILLS_THE_DISK, str(desk.path)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    written, lost = map(int, done.stdout.split())
    assert (written >= 100, lost > 0, written + lost) == (True, True, 4000)
    assert desk.is_sound()
    assert len(desk.ids) >= 100
    assert desk.ids[:100] == [f"req_{number}" for number in range(100)]


def test_no_call_is_harmed_by_a_disk_that_takes_nothing(
    tmp_path: Path, logged: list[LogEvent]
) -> None:
    """It is answered and remembered; the log says once what is wrong."""
    house = Household.built()
    nowhere = tmp_path / "no" / "such" / "folder"
    writer = History(nowhere / history.FILE, ALL, Reactor())
    ledger = house.api.dispatch.ledger
    ledger.history = writer
    ledger.start()
    for _ in range(3):
        browser = house.ask(turn())
        house.main.held.pop().answer()
        house.settle()
        assert browser.status == 200
    ledger.stop()
    status = house.api.dispatch.status()
    assert [each["outcome"] for each in status["last"]] == ["answered"] * 3
    assert (status["ledger"]["written"], status["ledger"]["lost"]) == (0, 3)
    assert said(logged).count("cannot be written, calls go on") == 1


@pytest.mark.parametrize(
    "what",
    [
        b"no database at all, and longer than its head" * 100,
        b"SQLite format 3\0" + b"\xff" * 8000,
    ],
)
def test_what_is_no_ledger_is_set_aside(desk: Desk, logged: list[LogEvent], what: bytes) -> None:
    """A new one is begun, and the log says where the other one is."""
    desk.path.write_bytes(what)
    writer = desk.keeps(call("new"))
    assert (writer.written, writer.lost) == (1, 0)
    assert desk.ids == ["new"]
    assert desk.path.with_suffix(".aside").read_bytes() == what
    assert said(logged).count("ledger.aside now") == 1


@pytest.mark.parametrize(
    "theirs",
    [
        "CREATE TABLE call (n INTEGER)",
        "PRAGMA application_id = 7",
        f"PRAGMA application_id = {history._OURS}; PRAGMA user_version = 99; CREATE TABLE t (n)",
    ],
)
def test_what_is_somebody_elses_is_set_aside(desk: Desk, theirs: str) -> None:
    """Another program's, or that of a version that is not known here."""
    with closing(sqlite3.connect(desk.path)) as connection:
        connection.executescript(theirs)
    desk.keeps(call("new"))
    assert desk.ids == ["new"]
    with closing(sqlite3.connect(desk.path.with_suffix(".aside"))) as connection:
        assert "CREATE" not in theirs or connection.execute("SELECT * FROM sqlite_schema")


def test_a_page_that_is_broken_is_found(desk: Desk, logged: list[LogEvent]) -> None:
    """In the middle of the file, where no row of today is; also for the second time."""
    for number in range(2):
        desk.keeps(*(call(f"req_{number}") for number in range(3000)))
        size = desk.path.stat().st_size
        with desk.path.open("r+b") as file:
            file.seek(size // 8192 * 4096)
            file.write(b"\xa5" * 4096)
        writer = desk.keeps(call(f"new_{number}"))
        assert (writer.written, writer.lost) == (1, 0)
        assert desk.ids == [f"new_{number}"]
        assert desk.is_sound()
    assert said(logged).count("ledger.aside now") == 2


def test_what_belongs_to_a_broken_file_goes_with_it(desk: Desk) -> None:
    """Its log of writes would be played into the new one; an older one aside makes room."""
    for which in ("older", "newer"):
        for tail in ("", "-wal", "-shm")[: 3 if which == "older" else 2]:
            Path(f"{desk.path}{tail}").write_text(which)
        assert history._set_aside(desk.path) == desk.folder / "ledger.aside"
    left = {path.name: path.read_text() for path in desk.folder.iterdir()}
    assert left == {"ledger.aside": "newer", "ledger.aside-wal": "newer"}


# --- rows -----------------------------------------------------------------------------------------

_WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
_COUNTS = st.integers(0, 2**40)
_SECONDS = st.floats(0, 1e10)
_CALLS = st.fixed_dictionaries(
    {
        **dict.fromkeys(("id", "kind", "session", "model", "tier", "rule", "outcome"), _WORDS),
        **dict.fromkeys(("at", "waited", "took"), _SECONDS),
        **dict.fromkeys(("resent", "cached", "output"), _COUNTS),
        "background": st.booleans(),
        "first": st.none() | _SECONDS,
        "input": st.none() | _COUNTS,
        "cold": st.none() | st.dictionaries(_WORDS, _WORDS | _COUNTS, max_size=3),
    }
)


@given(st.lists(_CALLS, max_size=6), st.integers(1, 5))
def test_what_is_written_is_read_again(calls: list[dict[str, Any]], most: int) -> None:
    """Calls come back as they were, the newest first, and of too many the oldest go."""
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.executescript(history._SCHEMA)
        history._write([history._row(call) for call in calls], 0.0, most, connection)
        found = list(history._calls(connection, history._LAST, 100))
    assert found == calls[::-1][:most]
