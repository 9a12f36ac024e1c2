"""
What a scrape of ``/metrics`` costs a gateway that is busy.

``python -m bench.metrics [--calls N] [--records N] [--scrapes N]``: a whole gateway in memory, with
calls in line, a server of ours in each tier, and past calls of every kind and outcome.  It is the
reactor's time: nobody else gets a byte meanwhile.  The budget is for the CPU's share of it, which
does not depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any, Final

import attrs

from bench.waiting import show
from gateway.history import Bounds, History
from gateway.llama.child import State
from gateway.policy.calls import KINDS
from tests.house import CLAUDE_CODE, FakeLlama, Household, turn

#: Milliseconds that a scrape may cost.
BUDGET: Final = 5.0

#: An outcome of each class.
OUTCOMES: Final = (
    *("answered", "cancelled", "400 invalid_request_error", "529 overloaded_error"),
    *("503 api_error", "500 internal", "broken: overloaded_error"),
)


@attrs.frozen
class Child:
    """A server of ours, as far as figures go."""

    state: State = State.READY
    starts: int = 1


def main() -> int:
    """A table; 0 if the cost is within the budget."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--calls", type=int, default=1000)
    options.add_argument("--records", type=int, default=100_000)
    options.add_argument("--scrapes", type=int, default=300)
    given = options.parse_args()
    house = busy(given.calls, given.records)
    costs = [scrape(house) for _ in range(given.scrapes + 20)][20:]
    waiting = house.api.dispatch.tiers["main"].waiting
    lines = house.api.metrics.text().count(b"\n")
    assert waiting == given.calls
    show("calls in line, calls that are over", f"{waiting}, {given.records}")
    show("lines of text", str(lines))
    for what, took in zip(("CPU", "time"), zip(*costs, strict=True), strict=True):
        p50, p99 = statistics.median(took), statistics.quantiles(took, n=100)[98]
        show(f"{what} of a scrape ({given.scrapes})", f"p50 {p50:.2f} ms, p99 {p99:.2f} ms")
    return 0 if statistics.median(cpu for cpu, _ in costs) < BUDGET else 1


def busy(calls: int, records: int) -> Household:
    """A gateway with `calls` in line, behind one, and `records` that are over."""
    house = Household.built(main=FakeLlama(n_ctx=65536), max_waiting=calls)
    dispatch = house.api.dispatch
    dispatch.ledger.history = History(Path("/nowhere"), Bounds(0, 0), None)
    every = list(product(KINDS, dispatch.tiers, OUTCOMES, (False, True)))
    for number in range(records):
        record: Any
        with dispatch.ledger.call(f"req_{number}") as record:
            record.kind, record.tier, record.outcome, record.background = every[number % len(every)]
            dispatch.ledger.started(record)
            dispatch.ledger.content(record)
    for number in range(calls + 1):
        browser = house.browser()
        browser.post(turn(f"{number} " + "word " * 1000, stream=True), **agent(number))
        if number % 50 == 0:
            house.settle()
    house.settle()
    for tier in dispatch.tiers.values():
        tier.child = Child()  # type: ignore[assignment]  # all of it that a scrape looks at
    return house


def agent(number: int) -> dict[str, str]:
    """Every second caller is Claude Code."""
    return {"user_agent": CLAUDE_CODE["user-agent"]} if number % 2 else {}


def scrape(house: Household) -> tuple[float, float]:
    """Milliseconds of CPU, and in all, from the request's last byte to the answer's."""
    browser = house.browser()
    began, busy_before = time.perf_counter(), time.process_time()
    browser.get("/metrics")
    cpu, took = time.process_time() - busy_before, time.perf_counter() - began
    assert browser.ended
    return 1000 * cpu, 1000 * took


if __name__ == "__main__":
    sys.exit(main())
