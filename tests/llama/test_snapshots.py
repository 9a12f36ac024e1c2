"""The store of snapshots: what is kept, what goes, what is never given to a server."""

from __future__ import annotations

import os
import random
import struct
import threading
from collections.abc import Awaitable, Coroutine, Iterable
from pathlib import Path
from typing import Any, TypeVar

import attrs
import orjson
import pytest
import pytest_twisted
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from twisted.internet.defer import CancelledError, Deferred, maybeDeferred
from twisted.logger import LogEvent

from gateway.llama import state_files
from gateway.llama.identity import Identity
from gateway.llama.snapshot import Refused, Snapshot, What, to_sidecar
from gateway.llama.snapshots import Store
from tests.llama.test_snapshot import ONE, prints, snapshot

T = TypeVar("T")

MIB = 1024 * 1024


def state(tokens: int = 3000, size: int = 4096, version: int = 4) -> bytes:
    """A state as llama.cpp writes it; what follows the beginning is whatever."""
    head = struct.pack("<IIIIII", 0x67677371, version, tokens + 4, 0xFFFFFFFF, 1, tokens)
    return head + bytes(n * 7 % 251 for n in range(size - len(head)))


def done(work: Awaitable[T]) -> T:
    """What comes of `work`, which needs no time."""
    found: list[Any] = []
    failed: list[BaseException] = []
    coroutine: Coroutine[Any, Any, T] = work  # type: ignore[assignment]
    ended = Deferred.fromCoroutine(coroutine)
    ended.addCallbacks(found.append, lambda failure: failed.append(failure.value))
    if failed:
        raise failed[0]
    (result,) = found
    return result  # type: ignore[no-any-return]


@attrs.define(eq=False)
class Disk:
    """A folder, a clock and a disk that the test can fill."""

    folder: Path
    budget: int = 100 * MIB
    reserve: int = 0
    seconds: float = 1000.0
    free: int = 10**12

    def store(self) -> Store:
        """A store that looks at the folder for the first time."""
        store = Store(
            self.folder,
            self.budget,
            self.reserve,
            now=self.now,
            free=lambda _: self.free,
            thread=maybeDeferred,
        )
        done(store.look())
        return store

    def now(self) -> float:
        self.seconds += 1
        return self.seconds

    def files(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    folder = tmp_path / "slots"
    folder.mkdir(mode=0o700)
    return Disk(folder)


def keep(
    store: Store,
    *parts: str,
    identity: Identity = ONE,
    tokens: int = 3000,
    raw: bytes | None = None,
    what: What = "conversation",
    exactly: bool = False,
) -> Snapshot:
    """A snapshot that a server has written."""
    raw = state(tokens) if raw is None else raw
    part = done(store.begin(len(raw)))
    (store.folder / part).write_bytes(raw)
    return done(
        store.commit(
            part, identity, what, tokens, tokens, len(raw), prints(*parts), 0.1, exactly=exactly
        )
    )


# --- keeping --------------------------------------------------------------------------------------


def test_what_a_server_wrote_is_kept(disk: Disk) -> None:
    """Two files that nobody else can read, and no other; the next start finds them."""
    store = disk.store()
    kept = keep(store, "tools", "system")
    assert disk.files() == [f"{kept.name}.json", f"{kept.name}.kv"]
    assert {path.stat().st_mode & 0o777 for path in disk.folder.iterdir()} == {0o600}
    assert store.snapshots == [kept]
    assert store.size == 4096
    assert disk.store().snapshots == [kept]
    assert done(store.is_whole(kept))


def test_the_file_is_private_before_the_server_writes_to_it(disk: Disk) -> None:
    """A server would make it readable for all."""
    part = done(disk.store().begin(100))
    assert (disk.folder / part).stat().st_mode & 0o777 == 0o600
    assert part.endswith(".part")


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"short",
        b"x" * 4096,
        state(tokens=2999),
        state(size=4095),
        struct.pack("<IIIIII", 0x67677371, 4, 0, 0, 0, 0) + bytes(4072),
    ],
)
def test_what_a_server_did_not_write_is_refused(disk: Disk, raw: bytes) -> None:
    """Other bytes or tokens than it says, or no state at all; nothing is left of it."""
    store = disk.store()
    part = done(store.begin(4096))
    (disk.folder / part).write_bytes(raw)
    with pytest.raises(Refused):
        done(store.commit(part, ONE, "conversation", 3000, 3000, 4096, prints("a"), 0.1))
    assert (disk.files(), store.snapshots) == ([], [])


def test_a_server_that_wrote_nothing(disk: Disk) -> None:
    """The caller gives up, and nothing is left."""
    store = disk.store()
    part = done(store.begin(4096))
    done(store.abort(part))
    assert disk.files() == []
    done(store.abort(part))


