"""What Prometheus is told: true, by its conventions, and without a label that a client chooses."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import psutil
import pytest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from gateway.history import Bounds, History
from gateway.llama.child import State
from gateway.llama.snapshots import Store
from gateway.policy.calls import KINDS
from gateway.web.metrics import BUCKETS, OUTCOMES, outcome_of, process_figures
from tests.house import CLAUDE_CODE, HELLO, Household, turn

DASHBOARD = Path(__file__).parents[2] / "etc" / "grafana.json"

Labels = dict[str, str]


@attrs.frozen
class Child:
    """A server of ours, as far as figures go."""

    state: State = State.READY
    starts: int = 3


@attrs.define(eq=False)
class Scraped:
    """
    What a scrape found.

    Attributes:
        families: by name, as the text has it.
    """

    families: dict[str, Metric]

    @classmethod
    def of(cls, house: Household, **headers: str) -> Scraped:
        browser = house.browser()
        browser.get("/metrics", **headers)
        house.settle()
        assert browser.status == 200
        parsed = text_string_to_metric_families(browser.body.decode())
        return cls({family.name: family for family in parsed})

    def samples(self, name: str) -> Iterator[tuple[Labels, float]]:
        for family in self.families.values():
            for sample in family.samples:
                if sample.name == name:
                    yield sample.labels, sample.value

    def value(self, name: str, **labels: str) -> float:
        """The one sample of that name which has these labels."""
        (found,) = [value for has, value in self.samples(name) if labels.items() <= has.items()]
        return found


@pytest.fixture
def house() -> Household:
    """A gateway that has a server, a store and a ledger on the disk to tell of."""
    house = Household.built()
    ledger = house.api.dispatch.ledger
    ledger.history = History(Path("/nowhere"), Bounds(0, 0), None)
    tiers = house.api.dispatch.tiers
    store = Store(Path("/nowhere"), 1)
    for tier in tiers.values():
        tier.cache.store = store
    return house


def answer(house: Household, tier: str = "main", **more: Any) -> None:
    """One call from its arrival to its end: 2 s to its first content, and 1 s more."""
    house.ask(turn(**more), **({} if tier == "main" else {"user_agent": CLAUDE_CODE["user-agent"]}))
    (held,) = (house.main if tier == "main" else house.small).held
    held.begin()
    held.send(HELLO[0])
    house.wait(2)
    held.send(*HELLO[1:])
    house.wait(1)
    held.finish()
    house.settle()
    house.main.held.clear()
    house.small.held.clear()


# --- what is said ---------------------------------------------------------------------------------


def test_a_call_is_counted(house: Household) -> None:
    """By kind, tier and outcome; its tokens and times where they belong."""
    answer(house)
    answer(house, stream=True)
    said = Scraped.of(house)
    assert list(said.samples("claudegw_calls_total")) == [
        ({"kind": "turn", "tier": "main", "outcome": "answered"}, 2)
    ]
    for name, tokens in (("cached", 6), ("prefilled", 8), ("generated", 2), ("avoidable", 0)):
        assert said.value(f"claudegw_{name}_tokens_total", tier="main") == tokens
    for name, total, more in (("wait", 0, {"background": "false"}), ("first_content", 4, {})):
        assert said.value(f"claudegw_{name}_seconds_sum", tier="main", **more) == total
        assert said.value(f"claudegw_{name}_seconds_count", tier="main", **more) == 2
    assert said.value("claudegw_first_content_seconds_bucket", le="1.0") == 0
    assert said.value("claudegw_first_content_seconds_bucket", le="2.5") == 2


def test_who_waits_is_counted(house: Household) -> None:
    """In line now, and the seconds of those that left the line without an answer."""
    house.ask(turn("one"))
    waiting = house.ask(turn("two", stream=True))
    house.ask(turn("three"))
    house.wait(7)
    said = Scraped.of(house)
    assert said.value("claudegw_waiting_calls", tier="main") == 2
    assert said.value("claudegw_running_calls", tier="main") == 1
    assert said.value("claudegw_slots", tier="small") == 2
    waiting.leave()
    house.settle()
    said = Scraped.of(house)
    assert said.value("claudegw_waiting_calls", tier="main") == 1
    assert said.value("claudegw_wait_seconds_sum", tier="main") == 7
    assert said.value("claudegw_calls_total", outcome="cancelled") == 1
    assert not list(said.samples("claudegw_first_content_seconds_count"))


def test_what_no_model_worked_for_has_no_times(house: Household) -> None:
    """A count and a refusal are calls, and that is all."""
    house.ask(turn(), "/v1/messages/count_tokens")
    house.ask(b"{")
    house.ask(turn("x" * 5000))
    said = Scraped.of(house)
    found = {(has["kind"], has["outcome"]) for has, _ in said.samples("claudegw_calls_total")}
    assert found == {("count", "answered"), ("unknown", "refused"), ("turn", "refused")}
    for name in ("wait_seconds_count", "first_content_seconds_count", "generated_tokens_total"):
        assert not list(said.samples(f"claudegw_{name}"))


def test_servers_are_told_of(house: Household) -> None:
    """The state of each of ours, one of all there are, and how often it was started."""
    for tier in house.api.dispatch.tiers.values():
        tier.child = Child()  # type: ignore[assignment]
    said = Scraped.of(house)
    states = {
        has["state"]: value
        for has, value in said.samples("claudegw_server_state")
        if has["tier"] == "small"
    }
    assert states == {state.value: state is State.READY for state in State}
    assert said.value("claudegw_server_starts_total", tier="main") == 3


def test_snapshots_are_told_of(house: Household, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that tiers share is counted once."""
    monkeypatch.setattr(Store, "size", 7)
    numbers = house.api.dispatch.tiers["main"].cache.numbers
    numbers.saves_total, numbers.save_seconds_total, numbers.save_bytes_total = 2, 3.5, 400
    numbers.ineffective_restores_total = 1
    said = Scraped.of(house)
    assert said.value("claudegw_snapshot_bytes") == 7
    assert said.value("claudegw_snapshot_saves_total", tier="main") == 2
    assert said.value("claudegw_snapshot_save_seconds_total", tier="main") == 3.5
    assert said.value("claudegw_snapshot_save_bytes_total", tier="main") == 400
    assert said.value("claudegw_snapshot_ineffective_restores_total", tier="main") == 1
    assert said.value("claudegw_snapshot_restores_total", tier="small") == 0


