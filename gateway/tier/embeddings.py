"""Embeddings, which take a slot as every other call does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from twisted.internet.defer import CancelledError

from gateway.tier.answer import UnderWay
from gateway.tier.line import Ticket
from gateway.tier.tier import Tier
from gateway.wire.errors import ApiError

Json = Any


async def ask(
    tier: Tier,
    body: Mapping[str, Json],
    view: Mapping[str, Json],
    *,
    ticket: Ticket,
    started: Callable[[], None],
) -> dict[str, Json]:
    """
    What the server of `tier` says to a call for embeddings.

    Args:
        tier: who is asked.
        body: what the server gets.
        view: the same as a prepared body.
        ticket: what the line is told of it.
        started: called when the call's turn has come.

    Raises:
        ApiError: refused: most servers of chat models have no embeddings.
        Lost: the server went away.
    """
    assert tier.llama is not None
    tier.cache.give_way()
    permit = await tier.line.join(ticket)
    under_way = UnderWay(tier, ticket, permit)
    try:
        try:
            started()
            await under_way.begin(view)
            said = await tier.llama.embeddings(body)
        except ApiError:
            under_way.finished()
            raise
        under_way.finished()
    except CancelledError:
        under_way.cut()
        raise
    finally:
        under_way.abandon()
    return said
