"""The processes of a run: started, killed, started again, and ended with the run whatever happens.

It is NOT concerned with what the processes do; it knows names, command lines and log files.

Rules it upholds:

1. A process is signalled by its own id alone, and only while it has not been waited for.
2. A process that ends without having been told to is an error at once, not a silence.
3. None outlives the run: they are ended on the way out of the context, on errors and Ctrl-C too, and by the guardian
   if the run itself is killed.
4. Ctrl-C reaches the run alone: each process has a session of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self, TypeVar

from maskwork.participant.local.failure import RunFailed

T = TypeVar("T")

STOP_GRACE_S: Final = 15.0
"""How long a process that was told to stop may take; the coordinator drains for up to 5 s."""

# The `maskwork` command of this very environment; -P keeps modules of the current directory out of it.
_MASKWORK: Final = (sys.executable, "-P", "-c", "from maskwork.cli import main; main()")
_GUARDIAN: Final = (sys.executable, "-P", "-m", "maskwork.participant.local.guardian")


@dataclass(eq=False, slots=True)
class _Child:
    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    process: asyncio.subprocess.Process
    watcher: asyncio.Task[None]
    told_to_end: bool = False


class Children:
    """The processes of a run; an async context manager."""

    def __init__(self, logs: Path) -> None:
        """Keep one log for each process in the directory `logs`."""
        self._logs = logs
        self._children: dict[str, _Child] = {}
        self._restarts: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._failure: asyncio.Future[RunFailed] = asyncio.get_running_loop().create_future()
        self._guardian = subprocess.Popen(
            _GUARDIAN, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, bufsize=0, start_new_session=True
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()
        assert self._guardian.stdin is not None
        self._guardian.stdin.close()
        await asyncio.to_thread(self._guardian.wait)

    def log(self, name: str) -> Path:
        """The log of a process; one that is started again goes on in the same file."""
        return self._logs / f"{name}.log"

    async def start(self, name: str, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
        """Run ``maskwork ARGUMENTS`` as `name`, with our own environment and what `environment` adds to it."""
        await self.start_command(name, *_MASKWORK, *arguments, environment=environment)

    async def start_command(self, name: str, *command: str, environment: Mapping[str, str] | None = None) -> None:
        """Run any command as `name`."""
        added = dict(environment or {})
        with self.log(name).open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **added},
            )
        self._tell_guardian(f"+{process.pid}")
        watcher = asyncio.create_task(self._watch(name, process))
        self._children[name] = _Child(name, command, added, process, watcher)

    def pid(self, name: str) -> int:
        """The process id of a process that was started."""
        return self._children[name].process.pid

    def kill_and_restart(self, name: str) -> None:
        """SIGKILL, now; as soon as the process is gone it is started again, with the same arguments."""
        child = self._children[name]
        child.told_to_end = True
        child.process.kill()
        self._restarts.append(asyncio.create_task(self._start_again(child)))

    async def stop(self) -> dict[str, int]:
        """End all: the participants first, in case the coordinator has something to tell them, then the rest.

        Returns:
            What each process ended with, by name; negative: the signal that it took.
        """
        exits: dict[str, int] = {}
        for restart in self._restarts:
            restart.cancel()
        await asyncio.gather(*self._restarts, return_exceptions=True)
        coordinators = {name for name in self._children if name.endswith("coordinator")}
        for group in (set(self._children) - coordinators, coordinators):
            members = [self._children.pop(name) for name in sorted(group)]
            for child in members:
                child.told_to_end = True
                with contextlib.suppress(ProcessLookupError):
                    child.process.terminate()
            if members:
                await self._wait(members)
            exits |= {child.name: child.process.returncode or 0 for child in members}
        return exits

    async def during(self, work: Coroutine[None, None, T]) -> T:
        """Do `work`; give it up as soon as a process ends that was not told to.

        Raises:
            RunFailed: One did, naming it.
        """
        task = asyncio.ensure_future(work)
        try:
            waited: set[asyncio.Future[T] | asyncio.Future[RunFailed]] = {task, self._failure}
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if self._failure.done():
                raise self._failure.result()
            return task.result()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _start_again(self, child: _Child) -> None:
        await child.watcher
        try:
            await self.start_command(child.name, *child.command, environment=child.environment)
        except OSError as error:
            self._fail(RunFailed(f"{child.name} cannot be started again ({error.strerror})", process=child.name))

    async def _watch(self, name: str, process: asyncio.subprocess.Process) -> None:
        code = await process.wait()
        self._tell_guardian(f"-{process.pid}")
        child = self._children.get(name)
        if child is not None and not child.told_to_end:
            self._fail(RunFailed(f"{name} {ended_text(code)}, and nobody had told it to end", process=name))

    def _fail(self, failure: RunFailed) -> None:
        if not self._failure.done():
            self._failure.set_result(failure)

    async def _wait(self, members: list[_Child]) -> None:
        watchers = [child.watcher for child in members]
        _, pending = await asyncio.wait(watchers, timeout=STOP_GRACE_S)
        if pending:
            for child in members:
                with contextlib.suppress(ProcessLookupError):
                    child.process.kill()
            await asyncio.wait(pending)

    def _tell_guardian(self, line: str) -> None:
        assert self._guardian.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # somebody ended it; as long as we live, nothing is lost
            self._guardian.stdin.write(line.encode() + b"\n")


def ended_text(code: int) -> str:
    """How a process ended, for people, from its return code."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"