def test_the_ledger_is_told_of(house: Household) -> None:
    """Rows that a disk did not take are seen by who is not there."""
    history = house.api.dispatch.ledger.history
    assert history is not None
    history.written, history.dropped, history.lost = 5, 2, 1
    said = Scraped.of(house)
    rows = {has["result"]: value for has, value in said.samples("claudegw_ledger_rows_total")}
    assert rows == {"written": 5, "dropped": 2, "lost": 1}


def test_two_gateways_have_figures_of_their_own(house: Household) -> None:
    """Nothing is kept where the whole process would share it."""
    answer(house)
    assert not list(Scraped.of(Household.built()).samples("claudegw_calls_total"))


def test_timers_are_told_of(house: Household) -> None:
    """Those of a call are gone with it, whether it is answered or left."""
    before = Scraped.of(house).value("claudegw_timers")
    house.ask(turn("one", stream=True))
    waiting = house.ask(turn("two", stream=True))
    assert Scraped.of(house).value("claudegw_timers") > before
    waiting.leave()
    (held,) = house.main.held
    held.begin()
    held.send(*HELLO)
    held.finish()
    for _ in range(3):  # a connection that is kept for another call has a timer, too
        house.wait(60)
    assert Scraped.of(house).value("claudegw_timers") == before


def test_the_process_is_told_of(house: Household) -> None:
    """By the same names on a machine that has no /proc."""
    names = {name for name in Scraped.of(house).families if name.startswith("process_")}
    elsewhere = {family.name: family for family in process_figures(psutil.Process(os.getpid()))}
    assert elsewhere.keys() <= {name.removesuffix("_total") for name in names}
    assert len(elsewhere) == 5
    assert all(family.samples[0].value > 0 for family in elsewhere.values())


@pytest.mark.parametrize(
    ("outcome", "known"),
    [
        ("answered", "answered"),
        ("cancelled", "cancelled"),
        ("400 invalid_request_error", "refused"),
        ("413 request_too_large", "refused"),
        ("429 rate_limit_error", "overloaded"),
        ("529 overloaded_error", "overloaded"),
        ("503 api_error", "unavailable"),
        ("500 internal", "failed"),
        ("504 timeout_error", "failed"),
        ("broken: overloaded_error", "broken"),
        ("something new", "failed"),
    ],
)
def test_outcomes_have_few_names(outcome: str, known: str) -> None:
    """A record's own words are many; here they are one of seven."""
    assert outcome_of(outcome) == known
    assert known in OUTCOMES


# --- who may ask, and in which form ---------------------------------------------------------------


