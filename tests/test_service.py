"""A house that reads its configuration again, and stops; no process is started here."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import orjson
import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater
from twisted.logger import LogEvent, LogLevel, formatEvent
from twisted.scripts.twistd import run

from gateway.config import load
from gateway.history import FILE, last
from gateway.llama.child import State
from gateway.llama.client import LlamaClient
from gateway.policy.calls import KINDS
from gateway.policy.template import Template
from gateway.remote.openai import OpenAI
from gateway.service import House, Options
from gateway.tier.cache import Cache
from gateway.tier.line import Permit, Ticket
from gateway.upstream import Health, Props
from gateway.web.connections import ConnectionLimits
from gateway.wire.errors import ApiError
from tests.llama.test_child import FakeProcess, ProcessReactor

HAIKU = '[[route]]\nmodel = "*haiku*"\ntier = "small"\n'


def tier(name: str, *words: str, **keys: Any) -> str:
    """A tier's part of a configuration, with a server of ours that is started by `words`."""
    command = orjson.dumps([sys.executable, name, *words]).decode()
    url = f"http://127.0.0.1:{8000 + len(name)}"
    lines = [f"{key} = {orjson.dumps(value).decode()}" for key, value in keys.items()]
    return "\n".join(
        [f'[tier.{name}]\nurl = "{url}"', *lines, f"[tier.{name}.server]\ncommand = {command}\n"]
    )


@attrs.define(eq=False)
class Call:
    """A call in the line of a tier."""

    turn: Deferred[Permit]
    permit: Permit | None = None
    failed: bool = False

    def __attrs_post_init__(self) -> None:
        self.turn.addCallbacks(
            lambda permit: setattr(self, "permit", permit),
            lambda _: setattr(self, "failed", True),
        )

    def over(self) -> None:
        assert self.permit is not None
        self.permit.finished()


@attrs.define(eq=False)
class Estate:
    """
    A house in memory.

    Attributes:
        events: what it has logged.
        stopped: filled once it has stopped.
    """

    folder: Path
    events: list[LogEvent]
    reactor: ProcessReactor = attrs.field(factory=ProcessReactor)
    stopped: list[None] = attrs.field(factory=list)
    house: House = attrs.field(init=False)

    @property
    def path(self) -> Path:
        return self.folder / "gw.toml"

    def writes(self, *parts: str) -> None:
        head = f'[gateway]\nstate_dir = "{self.folder}"\n'
        self.path.write_text("\n".join([head, *parts]))

    def stands(self, *parts: str) -> None:
        """Build it and wait for its servers."""
        self.writes(*parts)
        self.house = House.built(load(self.path, KINDS), self.path, self.reactor)
        self.house.startService()
        self.wait()

    def reads(self, *parts: str) -> None:
        """Another file, and SIGHUP."""
        self.writes(*parts)
        self.house.reload()
        self.wait()

    def wait(self) -> None:
        self.reactor.advance(0.25)

    def stop(self) -> None:
        self.house.stopService().addCallback(self.stopped.append)

    def started(self, name: str) -> list[FakeProcess]:
        """The processes that a tier has had."""
        return [each for each in self.reactor.started if name in each.words]

    def process(self, name: str) -> FakeProcess:
        return self.started(name)[-1]

    def state(self, name: str) -> State:
        child = self.house.tiers[name].child
        assert child is not None
        return child.state

    def call(self, name: str) -> Call:
        """A call that goes to a tier."""
        return Call(self.house.tiers[name].line.join(Ticket()))

    @property
    def said(self) -> str:
        return "\n".join(formatEvent(event) or "" for event in self.events)

    def take_errors(self) -> None:
        """That a server ended is an error in the log, and meant."""
        self.events[:] = [each for each in self.events if each["log_level"] < LogLevel.error]


