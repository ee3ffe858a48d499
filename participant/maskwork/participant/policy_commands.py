"""`maskwork participant check-policy` and `plans`: the arguments. What they print is `policy_report`'s.

That is imported when a command runs: it needs the database and the protocol, and the group's other commands do not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

PlanFile = Annotated[
    Path, typer.Argument(metavar="PLAN.json", help="A plan as `maskwork participant plans --json` prints it.")
]
PolicyFile = Annotated[
    Path | None, typer.Option("--policy", metavar="policy.toml", help="Absent: the strict default.", dir_okay=False)
]
State = Annotated[
    Path | None,
    typer.Option("--state", metavar="DIR", help="The site's state directory, for the rules that look back."),
]
SomeState = Annotated[
    Path, typer.Option("--state", metavar="DIR", help="The site's state directory; its agent may run.")
]
OfSession = Annotated[
    str | None,
    typer.Option("--json", metavar="SESSION", help="Print this plan as JSON; the beginning of its session id will do."),
]


def check_policy(plan_file: PlanFile, policy_file: PolicyFile = None, state: State = None) -> None:
    """Say what this site would do with a plan, rule by rule; exit code 1 if it would decline."""
    from maskwork.participant import policy_report

    if not policy_report.check(plan_file, policy_file, state):
        raise typer.Exit(1)


def plans(state: SomeState, session: OfSession = None) -> None:
    """List the plans that this site took up or refused, each with why; or print one."""
    from maskwork.participant import policy_report

    if session is None:
        policy_report.list_plans(state)
    else:
        policy_report.print_plan(state, session)