def test_it_is_asked_for_as_the_status_is() -> None:
    """The same token, the same names."""
    house = Household.built(token="sesame")
    for headers, status in (
        ({}, 401),
        ({"authorization": "Bearer sesame"}, 200),
        ({"x_api_key": "sesame"}, 200),
        ({"x_api_key": "sesame", "host": "evil.example"}, 403),
    ):
        browser = house.browser()
        browser.get("/metrics", **headers)
        house.settle()
        assert browser.status == status


def test_it_says_which_form_it_has(house: Household) -> None:
    """The plain one, which everybody reads, also for who would rather have another."""
    browser = house.browser()
    browser.get("/metrics", accept="application/openmetrics-text; version=1.0.0")
    house.settle()
    assert browser.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"


# --- its bounds -----------------------------------------------------------------------------------


def test_no_client_chooses_a_label(house: Household) -> None:
    """Whatever it calls its model, itself or its path: every label has one of the known values."""
    evil = 'evil"}\n\\'
    for number in range(20):
        answer(house, model=f"{evil}{number}")
        house.ask(turn(model=f"claudegw-{number}"), f"/v1/{number}")
        house.ask({"model": f"{evil}{number}"}, user_agent=f"claude-cli/{number}")
        house.ask(turn(evil), "/v1/messages/count_tokens", x_app=f"evil-{number}")
    known = {
        "kind": {*KINDS, "unknown"},
        "tier": {"main", "small", "none"},
        "outcome": {*OUTCOMES},
        "background": {"true", "false"},
        "state": {state.value for state in State},
        "result": {"written", "dropped", "lost"},
        "version": {"0"},
        "le": {*map(str, BUCKETS), "+Inf"},
    }
    for family in Scraped.of(house).families.values():
        for sample in family.samples:
            for name, value in sample.labels.items():
                assert value in known[name], sample
            assert "evil" not in str(sample)


def test_a_label_can_have_any_value(house: Household) -> None:
    """Whoever names a tier may use what the text uses itself."""
    evil = 'evil"}\n\\'
    house.api.metrics.version = evil
    assert Scraped.of(house).value("claudegw_info", version=evil) == 1


def test_a_kind_that_is_not_known_here_is_another(house: Household) -> None:
    """Whoever writes it down."""
    ledger = house.api.dispatch.ledger
    for number in range(5):
        with ledger.call("req_1") as record:
            record.kind, record.tier = f"new-{number}", "main"
    assert Scraped.of(house).value("claudegw_calls_total", kind="other") == 5


def test_the_longest_wait_has_a_bucket() -> None:
    """Up to an hour, each larger than the one before."""
    assert BUCKETS[-1] == 3600
    assert list(BUCKETS) == sorted(set(BUCKETS))


# --- conventions ----------------------------------------------------------------------------------

#: As promtool knows them: what is no base unit, by its base.
NO_BASE_UNITS = {
    "seconds": "millisecond|microsecond|nanosecond|picosecond|minute|hour|day|week|month|year",
    "bytes": "kilobyte|megabyte|gigabyte|terabyte|petabyte|kibibyte|mebibyte|gibibyte|bit",
    "ratio": "percent|percentage",
}
SHORT_UNITS = "s|ms|us|ns|sec|b|kb|mb|gb|tb|pb|m|h|d"
KINDS_OF_METRICS = ("counter", "gauge", "histogram", "summary", "info")


def lint(family: Metric, names: set[str]) -> list[str]:
    """What ``promtool check metrics`` would find wrong; `names` are those of its samples."""
    base = family.name
    name = f"{base}_total" if family.type == "counter" else base
    parts = base.split("_")
    wrong = []
    if not family.documentation:
        wrong.append("no help text")
    if family.type == "counter" and names and names != {name}:
        wrong.append("a counter's name should end with _total")
    if family.type != "counter" and base.endswith("_total"):
        wrong.append("only a counter's name should end with _total")
    if family.type in ("gauge", "counter", "unknown") and re.search("_(count|sum|bucket)$", base):
        wrong.append("only a histogram's samples are named so")
    if ":" in base:
        wrong.append("colons are for rules")
    if re.search("[a-z][A-Z]|-", base):
        wrong.append("names are in snake case")
    if any(part in KINDS_OF_METRICS for part in parts[:-1]) or parts[-1] in KINDS_OF_METRICS[:-1]:
        wrong.append("the type has no place in a name")
    for right, units in NO_BASE_UNITS.items():
        if any(re.fullmatch(f"({units})s?", part) for part in parts):
            wrong.append(f"use {right}")
    if any(re.fullmatch(SHORT_UNITS, part) for part in parts):
        wrong.append("units are written out")
    labels = {label for sample in family.samples for label in sample.labels}
    for label in labels:
        if re.search("[a-z][A-Z]|-", label):
            wrong.append("labels are in snake case")
        if label == "le" and family.type != "histogram":
            wrong.append("le is for histograms")
        if label == "quantile":
            wrong.append("quantile is for summaries")
    return wrong


