"""
A scripted server as a process: ``python -m tests.e2e.scripted_server PORT PREFILL PACE``.

It says the same to everybody, and is killed by a prompt with a certain word in it.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import Any, Final

from tests.e2e.scripted_llama import Block, ScriptedLlama, Text, rendered

#: What it says.
ANSWER: Final = "There are seven gates: the north gate, the east gate, and five that are smaller."

#: What it dies of.
POISON: Final = "hemlock"


def script(body: Any) -> Sequence[Block]:
    if POISON in rendered(body):
        os.abort()
    if "[SUGGESTION MODE" in rendered({"messages": body["messages"][-1:]}):
        return [Text("count the towers")]  # it would be seen, too
    return [Text(ANSWER)]


def command(port: int, prefill: float = 0.0, pace: float = 0.0) -> list[str]:
    """What starts it; seconds for each prompt and for each token."""
    words = [sys.executable, "-m", "tests.e2e.scripted_server", port, prefill, pace]
    return [str(word) for word in words]


def main(port: str, prefill: str, pace: str) -> None:
    llama = ScriptedLlama(script, prefill=float(prefill), pace=float(pace), port=int(port))
    with llama.serving():
        signal.sigwait({signal.SIGTERM})
        os._exit(0)  # nobody waits for the end of its streams


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    main(*sys.argv[1:])
