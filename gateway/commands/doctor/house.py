"""What the doctor finds of the machine, the configuration and the gateway."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from math import ceil
from typing import Final

from gateway.commands.doctor.facts import Facts, number
from gateway.commands.doctor.finding import Finding, Say, who
from gateway.config import MIB
from gateway.daemon import longest_stop
from gateway.figures import mapping

#: The oldest Python that we run on.
_PYTHON: Final = (3, 11)

#: Seconds of mere pings after which Claude Code gives up, and how much earlier the gateway must
#: begin.
_PINGS: Final = 600.0
_EARLY: Final = 30.0

#: Bytes that a disk should have left beside the snapshots.
_ROOM: Final = 1024 * MIB


def python(facts: Facts, say: Say) -> Iterator[Finding]:
    """Whether this Python will do."""
    shown = ".".join(map(str, facts.python))
    if facts.python < _PYTHON:
        yield say("problem", f"Python {shown}", "Install Python 3.11 or newer, and claudegw in it.")
    else:
        yield say("ok", f"Python {shown}")


def packages(facts: Facts, say: Say) -> Iterator[Finding]:
    """Whether what claudegw needs is there, and new enough."""
    wrong = [each for each in facts.packages if not each.will_do]
    for each in wrong:
        there = f"version {each.found}" if each.found else "missing"
        wanted = shlex.quote(f"{each.name}{each.wanted}")
        yield say("problem", f"{each.name} is {there}", f"Run: `python -m pip install {wanted}`")
    if not wrong:
        yield say("ok", f"all {len(facts.packages)} that claudegw needs")


def config(facts: Facts, say: Say) -> Iterator[Finding]:
    """Every mistake of the configuration."""
    path = shlex.quote(str(facts.path))
    if facts.config is not None:
        yield say("ok", str(facts.path))
    elif not facts.path.exists():
        yield say(
            "problem",
            f"{facts.path} is not there",
            f"Run: `cp etc/gw.toml {path}` in claudegw's folder and adapt it, or say where yours is"
            " with --config FILE",
        )
    else:
        for mistake in facts.mistakes:
            key, _, _ = mistake.partition(":")
            what = "Remove that key" if "unknown key" in mistake else f"Correct {key}"
            yield say("problem", mistake, f"{what} in {path}; etc/gw.toml explains every key")


def token(facts: Facts, say: Say) -> Iterator[Finding]:
    """Whether others can read a key."""
    config = facts.config
    if config is None:
        return
    secrets = config.gateway.token, *(tier.api_key for tier in config.tier.values())
    # A service reads the file as its group.
    mode, others = ("640", 0o027) if facts.unit else ("600", 0o077)
    if any(secrets) and facts.mode & others:
        yield say(
            "warning",
            f"others on this machine can read the keys in {facts.path} (mode {facts.mode:04o})",
            f"Run: `chmod {mode} {shlex.quote(str(facts.path))}`",
        )
    elif config.gateway.token is None:
        yield say("ok", "none is needed: the gateway listens on loopback alone")
    else:
        group = " and its group" if facts.mode & 0o040 else ""
        yield say("ok", f"there is one, and none but the file's owner{group} can read it")


def state(facts: Facts, say: Say) -> Iterator[Finding]:
    """Whether the state folder can be used, and by nobody else."""
    for folder in facts.state:
        path = shlex.quote(str(folder.path))
        if folder is not facts.state[0] and not facts.state[0].is_ours:
            continue  # nobody else can look into it
        if not folder.exists:
            yield say("ok", f"{folder.path} will be made at the start")
        elif not folder.is_folder:
            yield say(
                "problem",
                f"{folder.path} is no folder, and one has to be made there",
                f"Move it away: `mv {path} {path}.old`",
            )
        elif not folder.is_ours and facts.is_up:
            yield say("ok", f"{folder.path} belongs to the user whose gateway runs")
        elif not folder.is_ours:
            yield say(
                "problem",
                f"{folder.path} belongs to another user: nobody else can start the gateway in it",
                "Start it as that user, or set another state_dir in [gateway]",
            )
        elif not folder.writable:
            yield say(
                "problem" if folder is facts.state[0] else "warning",
                f"{folder.path} cannot be written to (mode {folder.mode:04o}): nothing is saved",
                f"Run: `chmod 700 {path}`",
            )
        elif folder.mode & 0o077:
            yield say(
                "warning",
                f"others can look into {folder.path} (mode {folder.mode:04o}), where prompts lie",
                f"Run: `chmod 700 {path}`",
            )
        else:
            yield say("ok", str(folder.path))


def disk(facts: Facts, say: Say) -> Iterator[Finding]:
    """Whether the snapshots have room."""
    if facts.config is None:
        return
    budget, free = facts.config.gateway.snapshot_budget, facts.free // MIB
    used = sum(
        number(mapping(tier.status.get("cache")).get("snapshot_bytes")) for tier in facts.tiers
    )
    fits = max(0, (facts.free + used - _ROOM) // MIB)
    if budget > fits:
        yield say(
            "warning",
            f"{free} MiB are free, and saved slots may take {budget} MiB",
            f"Set `snapshot_budget = {fits}` in [gateway], or make room on that disk",
        )
    else:
        yield say("ok", f"{free} MiB are free")


def gateway(facts: Facts, say: Say) -> Iterator[Finding]:
    """Whether the gateway runs where clients look for it."""
    if facts.config is None:
        yield say("skipped", "the configuration cannot be read")
        return
    path = shlex.quote(str(facts.path))
    other = f'Set `listen = "tcp:{facts.free_port}:interface=127.0.0.1"` in [gateway]'
    if facts.no_url:
        yield say("problem", facts.no_url, other)
    elif facts.elsewhere and not facts.is_up:
        yield say(
            "problem",
            f"{facts.elsewhere} is no address of this machine: the gateway cannot listen there",
            other,
        )
    elif facts.listener is None:
        yield say(
            "problem",
            f"nobody listens at {facts.url}",
            f"Start the gateway: `twistd -n claudegw --config {path}`",
        )
    elif facts.is_up and not _is_the_same(facts):
        yield say(
            "warning",
            f"what runs at {facts.url} has other tiers than {facts.path}",
            "Restart the gateway with this configuration, or name its own with --config FILE",
        )
    elif facts.is_up and (runs := mapping(facts.status.said).get("version")) != facts.version:
        yield say(
            "warning",
            f"claudegw {runs} runs at {facts.url}, and {facts.version} is installed",
            f"Stop it and start it again: `twistd -n claudegw --config {path}`",
        )
    elif facts.is_up:
        yield say("ok", f"claudegw {runs} at {facts.url}")
    elif facts.status.status == 401:
        yield say(
            "problem",
            f"what runs at {facts.url} wants another token than {facts.path} has",
            "Restart the gateway with this configuration, or name its own with --config FILE",
        )
    else:
        taker = who(facts.listener.name, facts.listener.pid)
        yield say(
            "problem",
            f"the port of {facts.url} is taken by {taker}, which is no claudegw",
            f"End it, or: {other}; then start the gateway: `twistd -n claudegw --config {path}`",
        )


def _is_the_same(facts: Facts) -> bool:
    """Whether the running gateway has the tiers of this configuration."""
    running = mapping(mapping(facts.status.said).get("tiers"))
    wanted = {tier.name: tier.config.url for tier in facts.tiers}
    return wanted == {
        name: mapping(tier).get("url", wanted.get(name)) for name, tier in running.items()
    }


def clocks(facts: Facts, say: Say) -> Iterator[Finding]:
    """The gateway's patience against the client's."""
    if facts.config is None:
        return
    fine = True
    if (after := facts.config.gateway.start_after) > _PINGS - _EARLY:
        fine = False
        yield say(
            "warning",
            f"answers are begun after {after:.0f} s, and Claude Code gives up at {_PINGS:.0f} s:"
            " a long prefill can be lost",
            "Set `start_after = 500` in [gateway]",
        )
    for name, tier in facts.config.tier.items():
        if tier.startup_patience < 60:
            fine = False
            yield say(
                "warning",
                f"tier {name} waits {tier.startup_patience:.0f} s for a server that loads: calls"
                " fail at each start",
                f"Set `startup_patience = 900` in [tier.{name}]",
            )
    if fine:
        yield say("ok", f"answers are begun after {after:.0f} s, before Claude Code gives up")


def grace(facts: Facts, say: Say) -> Iterator[Finding]:
    """Whether who starts the gateway lets it end."""
    if facts.config is None or not (facts.agent or facts.unit):
        return
    needs = ceil(longest_stop(facts.config.longest_grace))
    path = shlex.quote(str(facts.path))
    if facts.agent and number(facts.agent.get("ExitTimeOut")) < needs:
        yield say(
            "warning",
            f"launchd kills the gateway {number(facts.agent.get('ExitTimeOut'))} s after it is told"
            f" to stop, and it may need {needs} s",
            f"Run: `claudegw launchd --install --config {path}`",
        )
    elif facts.unit and "Type=notify" not in facts.unit:
        yield say(
            "warning",
            f"systemd is not told that the gateway may need {needs} s to stop",
            "Take Type=notify and TimeoutStopSec from etc/systemd/claudegw.service",
        )
    else:
        yield say("ok", f"the gateway gets the {needs} s that it may need to stop")
