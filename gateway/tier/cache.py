"""
What the slot of one server holds, and what of it is kept for the day on which the server is new.

1. After a turn, when nobody has come for a while, the slot is saved (`gateway.llama.snapshots`),
   and once more before the server is stopped.
2. A server that has come up gets the newest snapshot that fits before any call does.  Where there
   is none, the tools and the system prompt that were seen last are evaluated while nobody waits.
3. A conversation whose snapshot holds much more of it than the server does is restored for it.
4. The next answer proves it: a restore that spared nothing is logged, and its snapshot dropped.
5. Of each answer it is said why it was cold (`gateway.policy.cold`).

Everything that touches the slot has its permit.  What can go wrong here costs a prefill and no
call: it is logged, and the call goes on.  A server with several slots does not tell which of them a
call was in, so only one with a single slot is saved and restored.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final

import attrs
import orjson
from twisted.internet.defer import CancelledError, Deferred, ensureDeferred
from twisted.internet.defer import TimeoutError as TimedOut
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.internet.threads import deferToThread
from twisted.logger import Logger

from gateway.background import begin
from gateway.config import Tier as Wanted
from gateway.files import write_private
from gateway.llama import gguf
from gateway.llama.client import SLOT_PATIENCE, LlamaClient
from gateway.llama.identity import Kept, server_of
from gateway.llama.snapshot import Refused, Snapshot, What
from gateway.llama.snapshots import Store
from gateway.policy import warm
from gateway.policy.cold import Cold, Memory
from gateway.policy.order import Rank
from gateway.policy.prompt import Prompt, shared, whole
from gateway.tier.line import Line, Permit, Ticket
from gateway.upstream import Lost, Props
from gateway.wire import chat
from gateway.wire.errors import ApiError, Unavailable, invalid
from gateway.wire.events import Usage

Json = Any

#: The one slot of a server whose slot is saved and restored.
_SLOT: Final = 0

#: Tokens that a restore must have promised, so that an answer can prove or disprove it, and the
#: share of them that must have come.
_PROVABLE: Final = 256
_PROVEN: Final = 0.8

#: Restores since its start that a server is believed to hold still.
_GIVEN: Final = 8

#: Bytes that a token takes where nothing is known of the model.
_GUESSED: Final = 128 * 1024

log = Logger()


@attrs.define
class Numbers:
    """
    What was spared and what was not, since the gateway was started.

    Attributes:
        cached_tokens_total: prompt tokens that the server still had.
        prefilled_tokens_total: prompt tokens that were evaluated.
        avoidable_tokens_total: of these, those that need not have been.
        saves_total, restores_total: snapshots that were taken, and given to a server.
        save_seconds_total, restore_seconds_total: what that took, checksums included.
        save_bytes_total, restore_bytes_total: their size.
        ineffective_restores_total: restores that spared nothing.
    """

    cached_tokens_total: int = 0
    prefilled_tokens_total: int = 0
    avoidable_tokens_total: int = 0
    saves_total: int = 0
    save_seconds_total: float = 0.0
    save_bytes_total: int = 0
    restores_total: int = 0
    restore_seconds_total: float = 0.0
    restore_bytes_total: int = 0
    ineffective_restores_total: int = 0


@attrs.frozen(eq=False)
class _Held:
    """What the slot holds after an answer: tokens of its prompt, and in all."""

    prompt: Prompt
    prompt_tokens: int
    tokens: int
    is_conversation: bool


@attrs.define(eq=False)
class Cache:
    """
    The cache of one server.

    Attributes:
        name: of its tier.
        config: its part of the configuration.
        client: the server, where it is a llama-server; any other keeps its cache to itself.
        command: what a server of ours was started with; () of any other.
        env: what was added to its environment.
        store: where snapshots are; None where none are taken.
        free: switches of its template that change nothing of what was said before.
        moves: whether a state is on its way; the server answers no question meanwhile.
        prefix_file: where the tools and the system prompt that were seen last are kept.
        numbers: what was spared.
    """

    name: str
    config: Wanted
    client: LlamaClient | None
    line: Line
    prefill_rate: Callable[[], float | None]
    _reactor: IReactorTime
    _thread: Callable[[Callable[[], Any]], Deferred[Any]] = deferToThread
    command: tuple[str, ...] = ()
    env: Mapping[str, str] = attrs.field(factory=dict)
    store: Store | None = None
    prefix_file: Path | None = None
    free: frozenset[str] = frozenset()
    moves: bool = attrs.field(default=False, init=False)
    numbers: Numbers = attrs.field(factory=Numbers, init=False)
    _memory: Memory = attrs.field(factory=Memory, init=False)
    _server: Kept | None = attrs.field(default=None, init=False)
    _held: _Held | None = attrs.field(default=None, init=False)
    _held_at: float = attrs.field(default=0.0, init=False)
    _refused_at: float | None = attrs.field(default=None, init=False)
    _restored: Snapshot | None = attrs.field(default=None, init=False)
    _doubted: Snapshot | None = attrs.field(default=None, init=False)
    _coming: tuple[Mapping[str, Json], Prompt] | None = attrs.field(default=None, init=False)
    _too_short: bytes = attrs.field(default=b"", init=False)
    _forgets: bool = attrs.field(default=False, init=False)
    _given: list[bytes] = attrs.field(factory=list, init=False)
    _prefix: bytes = attrs.field(default=b"", init=False)
    _idle: IDelayedCall | None = attrs.field(default=None, init=False)
    _working: Deferred[None] | None = attrs.field(default=None, init=False)
    _warming: Deferred[Any] | None = attrs.field(default=None, init=False)

    # --- a server that comes and goes -------------------------------------------------------------

    async def opened(self, props: Props) -> None:
        """
        The server is up, and no call has been sent there yet.

        Cancel it when the server goes away: a snapshot that was being restored then is dropped at
        the next start.  Nothing is raised.
        """
        self._memory.forget()
        if self.store is None or props.slots != 1:
            return
        await self._in_time(self._open(self.store, props))

    async def _open(self, store: Store, props: Props) -> None:
        # One whose server went away over it may be the reason.
        doubted, self._doubted = self._doubted, None
        if doubted is not None:
            log.warn("tier {tier}: a restore ended its server; its snapshot goes", tier=self.name)
            await store.drop(doubted)
        asked = partial(server_of, props, self.command, {**os.environ, **self.env})
        await store.look()
        try:
            self._server = await self._thread(asked)
        except (OSError, gguf.NotGguf) as error:
            log.warn("tier {tier}: takes no snapshots: {error}", tier=self.name, error=error)
            return
        for snapshot in store.fitting(self._server.identity):
            if await self._restore(snapshot):
                return

    def let_in(self) -> None:
        """Calls are let in now; until one comes, warm a slot that nothing was restored to."""
        if self._server is None or self._restored is not None:
            return
        if self._server.exactly:  # what `_warm_up` leaves would serve nobody
            self._working = self._do(self._save_prefix())
        else:
            self._warming = self._do(self._warm_up())

    def told_to_end(self) -> None:
        """The server was told to end: whatever was being restored is no reason for it."""
        self._doubted = None

    def closed(self) -> None:
        """The server is gone, or about to be."""
        self._server = self._held = self._restored = None
        self._given.clear()
        self._prefix = b""
        self.stop()

    def stop(self) -> None:
        """End what is under way that nobody waits for."""
        if self._idle is not None and self._idle.active():
            self._idle.cancel()
        self._idle = None
        for under_way in (self._working, self._warming):
            if under_way is not None:
                under_way.cancel()

    async def rest(self, seconds: float) -> None:
        """Save the slot of a server that nobody uses and that will be stopped, within `seconds`."""
        self.stop()
        held = self._held
        if held is None or not self._is_worth_saving(held, last_chance=True):
            return
        await self._in_time(self._save(held, None), seconds)

    async def save(self) -> None:
        """
        Save the slot as soon as no call has it, because a person wants it.

        Raises:
            ApiError: it cannot be saved, or need not be; the sentence says why.
        """
        server, store = self._server, self.store
        if server is None or store is None:
            raise invalid(f"No snapshots are taken of tier {self.name!r}.")
        if server.exactly:
            raise invalid("What can be kept of a model of this kind is saved without being asked.")
        permit = await self.line.join(Ticket(Rank.HOUSE))
        try:
            held = self._held
            if held is None or not held.is_conversation:
                raise invalid("The slot holds no conversation that could be saved.")
            best = store.best_for(server.identity, held.prompt.fingerprint)
            is_busy = self._working is not None and not self._working.called
            if is_busy or (best is not None and best[0].fingerprint == held.prompt.fingerprint):
                raise invalid("What the slot holds is saved already.")
            await self._save(held, permit)
        except (Lost, Refused, OSError) as error:
            raise ApiError("api_error", f"The slot was not saved: {error}") from None
        finally:
            permit.finished()

    # --- a call -----------------------------------------------------------------------------------

    def give_way(self) -> None:
        """A call has come: what nobody waits for can wait."""
        if self._warming is not None:
            self._warming.cancel()

    async def before(self, body: Mapping[str, Json]) -> None:
        """A call is about to be sent, and has the permit of the slot."""
        held, self._held = self._held, None
        self._doubted = self._coming = None
        server, store = self._server, self.store
        if server is not None and store is not None and store.fitting(server.identity):
            await self._in_time(self._prepare(body, held, server, store))

    async def _prepare(
        self, body: Mapping[str, Json], held: _Held | None, server: Kept, store: Store
    ) -> None:
        """Restore what is kept of a call's prompt, if that pays."""
        prompt = self._prompt(body)
        self._coming = body, prompt  # its answer needs it once more
        fingerprint = prompt.fingerprint
        best = store.best_for(server.identity, fingerprint, exactly=server.exactly)
        if best is None:
            return
        snapshot, kept = best
        holds = self._likely_held(fingerprint, snapshot, server.ram)
        reading = self.numbers.restore_seconds_total and (
            self.numbers.restore_bytes_total / self.numbers.restore_seconds_total
        )
        offer = warm.Offer(kept, holds, snapshot.size, self.prefill_rate(), reading or None)
        if not warm.restores(offer):
            return
        if held is not None and self._is_worth_saving(held, last_chance=True):
            store.touch(snapshot)  # whoever has to go for it, not this one
            await self._attempt(self._save(held, None))  # else a restore would lose it
        await self._restore(snapshot)

    def answered(self, body: Mapping[str, Json], usage: Usage, ticket: Ticket) -> None:
        """The answer to a call is whole."""
        try:
            self._learn(body, usage, ticket)
        except Exception:  # noqa: BLE001  # the answer is whole, whatever is made of it
            log.failure("tier {tier}: cannot make use of an answer", tier=self.name)

    def _learn(self, body: Mapping[str, Json], usage: Usage, ticket: Ticket) -> None:
        if self.client is None:
            self.numbers.prefilled_tokens_total += usage.input or 0
            self.numbers.cached_tokens_total += usage.cached
            return
        coming, self._coming = self._coming, None
        if coming is not None and coming[0] is body:
            prompt = coming[1]
        else:
            prompt = self._prompt(body, ticket.conversation)
        cached = usage.cached
        evaluated = usage.input or 0
        cold = self._memory.judge(ticket.conversation, prompt, evaluated + cached, cached)
        if ticket.conversation:
            self._memory.remember(ticket.conversation, prompt)
        self._count(evaluated, cold)
        ticket.cold(cold.as_json())
        if cold.sentence:
            log.warn("{id} was cold: {why}", id=ticket.name, why=cold.sentence)
        if cold.avoidable and not self.command:
            self._forgets = True
        self._prove(prompt, usage)
        if self._server is None:
            return
        is_conversation = bool(ticket.conversation) and ticket.rank is not Rank.SUBAGENT
        tokens = evaluated + cached
        self._held = _Held(prompt, tokens, tokens + usage.output, is_conversation)
        self._held_at = self._reactor.seconds()
        if is_conversation:
            self._keep_prefix(body)
        self._wake()

    @property
    def _llama(self) -> LlamaClient:
        assert self.client is not None  # nothing is kept of any other
        return self.client

    def _prompt(self, body: Mapping[str, Json], conversation: str = "") -> Prompt:
        told = body.get("chat_template_kwargs") or {}
        like = self._memory.like(conversation)
        return Prompt.of(body, [name for name in told if name not in self.free], like)

    def status(self) -> Mapping[str, Json]:
        """For ``/status``."""
        server = self._server
        return {
            **attrs.asdict(self.numbers),
            "model_kind": None if server is None else server.kind,
            "saves": server is not None and self.store is not None and not server.exactly,
            "snapshots": 0 if self.store is None else len(self.store.snapshots),
            "snapshot_bytes": 0 if self.store is None else self.store.size,
            "moves": self.moves,
            "advice": self.advice(),
        }

    def advice(self) -> list[str]:
        """What a server that is not ours should have, and what it costs that it has not."""
        if self.command or self.client is None:
            return []
        where = f"[tier.{self.name}.server]"
        ours = "This server is not started by claudegw: its slot is not saved, and after each start"
        said = [
            f"{ours} the first prompt is evaluated whole; a command in {where} would mend that."
        ]
        if self._forgets:
            said.append(
                "It lost prompts that it had evaluated: start it with --slot-prompt-similarity 0"
                " and a larger --cache-ram. So far that cost"
                f" {self.numbers.avoidable_tokens_total} tokens."
            )
        return said

    # --- what an answer proves --------------------------------------------------------------------

    def _count(self, evaluated: int, cold: Cold) -> None:
        self.numbers.prefilled_tokens_total += evaluated
        self.numbers.cached_tokens_total += cold.cached
        self.numbers.avoidable_tokens_total += cold.avoidable + cold.rewritten

    def _prove(self, prompt: Prompt, usage: Usage) -> None:
        """Whether the last restore was worth anything to the call after it."""
        snapshot, self._restored = self._restored, None
        if snapshot is None or self.store is None or self._server is None:
            return
        promised = snapshot.serves(prompt.fingerprint, exactly=self._server.exactly)
        if promised < _PROVABLE:
            return  # another prompt than those that it is good for
        if usage.cached >= promised * _PROVEN:
            self.store.touch(snapshot)
            return
        self.numbers.ineffective_restores_total += 1
        log.warn(
            "tier {tier}: a restore that should have spared {promised} tokens spared {cached};"
            " its snapshot is dropped",
            tier=self.name,
            promised=promised,
            cached=usage.cached,
        )
        self._do(self.store.drop(snapshot))

    def _likely_held(self, fingerprint: bytes, like: Snapshot, room: float) -> int:
        """
        Tokens of a prompt that the server holds, as many for each byte as `like` has.

        It holds the prompt that came last, and of those before as many as `room` bytes of RAM take.
        """
        tokens_a_byte = like.prompt_tokens / max(1, whole(like.fingerprint))
        newest_first = self._memory.fingerprints[::-1]
        newest_first += [
            given
            for given in self._given
            if not any(shared(each, given) == whole(given) for each in newest_first)
        ]
        most = 0
        for number, each in enumerate(newest_first):
            if number:
                room -= whole(each) * tokens_a_byte * like.size / like.tokens
            if room < 0:
                break
            most = max(most, shared(each, fingerprint))
        return int(most * tokens_a_byte)

    # --- when nobody waits ------------------------------------------------------------------------

    def _wake(self) -> None:
        """Look at the slot when it has not been used for a while."""
        if self._idle is not None and self._idle.active():
            self._idle.reset(self.config.snapshot_idle)
        else:
            self._idle = self._reactor.callLater(self.config.snapshot_idle, self._rested)

    def _rested(self) -> None:
        held = self._held
        if held is None or not self._is_at_rest:
            return  # the answer that is under way will come back to this
        if self._working is not None and not self._working.called:
            self._wake()  # the last save is still being summed up
        elif self._server is not None and self._server.exactly:
            self._working = self._do(self._save_prefix())
        elif self._is_worth_saving(held):
            self._working = self._do(self._save_in_line(held))

    @property
    def _refused(self) -> float | None:
        """Seconds since a state could not be saved; None if that never happened."""
        at = self._refused_at
        return None if at is None else self._reactor.seconds() - at

    @property
    def _is_at_rest(self) -> bool:
        return not (self.line.running or self.line.waiting or self.line.settling)

    def _is_worth_saving(self, held: _Held, *, last_chance: bool = False) -> bool:
        server, store = self._server, self.store
        if server is None or store is None or not held.is_conversation:
            return False
        best = store.best_for(server.identity, held.prompt.fingerprint, exactly=server.exactly)
        may = last_chance or self._is_at_rest
        slot = warm.Slot(
            server.exactly,
            self._reactor.seconds() - self._held_at if may else None,
            held.tokens - (0 if best is None else best[1]),
            self._refused,
        )
        least = self.config.snapshot_min_tokens
        return warm.saves(slot, self.config.snapshot_idle, least, last_chance=last_chance)

    async def _save_in_line(self, held: _Held) -> None:
        permit = await self.line.join(Ticket(Rank.BACKGROUND))
        try:
            if self._held is held:
                await self._save(held, permit)
        finally:
            permit.finished()

    async def _save(self, held: _Held, permit: Permit | None) -> None:
        """Save the slot; its permit goes back as soon as the server has written it."""
        await self._take("conversation", held, permit)

    async def _take(self, what: What, held: _Held, permit: Permit | None) -> None:
        server, store = self._server, self.store
        assert server is not None
        assert store is not None
        began = self._reactor.seconds()
        try:
            part = await store.begin(self._state_bytes(server, held.tokens))
            try:
                self.moves = True
                moved = await self._llama.save_slot(_SLOT, part)
            except BaseException:
                if permit is not None:
                    permit.finished()  # a disk that hangs is no reason to keep it
                self._do(store.abort(part))  # nor to wait for it once more
                raise
            finally:
                self.moves = False
            if permit is not None:
                permit.finished()
            kept = await store.commit(
                part,
                server.identity,
                what,
                moved.tokens,
                held.prompt_tokens,
                moved.size,
                held.prompt.fingerprint,
                moved.seconds,
                exactly=server.exactly,
            )
        except Unavailable:
            raise  # its server is gone, which says nothing of the next try
        except (ApiError, Refused):
            self._refused_at = self._reactor.seconds()
            raise
        took = self._reactor.seconds() - began
        self.numbers.saves_total += 1
        self.numbers.save_seconds_total += took
        self.numbers.save_bytes_total += kept.size
        log.info(
            "tier {tier}: {tokens} tokens saved, {mib:.0f} MiB in {took:.1f} s",
            tier=self.name,
            tokens=kept.tokens,
            mib=kept.size / 2**20,
            took=took,
        )

    def _state_bytes(self, server: Kept, tokens: int) -> int:
        """Bytes that a state of so many tokens will have: as the last one, or by the header."""
        assert self.store is not None
        for last in self.store.fitting(server.identity):
            return last.size * tokens // last.tokens
        return tokens * _GUESSED if server.model is None else server.model.state_bytes(tokens)

    async def _restore(self, snapshot: Snapshot) -> bool:
        """Restore a snapshot; whether the server says that it did."""
        assert self.store is not None
        began = self._reactor.seconds()
        try:
            if not await self.store.is_whole(snapshot):
                return False
            self._doubted, self.moves = snapshot, True
            moved = await self._llama.restore_slot(_SLOT, snapshot.file)
        except (Lost, Unavailable):
            raise  # its server is gone: at the next start it is known whether this ended it
        except ApiError as error:
            log.warn("tier {tier}: cannot restore: {error}", tier=self.name, error=str(error))
            self._doubted = None
            await self.store.drop(snapshot)
            return False
        finally:
            self.moves = False
        self._doubted = None
        took = self._reactor.seconds() - began
        self._restored = snapshot
        self._given = [snapshot.fingerprint, *self._given][:_GIVEN]
        self.store.touch(snapshot)
        self.numbers.restores_total += 1
        self.numbers.restore_seconds_total += took
        self.numbers.restore_bytes_total += moved.size
        log.info(
            "tier {tier}: {tokens} tokens restored in {took:.2f} s",
            tier=self.name,
            tokens=moved.tokens,
            took=took,
        )
        return True

    # --- tools and system prompt ------------------------------------------------------------------

    def _keep_prefix(self, body: Mapping[str, Json]) -> None:
        """Remember the tools and the system prompt, beyond the process too."""
        if self.prefix_file is None:
            return
        written = orjson.dumps(warm.beginning(body))
        digest = blake2b(written, digest_size=16).digest()
        if digest != self._prefix:
            self._prefix = digest
            self._do(self._thread(partial(write_private, self.prefix_file, written)))

    def _prefix_body(self) -> dict[str, Json] | None:
        """What was remembered."""
        try:
            found = (
                None if self.prefix_file is None else orjson.loads(self.prefix_file.read_bytes())
            )
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) and "messages" in found else None

    async def _warm_up(self) -> None:
        """Evaluate the tools and the system prompt that were seen last."""
        body = self._prefix_body()
        if body is None:
            return
        permit = await self.line.join(Ticket(Rank.BACKGROUND))
        try:
            answer = await self._llama.messages(body)
            await answer.read()
            permit.finished()
            log.info("tier {tier}: its tools and system prompt are warm", tier=self.name)
        finally:
            permit.abandon()

    async def _save_prefix(self) -> None:
        """
        Evaluate the tools and the system prompt to their very end, and save that.

        For models whose states serve only what goes on exactly where they end.
        """
        body = self._prefix_body()
        server, store = self._server, self.store
        if body is None or server is None or store is None:
            return
        beginning = self._prompt({**body, "messages": []})
        kept = store.best_for(server.identity, beginning.fingerprint, exactly=True)
        if kept is not None or beginning.fingerprint == self._too_short:
            return
        if warm.is_refused(self._refused):
            return
        one, other = [
            await self._llama.apply_template(chat.from_messages(each))
            for each in warm.two_beginnings(body)
        ]
        permit = await self.line.join(Ticket(Rank.BACKGROUND))
        try:
            self._held = None
            prompt = warm.rendered_beginning(one, other)
            wanted = {"prompt": prompt, "n_predict": 0, "cache_prompt": True}
            # A call that comes ends this, and not what is saved of it afterwards.
            evaluating = ensureDeferred(self._llama.complete(wanted))
            self._warming = evaluating
            done = await evaluating
            tokens = done.evaluated + done.cached
            if tokens < self.config.snapshot_min_tokens:
                self._too_short = beginning.fingerprint
                permit.finished()
                return
            held = _Held(beginning, tokens, tokens, is_conversation=False)
            await self._take("prefix", held, permit)
        finally:
            permit.abandon()

    # --- work in the background -------------------------------------------------------------------

    def _do(self, work: Coroutine[Deferred[Any], Any, Any] | Deferred[Any]) -> Deferred[None]:
        """Begin it; nobody waits for it."""
        return begin(self._attempt(work))

    async def _in_time(
        self, work: Coroutine[Deferred[Any], Any, Any], seconds: float = SLOT_PATIENCE
    ) -> None:
        """As `_attempt`; a disk or a server that hangs is not waited for any longer."""
        done = Deferred.fromCoroutine(self._attempt(work))
        done.addTimeout(seconds, self._reactor)
        try:
            await done
        except TimedOut:
            log.warn("tier {tier}: its cache took too long", tier=self.name)

    async def _attempt(self, work: Any) -> None:
        """Await it; what goes wrong is logged."""
        try:
            await work
        except CancelledError:
            raise
        except (ApiError, Lost, Refused, OSError) as error:
            log.warn("tier {tier}: {error}", tier=self.name, error=str(error))
        except Exception:  # noqa: BLE001  # a cache that fails costs time, and nothing else
            log.failure("tier {tier}: its cache failed", tier=self.name)
