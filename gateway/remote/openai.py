"""
A server of the chat-completions API: mlx_lm.server, vLLM, llama-server's own, and others.

A request is said in the chat API's words (`gateway.wire.chat`), the stream that answers it in the
Messages API's (`gateway.wire.chunks`).

A llama-server is known by its list of models.  It gets a grammar of ours in the place of a schema:
of its own it holds no bounds of fractions, and lets words go on for ever.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import attrs

from gateway.policy import grammar, prefix
from gateway.policy.bounded import bounded
from gateway.policy.template import SWITCHES, Template
from gateway.remote.place import Place, listed
from gateway.upstream import Answer, Completion
from gateway.wire import chat
from gateway.wire.chunks import Chunks
from gateway.wire.errors import ApiError
from gateway.wire.events import Assembly, Repair
from gateway.wire.request import MessagesRequest
from gateway.wire.sse import EventTooLong

if TYPE_CHECKING:
    from gateway.policy.schema import Form

Json = Any

#: Its template is not known: a switch that it does not read does nothing.
_ANY_TEMPLATE: Final = Template(knows=tuple(SWITCHES), vision=True)

#: Whose models a llama-server's are.
_LLAMA: Final = "llamacpp"

#: What a prompt depends on.
_COUNTED: Final = ("model", "messages", "tools", "tool_choice", "chat_template_kwargs")


@attrs.define(eq=False)
class OpenAI(Place):
    """One such server (`gateway.upstream.Remote`)."""

    is_verbatim: bool = False
    _takes_grammar: bool = attrs.field(default=False, init=False)

    async def _models(self) -> Json:
        said = await super()._models()
        is_llama = listed(said, None).get("owned_by") == _LLAMA  # whatever name we call it by
        self._takes_grammar = is_llama and not self.config.strict
        return said

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
        if self._takes_grammar:
            said.pop("response_format", None)
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

    async def held(
        self, body: Mapping[str, Json], form: Form, characters: int, tokens: int
    ) -> Completion:
        """
        One answer, by a grammar where the server takes one, else by the schema.

        Args:
            body: a prepared body.
            form: what the answer is held to.
            characters: how long it is meant to be.
            tokens: where it is cut off.

        Raises:
            ApiError: the server cannot be reached, refuses, or sends what is no answer.
            Lost: it went away.
            Truncated: its answer did.
        """
        asked = self._asked({**body, "max_tokens": tokens})
        asked.pop("stop", None)  # its form alone ends it
        if "tools" in asked:
            asked["tool_choice"] = "none"  # which leaves them in the prompt
        if self._takes_grammar:
            asked["grammar"] = grammar.write(form.shape, characters)
        elif not self.config.strict:  # OpenAI's own refuses some bounds
            asked["response_format"] = chat.response_format(bounded(form.schema, characters))
        return await self._whole(asked)

    async def _whole(self, asked: Mapping[str, Json]) -> Completion:
        """All that is answered to a chat-shaped body."""
        began = self._seconds()
        answer = await self.send("/v1/chat/completions", asked)
        chunks, repair, assembly = Chunks(), Repair("", "", self.tier), Assembly()
        first: float | None = None

        def receive(data: bytes) -> None:
            nonlocal first
            try:
                for event in chunks.feed(data):
                    assembly.add(repair.feed(event))
            except EventTooLong as error:
                raise ApiError("api_error", f"The model server sent {error}.") from None
            if first is None and repair.has_content:
                first = self._seconds()

        await answer.stream(receive)
        assembly.add(repair.end())
        ended, message, usage = self._seconds(), assembly.message(), repair.usage
        said = {"text": "", "thinking": ""}
        for block in message["content"]:
            if block["type"] in said:
                said[block["type"]] += block[block["type"]]
        first = ended if first is None else first
        return Completion(
            # Some templates make a server take all that is said for thoughts.
            text=said["text"] or said["thinking"],
            stopped="limit" if message["stop_reason"] == "max_tokens" else "eos",
            evaluated=usage.input or 0,
            cached=usage.cached,
            generated=usage.output,
            prefill=first - began,
            generation=ended - first,
        )
