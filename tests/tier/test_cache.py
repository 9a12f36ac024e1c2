"""What a slot holds and what of it is kept: saved at rest, restored at the start, proven after."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import attrs
import orjson
import pytest
from twisted.internet.defer import CancelledError, Deferred, maybeDeferred
from twisted.internet.task import Clock
from twisted.logger import LogEvent, formatEvent
from twisted.python.failure import Failure

from gateway.config import Tier as Wanted
from gateway.llama import gguf
from gateway.llama.client import Moved
from gateway.llama.identity import Identity, Kept, ModelFile, server_of
from gateway.llama.snapshots import Store
from gateway.policy.order import Rank
from gateway.policy.template import Template
from gateway.tier import cache as room
from gateway.tier.cache import Cache
from gateway.tier.line import Line, Ticket
from gateway.upstream import Completion, Props
from gateway.wire.errors import ApiError, unavailable
from gateway.wire.events import Usage
from tests.llama.test_snapshots import state

PROPS = Props(32768, 1, "fake", "b1", Template(), "t", "/models/one.gguf")
ONE = Identity(ModelFile("/models/one.gguf", 1000, 17, "aa"), "b1", 32768, template="t")

#: A prompt of so many tokens, and as many bytes in each of its parts.
TOKENS = 6000


def body(words: str, system: str = "s" * 20_000) -> dict[str, Any]:
    return {
        "system": system,
        "messages": [{"role": "user", "content": [{"type": "text", "text": words}]}],
        "max_tokens": 10,
    }


@attrs.define
class Answer:
    async def read(self) -> bytes:
        return b""


@attrs.define(eq=False)
class Server:
    """A llama-server with a slot, whose saved states are as large as they are."""

    folder: Path
    clock: Clock
    asked: list[str] = attrs.field(factory=list)
    refuses: ApiError | None = None
    warming: Deferred[Answer] | None = None
    evaluating: Deferred[None] | None = None
    evaluated: int = TOKENS
    moving: Deferred[None] | None = None

    async def save_slot(self, _: int, filename: str) -> Moved:
        self.asked.append("save")
        if self.moving is not None:
            await self.moving
        self.clock.advance(1)
        if self.refuses is not None:
            raise self.refuses
        (self.folder / filename).write_bytes(state(TOKENS))
        return Moved(TOKENS, 4096, 0.5)

    async def restore_slot(self, _: int, __: str) -> Moved:
        self.asked.append("restore")
        if self.moving is not None:
            await self.moving
        if self.refuses is not None:
            raise self.refuses
        return Moved(TOKENS, 4096, 0.1)

    async def messages(self, wanted: Any) -> Answer:
        self.asked.append(f"warm up {wanted['max_tokens']}")
        self.warming = Deferred()
        return await self.warming

    async def apply_template(self, chat: Any) -> str:
        return "".join(str(message["content"]) for message in chat["messages"])

    async def complete(self, _: Any) -> Completion:
        self.asked.append("evaluate")
        if self.evaluating is not None:
            await self.evaluating
        return Completion("", "limit", evaluated=self.evaluated, cached=0, generated=1)

    async def busy_slots(self) -> int:
        return 0


@attrs.define(eq=False)
class Scene:
    """A cache in front of a server, on a clock and a folder of its own."""

    folder: Path
    clock: Clock = attrs.field(factory=Clock)
    model: gguf.Model | None = None
    ram: float = math.inf
    server: Server = attrs.field(init=False)
    line: Line = attrs.field(init=False)
    store: Store = attrs.field(init=False)
    cache: Cache = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.server = Server(self.folder, self.clock)
        self.line = Line(1, 10, 120, self.server.busy_slots, self.clock)
        self.line.start()
        thread = maybeDeferred
        self.store = Store(self.folder, 10**9, 0, free=lambda _: 10**12, thread=thread)
        self.cache = Cache(
            "main",
            Wanted("http://main", snapshot_idle=20, snapshot_min_tokens=2000),
            self.server,  # type: ignore[arg-type]
            self.line,
            lambda: 74.0,
            self.clock,
            thread,
            store=self.store,
            prefix_file=self.folder / "main.prefix",
        )

    def opened(self) -> Scene:
        """Its server has come up."""
        Deferred.fromCoroutine(self.cache.opened(PROPS))
        self.cache.let_in()
        return self

    def call(
        self,
        words: str,
        cached: int = 0,
        rank: Rank = Rank.PERSON,
        conversation: str = "one",
        system: str = "s",
    ) -> Any:
        """A call that goes through; what it is told of its coldness."""
        told: list[Any] = []
        self.cache.give_way()
        permit = _now(self.line.join(Ticket(rank, conversation)))
        sent = body(words, system * 20_000)
        _now(Deferred.fromCoroutine(self.cache.before(sent)))
        usage = Usage(TOKENS - cached, cached, 10)
        ticket = Ticket(rank, conversation, name="req_1", cold=told.append)
        permit.finished()
        self.cache.answered(sent, usage, ticket)
        return told[0]

    def rest(self) -> None:
        """Nobody comes for a while."""
        self.clock.advance(20)


def _now(deferred: Deferred[Any]) -> Any:
    found: list[Any] = []
    deferred.addCallback(found.append)
    return found[0]


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    scene = Scene(tmp_path)
    monkeypatch.setattr(room, "server_of", lambda *_: Kept(ONE, scene.model, scene.ram))
    return scene


def windowed() -> gguf.Model:
    """A model with sliding windows."""
    return gguf.Model(32768, (1,), 256, 256, 0, 512, (True,), False)


# --- saving ---------------------------------------------------------------------------------------


def test_a_slot_is_saved_when_it_rests(scene: Scene) -> None:
    """Not before, and not again while nothing is new."""
    scene.opened().call("hi")
    scene.clock.advance(19)
    assert scene.server.asked == []
    scene.clock.advance(2)
    assert scene.server.asked == ["save"]
    assert [each.tokens for each in scene.store.snapshots] == [TOKENS]
    scene.call("hi", cached=TOKENS - 1)
    scene.rest()
    assert scene.server.asked == ["save"]
    assert scene.cache.status()["saves_total"] == 1
    assert scene.line.running == 0


def test_a_person_may_have_it_saved_at_once(scene: Scene) -> None:
    """Once a call that has the slot is over; and only once, until there is something new."""
    scene.opened().call("hi")
    busy = _now(scene.line.join(Ticket()))
    saved = Deferred.fromCoroutine(scene.cache.save())
    assert scene.server.asked == []
    busy.finished()
    assert scene.server.asked == ["save"]
    assert saved.called
    assert "saved already" in refusal(scene)
    assert scene.server.asked == ["save"]
    assert scene.line.running == 0


def refusal(scene: Scene) -> str:
    """Why a slot is not saved."""
    told: list[str] = []
    saved = Deferred.fromCoroutine(scene.cache.save())

    def keep(failure: Failure) -> None:
        told.append(cast(ApiError, failure.value).message)

    saved.addErrback(keep)
    return told[0]


def test_a_person_is_told_why_nothing_is_saved(scene: Scene) -> None:
    """A server of somebody else, an empty slot, a model of which it would be no use, a failure."""
    assert "No snapshots are taken" in refusal(scene)
    assert not scene.cache.status()["saves"]
    scene.opened()
    assert scene.cache.status()["saves"]
    assert "holds no conversation" in refusal(scene)
    scene.call("hi", conversation="")
    assert "holds no conversation" in refusal(scene)
    scene.call("hi")
    scene.server.refuses = ApiError("api_error", "the disk is full")
    assert "the disk is full" in refusal(scene)
    scene.model = windowed()
    scene.cache.closed()
    scene.opened()
    assert "without being asked" in refusal(scene)
    assert scene.line.running == 0


def test_another_call_puts_it_off(scene: Scene) -> None:
    """The twenty seconds begin anew with each answer."""
    scene.opened().call("hi")
    scene.clock.advance(15)
    scene.call("hi")
    scene.clock.advance(15)
    assert scene.server.asked == []
    scene.clock.advance(6)
    assert scene.server.asked == ["save"]


@pytest.mark.parametrize(("rank", "conversation"), [(Rank.SUBAGENT, "one/2"), (Rank.PERSON, "")])
def test_only_a_persons_conversation_is_saved(scene: Scene, rank: Rank, conversation: str) -> None:
    """A subagent's prompt, or one that belongs to no conversation, does not come back."""
    scene.opened().call("hi", rank=rank, conversation=conversation)
    scene.rest()
    assert scene.server.asked == []


