"""
An afternoon at a gateway, invented: what ``/status`` and the ledger's chart could say of it.

`Scene` stands where the dispatch stands, behind the real page; a test changes what it says.
"""

from __future__ import annotations

import math
import time
from typing import Any, Final

import attrs

Json = Any

#: Seconds of a bucket of the chart, and how many there are.
_BUCKET: Final = 300
_BUCKETS: Final = 72


def call(number: int, **more: Any) -> dict[str, Json]:
    """A call that has been answered."""
    return {
        "id": f"req_{number:032x}",
        "at": time.time() - 60 * number,
        "kind": "turn",
        "model": "claudegw-main",
        "tier": "main",
        "rule": "turn: its tools and its system prompt",
        "background": False,
        "waited": 0.0,
        "took": 21.3,
        "first": 2.1,
        "resent": 0,
        "input": 211,
        "cached": 31420,
        "output": 187,
        "cold": None,
        "outcome": "answered",
        "progress": None,
        "place": None,
        "eta": None,
        "why": "",
        **more,
    }


def small(number: int, kind: str, **more: Any) -> dict[str, Json]:
    """A call to the small tier."""
    words = {"tier": "small", "kind": kind, "rule": f"{kind}: the shape of its prompt"}
    numbers = {"took": 0.9, "first": 0.3, "input": 402, "cached": 0, "output": 14}
    return call(number, **{**words, **numbers, **more})


def status() -> dict[str, Json]:
    """A prefill, three who wait, a server that loads again, and what was before."""
    rewritten = {
        "cached": 8214,
        "should_have": 30120,
        "avoidable": 0,
        "rewritten": 21906,
        "sentence": "about 21906 tokens of its past were written anew: messages[4] (user) is"
        " another one from about character 128 on",
    }
    lost = {
        "cached": 0,
        "should_have": 13210,
        "avoidable": 13210,
        "rewritten": 0,
        "sentence": "about 13210 tokens that had been evaluated before were no longer held",
    }
    waiting = {"outcome": "waiting", "input": None, "first": None, "output": 0, "took": 0.0}
    return {
        "tiers": {
            "main": {
                "server": {"alias": "/models/GLM-5-IQ2_XXS.gguf", "n_ctx": 65536, "slots": 1},
                "slots": 1,
                "running": 1,
                "settling": 0,
                "waiting": 3,
                "pace": {"prefill": 73.8, "generation": 10.4},
                "cache": {
                    "prefilled_tokens_total": 214_310,
                    "cached_tokens_total": 1_902_110,
                    "model_kind": "plain",
                    "saves": True,
                    "snapshots": 6,
                    "snapshot_bytes": 19_400_000_000,
                    "moves": False,
                    "advice": [],
                },
                "process": {"state": "ready", "for": 18_211.0, "reason": None},
                "refused": [],
            },
            "small": {
                "server": {"alias": "/models/Qwen3-1.7B-Q8_0.gguf", "n_ctx": 32768, "slots": 2},
                "slots": 2,
                "running": 0,
                "settling": 0,
                "waiting": 0,
                "pace": {"prefill": 2140.0, "generation": 121.0},
                "cache": {
                    "prefilled_tokens_total": 40_211,
                    "cached_tokens_total": 8_110,
                    "model_kind": None,
                    "saves": False,
                    "snapshots": 0,
                    "snapshot_bytes": 0,
                    "moves": False,
                    "advice": [],
                },
                "process": {
                    "state": "loading",
                    "for": 4.2,
                    "reason": "it loads its model",
                },
                "refused": [],
            },
        },
        "calls": [
            call(
                1,
                outcome="running",
                took=171.2,
                waited=0.4,
                first=None,
                output=0,
                progress={
                    "done": 12288,
                    "total": 25031,
                    "fraction": 0.4909,
                    "tokens_per_second": 73.8,
                    "seconds_left": 172.6,
                },
            ),
            call(
                2,
                **waiting,
                waited=31.0,
                place=1,
                eta=173.0,
                why="a person waits for it",
            ),
            call(
                3,
                **waiting,
                kind="subagent",
                waited=44.8,
                place=2,
                eta=201.0,
                why="a subagent waits for it: people go first",
            ),
            call(
                4,
                **waiting,
                kind="suggestion",
                background=True,
                waited=3.2,
                place=3,
                why="nobody waits for it: all others go first",
            ),
        ],
        "last": [
            small(5, "title"),
            call(6, took=34.8, output=322),
            call(7, kind="subagent", input=1320, cached=13044, waited=12.0, first=19.8, took=41.0),
            small(8, "hook", took=0.6, output=9),
            call(9, input=21906, cached=8214, first=296.8, took=311.4, output=151, cold=rewritten),
            call(10, outcome="cancelled", took=6.2, output=41),
            small(11, "fetch", input=6210, first=2.9, took=7.7, output=402),
            call(12, took=18.8, output=160),
            call(13, outcome="broken: overloaded_error", took=4.0, first=None, output=0),
            call(14, input=13402, cached=0, first=181.6, took=190.0, output=88, cold=lost),
            small(15, "title", took=0.7),
            call(16, took=24.4, output=219),
        ],
    }


def chart(now: float) -> list[dict[str, Json]]:
    """Six hours with a break at noon and some cold prompts."""
    buckets = []
    for number in range(_BUCKETS):
        works = 0 if 26 <= number < 34 or number < 3 else 1
        calls = works * round(4 + 3 * math.sin(number / 5))
        is_cold = works and number % 17 in (3, 4)
        new = calls * (4200 if is_cold else 390)
        buckets.append(
            {
                "at": now - (_BUCKETS - number) * _BUCKET,
                "calls": calls,
                "input": new,
                "cached": calls * round(9800 + 3000 * math.sin(number / 9)) if calls else 0,
                "output": calls * 190,
                "first": (57.0 if is_cold else 3.1 + math.sin(number)) if calls else None,
                "with_first": calls,
            }
        )
    return buckets


@attrs.define(eq=False)
class Scene:
    """
    Where the dispatch stands.

    Attributes:
        reactor: its clock.
        said: what it says now, as `status`.
        ended: the calls that were ended by hand.
        heard: who would be told of each call that is over.
    """

    reactor: Any
    said: dict[str, Json] = attrs.field(factory=status)
    ended: list[str] = attrs.field(factory=list)
    heard: list[Any] = attrs.field(factory=list)
    tiers: dict[str, Any] = attrs.field(factory=dict)

    @property
    def ledger(self) -> Scene:
        return self

    def status(self) -> dict[str, Json]:
        return self.said

    def chart(self) -> list[dict[str, Json]]:
        return chart(time.time())

    def end(self, identity: str) -> bool:
        """End a call that is open."""
        calls = self.said["calls"]
        self.said["calls"] = [each for each in calls if each["id"] != identity]
        self.ended.append(identity)
        return len(self.said["calls"]) < len(calls)
