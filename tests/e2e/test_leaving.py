"""
Clients that leave, at every stage, and one that does not read.

A real gateway in front of `bench.fast_llama`, which never ends an answer by itself and knows when
its client left.  How fast all this goes is measured by ``python -m bench.overhead``.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from bench.client import OFFERED, STAGES, Client, call, until
from bench.fast_llama import FastLlama
from bench.processes import resident
from tests.e2e.stack import TIER_KINDS, Running, start_gateway

#: Megabytes by which the gateway may grow while a client does not read; it is offered 400.
FLAT = 30


#: On a tier of each kind that such a server can be.
on_each_kind = pytest.mark.parametrize("kind", TIER_KINDS, indirect=True, scope="module")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FastLlama]:
    server = FastLlama.started(tmp_path_factory.mktemp("llama"))
    yield server
    server.stop()


@pytest.fixture(scope="module")
def gateway(
    kind: str, llama: FastLlama, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    main = {"url": llama.url, "kind": kind}
    running = start_gateway(tmp_path_factory.mktemp("gateway"), {"main": main})
    yield running
    running.stop()


def line(gateway: Running, **wanted: int) -> dict[str, Any] | None:
    """What the gateway says of the main tier, if all that is `wanted` is so."""
    tier: dict[str, Any] = gateway.ask("/status")[1]["tiers"]["main"]
    return tier if all(tier[key] == value for key, value in wanted.items()) else None


def assert_all_is_well(gateway: Running) -> None:
    """Every permit is back, and the next call is answered."""
    until(partial(line, gateway, running=0, waiting=0, settling=0))
    with Client.calling(gateway.port, call("hello")) as client:
        client.read_until(b"message_stop")
    until(partial(line, gateway, running=0, waiting=0, settling=0))


def outcome(gateway: Running) -> str:
    """What became of the call that was closed last."""
    last: list[dict[str, str]] = gateway.ask("/status")[1]["last"]
    return last[0]["outcome"]


@on_each_kind
@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("order", ["silence", "prefill", "drip"])
def test_a_client_that_leaves_stops_the_upstream(
    llama: FastLlama, gateway: Running, order: str, stream: bool
) -> None:
    """Whatever the upstream is doing for a client, it is hung up on when that client leaves."""
    number = llama.calls()
    with Client.calling(gateway.port, call(order, stream=stream)) as client:
        until(partial(llama.entry, number))
        if stream:
            client.read_until(dict(STAGES.values())[order])
        client.leave()
        llama.left(number)
    until(partial(line, gateway, running=0))
    assert outcome(gateway) == "cancelled"
    assert_all_is_well(gateway)


@on_each_kind
def test_a_client_that_leaves_the_line_is_never_heard_of_upstream(
    llama: FastLlama, gateway: Running
) -> None:
    """A call whose client leaves while it waits is not sent, and gives its place up at once."""
    number = llama.calls()
    with Client.calling(gateway.port, call("prefill")) as first:
        first.read_until(b"HTTP/1.1 200")
        with Client.calling(gateway.port, call("drip")) as second:
            until(partial(line, gateway, running=1, waiting=1))
            second.leave()
            until(partial(line, gateway, running=1, waiting=0))
        with Client.calling(gateway.port, call("hello")) as third:
            until(partial(line, gateway, running=1, waiting=1))
            first.leave()
            third.read_until(b"message_stop")
    assert [entry["order"] for entry in llama.journal(number)] == ["prefill", "hello"]
    assert_all_is_well(gateway)


def test_a_permit_waits_for_the_slot(llama: FastLlama, gateway: Running) -> None:
    """After a client has left, nobody gets its slot before the server has said that it is idle."""
    number = llama.calls()
    with Client.calling(gateway.port, call("stubborn")) as first:
        until(partial(llama.entry, number))
        first.leave()
        llama.left(number)
    with Client.calling(gateway.port, call("hello")) as second:
        second.read_until(b"message_stop")
    assert [entry["overlapped"] for entry in llama.journal(number)] == [False, False]
    assert_all_is_well(gateway)


@on_each_kind
def test_a_client_that_does_not_read_costs_nothing(llama: FastLlama, gateway: Running) -> None:
    """The upstream is paused while the client does not read, and the gateway does not grow."""
    number, before = llama.calls(), resident(gateway.process.pid)
    with Client.calling(gateway.port, call(f"flood {OFFERED}")) as client:
        client.read_until(b"content_block_delta")
        accepted = llama.stands_still(number)
        after = resident(gateway.process.pid)
        assert accepted < OFFERED / 4
        assert after - before < FLAT
        client.leave()
        llama.left(number)
    assert_all_is_well(gateway)


@on_each_kind
def test_a_client_that_reads_again_gets_the_rest(llama: FastLlama, gateway: Running) -> None:
    """A client that did not read for a while misses nothing."""
    number, offered = llama.calls(), 60_000_000
    with Client.calling(gateway.port, call(f"flood {offered}")) as client:
        client.read_until(b"content_block_delta")
        assert llama.stands_still(number) < offered
        client.read_until(b"message_stop")
    entry = llama.journal(number)[0]
    assert entry["ended"]
    assert client.read.count(b"event: content_block_delta") == entry["events"]
    assert_all_is_well(gateway)
