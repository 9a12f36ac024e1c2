"""
What a llama-server says while it works, as records.

It writes on stderr what its API does not tell: how far a prompt is evaluated, how fast, and when a
slot is free again.  Its wording has changed over time; what is read here are builds from 2025 on,
plain or with ``--log-jsonl``.  Whatever else it says is not understood, and that is no error.
"""

from __future__ import annotations

import re
from typing import Final

import attrs

#: Bytes of a line; what is longer is cut off.
LONGEST: Final = 64 * 1024


@attrs.frozen
class Chosen:
    """
    A slot was chosen for a call.

    Attributes:
        similarity: the share of the new prompt that the slot holds already; None if by age.
    """

    slot: int
    similarity: float | None


@attrs.frozen
class Started:
    """A slot starts on a task."""

    slot: int
    task: int


@attrs.frozen
class Prefilling:
    """
    A part of a prompt was evaluated.

    Attributes:
        fraction: of the prompt that the slot holds now, from 0 to 1.
        evaluated: tokens that this task evaluated; None where the server does not say.
        held: tokens of the prompt that the slot holds, reused ones too; None likewise.
        per_second: tokens a second, over the whole task; None likewise.
    """

    slot: int
    task: int
    fraction: float
    evaluated: int | None = None
    held: int | None = None
    per_second: float | None = None


@attrs.frozen
class Prefilled:
    """
    What the evaluation of a prompt took; said when the whole answer is there.

    Attributes:
        slot, task: None where the server says them on the line before.
        evaluated: tokens, without reused ones.
    """

    slot: int | None
    task: int | None
    evaluated: int
    seconds: float


@attrs.frozen
class Cancelled:
    """A task's client is gone; its slot works on to the end of the batch."""

    task: int


@attrs.frozen
class Released:
    """
    A slot is free.

    Attributes:
        held: tokens that it holds.
    """

    slot: int
    task: int
    held: int


Said = Chosen | Started | Prefilling | Prefilled | Cancelled | Released


def _compiled(pattern: str) -> re.Pattern[str]:
    """`pattern`, where ``#`` is a count and ``~`` a number; neither is too long for int()."""
    count, number = r" {0,16}([0-9]{1,12})\b", r" {0,16}([0-9]{1,9}(?:\.[0-9]{1,9})?)"
    return re.compile(pattern.replace("#", count).replace("~", number))


_SLOT: Final = _compiled(r"\bslot +\S+ id# \| task (?:-1|#) \| ?")
_SIMILAR: Final = _compiled(r"selected slot by LCP similarity, (?:f_)?sim_best =~")
_OLDEST: Final = re.compile(r"selected slot by LRU")
_STARTED: Final = re.compile(r"processing task\b")
#: 2026: what this task evaluated.
_NEW: Final = _compiled(
    r"prompt processing, n_tokens =#, progress =~(?:, t = {0,16}[0-9.]+ s /~ tokens per second)?"
)
#: Winter 2025: what the slot holds.
_OLDER: Final = _compiled(
    r"prompt processing progress, n_tokens =#,(?: batch\.n_tokens =#,)? progress =~"
)
#: 2025: likewise, under another name.
_OLD: Final = _compiled(r"prompt processing progress, n_past =#, n_tokens =#, progress =~")
_PREFILLED: Final = _compiled(r" *prompt eval time =~ ms /# tokens")
_CANCELLED: Final = _compiled(r"\bcancel task, id_task =#")
_RELEASED: Final = _compiled(r"stop processing: n_(?:tokens|past) =#")


def read(line: str) -> Said | None:
    """What `line` says; None if it is nothing that matters here."""
    found = _SLOT.search(line)
    if found is None:
        return _of_no_slot(line)
    text, slot = line[found.end() :], int(found[1])
    return _before_a_task(text, slot) if found[2] is None else _of_task(text, slot, int(found[2]))


def _of_task(text: str, slot: int, task: int) -> Said | None:
    if said := _NEW.match(text):
        speed = None if said[3] is None else float(said[3])
        share = min(1.0, float(said[2]))
        return Prefilling(slot, task, share, evaluated=int(said[1]), per_second=speed)
    if said := _OLDER.match(text) or _OLD.match(text):
        return Prefilling(slot, task, min(1.0, float(said[3])), held=int(said[1]))
    if said := _RELEASED.match(text):
        return Released(slot, task, int(said[1]))
    if said := _PREFILLED.match(text):
        return Prefilled(slot, task, int(said[2]), float(said[1]) / 1000)
    return Started(slot, task) if _STARTED.match(text) else None


def _before_a_task(text: str, slot: int) -> Said | None:
    if said := _SIMILAR.match(text):
        return Chosen(slot, float(said[1]))
    return Chosen(slot, None) if _OLDEST.match(text) else None


def _of_no_slot(line: str) -> Said | None:
    if said := _PREFILLED.match(line):
        return Prefilled(None, None, int(said[2]), float(said[1]) / 1000)
    if said := _CANCELLED.search(line):
        return Cancelled(int(said[1]))
    return None


@attrs.define
class Lines:
    """Cuts a stream of bytes into lines; what is beyond `LONGEST` in one is dropped."""

    _rest: bytearray = attrs.field(factory=bytearray, init=False)

    def feed(self, data: bytes) -> list[str]:
        """The lines that `data` ends."""
        lines = []
        *ended, rest = data.split(b"\n")
        for part in ended:
            self._keep(part)
            lines.append(self._take())
        self._keep(rest)
        return lines

    def end(self) -> list[str]:
        """What was begun and not ended."""
        return [self._take()] if self._rest else []

    def _keep(self, part: bytes) -> None:
        self._rest += part[: LONGEST - len(self._rest)]

    def _take(self) -> str:
        line = self._rest.decode("utf-8", "replace").removesuffix("\r")
        self._rest.clear()
        return line
