"""
What an open page costs the gateway, and how soon it shows what has changed.

``python -m bench.page [--seconds S]``: a real gateway with a call in prefill, five in line and 25
past ones, looked at by none, one and five pages; then changes in a headless Chromium, timed.
"""

from __future__ import annotations

import argparse
import random
import socket
import statistics
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Final, Self

from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.support.wait import WebDriverWait
from twisted.internet import reactor as real_reactor
from twisted.internet.threads import deferToThread

from bench.client import Client
from bench.processes import cpu
from bench.waiting import body
from tests.e2e.chromium import chromium, serve
from tests.e2e.clients import eventually
from tests.e2e.scripted_llama import ScriptedLlama
from tests.e2e.stack import Running, start_gateway
from tests.e2e.test_second_session import says_hello
from tests.scene import Scene

#: Changes that are timed in the browser.
CHANGES: Final = 20

reactor: Any = real_reactor


def main() -> int:
    """A table; 0 if every change was seen."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--seconds", type=float, default=20)
    seconds = options.parse_args().seconds
    with tempfile.TemporaryDirectory() as name, ScriptedLlama(says_hello).serving() as llama:
        gateway = start_gateway(Path(name), {"main": {"url": llama.url, "slots": 1}})
        try:
            costs(gateway, llama, seconds)
        finally:
            gateway.stop()
    return delays()


def costs(gateway: Running, llama: ScriptedLlama, seconds: float) -> None:
    """The gateway's share of a core, by how many pages are open."""
    pid = gateway.process.pid
    for number in range(25):
        said = [{"role": "user", "content": f"question {number}"}]
        gateway.ask("/v1/messages", {"model": "m", "max_tokens": 9, "messages": said})
    llama.prefill = 10 * seconds + 60
    with ExitStack() as stack:
        for number in range(6):
            stack.enter_context(Client.calling(gateway.port, body(str(number))))
            assert eventually(lambda: llama.processing, 30)
        for pages in (0, 1, 5):
            with ExitStack() as open_pages:
                counts = [open_pages.enter_context(Page(gateway.port)) for _ in range(pages)]
                time.sleep(2)
                before, bytes_before = cpu(pid), [page.read for page in counts]
                time.sleep(seconds)
                used = 100 * (cpu(pid) - before) / seconds
                sent = [page.read - old for page, old in zip(counts, bytes_before, strict=True)]
                each = f", {statistics.mean(sent) / seconds / 1000:.1f} kB/s each" if sent else ""
                print(f"{pages} open: {used:.2f} % of a core{each}")
    began, answers = cpu(pid), 50
    for _ in range(answers):
        _, page = gateway.ask_raw("/")
    print(f"GET /: {1000 * (cpu(pid) - began) / answers:.1f} ms of CPU, {len(page)} bytes")


class Page:
    """An open page, which reads and draws nothing; `read` is how many bytes."""

    def __init__(self, port: int) -> None:
        self.read = 0
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.sendall(b"GET /page/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        self._thread = threading.Thread(target=self._reads)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()

    def _reads(self) -> None:
        while data := self._socket.recv(65536):
            self.read += len(data)


def delays() -> int:
    """How soon changes are seen in a browser."""
    scene, took = Scene(reactor), []
    door = serve(scene, reactor)

    def seen(wanted: str, browser: WebDriver) -> bool:
        return wanted in browser.find_element(By.ID, "tiers").text

    def look() -> None:
        with tempfile.TemporaryDirectory() as profile, chromium(Path(profile)) as browser:
            browser.get(f"http://127.0.0.1:{door.getHost().port}/")
            for number in range(CHANGES):
                time.sleep(1 + random.random())
                wanted = f"{700 + number} 000"
                began = time.monotonic()
                scene.said["tiers"]["main"]["server"]["n_ctx"] = int(wanted.replace(" ", ""))
                WebDriverWait(browser, 10, 0.01).until(partial(seen, wanted))
                took.append(time.monotonic() - began)

    done = deferToThread(look)
    done.addErrback(lambda failure: failure.printTraceback())
    done.addBoth(lambda _: reactor.stop())
    reactor.run()
    if len(took) < CHANGES:
        return 1
    print(f"a change is seen after {statistics.median(took):.2f} s, at most {max(took):.2f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
