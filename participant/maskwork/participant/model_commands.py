"""``maskwork model init``: the initial model of a job, from a task.

It is NOT where models are taken home (``maskwork model export`` asks a coordinator), and it reads no site's data: a
researcher runs it.

Rules it upholds: torch is imported when the command runs, so that the other commands of the group do not wait for it;
a file that exists is replaced only when asked.
"""

import json
from pathlib import Path
from typing import Annotated

import typer

from maskwork.errors import UserError
from maskwork.participant.tasks import READY_MADE, import_path_of
from maskwork.task import load_task
from maskwork.tensors import model_digest, write_model

app = typer.Typer(help="Make initial models.", no_args_is_help=True, add_completion=False)


@app.callback()
def _group() -> None:
    """Make initial models."""


@app.command("init")
def init(
    task: Annotated[
        str, typer.Option("--task", help=f"Ready-made ({', '.join(READY_MADE)}), or package.module:ClassName.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The safetensors file to write.")],
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**63 - 1, help="Of the initial weights.")] = 1,
    option: Annotated[
        list[str] | None, typer.Option("--option", help="key=value for the task; JSON or text; may be repeated.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that exists.")] = False,
) -> None:
    """Make a job's initial model from a task: the same seed gives the same file."""
    if output.exists() and not force:
        raise UserError(f"{output} exists: choose another name, or replace it with --force")
    built = load_task(import_path_of(task), parse_options(option or ()))

    from maskwork.participant.training import initial_vector

    schema, vector = initial_vector(built, seed)
    write_model(output, schema, vector, {"format": "pt", "maskwork.seed": str(seed), "maskwork.task": task})
    typer.echo(f"{output}: {schema.size} parameters in {len(schema.tensors)} tensors")
    for spec in schema.tensors:
        typer.echo(f"  {spec}")
    typer.echo(f"  SHA-256 {model_digest(output).hex()}")


def parse_options(pairs: "list[str] | tuple[str, ...]") -> dict[str, object]:
    """Options as ``key=value``: the value is JSON where it is JSON (3, 0.5, true, null), else text.

    Raises:
        UserError: One has no key, or a key comes twice.
    """
    options: dict[str, object] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not key or not equals:
            raise UserError(f"--option {pair!r}: expected key=value")
        if key in options:
            raise UserError(f"--option {key!r} is given twice")
        try:
            options[key] = json.loads(text)
        except ValueError:
            options[key] = text
    return options
