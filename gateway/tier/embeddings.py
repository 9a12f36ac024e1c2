"""Embeddings, which take a slot as every other call does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from gateway.tier.line import Ticket
from gateway.tier.tier import Tier
from gateway.tier.turn import Turn

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
    async with Turn(tier, ticket) as turn:
        said = await turn.ask(view, started, partial(tier.llama.embeddings, body))
        turn.finished()
    return said
