"""
Random schemas, asked of both tiers: how many answers fit, how long they take.

``python -m bench.schemas [--many N] [--seed S] [--kind KIND] [--minutes M]`` starts the embedded
servers and a gateway whose tiers are of this kind, draws N schemas of the supported kind
(`tests.schemas`) and asks each tier for an answer of 160 tokens under each of them, or four for
each character of its shortest one.  After M minutes no further one is asked for.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import takewhile
from pathlib import Path
from statistics import quantiles
from typing import Any

import orjson
from hypothesis import HealthCheck, Phase, given, seed, settings
from jsonschema import Draft202012Validator

from gateway.policy.schema import read
from tests.e2e.stack import GEMMA, SMOLLM, TIER_KINDS, Running, gateway_of_kind, start_server
from tests.schemas import answers

TOKENS = 160


def drawn(many: int, number: int) -> list[Any]:
    """So many random schemas, the same for the same seed."""
    found: list[Any] = []

    @seed(number)
    @settings(
        max_examples=many,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(answers())
    def draw(schema: Any) -> None:
        found.append(schema)

    draw()
    return found


def asked(gateway: Running, tier: str, schema: Any) -> tuple[str, float]:
    """What became of one question, and its seconds."""
    body = {
        "model": f"claudegw-{tier}",
        # An answer whose shortest form is longer cannot be had in fewer; a character may take four.
        "max_tokens": max(TOKENS, 4 * read(schema).shape.shortest),
        "output_config": {"format": {"type": "json_schema", "schema": schema}},
        "messages": [{"role": "user", "content": "Name this session: mend the login page."}],
    }
    began = time.monotonic()
    status, message = gateway.ask("/v1/messages", body)
    took = time.monotonic() - began
    if status != 200:
        return f"{status}: {message['error']['message']}", took
    if message["stop_reason"] != "end_turn":
        return "cut off", took
    value = orjson.loads(message["content"][0]["text"])
    return "fits" if Draft202012Validator(schema).is_valid(value) else "does not fit", took


def main() -> int:
    """Print a row a tier; 0 where every answer fits."""
    options = argparse.ArgumentParser(prog="python -m bench.schemas")
    options.add_argument("--many", type=int, default=300)
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--kind", choices=TIER_KINDS, default=TIER_KINDS[0])
    options.add_argument("--minutes", type=float, default=60)
    chosen = options.parse_args()
    schemas = drawn(chosen.many, chosen.seed)
    folder = Path(tempfile.mkdtemp(prefix="claudegw-schemas-"))
    servers = {
        "main": start_server(folder, "main", *GEMMA, "--ctx-size", "32768"),
        "small": start_server(folder, "small", *SMOLLM, "--ctx-size", "8192", "--parallel", "2"),
    }
    tiers = {name: {"url": server.url, "slots": 1} for name, server in servers.items()}
    all_fit = True
    try:
        with (
            gateway_of_kind(chosen.kind, folder, tiers) as gateway,
            ThreadPoolExecutor(len(tiers)) as threads,
        ):

            def row(tier: str) -> str:
                nonlocal all_fit
                end = time.monotonic() + chosen.minutes * 60
                in_time = takewhile(lambda _: time.monotonic() < end, schemas)
                found = [asked(gateway, tier, schema) for schema in in_time]
                outcomes = [outcome for outcome, _ in found]
                all_fit &= set(outcomes) == {"fits"}
                counts = {outcome: outcomes.count(outcome) for outcome in dict.fromkeys(outcomes)}
                cuts = quantiles([seconds for _, seconds in found], n=20)
                total = sum(seconds for _, seconds in found)
                spread = f"p50 {cuts[9]:.2f} s, p95 {cuts[18]:.2f} s, {total:.0f} s in all"
                return f"{tier}: {len(found)} asked, {counts}; {spread}"

            for line in threads.map(row, tiers):
                print(line, flush=True)
    finally:
        for running in servers.values():
            running.stop()
    return 0 if all_fit else 1


if __name__ == "__main__":
    sys.exit(main())