@pytest.fixture
def estate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: list[LogEvent]
) -> Iterator[Estate]:
    """A house that is built by the test, and stopped after it."""
    estate = Estate(tmp_path, logged)

    async def health(client: LlamaClient) -> Health:
        runs = any(client.tier in each.words for each in estate.reactor.alive())
        return Health.READY if runs else Health.DOWN

    async def props(_: LlamaClient) -> Props:
        return Props(4096, 1, "fake", "b1", Template())

    monkeypatch.setattr(LlamaClient, "health", health)
    monkeypatch.setattr(LlamaClient, "props", props)
    (tmp_path / "slots").mkdir()
    yield estate
    if estate.house.running:
        estate.stop()
    for process in estate.reactor.alive():
        process.ends()
    assert estate.stopped
    assert estate.reactor.getDelayedCalls() == []


# --- SIGHUP ---------------------------------------------------------------------------------------


def test_a_file_with_a_mistake_changes_nothing(estate: Estate) -> None:
    """It is refused whole, and the log has each mistake."""
    estate.stands(tier("main"), tier("small"))
    before = estate.house.config
    estate.reads(tier("main", slots=0), tier("small", "another", colour="red"), HAIKU)
    assert estate.house.config is before
    assert estate.house.api.dispatch.rules == ()
    assert "all stays as it was" in estate.said
    assert "tier.main.slots" in estate.said
    assert "colour" in estate.said
    assert len(estate.reactor.started) == 2


def test_routes_and_bounds_change_at_once(estate: Estate) -> None:
    """No server is touched."""
    estate.stands(tier("main"), tier("small"))
    estate.reads(tier("main", max_waiting=3, stall=7), tier("small"), HAIKU)
    (rule,) = estate.house.api.dispatch.rules
    assert (rule.model, rule.tier) == ("*haiku*", "small")
    main = estate.house.tiers["main"]
    assert main.vitals is not None
    assert (main.line.max_waiting, main.vitals.stall) == (3, 7)
    assert len(estate.reactor.started) == 2
    assert [each.signals for each in estate.reactor.started] == [[], []]


def test_a_changed_command_waits_for_the_calls(estate: Estate) -> None:
    """That server alone is ended once its slots rest, and started with the new words."""
    estate.stands(tier("main"), tier("small"))
    call = estate.call("main")
    estate.reads(tier("main", "--new"), tier("small"))
    assert estate.process("main").signals == []
    call.over()
    assert estate.process("main").signals == ["TERM"]
    estate.process("main").ends()
    estate.wait()
    assert estate.process("main").words[-1] == "--new"
    assert estate.state("main") is State.READY
    assert len(estate.started("small")) == 1
    assert estate.call("main").permit is not None


def test_a_command_that_changes_twice_is_started_once(estate: Estate) -> None:
    """The one that was read last, however many slots there are."""
    estate.stands(tier("main", slots=2))
    calls = [estate.call("main"), estate.call("main")]
    estate.reads(tier("main", "--new", slots=2))
    estate.reads(tier("main", "--newer", slots=2))
    for call in calls:
        call.over()
    estate.process("main").ends()
    estate.wait()
    assert [each.words[-1] for each in estate.started("main")] == ["main", "--newer"]
    assert estate.process("main").signals == []
    assert [estate.call("main").permit is not None for _ in range(3)] == [True, True, False]


def test_a_command_that_is_changed_back_is_none(estate: Estate) -> None:
    """The server that runs is the one that is wanted."""
    estate.stands(tier("main"))
    call = estate.call("main")
    estate.reads(tier("main", "--new"))
    estate.reads(tier("main"))
    call.over()
    assert estate.process("main").signals == []
    assert estate.call("main").permit is not None


def test_a_server_that_ended_by_itself_is_not_started_twice(estate: Estate) -> None:
    """Its next start has the new words already."""
    estate.stands(tier("main"))
    call = estate.call("main")
    estate.reads(tier("main", "--new"))
    estate.process("main").ends(status=1)
    call.over()
    estate.reactor.pump([0.25] * 20)
    assert [each.words[-1] for each in estate.started("main")] == ["main", "--new"]
    assert estate.process("main").signals == []
    estate.take_errors()


def test_a_server_that_failed_is_tried_again(estate: Estate) -> None:
    """A file that is read again says that something was mended."""
    estate.stands(tier("main") + "max_restarts = 0\n")
    estate.process("main").ends(status=1)
    assert estate.state("main") is State.FAILED
    estate.take_errors()
    estate.reads(tier("main") + "max_restarts = 0\n")
    assert estate.state("main") is State.READY