def test_an_older_form_of_states_is_known(disk: Disk) -> None:
    """Its list of tokens is not packed: the count stands before it."""
    raw = struct.pack("<III", 0x67677371, 2, 3000) + bytes(4084)
    assert keep(disk.store(), "a", raw=raw).version == 2


def test_a_longer_one_takes_the_place_of_a_shorter_one(disk: Disk) -> None:
    """Of the same conversation on the same server; a prefix stays what it is."""
    store = disk.store()
    prefix = keep(store, "tools", what="prefix")
    first = keep(store, "tools", "one")
    other = keep(store, "tools", "two")
    elsewhere = keep(store, "tools", "one", identity=attrs.evolve(ONE, n_ctx=4096))
    longer = keep(store, "tools", "one", "more")
    assert store.snapshots == [longer, elsewhere, other, prefix]
    assert not (disk.folder / first.file).exists()


# --- room -----------------------------------------------------------------------------------------


def test_a_full_disk(disk: Disk) -> None:
    """Nothing is begun, nothing goes, nothing is left over."""
    disk.reserve = 10 * MIB
    store = disk.store()
    kept = keep(store, "a")
    disk.free = 10 * MIB
    with pytest.raises(Refused, match="must stay free"):
        done(store.begin(MIB))
    assert store.snapshots == [kept]
    assert len(disk.files()) == 2


def test_a_disk_that_fills_while_the_sidecar_is_written(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state goes too: without a sidecar it is nothing."""
    store = disk.store()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    part = done(store.begin(4096))
    (disk.folder / part).write_bytes(state())
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Refused, match="No space left"):
        done(store.commit(part, ONE, "conversation", 3000, 3000, 4096, prints("a"), 0.1))
    assert (disk.files(), store.snapshots) == ([], [])


def test_old_ones_go_where_the_disk_is_almost_full(disk: Disk) -> None:
    """As many as it takes, the longest unused first."""
    store = disk.store()
    kept = [keep(store, name) for name in "abc"]
    disk.reserve, disk.free = 10_000, 10_000
    store.reserve = 10_000
    done(store.begin(5000))
    assert store.snapshots == [kept[2]]


def test_a_folder_that_cannot_be_written_to(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save is refused before the server is asked."""
    store = disk.store()

    def denied(*_: Any) -> int:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", denied)
        with pytest.raises(Refused, match="Permission denied"):
            done(store.begin(100))
    disk.folder.rmdir()
    with pytest.raises(Refused, match="No such file"):
        done(store.begin(100))


def test_a_folder_that_is_gone(tmp_path: Path, logged: list[LogEvent]) -> None:
    """There are no snapshots in it; a save is refused."""
    store = Store(tmp_path / "nowhere", MIB, thread=maybeDeferred)
    done(store.look())
    assert store.snapshots == []
    assert any("cannot look at" in event["complaint"] for event in logged)
    with pytest.raises(Refused, match="cannot be used"):
        done(store.begin(100))


def test_a_state_larger_than_the_budget(disk: Disk) -> None:
    """Neither begun nor kept, and the others stay."""
    disk.budget = 10_000
    store = disk.store()
    kept = keep(store, "a")
    with pytest.raises(Refused):
        done(store.begin(10_001))
    part = done(store.begin(100))
    (disk.folder / part).write_bytes(state(size=10_001))
    with pytest.raises(Refused, match="budget"):
        done(store.commit(part, ONE, "conversation", 3000, 3000, 10_001, prints("b"), 0.1))
    assert store.snapshots == [kept]
    assert len(disk.files()) == 2


def test_states_that_are_being_written_count(disk: Disk) -> None:
    """Two slots saved at the same time do not get the same room."""
    disk.budget = 10_000
    store = disk.store()
    part = done(store.begin(6000))
    with pytest.raises(Refused):
        done(store.begin(6000))
    done(store.abort(part))
    done(store.begin(6000))


def test_two_hundred_conversations_under_a_budget(disk: Disk) -> None:
    """Budget held, the longest unused go first, the folder does not grow: one and a half rounds."""
    disk.budget = 1024 * MIB
    store = disk.store()
    head = state(size=24)
    chance = random.Random(6)
    expected: list[tuple[str, int]] = []
    sizes = []
    for number in range(300):
        size = chance.randrange(6, 14) * MIB
        part = done(store.begin(size))
        with (disk.folder / part).open("r+b") as file:
            file.write(head)
            file.truncate(size)
        parts = ("tools", f"c{number % 200}", f"n{number}")
        done(store.commit(part, ONE, "conversation", 3000, 3000, size, prints(*parts), 0.1))
        if number % 7 == 0:  # somebody comes back to the one that has to go next
            oldest = store.snapshots[-1]
            store.touch(oldest)
            expected.sort(key=lambda each: each[0] == oldest.name)
        while sum(each for _, each in expected) + size > disk.budget:
            expected.pop(0)
        expected.insert(len(expected) - (number % 7 == 0), (part.removesuffix(".part"), size))
        on_disk = sum(path.stat().st_size for path in disk.folder.iterdir())
        sizes.append(on_disk)
        assert store.size <= disk.budget
        assert on_disk <= disk.budget + MIB
    assert [each.name for each in reversed(store.snapshots)] == [name for name, _ in expected]
    assert max(sizes[200:]) <= max(sizes[120:200]) + 14 * MIB
    assert min(sizes[120:]) > disk.budget - 2 * 14 * MIB
    assert disk.store().snapshots == store.snapshots


# --- what fits ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [
        attrs.evolve(ONE, n_ctx=4096),
        attrs.evolve(ONE, server="b2"),
        attrs.evolve(ONE, template="other"),
        attrs.evolve(ONE, cache_types=("q8_0", "q8_0")),
        attrs.evolve(ONE, flags="other"),
        attrs.evolve(ONE, model=attrs.evolve(ONE.model, path="/models/two.gguf")),
        attrs.evolve(ONE, model=attrs.evolve(ONE.model, size=1001)),
        attrs.evolve(ONE, model=attrs.evolve(ONE.model, mtime_ns=18)),
        attrs.evolve(ONE, model=attrs.evolve(ONE.model, header="bb")),
    ],
)
def test_a_snapshot_of_anything_else_is_never_offered(disk: Disk, other: Identity) -> None:
    """Another model, program, context, template, cache or option."""
    store = disk.store()
    kept = keep(store, "tools")
    assert store.fitting(ONE) == [kept]
    assert store.fitting(other) == []
    assert store.best_for(other, prints("tools", "more")) is None


