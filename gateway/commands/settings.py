"""What a client needs to work well on this gateway (docs/protocol.md, "The client's settings")."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from gateway.commands.running import Unusable, ask, no_gateway, url_of
from gateway.config import Config
from gateway.policy.routes import MAIN, MODEL_PREFIX, SMALL

Json = Any

#: Tokens of an answer that Claude Code is told to ask for, where the window has room for it.
_ANSWER: Final = 8192

#: Claude Code compacts a conversation when so many tokens and an answer are all that is left.
_RESERVE: Final = 13_000


def settings(config: Config, windows: Mapping[str, int]) -> dict[str, Json]:
    """
    A Claude Code settings file for this gateway.

    Args:
        config: the gateway's.
        windows: tokens that a slot of each tier holds.
    """
    main_model = MODEL_PREFIX + MAIN
    small_model = MODEL_PREFIX + (SMALL if SMALL in config.tier else MAIN)
    window = windows[MAIN]
    env = {
        "ANTHROPIC_BASE_URL": url_of(config.gateway),
        "ANTHROPIC_AUTH_TOKEN": config.gateway.token or "none",
        "ANTHROPIC_MODEL": main_model,
        "ANTHROPIC_DEFAULT_OPUS_MODEL": main_model,
        "ANTHROPIC_DEFAULT_SONNET_MODEL": main_model,
        "ANTHROPIC_DEFAULT_HAIKU_MODEL": small_model,
        # Without the true window it would take 1 000 000 tokens for granted and never compact.
        "CLAUDE_CODE_MAX_CONTEXT_TOKENS": str(window),
        "CLAUDE_CODE_MAX_OUTPUT_TOKENS": str(longest_answer(window)),
        # Each of these would change the prompt's beginning between two calls.
        "CLAUDE_CODE_ATTRIBUTION_HEADER": "0",
        "CLAUDE_CODE_TOTAL_TOKENS_REMINDER": "off",
        "ENABLE_TOOL_SEARCH": "false",
        # A cold prompt takes minutes; no timer of the client's may end it.
        "API_TIMEOUT_MS": "3600000",
        "API_FORCE_IDLE_TIMEOUT": "0",
        "CLAUDE_STREAM_IDLE_TIMEOUT_MS": "1800000",
        # Safety verdicts cost a prompt of 35 000 tokens each; it asks the user instead.
        "CLAUDE_CODE_AUTO_MODE_SERVER": "0",
    }
    return {
        "env": env,
        "permissions": {
            "defaultMode": "default",
            "disableAutoMode": "disable",
            # A search that only Anthropic's own servers can run.
            "deny": ["WebSearch"],
        },
        "skipWebFetchPreflight": True,
    }


def longest_answer(window: int) -> int:
    """
    The output limit for a window of so many tokens.

    Claude Code compacts at ``window - min(limit, 20 000) - 13 000`` tokens: a limit that leaves
    nothing there ends every session at its second turn.
    """
    return max(1024, min(_ANSWER, (window - _RESERVE) // 4))


def compacts_at(window: int) -> int:
    """Tokens at which Claude Code compacts a conversation in a window of so many."""
    return window - longest_answer(window) - _RESERVE


def windows(config: Config) -> dict[str, int]:
    """The window of each tier, as the running gateway knows it."""
    try:
        known = {
            model["id"].removeprefix(MODEL_PREFIX): model["max_input_tokens"]
            for model in ask(config, "/v1/models")["data"]
        }
    except (KeyError, TypeError, AttributeError):
        raise no_gateway(config, "it says something else") from None
    if known.get(MAIN) is None:
        raise Unusable("The main model is still loading, or down; try again when it is up.")
    return {name: window for name, window in known.items() if window is not None}
