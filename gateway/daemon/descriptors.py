"""How many files the process may have open: as many as the connections that it lets in need."""

from __future__ import annotations

import resource
from typing import Any, Final

from twisted.internet.selectreactor import SelectReactor

#: What select(2) takes; it is Twisted's way on a Mac.
_SELECT: Final = 1024


def allow(wanted: int, reactor: Any) -> int:
    """
    See that so many files may be open, as far as that can be had.

    Returns:
        how many may be; more than `wanted` where that was so before.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    found = wanted if soft == resource.RLIM_INFINITY else soft
    return min(found, _SELECT) if isinstance(reactor, SelectReactor) else found
