"""
A server of the chat-completions API: mlx_lm.server, vLLM, llama-server's own, and others.

A request is said in the chat API's words (`gateway.wire.chat`), the stream that answers it in the
Messages API's (`gateway.wire.chunks`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import attrs

from gateway.policy import prefix
from gateway.policy.template import SWITCHES, Template
from gateway.remote.place import Place
from gateway.upstream import Answer
from gateway.wire import chat
from gateway.wire.chunks import Chunks
from gateway.wire.request import MessagesRequest

Json = Any

#: Its template is not known: a switch that it does not read does nothing.
_ANY_TEMPLATE: Final = Template(knows=tuple(SWITCHES), vision=True)

#: What a prompt depends on.
_COUNTED: Final = ("model", "messages", "tools", "tool_choice", "chat_template_kwargs")


@attrs.define(eq=False)
class OpenAI(Place):
    """One such server (`gateway.upstream.Remote`)."""

    is_verbatim: bool = False

    def prepare(self, request: MessagesRequest) -> dict[str, Json]:
        """Messages-shaped still, and what no chat server takes said in words."""
        body = prefix.prepare(request, _ANY_TEMPLATE)
        if request.schema is not None:
            wanted = {"type": "json_schema", "schema": request.schema}
            body["output_config"] = {"format": wanted}
        body["model"] = self.config.model or request.model
        return body

    def _asked(self, body: Mapping[str, Json]) -> dict[str, Json]:
        said = chat.request(body, strict=self.config.strict)
        return {"model": body["model"], **said}

    async def count_body(
        self,
        body: Mapping[str, Json],
        headers: Mapping[str, str] | None = None,  # noqa: ARG002  # they are another API's
    ) -> int | None:
        said = self._asked({"max_tokens": 1, **body})
        asked: dict[str, Json] = {name: said[name] for name in _COUNTED if name in said}
        # The first is llama-server's, the second vLLM's.
        return await self.count(
            "/v1/chat/completions/input_tokens", asked, "input_tokens"
        ) or await self.count("/tokenize", asked, "count")

    async def messages(
        self,
        body: Mapping[str, Json],
        headers: Mapping[str, str] | None = None,  # noqa: ARG002  # they are another API's
    ) -> Answer:
        answer = await self.send("/v1/chat/completions", self._asked(body))
        return attrs.evolve(answer, parser=Chunks())
