"""One snapshot: what its sidecar says of it, and which ones have to go."""

from __future__ import annotations

import struct
from base64 import b64encode
from collections.abc import Callable, Iterable
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.llama.identity import Identity, ModelFile
from gateway.llama.snapshot import Snapshot, from_sidecar, to_evict, to_sidecar

ONE = Identity(ModelFile("/models/one.gguf", 1000, 17, "aa"), "b1", 32_768)


def prints(*parts: str) -> bytes:
    """The fingerprint of a prompt with these parts, of 10 000 bytes each."""
    return b"".join(struct.pack("<8sI", part.encode(), 10_000) for part in parts)


def snapshot(name: str = "a", **more: Any) -> Snapshot:
    fields = {
        "tokens": 3000,
        "prompt_tokens": 2900,
        "size": 4096,
        "checksum": 5,
        "version": 4,
        **more,
    }
    return Snapshot(
        name=name,
        identity=ONE,
        what="conversation",
        fingerprint=prints("a", "b"),
        created=12.5,
        save_seconds=0.25,
        **fields,
    )


# --- sidecars -------------------------------------------------------------------------------------


def test_a_sidecar_says_all_of_a_snapshot() -> None:
    """But its name and when it was used, which its file says."""
    one = snapshot(used=7.0)
    assert from_sidecar("a", to_sidecar(one), 7.0) == one


def without(name: str) -> Callable[[Any], Any]:
    return lambda said: {key: value for key, value in said.items() if key != name}


def instead(**more: Any) -> Callable[[Any], Any]:
    return lambda said: {**said, **more}


@pytest.mark.parametrize(
    "change",
    [
        instead(form=0),
        instead(form="1"),
        without("form"),
        without("identity"),
        instead(tokens="3000"),
        instead(tokens=True),
        instead(tokens=0),
        instead(prompt_tokens=0),
        instead(prompt_tokens=3001),
        instead(tokens=1.5),
        instead(size=-1),
        instead(size=1e300),
        instead(what="anything"),
        instead(fingerprint="%"),
        instead(fingerprint=b64encode(b"odd").decode()),
        instead(newer=1),
        instead(identity={"n_ctx": 1}),
        instead(identity=None),
        lambda said: [said],
        lambda _: None,
    ],
)
def test_another_sidecar_is_none(change: Callable[[Any], Any]) -> None:
    """Of an older form, or with anything that is not as it should be."""
    raw = orjson.dumps(change(orjson.loads(to_sidecar(snapshot()))))
    assert from_sidecar("a", raw, 7.0) is None


# --- who has to go --------------------------------------------------------------------------------


@given(
    st.lists(st.integers(1, 50), max_size=20),
    st.integers(0, 200),
    st.integers(0, 300),
    st.integers(0, 300),
    st.integers(0, 300),
)
def test_who_has_to_go(sizes: list[int], need: int, budget: int, free: int, reserve: int) -> None:
    """What goes is just enough, and the longest unused; where it is not enough, nobody goes."""
    there = [snapshot(str(number), size=size, used=number) for number, size in enumerate(sizes)]

    def fits(going: Iterable[Snapshot]) -> bool:
        gone = sum(each.size for each in going)
        return sum(sizes) - gone + need <= budget and free + gone - need >= reserve

    going = to_evict(there, need, budget, free, reserve)
    if going is None:
        assert not fits(there)
    else:
        assert going == there[: len(going)]
        assert fits(going)
        assert not going or not fits(going[:-1])
