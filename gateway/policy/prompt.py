"""
A prompt without its words: what tells it from others, and how far two of them are the same.

A prompt is kept as its parts, in the order in which templates render them: tools, system, switches
that rewrite, messages.  Of each part a digest, a length and a mark for every sixteen characters are
kept, never its text.  So a place in it is known to within sixteen characters, and what is kept
holds no word of anybody but a part's path, role and kind, and names of tools.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from struct import Struct
from typing import Any, Final
from zlib import crc32

import attrs
import orjson

Json = Any
Path = tuple[str | int, ...]

#: Characters that one mark stands for, and characters of a part that are marked.
MARKED: Final = 16
_MARKED_AT_MOST: Final = 256 * 1024

#: Bytes that a part takes up beside its marks, at most (measured: 270 on CPython 3.11).
_PART: Final = 400

#: What a share in bytes surely is in tokens: a token of a tool's schema has fewer bytes than one
#: of plain words (measured on real prompts: up to 5 % too high without it).
_SURELY: Final = 0.9

#: From the other end: what is not shared has no more tokens than bytes, but for the marks of a
#: template; so many more for each byte, and so many more in all.
_MARKS_A_BYTE: Final = 1.25
_MARKS_IN_ALL: Final = 64

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
