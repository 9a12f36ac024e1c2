"""
What a llama-server says while it works, as records.

It writes on stderr what its API does not tell: how far a prompt is evaluated, and when a slot is
free again.  Its wording has changed over time; what is read here are builds from 2025 on,
plain or with ``--log-jsonl``.  Whatever else it says is not understood, and that is no error.
"""

from __future__ import annotations

import re
from typing import Final

import attrs

#: Bytes of a line; what is longer is cut off.
LONGEST: Final = 64 * 1024


@attrs.frozen
class Started:
    """A slot starts on a task."""

    task: int


@attrs.frozen
class Prefilling:
    """
    A part of a prompt was evaluated.

    Attributes:
        fraction: of the prompt that the slot holds now, from 0 to 1.
        evaluated: tokens that this task evaluated; None where the server does not say.
        held: tokens of the prompt that the slot holds, reused ones too; None likewise.
    """

    task: int
    fraction: float
    evaluated: int | None = None
    held: int | None = None


@attrs.frozen
class Released:
    """The slot of a task is free."""

    task: int


@attrs.frozen
class Works:
    """Anything else that shows that it works: no more than a sign of life."""


Said = Started | Prefilling | Released | Works


def _compiled(pattern: str) -> re.Pattern[str]:
    """`pattern`, where ``#`` is a count and ``~`` a number; neither is too long for int()."""
    count, number = r" {0,16}([0-9]{1,12})\b", r" {0,16}([0-9]{1,9}(?:\.[0-9]{1,9})?)"
    return re.compile(pattern.replace("#", count).replace("~", number))


_SLOT: Final = _compiled(r"\bslot +\S+ id {0,16}[0-9]{1,12} \| task (?:-1|#) \| ?")
_CHOSEN: Final = re.compile(r"selected slot by L(?:CP similarity|RU)\b")
_STARTED: Final = re.compile(r"processing task\b")
#: 2026: what this task evaluated.
_NEW: Final = _compiled(r"prompt processing, n_tokens =#, progress =~")
#: Winter 2025: what the slot holds.
_OLDER: Final = _compiled(
    r"prompt processing progress, n_tokens =#,(?: batch\.n_tokens =#,)? progress =~"
)
#: 2025: likewise, under another name.
_OLD: Final = _compiled(r"prompt processing progress, n_past =#, n_tokens =#, progress =~")
#: Said with a slot, or on a line of its own after one that has it.
_PREFILLED: Final = re.compile(r" *prompt eval time =")
_CANCELLED: Final = re.compile(r"\bcancel task, id_task =")
_RELEASED: Final = re.compile(r"stop processing: n_(?:tokens|past) =")


def read(line: str) -> Said | None:
    """What `line` says; None if it is nothing that matters here."""
    found = _SLOT.search(line)
    if found is None:
        return Works() if _PREFILLED.match(line) or _CANCELLED.search(line) else None
    text = line[found.end() :]
    if found[1] is None:  # it has no task yet
        return Works() if _CHOSEN.match(text) else None
    return _of_task(text, int(found[1]))


def _of_task(text: str, task: int) -> Said | None:
    if said := _NEW.match(text):
        return Prefilling(task, min(1.0, float(said[2])), evaluated=int(said[1]))
    if said := _OLDER.match(text) or _OLD.match(text):
        return Prefilling(task, min(1.0, float(said[3])), held=int(said[1]))
    if _RELEASED.match(text):
        return Released(task)
    if _PREFILLED.match(text):
        return Works()
    return Started(task) if _STARTED.match(text) else None


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
