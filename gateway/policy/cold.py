"""
Why a call was cold.

A call is slow where llama-server has to evaluate again what it had evaluated before.  Either the
past was written anew, and then it is said where (`gateway.policy.divergence`); or the past is the
same, and the server no longer held it.  To tell, the prompts that went through last are remembered,
without their words (`gateway.policy.prompt`).
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Final

import attrs

from gateway.policy.divergence import Divergence, diverge
from gateway.policy.prompt import Prompt, should_have

Json = Any

#: Prompts that are remembered, and bytes that they may take up together.
REMEMBERED: Final = 32
_ROOM: Final = 4 * 1024 * 1024

#: Tokens; a call that evaluates fewer again is not worth a word.
THRESHOLD: Final = 1000


def avoidable(expected: int, cached: int) -> int:
    """
    How many tokens were evaluated though they should not have been; 0 up to `THRESHOLD`.

    Args:
        expected: those that should have been cached.
        cached: those that were.
    """
    lost = expected - cached
    return lost if lost > THRESHOLD else 0


@attrs.frozen
class Cold:
    """
    Why a call had to evaluate what it did.

    Attributes:
        cached: tokens that the server still had.
        should_have: tokens that it should have had, going by what went through before.
        avoidable: tokens that it lost; 0 where that is not worth a word.
        rewritten: tokens of this conversation's past that are not what they were; 0 likewise.
        divergence: where the prompt parts from the last one of its conversation; where it has
            none, from the nearest of any other; None where nothing is remembered.
    """

    cached: int
    should_have: int
    avoidable: int
    rewritten: int
    divergence: Divergence | None

    @property
    def sentence(self) -> str:
        """One line for the log; "" where there is nothing to say."""
        said = []
        if self.rewritten and self.divergence is not None:
            said.append(
                f"about {self.rewritten} tokens of its past were written anew:"
                f" {self.divergence.sentence}"
            )
        if self.avoidable:
            said.append(
                f"about {self.avoidable} tokens that had been evaluated before were no longer held"
            )
        return "; ".join(said)

    def as_json(self) -> dict[str, Json]:
        """For ``/status``; tokens."""
        return {
            "cached": self.cached,
            "should_have": self.should_have,
            "avoidable": self.avoidable,
            "rewritten": self.rewritten,
            "sentence": self.sentence,
            "divergence": None if self.divergence is None else self.divergence.as_json(),
        }


@attrs.define(eq=False)
class Memory:
    """The prompts that went through last, without their words; at most 4 MiB of them."""

    _prompts: OrderedDict[str, Prompt] = attrs.field(factory=OrderedDict, init=False)
    _weight: int = attrs.field(default=0, init=False)

    def __len__(self) -> int:
        return len(self._prompts)

    @property
    def weight(self) -> int:
        """Bytes, about."""
        return self._weight

    @property
    def fingerprints(self) -> list[bytes]:
        """Of all of them."""
        return [prompt.fingerprint for prompt in self._prompts.values()]

    def like(self, conversation: str) -> Prompt | None:
        """The last prompt of `conversation`, or else the last of any."""
        last = next(reversed(self._prompts.values()), None)
        return self._prompts.get(conversation, last)

    def remember(self, conversation: str, prompt: Prompt) -> None:
        """The last prompt of `conversation` is this one."""
        self._drop(conversation)
        self._prompts[conversation] = prompt
        self._weight += prompt.weight
        while len(self._prompts) > REMEMBERED or self._weight > _ROOM:
            self._drop(next(iter(self._prompts)))

    def forget(self) -> None:
        """The server began anew and holds nothing."""
        self._prompts.clear()
        self._weight = 0

    def judge(self, conversation: str, prompt: Prompt, tokens: int, cached: int) -> Cold:
        """
        Why a call was as cold as it was.  Ask before it is remembered.

        Args:
            conversation: whose prompt it is.
            prompt: its prompt.
            tokens: of its prompt.
            cached: of these, tokens that the server still had.
        """
        nearest = max(
            (diverge(other, prompt) for other in self._prompts.values()),
            key=lambda found: found.shared,
            default=None,
        )
        last = self._prompts.get(conversation)
        same = 0 if nearest is None else nearest.shared
        expected = should_have(same, prompt.size, tokens)
        rewritten = 0
        if last is not None:
            nearest = diverge(last, prompt)
            gone = max(0, last.size - max(same, nearest.shared))
            evaluated = tokens - max(expected, cached)
            again = min(should_have(gone, prompt.size, tokens), evaluated)
            rewritten = avoidable(again, 0)
        return Cold(cached, expected, avoidable(expected, cached), rewritten, nearest)

    def _drop(self, conversation: str) -> None:
        dropped = self._prompts.pop(conversation, None)
        if dropped is not None:
            self._weight -= dropped.weight
