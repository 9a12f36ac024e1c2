"""Every endpoint of a llama-server that we use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Final

import attrs
from twisted.internet.interfaces import IReactorTime
from twisted.web.iweb import IAgent

from gateway.connection import agent_for
from gateway.policy import grammar
from gateway.policy.template import Template
from gateway.upstream import Answer, Completion, Health, Props, Upstream
from gateway.wire import bare, chat
from gateway.wire.errors import ApiError, from_upstream

if TYPE_CHECKING:
    from gateway.policy.schema import Form

Json = Any

#: Seconds that the saving or restoring of a slot may take; a state may have tens of gigabytes.
SLOT_PATIENCE: Final = 600.0


@attrs.frozen
class Moved:
    """
    A slot's state that was saved or restored.

    Attributes:
        tokens: that it holds; 0 for a slot that held none.
        size: bytes of its file.
        seconds: what it took the server.
    """

    tokens: int
    size: int
    seconds: float


@attrs.define(eq=False)
class LlamaClient:
    """
    One llama-server, asked.

    Attributes:
        tier: the name of its tier, for the wording of errors.
        url: where it listens, as in the configuration.
    """

    tier: str
    url: str
    _upstream: Upstream

    @classmethod
    def at(cls, reactor: Any, tier: str, url: str, api_key: str | None) -> LlamaClient:
        """The client of the server at `url`."""
        return cls.over(reactor, tier, url, api_key, agent_for(reactor, url))

    @classmethod
    def over(
        cls, reactor: IReactorTime, tier: str, url: str, api_key: str | None, agent: IAgent
    ) -> LlamaClient:
        """As `at`, over an agent that is there already."""
        headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
        refusal = partial(_refusal, tier)
        return cls(tier, url, Upstream.over(reactor, agent, tier, url, refusal, headers))

    def hang_up(self) -> None:
        """The server will not answer any more: what waits for an answer fails with `Lost`."""
        self._upstream.hang_up()

    async def props(self) -> Props:
        """What the server says of itself.  Raises ApiError while it is down or loading."""
        said = await self._upstream.ask("GET", "/props")
        with self._understood():
            text = str(said.get("chat_template") or "")
            return Props(
                n_ctx=int(said["default_generation_settings"]["n_ctx"]),
                slots=int(said["total_slots"]),
                alias=str(said.get("model_alias") or said.get("model_path") or ""),
                build=str(said.get("build_info", "")),
                template=Template.of(text, vision=bool(said.get("modalities", {}).get("vision"))),
                template_digest=blake2b(text.encode(), digest_size=16).hexdigest(),
                model_path=str(said.get("model_path") or ""),
            )

    async def health(self) -> Health:
        """How the server is (``GET /health``, which a thread of its own answers)."""
        said = await self._upstream.status("/health")
        return {200: Health.READY, 503: Health.LOADING}.get(said or 0, Health.DOWN)

    async def busy_slots(self) -> int:
        """
        How many slots work.

        Ask at most every 2 s: each answer restarts the second after which llama-server looks
        whether the clients of its other calls are still there.
        """
        with self._understood():
            return sum(bool(slot["is_processing"]) for slot in await self.slots())

    async def slots(self) -> Sequence[Mapping[str, Json]]:
        """What ``GET /slots`` says of each slot; ask as seldom as for `busy_slots`."""
        said = await self._upstream.ask("GET", "/slots")
        if not isinstance(said, list):
            raise self._no_llama()
        return said

    async def apply_template(self, chat: Mapping[str, Json]) -> str:
        """The prompt that a chat-shaped body renders to."""
        said = await self._upstream.ask("POST", "/apply-template", chat)
        with self._understood():
            return str(said["prompt"])

    async def count(self, prompt: str) -> int:
        """The tokens of a rendered prompt, tokenized as a completion's prompt is."""
        wanted = {"content": prompt, "add_special": True, "parse_special": True}
        said = await self._upstream.ask("POST", "/tokenize", wanted)
        with self._understood():
            return len(said["tokens"])

    async def count_tokens(self, body: Mapping[str, Json]) -> int:
        """The server's own count of a Messages-shaped body."""
        said = await self._upstream.ask("POST", "/v1/messages/count_tokens", body)
        with self._understood():
            return int(said["input_tokens"])

    async def count_body(
        self,
        body: Mapping[str, Json],
        headers: Mapping[str, str] | None = None,  # noqa: ARG002  # it reads none
    ) -> int:
        """
        The tokens of the prompt that `body`, a prepared one, renders to.

        It is rendered by ``/apply-template`` and counted by ``/tokenize``.  Where that cannot be
        done (an image, which becomes tokens elsewhere; a server without ``/apply-template``) the
        server's own count is taken.
        """
        if bare.is_meant(body):
            prompt = body["prompt"]
            return len(prompt) if isinstance(prompt, list) else await self.count(prompt)
        asked = chat.from_messages(body)
        if _has_image(asked):
            return await self.count_tokens(body)
        try:
            prompt = await self.apply_template(asked)
        except ApiError as error:
            if error.status != 502:  # no such endpoint
                raise
            return await self.count_tokens(body)
        return await self.count(prompt)

    async def messages(
        self,
        body: Mapping[str, Json],
        headers: Mapping[str, str] | None = None,  # noqa: ARG002  # it heeds none
    ) -> Answer:
        """
        Send a call, to be streamed: a Messages call, or a bare prompt (`gateway.wire.bare`).

        Raises:
            ApiError: the server cannot be reached, or refuses.
            Lost: it went away before it answered.
        """
        if bare.is_meant(body):
            answer = await self._streamed("/completion", bare.completion(body))
            return attrs.evolve(answer, parser=bare.Continuation())
        return await self._streamed("/v1/messages", body)

    async def embeddings(self, body: Mapping[str, Json]) -> dict[str, Json]:
        """What the server says to a body of ``/v1/embeddings``; raises as `messages` does."""
        answer = await self._upstream.request("POST", "/v1/embeddings", body)
        said = await self._upstream.json(answer)
        if not isinstance(said, dict):
            raise self._no_llama()
        return said

    async def complete(self, wanted: Mapping[str, Json]) -> Completion:
        """The answer to a bare prompt (``POST /completion``, not streamed)."""
        answer = await self._upstream.request("POST", "/completion", wanted)
        said = await self._upstream.json(answer)
        with self._understood():
            timings = said.get("timings", {})
            return Completion(
                text=str(said["content"]),
                stopped=str(said.get("stop_type", "")),
                evaluated=int(timings.get("prompt_n", said.get("tokens_evaluated", 0))),
                cached=int(timings.get("cache_n", 0)),
                generated=int(said.get("tokens_predicted", 0)),
                prefill=float(timings.get("prompt_ms", 0)) / 1000,
                generation=float(timings.get("predicted_ms", 0)) / 1000,
            )

    async def held(
        self, body: Mapping[str, Json], form: Form, characters: int, tokens: int
    ) -> Completion:
        """
        One answer under the grammar of `form`, to a prompt that is rendered here.

        Args:
            body: a prepared body.
            form: what the answer is held to.
            characters: how long the grammar lets it be.
            tokens: where it is cut off.
        """
        wanted = {
            "prompt": await self.apply_template(chat.from_messages(body)),
            "grammar": grammar.write(form.shape, characters),
            "n_predict": tokens,
            "cache_prompt": True,
            "stop": [],
        }
        sampling = {name: body[name] for name in chat.SAMPLING if name in body}
        return await self.complete(wanted | sampling)

    async def save_slot(self, slot: int, filename: str) -> Moved:
        """
        Write a slot's state to a file in the server's ``--slot-save-path``.

        A slot that works is saved when it is done, and the server answers nobody else meanwhile:
        hold its permit.  Cancelling this hangs up; the server writes on.  Raises ApiError: 501
        without a folder, 400 for a name with separators.
        """
        said = await self._slot(slot, "save", {"filename": filename})
        with self._understood():
            seconds = float(said["timings"]["save_ms"]) / 1000
            return Moved(int(said["n_saved"]), int(said["n_written"]), seconds)

    async def restore_slot(self, slot: int, filename: str) -> Moved:
        """
        Read a slot's state from a file that `save_slot` wrote; hold its permit, likewise.

        Raises ApiError (400) where the server cannot read the file; the slot is empty then.
        """
        said = await self._slot(slot, "restore", {"filename": filename})
        with self._understood():
            seconds = float(said["timings"]["restore_ms"]) / 1000
            return Moved(int(said["n_restored"]), int(said["n_read"]), seconds)

    async def _streamed(self, path: str, body: Mapping[str, Json]) -> Answer:
        answer = await self._upstream.request("POST", path, {**body, "stream": True})
        if answer.status != 200:
            raise self._upstream.refusal(answer, await answer.read())
        return answer

    async def _slot(self, slot: int, action: str, wanted: Mapping[str, Json]) -> Json:
        path = f"/slots/{slot}?action={action}"
        return await self._upstream.ask("POST", path, wanted, patience=SLOT_PATIENCE)

    @contextmanager
    def _understood(self) -> Iterator[None]:
        """What is made of an answer; raises ApiError where it is none of a llama-server."""
        try:
            yield
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError):
            raise self._no_llama() from None

    def _no_llama(self) -> ApiError:
        return ApiError(
            "api_error",
            f"What listens at {self.url} (tier {self.tier!r}) is no llama-server.",
            status=502,
            should_retry=False,
        )


def _refusal(tier: str, answer: Answer, body: bytes) -> ApiError:
    return from_upstream(answer.status, body, tier)


def _has_image(asked: Mapping[str, Json]) -> bool:
    return any(
        part["type"] == "image_url"
        for message in asked["messages"]
        if isinstance(message.get("content"), list)
        for part in message["content"]
    )
