"""
A server of the Messages API: another claudegw, vLLM, Ollama, LM Studio, a cloud.

It gets what the client sent, ``cache_control``, system prompt and betas included; only the model's
name may be another, and the answer is always asked for as a stream.  A call that came in another
API's words is said as such servers insist on it: a system message inside the conversation is a
reminder of the user's turn, nobody signed its thoughts, and it thinks only where its client said
how much.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import attrs

from gateway.policy import prefix
from gateway.policy.template import Template
from gateway.remote.headers import passed_on
from gateway.remote.place import Place
from gateway.upstream import Answer
from gateway.wire.request import MessagesRequest

Json = Any

#: What no count depends on; servers refuse it there.
_UNCOUNTED: Final = frozenset(
    ("max_tokens", "stream", "temperature", "top_p", "top_k", "stop_sequences", "metadata")
)


@attrs.define(eq=False)
class Anthropic(Place):
    """One such server (`gateway.upstream.Remote`)."""

    is_verbatim: bool = True

    def prepare(self, request: MessagesRequest) -> dict[str, Json]:
        body = _converted(request) if request.is_converted else dict(request.body)
        if self.config.model:
            body["model"] = self.config.model
        return body

    async def count_body(
        self, body: Mapping[str, Json], headers: Mapping[str, str] | None = None
    ) -> int | None:
        asked = {name: body[name] for name in body if name not in _UNCOUNTED}
        return await self.count(
            "/v1/messages/count_tokens", asked, "input_tokens", passed_on(headers or {})
        )

    async def messages(
        self, body: Mapping[str, Json], headers: Mapping[str, str] | None = None
    ) -> Answer:
        asked = {**body, "stream": True}
        return await self.send("/v1/messages", asked, passed_on(headers or {}))


def _converted(request: MessagesRequest) -> dict[str, Json]:
    """The body of a request that came in another API's words."""
    said = prefix.prepare(request, Template(vision=True))
    body = dict(request.body)
    body.pop("chat_template_kwargs", None)
    thinking = body.pop("thinking", {})
    if thinking.get("type") == "disabled" or "effort" in body.get("output_config", {}):
        body["thinking"] = thinking
    if "temperature" in body:
        body["temperature"] = min(body["temperature"], 1)
    messages = [
        {**message, "content": [each for each in message["content"] if each["type"] != "thinking"]}
        for message in said["messages"]
    ]
    body["messages"] = [message for message in messages if message["content"]]
    if "system" in said:
        body["system"] = said["system"]
    return body
