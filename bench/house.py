"""A gateway with its servers, as `bench.soak` and `bench.load` see it from outside."""

from __future__ import annotations

import re
from typing import Any

import attrs
import psutil

from bench.processes import resident
from tests.e2e.stack import Running

Json = Any


@attrs.define(eq=False)
class House:
    """
    A gateway that runs.

    Attributes:
        gateway: its process.
    """

    gateway: Running

    def status(self) -> Json:
        return self.gateway.ask("/status")[1]

    def is_up(self) -> bool:
        """Whether its servers answer."""
        tiers = self.status()["tiers"].values()
        return all(tier["process"]["state"] == "ready" for tier in tiers)

    def is_idle(self) -> bool:
        """Whether no call is anywhere."""
        return not any(self.busy().values())

    def busy(self) -> dict[str, int]:
        """The calls that are somewhere, and the permits that are out."""
        tiers = self.status()["tiers"].values()
        return {
            what: sum(tier[what] for tier in tiers) for what in ("running", "waiting", "settling")
        }

    def log(self) -> str:
        return self.gateway.log.read_text("utf-8", "replace")

    def cries(self) -> list[str]:
        """What its log has of tracebacks and the like."""
        return re.findall(r"Traceback|Unhandled|\[[\w.#]+#critical\]", self.log())


@attrs.frozen
class Size:
    """What a gateway takes: memory in MB, open file descriptors, threads, children and timers."""

    memory: float
    files: int
    threads: int
    children: int
    timers: int

    @classmethod
    def of(cls, gateway: Running) -> Size:
        """What it takes now; raises AssertionError where it does not say."""
        status, said = gateway.ask_raw("/metrics")
        assert status == 200, said[:300]
        (timers,) = re.findall(rb"^claudegw_timers (\S+)$", said, re.MULTILINE)
        process = psutil.Process(gateway.process.pid)
        with process.oneshot():
            return cls(
                resident(process.pid),
                process.num_fds(),
                process.num_threads(),
                len(process.children(recursive=True)),
                round(float(timers)),
            )

    def __str__(self) -> str:
        return (
            f"{self.memory:.1f} MB, {self.files} file descriptors, {self.threads} threads,"
            f" {self.children} children, {self.timers} timers"
        )
