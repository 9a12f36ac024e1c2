"""
What a new configuration changes, and how much of it can be had while the house stands.

Where clients and servers find each other cannot be changed under calls that are on their way: such
keys keep their old value until the gateway is started anew, and the log says so.  Everything else
takes effect at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import attrs

from gateway.config import Config, Tier

_FIXED_GATEWAY: Final = ("listen", "state_dir", "token")
_FIXED_TIER: Final = (
    *("url", "kind", "slots", "api_key"),
    *("api_key_env", "auth", "ca_file", "model", "window", "strict"),
)


@attrs.frozen
class Changes:
    """
    The way from one configuration to another.

    Attributes:
        config: what is in force from now on.
        added: names of tiers that were not there before.
        removed: names of tiers that are there no more.
        postponed: keys whose new value needs a start of the gateway.
    """

    config: Config
    added: tuple[str, ...]
    removed: tuple[str, ...]
    postponed: tuple[str, ...]


def between(old: Config, new: Config) -> Changes:
    """What changes from `old`, which is in force, to `new`."""
    gateway, postponed = _kept("gateway", old.gateway, new.gateway, _FIXED_GATEWAY)
    tiers: dict[str, Tier] = {}
    for name, wanted in new.tier.items():
        before = old.tier.get(name)
        if before is None:
            tiers[name] = wanted
            continue
        comes_or_goes = (before.server is None) != (wanted.server is None)
        # A command goes with its address: what listens elsewhere would not be found.
        fixed: tuple[str, ...] = _FIXED_TIER
        if comes_or_goes or _changed(before, wanted, fixed):
            fixed = (*fixed, "server")
        tiers[name], late = _kept(f"tier.{name}", before, wanted, fixed)
        postponed += late
    return Changes(
        attrs.evolve(new, gateway=gateway, tier=tiers),
        tuple(name for name in new.tier if name not in old.tier),
        tuple(name for name in old.tier if name not in new.tier),
        tuple(postponed),
    )


def _kept(where: str, old: Any, new: Any, fixed: Sequence[str]) -> tuple[Any, list[str]]:
    """`new` with those of `fixed` as they were, and the keys that would have changed."""
    changed = _changed(old, new, fixed)
    kept = {name: getattr(old, name) for name in changed}
    return attrs.evolve(new, **kept), [f"{where}.{name}" for name in changed]


def _changed(old: Any, new: Any, keys: Sequence[str]) -> list[str]:
    """Those of `keys` whose value is another one."""
    return [key for key in keys if getattr(old, key) != getattr(new, key)]
