"""
KV state on disk: what a slot holds, kept for the day on which its server starts anew.

The snapshots are in the folder that the server has as ``--slot-save-path``, which nobody else can
read.  One `Store` takes care of a folder, for all tiers: it knows what is there
(`gateway.llama.snapshot`), makes room, and gives a server only what is its own and whole.  Files
have gigabytes, so they are removed, synced and summed up in a thread (`gateway.llama.state_files`).
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Event
from typing import Any, TypeVar
from uuid import uuid4

import attrs
from twisted.internet.defer import Deferred, DeferredLock
from twisted.internet.threads import deferToThread
from twisted.logger import Logger
from twisted.python.failure import Failure

from gateway.llama import state_files
from gateway.llama.identity import Identity
from gateway.llama.snapshot import Refused, Snapshot, What, replaces, to_evict

T = TypeVar("T")

log = Logger()


@attrs.define(eq=False)
class Store:
    """
    The snapshots in one folder.

    To keep a state: `begin`, let the server write the file of that name, `commit`; or `abort`.

    Attributes:
        folder: where they are; the ``--slot-save-path`` of every server.
        budget: bytes that they may have together.
        reserve: bytes that must stay free on the disk.
    """

    folder: Path
    budget: int
    reserve: int = 1024**3
    _now: Callable[[], float] = time.time
    _free: Callable[[Path], int] = lambda folder: shutil.disk_usage(folder).free
    _thread: Callable[..., Deferred[Any]] = deferToThread
    _known: dict[str, Snapshot] = attrs.field(factory=dict, init=False)
    _under_way: dict[str, int] = attrs.field(factory=dict, init=False)
    _one_at_a_time: DeferredLock = attrs.field(factory=DeferredLock, init=False)

    # --- what there is ----------------------------------------------------------------------------

    @property
    def snapshots(self) -> list[Snapshot]:
        """All there are, the last used first."""
        return sorted(self._known.values(), key=lambda each: each.used, reverse=True)

    @property
    def size(self) -> int:
        """Bytes of all of them."""
        return sum(each.size for each in self._known.values())

    def fitting(self, identity: Identity) -> list[Snapshot]:
        """Those that a server with this identity can restore, the last used first."""
        return [each for each in self.snapshots if each.identity == identity]

    def best_for(
        self, identity: Identity, fingerprint: bytes, *, exactly: bool = False
    ) -> tuple[Snapshot, int] | None:
        """
        The one that spares a prompt the most, and the tokens that it does; None if none does.

        Args:
            identity: of the server that is to restore it.
            fingerprint: of the prompt.
            exactly: as in `Snapshot.serves`.
        """
        served = [
            (each.serves(fingerprint, exactly=exactly), each) for each in self.fitting(identity)
        ]
        tokens, best = max(served, key=lambda pair: pair[0], default=(0, None))
        return None if best is None or tokens == 0 else (best, tokens)

    async def look(self) -> None:
        """Look at the folder anew, and remove what is not whole; at start, and after a crash."""
        async with self._one_at_a_time:
            busy = frozenset(self._under_way)
            found, complaints = await self._do(lambda _: state_files.look(self.folder, busy))
            _tell(complaints)
            self._known = {each.name: each for each in found}
            with suppress(Refused):
                await self._make_room(0)

    # --- to keep a state --------------------------------------------------------------------------

    async def begin(self, expected: int) -> str:
        """
        Make room for a state.

        Args:
            expected: bytes that it will have, about.

        Returns:
            The name of an empty file that the server is to write to.

        Raises:
            Refused: there is no room for it, or the folder cannot be written to.
        """
        async with self._one_at_a_time:
            await self._make_room(expected)
            name = f"snapshot-{uuid4().hex}.part"
            try:
                # Made by us, it is private from its first byte on; the server keeps its mode.
                handle = os.open(self.folder / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            except OSError as error:
                raise Refused(f"{self.folder} cannot be written to: {error.strerror}") from None
            os.close(handle)
            self._under_way[name] = expected
            return name

    async def commit(
        self,
        part: str,
        identity: Identity,
        what: What,
        tokens: int,
        prompt_tokens: int,
        size: int,
        fingerprint: bytes,
        seconds: float,
        *,
        exactly: bool = False,
    ) -> Snapshot:
        """
        Keep what the server has written.  Cancelling it removes the file.

        Args:
            part: the name that `begin` gave.
            identity: of the server that wrote it.
            what: what it holds.
            tokens: that it holds, as the server says.
            prompt_tokens: of the prompt, as the usage of its answer says.
            size: bytes that it has, as the server says.
            fingerprint: of the prompt that it was taken after.
            seconds: what it took the server to write it.
            exactly: as in `Snapshot.serves`.  Otherwise those that it goes on from are worth
                nothing beside it, and are removed.

        Raises:
            Refused: the file is not what the server says, or cannot be kept.
        """
        name, now = part.removesuffix(".part"), self._now()
        draft = Snapshot(
            name,
            identity,
            what,
            tokens,
            min(tokens, prompt_tokens),
            size,
            checksum=0,
            version=0,
            fingerprint=fingerprint,
            created=now,
            save_seconds=seconds,
            used=now,
        )
        async with self._one_at_a_time:
            try:
                if size > self.budget:
                    await self._remove_files([name])
                    raise Refused(f"it has {size} bytes, and the budget is {self.budget}")
                kept = await self._do(
                    lambda stopped: state_files.keep(self.folder, part, draft, stopped)
                )
            finally:
                self._under_way.pop(part, None)
            self._known[name] = kept
            await self._remove(
                each for each in self._known.values() if replaces(kept, each, exactly=exactly)
            )
            with suppress(Refused):  # it is there; others wait for their room
                await self._make_room(0)
            return kept

    async def abort(self, part: str) -> None:
        """The server has not written it."""
        self._under_way.pop(part, None)
        await self._remove_files([part.removesuffix(".part")])

    # --- to restore one ---------------------------------------------------------------------------

    async def is_whole(self, snapshot: Snapshot) -> bool:
        """
        Whether a snapshot is still what was kept; one that is not is removed.

        Ask right before the server is told to restore it.  Cancelling it ends the reading.
        """
        path = self.folder / snapshot.file
        wrong = await self._do(lambda stopped: state_files.wrong(path, snapshot, stopped))
        if wrong:
            log.warn("the snapshot {name} is dropped: {why}", name=snapshot.name, why=wrong)
            await self.drop(snapshot)
        return not wrong

    def touch(self, snapshot: Snapshot) -> None:
        """It was used; it has to go after all others."""
        now = self._now()
        if snapshot.name not in self._known:
            return
        self._known[snapshot.name] = attrs.evolve(self._known[snapshot.name], used=now)
        with suppress(OSError):
            os.utime(self.folder / f"{snapshot.name}.json", (now, now))

    async def drop(self, snapshot: Snapshot) -> None:
        """It is worth nothing."""
        await self._remove([snapshot])

    # --- how --------------------------------------------------------------------------------------

    async def _make_room(self, need: int) -> None:
        """Raises Refused where there is none."""
        try:
            free = self._free(self.folder)
        except OSError as error:
            raise Refused(f"{self.folder} cannot be used: {error.strerror}") from None
        # What is there already needs no room on the disk.
        reserve = self.reserve if need else 0
        need += sum(self._under_way.values())
        going = to_evict(self._known.values(), need, self.budget, free, reserve)
        if going is None:
            raise Refused(
                f"{need} bytes do not fit: the budget is {self.budget} bytes, {free} are free on"
                f" the disk, and {self.reserve} must stay free"
            )
        await self._remove(going)

    async def _remove(self, snapshots: Iterable[Snapshot]) -> None:
        names = [each.name for each in snapshots]
        for name in names:
            self._known.pop(name, None)
        if names:
            await self._remove_files(names)

    async def _remove_files(self, names: Sequence[str]) -> None:
        _tell(await self._do(lambda _: state_files.remove(self.folder, names)))

    def _do(self, work: Callable[[Event], T]) -> Deferred[T]:
        """Do `work` in a thread; cancelling sets the event that it is given."""
        stopped = Event()
        done: Deferred[T] = Deferred(lambda _: stopped.set())

        def ended(result: T | Failure) -> None:
            if not done.called:
                done.callback(result)

        self._thread(work, stopped).addBoth(ended)
        return done


def _tell(complaints: Iterable[str]) -> None:
    for complaint in complaints:
        log.warn("{complaint}", complaint=complaint)
