"""The worker process, with real processes: crashes, kills, cancellation, Ctrl-C, and a parent that dies by SIGKILL.

Nothing here waits for a time to pass: a process's end is seen on its pidfd, its progress on a pipe.
"""

import asyncio
import multiprocessing
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio

from maskwork.errors import StoreError
from maskwork.participant import training_calls
from maskwork.participant.tasks.digits import Digits
from maskwork.participant.training import initial_vector
from maskwork.task import TaskError, TrainingConfig
from maskwork.tensors import write_model
from maskwork.worker import WorkerDied, WorkerFault, WorkerProcess

pytestmark = pytest.mark.e2e

PATIENCE_S = 100.0

# The fork server is shared by all tests of a process, and this module brings torch.
PRELOAD = (*training_calls.PRELOAD, "sklearn.datasets")

_kept: list[object] = []


def keep(value: object) -> int:
    _kept.append(value)
    return os.getpid()


def kept() -> list[object]:
    return _kept


def hang(fifo: Path) -> None:
    """Tell that it is here, then never return."""
    fifo.write_bytes(b"x")
    threading.Event().wait()


def fail(error: Exception) -> None:
    raise error


class Mine(Exception):  # a site's own class
    """An error whose module the parent should not import."""


def fail_in_my_own_way() -> None:
    raise Mine("the scanner is off")


def fail_to_store() -> None:
    raise StoreError("the disk is full", file="/models", remedy="Free some space")


def return_what_cannot_travel() -> object:
    return threading.Lock()


def interrupt_itself() -> str:
    os.kill(os.getpid(), signal.SIGINT)
    return "still here"


def grandchild() -> int | None:
    child = multiprocessing.get_context("spawn").Process(target=abs, args=(1,))
    child.start()
    child.join()
    return child.exitcode


def wait_for_end(*pids: int) -> None:
    """Return when none of the processes is left; they are not ours to wait for."""
    poll = select.poll()
    descriptors = {}
    for pid in pids:
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        descriptors[descriptor] = pid
        poll.register(descriptor, select.POLLIN)
    try:
        while descriptors:
            ended = poll.poll(PATIENCE_S * 1000)
            assert ended, f"still running: {sorted(descriptors.values())}"
            for descriptor, _ in ended:
                poll.unregister(descriptor)
                os.close(descriptor)
                del descriptors[descriptor]
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


@pytest_asyncio.fixture
async def worker() -> AsyncIterator[WorkerProcess]:
    async with WorkerProcess(name="test", preload=PRELOAD) as made:
        yield made


async def hanging(worker: WorkerProcess, folder: Path) -> "asyncio.Task[None]":
    """A call that hangs, once it is known to be under way."""
    fifo = folder / "here"
    os.mkfifo(fifo)
    call = asyncio.create_task(worker.call(hang, fifo))
    assert await asyncio.to_thread(fifo.read_bytes) == b"x"
    fifo.unlink()
    return call


async def test_calls_run_in_one_other_process(worker: WorkerProcess) -> None:
    assert worker.pid is None
    pids = await asyncio.gather(*(worker.call(keep, i) for i in range(5)))
    assert set(pids) == {worker.pid} != {os.getpid()}
    assert await worker.call(kept) == [0, 1, 2, 3, 4]  # in the order of the calls
    assert _kept == []


async def test_the_loop_answers_meanwhile(worker: WorkerProcess, tmp_path: Path) -> None:
    call = await hanging(worker, tmp_path)
    assert not call.done()
    worker.kill()
    with pytest.raises(WorkerDied):
        await call


async def test_errors_come_back_with_the_workers_traceback(worker: WorkerProcess) -> None:
    pid = await worker.call(os.getpid)
    with pytest.raises(TaskError, match="no such shard") as caught:
        await worker.call(fail, TaskError("no such shard"))
    assert "in fail" in str(caught.value.__cause__)
    with pytest.raises(WorkerFault, match="Mine: the scanner is off"):
        await worker.call(fail_in_my_own_way)
    with pytest.raises(WorkerFault, match="SystemExit: 3"):
        await worker.call(sys.exit, 3)
    with pytest.raises(TypeError, match="lock"):
        await worker.call(return_what_cannot_travel)
    with pytest.raises(UnicodeDecodeError):  # its constructor takes five arguments, and gives them back
        await worker.call(bytes.decode, b"\xff")
    with pytest.raises((WorkerFault, StoreError), match="/models: the disk is full"):  # one that may not give them back
        await worker.call(fail_to_store)
    assert await worker.call(os.getpid) == pid  # none of them cost the worker its life


async def test_a_request_that_cannot_travel_is_the_callers_mistake(worker: WorkerProcess) -> None:
    pid = await worker.call(os.getpid)
    with pytest.raises((TypeError, AttributeError)):
        await worker.call(keep, threading.Lock())
    assert await worker.call(os.getpid) == pid


async def test_a_crash_is_told_and_the_next_call_starts_another(worker: WorkerProcess) -> None:
    first = await worker.call(keep, 1)
    with pytest.raises(WorkerDied, match="the test worker ended by itself with exit code 7"):
        await worker.call(os._exit, 7)
    assert worker.pid is None
    assert await worker.call(kept) == []
    assert worker.pid != first
    wait_for_end(first)


async def test_a_kill_from_outside_names_the_signal(worker: WorkerProcess, tmp_path: Path) -> None:
    call = await hanging(worker, tmp_path)
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(WorkerDied, match="SIGKILL; if nobody ended it, the system may have run out of memory"):
        await call
    call = await hanging(worker, tmp_path)
    os.kill(worker.pid, signal.SIGTERM)
    with pytest.raises(WorkerDied, match=r"was ended by SIGTERM$"):
        await call


