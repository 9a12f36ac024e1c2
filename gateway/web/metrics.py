"""
What ``GET /metrics`` says, for Prometheus and whatever reads its text.

Calls are counted when they are over, as the ledger tells of them; all else is looked up when
somebody asks.  No label has a value that a client can choose: kinds and outcomes are folded into
those that are known, and tiers are those of the configuration.  A ``count`` is counted among the
calls, but neither its waits nor its tokens are: no model worked for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import attrs
import psutil
from prometheus_client import CollectorRegistry, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector

from gateway.dispatch import Dispatch
from gateway.ledger import ENDED_BY_HAND
from gateway.llama.child import State
from gateway.policy.calls import KINDS

Json = Any

CONTENT_TYPE: Final = CONTENT_TYPE_PLAIN_0_0_4

#: Seconds: a warm answer begins within one, a cold prompt takes minutes, a line of them an hour.
BUCKETS: Final = (
    *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
    *(60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0),
)

#: What becomes of calls; `outcome_of` says which is which.
OUTCOMES: Final = (
    "answered",
    "cancelled",
    "refused",
    "overloaded",
    "unavailable",
    "failed",
    "broken",
)

#: The statuses that say more than that something failed.
_BY_STATUS: Final[Mapping[int, str]] = {429: "overloaded", 503: "unavailable", 529: "overloaded"}

#: What is said of each tier's `gateway.tier.cache.Numbers`: the figure, the name, the help.
_CACHE: Final = (
    ("cached_tokens_total", "claudegw_cached_tokens", "Prompt tokens that a server still had."),
    ("prefilled_tokens_total", "claudegw_prefilled_tokens", "Prompt tokens that were evaluated."),
    (
        "avoidable_tokens_total",
        "claudegw_avoidable_tokens",
        "Prompt tokens that were evaluated and need not have been.",
    ),
    ("saves_total", "claudegw_snapshot_saves", "Slots that were saved."),
    (
        "save_seconds_total",
        "claudegw_snapshot_save_seconds",
        "Seconds that saving took, checksums included.",
    ),
    ("save_bytes_total", "claudegw_snapshot_save_bytes", "Bytes that were saved."),
    ("restores_total", "claudegw_snapshot_restores", "Slots that were restored."),
    (
        "restore_seconds_total",
        "claudegw_snapshot_restore_seconds",
        "Seconds that restoring took, checksums included.",
    ),
    ("restore_bytes_total", "claudegw_snapshot_restore_bytes", "Bytes that were restored."),
    (
        "ineffective_restores_total",
        "claudegw_snapshot_ineffective_restores",
        "Restores that spared nothing.",
    ),
)


@attrs.define(eq=False)
class Metrics:
    """
    All figures of one gateway.

    Attributes:
        dispatch: whose figures they are.
        version: ours.
    """

    dispatch: Dispatch
    version: str
    _registry: CollectorRegistry = attrs.field(factory=CollectorRegistry, init=False)
    _calls: Counter[tuple[str, str, str]] = attrs.field(factory=Counter, init=False)
    _generated: Counter[str] = attrs.field(factory=Counter, init=False)
    _waits: Histogram = attrs.field(init=False)
    _firsts: Histogram = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._waits = _seconds(
            "claudegw_wait_seconds",
            "Seconds from a call's arrival to its turn, or to its leaving the line.",
            "tier",
            "background",
        )
        self._firsts = _seconds(
            "claudegw_first_content_seconds",
            "Seconds from a call's turn to the first content of its answer.",
            "tier",
        )
        self.dispatch.ledger.heard.append(self._hear)
        for collect in (self._counted, self._looked_up):
            self._registry.register(_Collected(collect))
        _process(self._registry)

    def text(self) -> bytes:
        """All of it, as `CONTENT_TYPE`; OpenMetrics takes half as long again to write."""
        return generate_latest(self._registry)

    # --- what the ledger tells --------------------------------------------------------------------

    def _hear(self, call: Mapping[str, Json]) -> None:
        """A call is over."""
        kind, outcome = call["kind"], outcome_of(call["outcome"])
        tier = call["tier"] or "none"
        known = kind if kind in KINDS else "other" if kind else "unknown"
        self._calls[known, tier, outcome] += 1
        if kind == "count" or not call["tier"] or outcome in ("refused", "overloaded"):
            return
        background = "true" if call["background"] else "false"
        self._waits.labels(tier, background).observe(call["waited"])
        self._generated[tier] += call["output"]
        if call["first"] is not None:
            self._firsts.labels(tier).observe(call["first"])

    def _counted(self) -> Iterator[Metric]:
        calls = CounterMetricFamily(
            "claudegw_calls", "Calls that are over.", labels=["kind", "tier", "outcome"]
        )
        for labels, number in self._calls.items():
            calls.add_metric(labels, number)
        generated = CounterMetricFamily(
            "claudegw_generated_tokens", "Tokens that were generated.", labels=["tier"]
        )
        for tier, tokens in self._generated.items():
            generated.add_metric([tier], tokens)
        yield from (calls, generated)
        for histogram in (self._waits, self._firsts):
            for family in histogram.collect():
                # When each was begun is a series more for each, and nobody's question.
                family.samples = [
                    each for each in family.samples if not each.name.endswith("_created")
                ]
                yield family

    # --- what is looked up ------------------------------------------------------------------------

    def _looked_up(self) -> Iterator[Metric]:
        version = GaugeMetricFamily("claudegw_info", "This gateway.", labels=["version"])
        version.add_metric([self.version], 1)
        yield version
        yield GaugeMetricFamily(
            "claudegw_timers",
            "Timers that are set; without calls they come back to the same few.",
            len(self.dispatch.reactor.getDelayedCalls()),
        )
        yield from self._lines()
        yield from self._servers()
        yield from self._caches()
        history = self.dispatch.ledger.history
        if history is not None:
            rows = CounterMetricFamily(
                "claudegw_ledger_rows",
                "Rows of the ledger on the disk, by what became of them.",
                labels=["result"],
            )
            for result in ("written", "dropped", "lost"):
                rows.add_metric([result], getattr(history, result))
            yield rows

    def _lines(self) -> Iterator[Metric]:
        waiting = _by_tier("claudegw_waiting_calls", "Calls that wait, in line or for a server.")
        running = _by_tier("claudegw_running_calls", "Calls that have a slot.")
        settling = _by_tier(
            "claudegw_settling_slots", "Slots that may still work for a client that left."
        )
        slots = _by_tier("claudegw_slots", "Slots that there are.")
        for name, tier in self.dispatch.tiers.items():
            waiting.add_metric([name], tier.waiting)
            running.add_metric([name], tier.line.running)
            settling.add_metric([name], tier.line.settling)
            slots.add_metric([name], tier.config.slots)
        yield from (waiting, running, settling, slots)

    def _servers(self) -> Iterator[Metric]:
        states = GaugeMetricFamily(
            "claudegw_server_state",
            "1 for the state that a server of ours is in.",
            labels=["tier", "state"],
        )
        starts = CounterMetricFamily(
            "claudegw_server_starts",
            "Starts of a server of ours; all but the first are restarts.",
            labels=["tier"],
        )
        for name, tier in self.dispatch.tiers.items():
            if tier.child is not None:
                for state in State:
                    states.add_metric([name, state.value], tier.child.state is state)
                starts.add_metric([name], tier.child.starts)
        yield from (states, starts)

    def _caches(self) -> Iterator[Metric]:
        tiers = self.dispatch.tiers
        for figure, name, what in _CACHE:
            family = CounterMetricFamily(name, what, labels=["tier"])
            for tier in tiers.values():
                family.add_metric([tier.name], getattr(tier.cache.numbers, figure))
            yield family
        # Tiers share a store.
        stores = {tier.cache.store for tier in tiers.values() if tier.cache.store is not None}
        yield GaugeMetricFamily(
            "claudegw_snapshots",
            "Snapshots that there are.",
            sum(len(store.snapshots) for store in stores),
        )
        yield GaugeMetricFamily(
            "claudegw_snapshot_bytes",
            "Bytes that snapshots have on the disk.",
            sum(store.size for store in stores),
        )


def outcome_of(outcome: str) -> str:
    """What became of a call, as one of `OUTCOMES`; `outcome` is in a record's own words."""
    if outcome in ("answered", "cancelled"):
        return outcome
    if outcome == ENDED_BY_HAND:
        return "cancelled"
    if outcome.startswith("broken"):
        return "broken"
    word = outcome.partition(" ")[0]
    status = int(word) if word.isdecimal() else 500
    return _BY_STATUS.get(status, "refused" if status < 500 else "failed")


