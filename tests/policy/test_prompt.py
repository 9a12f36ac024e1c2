"""A prompt without its words: how much of it is kept, and how far two are the same."""

from __future__ import annotations

import pytest

from gateway.policy.prompt import Prompt, shared, should_have, whole
from tests.conversations import text, user
from tests.policy.test_divergence import PAST, prepared


def test_marks_end_somewhere() -> None:
    """A part of 32 MiB has no more than 64 KiB of marks."""
    long = "x" * (32 * 1024 * 1024)
    (part,) = Prompt.of({"messages": [user(text(long))]}).parts
    assert len(part.marks) == 64 * 1024


# --- fingerprints ---------------------------------------------------------------------------------


def test_a_fingerprint_tells_what_is_shared() -> None:
    """Bytes of the parts that both begin with; twelve bytes for each part."""
    earlier = Prompt.of(prepared())
    later = Prompt.of(prepared(messages=[*PAST[:3], user(text("Stop."))]))
    parts = len(earlier.parts)
    assert len(earlier.fingerprint) == 12 * parts
    assert whole(earlier.fingerprint) == earlier.size
    both = shared(earlier.fingerprint, later.fingerprint)
    assert both == sum(part.size for part in later.parts[:-1])
    assert shared(b"", later.fingerprint) == shared(b"garbage", later.fingerprint) == 0


# --- tokens ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("same", "size", "tokens", "expected"),
    [
        (0, 4000, 1000, 0),
        (2000, 4000, 1000, 450),
        (4000, 4000, 1000, 936),
        (3900, 4000, 1000, 877),
        (3960, 4000, 1000, 891),
        (99_900, 100_000, 24_557, 24_368),
        (9, 9, 3, 2),
        (1, 0, 9, 8),
        (0, 0, 9, 0),
    ],
)
def test_what_should_have_been_cached(same: int, size: int, tokens: int, expected: int) -> None:
    """The share in bytes, less a tenth; or all but what the bytes that are new can be at most."""
    assert should_have(same, size, tokens) == expected
