"""
When a slot's state is worth saving, when one is worth restoring, and what warms an empty slot.

A saved state of a plain model serves every prompt that begins as it does.  Of a model with sliding
windows or a running state it serves only a prompt that goes on exactly where the state ends, so of
those nothing is saved but the tools and the system prompt, and that at their very end: by the time
a conversation comes back, its client has written its last turn another way.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import takewhile
from typing import Any, Final

import attrs

Json = Any

#: Tokens that a restore must spare; fewer are evaluated before anybody notices.
_WORTH_IT: Final = 256

#: A restore must be this many times faster than the evaluation that it spares: what it spares is
#: an estimate, and a failed one costs what the slot held.
_MARGIN: Final = 2.0

#: What is assumed until it is measured: tokens a second (a small model on a fast machine), and
#: bytes a second that are read, summed up and restored (a slow disk).
_PREFILL: Final = 2000.0
_READING: Final = 100e6

#: Seconds for which no state is saved after one could not be (`is_refused`).
REFUSED_FOR: Final = 600.0


@attrs.frozen
class Offer:
    """
    What a restore would bring for a call.

    Attributes:
        kept: tokens of its prompt that the snapshot holds.
        held: tokens of its prompt that the server holds already, in a slot or in RAM.
        size: bytes of the snapshot.
        prefill: tokens a second that the server evaluates; None where nothing was measured.
        reading: bytes a second of earlier restores, their checksums included; None likewise.
    """

    kept: int
    held: int
    size: int
    prefill: float | None = None
    reading: float | None = None

    @property
    def spares(self) -> float:
        """Seconds of evaluation."""
        return max(0, self.kept - self.held) / (self.prefill or _PREFILL)

    @property
    def takes(self) -> float:
        """Seconds until the slot is restored."""
        return self.size / (self.reading or _READING)


def restores(offer: Offer) -> bool:
    """Whether to restore the snapshot before the call is sent."""
    return offer.kept - offer.held >= _WORTH_IT and offer.takes * _MARGIN < offer.spares


@attrs.frozen
class Slot:
    """
    What is known of a slot that might be saved.

    Attributes:
        exactly: whether a state of it serves only a prompt that goes on where the state ends.
        idle: seconds since the last call of the line ended; None while one runs or waits.
        new: tokens that it holds beyond the last snapshot of the same.
        refused: seconds since a state could not be saved; None if that never happened.
    """

    exactly: bool
    idle: float | None
    new: int
    refused: float | None = None


def saves(slot: Slot, after: float, least: int, *, last_chance: bool = False) -> bool:
    """
    Whether to save a slot with a conversation now.

    Args:
        slot: what is known of it.
        after: seconds that the line must have been empty for.
        least: tokens that must be new.
        last_chance: whether what the slot holds is about to be lost; then nobody waits for idle
            seconds, and a state that could not be saved is tried once more.
    """
    if slot.exactly or slot.idle is None or slot.new < least:
        return False
    return last_chance or (slot.idle >= after and not is_refused(slot.refused))


def is_refused(since: float | None) -> bool:
    """Whether a state could not be saved `since` seconds ago (None: never), too few to try anew."""
    return since is not None and since < REFUSED_FOR


# --- what warms an empty slot ---------------------------------------------------------------------

#: What of a prepared body comes before the first message, or changes how that is rendered.
_BEGINNING: Final = ("tools", "tool_choice", "system", "chat_template_kwargs", "thinking")


def beginning(body: Mapping[str, Json]) -> dict[str, Json]:
    """
    The tools and the system prompt of a prepared body, with a user's turn that says nothing.

    Sent to ``/v1/messages`` it evaluates them; only the few tokens of the empty turn are not
    shared with a prompt that comes.  llama-server samples a token even where none is asked for.
    """
    return {
        **{name: body[name] for name in _BEGINNING if name in body},
        "messages": [_says("")],
        "max_tokens": 0,
    }


def two_beginnings(body: Mapping[str, Json]) -> tuple[dict[str, Json], dict[str, Json]]:
    """
    As `beginning`, with two users' turns.

    Their renderings (``/apply-template``) part where the first word of a user would stand.  What
    they share (`rendered_beginning`) is where a state has to end that serves whatever comes.
    """
    first, second = beginning(body), beginning(body)
    first["messages"], second["messages"] = [_says("x")], [_says("§")]
    return first, second


def rendered_beginning(one: str, other: str) -> str:
    """The prompt that two renderings of `two_beginnings` share."""
    same = takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return "".join(letter for letter, _ in same)


def _says(text: str) -> Json:
    return {"role": "user", "content": [{"type": "text", "text": text}]}
