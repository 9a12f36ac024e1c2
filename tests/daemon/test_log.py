"""A log that never fills the disk."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from twisted.application.service import Application, IServiceCollection
from twisted.logger import ILogObserver, LogLevel, formatEvent
from twisted.python.usage import Options

from gateway.daemon import log


@pytest.fixture(autouse=True)
def the_signal_as_before() -> Iterator[None]:
    """SIGUSR1 is everybody's."""
    before = signal.getsignal(signal.SIGUSR1)
    yield
    signal.signal(signal.SIGUSR1, before)


def told(**options: Any) -> Path | None:
    """Where the log goes when twistd has these options."""
    twistd = Options()
    twistd.update({"nodaemon": 0, "debug": 0, "logfile": None, **options})
    return log.log_file(twistd)


def written(observer: Any, *lines: str) -> None:
    """Have an observer write `lines`, and close its file."""
    for line in lines:
        observer(event(line))
    observer._outFile.close()


def event(text: str) -> Any:
    """What the log is given."""
    found = {"log_format": text, "log_level": LogLevel.info, "log_time": 0.0, "log_system": "-"}
    assert text == "{said}" or formatEvent(found) == text
    return found


def test_the_log_is_rotated_and_few_old_ones_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However much is logged, there is one file and three old ones, none much above its size."""
    monkeypatch.setattr(log, "_SIZE", 1000)
    path = tmp_path / "gw.log"
    lines = (f"line {number} of a thousand" for number in range(1000))
    written(log.observer(path), *lines)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "gw.log",
        "gw.log.1",
        "gw.log.2",
        "gw.log.3",
    ]
    for file in tmp_path.iterdir():
        assert 0 < file.stat().st_size < 1200
        assert file.stat().st_mode & 0o777 == 0o600
    assert "line 999 of" in path.read_text()


def test_the_disk_that_a_log_may_take() -> None:
    """It is 10 MB and three times as much of old ones."""
    assert (log._SIZE, log._OLD) == (10 * 1024 * 1024, 3)


def test_a_daemon_without_a_log_file_has_the_one_of_twistd(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without ``-n`` and without ``--logfile`` twistd writes twistd.log, and so do we."""
    monkeypatch.chdir(tmp_path)
    assert told() == tmp_path / "twistd.log"


@pytest.mark.parametrize(
    "options",
    [
        {"nodaemon": 1},
        {"debug": 1},
        {"nodaemon": 1, "logfile": "-"},
        {"syslog": 1, "logfile": "gw.log"},
        {"logger": "a.logger.of.the.user", "logfile": "gw.log"},
    ],
)
def test_a_log_that_goes_elsewhere_is_left_alone(options: dict[str, Any]) -> None:
    """A terminal, the journal and syslog are not ours to bound."""
    assert told(**options) is None


def test_options_without_twistd() -> None:
    """Where there is no twistd there is nothing to bound."""
    assert log.log_file(None) is None


def test_a_process_takes_its_log_with_it(tmp_path: Path) -> None:
    """What runs it is told where to log before it begins to; or left alone."""
    for path, expected in ((None, False), (tmp_path / "gw.log", True)):
        application = Application("test")
        process = log.Logged(path)
        process.setServiceParent(application)
        assert process.parent is IServiceCollection(application)
        taken = application.getComponent(ILogObserver, None)
        assert (taken is not None) == expected
    written(taken, "hello")
    assert "hello" in (tmp_path / "gw.log").read_text()


@pytest.mark.parametrize(
    ("said", "written_down"),
    [
        ("plain words, \xfcnd caf\xe9 \u2713", None),
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("a\rb\x00c\x9bd", r"a\rb\x00c\x9bd"),
        ("\u202eabc\u2028d\ud800", r"\u202eabc\u2028d\ud800"),
        ("one\ttwo", None),
    ],
)
def test_what_is_logged_does_not_steer_the_terminal(said: str, written_down: str | None) -> None:
    """Clients and servers choose some of its words; they stay words, on a line with a time."""
    text = log.in_words({**event("{said}"), "said": said, "log_format": "{said}"})
    assert text is not None
    assert text.endswith(f" [-] {written_down or said}\n")


def test_a_line_of_the_log_cannot_be_made_up(tmp_path: Path) -> None:
    """What follows a line break begins with a tab, where others have their time."""
    forged = "x\n1970-01-01T00:00:00+0000 [-] tier main: all is well"
    path = tmp_path / "gw.log"
    written(log.observer(path), forged, forged.replace("\n", "\r\n"))
    first = [line[:1] for line in path.read_text().split("\n")]
    assert first == ["1", "\t", "1", "\t", ""]


def test_a_terminal_gets_the_same() -> None:
    """So does the journal; syslog and a logger of the user's are left alone."""
    twistd = Options()
    twistd.update({"nodaemon": 1, "debug": 0, "logfile": None})
    assert log.output(twistd) is sys.stdout
    assert log.output(None) is None
    for elsewhere in ({"syslog": 1}, {"logger": "a.logger"}, {"logfile": "gw.log"}):
        other = Options()
        other.update({"nodaemon": 1, "debug": 0, "logfile": None, **elsewhere})
        assert log.output(other) is None
    shown = io.StringIO()
    application = Application("test")
    log.Logged(None, shown).setServiceParent(application)
    application.getComponent(ILogObserver)(event("\x1b[2J"))
    assert shown.getvalue().endswith(" [-] \\x1b[2J\n")


@contextmanager
def standard_output(path: Path) -> Iterator[None]:
    """Let the file at `path` be our standard output, as launchd opens it."""
    kept = os.dup(1)
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(descriptor, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(descriptor)


@pytest.mark.parametrize(("size", "left"), [(1024 * 1024 + 1, 0), (1024 * 1024, 1024 * 1024)])
def test_what_launchd_writes_down_is_bounded(tmp_path: Path, size: int, left: int) -> None:
    """Starts that fail again and again do not fill the disk; what is short is kept to be read."""
    output = tmp_path / "launchd.log"
    with standard_output(output):
        os.truncate(output, size)
        told(nodaemon=1, logfile=str(tmp_path / "claudegw.log"))
    assert output.stat().st_size == left


def test_a_file_that_is_not_our_output_is_kept(tmp_path: Path) -> None:
    """Whatever else has that name is not ours to empty."""
    other = tmp_path / "launchd.log"
    other.write_bytes(b"x" * (2 * 1024 * 1024))
    told(nodaemon=1, logfile=str(tmp_path / "claudegw.log"))
    assert other.stat().st_size == 2 * 1024 * 1024
