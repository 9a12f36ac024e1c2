"""
``claudegw doctor``: whether Claude Code would work here, and what is to be done where it would not.

1. `machine` touches the machine, and is bounded in all that it asks.
2. `facts` gathers what is known, once.
3. `checks` judges it: pure functions, in one table, each finding with its remedy.
4. `report` draws the findings.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from gateway.commands.doctor import report
from gateway.commands.doctor.checks import findings, would_work
from gateway.commands.doctor.facts import gather
from gateway.commands.doctor.machine import Machine


def run(path: Path, *, as_json: bool, machine: Machine | None = None) -> int:
    """Look, and say what was found; 0 says that Claude Code would work, 1 that it would not."""
    found = findings(gather(machine or Machine(), path.absolute()))
    console = Console()
    if as_json:
        console.out(report.as_json(found), highlight=False)
    else:
        console.print(report.page(found), soft_wrap=True)  # a command stays one line
    return 0 if would_work(found) else 1
