"""``maskwork audit``: fetch the coordinator's audit log, verify it, look into it, report on a job.

`verify`, `show` and `report` work offline, from the CA's certificate and files alone; only `fetch` talks to anybody.
It judges nothing itself (`maskwork.audit` does): it reads arguments, words the outcome and chooses exit codes.
"""

from __future__ import annotations

import json
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.text import Text

from maskwork.audit.lines import Entry, LineError, decode_line
from maskwork.audit.log import read_lines
from maskwork.audit.reading import Judged, judge
from maskwork.audit.report import Outcome, job_report
from maskwork.audit.report_page import page
from maskwork.errors import UserError
from maskwork.net.identity import ROOTS_EXPECTED, IdentityFiles, TrustRoots
from maskwork.net.names import utc_text

app = typer.Typer(
    help="Check afterwards who took part, and under which parameters.", no_args_is_help=True, add_completion=False
)

PROBLEMS_SHOWN: Final = 20
_SHOWN_CHARACTERS: Final = 200

Log = Annotated[Path, typer.Argument(metavar="LOG", help="An audit log: fetched, or copied from a state directory.")]
CA = Annotated[Path, typer.Option("--ca", metavar="CA.pem", help="The federation's CA certificate.", dir_okay=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("fetch")
def fetch(
    coordinator: Annotated[
        str, typer.Option("--coordinator", envvar="MASKWORK_COORDINATOR", metavar="HOST:PORT", help="The coordinator.")
    ],
    identity: Annotated[
        Path,
        typer.Option("--identity", envvar="MASKWORK_IDENTITY", metavar="DIR", help="An operator's or an auditor's."),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="LOG", help="The file; one that is there is gone on with.")],
) -> None:
    """Fetch the coordinator's audit log with an operator's or an auditor's certificate."""
    from maskwork.audit_client import fetch as fetch_log  # gRPC is loaded only where it is needed

    had, added = fetch_log(coordinator, IdentityFiles.in_directory(identity), out, now=time.time())
    typer.echo(f"{out}  {had + added} bytes, {added} of them new. Verify it with `maskwork audit verify {out} --ca …`")


@app.command("verify")
def verify(
    log: Log,
    ca: CA,
    against: Annotated[
        list[Path] | None, typer.Option("--against", metavar="SITE_LOG", help="A site's log; may be repeated.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Find any record that was altered, removed, moved or inserted; exit code 1 if there is one.

    One log alone cannot show that records were cut off at its end, nor that its owner wrote the whole history anew and
    signed it again: --against compares it with what sites were shown and kept.
    """
    judged = judge(log, TrustRoots.from_file(ca, expected=ROOTS_EXPECTED), against or ())
    if as_json:
        typer.echo(json.dumps(_as_json(judged), indent=2))
    else:
        _print(judged, log)
    if judged.problems:
        raise typer.Exit(1)


@app.command("show")
def show(
    log: Log,
    kind: Annotated[str | None, typer.Option("--kind", metavar="KIND", help="Only records of this kind.")] = None,
    as_json: AsJson = False,
) -> None:
    """Print a log's records, one line each; it verifies nothing."""
    console = _console()
    for number, line in enumerate(read_lines(log)):
        try:
            entry = decode_line(line)
        except LineError as error:
            raise UserError(f"{log}: line {number + 1}: {error}. `maskwork audit verify` says more") from None
        if kind is not None and entry.kind != kind:
            continue
        if as_json:
            shown = {"index": entry.index, "at": entry.at, "kind": entry.kind, "head": entry.signed.head.hex()}
            typer.echo(json.dumps({**shown, "data": entry.record.model_dump(mode="json")}))
        else:
            console.print(_line(entry), soft_wrap=True)


@app.command("report")
def report(
    job: Annotated[str, typer.Argument(metavar="JOB", help="A job's id, the beginning of it, or the job's name.")],
    log: Annotated[Path, typer.Option("--log", metavar="LOG", help="The coordinator's audit log.")],
    ca: CA,
    out: Annotated[Path, typer.Option("--out", metavar="FILE.html", help="The page to write; it needs no network.")],
    site_log: Annotated[
        list[Path] | None, typer.Option("--site-log", metavar="SITE_LOG", help="A site's log; may be repeated.")
    ] = None,
    as_json: Annotated[Path | None, typer.Option("--json", metavar="FILE.json", help="The same as data.")] = None,
) -> None:
    """Write a report about a job for a compliance officer; exit code 1 if a claim in it does not hold.

    Who took part, what left each site, under which parameters, which model came out, and how each claim is checked.
    """
    judged = judge(log, TrustRoots.from_file(ca, expected=ROOTS_EXPECTED), site_log or ())
    made = job_report(judged, job, now=time.time())
    out.write_text(page(made), encoding="utf-8")
    if as_json is not None:
        as_json.write_text(json.dumps(made.as_json(), indent=2) + "\n", encoding="utf-8")
    failed = [claim for claim in made.claims if claim.outcome is Outcome.FAILS]
    for claim in failed:
        typer.secho(f"does not hold: {claim.claim} {claim.found}", fg=typer.colors.RED, err=True)
    typer.echo(f"{out}  {len(made.claims)} claims, {len(failed)} do not hold")
    if failed or judged.problems:
        raise typer.Exit(1)


def _line(entry: Entry) -> Text:
    data = entry.record.model_dump(mode="json")
    told = "  ".join(f"{name}={_short(value)}" for name, value in data.items() if value not in ("", [], {}, None))
    when = utc_text(datetime.fromtimestamp(entry.at, UTC))
    return Text(f"{entry.index:>6}  ", "dim").append(f"{when}  ").append(f"{entry.kind:<18}", "bold").append(told)


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:40]}… ({len(text)} characters)"


def _print(judged: Judged, log: Path) -> None:
    console = _console()
    owner = "nobody that can be believed" if judged.chain.owner is None else judged.chain.owner.uri
    console.print(f"{log}: the log of {owner}", soft_wrap=True)
    console.print(f"  {judged.chain.size} records, head {judged.chain.heads[-1].hex()}", soft_wrap=True)
    for site in judged.sites:
        held = len(site.facts.heads)
        console.print(f"  compared with {site.name}, which holds {held} heads of the coordinator's", soft_wrap=True)
    for note in judged.notes:
        console.print(Text(f"  note: {note}", "yellow"), soft_wrap=True)
    for problem in judged.problems[:PROBLEMS_SHOWN]:
        console.print(Text(f"  {problem}", "red"), soft_wrap=True)
    if len(judged.problems) > PROBLEMS_SHOWN:
        console.print(f"  … and {len(judged.problems) - PROBLEMS_SHOWN} more: --json has them all")
    verdict = Text("NOT GOOD", "bold red") if judged.problems else Text("good: every record is in its place", "green")
    console.print(verdict)
    if not judged.problems and judged.facts is not None and not judged.sites:
        console.print("  not looked at: whether its end was cut off, or all of it written anew (--against SITE_LOG)")


def _as_json(judged: Judged) -> dict[str, object]:
    return {
        "good": not judged.problems,
        "owner": None if judged.chain.owner is None else judged.chain.owner.uri,
        "records": judged.chain.size,
        "head": judged.chain.heads[-1].hex(),
        "compared_with": [site.name for site in judged.sites],
        "problems": [{"log": p.log, "index": p.index, "kind": p.kind, "what": p.what} for p in judged.problems],
        "notes": judged.notes,
    }


def _console() -> Console:
    width = None if sys.stdout.isatty() else 240
    return Console(highlight=False, markup=False, emoji=False, width=width)
