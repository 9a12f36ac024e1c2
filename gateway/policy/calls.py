"""
What kind of call this is, and of which conversation.

Behind a gateway Claude Code names most of its side calls after the main model, so the shape decides
(docs/protocol.md, "What a call is").  A kind other than ``turn`` and ``other`` needs the client's
own marks: anybody else's call, whatever it looks like, is a ``turn``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal, get_args

import attrs

from gateway.wire.request import MessagesRequest

Kind = Literal["turn", "subagent", "title", "hook", "other"]
KINDS: Final[tuple[str, ...]] = get_args(Kind)

#: Parts of the names under which Claude Code asks for the small model: its own, and the one that
#: `claudegw settings` gives it.
_SMALL_NAMES: Final = ("haiku", "claudegw-small")

#: Kinds that are housekeeping: nobody reads their answers, and they go to the small tier.
HOUSEKEEPING: Final = frozenset({"title", "hook", "other"})


@attrs.frozen
class Call:
    """
    One call, understood.

    Attributes:
        kind: one of `KINDS`.
        why: the mark that decided, for the log.
        from_claude_code: whether the client is Claude Code.
        session: Claude Code's id of the session, or "".
        agent: Claude Code's id of the subagent, or "".
    """

    kind: Kind
    why: str
    from_claude_code: bool = False
    session: str = ""
    agent: str = ""

    @property
    def is_housekeeping(self) -> bool:
        return self.kind in HOUSEKEEPING


def understand(request: MessagesRequest, headers: Mapping[str, str]) -> Call:
    """
    The call that `request` is.

    Args:
        request: a checked request.
        headers: the request's headers, names in lower case.
    """
    ours = headers.get("user-agent", "").startswith("claude-cli/")
    session = headers.get("x-claude-code-session-id", "")
    agent = headers.get("x-claude-code-agent-id", "")
    kind, why = _kind(request, agent) if ours else ("turn", "not Claude Code")
    return Call(kind, why, ours, session, agent)


def names_small(model: str) -> bool:
    """Whether this is a name of the small model."""
    lowered = model.lower()
    return any(part in lowered for part in _SMALL_NAMES)


def _kind(request: MessagesRequest, agent: str) -> tuple[Kind, str]:
    if request.schema is not None and not request.tools:
        properties = request.schema.get("properties")
        names = properties.keys() if isinstance(properties, dict) else ()
        if "title" in names:
            return "title", "a schema with a title and no tools"
        if "ok" in names:
            return "hook", "a schema with a verdict and no tools"
        return "other", "a schema and no tools"
    if names_small(request.model) and not request.tools:
        return "other", "the name of the small model and no tools"
    if agent:
        return "subagent", "an agent id"
    return "turn", "no mark of a side call"
