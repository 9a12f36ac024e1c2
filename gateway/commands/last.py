"""The calls that are over: what the running gateway remembers, or else what its file says."""

from __future__ import annotations

import sqlite3
from typing import Any

from gateway import history
from gateway.commands.running import Unusable, ask
from gateway.config import Config

Json = Any


def last_calls(config: Config, count: int) -> list[Json]:
    """
    The last `count` calls, newest first.

    The running gateway is asked; where it is down, or remembers fewer, its file is read.

    Raises:
        Unusable: neither has any.
    """
    refusal: Unusable | None = None
    known: list[Json] = []
    try:
        known = _list(ask(config, "/status"))
    except Unusable as error:
        refusal = error
    if len(known) < count:
        try:
            known = max(
                history.last(config.gateway.state_dir / history.FILE, count), known, key=len
            )
        except (OSError, sqlite3.Error) as error:
            if refusal is not None:
                raise Unusable(f"{refusal} Nor can its ledger be read ({error}).") from None
    return known[:count]


def _list(status: Json) -> list[Json]:
    found = status.get("last") if isinstance(status, dict) else None
    return found if isinstance(found, list) else []
