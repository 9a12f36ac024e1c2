"""
Where two prompts of one past part, and how.

The client may have written a past anew, and then this room names the place where the two prompts
part: in which tool, which message and block, about which character.  What it says of it holds no
word of anybody: a path, a role and a kind, and names of tools.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

import attrs

from gateway.policy.prompt import Part, Path, Prompt

Json = Any

#: Characters of a tool's name that are shown.
_NAME: Final = 64

How = Literal["continued", "added", "removed", "moved", "changed", "another"]

_BECAME: Final[Mapping[str, str]] = {
    "added": "new",
    "removed": "gone",
    "moved": "in another place",
    "changed": "another one",
}


@attrs.frozen
class Divergence:
    """
    Where a prompt parts from an earlier one.

    Attributes:
        how: what became of the past there.
        path: the place in the newer body, or in the earlier one where something is gone; () where
            nothing parts, or all does.
        kind: of the block there.
        role: of the message there.
        offset: characters into it, to within `MARKED` (`gateway.policy.prompt`); None where the
            whole part is meant.
        count: parts of that sort that were added or removed.
        beside: the name of the tool before which a tool was added, "" otherwise.
        shared: bytes that both prompts begin with.
        messages: how many the earlier prompt had, and how many the newer one has.
    """

    how: How
    path: Path = ()
    kind: str = ""
    role: str = ""
    offset: int | None = None
    count: int = 1
    beside: str = ""
    shared: int = 0
    messages: tuple[int, int] = (0, 0)

    @property
    def sentence(self) -> str:
        """For the log; it holds no words but names of tools and switches."""
        if self.how == "continued":
            return "it goes on from where the earlier one ended"
        if self.how == "another":
            return "it has nothing in common with any earlier one"
        place = self.place
        if self.count > 1:
            place += f" and {self.count - 1} more"
        words = f"{place} {'is' if self.count == 1 else 'are'} {_BECAME[self.how]}"
        if self.beside:
            words += f", before {self.beside!r}"
        if self.offset is not None:
            words += f" from about character {self.offset} on"
        if self.path[:1] == ("messages",) and self.messages[1] < self.messages[0]:
            words += f"; {self.messages[0]} messages became {self.messages[1]}"
        return words

    @property
    def place(self) -> str:
        """The place in words."""
        match self.path:
            case ("tools", str(name)):
                return f"the tool {name[:_NAME]!r}"
            case ("tools", str(name), str(what)):
                return f"the {what} of the tool {name[:_NAME]!r}"
            case ("switches", str(name)):
                return f"the switch {name[:_NAME]!r}"
            case ("system",):
                return "the system prompt"
            case ("messages", int(number)):
                return f"messages[{number}] ({self.role})"
            case _:
                return f"{_written(self.path)} ({self.role}, {self.kind[:_NAME]})"

    def as_json(self) -> dict[str, Json]:
        """For ``/status``."""
        return {
            "how": self.how,
            "path": _written(self.path),
            "kind": self.kind[:_NAME],
            "role": self.role,
            "offset": self.offset,
            "sentence": self.sentence,
        }


def diverge(earlier: Prompt, later: Prompt) -> Divergence:
    """Where `later` parts from `earlier`."""
    olds, news = earlier.parts, later.parts
    at = _first_difference(olds, news)
    common = sum(part.size for part in news[:at])
    counts = (_messages(olds), _messages(news))
    if at == len(olds):
        return Divergence("continued", shared=common, messages=counts)
    if not {part.digest for part in olds} & {part.digest for part in news}:
        return Divergence("another", messages=counts)
    old, new = olds[at], (news[at] if at < len(news) else None)
    found = _in_section(_section(old, new), at, olds, news)
    if found.offset is not None and new is not None:
        common += min(found.offset, old.size, new.size)  # a character has at least one byte
    return attrs.evolve(found, shared=common, messages=counts)


def _first_difference(olds: Sequence[Part], news: Sequence[Part]) -> int:
    for at, (old, new) in enumerate(zip(olds, news, strict=False)):
        if old.digest != new.digest or old.path != new.path:
            return at
    return min(len(olds), len(news))


_SECTIONS: Final = ("tools", "system", "switches", "messages")


def _section(old: Part, new: Part | None) -> str:
    """The first of the two sections in which two parts stand."""
    names = [str(part.path[0]) for part in (old, new) if part is not None]
    return min(names, key=_SECTIONS.index)


def _in_section(section: str, at: int, olds: Sequence[Part], news: Sequence[Part]) -> Divergence:
    old = olds[at] if olds[at].path[0] == section else None
    new = news[at] if at < len(news) and news[at].path[0] == section else None
    if section == "messages":
        return _in_messages(at, olds, news)
    if section == "system":
        return _replaced(old, new)
    return _in_names(section, old, new, olds, news)


def _replaced(old: Part | None, new: Part | None) -> Divergence:
    """One part for another, in the same place."""
    if old is None or new is None:
        there = old or new
        assert there is not None
        return Divergence("removed" if new is None else "added", there.path, there.kind, there.role)
    offset = old.differs_at(new) if old.kind == new.kind != "switch" else None
    return Divergence("changed", new.path, new.kind, new.role, offset)


def _in_names(
    section: str, old: Part | None, new: Part | None, olds: Sequence[Part], news: Sequence[Part]
) -> Divergence:
    """Tools or switches, which have names."""
    before, now = _names(section, olds), _names(section, news)
    if old is not None and new is not None and old.path[1] == new.path[1]:
        return _replaced(old, new)
    if new is not None and new.path[1] not in before:
        added = [name for name in now if name not in before]
        beside = "" if old is None else str(old.path[1])[:_NAME]
        return Divergence("added", new.path[:2], new.kind, count=len(added), beside=beside)
    if old is not None and old.path[1] not in now:
        removed = [name for name in before if name not in now]
        return Divergence("removed", old.path[:2], old.kind, count=len(removed))
    there = new or old
    assert there is not None
    return Divergence("moved", there.path[:2], there.kind)


def _names(section: str, parts: Sequence[Part]) -> dict[str | int, None]:
    return dict.fromkeys(part.path[1] for part in parts if part.path[0] == section)


def _in_messages(at: int, olds: Sequence[Part], news: Sequence[Part]) -> Divergence:
    """A message that came, went or moved; otherwise the block of one that did."""
    old, new = olds[at], (news[at] if at < len(news) else None)
    if new is None:
        return Divergence("removed", old.path, old.kind, old.role)
    if old.path[1] == new.path[1]:
        number = int(new.path[1])
        before, now = _whole_messages(olds), _whole_messages(news)
        returns = _index(before, now[number], number + 1)
        stays = _index(now, before[number], number + 1)
        if returns is not None and stays is None:
            return Divergence(
                "removed", ("messages", number), role=old.role, count=returns - number
            )
        if stays is not None and returns is None:
            return Divergence("added", ("messages", number), role=new.role, count=stays - number)
        if stays is not None:
            return Divergence("moved", ("messages", number), role=new.role)
    return _in_blocks(at, olds, news)


def _in_blocks(at: int, olds: Sequence[Part], news: Sequence[Part]) -> Divergence:
    old, new = olds[at], news[at]
    number, other_number = int(old.path[1]), int(new.path[1])
    goes_on = [part.path[1] for part in news[at + 1 :] if part.digest == old.digest]
    came_before = any(part.digest == new.digest for part in olds[at + 1 :])
    if goes_on and (came_before or number not in goes_on):
        return Divergence("moved", old.path, old.kind, old.role)
    if goes_on or number > other_number:
        return Divergence("added", new.path, new.kind, new.role)
    if came_before or number < other_number:
        return Divergence("removed", old.path, old.kind, old.role)
    return _replaced(old, new)


def _index(digests: Sequence[bytes], wanted: bytes, begin: int) -> int | None:
    return digests.index(wanted, begin) if wanted in digests[begin:] else None


def _messages(parts: Sequence[Part]) -> int:
    """How many messages these parts are of; the last one tells."""
    last = parts[-1].path if parts else ()
    return int(last[1]) + 1 if last[:1] == ("messages",) else 0


def _whole_messages(parts: Sequence[Part]) -> list[bytes]:
    """A digest of each message."""
    found: list[bytes] = [b""] * _messages(parts)
    for part in parts:
        if part.path[0] == "messages":
            found[int(part.path[1])] += part.digest
    return found


def _written(path: Path) -> str:
    """``messages[2].content[0]``."""
    return "".join(
        f"[{step}]" if isinstance(step, int) else f".{step[:_NAME]}" for step in path
    ).removeprefix(".")
