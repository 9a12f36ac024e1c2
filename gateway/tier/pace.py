"""
How long a call would take on one model.

How fast it is and how much of a prompt it has seen before are learnt from the answers that went
through.  What was seen is remembered as hashes of a prompt's parts, in the order in which
templates render them, never as text; that the server still holds it is likely, not certain.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from itertools import takewhile
from typing import Any, Final

import attrs
import orjson

from gateway.wire.events import Usage

Json = Any

#: Prompts that are remembered: about 100 bytes for each of their messages.
_REMEMBERED: Final = 32

#: What an older measurement counts for, beside each new one.
_FADING: Final = 0.7


@attrs.define
class Rate:
    """Tokens a second, over the last measurements; long ones count for more."""

    _tokens: float = 0.0
    _seconds: float = 0.0

    def learn(self, tokens: int, seconds: float) -> None:
        """So many tokens took so long."""
        if tokens > 0 and seconds > 0:
            self._tokens = self._tokens * _FADING + tokens
            self._seconds = self._seconds * _FADING + seconds

    @property
    def known(self) -> float | None:
        """Tokens a second; None where nothing was measured yet."""
        return self._tokens / self._seconds if self._seconds else None


#: The parts of a prompt: a hash, good for this process, and a length in bytes each.
_Parts = tuple[tuple[int, int], ...]


@attrs.define(eq=False)
class Pace:
    """The pace of one model."""

    _seconds: Callable[[], float]
    _prefill: Rate = attrs.field(factory=Rate, init=False)
    _generation: Rate = attrs.field(factory=Rate, init=False)
    _seen: OrderedDict[_Parts, None] = attrs.field(factory=OrderedDict, init=False)

    def watch(self, body: Mapping[str, Json]) -> Watch:
        """Measure the answer to `body`, on which the server starts now."""
        return Watch(self._seconds, partial(self.learn, body), self._seconds())

    def learn(
        self, body: Mapping[str, Json], usage: Usage, prefill: float, generation: float
    ) -> None:
        """An answer to `body` took so many seconds."""
        self._prefill.learn(usage.input or 0, prefill)
        self._generation.learn(usage.output - 1, generation)  # the first came with the prefill
        parts = _parts(body)
        self._seen[parts] = None
        self._seen.move_to_end(parts)
        if len(self._seen) > _REMEMBERED:
            self._seen.popitem(last=False)

    def seen(self, body: Mapping[str, Json]) -> float:
        """The share of `body` (0 to 1) that a prompt which went through began with."""
        parts = _parts(body)
        whole = sum(size for _, size in parts)
        return max((_common(parts, other) for other in self._seen), default=0) / whole

    def estimate(self, tokens: int, seen: float, output: int) -> float | None:
        """
        Seconds that a call would take; None where nothing was measured yet.

        Args:
            tokens: of its prompt.
            seen: the share of the prompt that need not be evaluated.
            output: tokens that it is likely to generate.
        """
        prefill, generation = self._prefill.known, self._generation.known
        if prefill is None or generation is None:
            return None
        return tokens * (1 - seen) / prefill + output / generation

    def forget(self) -> None:
        """Another model answers now."""
        self._prefill, self._generation = Rate(), Rate()
        self.emptied()

    def emptied(self) -> None:
        """The server began anew and holds no prompt."""
        self._seen.clear()

    def prefill_rate(self) -> float | None:
        """Prompt tokens that it evaluates in a second; None where nothing was measured yet."""
        return self._prefill.known

    def status(self) -> Mapping[str, float | None]:
        """For ``/status``: tokens a second."""
        rates = {"prefill": self._prefill.known, "generation": self._generation.known}
        return {name: rate and round(rate, 1) for name, rate in rates.items()}


@attrs.define(eq=False)
class Watch:
    """One answer, measured."""

    _seconds: Callable[[], float]
    _learn: Callable[[Usage, float, float], None]
    _began: float
    _first_token: float | None = None

    def token(self) -> None:
        """There is a token; the first one ends the prefill."""
        if self._first_token is None:
            self._first_token = self._seconds()

    def ended(self, usage: Usage) -> None:
        """The answer is whole."""
        now = self._seconds()
        first = now if self._first_token is None else self._first_token
        self._learn(usage, first - self._began, now - first)


def _parts(body: Mapping[str, Json]) -> _Parts:
    """`body` in the order in which templates render it."""
    parts = [body.get("tools"), body.get("system"), *body["messages"]]
    written = [orjson.dumps(part) for part in parts]
    return tuple((hash(part), len(part)) for part in written)


def _common(one: _Parts, other: _Parts) -> int:
    """Bytes of the parts that both begin with."""
    same = takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return sum(part[1] for part, _ in same)
