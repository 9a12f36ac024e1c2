"""Answers under a schema: what the server is asked for, and how often."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
from twisted.internet.defer import Deferred

from gateway.policy.schema import Form, read
from gateway.tier.constrained import complete
from gateway.upstream import Completion
from gateway.wire.errors import ApiError

FORM = read({"properties": {"title": {"type": "string"}}, "required": ["title"]})
BODY = {"messages": [{"role": "user", "content": "Hi"}], "temperature": 0}


@attrs.define
class Answering:
    """A server that gives these completions: their text and why they stopped."""

    completions: list[tuple[str, str]]
    asked: list[Any] = attrs.field(factory=list)
    counts: list[tuple[int, int]] = attrs.field(factory=list)

    async def held(self, body: Any, form: Form, characters: int, tokens: int) -> Completion:
        self.asked.append((body, form, characters, tokens))
        text, stopped = self.completions.pop(0)
        evaluated, cached = self.counts.pop(0) if self.counts else (3, 0)
        return Completion(text, stopped, evaluated=evaluated, cached=cached, generated=5)


def completed(server: Answering, tokens: int = 100, form: Form = FORM) -> Any:
    found: list[Any] = []
    asking = Deferred.fromCoroutine(complete(server, BODY, form, tokens))
    asking.addBoth(found.append)
    return found[0]


def test_an_answer_that_fits_is_asked_for_once() -> None:
    """It may have two characters a token, and is sampled as the client wants."""
    server = Answering([('{"title": "a"}', "eos")])
    assert completed(server).text == '{"title": "a"}'
    assert server.asked == [(BODY, FORM, 200, 100)]


def test_a_cut_answer_is_asked_for_in_less_room() -> None:
    """What was cut off is asked for once more, so short that it must close, and sampled anew."""
    server = Answering([('{"title": "aaa', "limit"), ('{"title": "b"}', "eos")])
    assert completed(server).text == '{"title": "b"}'
    assert server.asked[1] == ({"messages": BODY["messages"]}, FORM, 25, 100)


def test_an_answer_that_is_cut_twice_is_given_as_it_is() -> None:
    """Where not even the shortest one ends in time, its beginning says so."""
    found = completed(Answering([('{"ti', "limit"), ('{"ti', "limit")]), 2)
    assert (found.text, found.stopped) == ('{"ti', "limit")


def test_any_object_that_is_cut_is_not_asked_for_again() -> None:
    """Its grammar has no bounds, so it would only be cut once more."""
    server = Answering([('{"a": "b', "limit")])
    found = completed(server, form=read({"type": "object", "additionalProperties": True}))
    assert (found.text, found.stopped) == ('{"a": "b', "limit")


def test_an_answer_that_ends_with_its_limit_is_whole() -> None:
    """There was no token left for the sign that ends it, and none was needed."""
    server = Answering([('{"title": "a"}', "limit")])
    assert completed(server).stopped == "eos"
    assert len(server.asked) == 1


@pytest.mark.parametrize("text", ["no JSON", '{"title": 1}'])
def test_a_server_that_holds_nothing_is_found_out(text: str) -> None:
    """An answer that does not fit is asked for twice, and then it is an error."""
    failure = completed(Answering([(text, "eos"), (text, "eos")]))
    assert isinstance(failure.value, ApiError)
    assert failure.value.should_retry is False
    assert "2 attempts" in failure.value.message


def test_what_a_prompt_cost_is_what_it_cost_first() -> None:
    """The second attempt finds it evaluated, and that is no merit of the cache."""
    server = Answering([('{"title": "aaa', "limit"), ('{"title": "b"}', "eos")])
    server.counts = [(3000, 10), (1, 3009)]
    found = completed(server)
    assert (found.evaluated, found.cached) == (3000, 10)
