"""The main job: processes up, a model, a job, two faults on the way, the trained model home.

What happens is shown by `maskwork.watch_view`, as ``maskwork job watch`` shows it, with what the demo itself does
between.

It is NOT where anything is judged: `MaskedRun` is what the coordinator recorded and what was done to the sites.

Rule it upholds: it acts on what it is told (events, a line in a log, the end of a process). The only clock is a limit
on how long nothing at all may be heard.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, assert_never

from maskwork.job import read_job_file
from maskwork.job_events import RoundCommitted, WatchEvent
from maskwork.jobs_client import JobsClient
from maskwork.participant.demo.display import Display
from maskwork.participant.demo.faults import Injector, Landed, Missed, Rejoined, Strike, Turn, planned
from maskwork.participant.demo.federation import DemoOptions, RunFolder
from maskwork.participant.local.children import Children
from maskwork.participant.local.failure import RunFailed
from maskwork.participant.local.files import HOST
from maskwork.participant.local.logs import coordinator_ready

SILENCE_S: Final = 120.0


@dataclass(frozen=True, slots=True)
class MaskedRun:
    """What the masked job came to.

    Attributes:
        job_id: The job, which the sites' training seeds are derived from.
        rounds: The committed rounds, as the coordinator recorded them.
        turns: What was done to the sites, and what came of it.
        model: The trained model, as it was taken home.
        exits: What the processes ended with, by name.
    """

    job_id: str
    rounds: tuple[RoundCommitted, ...]
    turns: tuple[Turn, ...]
    model: Path
    exits: Mapping[str, int]


async def run_masked(folder: RunFolder, options: DemoOptions, port: int, display: Display) -> MaskedRun:
    """Run the federation and the job, and end every process.

    Raises:
        RunFailed: A process ended on its own, the job did not complete, or nothing was heard for `SILENCE_S`.
        UserError: The coordinator cannot be asked or refuses.
    """
    task = asyncio.current_task()
    assert task is not None
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, task.cancel)
    async with Children(folder.logs) as children:
        job_id, rounds, turns = await children.during(_job(children, folder, options, port=port, display=display))
        with display.busy("ending the processes"):
            exits = await children.stop()
    return MaskedRun(job_id, rounds, turns, folder.models / "masked.safetensors", exits)


async def _job(
    children: Children, folder: RunFolder, options: DemoOptions, *, port: int, display: Display
) -> tuple[str, tuple[RoundCommitted, ...], tuple[Turn, ...]]:
    what = f"starting the coordinator and {options.participants} participants, a process each; torch takes its time"
    with display.busy(what):
        for name in ("coordinator", *options.sites):
            command = "coordinator" if name == "coordinator" else "participant"
            await children.start(name, command, "run", "--config", str(folder.config(name)))
        await asyncio.to_thread(write_initial_model, folder.models / "initial.safetensors", options)
        await coordinator_ready(children.log("coordinator"))
    injector = Injector(planned(options.rounds), participants=options.participants)
    async with JobsClient(f"{HOST}:{port}", folder.researcher) as client:
        file = read_job_file(folder.job)
        job_id = await client.submit(file.spec(), file.model)
        display.say(f"job {job_id} submitted: {options.rounds} rounds, masked; waiting for the sites to be ready")
        watched = _injecting(_heard(client.watch(job_id)), injector, children, display)
        state = await display.show_job(watched)
        if not state.succeeded:
            why = "" if state.job is None else f" is {state.job.state}: {state.job.reason}"
            raise RunFailed(f"the job {job_id}{why}", process="coordinator")
        await client.export(job_id, folder.models / "masked.safetensors")
        details = await client.get(job_id)
    return job_id, details.rounds, tuple(injector.turns)


def write_initial_model(path: Path, options: DemoOptions) -> None:
    """What ``maskwork model init --task digits`` writes."""
    from maskwork.participant.tasks.digits import Digits
    from maskwork.participant.training import initial_vector
    from maskwork.tensors import write_model

    schema, vector = initial_vector(Digits(), options.seed)
    write_model(path, schema, vector, {"format": "pt", "maskwork.seed": str(options.seed), "maskwork.task": "digits"})


async def _heard(events: AsyncIterator[WatchEvent]) -> AsyncIterator[WatchEvent]:
    while True:
        try:
            async with asyncio.timeout(SILENCE_S):
                event = await anext(events)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise RunFailed(f"nothing was heard of the job for {SILENCE_S:g} s", process="coordinator") from None
        yield event


async def _injecting(
    events: AsyncIterator[WatchEvent], injector: Injector, children: Children, display: Display
) -> AsyncIterator[WatchEvent]:
    """Pass events on; kill whom the injector names before anything else is done with the event, and tell it after."""
    async for event in events:
        turn = injector.take(event)
        if isinstance(turn, Strike):
            children.kill_and_restart(turn.victim)
        yield event
        if turn is not None:
            display.say(turn_text(turn))


def turn_text(turn: Turn) -> str:
    """What was done to a site, or what came of it, for people."""
    match turn:
        case Strike(moment, victim, round_number):
            return f"round {round_number}: SIGKILL to {victim} {moment.value}; started again at once"
        case Landed(Strike(_, victim, round_number)):
            return f"round {round_number}: committed although {victim} was killed"
        case Missed(Strike(_, victim, round_number), why):
            return f"round {round_number}: killing {victim} does not count, {why}; trying again"
        case Rejoined(Strike(_, victim), round_number):
            return f"round {round_number}: {victim} is back among the survivors"
        case _:
            assert_never(turn)
