"""Servers whose prompts, slots and caches are their own business."""

from __future__ import annotations

from typing import Any, Final

from gateway.config import Tier
from gateway.connection import agent_for
from gateway.remote.anthropic import Anthropic
from gateway.remote.openai import OpenAI
from gateway.upstream import Remote

_KINDS: Final[dict[str, type[Anthropic | OpenAI]]] = {
    "anthropic": Anthropic,
    "openai": OpenAI,
}


def remote(reactor: Any, name: str, wanted: Tier) -> Remote:
    """The server of the tier `name`, of another kind than a llama-server."""
    ca_file = None if wanted.ca_file is None else wanted.ca_file.expanduser()
    agent = agent_for(reactor, wanted.url, ca_file)
    return _KINDS[wanted.kind].over(reactor, agent, name, wanted)
