"""
What a thousand waiting calls cost, and how fast one that leaves is forgotten.

``python -m bench.waiting [--calls N] [--leaving N] [--seconds S]``: streams wait behind one call of
a scripted llama-server; some leave, one after the other; then all others are answered.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from bench.client import Client
from bench.processes import cpu, resident
from tests.e2e.clients import eventually
from tests.e2e.scripted_llama import ScriptedLlama
from tests.e2e.stack import Running, start_gateway
from tests.e2e.test_second_session import says_hello

Json = Any

#: Bytes of each prompt: what Claude Code sends as its first one.
PROMPT: Final = 60_000


def main() -> int:
    """A table; 0 if every call that stayed was answered and every permit came back."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--calls", type=int, default=1000)
    options.add_argument("--leaving", type=int, default=300)
    options.add_argument("--seconds", type=float, default=60)
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as name, ScriptedLlama(says_hello).serving() as llama:
        tier = {"url": llama.url, "slots": 1, "max_waiting": given.calls}
        gateway = start_gateway(Path(name), {"main": tier})
        try:
            return measure(gateway, llama, given.calls, given.leaving, given.seconds)
        finally:
            gateway.stop()


def measure(
    gateway: Running, llama: ScriptedLlama, calls: int, leaving: int, seconds: float
) -> int:
    """All of it, on a gateway that has done nothing yet."""
    pid = gateway.process.pid
    llama.prefill = seconds + 90  # the first call's; nobody else gets that far before it ends
    with ExitStack() as stack:
        before = resident(pid)
        stack.enter_context(Client.calling(gateway.port, body("first")))
        assert eventually(lambda: llama.processing, 30)
        began = time.monotonic()
        clients = [
            stack.enter_context(Client.calling(gateway.port, body(str(number))))
            for number in range(calls)
        ]
        assert eventually(lambda: waiting(gateway) == calls, 120)
        took = time.monotonic() - began
        show(f"{calls} calls of {PROMPT // 1000} KB are in line after", f"{took:.1f} s")
        show("memory before, with them in line", f"{before:.0f} MB, {resident(pid):.0f} MB")
        spent, since = cpu(pid), time.monotonic()
        time.sleep(seconds)
        share = (cpu(pid) - spent) / (time.monotonic() - since)
        show(f"CPU while they wait, over {seconds:.0f} s", f"{share:.2%} of a core")
        freed = [leave(gateway, client) for client in clients[:leaving]]
        show(
            f"a place is free after its client left ({leaving})",
            f"p50 {1000 * statistics.median(freed):.1f} ms, max {1000 * max(freed):.1f} ms",
        )
        llama.prefill = 0.0
        stayed = clients[leaving:]
        answered = sum(is_answered(client) for client in stayed)
        show("answered of those that stayed", f"{answered} of {len(stayed)}")
        assert eventually(lambda: waiting(gateway) == 0, 60)
        tier = gateway.ask("/status")[1]["tiers"]["main"]
        lost = tier["running"] + tier["settling"]
        show("permits lost", str(lost))
        show("memory at the end", f"{resident(pid):.0f} MB")
    return 0 if answered == len(stayed) and lost == 0 else 1


def show(what: str, figure: str) -> None:
    """One row."""
    print(f"{what:<48} {figure}", flush=True)


def body(which: str) -> Json:
    """A prompt that no other call has."""
    words = f"{which} " + "gate " * (PROMPT // 5)
    return {
        "model": "any",
        "max_tokens": 10,
        "stream": True,
        "messages": [{"role": "user", "content": words}],
    }


def waiting(gateway: Running, tier: str = "main") -> int:
    """The calls in line."""
    return int(gateway.ask("/status")[1]["tiers"][tier]["waiting"])


def leave(gateway: Running, client: Client, tier: str = "main") -> float:
    """Seconds from a client's leaving until the gateway shows one call less in that line."""
    before = waiting(gateway, tier)
    began = client.leave()
    while waiting(gateway, tier) >= before:
        pass
    return time.monotonic() - began


def is_answered(client: Client) -> bool:
    """Whether its answer comes to its end."""
    client.connection.settimeout(600)
    try:
        client.read_until(b"message_stop")
    except EOFError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