def test_names_are_by_convention(house: Household) -> None:
    """By the rules that promtool applies; each name once."""
    everything_is_there(house)
    browser = house.browser()
    browser.get("/metrics")
    house.settle()
    text = browser.body.decode()
    families = list(text_string_to_metric_families(text))
    assert len(families) > 25
    wrong = {
        family.name: found
        for family in families
        if (found := lint(family, {sample.name for sample in family.samples}))
    }
    assert wrong == {}
    named = re.findall(r"^# TYPE (\S+)", text, re.MULTILINE)
    assert len(named) == len(set(named))
    assert all(each.startswith(("claudegw_", "process_")) for each in named)
    series = [line.rpartition(" ")[0] for line in text.splitlines() if not line.startswith("#")]
    assert len(series) == len(set(series))


@pytest.mark.parametrize(
    ("name", "kind", "what"),
    [
        ("a_total", "gauge", "help"),
        ("wait_ms", "gauge", "help"),
        ("wait_minutes", "gauge", "help"),
        ("size_kilobytes", "gauge", "help"),
        ("share_percent", "gauge", "help"),
        ("calls_count", "gauge", "help"),
        ("calls_counter", "gauge", "help"),
        ("callsWaiting", "gauge", "help"),
        ("a:b", "gauge", "help"),
        ("fine", "gauge", ""),
    ],
)
def test_the_rules_find_what_is_wrong(name: str, kind: str, what: str) -> None:
    """They would be no use otherwise."""
    assert len(lint(Metric(name, what, kind), {name})) == 1


# --- the dashboard --------------------------------------------------------------------------------


def everything_is_there(house: Household) -> None:
    """A house of whose every figure there is a sample."""
    answer(house)
    for tier in house.api.dispatch.tiers.values():
        tier.child = Child()  # type: ignore[assignment]


def test_the_dashboard_asks_for_what_there_is(house: Household) -> None:
    """Every name and every label in it; and each figure of ours but a few is shown there."""
    everything_is_there(house)
    said = Scraped.of(house)
    labels: dict[str, set[str]] = {}
    for family in said.families.values():
        for sample in family.samples:
            labels.setdefault(sample.name, {"instance"}).update(sample.labels)
    text = DASHBOARD.read_text()
    board = json.loads(text)
    targets = [target for panel in board["panels"] for target in panel.get("targets", ())]
    queries = [target["expr"] for target in targets]
    queries += [each["query"]["query"] for each in board["templating"]["list"][1:]]
    assert len(queries) > 20
    # Whatever else is scraped has figures of its process, too.
    assert all("claudegw_" in query for query in queries)
    for query in queries:
        names = set(re.findall(r"\b(?:claudegw|process)_\w+", query))
        assert names
        assert names <= labels.keys(), query
        used = set(re.findall(r"(\w+)(?:=~|!=|=)\"", query))
        for group in re.findall(r"by \(([\w, ]+)\)|label_values\(\w+, (\w+)\)", query):
            used.update(re.split(r"\W+", "".join(group)))
        assert all(used <= labels[name] for name in names), query
    for target in targets:
        told = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
        (*_, grouped) = [None, *re.findall(r"by \(([\w, ]+)\)", target["expr"])]
        name = re.findall(r"\b(?:claudegw|process)_\w+", target["expr"])[0]
        assert told <= (labels[name] if grouped is None else set(grouped.split(", "))), target
    shown = set(re.findall(r"\bclaudegw_\w+", " ".join(queries)))
    families = {name for name in said.families if name.startswith("claudegw_")}
    unseen = {name for name in families if not any(each.startswith(name) for each in shown)}
    assert unseen == {"claudegw_snapshots"}


def test_the_dashboard_can_be_imported() -> None:
    """Each panel has a number and a place of its own, and leaves the source to who imports it."""
    board = json.loads(DASHBOARD.read_text())
    assert board["uid"] == board["title"] == "claudegw"
    numbers = [panel["id"] for panel in board["panels"]]
    assert len(set(numbers)) == len(numbers)
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (place["x"] + across, place["y"] + down)
            for across in range(place["w"])
            for down in range(place["h"])
        }
        assert not cells & taken
        taken |= cells
        assert panel["type"] == "row" or panel["datasource"]["uid"] == "${source}"
