"""
KV state on disk: what a slot holds, kept for the day on which its server starts anew.

llama-server writes a slot's state to a file and reads it again, but looks at little: a file that is
cut off empties the slot, one with a flipped bit gives wrong answers, one of another model of the
same shape likewise (docs/prompt-cache.md, "Snapshots").  So each file has a sidecar that says what
it belongs to, and is compared with it before the server is told to read it: size, beginning and a
checksum over the whole.

A snapshot is two files in the folder that the server has as ``--slot-save-path``, which nobody else
can read: ``snapshot-ID.kv`` and, once that is whole and on the disk, ``snapshot-ID.json``.  What
has only one of the two was being written when something ended, and is removed when the folder is
next looked at; files of other names are none of ours.  When a snapshot was last used is its
sidecar's time of change.  One `Store` takes care of a folder, for all tiers.

Files have gigabytes, so they are removed, synced and summed up in a thread.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from struct import Struct
from threading import Event
from typing import Any, Final, Literal, TypeVar
from uuid import uuid4
from zlib import crc32

import attrs
import orjson
from cattrs import Converter
from twisted.internet.defer import Deferred, DeferredLock
from twisted.internet.threads import deferToThread
from twisted.logger import Logger
from twisted.python.failure import Failure

from gateway.llama.identity import Identity
from gateway.policy.prompt import shared, should_have, whole

T = TypeVar("T")

#: What a snapshot holds: a conversation, or the tools and the system prompt alone.
What = Literal["conversation", "prefix"]

#: The form of sidecars; others are removed.
_FORM: Final = 1

#: Bytes that a sidecar may have.
_SIDECAR: Final = 4 * 1024 * 1024

#: Bytes that are summed up at a time, between two looks whether anybody still wants it.
_CHUNK: Final = 4 * 1024 * 1024

#: How llama.cpp begins a state (`src/llama-context.cpp`): a magic, a version, and the words of the
#: token list; a packed list begins with a mark, a version of its own and its count of tokens.
_STATE: Final = Struct("<IIIIII")
_MAGIC: Final = 0x67677371
_PACKED: Final = 0xFFFFFFFF

_OURS: Final = re.compile(r"snapshot-[0-9a-f]{32}\.(?:kv|part|json|json\.part)")

log = Logger()


class Refused(Exception):
    """A state cannot be kept; the message says why."""


# --- one snapshot ---------------------------------------------------------------------------------


@attrs.frozen
class Snapshot:
    """
    A state on the disk.

    Attributes:
        name: of its files, without their endings.
        identity: what it belongs to.
        what: what it holds.
        tokens: that it holds.
        prompt_tokens: of these, those of the prompt; the others were generated.
        size: bytes of its file.
        checksum: CRC-32 of its file.
        version: of llama.cpp's form of states.
        fingerprint: of the prompt that it was taken after (`gateway.policy.prompt`).
        created: seconds since 1970.
        save_seconds: what it took to write it.
        used: seconds since 1970; not in the sidecar.
    """

    name: str
    identity: Identity
    what: What
    tokens: int
    prompt_tokens: int
    size: int
    checksum: int
    version: int
    fingerprint: bytes = attrs.field(repr=False)
    created: float
    save_seconds: float
    used: float = 0.0

    @property
    def file(self) -> str:
        """What llama-server is told to restore."""
        return f"{self.name}.kv"

    def serves(self, fingerprint: bytes, *, exactly: bool) -> int:
        """
        Tokens of the prompt with this fingerprint that need not be evaluated after a restore.

        Args:
            fingerprint: of the prompt.
            exactly: whether the model's states serve only prompts that go on where they end.
        """
        same, all_of_it = shared(self.fingerprint, fingerprint), whole(self.fingerprint)
        if exactly and same < all_of_it:
            return 0
        return should_have(same, all_of_it, self.prompt_tokens)


def _converter() -> Converter:
    """One that forbids unknown keys and turns nothing into something else."""
    converter = Converter(forbid_extra_keys=True, detailed_validation=False)

    def exactly(kind: type) -> Callable[[Any, Any], Any]:
        def structure(value: Any, _: Any) -> Any:
            if type(value) is not kind:
                raise TypeError(kind)
            return value

        return structure

    for kind in (str, int, float):
        converter.register_structure_hook(kind, exactly(kind))
    converter.register_structure_hook(bytes, lambda value, _: b64decode(value, validate=True))
    converter.register_unstructure_hook(bytes, lambda value: b64encode(value).decode())
    return converter


_CONVERTER: Final = _converter()


def to_sidecar(snapshot: Snapshot) -> bytes:
    """What is written beside a state."""
    said = _CONVERTER.unstructure(snapshot)
    del said["used"], said["name"]
    return orjson.dumps({"form": _FORM, **said})


def from_sidecar(name: str, raw: bytes, used: float) -> Snapshot | None:
    """The snapshot that a sidecar describes; None where it is of another form, or garbage."""
    try:
        said = orjson.loads(raw)
        if said.pop("form") != _FORM:
            return None
        found = _CONVERTER.structure({**said, "name": name, "used": used}, Snapshot)
    except Exception:  # noqa: BLE001  # whatever somebody has written there
        return None
    sensible = (
        found.tokens >= found.prompt_tokens > 0
        and found.size > _STATE.size
        and len(found.fingerprint) % 12 == 0
    )
    return found if sensible else None


# --- who has to go --------------------------------------------------------------------------------


def to_evict(
    snapshots: Iterable[Snapshot], need: int, budget: int, free: int, reserve: int
) -> list[Snapshot] | None:
    """
    Those that make room for `need` further bytes, the longest unused first.

    Args:
        snapshots: all there are.
        need: bytes.
        budget: bytes that all of them may have together.
        free: bytes that are free on the disk.
        reserve: bytes that must stay free.

    Returns:
        None where there is no room, whoever goes: then nobody does.
    """
    oldest_first = sorted(snapshots, key=lambda each: each.used)
    taken = sum(each.size for each in oldest_first)
    if need > budget or free + taken - need < reserve:
        return None
    going = []
    for each in oldest_first:
        if taken + need <= budget and free - need >= reserve:
            break
        going.append(each)
        taken -= each.size
        free += each.size
    return going


# --- all of them ----------------------------------------------------------------------------------


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
            found, complaints = await self._do(lambda _: _look(self.folder, busy))
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
                kept = await self._do(lambda stopped: _keep(self.folder, part, draft, stopped))
            finally:
                self._under_way.pop(part, None)
            self._known[name] = kept
            await self._remove(
                each for each in self._known.values() if _replaces(kept, each, exactly=exactly)
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
        wrong = await self._do(lambda stopped: _wrong(path, snapshot, stopped))
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
        _tell(await self._do(lambda _: _remove(self.folder, names)))

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


def _replaces(kept: Snapshot, other: Snapshot, *, exactly: bool) -> bool:
    """Whether all that `other` is good for, `kept` is good for too."""
    return (
        other.name != kept.name
        and (other.identity, other.what) == (kept.identity, kept.what)
        and (
            kept.fingerprint == other.fingerprint
            or (not exactly and kept.fingerprint.startswith(other.fingerprint))
        )
    )


# --- files; all of this is done in threads --------------------------------------------------------


class _Stopped(Exception):
    """Nobody wants it any more."""


def write_private(path: Path, data: bytes) -> None:
    """Put `data` into a file at `path`, whole or not at all, for nobody else to read."""
    part = path.with_name(f"{path.name}.part")
    try:
        part.unlink(missing_ok=True)  # its mode may be another
        handle = os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.rename(path)
    except BaseException:
        _unlink(part)
        raise
    _sync(path.parent)


def _keep(folder: Path, part: str, draft: Snapshot, stopped: Event) -> Snapshot:
    """The snapshot of a file that a server has written; raises Refused, and leaves nothing."""
    path = folder / part
    try:
        said = _said(path)
        _compare(said, draft)
        path.chmod(0o600)
        with path.open("rb") as file:
            os.fsync(file.fileno())
        checksum = _checksum(path, stopped)
        kept = attrs.evolve(draft, checksum=checksum, version=said.version)
        path.rename(folder / kept.file)
        write_private(folder / f"{kept.name}.json", to_sidecar(kept))
        os.utime(folder / f"{kept.name}.json", (kept.used, kept.used))
    except BaseException as error:
        _remove(folder, [draft.name])
        if isinstance(error, OSError):
            raise Refused(f"it cannot be kept: {error.strerror}") from None
        raise
    return kept


def _compare(said: _Said, draft: Snapshot) -> None:
    if (said.tokens, said.size) != (draft.tokens, draft.size):
        raise Refused(
            f"the server says that it wrote {draft.tokens} tokens and {draft.size} bytes;"
            f" there are {said.tokens} and {said.size}"
        )


@attrs.frozen
class _Said:
    """What the beginning of a state says."""

    version: int
    tokens: int
    size: int


def _said(path: Path) -> _Said:
    """Raises Refused where it is no state, OSError where it cannot be read."""
    with path.open("rb") as file:
        beginning = file.read(_STATE.size)
        size = os.fstat(file.fileno()).st_size
    if len(beginning) < _STATE.size:
        raise Refused(f"it has {size} bytes")
    magic, of_state, words, first, _, tokens = _STATE.unpack(beginning)
    if magic != _MAGIC:
        raise Refused("it does not begin as a state of llama.cpp does")
    found = tokens if first == _PACKED else words
    if not found:
        raise Refused("it holds no tokens")
    return _Said(of_state, found, size)


def _wrong(path: Path, snapshot: Snapshot, stopped: Event) -> str:
    """What is wrong with a snapshot's file; "" if nothing is."""
    try:
        said = _said(path)
        if said.size != snapshot.size:
            return f"it has {said.size} bytes and should have {snapshot.size}"
        if (said.version, said.tokens) != (snapshot.version, snapshot.tokens):
            return "its beginning is not what it was"
        return "" if _checksum(path, stopped) == snapshot.checksum else "it is damaged"
    except Refused as error:
        return str(error)
    except OSError as error:
        return f"it cannot be read: {error.strerror}"


