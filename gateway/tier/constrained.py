"""
Answers that must fit a JSON schema.

llama-server's ``/v1/messages`` drops a schema, its chat endpoints enforce one only with some
templates, and what ``json_schema`` holds depends on what the server was built with.  A rendered
prompt sent to ``/completion`` with a grammar of ours is held by every server and template
(docs/protocol.md, "Schemas").

The grammar is written for so many characters that an answer of usual text closes within its tokens.
One that is cut off all the same is asked for once more, under a grammar that closes whatever the
tokens: an emoji may take four.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from attrs import evolve

from gateway.llama.client import Completion, LlamaClient
from gateway.policy import grammar
from gateway.policy.schema import Form
from gateway.policy.shapes import AnyObject
from gateway.wire import chat
from gateway.wire.errors import ApiError

Json = Any

#: Characters for which each token of the limit counts: the first time, and the second.
_CHARACTERS: Final = (2.0, 0.25)


async def complete(
    client: LlamaClient, body: Mapping[str, Json], form: Form, tokens: int
) -> Completion:
    """
    An answer to `body` that has this form.

    Args:
        client: the server to ask; the caller holds a permit for it.
        body: a prepared body.
        form: what the client's schema allows.
        tokens: how long the answer may be.

    Returns:
        One that fits; or, where not even the shortest one ends within `tokens`, its beginning.
        What it says of the prompt is what the first attempt found.

    Raises:
        ApiError: no attempt gave a fitting answer.
    """
    prompt = await client.apply_template(chat.from_messages(body))
    wanted = {"prompt": prompt, "n_predict": tokens, "cache_prompt": True, "stop": []}
    # The second time with the server's own sampling: at temperature 0 nothing would change.
    sampling = {key: body[key] for key in ("temperature", "top_p", "top_k") if key in body}
    first: Completion | None = None
    for characters in _CHARACTERS:
        written = grammar.write(form.shape, int(tokens * characters))
        completion = await client.complete(wanted | sampling | {"grammar": written})
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
            return completion  # its grammar would let it go on for ever once more
        sampling = {}
    if completion.stopped == "limit":
        return completion
    raise ApiError(
        "api_error",
        f"The model gave no answer that fits the schema in {len(_CHARACTERS)} attempts.",
        should_retry=False,
    )
