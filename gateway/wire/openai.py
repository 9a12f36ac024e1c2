"""
The OpenAI API: its requests as Messages requests (`gateway.wire.completions` answers them).

A chat call goes the way of every other call, so it becomes a Messages request first
(https://platform.openai.com/docs/api-reference/chat):

1. ``system`` and ``developer`` messages before the first turn are the system prompt; later ones
   stay where they are.
2. ``tool`` messages that follow each other are the results in one user message.
3. Without ``reasoning_effort`` the model thinks if it can, as llama-server has it by itself;
   ``none`` and ``minimal`` turn that off.
4. Without a bound the answer may be as long as there is room.
5. What would have to be left out of the answer is refused by name (``n``, ``logprobs``, audio);
   what only colours it (``seed``, penalties) is passed over where llama-server's Messages endpoint
   has no place for it.

A bare prompt (``/v1/completions``) is no conversation: `Bare` holds what llama-server's
``/completion`` gets, in a view that line, cache and ledger can work with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import attrs
import orjson

from gateway.wire.chat import AS_MANY_AS_FIT
from gateway.wire.checks import (
    Check,
    anything,
    by_type,
    each,
    fields,
    filled,
    integer,
    is_a,
    number,
    one_of,
    text_or,
    wrong,
)
from gateway.wire.completions import Chat, Text
from gateway.wire.errors import invalid
from gateway.wire.request import MessagesRequest, checked, load, not_too_deep

Json = Any

#: What a bare prompt gets where nobody says how much (the API's own default).
_FEW: Final = 16

#: Efforts that mean: do not think.
_THOUGHTLESS: Final = ("none", "minimal")

#: An object with any members, for a ``json_object``.
_ANY_OBJECT: Final = {"type": "object", "additionalProperties": True}

#: Sampling that a bare prompt may come with, as llama-server's ``/completion`` calls it too.
_PASSED_ON: Final = (
    *("temperature", "top_p", "top_k", "min_p", "seed", "logit_bias", "grammar"),
    *("presence_penalty", "frequency_penalty", "repeat_penalty"),
)


# --- what a chat call must be ---------------------------------------------------------------------


def _image_url(value: Json, path: str) -> None:
    fields({"url": filled})(value, path)
    url = value["url"]
    if url.startswith("data:") and _data(url) is None:
        raise wrong(f"{path}.url", "an https URL, or data:TYPE;base64,DATA")


def _data(url: str) -> tuple[str, str] | None:
    """The media type and the base64 of a data URL."""
    head, comma, data = url.removeprefix("data:").partition(",")
    media, *more = head.split(";")
    return (media, data) if comma and media and more[-1:] == ["base64"] else None


def _arguments(value: Json, path: str) -> None:
    is_a(str)(value, path)
    try:
        said = orjson.loads(value) if value.strip() else {}
    except ValueError:
        said = None
    if not isinstance(said, dict):
        raise wrong(path, "the JSON of an object")


def _by_role(known: Mapping[str, Check]) -> Check:
    def check(value: Json, path: str) -> None:
        fields({"role": one_of(*known)})(value, path)
        known[value["role"]](value, path)

    return check


_part = by_type(
    {
        "text": fields({"text": is_a(str)}),
        "refusal": fields({"refusal": is_a(str)}),
        "image_url": fields({"image_url": _image_url}),
    }
)
_content = text_or(each(_part))
_call = fields(
    {
        "id": filled,
        "type": one_of("function"),
        "function": fields({"name": filled, "arguments": _arguments}),
    }
)
_said = fields({"content": _content})
_message = _by_role(
    {
        "system": _said,
        "developer": _said,
        "user": _said,
        "assistant": fields(
            {}, {"content": _content, "tool_calls": each(_call), "reasoning_content": is_a(str)}
        ),
        "tool": fields({"tool_call_id": filled, "content": _content}),
    }
)
_tool = fields(
    {
        "type": one_of("function"),
        "function": fields({"name": filled}, {"description": is_a(str), "parameters": is_a(dict)}),
    }
)


def _tool_choice(value: Json, path: str) -> None:
    if isinstance(value, str):
        one_of("none", "auto", "required")(value, path)
    else:
        named = fields({"name": filled})
        fields({"type": one_of("function"), "function": named})(value, path)


def _response_format(value: Json, path: str) -> None:
    fields({"type": one_of("text", "json_object", "json_schema")})(value, path)
    if value["type"] == "json_schema":
        fields({"json_schema": fields({"schema": is_a(dict)})})(value, path)


def _stop(value: Json, path: str) -> None:
    if not isinstance(value, str):
        each(is_a(str))(value, path)


_SAMPLING: Final[Mapping[str, Check]] = {
    "temperature": number(0, 2),
    "top_p": number(0, 1),
    "stop": _stop,
    "max_tokens": integer(1),
    "stream": is_a(bool),
    "stream_options": fields({}, {"include_usage": is_a(bool)}),
}
_chat = fields(
    {"model": filled, "messages": each(_message)},
    {
        **_SAMPLING,
        "max_completion_tokens": integer(1),
        "tools": each(_tool),
        "tool_choice": _tool_choice,
        "parallel_tool_calls": is_a(bool),
        "response_format": _response_format,
        "reasoning_effort": one_of(*_THOUGHTLESS, "low", "medium", "high", "xhigh", "max"),
    },
)

#: What cannot be given -> the values that do not ask for it, and what to do without.
_NOT_HERE: Final[Mapping[str, tuple[tuple[Json, ...], str]]] = {
    "n": ((1,), "only one answer is given to a call; send several calls"),
    "best_of": ((1,), "only one answer is given to a call"),
    "logprobs": ((False,), "probabilities of tokens are not known here; leave it out"),
    "top_logprobs": ((0,), "probabilities of tokens are not known here; leave it out"),
    "logit_bias": (({},), "single tokens cannot be favoured here; leave it out"),
    "audio": ((), "answers are text here; leave it out"),
    "modalities": ((["text"],), "answers are text here; leave it out"),
    "functions": (([],), "say tools; functions are their older form"),
    "function_call": (("none",), "say tool_choice; function_call is its older form"),
    "web_search_options": ((), "nobody here can search the web; leave it out"),
    "echo": ((False,), "the prompt does not come back here; leave it out"),
    "suffix": (("",), "nothing is filled in here; leave it out"),
}


def _refuse(body: Mapping[str, Json], *allowed: str) -> None:
    """Refuse by name what cannot be given."""
    for name, (harmless, remedy) in _NOT_HERE.items():
        value = body.get(name)
        if value is None or name in allowed:
            continue
        # Python holds 0 and False to be the same.
        if not any(value == each and type(value) is type(each) for each in harmless):
            raise invalid(f"{name}: {remedy}")


# --- a chat call as a Messages request ------------------------------------------------------------


def read_chat(raw: bytes, created: int) -> tuple[MessagesRequest, Chat]:
    """
    The Messages request that a chat call is, and how it is answered.

    Args:
        raw: its body.
        created: the time, in seconds since 1970, that the answer says.

    Raises:
        ApiError: 400, with the path of the first mistake, or the name of what cannot be given.
    """
    body = load(raw)
    _chat(body, "")
    _refuse(body)
    request = checked(_messages_body(body), len(raw))
    return attrs.evolve(request, is_converted=True), Chat.to(body, created)


def _messages_body(body: Mapping[str, Json]) -> dict[str, Json]:
    system, messages = _turns(body["messages"])
    effort = body.get("reasoning_effort")
    config: dict[str, Json] = {}
    if effort is not None and effort not in _THOUGHTLESS:
        config["effort"] = effort
    schema = _schema(body.get("response_format") or {})
    if schema is not None:
        config["format"] = {"type": "json_schema", "schema": schema}
    found: dict[str, Json] = {
        "model": body["model"],
        "messages": messages,
        "system": [{"type": "text", "text": text} for text in system] or None,
        "max_tokens": body.get("max_completion_tokens") or body.get("max_tokens") or AS_MANY_AS_FIT,
        "stream": body.get("stream"),
        "stop_sequences": _stops(body) or None,
        "thinking": {"type": "disabled" if effort in _THOUGHTLESS else "adaptive"},
        "output_config": config or None,
        **_tools(body),
    }
    user = body.get("prompt_cache_key") or body.get("user")
    if isinstance(user, str):
        found["metadata"] = {"user_id": user}
    for name in ("temperature", "top_p", "top_k", "chat_template_kwargs"):
        found[name] = body.get(name)
    return {name: value for name, value in found.items() if value is not None}


def _turns(messages: Sequence[Json]) -> tuple[list[str], list[Json]]:
    """The texts of the system prompt, and the conversation: rules 1 and 2."""
    system: list[str] = []
    turns: list[Json] = []
    before = ""
    for message in messages:
        role, content = message["role"], message.get("content") or ""
        match role:
            case "system" | "developer":
                text = content if isinstance(content, str) else "".join(map(_words, content))
                if turns:
                    turns.append({"role": "system", "content": text})
                else:
                    system.append(text)
            case "user":
                turns.append({"role": "user", "content": _blocks(content)})
            case "assistant":
                blocks = [*_thought(message), *_filled(_blocks(content)), *_calls(message)]
                if blocks:
                    turns.append({"role": "assistant", "content": blocks})
            case _:
                if before != "tool":
                    turns.append({"role": "user", "content": []})
                identity = message["tool_call_id"]
                result = {"type": "tool_result", "tool_use_id": identity}
                turns[-1]["content"].append({**result, "content": _blocks(content)})
        before = role
    return system, turns


def _blocks(content: str | list[Json]) -> list[Json]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [_block(part) for part in content]


def _filled(blocks: list[Json]) -> list[Json]:
    return [block for block in blocks if block.get("text") != ""]


def _block(part: Json) -> Json:
    """A part of a message as a block; what is neither text nor an image passes as it is."""
    match part["type"]:
        case "text" | "refusal":
            return {"type": "text", "text": _words(part)}
        case "image_url":
            url = part["image_url"]["url"]
            data = _data(url) if url.startswith("data:") else None
            if data is None:
                return {"type": "image", "source": {"type": "url", "url": url}}
            source = {"type": "base64", "media_type": data[0], "data": data[1]}
            return {"type": "image", "source": source}
        case kind:
            return {**part, "type": f"openai:{kind}"}


def _words(part: Json) -> str:
    return str(part.get(part["type"], "")) if part["type"] in ("text", "refusal") else ""


def _thought(message: Json) -> list[Json]:
    thought = message.get("reasoning_content")
    return [{"type": "thinking", "thinking": thought, "signature": ""}] if thought else []


def _calls(message: Json) -> Iterator[Json]:
    for call in message.get("tool_calls") or ():
        function = call["function"]
        given = orjson.loads(function["arguments"]) if function["arguments"].strip() else {}
        yield {"type": "tool_use", "id": call["id"], "name": function["name"], "input": given}


def _tools(body: Mapping[str, Json]) -> dict[str, Json]:
    functions = [tool["function"] for tool in body.get("tools") or ()]
    if not functions:
        return {}
    tools = [
        {
            "name": function["name"],
            "description": function.get("description") or "",
            "input_schema": function.get("parameters") or {"type": "object", "properties": {}},
        }
        for function in functions
    ]
    wanted = body.get("tool_choice") or "auto"
    choice: dict[str, Json]
    if isinstance(wanted, str):
        choice = {"type": {"required": "any"}.get(wanted, wanted)}
    else:
        choice = {"type": "tool", "name": wanted["function"]["name"]}
    if body.get("parallel_tool_calls") is False:
        choice["disable_parallel_tool_use"] = True
    return {"tools": tools, "tool_choice": choice}


def _schema(wanted: Mapping[str, Json]) -> Mapping[str, Json] | None:
    match wanted.get("type"):
        case "json_schema":
            return wanted["json_schema"]["schema"]  # type: ignore[no-any-return]  # checked
        case "json_object":
            return _ANY_OBJECT
        case _:
            return None


def _stops(body: Mapping[str, Json]) -> list[str]:
    stop = body.get("stop") or []
    return [each for each in ([stop] if isinstance(stop, str) else stop) if each]


# --- a bare prompt --------------------------------------------------------------------------------


@attrs.frozen
class Bare(MessagesRequest):
    """
    What is no conversation, in the place of a Messages request: its only message is the input.

    Attributes:
        prepared: of a prompt, what the rooms on the way work with: the ``prompt``, what
            llama-server's ``/completion`` gets beside it, ``messages`` and ``max_tokens``; of a
            call for embeddings, its own body.
    """

    prepared: Mapping[str, Json]


def _prompt(value: Json, path: str) -> None:
    if not isinstance(value, str) and not _is_tokens(value):
        one = isinstance(value, list) and len(value) == 1
        if not one or not (isinstance(value[0], str) or _is_tokens(value[0])):
            raise wrong(path, "one prompt: a string or a list of tokens")


def _is_tokens(value: Json) -> bool:
    return isinstance(value, list) and value != [] and all(type(each) is int for each in value)


_completion = fields({"model": filled, "prompt": _prompt}, _SAMPLING)


def read_completion(raw: bytes, created: int) -> tuple[Bare, Text]:
    """As `read_chat`, for a bare prompt."""
    body = load(raw)
    _completion(body, "")
    _refuse(body, "logit_bias")
    prompt = body["prompt"]
    if isinstance(prompt, list) and not _is_tokens(prompt):
        (prompt,) = prompt
    prepared = {
        "prompt": prompt,
        "messages": _only("prompt", prompt),
        "max_tokens": body.get("max_tokens") or _FEW,
        "stop": _stops(body),
        **{name: body[name] for name in _PASSED_ON if body.get(name) is not None},
    }
    not_too_deep(prepared)
    view = {**prepared, "model": body["model"], "stream": body.get("stream")}
    return Bare(view, len(raw), prepared), Text.to(body, created)


def read_embedding(raw: bytes) -> Bare:
    """As `read_chat`, for a call for embeddings, whose body goes to the server as it is."""
    body = load(raw)
    fields({"model": filled, "input": anything})(body, "")
    not_too_deep(body)
    view = {"model": body["model"], "messages": _only("input", body["input"])}
    return Bare(view, len(raw), body)


def _only(role: str, said: Json) -> list[Json]:
    """A conversation that holds this alone."""
    text = said if isinstance(said, str) else orjson.dumps(said).decode()
    return [{"role": role, "content": [{"type": "text", "text": text}]}]
