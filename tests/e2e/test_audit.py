"""What the audit of prompts rests on: what a server holds, and what it knows."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tests.e2e.audit import PAST, RUN, Known, Memory, Prompt, groups


def prompt(*parts: tuple[int, int]) -> Prompt:
    """A prompt of stretches: so many tokens, counted up from a number of their own."""
    tokens = [start * 1000 + place for start, many in parts for place in range(many)]
    return Prompt.of(tokens, None)


def shared(*prompts: Prompt) -> list[tuple[int, int]]:
    """Of each prompt, the tokens that are held, and those that the slot has."""
    memory = Memory()
    found = []
    for each in prompts:
        best, kept = memory.take(each)
        found.append((0 if best is None else each.shared(best), kept))
    return found


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ((), ((1, 5),), 0),
        (((1, 5),), ((2, 5),), 0),
        (((1, 5),), ((1, 5),), 5),
        (((1, 5),), ((1, 7),), 5),
        (((1, 4), (2, 3)), ((1, 4), (3, 3)), 4),
    ],
)
def test_two_prompts_share_their_beginning(
    one: Sequence[tuple[int, int]], other: Sequence[tuple[int, int]], same: int
) -> None:
    """It is as long as its tokens are the same, whichever is asked."""
    assert prompt(*one).shared(prompt(*other)) == prompt(*other).shared(prompt(*one)) == same


def test_what_was_put_aside_is_taken_back() -> None:
    """A conversation finds its whole past again after a call that has nothing in common with it."""
    main, aside = prompt((1, 100)), prompt((2, 50))
    later = prompt((1, 100), (3, 10))
    assert shared(main, aside, later) == [(0, 0), (0, 0), (100, 100)]


def test_what_is_taken_back_for_another_prompt_is_lost() -> None:
    """A branch takes the trunk, and all of it that does not fit the branch is gone."""
    main, aside = prompt((1, 100)), prompt((2, 50))
    branch, later = prompt((1, 60), (4, 10)), prompt((1, 100), (3, 10))
    assert shared(main, aside, branch, later) == [(0, 0), (0, 0), (60, 60), (60, 60)]


def test_what_fits_too_little_is_left_where_it_is() -> None:
    """Nothing is taken back of which less than a quarter would be kept."""
    main, aside = prompt((1, 100)), prompt((2, 50))
    branch, later = prompt((1, 20), (4, 10)), prompt((1, 100), (3, 10))
    assert shared(main, aside, branch, later) == [(0, 0), (0, 0), (20, 0), (100, 100)]


def test_the_slot_is_kept_where_more_of_it_fits() -> None:
    """What would save more is left, if more of it would be lost: the rule is the server's own."""
    long, short = prompt((1, 90), (2, 60)), prompt((1, 80), (3, 5))
    assert shared(long, short, prompt((1, 90), (4, 5))) == [(0, 0), (80, 80), (90, 80)]


def test_tokens_are_known_in_runs() -> None:
    """A run that was evaluated before counts wherever it stands, a shorter one does not."""
    known = Known()
    first = [*range(200)]
    assert known.again(first, 0) == 0
    assert known.again([7000, *first[10 : 10 + RUN], 7001], 0) == RUN
    assert known.again([8000, *first[10 : 9 + RUN], 8001], 0) == 0
    assert known.again(first, 150) == 50


def test_a_body_falls_apart_in_the_order_of_its_prompt() -> None:
    """Tools first or the system prompt first, then the opening turn, then the past."""
    opening = {"role": "user", "content": [{"type": "text", "text": "a"}]}
    body = {"system": "s", "tools": [{"name": "t"}], "messages": [opening, opening]}
    causes = ["other tools", "another system prompt", "another opening turn", PAST]
    assert [each.cause for each in groups(body, tools_first=True)] == causes
    first = [each.cause for each in groups(body, tools_first=False)][:2]
    assert first == list(reversed(causes[:2]))
