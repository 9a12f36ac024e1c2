"""
Starts a program that ends when the gateway does, however the gateway ends.

On Linux the kernel kills a child whose parent is gone, if the child asked for it.  Twisted has no
hook between fork and exec, so this file stands there as a program of its own: it asks, and becomes
what it was told to run.  The process id stays, and no second process does.  Elsewhere nobody asks:
under launchd the job's process group ends with the job, and `gateway.llama.orphans` does the rest.

Run by its path, without ``site``, so that it costs 30 ms of a start that takes seconds.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Final

#: ``linux/prctl.h``
_PR_SET_PDEATHSIG: Final = 1

#: What a shell says of a program that it cannot run.
_CANNOT_RUN: Final = 127


def launched(command: Sequence[str], env: Mapping[str, str]) -> list[str]:
    """
    The command line that runs `command` for as long as this process lives, where that can be had.

    Raises:
        FileNotFoundError: no such program can be run in `env`.
    """
    from shutil import which  # not in what the program below waits for

    if which(command[0], path=env.get("PATH")) is None:
        raise FileNotFoundError(f"there is no program {command[0]!r} that can be run")
    if sys.platform != "linux":
        return list(command)
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), *command]


def main(arguments: Sequence[str]) -> int:
    """Become the program in `arguments`, behind the process id of who started us."""
    parent, *command = arguments
    _die_with_parent()
    if os.getppid() != int(parent):
        return _CANNOT_RUN  # it was gone before the kernel knew what to do then
    # Python ignores these, and what is ignored stays so beyond exec.
    for ignored in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(ignored, signal.SIG_DFL)
    try:
        os.execvp(command[0], command)  # noqa: S606  # no shell is wanted
    except OSError as error:
        sys.stderr.write(f"{command[0]}: {error.strerror}\n")
        return _CANNOT_RUN


def _die_with_parent() -> None:
    """Without it the program still runs, and the next start ends it if need be."""
    try:
        import ctypes  # a Python can be built without it

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    except (ImportError, OSError, AttributeError) as error:
        sys.stderr.write(f"cannot end with the gateway: {error}\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
