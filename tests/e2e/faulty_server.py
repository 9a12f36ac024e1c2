"""
The embedded server with faults: ``python -m tests.e2e.faulty_server ORDERS OPTION...``.

What stands in the file ORDERS is done at the next start, once: ``exit``, it says that it loads and
ends with status 1; ``slow``, it says so for some seconds and then loads.  On SIGUSR1 it shouts ten
megabytes without a newline, and behind them a line with what stands in ORDERS.  All of it is one
process.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Final

from gateway.llama import embedded

#: Seconds for which it says that it loads: before it ends, and before it is there.
EXIT_AFTER: Final = 0.5
SLOW: Final = 3.0

#: Bytes of a shout.
SHOUT: Final = 10 * 1024 * 1024


class _Loading(BaseHTTPRequestHandler):
    """What a llama-server says while it loads."""

    def do_GET(self) -> None:
        said = b'{"error":{"message":"Loading model","type":"unavailable_error","code":503}}'
        self.send_response(503)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    def do_POST(self) -> None:
        self.do_GET()

    def log_message(self, *_: object) -> None:
        """Nothing: the figures of a test are elsewhere."""


def load(port: int, seconds: float) -> None:
    """Say that a model is being loaded."""
    with ThreadingHTTPServer(("127.0.0.1", port), _Loading) as server:
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}).start()
        time.sleep(seconds)
        server.shutdown()


def taken(orders: Path) -> str:
    """What stands there, and no longer does."""
    order = orders.read_text() if orders.exists() else ""
    orders.unlink(missing_ok=True)
    return order


def shout(orders: Path) -> None:
    """Whenever it is asked for."""
    while True:
        signal.sigwait({signal.SIGUSR1})
        left = memoryview(b"x" * SHOUT + f"\n{taken(orders)}\n".encode())
        while left:
            left = left[os.write(2, left) :]


def main(arguments: Sequence[str]) -> int:
    orders, options = Path(arguments[0]), arguments[1:]
    # Blocked before there is a second thread, so that each signal goes to who waits for it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    port = embedded.parser().parse_args(options).port
    match taken(orders):
        case "exit":
            load(port, EXIT_AFTER)
            return 1
        case "slow":
            load(port, SLOW)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    Thread(target=shout, args=(orders,), daemon=True).start()
    return embedded.main(options)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
