"""
What the doctor finds: pure functions over `Facts`, in one table.

Each says what it saw, and of what is wrong, how to mend it.  A remedy names a change of the
configuration as ``Set `key = value` in [table]`` and a command in back quotes as it is typed.
``problem`` means that Claude Code would not work; a ``warning`` costs time, room or safety.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Final

from gateway.commands.doctor import client, house, servers
from gateway.commands.doctor.facts import Facts, TierFacts
from gateway.commands.doctor.finding import Finding, Say

_CHECKS: Final[tuple[tuple[str, Callable[[Facts, Say], Iterator[Finding]]], ...]] = (
    ("python", house.python),
    ("packages", house.packages),
    ("config", house.config),
    ("token", house.token),
    ("state", house.state),
    ("disk", house.disk),
    ("gateway", house.gateway),
    ("clocks", house.clocks),
    ("grace", house.grace),
    ("client", client.client),
    ("settings", client.settings),
)

_TIER_CHECKS: Final[
    tuple[tuple[str, Callable[[Facts, TierFacts, Say], Iterator[Finding]]], ...]
] = (
    ("server", servers.server),
    ("program", servers.program),
    ("model", servers.model),
    ("window", servers.window),
    ("slots", servers.slots),
    ("template", servers.template),
    ("kv", servers.kv),
    ("flags", servers.flags),
    ("round-trip", servers.rounds),
)


#: What can be asked of a server of another kind.
_ELSEWHERE: Final = _TIER_CHECKS[-1:]


def findings(facts: Facts) -> list[Finding]:
    """All that is found, in the order of the table."""
    found = [each for name, check in _CHECKS for each in check(facts, partial(Finding, name))]
    for tier in facts.tiers:
        for name, look in _TIER_CHECKS if tier.is_ours else _ELSEWHERE:
            found += look(facts, tier, partial(Finding, f"{tier.name}.{name}"))
    return found


def would_work(found: list[Finding]) -> bool:
    """Whether Claude Code would work."""
    return all(each.status != "problem" for each in found)
