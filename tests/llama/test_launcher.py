"""Starting a program that ends with its parent; the processes here are real and do nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from gateway.llama.launcher import launched
from tests.e2e.clients import eventually

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system has no such thing"),
]

ROOT = Path(__file__).parents[2]

#: Says which process it is and how it was called, and waits for ever.
CHILD = """
import os, signal, sys
called = open('/proc/self/cmdline').read().split('\\0')[:-1]
print(os.getpid(), os.getppid(), called, flush=True)
signal.pause()
"""

#: A gateway that starts a child and waits for ever.
GATEWAY = """
import os, signal, subprocess, sys
from gateway.llama.launcher import launched
child = subprocess.Popen(launched(sys.argv[1:], os.environ))
signal.pause()
"""


def run(words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)


def is_gone(pid: int) -> bool:
    """Whether the process is dead, be it collected or not."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_the_program_takes_the_launchers_place() -> None:
    """One process, with the id that was given out, our child, called as it was to be."""
    words = [sys.executable, "-c", CHILD, "one", "two words", ""]
    process = subprocess.Popen(launched(words, os.environ), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = process.stdout.readline()
    process.kill()
    process.communicate()
    assert said == f"{process.pid} {os.getpid()} {words}\n"


def test_nothing_that_python_ignores_stays_ignored() -> None:
    """A program that is not in Python gets the signals that Python has no use for."""
    done = run(launched(["grep", "SigIgn", "/proc/self/status"], os.environ))
    ignored = int(done.stdout.split()[1], 16)
    assert not ignored & (1 << (signal.SIGPIPE - 1))
    assert not ignored & (1 << (signal.SIGXFSZ - 1))


def test_a_child_does_not_outlive_a_parent_that_is_killed() -> None:
    """SIGKILL of the one is the end of the other."""
    words = [sys.executable, "-c", GATEWAY, sys.executable, "-c", CHILD]
    gateway = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert gateway.stdout is not None
    pid = int(gateway.stdout.readline().split()[0])
    assert not is_gone(pid)
    gateway.kill()
    gateway.communicate()
    assert eventually(lambda: is_gone(pid), 30)


def test_a_parent_that_is_gone_already_gets_no_child() -> None:
    """Who started it is not who it was started for: nothing is run."""
    words = launched([sys.executable, "-c", "print('ran')"], os.environ)
    words[words.index(str(os.getpid()))] = "1"
    done = run(words)
    assert (done.returncode, done.stdout) == (127, "")


def test_a_program_that_cannot_be_run_is_named(tmp_path: Path) -> None:
    """What the system has against it is said in one line."""
    broken = tmp_path / "broken"
    broken.write_text("#!/no/such/interpreter\n")
    broken.chmod(0o700)
    done = run(launched([str(broken)], os.environ))
    assert (done.returncode, done.stderr) == (127, f"{broken}: No such file or directory\n")


def test_a_program_that_is_not_there_is_told_at_once(tmp_path: Path) -> None:
    """It is looked for where the child would look for it; what cannot be run is not found."""
    (tmp_path / "llama-server").touch(mode=0o600)
    with pytest.raises(FileNotFoundError, match="'llama-server' that can be run"):
        launched(["llama-server"], {"PATH": str(tmp_path)})
    (tmp_path / "llama-server").chmod(0o700)
    assert launched(["llama-server"], {"PATH": str(tmp_path)})[-1] == "llama-server"


def test_elsewhere_the_command_is_run_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody can be asked on macOS; the job's process group does it there."""
    monkeypatch.setattr(sys, "platform", "darwin")
    assert launched([sys.executable, "-V"], os.environ) == [sys.executable, "-V"]