def _seconds(name: str, what: str, *labels: str) -> Histogram:
    """A histogram that `Metrics` collects itself."""
    return Histogram(name, what, labels, buckets=BUCKETS, registry=None)


def _by_tier(name: str, what: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, what, labels=["tier"])


@attrs.define(eq=False)
class _Collected(Collector):
    """Whatever a function gives."""

    _collect: Callable[[], Iterable[Metric]]

    def collect(self) -> Iterable[Metric]:
        return self._collect()


# --- the process ----------------------------------------------------------------------------------


def _process(registry: CollectorRegistry) -> None:
    """Have the figures of this process, by the usual names, whatever system it is on."""
    if Path("/proc/stat").exists():
        ProcessCollector(registry=registry)
    else:
        # This process may fork before it is asked: it daemonizes.
        registry.register(_Collected(lambda: process_figures(psutil.Process())))


def process_figures(process: psutil.Process) -> Iterator[Metric]:
    """The figures of `process` where there is no ``/proc``: a Mac's."""
    with process.oneshot():
        cpu, memory = process.cpu_times(), process.memory_info()
        opened, began = process.num_fds(), process.create_time()
    yield CounterMetricFamily(
        "process_cpu_seconds", "Total user and system CPU time in seconds.", cpu.user + cpu.system
    )
    for name, what, figure in (
        ("process_resident_memory_bytes", "Resident memory in bytes.", memory.rss),
        ("process_virtual_memory_bytes", "Virtual memory in bytes.", memory.vms),
        ("process_start_time_seconds", "Start of the process, in seconds of the epoch.", began),
        ("process_open_fds", "Number of open file descriptors.", opened),
    ):
        yield GaugeMetricFamily(name, what, figure)
