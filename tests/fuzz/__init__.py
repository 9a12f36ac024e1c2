"""
Anything at all, for every room that reads what others wrote.

A target (`Target`) is a room and what holds of it whatever it is given; each stands in a module of
its own and is listed in `tests.fuzz.targets`.  The same targets are used twice: ``make test`` gives
each some hundred cases, always the same ones, and ``python -m tests.fuzz`` goes on for as long as
one likes, led by what the cases reach (atheris).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

import attrs


@attrs.frozen
class Target:
    """
    A room that reads.

    Attributes:
        name: what it is called on the command line.
        holds: raises if anything of what is promised does not hold for these bytes.
        seeds: what cases are made of.
        change: makes another case of one.
        kept: cases that once broke a promise.
        cases: how many ``make test`` tries.
    """

    name: str
    holds: Callable[[bytes], None]
    seeds: Sequence[bytes]
    change: Callable[[bytes, Random], bytes]
    kept: Sequence[bytes] = ()
    cases: int = 1000
