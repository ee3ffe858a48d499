"""One worker process beside an asyncio loop: heavy work runs there, so that the loop always answers.

The coordinator aggregates in one, a participant trains in one. What is passed are functions of importable modules and
small values (paths, keys, summaries); vectors go through files. It is a process and a pipe rather than a
`ProcessPoolExecutor`, because that one has no public way to end a hung worker and waits for it when the interpreter
ends.

It is NOT a pool, it limits no memory and no time (the caller cancels), and it is no sandbox.

Rules it upholds:

1. A worker ends when its parent does, even by SIGKILL and even in the middle of a call; the fork server follows.
2. A worker that died is told as `WorkerDied`, with the signal; the next call starts another.
3. A call that is cancelled ends its worker: nobody waits behind work that nobody wants.
4. Ctrl-C reaches the parent alone, which decides what becomes of the work.
5. A worker that crashes leaves no core dump, whatever its parent is allowed.
"""

import asyncio
import atexit
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from multiprocessing.reduction import ForkingPickler
from typing import Final, ParamSpec, TypeAlias, TypeVar, cast

from maskwork.dumps import forbid_core_dumps

P = ParamSpec("P")
R = TypeVar("R")

_PARENT_IS_GONE: Final = 70  # EX_SOFTWARE; nobody is left to read it


class WorkerDied(Exception):
    """The worker process ended before it answered; what it kept in memory is lost. The next call starts another."""


class WorkerFault(Exception):
    """A function in the worker ended with something that cannot be sent back as it is."""


@dataclass(frozen=True, slots=True)
class _Returned:
    value: object


@dataclass(frozen=True, slots=True)
class _Raised:
    error: Exception
    trace: str


_Outcome: TypeAlias = _Returned | _Raised


class _WorkerTraceback(Exception):
    """Carries the worker's traceback as text, as the cause of the error that is raised in the parent."""

    def __str__(self) -> str:
        return f"in the worker:\n{self.args[0]}"