def test_a_call_that_runs_is_not_disturbed(scene: Scene) -> None:
    """What rests is looked at again after its answer."""
    scene.opened().call("hi")
    permit = _now(scene.line.join(Ticket()))
    scene.rest()
    assert scene.server.asked == []
    permit.finished()


def test_a_call_that_comes_while_it_is_saved_waits_no_longer_than_that(scene: Scene) -> None:
    """The permit goes back as soon as the server has written, and nothing is kept of a failure."""
    scene.server.refuses = ApiError("api_error", "No room.")
    scene.opened().call("hi")
    scene.rest()
    assert scene.server.asked == ["save"]
    assert scene.store.snapshots == []
    assert sorted(path.name for path in scene.folder.iterdir()) == ["main.prefix"]
    assert _now(scene.line.join(Ticket())) is not None


@pytest.mark.parametrize(
    ("why", "tried_again"),
    [(unavailable("Gone."), True), (ApiError("api_error", "No room."), False)],
)
def test_only_a_state_that_was_refused_is_left_alone(
    scene: Scene, why: ApiError, tried_again: bool
) -> None:
    """A server that died over it says nothing of its disk: the next one is asked as before."""
    scene.server.refuses = why
    scene.opened().call("hi")
    scene.rest()
    scene.server.refuses = None
    scene.call("hi")
    scene.rest()
    assert scene.server.asked == ["save", "save"][: 1 + tried_again]