def test_the_best_for_a_prompt(disk: Disk) -> None:
    """The one that spares it the most tokens; the last used of equals."""
    store = disk.store()
    keep(store, "tools", "system", "one", "two", tokens=4000)
    best = keep(store, "tools", "system", "three", tokens=3000)
    same = keep(store, "tools", "system", "four", tokens=3000)
    found = store.best_for(ONE, prints("tools", "system", "three", "five"))
    assert found == (best, 2936)
    found = store.best_for(ONE, prints("tools", "system", "six"))
    assert found == (same, 1800)
    assert store.best_for(ONE, prints("nothing")) is None
    assert store.best_for(ONE, b"") is None


def test_a_state_that_serves_only_what_goes_on(disk: Disk) -> None:
    """Of a sliding-window model a state whose end is not shared is worth nothing."""
    store = disk.store()
    kept = keep(store, "tools", "system", tokens=3000, exactly=True)
    keep(store, "tools", "system", "one", "two", tokens=5000, exactly=True)
    prompt = prints("tools", "system", "one", "three")
    assert store.best_for(ONE, prompt, exactly=True) == (kept, 2936)
    assert store.best_for(ONE, prints("tools"), exactly=True) is None


def test_what_was_used_goes_last(disk: Disk) -> None:
    """Also after a start."""
    store = disk.store()
    first, second = keep(store, "a"), keep(store, "b")
    store.touch(first)
    store.touch(snapshot("unknown"))
    for each in (store, disk.store()):
        assert [found.name for found in each.snapshots] == [first.name, second.name]
    done(store.drop(first))
    store.touch(first)
    assert [found.name for found in disk.store().snapshots] == [second.name]


# --- what is damaged ------------------------------------------------------------------------------


def test_a_file_that_is_cut_off_is_dropped(disk: Disk, logged: list[LogEvent]) -> None:
    """At twenty places, none of which reaches a server."""
    chance = random.Random(6)
    for _ in range(20):
        store = disk.store()
        kept = keep(store, "a")
        os.truncate(disk.folder / kept.file, chance.randrange(4096))
        assert not done(store.is_whole(kept))
        assert (disk.files(), store.snapshots) == ([], [])
    assert sum("is dropped" in (event["log_format"] or "") for event in logged) == 20