class WorkerProcess:
    """A worker that is started when it is first called, and again after it died.

    Calls run one after another, in the order in which they were made. Use as an async context manager, or `close`.
    """

    def __init__(self, *, name: str, preload: Sequence[str] = (), setup: Callable[[], object] | None = None) -> None:
        """Describe the worker; nothing is started yet.

        Args:
            name: For process lists and errors.
            preload: Modules that the fork server imports once, so that each further worker starts with them in
                milliseconds. There is one fork server per process: the first worker's list counts.
            setup: Called in every new worker before anything else; what it raises is raised by the call that
                started the worker. Picklable, such as a `functools.partial` of a module's function.
        """
        self.name = name
        self._preload = list(preload)
        self._setup = setup
        self._turn = asyncio.Lock()
        self._child: _Child | None = None
        self._ending: list[_Child] = []

    @property
    def pid(self) -> int | None:
        """The process id of the worker, or None while there is none."""
        return self._child.process.pid if self._child else None

    async def start(self) -> None:
        """Start the worker and run its setup now rather than with the first call; does nothing if it runs.

        Raises:
            WorkerDied: It ended during its setup.
            Exception: Whatever the setup raised; there is no worker then.
        """
        async with self._turn:
            await self._running()

    async def call(self, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run `function` in the worker and wait for what it returns.

        Raises:
            WorkerDied: The worker ended, by itself or by `kill`, before it answered.
            WorkerFault: What the function raised or returned cannot be pickled; the text has the essence.
            Exception: Whatever the function raised, with the worker's traceback as its cause.
        """
        async with self._turn:
            child = await self._running()
            return cast("R", await self._exchange(child, function, args, kwargs))

    def kill(self) -> None:
        """End the worker at once (SIGKILL); a call that waits for it raises `WorkerDied`. The next call starts anew."""
        if self._child is not None:
            self._child.process.kill()
            self._ending.append(self._child)
            self._child = None

    async def close(self) -> None:
        """End the worker and wait until it is gone."""
        self.kill()
        while self._ending:
            await self._ending.pop().reap()

    async def __aenter__(self) -> "WorkerProcess":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _running(self) -> "_Child":
        if self._child is not None and self._child.is_idle():
            return self._child
        await self.close()  # of the one that died while nobody waited for it
        starting = asyncio.ensure_future(asyncio.to_thread(_start, self.name, self._preload))
        try:
            child = await asyncio.shield(starting)
        except asyncio.CancelledError:
            starting.add_done_callback(_kill_unwanted)  # the thread cannot be stopped; what it starts is not kept
            raise
        self._child = child
        if self._setup is not None:
            try:
                await self._exchange(child, self._setup, (), {})
            except BaseException:
                self.kill()
                raise
        return child

    async def _exchange(
        self, child: "_Child", function: Callable[..., object], args: tuple[object, ...], kwargs: dict[str, object]
    ) -> object:
        request = _pickled((function, args, kwargs))  # before anything is sent: our caller's mistake
        try:
            outcome = await child.exchange(request)
        except asyncio.CancelledError:
            self._retire(child)
            raise
        except (EOFError, OSError):
            self._retire(child)
            raise WorkerDied(f"the {self.name} worker {await child.reap()}") from None
        if isinstance(outcome, _Raised):
            raise outcome.error from _WorkerTraceback(outcome.trace)
        return outcome.value

    def _retire(self, child: "_Child") -> None:
        """Kill `child` unless `kill` did so already, in which case another may have taken its place."""
        if self._child is child:
            self.kill()


class _Child:
    def __init__(self, process: ForkServerProcess, pipe: "Connection[object, object]") -> None:
        self.process = process
        self._pipe = pipe
        self._reaping: asyncio.Task[str] | None = None

    def is_idle(self) -> bool:
        """Whether it waits for a request. Nothing comes from one that does, so what can be read is its end."""
        return not self._pipe.poll()

    async def exchange(self, request: bytes) -> _Outcome:
        """Send a request and wait for its outcome.

        Raises:
            EOFError: The worker is gone.
            OSError: The same, noticed earlier.
        """
        # The worker is reading whenever nobody else waits for it, so this does not block for longer than it copies.
        self._pipe.send_bytes(request)
        await _readable(self._pipe.fileno())
        return cast("_Outcome", self._pipe.recv())

    async def reap(self) -> str:
        """Wait until the process is gone, release what it held here, and say how it ended."""
        if self._reaping is None:
            self._reaping = asyncio.ensure_future(self._reap())
        return await asyncio.shield(self._reaping)

    async def _reap(self) -> str:
        await _readable(self.process.sentinel)
        return self.release()

    def release(self) -> str:
        """The same without an event loop: blocks until the process is gone."""
        self.process.join()
        atexit.unregister(self.process.kill)
        ending = _ending(self.process.exitcode)
        self.process.close()
        self._pipe.close()
        return ending


def _start(name: str, preload: Sequence[str]) -> _Child:
    """Start a worker. Blocks until the fork server has imported what it preloads, so it runs in a thread."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    here, there = context.Pipe()
    try:
        process = context.Process(target=_serve, args=(there,), name=f"maskwork-{name}")
        process.start()
    except BaseException:
        here.close()
        raise
    finally:
        there.close()  # the worker's own copy is then the last: its end is the end of the pipe
    # Not a daemon of multiprocessing, which could have no children of its own (a data loader's); so the interpreter
    # would wait for it when it exits, and what is registered last runs first.
    atexit.register(process.kill)
    return _Child(process, here)


def _kill_unwanted(starting: "asyncio.Future[_Child]") -> None:
    if not starting.cancelled() and starting.exception() is None:
        child = starting.result()
        child.process.kill()
        child.release()


async def _readable(descriptor: int) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(descriptor, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(descriptor)


def _ending(exit_code: int | None) -> str:
    if exit_code is None or exit_code >= 0:
        return f"ended by itself with exit code {exit_code}"
    number = -exit_code
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    hint = "; if nobody ended it, the system may have run out of memory" if name == "SIGKILL" else ""
    return f"was ended by {name}{hint}"


def _pickled(value: object) -> bytes:
    with ForkingPickler.dumps(value) as view:
        return bytes(view)


# --- in the worker --------------------------------------------------------------------------------------------------


def _serve(pipe: "Connection[object, object]") -> None:
    forbid_core_dumps()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, name="end-with-parent", daemon=True).start()
    while True:
        try:
            pipe.send_bytes(_answer(pipe.recv_bytes()))
        except (EOFError, OSError):
            return  # nobody is left to answer to


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(_PARENT_IS_GONE)  # at once: the main thread may be deep in a call


def _answer(request: bytes) -> bytes:
    outcome: _Outcome
    try:
        function, args, kwargs = ForkingPickler.loads(request)
        outcome = _Returned(function(*args, **kwargs))
        return _pickled(outcome)
    except (Exception, SystemExit) as error:
        outcome = _Raised(_sendable(error), traceback.format_exc())
    finally:
        sys.stdout.flush()
    return _pickled(outcome)


def _sendable(error: BaseException) -> Exception:
    """The error itself if it survives the way to the parent, else what can be said of it.

    Only errors of this project and of Python go as they are: to unpickle any other would import its module, a site's
    task with all of torch perhaps, into the parent.
    """
    told = WorkerFault(f"{type(error).__name__}: {error}")
    if not isinstance(error, Exception) or type(error).__module__.partition(".")[0] not in ("builtins", "maskwork"):
        return told
    try:
        ForkingPickler.loads(_pickled(error))
    except Exception:  # a constructor that does not take back what it gave
        return told
    return error
