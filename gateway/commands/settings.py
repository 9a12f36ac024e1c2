"""What a client needs to work well on this gateway (docs/protocol.md, "The client's settings")."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from gateway.commands.running import Unusable, ask, no_gateway, url_of
from gateway.config import Config
from gateway.policy.routes import MAIN, MODEL_PREFIX, SMALL

Json = Any

#: Tokens of an answer that Claude Code is told to ask for, where the window has room for it.
_ANSWER: Final = 8192

#: Claude Code compacts a conversation when so many tokens and an answer are all that is left.
_RESERVE: Final = 13_000

#: Tokens that Claude Code says by itself before its user says anything.
OWN_PROMPT: Final = 24_000

#: Seconds between two looks of the client's status line, whatever it does meanwhile.
_REFRESH: Final = 2


def settings(
    config: Config, windows: Mapping[str, int], line: str | None = None
) -> dict[str, Json]:
    """
    A Claude Code settings file for this gateway.

    Args:
        config: the gateway's.
        windows: tokens that a slot of each tier holds.
        line: the command of the status line; None leaves the user's own.
    """
    main_model, small_model = models(config)
    window = windows[MAIN]
    env = {
        "ANTHROPIC_BASE_URL": url_of(config.gateway),
        "ANTHROPIC_AUTH_TOKEN": key(config),
        "ANTHROPIC_MODEL": main_model,
        "ANTHROPIC_DEFAULT_OPUS_MODEL": main_model,
        "ANTHROPIC_DEFAULT_SONNET_MODEL": main_model,
        "ANTHROPIC_DEFAULT_FABLE_MODEL": main_model,
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
    shown = {"type": "command", "command": line, "refreshInterval": _REFRESH}
    return {
        "env": env,
        "permissions": {
            "defaultMode": "default",
            "disableAutoMode": "disable",
            # A search that only Anthropic's own servers can run.
            "deny": ["WebSearch"],
        },
        "skipWebFetchPreflight": True,
        "autoCompactEnabled": True,
        **({} if line is None else {"statusLine": shown}),
    }


def opencode(config: Config, windows: Mapping[str, int]) -> dict[str, Json]:
    """An ``opencode.json`` for this gateway; `windows` as for `settings`."""
    main_model, small_model = models(config)
    provider = "claudegw"
    return {
        "$schema": "https://opencode.ai/config.json",
        "provider": {
            provider: {
                "npm": "@ai-sdk/openai-compatible",
                "name": "claudegw",
                "options": {
                    "baseURL": url_of(config.gateway) + "/v1",
                    "apiKey": key(config),
                    # A cold prompt takes minutes; no timer of the client's may end it.
                    "timeout": False,
                    "headerTimeout": False,
                    "chunkTimeout": False,
                },
                "models": {
                    MODEL_PREFIX + name: {
                        "name": f"claudegw {name}",
                        "limit": {"context": window, "output": longest_answer(window)},
                    }
                    for name, window in windows.items()
                },
            }
        },
        "model": f"{provider}/{main_model}",
        # A model that is down now has no entry.
        "small_model": f"{provider}/{small_model if SMALL in windows else main_model}",
    }


def sdk(config: Config) -> dict[str, str]:
    """The environment in which the SDKs of both APIs find this gateway, and its models' names."""
    url, (main_model, small_model) = url_of(config.gateway), models(config)
    return {
        "ANTHROPIC_BASE_URL": url,
        "ANTHROPIC_AUTH_TOKEN": key(config),
        "ANTHROPIC_API_KEY": key(config),
        "OPENAI_BASE_URL": url + "/v1",
        "OPENAI_API_KEY": key(config),
        "CLAUDEGW_MODEL": main_model,
        "CLAUDEGW_SMALL_MODEL": small_model,
    }


def models(config: Config) -> tuple[str, str]:
    """The clients' names for the main model and for the small one."""
    return MODEL_PREFIX + MAIN, MODEL_PREFIX + (SMALL if SMALL in config.tier else MAIN)


def key(config: Config) -> str:
    """What clients show; without a token anything is let in, but they want something."""
    return config.gateway.token or "none"


def status_line(config_file: Path) -> str:
    """The command of the status line, for a shell, for the gateway of this configuration."""
    program = Path(sys.executable).with_name("claudegw")
    return shlex.join([str(program), "statusline", "--config", str(config_file.absolute())])


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


class Loading(Unusable):
    """The main model is not up."""


def windows(config: Config) -> dict[str, int]:
    """
    The window of each tier that is up, as the running gateway knows it.

    Raises:
        Loading: the main model is none of them.
        Unusable: there is no gateway.
    """
    try:
        known = {
            model["id"].removeprefix(MODEL_PREFIX): model["max_input_tokens"]
            for model in ask(config, "/v1/models")["data"]
        }
    except (KeyError, TypeError, AttributeError):
        raise no_gateway(config, "it says something else") from None
    if known.get(MAIN) is None:
        raise Loading("The main model is still loading, or down; try again when it is up.")
    return {name: window for name, window in known.items() if window is not None}