@given(st.integers(0, 4096 * 8 - 1))
@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_flipped_bit_is_found(disk: Disk, bit: int) -> None:
    """Wherever it is: a server would give wrong answers from it."""
    store = disk.store()
    kept = keep(store, "a")
    raw = bytearray((disk.folder / kept.file).read_bytes())
    raw[bit // 8] ^= 1 << bit % 8
    (disk.folder / kept.file).write_bytes(raw)
    assert not done(store.is_whole(kept))
    assert disk.files() == []


def test_a_file_that_is_gone_is_dropped(disk: Disk) -> None:
    """A restore that fails would empty the slot."""
    store = disk.store()
    kept = keep(store, "a")
    (disk.folder / kept.file).unlink()
    assert not done(store.is_whole(kept))
    assert (disk.files(), store.snapshots) == ([], [])


def test_leftovers_are_removed_at_the_next_look(disk: Disk) -> None:
    """Half-written files, states without a sidecar and the other way round; nobody else's."""
    store = disk.store()
    whole, lone, widow = (keep(store, name) for name in "abc")
    (disk.folder / f"{lone.name}.json").unlink()
    (disk.folder / widow.file).unlink()
    name = "snapshot-" + "0" * 32
    (disk.folder / f"{name}.part").write_bytes(b"half")
    (disk.folder / f"{name}.json.part").write_bytes(b"{")
    (disk.folder / "mine.bin").write_bytes(b"the user's own")
    assert disk.store().snapshots == [whole]
    assert disk.files() == ["mine.bin", f"{whole.name}.json", f"{whole.name}.kv"]


def test_a_look_leaves_what_is_being_written(disk: Disk) -> None:
    """A server may be at it for a while."""
    store = disk.store()
    part = done(store.begin(4096))
    (disk.folder / part).write_bytes(state())
    done(store.look())
    done(store.commit(part, ONE, "conversation", 3000, 3000, 4096, prints("a"), 0.1))
    assert len(store.snapshots) == 1


def test_a_budget_that_became_smaller(disk: Disk) -> None:
    """It holds from the next start on."""
    store = disk.store()
    kept = [keep(store, name) for name in "abc"]
    disk.budget = 9000
    assert disk.store().snapshots == [kept[2], kept[1]]
    assert len(disk.files()) == 4


def test_a_size_that_is_not_the_sidecars_is_removed(disk: Disk) -> None:
    """At the first look already."""
    kept = keep(disk.store(), "a")
    os.truncate(disk.folder / kept.file, 4000)
    assert disk.store().snapshots == []
    assert disk.files() == []


# --- sidecars -------------------------------------------------------------------------------------


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(
    st.one_of(
        st.binary(),
        JSON.map(orjson.dumps),
        st.dictionaries(st.sampled_from([*orjson.loads(to_sidecar(snapshot())), "form"]), JSON).map(
            lambda said: orjson.dumps({**orjson.loads(to_sidecar(snapshot())), **said})
        ),
    )
)
@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_garbage_raises_nothing_and_goes(disk: Disk, raw: bytes) -> None:
    """Whatever is in a sidecar: it is taken as it was written, or removed with its state."""
    name = "snapshot-" + "1" * 32
    (disk.folder / f"{name}.json").write_bytes(raw)
    (disk.folder / f"{name}.kv").write_bytes(state())
    store = disk.store()
    assert len(disk.files()) == 2 * len(store.snapshots)
    for each in store.snapshots:
        assert each.size == 4096
        done(store.drop(each))
    assert disk.files() == []


def test_a_sidecar_that_is_too_long_is_not_read(disk: Disk) -> None:
    """4 MiB are enough for a prompt of 260 000 parts."""
    kept = keep(disk.store(), "a")
    os.truncate(disk.folder / f"{kept.name}.json", 5 * MIB)
    assert disk.store().snapshots == []
    assert disk.files() == []


# --- threads --------------------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_a_save_that_is_cancelled_leaves_nothing(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread stops summing up, and removes the file."""
    store = Store(disk.folder, disk.budget, 0)
    begun, go_on, left = threading.Event(), threading.Event(), threading.Event()
    checksum, remove = state_files._checksum, state_files.remove

    def slow(path: Path, stopped: threading.Event) -> int:
        begun.set()
        go_on.wait(30)
        return checksum(path, stopped)

    def noted(folder: Path, names: Iterable[str]) -> list[str]:
        complaints = remove(folder, names)
        left.set()
        return complaints

    monkeypatch.setattr(state_files, "_checksum", slow)
    monkeypatch.setattr(state_files, "remove", noted)
    part = await store.begin(4096)
    (disk.folder / part).write_bytes(state())
    saving = Deferred.fromCoroutine(
        store.commit(part, ONE, "conversation", 3000, 3000, 4096, prints("a"), 0.1)
    )
    assert begun.wait(30)
    saving.cancel()
    with pytest.raises(CancelledError):
        await saving
    go_on.set()
    assert left.wait(30)
    assert (disk.files(), store.snapshots) == ([], [])
    monkeypatch.undo()
    part = await store.begin(4096)
    (disk.folder / part).write_bytes(state())
    kept = await store.commit(part, ONE, "conversation", 3000, 3000, 4096, prints("a"), 0.1)
    assert await store.is_whole(kept)
