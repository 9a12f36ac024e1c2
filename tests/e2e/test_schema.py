"""Answers under a schema, from real servers: each fits, none is cut off."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import orjson
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from jsonschema import Draft202012Validator

from gateway.policy.schema import read
from tests.e2e.stack import TIER_KINDS, Running
from tests.schemas import answers

#: Random schemas that each tier of a kind is asked to answer under; `bench.schemas` asks for more.
MANY: Final = {"llama-server": 40, "openai": 20}

EVERY_KIND: Final[dict[str, Any]] = {
    "type": "object",
    "properties": {
        "title": {"type": "string"},
        "files": {"type": "array", "items": {"type": "string"}},
        "colour": {"enum": ["red", "green"]},
        "share": {"type": "number", "minimum": 0, "maximum": 1},
        "day": {"type": "string", "format": "date"},
        "hash": {"type": "string", "pattern": "^[0-9a-f]{7}$"},
        "value": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "steps": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"name": {"type": "string"}, "n": {"type": "integer"}},
                "required": ["name", "n"],
            },
        },
    },
    "required": ["title", "files", "colour", "share", "day", "hash", "value", "steps"],
    "additionalProperties": False,
}


def told(gateway: Running, tier: str, schema: Any, max_tokens: int) -> str:
    """The text of an answer that was not cut off."""
    body = {
        "model": f"claudegw-{tier}",
        "max_tokens": max_tokens,
        "output_config": {"format": {"type": "json_schema", "schema": schema}},
        "messages": [{"role": "user", "content": "Name this session: mend the login page."}],
    }
    status, message = gateway.ask("/v1/messages", body)
    assert status == 200, message
    (block,) = message["content"]
    assert message["stop_reason"] == "end_turn", block
    assert message["usage"]["output_tokens"] <= max_tokens
    return str(block["text"])


@pytest.mark.server
@pytest.mark.parametrize("kind", TIER_KINDS, indirect=True, scope="module")
@pytest.mark.parametrize("tier", ["small", "main"])
def test_the_answer_fits(gateway: Running, tier: str, kind: str) -> None:
    """Whatever a tiny model would rather say, the answer is JSON of the wanted shape."""
    # The chat endpoint gets the same grammar, so that a short answer will do.
    text = told(gateway, tier, EVERY_KIND, 400 if kind == "openai" else 32_000)
    Draft202012Validator(EVERY_KIND).validate(orjson.loads(text))


@pytest.mark.server
@pytest.mark.parametrize("kind", MANY, indirect=True, scope="module")
def test_random_schemas_are_held_to(gateway: Running, kind: str) -> None:
    """Random schemas, on both tiers at once: each answer fits, none is cut off."""
    asked = 0
    with ThreadPoolExecutor(2) as threads:

        @settings(
            max_examples=MANY[kind],
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(answers())
        def hold(schema: Any) -> None:
            nonlocal asked
            validator = Draft202012Validator(schema)
            tokens = max(160, 4 * read(schema).shape.shortest)  # a character may take four
            tiers = ("small", "main")
            for text in threads.map(lambda tier: told(gateway, tier, schema, tokens), tiers):
                validator.validate(orjson.loads(text))
                asked += 1

        hold()
    assert asked >= 2 * MANY[kind]
