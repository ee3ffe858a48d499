"""The same kind of work in several processes at once, on memory that they share.

Unmasking is bound by the cipher, which holds the interpreter's lock: threads do not help, processes do. A fork starts
one in about a millisecond with everything already in memory, which a tenth of a second of work can afford; a pool could
not share a vector that is made for the occasion. What is written to memory from `shared_vector` is seen by all.

It is NOT for anything that waits, opens files for writing or talks to anybody: a child computes, answers and is gone.

Rules it upholds: the children end when this process does, even by SIGKILL (on Linux; elsewhere after their part); an
error in a child is raised here, as it is; none is left behind, whatever happens.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import pickle
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Final, NoReturn, TypeVar, cast

import numpy as np

from maskwork.tensors import Float32Array

T = TypeVar("T")

MOST: Final = 8
_PR_SET_PDEATHSIG: Final = 1


class ChildDied(RuntimeError):
    """A child ended before it answered: killed, perhaps for want of memory."""


def processors() -> int:
    """How many processes are worth having here: the processors that this one may use, `MOST` at the most."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST, available)


def shared_vector(length: int) -> Float32Array:
    """float32[length] of zeros in memory that children write into for all to see; it belongs to no file."""
    return np.frombuffer(mmap.mmap(-1, max(4 * length, 1)), np.float32, count=length)


def each_in_a_process(works: Sequence[Callable[[], T]]) -> list[T]:
    """Run every work at the same time, the first one here and each other in a child; their results, in order.

    Raises:
        ChildDied: A child was ended by a signal.
        Exception: What a work raised, the first in order.
    """
    children: list[tuple[int, int]] = []
    try:
        for work in works[1:]:
            children.append(_start(work))
        results = [works[0]()]
        for _, answers in children:
            results.append(cast("T", _answer(answers)))
        return results
    finally:
        for pid, answers in children:
            os.close(answers)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _start(work: Callable[[], object]) -> tuple[int, int]:
    parent = os.getpid()
    answers, answering = os.pipe()
    with warnings.catch_warnings():
        # Python 3.12 warns of forks beside threads: the only other thread of a worker waits for its parent's end.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        _child(work, answering, parent)
    os.close(answering)
    return pid, answers


def _child(work: Callable[[], object], answering: int, parent: int) -> NoReturn:
    code = 1
    try:
        _end_with(parent)
        outcome: tuple[bool, object]
        try:
            outcome = (True, work())
        except Exception as error:
            outcome = (False, error)
        with open(answering, "wb") as pipe:
            pipe.write(pickle.dumps(outcome, pickle.HIGHEST_PROTOCOL))
        code = 0
    finally:
        os._exit(code)  # nothing of the parent's is flushed or cleaned up twice


def _end_with(parent: int) -> None:
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))
    if os.getppid() != parent:
        os._exit(1)


def _answer(answers: int) -> object:
    with open(os.dup(answers), "rb") as pipe:
        raw = pipe.read()
    if not raw:
        raise ChildDied("a process that unmasked ended before its part was done")
    # From our own fork, over a pipe that nobody else has.
    done, value = cast("tuple[bool, object]", pickle.loads(raw))  # noqa: S301
    if not done:
        assert isinstance(value, Exception)
        raise value
    return value
