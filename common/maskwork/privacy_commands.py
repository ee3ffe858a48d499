"""``maskwork privacy``: questions about a privacy budget before anything is run.

It computes nothing itself (`maskwork.privacy.planning` does): it reads arguments and words the answer. It talks to
nobody and reads no file.

Rules it upholds: what is a guarantee and what is an estimate are told apart in every answer; what was given and what
follows from it too; a refusal says what would be accepted.
"""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from maskwork.errors import UserError
from maskwork.privacy.mechanisms import Mechanism
from maskwork.privacy.planning import MEASURED_ON, Answer, Setting, plan

PIPE_WIDTH: Final = 160
app = typer.Typer(help="Plan a privacy budget before a run.", no_args_is_help=True, add_completion=False)

_GIVEN: Final = "given"
_FOLLOWS: Final = "follows"


@app.callback()
def _privacy() -> None:
    """Plan a privacy budget before a run."""


@app.command("plan")
def plan_command(
    participants: Annotated[int, typer.Option("--participants", "-n", metavar="N", help="The cohort of every round.")],
    rounds: Annotated[int, typer.Option("--rounds", metavar="T", help="Of the whole run.")],
    parameters: Annotated[int, typer.Option("--parameters", "-d", metavar="D", help="Of the model.")],
    epsilon: Annotated[
        float | None, typer.Option("--epsilon", metavar="E", help="The budget of the whole run.", show_default=False)
    ] = None,
    noise_multiplier: Annotated[
        float | None,
        typer.Option(
            "--noise-multiplier",
            metavar="Z",
            help="Noise on a round's sum, in units of its sensitivity.",
            show_default=False,
        ),
    ] = None,
    accuracy_loss: Annotated[
        float | None,
        typer.Option("--accuracy-loss", metavar="P", help="Percentage points, an estimate.", show_default=False),
    ] = None,
    min_survivors: Annotated[
        int | None,
        typer.Option(
            "--min-survivors", metavar="N", help="A round with fewer is aborted; else two thirds, rounded up."
        ),
    ] = None,
    colluders: Annotated[
        int, typer.Option("--colluders", metavar="N", help="Participants that may betray their noise.")
    ] = 0,
    mechanism: Annotated[Mechanism, typer.Option("--mechanism", help="Who adds which noise.")] = Mechanism.SKELLAM,
    delta: Annotated[
        float | None, typer.Option("--delta", metavar="D", help="At most 1/N; else N^-1.1.", show_default=False)
    ] = None,
    ring_bits: Annotated[
        int | None, typer.Option("--ring-bits", metavar="R", help="Else the narrowest that costs little epsilon.")
    ] = None,
    clip_norm: Annotated[float, typer.Option("--clip-norm", metavar="C", help="Largest norm of an update.")] = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Tell what a budget, an amount of noise and a loss of accuracy have to do with one another.

    Give --epsilon, --noise-multiplier or --accuracy-loss for the other two; give --accuracy-loss and one of the others
    for the number of participants that it takes.
    """
    try:
        setting = Setting(
            mechanism=mechanism,
            participants=participants,
            rounds=rounds,
            parameters=parameters,
            min_survivors=-(-2 * participants // 3) if min_survivors is None else min_survivors,
            colluders=colluders,
            delta=delta,
            ring_bits=ring_bits,
            clip_norm=clip_norm,
        )
        answer = plan(
            setting,
            epsilon=epsilon,
            noise_multiplier=noise_multiplier,
            accuracy_loss=accuracy_loss,
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(answer) | {"measured_on": MEASURED_ON}, indent=2))
    else:
        given = {"epsilon": epsilon, "noise": noise_multiplier, "loss": accuracy_loss}
        _print(answer, {name for name, value in given.items() if value is not None})


def _print(answer: Answer, given: set[str]) -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without Greek letters still gets its answer
    console = Console(highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)
    for line in _headline(answer):
        console.print(Text(line), soft_wrap=True)
    console.print()
    console.print(_table(answer, given))
    console.print()
    for line in _notes(answer):
        console.print(Text(line, "dim"), soft_wrap=True)


def _headline(answer: Answer) -> list[str]:
    at = answer.setting
    lines = [
        f"{at.participants} participants, {at.rounds} rounds, {at.parameters:,} parameters, {at.mechanism}: "
        f"({answer.epsilon:.3g}, {answer.delta:.2g})-private for each participant's whole data, over the whole run."
    ]
    if answer.participants_needed:
        lines.insert(0, f"It takes {at.participants} participants, of which {at.min_survivors} survive every round.")
    return lines


def _table(answer: Answer, given: set[str]) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 3, 0, 0))
    at = answer.setting
    z, spread = answer.noise_multiplier, _spread(answer)
    added = (
        f"{answer.participant_noise:.3g} on each coordinate of its update, for a clip norm of {at.clip_norm:g}"
        if at.mechanism.distributed
        else "none: the coordinator adds the noise, and is trusted to"
    )
    rows = (
        ("epsilon", f"{answer.epsilon:.4g}", "epsilon", "a guarantee"),
        ("delta", f"{answer.delta:.3g}", "", "n^-1.1" if at.delta is None else _GIVEN),
        ("noise multiplier", f"{z:.4g}", "noise", f"of the {at.honest} honest survivors that are sure"),
        ("accuracy lost", spread, "loss", "an estimate, not a guarantee"),
        ("noise per participant", added, "", "standard deviation"),
        ("noise on the mean", f"{answer.mean_noise:.3g} on each coordinate", "", "standard deviation, all surviving"),
        ("ring", f"{answer.ring_bits} bits", "", f"{answer.bytes_per_parameter:g} bytes per parameter, each round"),
    )
    for name, value, key, remark in rows:
        source = "" if not key else _GIVEN if key in given else _FOLLOWS
        table.add_row(Text(name, "dim"), Text(value, "bold" if source == _FOLLOWS else ""), source, Text(remark, "dim"))
    return table


def _spread(answer: Answer) -> str:
    if answer.beyond_measured:
        return f"{answer.accuracy_loss:.0f} points or more: as good as no model"
    return (
        f"about {answer.accuracy_loss:.1f} points; {answer.accuracy_loss_at_worst:.1f} where participants differ much"
    )


def _notes(answer: Answer) -> list[str]:
    at = answer.setting
    lines = [
        f"The guarantee holds against the coordinator and {at.colluders} participants that tell it their noise, "
        f"as long as {at.min_survivors} participants survive each round.",
        f"The estimate goes by the noise's share of what a model can learn, {answer.noise_share:.3g} here. It was "
        f"measured on {MEASURED_ON}; another task may lose more or less.",
    ]
    if not at.mechanism.distributed:
        lines[0] = (
            "The guarantee holds against whoever sees the models, not against the coordinator: it adds the noise."
        )
    if at.delta is None and answer.delta > 1e-4:
        lines.append(
            f"A delta of {answer.delta:.2g} is a weak promise, just below 1/n: give --delta 1e-5 for a strong one."
        )
    return lines
