"""
One snapshot: a slot's state on the disk, what its sidecar says of it, and which ones have to go.

A sidecar says what a state belongs to and what it is good for: a server, a prompt, its tokens.  All
of this is values; the files are read and written elsewhere (`gateway.llama.state_files`).
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Callable, Iterable
from typing import Any, Final, Literal

import attrs
import orjson
from cattrs import Converter

from gateway.llama.identity import Identity
from gateway.policy.prompt import shared, should_have, whole

#: What a snapshot holds: a conversation, or the tools and the system prompt alone.
What = Literal["conversation", "prefix"]

#: The form of sidecars; others are removed.
_FORM: Final = 1


class Refused(Exception):
    """A state cannot be kept; the message says why."""


@attrs.frozen
class Snapshot:
    """
    A state on the disk.

    Attributes:
        name: of its files, without their endings.
        identity: what it belongs to.
        what: what it holds.
        tokens: that it holds.
        prompt_tokens: of these, those of the prompt; the others were generated.
        size: bytes of its file.
        checksum: CRC-32 of its file.
        version: of llama.cpp's form of states.
        fingerprint: of the prompt that it was taken after (`gateway.policy.prompt`).
        created: seconds since 1970.
        save_seconds: what it took to write it.
        used: seconds since 1970; not in the sidecar.
    """

    name: str
    identity: Identity
    what: What
    tokens: int
    prompt_tokens: int
    size: int
    checksum: int
    version: int
    fingerprint: bytes = attrs.field(repr=False)
    created: float
    save_seconds: float
    used: float = 0.0

    @property
    def file(self) -> str:
        """What llama-server is told to restore."""
        return f"{self.name}.kv"

    def serves(self, fingerprint: bytes, *, exactly: bool) -> int:
        """
        Tokens of the prompt with this fingerprint that need not be evaluated after a restore.

        Args:
            fingerprint: of the prompt.
            exactly: whether the model's states serve only prompts that go on where they end.
        """
        same, all_of_it = shared(self.fingerprint, fingerprint), whole(self.fingerprint)
        if exactly and same < all_of_it:
            return 0
        return should_have(same, all_of_it, self.prompt_tokens)


def _converter() -> Converter:
    """One that forbids unknown keys and turns nothing into something else."""
    converter = Converter(forbid_extra_keys=True, detailed_validation=False)

    def exactly(kind: type) -> Callable[[Any, Any], Any]:
        def structure(value: Any, _: Any) -> Any:
            if type(value) is not kind:
                raise TypeError(kind)
            return value

        return structure

    for kind in (str, int, float):
        converter.register_structure_hook(kind, exactly(kind))
    converter.register_structure_hook(bytes, lambda value, _: b64decode(value, validate=True))
    converter.register_unstructure_hook(bytes, lambda value: b64encode(value).decode())
    return converter


_CONVERTER: Final = _converter()


def to_sidecar(snapshot: Snapshot) -> bytes:
    """What is written beside a state."""
    said = _CONVERTER.unstructure(snapshot)
    del said["used"], said["name"]
    return orjson.dumps({"form": _FORM, **said})


def from_sidecar(name: str, raw: bytes, used: float) -> Snapshot | None:
    """The snapshot that a sidecar describes; None where it is of another form, or garbage."""
    try:
        said = orjson.loads(raw)
        if said.pop("form") != _FORM:
            return None
        found = _CONVERTER.structure({**said, "name": name, "used": used}, Snapshot)
    except Exception:  # noqa: BLE001  # a file may hold anything, and cattrs raises many things
        return None
    sensible = (
        found.tokens >= found.prompt_tokens > 0
        and found.size > 0
        and len(found.fingerprint) % 12 == 0
    )
    return found if sensible else None


# --- who has to go --------------------------------------------------------------------------------


def to_evict(
    snapshots: Iterable[Snapshot], need: int, budget: int, free: int, reserve: int
) -> list[Snapshot] | None:
    """
    Those that make room for `need` further bytes, the longest unused first.

    Args:
        snapshots: all there are.
        need: bytes.
        budget: bytes that all of them may have together.
        free: bytes that are free on the disk.
        reserve: bytes that must stay free.

    Returns:
        None where there is no room, whoever goes: then nobody does.
    """
    oldest_first = sorted(snapshots, key=lambda each: each.used)
    taken = sum(each.size for each in oldest_first)
    if need > budget or free + taken - need < reserve:
        return None
    going = []
    for each in oldest_first:
        if taken + need <= budget and free - need >= reserve:
            break
        going.append(each)
        taken -= each.size
        free += each.size
    return going


def replaces(kept: Snapshot, other: Snapshot, *, exactly: bool) -> bool:
    """Whether all that `other` is good for, `kept` is good for too."""
    return (
        other.name != kept.name
        and (other.identity, other.what) == (kept.identity, kept.what)
        and (
            kept.fingerprint == other.fingerprint
            or (not exactly and kept.fingerprint.startswith(other.fingerprint))
        )
    )
