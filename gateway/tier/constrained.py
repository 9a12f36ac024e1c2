"""
Answers that must fit a JSON schema.

llama-server's ``/v1/messages`` drops a schema, its chat endpoints enforce one only with some
templates, and what ``json_schema`` holds depends on what the server was built with.  A grammar of
ours is held by every llama-server and template; another server is trusted with as much as it says
that it holds, and what it answers is looked at (docs/protocol.md, "Schemas").

What is asked for is written for so many characters that an answer of usual text closes within its
tokens.  One that is cut off all the same is asked for once more, in a form that closes whatever the
tokens: an emoji may take four.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, Protocol, runtime_checkable

from attrs import evolve

from gateway.policy.shapes import AnyObject
from gateway.upstream import Completion
from gateway.wire import chat
from gateway.wire.errors import ApiError

if TYPE_CHECKING:
    from gateway.policy.schema import Form

Json = Any

#: Characters for which each token of the limit counts: the first time, and the second.
_CHARACTERS: Final = (2.0, 0.25)


@runtime_checkable
class Holding(Protocol):
    """A server whose answers can be held to a form."""

    async def held(
        self, body: Mapping[str, Json], form: Form, characters: int, tokens: int
    ) -> Completion:
        """
        One answer, held as far as the server can.

        Args:
            body: a prepared body.
            form: what the answer is held to.
            characters: how long it is meant to be.
            tokens: where it is cut off.
        """


async def complete(
    server: Holding, body: Mapping[str, Json], form: Form, tokens: int
) -> Completion:
    """
    An answer to `body` that has this form.

    Args:
        server: who is asked; the caller holds a permit for it.
        body: a prepared body.
        form: what the client's schema allows.
        tokens: how long the answer may be.

    Returns:
        One that fits; or, where not even the shortest one ends within `tokens`, its beginning.
        What it says of the prompt is what the first attempt found.

    Raises:
        ApiError: no attempt gave a fitting answer.
    """
    first: Completion | None = None
    for characters in _CHARACTERS:
        completion = await server.held(body, form, int(tokens * characters), tokens)
        if first is None:
            first = completion
        # The second attempt finds the prompt where the first has left it.
        completion = evolve(
            completion, evaluated=first.evaluated, cached=first.cached, prefill=first.prefill
        )
        if form.fits(completion.text):
            # Whole it is, also where the limit left no room for the sign that ends it.
            return evolve(completion, stopped="eos")
        if completion.stopped == "limit" and isinstance(form.shape, AnyObject):
            return completion  # its form would let it go on for ever once more
        # The second time with the server's own sampling: at temperature 0 nothing would change.
        body = {name: body[name] for name in body if name not in chat.SAMPLING}
    if completion.stopped == "limit":
        return completion
    raise ApiError(
        "api_error",
        f"The model gave no answer that fits the schema in {len(_CHARACTERS)} attempts.",
        should_retry=False,
    )
