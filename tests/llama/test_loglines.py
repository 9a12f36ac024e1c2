"""What a llama-server says; the lines are those of real ones."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.llama.loglines import (
    LONGEST,
    Lines,
    Prefilling,
    Released,
    Said,
    Started,
    Works,
    read,
)

PREFILLING = (
    "0.06.014.992 I slot print_timing: id  0 | task 0 | prompt processing,"
    " n_tokens =    384, progress = 0.29, t =   3.41 s / 112.60 tokens per second"
)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            "0.02.604.422 I slot get_availabl: id  0 | task -1 | selected slot by LRU, t_last = -1",
            Works(),
        ),
        (
            (
                "0.23.558.184 I slot get_availabl: id  3 | task -1 | selected slot by LCP"
                " similarity, f_sim_best = 0.467 (> 0.100 thold), f_keep = 0.992"
            ),
            Works(),
        ),
        (
            "0.02.604.661 I slot launch_slot_: id  0 | task 16 | processing task, is_child = 0",
            Started(16),
        ),
        (PREFILLING, Prefilling(0, 0.29, evaluated=384)),
        (
            (
                "0.14.781.525 I slot print_timing: id  0 | task 0 | prompt eval time ="
                "   12057.54 ms /  1320 tokens (    9.13 ms per token,   109.48 tokens per second)"
            ),
            Works(),
        ),
        ("0.19.786.775 W srv          stop: cancel task, id_task = 16", Works()),
        (
            (
                "0.19.824.604 I slot      release: id  0 | task 16 | stop processing:"
                " n_tokens = 664, truncated = 0"
            ),
            Released(16),
        ),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_what_the_embedded_server_says(line: str, said: Said) -> None:
    """Each line of the server of 2026 that matters is understood."""
    assert read(line) == said


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            (
                "slot get_availabl: id  1 | task -1 | selected slot by LCP similarity,"
                " sim_best = 0.998 (> 0.100 thold), f_keep = 1.000"
            ),
            Works(),
        ),
        ("slot launch_slot_: id  2 | task 7 | processing task", Started(7)),
        (
            (
                "slot print_timing: id  1 | task 0 | prompt processing, n_tokens =   2048,"
                " progress = 0.50"
            ),
            Prefilling(0, 0.5, evaluated=2048),
        ),
        (
            (
                "slot update_slots: id  3 | task 31 | prompt processing progress, n_tokens = 4891,"
                " batch.n_tokens = 100, progress = 0.905238"
            ),
            Prefilling(31, 0.905238, held=4891),
        ),
        (
            (
                "slot update_slots: id  0 | task 15 | prompt processing progress, n_past = 517,"
                " n_tokens = 512, progress = 0.335958"
            ),
            Prefilling(15, 0.335958, held=517),
        ),
        (
            (
                "prompt eval time =     877.88 ms /    52 tokens (   16.88 ms per token,"
                "    59.23 tokens per second)"
            ),
            Works(),
        ),
        (
            "slot      release: id  3 | task 2 | stop processing: n_past = 58, truncated = 0",
            Released(2),
        ),
    ],
)
def test_what_older_servers_say(line: str, said: Said) -> None:
    """Builds from 2025 on are understood, each as far as it goes."""
    assert read(line) == said


@pytest.mark.parametrize(
    "around", ["[36225] {}", '{{"type":"log","level":2,"msg":"{}\\n"}}', "llama[13]: {}", "{}\r"]
)
def test_what_stands_around_a_line(around: str) -> None:
    """A router, JSON or a journal may wrap it."""
    assert read(around.format(PREFILLING)) == read(PREFILLING)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "0.01.575.993 I srv          init: model loaded",
        "slot print_timing: id  0 | task 0 |        eval time =     119.21 ms /     5 tokens",
        "slot print_timing: id  0 | task 0 |       total time =   12176.75 ms /  1325 tokens",
        "slot update_slots: id  0 | task -1 | prompt processing, n_tokens = 1, progress = 0.10",
        "slot x: id  0 | task 1 | prompt processing, n_tokens = nan, progress = inf",
        f"slot x: id  0 | task {'9' * 5000} | processing task",
    ],
)
def test_what_does_not_matter(line: str) -> None:
    """Anything else is nothing."""
    assert read(line) is None


#: What the lines above are made of, in the mixture that finds mistakes.
PIECES = st.sampled_from(
    [
        *(word + " " for word in PREFILLING.split()),
        *(
            "task -1 ",
            "processing task",
            "cancel task, id_task = ",
            "id_task =",
            "stop processing:",
        ),
        *("selected slot by LCP similarity, ", "sim_best = ", "n_past = ", "progress, "),
        *("prompt eval time = ", " ms / ", " tokens", "9" * 20, "\N{ARABIC-INDIC DIGIT FIVE}", "-"),
    ]
)


@settings(deadline=None)
@given(st.one_of(st.text(), st.lists(PIECES).map("".join)))
def test_nothing_that_is_said_breaks_it(line: str) -> None:
    """Whatever the line, it is understood or it is not."""
    said = read(line)
    if isinstance(said, Prefilling):
        assert 0 <= said.fraction <= 1


# --- lines ----------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.binary(max_size=200), st.lists(st.integers(0, 200)))
def test_a_stream_is_cut_at_its_line_ends(stream: bytes, cuts: list[int]) -> None:
    """However the bytes come, the lines are the same."""
    lines, found, last = Lines(), [], 0
    for cut in [*sorted(cuts), len(stream)]:
        found += lines.feed(stream[last:cut])
        last = max(last, min(cut, len(stream)))
    found += lines.end()
    wanted = [line.removesuffix(b"\r").decode("utf-8", "replace") for line in stream.split(b"\n")]
    assert found == wanted[: len(wanted) - stream.endswith(b"\n") - (not stream)]


def test_a_line_without_an_end_takes_no_more_room_than_a_long_one() -> None:
    """Of a very long line the beginning is kept, and the next one is whole."""
    lines = Lines()
    for _ in range(100):
        assert lines.feed(b"x" * 5000) == []
        assert len(lines._rest) <= LONGEST
    assert lines.feed(b"y\nnext\n") == ["x" * LONGEST, "next"]
    assert lines.end() == []
