"""
The bodies of calls on the disk, for whoever looks for a mistake; off, as a rule.

Nothing else in the house writes down what a call says.  A file has what was asked and what was
told, never a header; the keys of the configuration, and what looks like a key, are blotted out,
also where a stream tells them in pieces.
Files are for their owner alone and whole or not there, and the oldest go where the room ends.
What cannot be written is counted, and no call waits for it.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import Any, Final

import attrs
import orjson
from twisted.internet.defer import Deferred, DeferredLock
from twisted.internet.threads import deferToThread
from twisted.logger import Logger
from twisted.python.failure import Failure

from gateway.config import MIB, Config
from gateway.files import write_private
from gateway.llama.command import SECRET, option

Json = Any

#: Its name in the state folder.
FOLDER: Final = "capture"

#: Bytes of an answer that are kept.
MOST: Final = 4 * 1024 * 1024

#: Calls that may wait for the disk.
_QUEUE: Final = 16

#: What stands between the two parts of a file.
_BETWEEN: Final = b"\n\n--- the answer ---\n\n"

_BLOT: Final = b"***"

#: How an event of a stream is written, and where such a piece of what is said stands in one.
_DATA: Final = b"data: "
_END: Final = b"\n\n"
_WORDS: Final = frozenset(
    {"text", "thinking", "partial_json", "content", "reasoning_content", "arguments"}
)

#: Keys by their looks: those of model vendors, and whatever a header would have.
_KEYS: Final = re.compile(
    rb"(?i)(\b(?:sk-|ghp_|hf_|akia)|\b(?:bearer|basic)\s+|\bx-api-key\W{1,4})[\w.~+/=-]{8,}"
)

#: Names of a server's variables that hold a key, and characters of one; less is in every text.
_NAMES: Final = re.compile("(?i)key|token|secret|password")
_SHORTEST: Final = 4

log = Logger()


@attrs.define(eq=False)
class Capture:
    """
    One folder of bodies.

    Attributes:
        folder: where they are; made when the first one comes.
        budget: bytes that they may have together.
        written: calls that were.
        lost: calls that were not: too large, too many at once, or the disk would not have them.
    """

    folder: Path
    budget: int
    _hidden: tuple[bytes, ...] = attrs.field(repr=False)
    _thread: Callable[..., Deferred[Any]] = deferToThread
    _one_at_a_time: DeferredLock = attrs.field(factory=DeferredLock, init=False)
    written: int = attrs.field(default=0, init=False)
    lost: int = attrs.field(default=0, init=False)
    _waiting: int = attrs.field(default=0, init=False)

    @classmethod
    def of(cls, config: Config) -> Capture | None:
        """What keeps bodies as the configuration wants it; None where nobody is to."""
        gateway = config.gateway
        if not gateway.capture:
            return None
        return cls(gateway.state_dir / FOLDER, gateway.capture * MIB, forms(secrets(config)))

    def keep(self, name: str, asked: bytes, told: bytes) -> None:
        """Write down, soon, what the call of this name asked and was told."""
        if self._waiting >= _QUEUE:
            self.lost += 1
            return
        self._waiting += 1
        self._one_at_a_time.run(self._thread, self._write, name, asked, told).addBoth(self._done)

    def status(self) -> dict[str, Json]:
        """For ``/status``."""
        return {
            "folder": str(self.folder),
            "budget": self.budget,
            "written": self.written,
            "lost": self.lost,
        }

    def _done(self, result: object) -> None:
        self._waiting -= 1
        if not isinstance(result, Failure):
            self.written += 1
            return
        self.lost += 1
        log.warn("a call's bodies are not kept: {why}", why=result.getErrorMessage())

    def _write(self, name: str, asked: bytes, told: bytes) -> None:
        data = self.without_keys(asked) + _BETWEEN + self.without_keys(self._joined(told))
        if len(data) > self.budget:
            raise ValueError(f"{len(data)} bytes are more than capture in [gateway] has room for")
        self.folder.mkdir(mode=0o700, exist_ok=True)
        self.folder.chmod(0o700)
        self._make_room(len(data))
        write_private(self.folder / f"{name}.txt", data)

    def _make_room(self, size: int) -> None:
        """The oldest go until `size` bytes more are within the budget."""
        found = sorted((path.stat().st_mtime_ns, path) for path in self.folder.iterdir())
        room = self.budget - sum(path.stat().st_size for _, path in found)
        for _, path in found:
            if room >= size:
                return
            room += path.stat().st_size
            path.unlink()

    def without_keys(self, body: bytes) -> bytes:
        """`body` with all keys blotted out that are known or look like one."""
        return self._blotted([body])[0]

    def _joined(self, told: bytes) -> bytes:
        """`told` without the keys that are spread over several events, where it is a stream."""
        blocks = told.split(_END)
        events = [_event(block) for block in blocks]
        texts: dict[Json, list[tuple[int, dict[str, Json], str]]] = {}
        for number, event in enumerate(events):
            for block, holder, name in _said(event):
                texts.setdefault(block, []).append((number, holder, name))
        for pieces in texts.values():
            before = [holder[name].encode() for _, holder, name in pieces]
            for (number, holder, name), old, new in zip(
                pieces, before, self._blotted(before), strict=True
            ):
                if old != new:
                    holder[name] = new.decode()
                    head = blocks[number].partition(_DATA)[0]
                    blocks[number] = head + _DATA + orjson.dumps(events[number])
        return _END.join(blocks)

    def _blotted(self, pieces: Sequence[bytes]) -> list[bytes]:
        """The pieces of a text: where a key begins is a blot, and where it goes on nothing."""
        text, found, at = b"".join(pieces), [], 0
        keys = deque(self._keys(text))
        for end in accumulate(map(len, pieces)):
            kept = b""
            while keys and keys[0][0] < end:
                begins, ends = keys[0]
                if begins >= at:
                    kept += text[at:begins] + _BLOT
                at = min(ends, end)
                if ends > end:
                    break
                keys.popleft()
            found.append(kept + text[at:end])
            at = end
        return found

    def _keys(self, text: bytes) -> list[tuple[int, int]]:
        """From where to where keys are in `text`, in order and apart."""
        known = (
            found.span() for each in self._hidden for found in re.finditer(re.escape(each), text)
        )
        likely = ((found.end(1), found.end()) for found in _KEYS.finditer(text))
        apart: list[tuple[int, int]] = []
        for begins, ends in sorted((*known, *likely)):
            if apart and begins < apart[-1][1]:
                apart[-1] = apart[-1][0], max(ends, apart[-1][1])
            else:
                apart.append((begins, ends))
        return apart


def _event(block: bytes) -> Json:
    """What the event says that is written like this; None where that is no JSON."""
    with suppress(orjson.JSONDecodeError):
        return orjson.loads(block.partition(_DATA)[2])
    return None


def _said(event: Json, block: tuple[Json, ...] = ()) -> Iterator[tuple[Json, dict[str, Json], str]]:
    """The words in an event: which of its blocks says them, and where they stand."""
    if isinstance(event, list):
        for each in event:
            yield from _said(each, block)
    elif isinstance(event, dict):
        here = (*block, event.get("index"))
        for name, each in event.items():
            if isinstance(each, str) and name in _WORDS:
                yield (*here, name), event, name
            else:
                yield from _said(each, (*here, name))


def secrets(config: Config) -> Iterator[str]:
    """What no body may show: tokens and keys, ours and those of the servers."""
    tiers = config.tier.values()
    found = [config.gateway.token, *(tier.key for tier in tiers)]
    for server in (tier.server for tier in tiers if tier.server is not None):
        found += [option(server.command, name) for name in SECRET]
        found += [value for name, value in server.env.items() if _NAMES.search(name)]
    return (each for each in found if each is not None and len(each) >= _SHORTEST)


def forms(words: Iterable[str]) -> tuple[bytes, ...]:
    """Each as it stands in a text, and in JSON; the longest first, since one may hold another."""
    found = {form for each in words for form in (each.encode(), orjson.dumps(each)[1:-1])}
    return tuple(sorted(found, key=len, reverse=True))
