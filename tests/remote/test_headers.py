"""Which headers of a client go on."""

from __future__ import annotations

import pytest

from gateway.remote.headers import passed_on


@pytest.mark.parametrize(
    "name",
    [
        "anthropic-version",
        "anthropic-beta",
        "anthropic-something-new",
        "x-stainless-lang",
        "x-claude-code-session-id",
        "x-app",
        "user-agent",
    ],
)
def test_what_is_about_the_call_goes(name: str) -> None:
    """Also what nobody knows yet."""
    assert passed_on({name: "value"}) == {name: "value"}


@pytest.mark.parametrize(
    "name",
    [
        "authorization",
        "x-api-key",
        "x-auth-token",
        "anthropic-auth",
        "cookie",
        "x-csrf-cookie",
        "proxy-authorization",
        "host",
        "connection",
        "keep-alive",
        "transfer-encoding",
        "te",
        "upgrade",
        "content-length",
        "content-type",
        "accept-encoding",
        "x-forwarded-for",
        "x-forwarded-host",
        "x-real-ip",
        "x-claudegw-tier",
        "x-goog-iap-jwt-assertion",
        "x-amzn-oidc-data",
        "x-ms-client-principal",
        "x-remote-user",
        "x-something-new",
        "origin",
        "referer",
    ],
)
def test_what_is_between_the_client_and_us_stays(name: str) -> None:
    """Keys, cookies, who and where the client is, and what is about this connection."""
    assert passed_on({name: "value"}) == {}