async def test_a_worker_that_died_unnoticed_is_replaced(worker: WorkerProcess) -> None:
    first = await worker.call(os.getpid)
    os.kill(first, signal.SIGKILL)
    wait_for_end(first)
    assert await worker.call(os.getpid) != first


async def test_a_cancelled_call_ends_its_worker(worker: WorkerProcess, tmp_path: Path) -> None:
    call = await hanging(worker, tmp_path)
    pid = worker.pid
    waiting = asyncio.create_task(worker.call(os.getpid))
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert await waiting != pid  # it waited behind the cancelled one, and got a worker of its own
    assert pid is not None
    wait_for_end(pid)


async def test_a_start_that_is_cancelled_leaves_no_worker(worker: WorkerProcess) -> None:
    await worker.start()
    await worker.close()  # now there is a fork server, whose files are not counted
    before = os.listdir("/proc/self/fd")
    starting = asyncio.create_task(worker.start())
    await asyncio.sleep(0)  # lets it begin; nothing is waited for
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert worker.pid is None
    assert await worker.call(kept) == []  # the fork server starts one after another: the unwanted one has been by now
    assert [child.pid for child in multiprocessing.active_children()] == [worker.pid]
    await worker.close()
    assert len(os.listdir("/proc/self/fd")) == len(before)


async def test_setup_runs_in_every_new_worker() -> None:
    async with WorkerProcess(name="test", preload=PRELOAD, setup=partial(keep, "ready")) as worker:
        await worker.start()
        assert worker.pid is not None
        assert await worker.call(kept) == ["ready"]
        worker.kill()
        assert await worker.call(kept) == ["ready"]


async def test_a_setup_that_fails_leaves_no_worker() -> None:
    async with WorkerProcess(name="test", preload=PRELOAD, setup=partial(fail, TaskError("no data"))) as worker:
        for _ in range(2):
            with pytest.raises(TaskError, match="no data"):
                await worker.call(kept)
            assert worker.pid is None
    async with WorkerProcess(name="test", preload=PRELOAD, setup=partial(os._exit, 9)) as worker:
        with pytest.raises(WorkerDied, match="exit code 9"):
            await worker.start()


async def test_close_leaves_nothing_behind(tmp_path: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))
    worker = WorkerProcess(name="test", preload=PRELOAD)
    call = await hanging(worker, tmp_path)
    pid = worker.pid
    assert pid is not None
    await worker.close()
    assert not Path(f"/proc/{pid}").exists()  # not even a zombie
    with pytest.raises(WorkerDied):
        await call
    await worker.close()
    assert len(set(os.listdir("/proc/self/fd")) - before) <= 4  # the fork server's, if this was the first worker


async def test_an_interrupt_is_the_parents_business(worker: WorkerProcess) -> None:
    assert await worker.call(interrupt_itself) == "still here"


async def test_a_worker_may_have_children_of_its_own(worker: WorkerProcess) -> None:
    assert await worker.call(grandchild) == 0


# --- a parent that dies ---------------------------------------------------------------------------------------------

_PARENT = """
import asyncio, os, sys, threading
from maskwork.worker import WorkerProcess

def main():
    async def run():
        worker = WorkerProcess(name="orphan")
        print(await worker.call(os.getpid), await worker.call(os.getppid), flush=True)
        {then}
    asyncio.run(run())

if __name__ == "__main__":
    main()
"""


def start_parent(folder: Path, then: str) -> tuple["subprocess.Popen[str]", list[int]]:
    script = folder / "parent.py"
    script.write_text(_PARENT.format(then=then))
    parent = subprocess.Popen([sys.executable, "-W", "error", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    return parent, [int(word) for word in parent.stdout.readline().split()]


@pytest.mark.parametrize(
    "then",
    [
        "await worker.call(sys.stdin.read)",  # the worker waits in the kernel
        "await worker.call(eval, 'any(False for _ in iter(int, 1))')",  # the worker computes for ever
        "threading.Event().wait()",  # the worker is idle
    ],
    ids=["blocked", "busy", "idle"],
)
def test_a_worker_and_its_fork_server_end_with_a_killed_parent(tmp_path: Path, then: str) -> None:
    parent, pids = start_parent(tmp_path, then)
    with parent:
        assert len(pids) == 2
        parent.kill()
    wait_for_end(*pids)


def test_a_parent_that_forgets_to_close_can_still_exit(tmp_path: Path) -> None:
    parent, pids = start_parent(tmp_path, "globals()['kept'] = worker")
    with parent:
        assert parent.wait(PATIENCE_S) == 0
    wait_for_end(*pids)


# --- training in one ------------------------------------------------------------------------------------------------


async def test_a_round_of_training_in_a_worker(tmp_path: Path) -> None:
    schema, vector = initial_vector(Digits(), 1)
    model = tmp_path / "m.safetensors"
    write_model(model, schema, vector, {})
    setup = partial(training_calls.configure, "maskwork.participant.tasks.digits:Digits", {"shard": 1, "of": 5})
    request = training_calls.TrainRequest(bytes(32), model, schema.size, TrainingConfig(epochs=2), 7)
    async with WorkerProcess(name="training", preload=PRELOAD, setup=setup) as worker:
        first = await worker.call(training_calls.train, request)
        worker.kill()
        second = await worker.call(training_calls.train, request)
    assert first.examples == second.examples == 245
    assert first.train_metrics == second.train_metrics
    assert first.update_norm == second.update_norm
    assert np.isfinite(first.update_norm)