def test_a_tier_that_is_added_is_started(estate: Estate) -> None:
    """Calls can go there at once."""
    estate.stands(tier("main"))
    estate.reads(tier("main"), tier("vision"))
    estate.wait()
    assert estate.state("vision") is State.READY
    assert estate.call("vision").permit is not None


def test_a_tier_that_is_removed_ends_its_calls_first(estate: Estate) -> None:
    """Nobody else is sent there; its server ends when the last call has its answer."""
    estate.stands(tier("main"), tier("small"))
    running, waiting = estate.call("small"), estate.call("small")
    estate.reads(tier("main"))
    assert list(estate.house.tiers) == ["main"]
    running.over()
    assert waiting.permit is not None
    assert estate.process("small").signals == []
    waiting.over()
    assert estate.process("small").signals == ["TERM"]
    estate.process("small").ends()
    assert "tier small: removed" in estate.said
    assert not waiting.failed


@pytest.mark.parametrize("name", ["small", "other"])
def test_a_tier_that_takes_the_place_of_one_that_leaves_waits_for_it(
    estate: Estate, name: str
) -> None:
    """Of the same name, or at the same port: two servers there would be one too many."""
    estate.stands(tier("main"), tier("small"))
    call = estate.call("small")
    note = estate.folder / "small.child"
    before = note.read_bytes()
    estate.reads(tier("main"))
    estate.reads(tier("main"), tier(name))
    assert len(estate.reactor.started) == 2
    assert note.read_bytes() == before
    waits = Deferred.fromCoroutine(estate.house.tiers[name].ready())
    estate.wait()
    assert not waits.called
    call.over()
    estate.process("small").ends()
    estate.wait()
    assert len(estate.reactor.started) == 3
    estate.wait()
    assert estate.state(name) is State.READY
    assert waits.called


def test_a_tier_that_waits_for_its_place_may_be_removed(estate: Estate) -> None:
    """Its server is never started."""
    estate.stands(tier("main"), tier("small"))
    call = estate.call("small")
    estate.reads(tier("main"))
    estate.reads(tier("main"), tier("small"))
    estate.reads(tier("main"))
    call.over()
    estate.process("small").ends()
    estate.wait()
    assert len(estate.reactor.started) == 2
    assert "tier small: removed" in estate.said


def test_a_house_may_stop_while_a_tier_waits_for_its_place(estate: Estate) -> None:
    """The server that is there is ended, and no other one begun."""
    estate.stands(tier("main"), tier("small"))
    estate.call("small")
    estate.reads(tier("main"))
    estate.reads(tier("main"), tier("small"))
    estate.stop()
    for process in estate.reactor.alive():
        process.ends()
    estate.wait()
    assert estate.stopped
    assert len(estate.reactor.started) == 2


