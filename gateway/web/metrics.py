"""
What ``GET /metrics`` says, for Prometheus and whatever reads its text.

Calls are counted when they are over, as the ledger tells of them; all else is looked up when
somebody asks.  No label has a value that a client can choose: kinds and outcomes are folded into
those that are known, and tiers are those of the configuration.  A ``count`` is counted among the
calls, but neither its waits nor its tokens are: no model worked for it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from itertools import accumulate, chain
from operator import attrgetter
from pathlib import Path
from typing import Any, Final

import attrs
import psutil
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector

from gateway.dispatch import Dispatch
from gateway.figures import ENDED_BY_HAND
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

#: What is said of each tier's line, likewise.
_LINE: Final = (
    ("waiting", "claudegw_waiting_calls", "Calls that wait, in line or for a server."),
    ("line.running", "claudegw_running_calls", "Calls that have a slot."),
    (
        "line.settling",
        "claudegw_settling_slots",
        "Slots that may still work for a client that left.",
    ),
    ("config.slots", "claudegw_slots", "Slots that there are."),
)

#: What must not stand in the value of a label as it is.
_ESCAPED: Final = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


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
    _process: CollectorRegistry = attrs.field(init=False)
    _calls: Counter[str] = attrs.field(factory=Counter, init=False)
    _generated: Counter[str] = attrs.field(factory=Counter, init=False)
    _waits: dict[str, _Seconds] = attrs.field(factory=dict, init=False)
    _firsts: dict[str, _Seconds] = attrs.field(factory=dict, init=False)

    def __attrs_post_init__(self) -> None:
        self._process = _process()
        self.dispatch.ledger.heard.append(self._hear)

    def text(self) -> bytes:
        """
        All of it, as `CONTENT_TYPE`.

        Written here: streams stand still for a scrape, and the library's writer takes three times
        as long.  What is text to people and to Prometheus its parser says in the tests.
        """
        said = chain(self._counted(), self._looked_up())
        return "".join(said).encode() + generate_latest(self._process)

    # --- what the ledger tells --------------------------------------------------------------------

    def _hear(self, call: Mapping[str, Json]) -> None:
        """A call is over."""
        kind, outcome = call["kind"], outcome_of(call["outcome"])
        tier = call["tier"] or "none"
        known = kind if kind in KINDS else "other" if kind else "unknown"
        self._calls[_labels(kind=known, tier=tier, outcome=outcome)] += 1
        if kind == "count" or not call["tier"] or outcome in ("refused", "overloaded"):
            return
        of_tier = _labels(tier=tier)
        waits = _labels(tier=tier, background="true" if call["background"] else "false")
        self._waits.setdefault(waits, _Seconds()).add(call["waited"])
        self._generated[of_tier] += call["output"]
        if call["first"] is not None:
            self._firsts.setdefault(of_tier, _Seconds()).add(call["first"])

    def _counted(self) -> Iterator[str]:
        yield _counter("claudegw_calls", "Calls that are over.", self._calls)
        yield _counter("claudegw_generated_tokens", "Tokens that were generated.", self._generated)
        yield _histogram(
            "claudegw_wait_seconds",
            "Seconds from a call's arrival to its turn, or to its leaving the line.",
            self._waits,
        )
        yield _histogram(
            "claudegw_first_content_seconds",
            "Seconds from a call's turn to the first content of its answer.",
            self._firsts,
        )

    # --- what is looked up ------------------------------------------------------------------------

    def _looked_up(self) -> Iterator[str]:
        yield _gauge("claudegw_info", "This gateway.", {_labels(version=self.version): 1})
        yield _gauge(
            "claudegw_timers",
            "Timers that are set; without calls they come back to the same few.",
            {"": len(self.dispatch.reactor.getDelayedCalls())},
        )
        for figure, name, what in _LINE:
            yield _gauge(name, what, self._by_tier(figure))
        yield from self._servers()
        for figure, name, what in _CACHE:
            yield _counter(name, what, self._by_tier(f"cache.numbers.{figure}"))
        yield from self._stores()
        history = self.dispatch.ledger.history
        if history is not None:
            results = ("written", "dropped", "lost")
            yield _counter(
                "claudegw_ledger_rows",
                "Rows of the ledger on the disk, by what became of them.",
                {_labels(result=result): getattr(history, result) for result in results},
            )

    def _by_tier(self, figure: str) -> dict[str, float]:
        """A figure of each tier, by what it is called there."""
        found = attrgetter(figure)
        return {_labels(tier=name): found(tier) for name, tier in self.dispatch.tiers.items()}

    def _servers(self) -> Iterator[str]:
        ours = {name: tier.child for name, tier in self.dispatch.tiers.items() if tier.child}
        yield _gauge(
            "claudegw_server_state",
            "1 for the state that a server of ours is in.",
            {
                _labels(tier=name, state=state.value): int(child.state is state)
                for name, child in ours.items()
                for state in State
            },
        )
        yield _counter(
            "claudegw_server_starts",
            "Starts of a server of ours; all but the first are restarts.",
            {_labels(tier=name): child.starts for name, child in ours.items()},
        )

    def _stores(self) -> Iterator[str]:
        # Tiers share a store.
        tiers = self.dispatch.tiers.values()
        stores = {tier.cache.store for tier in tiers if tier.cache.store is not None}
        yield _gauge(
            "claudegw_snapshots",
            "Snapshots that there are.",
            {"": sum(len(store.snapshots) for store in stores)},
        )
        yield _gauge(
            "claudegw_snapshot_bytes",
            "Bytes that snapshots have on the disk.",
            {"": sum(store.size for store in stores)},
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


# --- the text -------------------------------------------------------------------------------------


@attrs.define(eq=False)
class _Seconds:
    """How long things took: in all, and how many up to each of `BUCKETS` and beyond."""

    total: float = 0.0
    counts: list[int] = attrs.field(factory=lambda: [0] * (len(BUCKETS) + 1))

    def add(self, seconds: float) -> None:
        self.total += seconds
        self.counts[bisect_left(BUCKETS, seconds)] += 1


@cache
def _labels(**labels: str) -> str:
    """Labels as the text has them; there are few, and each scrape has them again."""
    said = ",".join(f'{name}="{labels[name].translate(_ESCAPED)}"' for name in labels)
    return f"{{{said}}}"


def _gauge(name: str, what: str, figures: Mapping[str, float]) -> str:
    return _family(name, "gauge", what, (f"{name}{at} {figures[at]}" for at in figures))


def _counter(name: str, what: str, figures: Mapping[str, float]) -> str:
    name += "_total"
    return _family(name, "counter", what, (f"{name}{at} {figures[at]}" for at in figures))


def _histogram(name: str, what: str, figures: Mapping[str, _Seconds]) -> str:
    samples: list[str] = []
    for at, seconds in figures.items():
        up_to = list(accumulate(seconds.counts))
        samples += [
            f'{name}_bucket{at[:-1]},le="{bound}"}} {count}'
            for bound, count in zip((*BUCKETS, "+Inf"), up_to, strict=True)
        ]
        samples += [f"{name}_count{at} {up_to[-1]}", f"{name}_sum{at} {seconds.total}"]
    return _family(name, "histogram", what, samples)


def _family(name: str, kind: str, what: str, samples: Iterable[str]) -> str:
    return "\n".join((f"# HELP {name} {what}", f"# TYPE {name} {kind}", *samples, ""))


# --- the process ----------------------------------------------------------------------------------


@attrs.define(eq=False)
class _Collected(Collector):
    """Whatever a function gives."""

    _collect: Callable[[], Iterable[Metric]]

    def collect(self) -> Iterable[Metric]:
        return self._collect()


def _process() -> CollectorRegistry:
    """The figures of this process, by the usual names, whatever system it is on."""
    registry = CollectorRegistry()
    if Path("/proc/stat").exists():
        ProcessCollector(registry=registry)
    else:
        # This process may fork before it is asked: it daemonizes.
        registry.register(_Collected(lambda: process_figures(psutil.Process())))
    return registry


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
