"""
Starts a program that ends when the gateway does, however the gateway ends.

On Linux the kernel kills a child whose parent is gone, if the child asked for it.  Twisted has no
hook between fork and exec, so this file stands there as a program of its own: it asks, and becomes
what it was told to run.  The process id stays, and no second process does.  Elsewhere nobody asks:
under launchd the job's process group ends with the job, and `gateway.llama.orphans` does the rest.

Run by its path, without ``site``, and with few imports: ``signal`` and ``typing`` alone would cost
as much as all the rest.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

#: ``linux/prctl.h``
_PR_SET_PDEATHSIG = 1

#: ``asm/signal.h`` of every machine that llama.cpp is built for.
_SIGKILL, _SIGPIPE, _SIGXFSZ = 9, 13, 25

#: What a shell says of a program that it cannot run.
_CANNOT_RUN = 127


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
    _ask_the_kernel()
    os.setpgid(0, 0)  # a Control-C at the gateway's terminal is for the gateway alone
    if os.getppid() != int(parent):
        return _CANNOT_RUN  # it was gone before the kernel knew what to do then
    try:
        os.execvp(command[0], command)  # noqa: S606  # no shell is wanted
    except OSError as error:
        sys.stderr.write(f"{command[0]}: {error.strerror}\n")
        return _CANNOT_RUN


def _ask_the_kernel() -> None:
    """Have it end us with our parent; without that, the next start ends what is left."""
    try:
        import ctypes  # a Python can be built without it

        libc = ctypes.CDLL(None)
        libc.prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0)
        # Python ignores these, and what is ignored stays so beyond exec.
        for ignored in (_SIGPIPE, _SIGXFSZ):
            libc.signal(ignored, None)
    except (ImportError, OSError, AttributeError) as error:
        sys.stderr.write(f"cannot end with the gateway: {error}\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
