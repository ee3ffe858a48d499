"""What `maskwork participant check-policy` and `plans` print: a policy against a plan, and the plans on record.

It only reads: no coordinator is asked and nothing is written. What the rules are is `policy_check`'s business.

Rule it upholds: what is explained is what would be enforced, by the same functions; what could not be looked at is
called open, never passed.
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from maskwork.errors import UserError
from maskwork.net.names import utc_text
from maskwork.participant.ledger import Ledger, SignedPlan
from maskwork.participant.policy import Policy, read_policy
from maskwork.participant.policy_check import Records, explain
from maskwork.participant.policy_rules import Finding
from maskwork.plan_json import MAX_JSON_BYTES, PlanJsonError, plan_of_json, readable_json
from maskwork.secagg.plan import RoundPlan, session_id
from maskwork.wire.errors import WireError
from maskwork.wire.plan_codec import decode_plan, encode_plan

PIPE_WIDTH: Final = 240
SHOWN_DIGITS: Final = 12
"""Of a session id, in lists: enough to name it."""


def check(plan_file: Path, policy_file: Path | None, state: Path | None) -> bool:
    """Print what each rule says of a plan; whether the site would take part.

    Raises:
        UserError: a file or the state directory cannot be read; the text says which and why.
    """
    policy = Policy() if policy_file is None else read_policy(policy_file)
    plan = _read_plan(plan_file)
    records = None if state is None else _records(state, plan)
    found = tuple(explain(policy, plan, now=time.time(), records=records))
    console = _console()
    session = session_id(encode_plan(plan)).hex()[:SHOWN_DIGITS]
    which = "the default policy" if policy_file is None else str(policy_file)
    console.print(
        Text(f"job {plan.job}, round {plan.round_number} of {plan.rounds_total}, attempt {plan.attempt}").append(
            f"  session {session}, against {which}", "dim"
        ),
        soft_wrap=True,
    )
    console.print(_findings_table(found))
    refused = [finding.refusal.detail for finding in found if finding.refusal is not None]
    if refused:
        console.print(Text(f"would decline: {'; '.join(refused)}", "bold red"), soft_wrap=True)
    else:
        console.print(Text("would take part, as far as was checked", "bold green"), soft_wrap=True)
    return not refused


def list_plans(state: Path) -> None:
    """Print every plan on record, oldest first.

    Raises:
        StoreError: there is no ledger, or it cannot be read.
    """
    kept = _plans_on_record(state)
    if kept:
        _console().print(_plans_table(sorted(kept, key=lambda plan: plan.at)))
    else:
        typer.echo("no plans yet: the site has been asked for nothing", err=True)


def print_plan(state: Path, session: str) -> None:
    """Print one plan on record as JSON.

    Raises:
        UserError: none, or more than one, has a session id that begins so.
    """
    typer.echo(readable_json(_decoded(_the_one(_plans_on_record(state), session))), nl=False)


def _plans_on_record(state: Path) -> list[SignedPlan]:
    with Ledger.read(state) as ledger:
        return [plan for federation in ledger.federations() for plan in ledger.plans(federation)]


def _read_plan(path: Path) -> RoundPlan:
    try:
        with path.open("rb") as file:
            return plan_of_json(file.read(MAX_JSON_BYTES + 1))
    except PlanJsonError as error:
        raise UserError(f"{path}: cannot be read as a plan: {error}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read as a plan: {error.strerror}") from error


def _records(state: Path, plan: RoundPlan) -> Records:
    with Ledger.read(state) as ledger:
        return Records(
            ledger.rounds_taken(plan.federation, plan.job), ledger.releases(plan.federation, plan.model_digest)
        )


def _the_one(kept: Sequence[SignedPlan], session: str) -> SignedPlan:
    found = [plan for plan in kept if session and plan.session_id.hex().startswith(session.lower())]
    if not found:
        raise UserError(f"no plan of session {session[:64]} is on record: `maskwork participant plans` lists them")
    if len(found) > 1:
        raise UserError(f"{len(found)} sessions begin with {session[:64]}: write more of it")
    return found[0]


def _decoded(plan: SignedPlan) -> RoundPlan:
    try:
        return decode_plan(plan.plan_bytes)
    except WireError as error:
        raise UserError(f"the plan of session {plan.session_id.hex()} on record cannot be read: {error}") from error


def _findings_table(found: Sequence[Finding]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("", "rule", "the plan says", "the policy says", ""):
        table.add_column(name)
    for finding in found:
        verdict, why = Text("pass", "green"), ""
        if finding.unchecked:
            verdict, why = Text("open", "yellow"), finding.unchecked
        elif finding.refusal is not None:
            verdict, why = Text("refuse", "bold red"), finding.refusal.detail
        says = Text(f"{finding.key} = {finding.allowed}")
        table.add_row(verdict, Text(finding.rule), Text(finding.proposed), says, Text(why))
    return table


def _plans_table(kept: Sequence[SignedPlan]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("session", "received", "job"):
        table.add_column(name, no_wrap=True)
    for name in ("round", "attempt"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    for plan in kept:
        received = utc_text(datetime.fromtimestamp(plan.at, UTC))
        verdict = Text("taken up", "green")
        if plan.refused_because is not None:
            verdict = Text(f"declined: {plan.refused_because}", "red")
        numbers = Text(str(plan.round_number)), Text(str(plan.attempt))
        table.add_row(Text(plan.session_id.hex()[:SHOWN_DIGITS]), received, Text(plan.job), *numbers, verdict)
    return table


def _console() -> Console:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # what a terminal cannot show ends no explanation
    width = None if sys.stdout.isatty() else PIPE_WIDTH  # a pipe wants whole words
    return Console(highlight=False, markup=False, emoji=False, width=width)