def test_the_slot_of_a_tier_that_is_removed_is_saved(
    estate: Estate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When its last call is over and before its server is ended, within the grace."""
    saving: list[tuple[str, float]] = []
    done: Deferred[None] = Deferred()

    async def rest(cache: Cache, seconds: float) -> None:
        saving.append((cache.name, seconds))
        await done

    monkeypatch.setattr("gateway.tier.cache.Cache.rest", rest)
    estate.stands("grace = 77\n", tier("main"), tier("small"))
    call = estate.call("small")
    estate.reads("grace = 77\n", tier("main"))
    assert saving == []
    call.over()
    assert saving == [("small", 77)]
    assert estate.process("small").signals == []
    done.callback(None)
    assert estate.process("small").signals == ["TERM"]
    estate.process("small").ends()


def test_a_tier_that_is_removed_while_its_server_ends(estate: Estate) -> None:
    """Nothing works there any more, and it is not started again."""
    estate.stands(tier("main"), tier("small"))
    running = estate.call("small")
    estate.reads(tier("main"))
    estate.process("small").ends(status=1)
    running.over()
    estate.reactor.pump([1] * 20)
    assert len(estate.started("small")) == 1
    assert "tier small: removed" in estate.said
    estate.take_errors()


# --- SIGTERM --------------------------------------------------------------------------------------


def test_a_house_that_stops_ends_its_servers(estate: Estate) -> None:
    """It is over when they are gone; who waits is told at once, who runs is waited for."""
    estate.stands(tier("main"), tier("small"))
    running, waiting = estate.call("main"), estate.call("main")
    estate.stop()
    assert waiting.failed
    assert not running.failed
    assert not estate.stopped
    for name in ("main", "small"):
        assert estate.process(name).signals == ["TERM"]
        estate.process(name).ends()
    assert estate.stopped


def test_a_house_that_stops_ends_the_servers_that_are_leaving(estate: Estate) -> None:
    """A tier that was removed and still has a call has a server, too."""
    estate.stands(tier("main"), tier("small"))
    running = estate.call("small")
    estate.reads(tier("main"))
    estate.stop()
    assert estate.process("small").signals == ["TERM"]
    estate.process("main").ends()
    assert not estate.stopped
    estate.process("small").ends()
    assert estate.stopped
    running.over()


def test_a_house_that_stops_forgets_what_it_was_to_change(estate: Estate) -> None:
    """A server that was to be started anew is only ended, and SIGHUP does nothing any more."""
    estate.stands(tier("main"))
    call = estate.call("main")
    estate.reads(tier("main", "--new"))
    estate.stop()
    estate.reads(tier("main"), tier("small"))
    estate.process("main").ends()
    assert estate.stopped
    assert len(estate.reactor.started) == 1
    call.over()


def test_who_comes_to_a_house_that_stops_is_refused(estate: Estate) -> None:
    """503, to be sent again: to the next one, as far as the client knows."""
    estate.stands(tier("main"))
    line = estate.house.tiers["main"].line
    estate.stop()
    with pytest.raises(ApiError) as caught:
        line.join(Ticket())
    assert (caught.value.status, caught.value.should_retry) == (503, None)


# --- what slots hold ------------------------------------------------------------------------------


def test_all_tiers_share_the_store_of_a_folder(estate: Estate) -> None:
    """What one writes is no leftover to the other, and the budget is for both; it may change."""
    saving = ("--slot-save-path", str(estate.folder / "slots"))
    estate.stands("snapshot_budget = 7\n", tier("main", *saving), tier("small", *saving))
    main, small = (estate.house.tiers[name].cache.store for name in ("main", "small"))
    assert main is not None
    assert main is small
    assert main.budget == 7 * 2**20
    estate.reads("snapshot_budget = 5\n", tier("main", *saving), tier("small", *saving))
    assert main.budget == 5 * 2**20
    assert len(estate.reactor.started) == 2


def test_a_slot_is_saved_as_that_of_the_server_that_runs(estate: Estate) -> None:
    """Not of the one that will be started: its options may say something else of the same bytes."""
    estate.stands(tier("main", "--old"))
    cache = estate.house.tiers["main"].cache
    call = estate.call("main")
    estate.reads(tier("main", "--new"))
    assert cache.command[-1] == "--old"
    call.over()
    estate.process("main").ends()
    estate.wait()
    assert cache.command[-1] == "--new"


def test_a_better_reckoning_starts_no_server_anew(
    estate: Estate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a token takes is known better once a slot was saved; that can wait."""
    reckoned = iter([100, 101, 102])
    monkeypatch.setattr("gateway.service.ram.of_command", lambda *_: next(reckoned))
    program = estate.folder / "llama-server"
    program.touch(0o700)
    ours = tier("main").replace(sys.executable, str(program))
    estate.stands(ours)
    assert "100" in estate.process("main").words
    estate.reads(ours)
    assert estate.process("main").signals == []
    estate.reads(ours.replace('"main"]', '"main", "--new"]'))
    assert estate.process("main").signals == ["TERM"]
    estate.process("main").ends()
    estate.wait()
    assert "101" in estate.process("main").words


def test_a_server_opens_whatever_its_cache_does(
    estate: Estate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure there is logged, and calls go on."""

    async def broken(*_: Any) -> None:
        raise RuntimeError

    monkeypatch.setattr("gateway.tier.cache.Cache.opened", broken)
    estate.stands(tier("main"))
    assert estate.call("main").permit is not None
    estate.take_errors()


def test_nothing_is_warmed_up_for_who_waits_already(
    estate: Estate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their calls would have to wait until that is ended."""
    warmed: list[None] = []
    monkeypatch.setattr("gateway.tier.cache.Cache.let_in", lambda _: warmed.append(None))
    estate.writes(tier("main"))
    estate.house = House.built(load(estate.path, KINDS), estate.path, estate.reactor)
    estate.house.startService()
    main = estate.house.tiers["main"]
    came = Deferred.fromCoroutine(main.ready())
    estate.wait()
    assert not warmed
    estate.wait()
    assert came.called
    estate.process("main").ends()
    estate.reactor.pump([0.25] * 20)
    assert warmed == [None]
    estate.take_errors()


@pytest.mark.parametrize("moves", [False, True])
def test_a_server_that_moves_a_state_is_not_stuck(
    estate: Estate, monkeypatch: pytest.MonkeyPatch, *, moves: bool
) -> None:
    """It answers no question until that is done, which takes minutes for a large one."""

    async def slots(_: LlamaClient) -> Any:
        await Deferred()

    monkeypatch.setattr(LlamaClient, "slots", slots)
    estate.stands(tier("main", stall=30))
    estate.house.tiers["main"].cache.moves = moves
    estate.reactor.pump([1] * 45)
    assert estate.state("main") is (State.READY if moves else State.UNWELL)
    estate.take_errors()


def test_slots_are_saved_within_what_answers_leave_of_the_grace(
    estate: Estate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All at once; whoever starts the gateway would not wait for one after the other."""
    granted: list[float] = []

    async def rest(_: Any, seconds: float) -> None:
        granted.append(seconds)
        await deferLater(estate.reactor, 2)

    monkeypatch.setattr("gateway.tier.cache.Cache.rest", rest)
    estate.stands("grace = 100\n", tier("main"), tier("small"))
    estate.stop()
    assert granted == [100, 100]
    estate.reactor.advance(2)
    assert estate.process("main").signals == ["TERM"]


# --- the ledger -----------------------------------------------------------------------------------


def test_a_house_writes_its_calls_down(estate: Estate) -> None:
    """From the first to the last; the bounds may change, and 0 writes none."""

    def call(identity: str) -> None:
        with estate.house.api.dispatch.ledger.call(identity):
            pass

    estate.stands(tier("main"))
    call("one")
    estate.reads("ledger_rows = 2\n", tier("main"))
    call("two")
    call("three")
    estate.stop()
    call("the last answer")
    estate.process("main").ends()
    written = [each["id"] for each in last(estate.folder / FILE, 9)]
    assert written == ["the last answer", "three"]


def test_a_house_knows_the_calls_of_the_one_before(estate: Estate) -> None:
    """From the first moment on."""
    for _ in range(2):
        estate.stands(tier("main"))
        known = estate.house.api.dispatch.status()["last"]
        with estate.house.api.dispatch.ledger.call("one"):
            pass
        estate.stop()
        estate.process("main").ends()
    assert [each["id"] for each in known] == ["one"]


def test_a_house_that_captures_says_so(estate: Estate) -> None:
    """At its start and when it reads its configuration again, for as long as it does."""
    estate.stands("capture = 1\n", tier("main"))
    assert estate.house.api.capture is not None
    assert estate.said.count("capture is on") == 1
    estate.reads("capture = 2\n", tier("main"))
    assert estate.house.api.capture.budget == 2 * 2**20
    assert estate.said.count("capture is on") == 2
    estate.reads(tier("main"))
    assert estate.house.api.capture is None
    assert estate.said.count("capture is on") == 2


# --- servers of other kinds -----------------------------------------------------------------------

ELSEWHERE = (
    '[tier.far]\nurl = "http://models.example/v1"\nkind = "openai"\napi_key_env = "THEIR_KEY"\n'
)


def test_a_tier_elsewhere_comes_with_a_reload_once_its_key_is_there(
    estate: Estate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the key all stays as it was; with it the tier takes calls, and nothing is started."""
    monkeypatch.delenv("THEIR_KEY", raising=False)
    estate.stands(tier("main"))
    estate.reads(tier("main"), ELSEWHERE)
    assert "all stays as it was" in estate.said
    assert "tier.far.api_key_env" in estate.said
    assert "far" not in estate.house.tiers
    monkeypatch.setenv("THEIR_KEY", "secret")
    estate.reads(tier("main"), ELSEWHERE)
    assert isinstance(estate.house.tiers["far"].remote, OpenAI)
    assert estate.call("far").permit is not None
    assert len(estate.reactor.started) == 1
    assert "secret" not in estate.said


def test_a_reload_that_cannot_be_carried_out_changes_nothing(
    estate: Estate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one finds the house as it was."""
    estate.stands(tier("main"))

    def fails(*_: object) -> None:
        raise KeyError("bug")

    with monkeypatch.context() as patched:
        patched.setattr("gateway.service._tier", fails)
        with pytest.raises(KeyError):
            estate.reads(tier("main"), tier("new"))
    assert [*estate.house.tiers] == [*estate.house.config.tier] == ["main"]
    estate.reads(tier("main"), tier("new"))
    assert [*estate.house.tiers] == ["main", "new"]


def test_only_the_mistakes_are_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What twistd has to say of its own options would stand before them."""
    path = tmp_path / "gw.toml"
    path.write_text("[gateway]\nlsten = 1\n")
    monkeypatch.setattr("sys.argv", ["twistd", "-n", "claudegw", "--config", str(path)])
    with pytest.raises(SystemExit) as left:
        run()
    said = (
        f"claudegw: {path} cannot be used:\n  gateway: unknown key: lsten\n"
        "  tier.main: expected a table [tier.main]; every gateway has a main tier"
    )
    assert left.value.code == said
    assert capsys.readouterr() == ("", "")


def test_no_route_waits_for_a_count(tmp_path: Path) -> None:
    """A count goes where its message would go, so that a route for counts is a mistake."""
    path = tmp_path / "gw.toml"
    main = ELSEWHERE.replace("tier.far", "tier.main")
    path.write_text(f'{main}\n[[route]]\nkind = "count"\ntier = "main"\n')
    with pytest.raises(SystemExit, match=r"route\[0\]\.kind: expected one of turn, .*other, got"):
        Options().parseOptions(["--config", str(path)])


def test_a_gateway_without_a_key_that_it_needs_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says which variable is missing, and where that is wanted."""
    monkeypatch.delenv("THEIR_KEY", raising=False)
    path = tmp_path / "gw.toml"
    main = ELSEWHERE.replace("tier.far", "tier.main")
    path.write_text(f'[gateway]\nstate_dir = "{tmp_path}"\n{main}')
    with pytest.raises(SystemExit, match=r"tier\.main\.api_key_env: .* THEIR_KEY"):
        Options().parseOptions(["--config", str(path)])


def test_a_server_does_not_get_the_keys_of_other_tiers(
    estate: Estate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stands in our environment for a server elsewhere is none of its business."""
    monkeypatch.setenv("THEIR_KEY", "a secret")
    monkeypatch.setenv("MY_KEY", "its own")
    estate.stands(tier("main", api_key_env="MY_KEY"), ELSEWHERE)
    assert "THEIR_KEY" not in estate.process("main").env
    assert estate.process("main").env["MY_KEY"] == "its own"


def test_a_key_that_comes_with_a_reload_is_withheld_from_then_on(
    estate: Estate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server is not started anew for it; the next start goes without."""
    monkeypatch.setenv("THEIR_KEY", "a secret")
    estate.stands(tier("main"))
    estate.reads(tier("main"), ELSEWHERE)
    assert len(estate.started("main")) == 1
    estate.process("main").ends(1)
    estate.events.clear()
    estate.reactor.advance(60)
    assert len(estate.started("main")) == 2
    assert "THEIR_KEY" not in estate.process("main").env


def test_connections_are_bounded_as_the_file_says(estate: Estate) -> None:
    """From the start on, and by what it says later."""
    estate.stands(tier("main"))
    assert estate.house.site.limits.most == 2000
    keys = (
        "max_connections = 100\nidle_timeout = 5\nhead_timeout = 2\nbody_timeout = 3\n"
        "unread_timeout = 4\n"
    )
    estate.reads(keys, tier("main"))
    assert estate.house.site.limits == ConnectionLimits(100, 5.0, 2.0, 3.0, 4.0)