def test_a_slot_is_saved_once_more_before_a_stop(scene: Scene) -> None:
    """Without waiting for it to rest, and only if there is anything new."""
    scene.opened().call("hi")
    scene.cache.stop()
    _now(Deferred.fromCoroutine(scene.cache.rest(30)))
    assert scene.server.asked == ["save"]
    _now(Deferred.fromCoroutine(scene.cache.rest(30)))
    assert scene.server.asked == ["save"]
    assert scene.clock.getDelayedCalls() == []


def test_a_slot_whose_store_is_taken_away_meanwhile_gives_its_permit_back(scene: Scene) -> None:
    """A new configuration may save nothing any more while a save waits for its turn."""
    scene.opened().call("hi")
    held = scene.cache._held
    assert held is not None
    running = _now(scene.line.join(Ticket()))
    saving = Deferred.fromCoroutine(scene.cache._save_in_line(held))
    saving.addErrback(lambda _: None)
    scene.cache.store = None
    running.finished()
    assert (scene.line.running, scene.line.settling) == (0, 0)


def test_a_turn_that_ends_while_the_last_one_is_summed_up_is_saved_after_it(scene: Scene) -> None:
    """The look that finds a save under way is not the last one."""
    summing: Deferred[Any] = Deferred()
    scene.opened().call("hi")
    scene.cache._working = summing
    scene.rest()
    assert scene.server.asked == []
    summing.callback(None)
    scene.rest()
    assert scene.server.asked == ["save"]


