"""
What a model's chat template can be told, and what it is told.

llama-server's ``/v1/messages`` ignores ``thinking`` (but for a budget) and the ``effort`` of
``output_config``; both reach a template as ``chat_template_kwargs``, where the template reads such
a variable at all:

1. ``enable_thinking`` says whether the client asked for thinking.  An answer under a schema does
   not think: the schema leaves no room for it.
2. ``reasoning_effort`` is the client's effort; one above ``high`` only where the template has a
   word for it.
3. ``clear_thinking: false`` and ``preserve_thinking: true`` keep the thinking of earlier turns
   where it was: without it they are written anew after each word of the user.
4. What the client itself says as ``chat_template_kwargs`` goes before all of these.
5. A switch that rewrites earlier turns keeps the value that a conversation began with.  Whether it
   does is seen by rendering the same conversation with both values (`probe`, `rewrites`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

import attrs

from gateway.wire.request import MessagesRequest

Json = Any

#: Variables that we can set, and two values of each that must not change what was said before.
SWITCHES: Final[Mapping[str, tuple[Json, Json]]] = {
    "enable_thinking": (True, False),
    "reasoning_effort": ("low", "high"),
    "clear_thinking": (False, False),
    "preserve_thinking": (True, True),
}

_WORD: Final = re.compile(r"\w+")

#: From the least to the most (https://docs.anthropic.com/en/docs/build-with-claude/effort), and
#: those that every template with an effort takes.
_EFFORTS: Final = ("low", "medium", "high", "xhigh", "max")
_PLAIN: Final = frozenset({"low", "medium", "high"})

#: Words that no template has, as the last ones of the user in a `probe`.
_LAST_WORDS: Final = "claudegw asks for the last time"


@attrs.frozen
class Template:
    """
    What is known of a server's chat template.

    Attributes:
        knows: those of `SWITCHES` that it reads, in their order.
        efforts: the efforts above ``high`` that it has a word for.
        vision: whether images can be given to the model.
    """

    knows: tuple[str, ...] = ()
    efforts: tuple[str, ...] = ()
    vision: bool = False

    @classmethod
    def of(cls, text: str, *, vision: bool) -> Template:
        """The template with this text, as ``GET /props`` shows it; it was not rendered yet."""
        words = frozenset(_WORD.findall(text))
        return cls(
            knows=tuple(name for name in SWITCHES if name in words),
            efforts=tuple(name for name in _EFFORTS if name not in _PLAIN and name in words),
            vision=vision,
        )

    @property
    def in_question(self) -> tuple[str, ...]:
        """Switches of which only rendering tells whether they rewrite earlier turns."""
        return tuple(name for name in self.knows if len(set(SWITCHES[name])) > 1)


def switches(request: MessagesRequest, template: Template) -> dict[str, Json]:
    """What `template` is told for `request`: rules 1 to 4."""
    wanted = {
        "enable_thinking": _thinks(request),
        "reasoning_effort": _effort(request, template),
        "clear_thinking": False,
        "preserve_thinking": True,
    }
    told = {name: wanted[name] for name in template.knows if wanted[name] is not None}
    return told | (request.body.get("chat_template_kwargs") or {})


def _thinks(request: MessagesRequest) -> bool:
    if request.is_bound:
        return False
    thinking = request.body.get("thinking") or {}
    return thinking.get("type") in ("enabled", "adaptive")


def _effort(request: MessagesRequest, template: Template) -> str | None:
    effort = (request.body.get("output_config") or {}).get("effort")
    if effort not in _EFFORTS:
        return None
    no_more = _EFFORTS[: _EFFORTS.index(effort) + 1]
    return [name for name in no_more if name in _PLAIN or name in template.efforts][-1]


def probe(switch: str, which: int) -> dict[str, Json]:
    """A chat-shaped conversation of two turns under one of the two values of `switch`."""
    return {
        "messages": [
            {"role": "system", "content": "You are asked."},
            {"role": "user", "content": "One?"},
            {"role": "assistant", "content": "One.", "reasoning_content": "It is one."},
            {"role": "user", "content": _LAST_WORDS},
        ],
        "chat_template_kwargs": {switch: SWITCHES[switch][which]},
    }


def rewrites(one: str, other: str) -> bool:
    """Whether two renderings of a `probe` part before the last words of the user."""
    before, words, _ = one.partition(_LAST_WORDS)
    return not words or not other.startswith(before + words)
