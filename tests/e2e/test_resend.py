"""
A call that is cut off while its prompt is evaluated, sent again by the real Claude Code.

What is between client and gateway hangs up on the first call.  The server keeps what it evaluated
in its slot and nowhere else, another call waits already, and the line is first come, first served:
only the place that is kept for the call lets it go on where it was.  On a busy machine the client
may come back when the place is rightly lost; then all of it is done again.  The figures are logged:
``pytest --log-cli-level=INFO`` shows them.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any, Final

import pytest

from gateway.tier.line import KEPT
from tests.e2e.clients import VERSIONS, Client, eventually
from tests.e2e.recorder import Heard, Recorder
from tests.e2e.stack import SMOLLM, Running, start_gateway, start_server

Json = Any

figures = logging.getLogger(__name__)

pytestmark = [pytest.mark.client, pytest.mark.server]

#: Tokens of a batch, between two of which a server can stop.
BATCH: Final = 256

#: Seconds for a whole prompt, evaluated by a small machine that has other work too.
PREFILL: Final = 900

#: Some two thousand tokens: enough to be cut off in the middle of them.
SYSTEM: Final = " ".join(f"Gate {number} of the old city is open." for number in range(165))
OPTIONS: Final = ("--system-prompt", SYSTEM, "--tools", "")

#: Put into every call by the client: a tiny model would fill its whole window.
ONE_SENTENCE: Final = '{"temperature": 0, "stop_sequences": [".", "!", "?", "\\n"]}'

#: Seconds within which the client must be back: the gateway sees it go and come a little later.
IN_TIME: Final = KEPT - 0.5

#: How often all of it may be done.
TRIES: Final = 3

#: Somebody else's call.
RIVAL: Final = {
    "model": "any",
    "max_tokens": 2,
    "messages": [{"role": "user", "content": "How is bread baked in the hills?"}],
}

#: A stream that makes the client ask again without one.
BROKEN: Final = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
    b'event: error\ndata: {"type":"error","error":{"type":"api_error","message":"It broke."}}\n\n'
)


# --- what is seen ---------------------------------------------------------------------------------


@contextmanager
def one_slot(folder: Path) -> Iterator[Running]:
    """SmolLM2 with one slot, which is empty, and no memory beside it."""
    flags = (*SMOLLM, "--ctx-size", "8192", "--parallel", "1", "--batch-size", str(BATCH))
    slow_and_forgetful = ("--threads", "1", "--cache-ram", "0")
    running = start_server(folder, "server", *flags, *slow_and_forgetful)
    try:
        yield running
    finally:
        running.stop()


@contextmanager
def in_order(server: Running, folder: Path) -> Iterator[Running]:
    """A gateway: first come, first served."""
    folder.mkdir()
    running = start_gateway(folder, {"main": {"url": server.url, "slots": 1, "ageing": 0}})
    try:
        yield running
    finally:
        running.stop()


def released_by(server: Running) -> list[int]:
    """The tokens that its slot held, each time that it was released."""
    told = server.log.read_text("utf-8", "replace")
    return [int(held) for held in re.findall(r"stop processing: n_tokens = *([0-9]+)", told)]


def is_on_its_way(server: Running) -> bool:
    """
    Whether more of a prompt is evaluated than what may be evaluated again.

    To be asked only before the call is cut off: it keeps the server from noticing.
    """
    (slot,) = server.ask("/slots")[1]
    # A slot that has had no work yet does not tell any.
    return bool(slot.get("n_prompt_tokens_processed", 0) >= 2 * BATCH)


def line(gateway: Running) -> Json:
    return gateway.ask("/status")[1]["tiers"]["main"]


def resumed(version: str, place: Path, instead: bytes) -> list[Json]:
    """
    A prompt of the client that was cut off while somebody else waits, and went on where it was.

    Args:
        version: of the client.
        place: an empty folder.
        instead: what the client got from the call that was cut off.

    Returns:
        The calls to a model as the client sent them.
    """
    for number in range(TRIES):
        folder = place / str(number)
        folder.mkdir()
        with one_slot(folder) as server, in_order(server, folder / "gateway") as gateway:
            asked, away = interrupted(version, gateway, server, folder, instead)
            if away <= IN_TIME:
                assert_resumed(gateway, server)
                return asked
    pytest.fail(f"the client was away for more than {IN_TIME} s, {TRIES} times")


def interrupted(
    version: str, gateway: Running, server: Running, place: Path, instead: bytes
) -> tuple[list[Json], float]:
    """
    A prompt of the client whose first call is cut off while somebody else waits.

    Returns:
        The calls to a model as the client sent them, and the seconds from the cut to the second.
    """
    hang_up = Event()
    cut_off: list[float] = []

    def cut(heard: Heard) -> bytes | None:
        if heard is not next(iter(recorder.messages), None):
            return None
        hang_up.wait(PREFILL)
        cut_off.append(recorder.now)
        return instead

    recorder = Recorder(gateway.port, instead=cut)
    with recorder.listening(), ThreadPoolExecutor(2) as pool:
        env = {"ANTHROPIC_BASE_URL": recorder.url, "CLAUDE_CODE_EXTRA_BODY": ONE_SENTENCE}
        client = Client.of(version, gateway, place, env)
        saying = pool.submit(client.say, "Which gate is open?", *OPTIONS, seconds=PREFILL)
        try:
            assert eventually(lambda: line(gateway)["running"] == 1, 120)
            rival = pool.submit(gateway.ask, "/v1/messages", RIVAL)
            assert eventually(lambda: line(gateway)["waiting"] == 1, 60)
            assert eventually(lambda: is_on_its_way(server), PREFILL)
        finally:
            hang_up.set()
        said = saying.result()
        assert rival.result()[0] == 200
    figures.info("%s: %.1f s, it said %r", version, said.seconds, said.answer)
    assert said.status == 0, said
    assert said.answer.strip()
    away = recorder.messages[1].at - cut_off[0]
    figures.info("asked again %.1f s after it was cut off", away)
    return [heard.body for heard in recorder.messages], away


def assert_resumed(gateway: Running, server: Running) -> None:
    """One call was cut off, the next went on where that was, and then came the rival's turn."""
    first, second, rival = reversed(gateway.ask("/status")[1]["last"])
    shown = ("kind", "outcome", "waited", "took", "input", "cached", "output")
    for call in (first, second, rival):
        figures.info(" ".join(f"{key}={call[key]}" for key in shown))
    assert [call["outcome"] for call in (first, second, rival)] == ["cancelled"] + ["answered"] * 2
    prompt = second["input"] + second["cached"]
    assert rival["input"] + rival["cached"] < BATCH < prompt

    released = released_by(server)
    assert len(released) == 3
    evaluated = released[0] + second["input"]  # the slot was empty at first
    figures.info("%d + %d tokens for a prompt of %d", released[0], second["input"], prompt)
    assert 2 * BATCH <= released[0] < prompt
    assert evaluated <= prompt + BATCH


# --- what is shown --------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
def test_a_cut_call_goes_on_where_it_was(version: str, tmp_path: Path) -> None:
    """The connection is cut; the same stream is asked for again, and all but a batch is kept."""
    first, second = resumed(version, tmp_path, b"")
    assert first["stream"]
    assert second == first


@pytest.mark.parametrize("version", VERSIONS)
def test_a_stream_that_broke_goes_on_as_a_whole_answer(version: str, tmp_path: Path) -> None:
    """The stream fails; the client asks again without one, and all but a batch is kept."""
    first, second = resumed(version, tmp_path, BROKEN)
    assert first["stream"]
    assert not second.get("stream")
    assert second["messages"] == first["messages"]