def test_a_save_before_a_stop_that_fails_in_any_way_holds_nobody_up(
    scene: Scene, logged: list[LogEvent], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Servers have to be ended after it, whatever it is."""
    scene.opened().call("hi")

    async def broken(*_: Any) -> str:
        raise RuntimeError

    monkeypatch.setattr(Store, "begin", broken)
    assert _now(Deferred.fromCoroutine(scene.cache.rest(30))) is None
    assert "its cache failed" in str(formatEvent(logged.pop()))


def test_a_save_before_a_stop_ends_in_time(scene: Scene) -> None:
    """A server that does not answer is hung up on, and nothing is left of it."""
    scene.opened().call("hi")
    scene.server.moving = Deferred()
    over = Deferred.fromCoroutine(scene.cache.rest(30))
    assert scene.cache.moves
    scene.clock.advance(31)
    assert _now(over) is None
    assert not scene.cache.moves
    assert scene.store.snapshots == []
    assert [path.name for path in scene.folder.iterdir()] == ["main.prefix"]


# --- restoring ------------------------------------------------------------------------------------


def test_a_new_server_gets_the_newest_snapshot(scene: Scene) -> None:
    """Before any call, and only once; the answer after it proves it."""
    scene.opened().call("hi")
    scene.rest()
    scene.cache.closed()
    scene.opened()
    assert scene.server.asked == ["save", "restore"]
    scene.call("hi", cached=TOKENS - 1)
    assert scene.server.asked == ["save", "restore"]
    assert scene.cache.status()["ineffective_restores_total"] == 0
    assert len(scene.store.snapshots) == 1


def test_a_restore_that_spares_nothing_is_found_out(scene: Scene) -> None:
    """It is counted, and its snapshot dropped: the next start does without it."""
    scene.opened().call("hi")
    scene.rest()
    scene.cache.closed()
    scene.opened().call("hi", cached=0)
    assert scene.cache.status()["ineffective_restores_total"] == 1
    assert scene.store.snapshots == []
    assert scene.call("hi", cached=TOKENS - 1)["avoidable"] == 0


def test_a_call_of_another_prompt_proves_nothing(scene: Scene) -> None:
    """A snapshot that the first call has no use for is not held to account."""
    scene.opened().call("hi")
    scene.rest()
    scene.cache.closed()
    scene.opened()
    scene.cache.answered(body("x", "another"), Usage(10, 0, 1), Ticket(conversation="two"))
    assert len(scene.store.snapshots) == 1


def test_a_snapshot_that_cannot_be_restored_is_dropped(scene: Scene) -> None:
    """The server comes up all the same."""
    scene.opened().call("hi")
    scene.rest()
    scene.cache.closed()
    scene.server.refuses = ApiError("invalid_request_error", "Unable to restore slot.")
    scene.opened()
    assert scene.store.snapshots == []


def test_a_damaged_snapshot_never_reaches_the_server(scene: Scene) -> None:
    """One flipped bit, and the server is not told of it."""
    scene.opened().call("hi")
    scene.rest()
    scene.cache.closed()
    (kept,) = scene.store.snapshots
    path = scene.folder / kept.file
    raw = bytearray(path.read_bytes())
    raw[2000] ^= 4
    path.write_bytes(raw)
    scene.opened()
    assert "restore" not in scene.server.asked
    assert scene.store.snapshots == []


def test_a_conversation_that_returns_is_restored(scene: Scene) -> None:
    """What the server no longer holds and a snapshot does, is given to it before the call."""
    scene.opened().call("hi")
    scene.rest()
    scene.call("ho", conversation="two", system="t")
    scene.rest()
    scene.cache.closed()
    scene.opened()
    assert scene.server.asked == ["save", "save", "restore"]
    scene.call("ho", cached=TOKENS - 1, conversation="two", system="t")
    assert scene.server.asked == ["save", "save", "restore"]
    scene.call("hi", cached=TOKENS - 1)
    assert scene.server.asked == ["save", "save", "restore", "restore"]
    assert scene.cache.status()["ineffective_restores_total"] == 0


def test_what_a_restore_would_lose_is_saved_first(scene: Scene) -> None:
    """The slot's own state is new and in no snapshot; it is before another one takes its place."""
    scene.opened().call("hi")
    scene.rest()
    scene.cache.closed()
    scene.opened()
    scene.call("ho", conversation="two", system="t")
    scene.cache.closed()
    scene.server.asked.clear()
    scene.opened()
    scene.call("ho", conversation="two", system="t")
    scene.cache._given.clear()
    scene.cache._memory.forget()
    scene.call("hi", cached=TOKENS - 1)
    assert scene.server.asked == ["restore", "save", "restore"]


def test_a_server_that_fails_costs_no_call(scene: Scene) -> None:
    """Whatever goes wrong with the store, calls go on."""
    scene.opened().call("hi")
    scene.rest()
    scene.server.refuses = unavailable("Gone.")
    scene.cache.closed()
    scene.opened()
    scene.cache.give_way()
    scene.clock.advance(2)
    assert scene.call("hi")["cached"] == 0


def test_a_restore_during_which_the_server_goes_away_is_not_tried_again(scene: Scene) -> None:
    """It may be the reason, and would be so at each start."""
    scene.opened().call("hi")
    scene.rest()
    scene.cache.closed()
    scene.server.moving = Deferred()
    opening = Deferred.fromCoroutine(scene.cache.opened(PROPS))
    opening.addErrback(lambda failure: failure.trap(CancelledError))
    assert scene.server.asked == ["save", "restore"]
    opening.cancel()
    scene.cache.closed()
    scene.server.moving = None
    scene.opened()
    assert scene.server.asked == ["save", "restore", "warm up 0"]
    assert scene.store.snapshots == []


@pytest.mark.parametrize("hears_first", [True, False])
def test_a_restore_that_we_end_ourselves_costs_no_snapshot(scene: Scene, hears_first: bool) -> None:
    """Of a server that was told to end; whether its question or the state is heard of first."""
    scene.opened().call("hi")
    scene.rest()
    scene.cache.closed()
    scene.server.moving = Deferred()
    opening = Deferred.fromCoroutine(scene.cache.opened(PROPS))
    opening.addErrback(lambda failure: failure.trap(CancelledError))
    if hears_first:
        scene.server.moving.errback(unavailable("Gone."))
    opening.cancel()
    scene.cache.told_to_end()
    scene.cache.closed()
    assert len(scene.store.snapshots) == 1
    scene.server.moving = None
    scene.opened()
    assert scene.server.asked == ["save", "restore", "restore"]


def test_a_server_that_goes_away_over_a_restore_is_given_none_again(scene: Scene) -> None:
    """Its connection broke before anybody knew that it had ended."""
    scene.opened().call("hi")
    scene.rest()
    scene.cache.closed()
    scene.server.refuses = unavailable("Gone.")
    scene.opened()
    scene.cache.closed()
    scene.server.refuses = None
    scene.opened()
    assert scene.store.snapshots == []


def test_a_save_on_a_disk_that_hangs_holds_nobody_up(scene: Scene) -> None:
    """Neither does the removal of what was begun."""
    scene.opened().call("hi")
    scene.server.moving = Deferred()
    resting = Deferred.fromCoroutine(scene.cache.rest(30))
    assert scene.server.asked == ["save"]
    scene.store._thread = lambda *_: Deferred()
    scene.clock.advance(31)
    assert _now(resting) is None


def test_a_restore_that_hangs_lets_the_server_open_in_the_end(scene: Scene) -> None:
    """A disk that does not answer costs the snapshot, and not the tier."""
    scene.opened().call("hi")
    scene.rest()
    scene.cache.closed()
    scene.store._thread = lambda *_: Deferred()
    opening = Deferred.fromCoroutine(scene.cache.opened(PROPS))
    scene.clock.advance(601)
    assert _now(opening) is None


def test_what_ram_has_no_room_for_is_restored(scene: Scene) -> None:
    """Of the prompts that went through, the server holds the last ones only."""
    scene.ram = 4096.0  # one state
    scene.opened()
    for words in "abcd":
        scene.call(words, conversation=words, system=words)
        scene.rest()
    scene.server.asked.clear()
    scene.call("c", cached=TOKENS - 1, conversation="c", system="c")
    assert scene.server.asked == []
    scene.call("a", cached=TOKENS - 1, conversation="a", system="a")
    assert scene.server.asked == ["restore"]


def test_a_server_behind_a_wrapper_is_known_by_its_build(tmp_path: Path) -> None:
    """The program of its command stays the same when another llama-server is put there."""
    model = tmp_path / "a.gguf"
    model.write_bytes(b"no model")
    known = attrs.evolve(PROPS, model_path=str(model))
    command = ("/bin/sh", "llama-server")
    one = server_of(known, command, {})
    assert one.identity == server_of(known, command, {}).identity
    assert one.identity != server_of(attrs.evolve(known, build="b2"), command, {}).identity


@pytest.mark.parametrize(("said", "mib"), [((), 8192), (("-cram", "3"), 3), (("-cram", "x"), 8192)])
def test_the_ram_for_conversations_is_what_the_command_says(
    tmp_path: Path, said: tuple[str, ...], mib: int
) -> None:
    """Or what llama-server has by itself; without a limit where it says -1."""
    model = tmp_path / "a.gguf"
    model.write_bytes(b"no model")
    known = attrs.evolve(PROPS, model_path=str(model))
    assert server_of(known, ("/bin/sh", *said), {}).ram == mib * 2**20
    assert server_of(known, ("/bin/sh", "--cache-ram", "-1"), {}).ram == math.inf


def test_options_in_our_own_environment_are_the_servers_too(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It inherits them, and llama-server reads them."""
    told: list[Any] = []

    def server_of(_: Props, __: Any, env: Any) -> Kept:
        told.append(env["LLAMA_ARG_CACHE_TYPE_K"])
        return Kept(ONE, None)

    monkeypatch.setenv("LLAMA_ARG_CACHE_TYPE_K", "q8_0")
    monkeypatch.setattr(room, "server_of", server_of)
    scene.opened()
    assert told == ["q8_0"]


# --- without a snapshot ---------------------------------------------------------------------------


def test_the_last_tools_and_system_prompt_are_evaluated_at_rest(scene: Scene) -> None:
    """They are kept beyond the process, and give way to the first call."""
    scene.opened().call("hi")
    assert orjson.loads((scene.folder / "main.prefix").read_bytes())["max_tokens"] == 0
    scene.cache.closed()
    scene.opened()
    assert scene.server.asked == ["warm up 0"]
    assert scene.line.running == 1
    scene.cache.give_way()
    assert scene.line.settling == 1
    scene.clock.advance(2)
    assert scene.line.settling == 0
    assert scene.call("hi")["cached"] == 0


def test_what_is_warm_gives_its_permit_back(scene: Scene) -> None:
    """Evaluated to the end, it leaves the line as it was."""
    scene.opened().call("hi")
    scene.cache.closed()
    scene.opened()
    assert scene.server.warming is not None
    scene.server.warming.callback(Answer())
    assert (scene.line.running, scene.line.settling) == (0, 0)


def test_of_a_model_with_windows_the_beginning_alone_is_saved(scene: Scene) -> None:
    """At its very end, once, and restored at the next start."""
    scene.model = windowed()
    scene.opened().call("hi")
    assert not scene.cache.status()["saves"]
    scene.rest()
    assert scene.server.asked == ["evaluate", "save"]
    assert [each.what for each in scene.store.snapshots] == ["prefix"]
    scene.call("hi", cached=TOKENS - 1)
    scene.rest()
    assert scene.server.asked == ["evaluate", "save"]
    scene.cache.closed()
    scene.opened()
    assert scene.server.asked == ["evaluate", "save", "restore"]


def test_a_beginning_gives_way_to_a_call(scene: Scene) -> None:
    """Nobody waits for it while it is evaluated, which may take minutes."""
    scene.model = windowed()
    scene.server.evaluating = Deferred()
    scene.opened().call("hi")
    scene.rest()
    assert scene.server.asked == ["evaluate"]
    scene.cache.give_way()
    assert scene.line.settling == 1
    scene.clock.advance(2)
    assert scene.line.settling == 0
    assert scene.server.asked == ["evaluate"]


def test_a_beginning_that_is_too_short_is_evaluated_once(scene: Scene) -> None:
    """It would be no longer after the next turn."""
    scene.model = windowed()
    scene.server.evaluated = 100
    scene.opened().call("hi")
    scene.rest()
    scene.call("hi")
    scene.rest()
    assert scene.server.asked == ["evaluate"]
    assert scene.line.running == 0


def test_a_beginning_that_cannot_be_saved_is_left_alone_for_a_while(scene: Scene) -> None:
    """A full disk is no reason to evaluate it after each turn."""
    scene.model = windowed()
    scene.server.refuses = ApiError("api_error", "No room.")
    scene.opened().call("hi")
    scene.rest()
    scene.call("hi")
    scene.rest()
    assert scene.server.asked == ["evaluate", "save"]


def test_of_a_model_with_windows_the_beginning_is_warm_at_its_end(scene: Scene) -> None:
    """What ends in an empty turn would serve nobody there."""
    scene.model = windowed()
    scene.opened().call("hi")
    scene.cache.closed()
    scene.opened()
    assert scene.server.asked == ["evaluate", "save"]


# --- why it was cold ------------------------------------------------------------------------------


def test_a_past_that_was_written_anew_is_named(scene: Scene) -> None:
    """The call is told where it parts, and the tokens are counted."""
    scene.opened().call("hi")
    scene.cache.answered(
        body("hi", "t" * 20_000), Usage(TOKENS, 0, 1), Ticket(conversation="one", cold=_see)
    )
    assert _SEEN[-1]["rewritten"] > 1000
    assert "system prompt" in _SEEN[-1]["divergence"]["sentence"]
    assert scene.cache.status()["avoidable_tokens_total"] > 1000


def test_a_switch_that_rewrites_nothing_makes_no_other_prompt(scene: Scene) -> None:
    """Thinking is switched at the end of a prompt, where the template says so."""
    scene.cache.free = frozenset({"enable_thinking"})
    scene.opened()
    for thinks in (True, False):
        sent = body("hi") | {"chat_template_kwargs": {"enable_thinking": thinks}}
        scene.cache.answered(sent, Usage(TOKENS, 0, 1), Ticket(conversation="one", cold=_see))
    assert _SEEN[-1]["rewritten"] == 0
    assert _SEEN[-1]["divergence"]["how"] == "continued"


_SEEN: list[Any] = []


def _see(cold: Any) -> None:
    _SEEN.append(cold)


def test_nothing_is_left_on_the_clock(scene: Scene) -> None:
    """A server that goes takes its timers along."""
    scene.opened().call("hi")
    scene.cache.closed()
    scene.line.stop()
    assert scene.clock.getDelayedCalls() == []


def test_without_a_store_nothing_is_saved(scene: Scene) -> None:
    """Calls are counted all the same."""
    scene.cache.store = None
    scene.opened().call("hi")
    scene.rest()
    assert scene.server.asked == []
    assert scene.cache.status()["prefilled_tokens_total"] == TOKENS
