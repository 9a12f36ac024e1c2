"""The ledger of a real gateway that is killed, or whose disk is full."""

from __future__ import annotations

import resource
import signal
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import orjson
import pytest
from prometheus_client.parser import text_string_to_metric_families

from gateway.history import FILE
from tests.e2e.clients import CLAUDEGW, eventually
from tests.e2e.scripted_llama import ScriptedLlama
from tests.e2e.stack import Running, configure, free_port, run_gateway
from tests.e2e.test_second_session import says_hello

pytestmark = pytest.mark.server


@pytest.fixture
def port(tmp_path: Path) -> Iterator[int]:
    """Where a gateway will listen whose model is there; it keeps 50 calls."""
    port = free_port()
    with ScriptedLlama(says_hello).serving() as llama:
        configure(tmp_path, port, {"main": {"url": llama.url}}, "ledger_rows = 50")
        yield port


def call(gateway: Running) -> str:
    """One call that is answered; its id."""
    body = {"model": "any", "max_tokens": 10, "messages": [{"role": "user", "content": "hello"}]}
    status, _ = gateway.ask("/v1/messages", body)
    assert status == 200
    return str(ledger_of(gateway)["last"][0]["id"])


def ledger_of(gateway: Running) -> Any:
    return gateway.ask("/status")[1]


def listed(folder: Path, count: int) -> list[str]:
    """What ``claudegw status --last`` prints, the ids of it."""
    command = [str(CLAUDEGW), "status", "--last", str(count), "--json"]
    command += ["--config", str(folder / "gw.toml")]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return [each["id"] for each in orjson.loads(done.stdout)]


def test_a_gateway_that_is_killed_has_a_ledger(tmp_path: Path, port: int) -> None:
    """It is read while nobody runs, and the next gateway goes on with it."""
    gateway = run_gateway(tmp_path, port)
    try:
        calls = [call(gateway) for _ in range(60)]
        assert eventually(lambda: ledger_of(gateway)["ledger"]["written"] == 60, 60)
    finally:
        gateway.process.send_signal(signal.SIGKILL)
        gateway.process.wait()
    newest_first = calls[::-1]
    assert listed(tmp_path, 5) == newest_first[:5]
    assert listed(tmp_path, 100) == newest_first[:50]
    gateway = run_gateway(tmp_path, port)
    try:
        status = ledger_of(gateway)
        assert [each["id"] for each in status["last"]] == newest_first[:50]
        last = call(gateway)
        assert listed(tmp_path, 2) == [last, calls[-1]]
        said = gateway.ask_raw("/metrics")[1].decode()
        samples = {
            sample.name: sample.value
            for family in text_string_to_metric_families(said)
            for sample in family.samples
        }
        assert samples["claudegw_calls_total"] == 1
        assert samples["process_open_fds"] > 0
    finally:
        assert gateway.stop() == 0
    assert listed(tmp_path, 1) == [last]
    with closing(sqlite3.connect(tmp_path / FILE)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_a_full_disk_harms_no_call(tmp_path: Path, port: int) -> None:
    """Where no file can grow any more, calls are answered, and the log has one line on it."""

    def is_dealt_with() -> bool:
        ledger = ledger_of(gateway)["ledger"]
        return bool(ledger["written"] + ledger["lost"] == len(calls))

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, before[1]))  # the gateway inherits it
    try:
        gateway = run_gateway(tmp_path, port)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    try:
        calls: set[str] = set()
        for number in range(40):
            calls.add(call(gateway))
            assert len(calls) == number + 1
            assert eventually(is_dealt_with, 60)  # a write for each, that the file grows
        assert ledger_of(gateway)["ledger"]["lost"] > 0
        assert (tmp_path / "gateway.log").read_text().count("calls go on") == 1
    finally:
        assert gateway.stop() == 0
    with closing(sqlite3.connect(tmp_path / FILE)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