def _checksum(path: Path, stopped: Event) -> int:
    """
    CRC-32 of a file: no single flipped bit escapes it, and nobody else can write here.

    Measured on one core: 2.8 GB/s, against 1.9 for SHA-1, 1.8 for SHA-256 (in hardware) and 0.7
    for BLAKE2b.  A state of 7 GB takes 2.5 s, where its prefill took minutes.
    """
    found = 0
    with path.open("rb", buffering=0) as file:
        chunk = memoryview(bytearray(_CHUNK))
        while read := file.readinto(chunk):
            if stopped.is_set():
                raise _Stopped
            found = crc32(chunk[:read], found)
    return found


def measured(folder: Path, model: Path) -> float:
    """Bytes that a token of a model takes in the states that are there; 0.0 without any."""
    kept = (_read(path) for path in folder.glob("snapshot-*.json"))
    ours = (each for each in kept if each and each.identity.model.path == str(model.resolve()))
    return max((each.size / each.tokens for each in ours), default=0.0)


def _look(folder: Path, busy: frozenset[str]) -> tuple[list[Snapshot], list[str]]:
    """The snapshots of a folder, and complaints; what else of ours is there is removed."""
    found: dict[str, Snapshot] = {}
    try:
        with os.scandir(folder) as entries:
            ours = [Path(entry) for entry in entries if _OURS.fullmatch(entry.name)]
    except OSError as error:
        return [], [f"cannot look at {folder}: {error.strerror}"]
    for path in ours:
        if path.suffix == ".json" and (snapshot := _read(path)) is not None:
            found[snapshot.name] = snapshot
    complaints = []
    for path in ours:
        if path.stem not in found and path.name not in busy:
            complaints += [f"{path.name} is not whole, and goes", *_unlink(path)]
    return list(found.values()), complaints


def _read(sidecar: Path) -> Snapshot | None:
    """The snapshot of a sidecar, where both are as they should be."""
    try:
        state = sidecar.stat()
        if state.st_size > _SIDECAR:
            return None
        found = from_sidecar(sidecar.stem, sidecar.read_bytes(), state.st_mtime)
        if found is None or (sidecar.parent / found.file).stat().st_size != found.size:
            return None
    except OSError:
        return None
    return found


def _remove(folder: Path, names: Iterable[str]) -> list[str]:
    """Sidecars first, since a state without one is no snapshot; complaints."""
    return [
        complaint
        for name in names
        for ending in ("json", "json.part", "kv", "part")
        for complaint in _unlink(folder / f"{name}.{ending}")
    ]


def _unlink(path: Path) -> list[str]:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        return [f"cannot remove {path}: {error.strerror}"]
    return []


def _sync(folder: Path) -> None:
    """Let a new name outlive a power cut, where folders can be synced."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
