"""
The bodies of calls on the disk, for whoever looks for a mistake; off, as a rule.

Nothing else in the house writes down what a call says.  A file has what was asked and what was
told, never a header; the keys of the configuration, and what looks like a key, are blotted out.
Files are for their owner alone and whole or not there, and the oldest go where the room ends.
What cannot be written is counted, and no call waits for it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import attrs
import orjson
from twisted.internet.defer import Deferred, DeferredLock
from twisted.internet.threads import deferToThread
from twisted.logger import Logger
from twisted.python.failure import Failure

from gateway.config import MIB, Config
from gateway.llama.command import SECRET, option
from gateway.llama.snapshots import write_private

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
        data = self.without_keys(asked) + _BETWEEN + self.without_keys(told)
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
        for secret in self._hidden:
            body = body.replace(secret, _BLOT)
        return _KEYS.sub(rb"\1" + _BLOT, body)


def secrets(config: Config) -> Iterator[str]:
    """What no body may show: tokens and keys, ours and those of the servers."""
    tiers = config.tier.values()
    found = [config.gateway.token, *(tier.api_key for tier in tiers)]
    for server in (tier.server for tier in tiers if tier.server is not None):
        found += [option(server.command, name) for name in SECRET]
        found += [value for name, value in server.env.items() if _NAMES.search(name)]
    return (each for each in found if each is not None and len(each) >= _SHORTEST)


def forms(words: Iterable[str]) -> tuple[bytes, ...]:
    """Each as it stands in a text, and in JSON; the longest first, since one may hold another."""
    found = {form for each in words for form in (each.encode(), orjson.dumps(each)[1:-1])}
    return tuple(sorted(found, key=len, reverse=True))
