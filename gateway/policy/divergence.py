"""
Where two prompts of one past part, and why.

A call is slow where llama-server has to evaluate again what it had evaluated before.  Either the
past was written anew, and then this room names the place where the two prompts part; or the past
is the same, and the server no longer held it.

A prompt is kept as its parts, in the order in which templates render them: tools, system, switches
that rewrite, messages.  Of each part a digest, a length and a mark for every sixteen characters are
kept, never its text.  So a place is known to within sixteen characters, and what is logged of it
holds no word of anybody: its path, role and kind, and names of tools.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from struct import Struct
from typing import Any, Final, Literal
from zlib import crc32

import attrs
import orjson

Json = Any
Path = tuple[str | int, ...]

#: Characters that one mark stands for, and characters of a part that are marked.
MARKED: Final = 16
_MARKED_AT_MOST: Final = 256 * 1024

#: Prompts that are remembered, and bytes that they may take up together.
REMEMBERED: Final = 32
_ROOM: Final = 4 * 1024 * 1024

#: Bytes that a part takes up beside its marks, at most (measured: 270 on CPython 3.11).
_PART: Final = 400

#: Tokens; a call that evaluates fewer again is not worth a word.
THRESHOLD: Final = 1000

#: What a share in bytes surely is in tokens: a token of a tool's schema has fewer bytes than one
#: of plain words (measured on real prompts: up to 5 % too high without it).
_SURELY: Final = 0.9

#: From the other end: what is not shared has no more tokens than bytes, but for the marks of a
#: template; so many more for each byte, and so many more in all.
_MARKS_A_BYTE: Final = 1.25
_MARKS_IN_ALL: Final = 64

#: Characters of a tool's name that are shown.
_NAME: Final = 64

How = Literal["continued", "added", "removed", "moved", "changed", "another"]

_BECAME: Final[Mapping[str, str]] = {
    "added": "new",
    "removed": "gone",
    "moved": "in another place",
    "changed": "another one",
}

_MARK: Final = array("I").itemsize
_RECORD: Final = Struct("<8sI")


@attrs.frozen
class Part:
    """
    A piece of a prompt.

    Attributes:
        path: where it stands in the body; tools and switches by their names.
        kind: of its block, or of what else it is.
        role: of its message, or "".
        digest: the same for the same piece anywhere.
        size: bytes.
        marks: four bytes for every sixteen characters.
    """

    path: Path
    kind: str
    role: str
    digest: bytes
    size: int
    marks: bytes = attrs.field(repr=False)

    @classmethod
    def of(cls, path: Path, kind: str, role: str, text: str, known: Mapping[bytes, bytes]) -> Part:
        written = text.encode("utf-8", "replace")
        named = path if path[0] != "messages" else ()
        label = "\0".join([kind, role, *map(str, named), ""])
        hashed = blake2b(label.encode("utf-8", "replace"), digest_size=8)
        hashed.update(written)
        digest = hashed.digest()
        marks = known.get(digest)
        if marks is None:
            marks = _marks(text, written)
        return cls(path, kind, role, digest, len(written), marks)

    def differs_at(self, other: Part) -> int:
        """The characters after which, or within `MARKED` of which, the two differ."""
        common = min(len(self.marks), len(other.marks))
        for at in range(0, common, _MARK):
            if self.marks[at : at + _MARK] != other.marks[at : at + _MARK]:
                return at // _MARK * MARKED
        return common // _MARK * MARKED


def _marks(text: str, written: bytes) -> bytes:
    at = range(0, min(len(text), _MARKED_AT_MOST), MARKED)
    if text.isascii():
        sums = [crc32(written[begin : begin + MARKED]) for begin in at]
    else:
        sums = [crc32(text[begin : begin + MARKED].encode("utf-8", "replace")) for begin in at]
    return array("I", sums).tobytes()


@attrs.frozen
class Prompt:
    """
    A prepared body, without its words.

    Attributes:
        parts: in the order in which templates render them.
    """

    parts: tuple[Part, ...]

    @classmethod
    def of(
        cls,
        body: Mapping[str, Json],
        rewriting: Sequence[str] | None = None,
        like: Prompt | None = None,
    ) -> Prompt:
        """
        The prompt of a prepared body.

        Args:
            body: as `gateway.policy.prefix.prepare` gives it.
            rewriting: the switches that change earlier turns; None where that is not known, and
                any of them might.
            like: one that it may have most of its parts in common with: marks cost the most.
        """
        known = {} if like is None else {part.digest: part.marks for part in like.parts}
        parts = _texts(body, rewriting)
        return cls(tuple(Part.of(*where, text, known) for where, text in parts))

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(part.size for part in self.parts)

    @property
    def weight(self) -> int:
        """Bytes of memory that it takes up, about."""
        return sum(_PART + len(part.marks) for part in self.parts)

    @property
    def fingerprint(self) -> bytes:
        """What tells how much of another prompt is the same (`shared`): 12 bytes each part."""
        return b"".join(_RECORD.pack(part.digest, min(part.size, 2**32 - 1)) for part in self.parts)


def shared(one: bytes, other: bytes) -> int:
    """Bytes of the parts that two prompts, given as fingerprints, both begin with."""
    step = _RECORD.size
    same = 0
    for at in range(0, min(len(one), len(other)) // step * step, step):
        if one[at : at + step] != other[at : at + step]:
            break
        same += _RECORD.unpack_from(one, at)[1]
    return same


def whole(fingerprint: bytes) -> int:
    """Bytes of the prompt with this fingerprint."""
    return shared(fingerprint, fingerprint)


# --- where two prompts part -----------------------------------------------------------------------


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
        offset: characters into it, to within `MARKED`; None where the whole part is meant.
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


# --- the parts of a body --------------------------------------------------------------------------


def _texts(
    body: Mapping[str, Json], rewriting: Sequence[str] | None
) -> Iterator[tuple[tuple[Path, str, str], str]]:
    """Path, kind and role of each part, and what it says."""
    for tool in body.get("tools") or ():
        name = str(tool.get("name", ""))
        rest = {key: value for key, value in tool.items() if key not in ("name", "description")}
        yield (("tools", name, "description"), "tool", ""), str(tool.get("description", ""))
        yield (("tools", name, "input_schema"), "tool", ""), _json(rest)
    if body.get("system"):
        system = body["system"]
        yield (("system",), "system", ""), system if isinstance(system, str) else _json(system)
    for name, value in sorted((body.get("chat_template_kwargs") or {}).items()):
        if rewriting is None or name in rewriting:
            yield (("switches", name), "switch", ""), _json(value)
    for number, message in enumerate(body.get("messages") or ()):
        role, content = str(message.get("role", "")), message.get("content") or [{}]
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        for path, kind, text in _blocks(("messages", number), content):
            yield (path, kind, role), text


def _blocks(path: Path, content: Sequence[Json]) -> Iterator[tuple[Path, str, str]]:
    """Path, kind and text of each block; a tool result is its head and its own blocks."""
    for number, block in enumerate(content):
        here = (*path, "content", number)
        kind = str(block.get("type", "nothing"))
        inside = block.get("content")
        if kind == "tool_result" and isinstance(inside, list):
            yield here, kind, str(block.get("tool_use_id", ""))
            yield from _blocks(here, inside)
        elif kind in ("text", "thinking"):
            yield here, kind, str(block.get(kind, ""))
        else:
            yield here, kind, _json(block)


def _json(value: Json) -> str:
    return orjson.dumps(value).decode()


def _written(path: Path) -> str:
    """``messages[2].content[0]``."""
    return "".join(
        f"[{step}]" if isinstance(step, int) else f".{step[:_NAME]}" for step in path
    ).removeprefix(".")


# --- why a call was cold --------------------------------------------------------------------------


def should_have(same: int, size: int, tokens: int) -> int:
    """
    How many tokens of a prompt a server that forgets nothing need not evaluate, at least.

    Args:
        same: bytes of it that an earlier prompt begins with.
        size: bytes of it in all.
        tokens: of it in all.
    """
    if same <= 0:
        return 0
    by_share = tokens * min(1.0, same / max(1, size)) * _SURELY
    by_rest = tokens - max(0, size - same) * _MARKS_A_BYTE - _MARKS_IN_ALL
    return max(0, int(max(by_share, by_rest)))


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
        """Another model answers now."""
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
