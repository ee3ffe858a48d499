"""What the benchmarks are made of: memory of process trees, the counting relay, the plain variant, and the shapes."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from maskwork.bench.memory import PeakMemory, peak_rss_bytes, pss_bytes, tree
from maskwork.coordinator.bench import secagg
from maskwork.errors import UserError
from maskwork.participant.bench import federation as federations
from maskwork.participant.bench.relay import CountingRelay
from maskwork.secagg.unmasking import remaining_masks

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")

SLEEPS = [sys.executable, "-c", "import sys; sys.stdout.write('.'); sys.stdout.flush(); sys.stdin.read()"]


def shape(**changes: object) -> secagg.Shape:
    asked: dict[str, object] = {
        "participants": 10,
        "neighbours": None,
        "threshold": None,
        "parameters": 1000,
        "dropout": 0.3,
        "ring_bits": None,
        "rotated": False,
        "repeats": 1,
    }
    return secagg.shape_of(**{**asked, **changes})  # type: ignore[arg-type]


def test_a_child_is_found_whatever_thread_started_it() -> None:
    started: list[subprocess.Popen[bytes]] = []

    def start() -> None:
        started.append(subprocess.Popen(SLEEPS, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        waiting.wait()  # a thread that has ended leaves its children to another one

    waiting = threading.Event()
    thread = threading.Thread(target=start)
    thread.start()
    while not started:
        thread.join(0.01)
    child = started[0]
    assert child.stdout is not None
    child.stdout.read(1)
    try:
        assert {os.getpid(), child.pid} <= set(tree(os.getpid()))
        memory = PeakMemory({"all": os.getpid(), "child": child.pid})
        memory.look()
        assert memory.peaks["all"] > memory.peaks["child"] > 1 << 20
    finally:
        waiting.set()
        thread.join()
        child.communicate()
    assert pss_bytes(child.pid) == 0
    assert tree(child.pid) == [child.pid]
    assert peak_rss_bytes() > 1 << 20


async def test_the_relay_passes_on_and_counts_each_way() -> None:
    async def echo_twice(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        said = await reader.read()
        writer.write(said + said)
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(echo_twice, "127.0.0.1", 0)
    async with server, CountingRelay(server.sockets[0].getsockname()[1]) as relay:
        reader, writer = await asyncio.open_connection("127.0.0.1", relay.port)
        writer.write(bytes(1_000_000))
        await writer.drain()
        writer.write_eof()
        assert len(await reader.read()) == 2_000_000
        writer.close()
        await writer.wait_closed()
        assert (relay.up, relay.down) == (1_000_000, 2_000_000)


ADDS = """
import numpy as np
from maskwork.secagg.prg import MaskStreams, SignedKey
values = np.zeros(8, np.uint32)
MaskStreams([SignedKey(bytes(16), False)], item_bytes=4).add_to(values)
print(values.any())
"""


@pytest.mark.parametrize("plain", [True, False])
def test_only_the_plain_federations_processes_expand_no_masks(tmp_path: Path, plain: bool) -> None:
    federation = federations.create(tmp_path / "it", ("site-0",), plain=plain)
    environment = {**os.environ, **federation.environment}
    done = subprocess.run(
        [sys.executable, "-P", "-c", ADDS], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(not plain)


def test_the_masks_left_in_the_sum_are_the_survivors_own_and_the_dropouts_pairs() -> None:
    complete = shape()
    assert (complete.dropouts, complete.threshold, complete.ring_bits) == (3, 7, 28)
    assert len(remaining_masks(secagg.unmasking_job(complete)).update) == 7 + 3 * 7
    sparse = shape(participants=100, neighbours=10, dropout=0.1)
    assert len(remaining_masks(secagg.unmasking_job(sparse)).update) == 90 + 10 * 9


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"neighbours": 10}, "--neighbours 10"),
        ({"neighbours": 5}, "even degree"),
        ({"threshold": 11}, "10 holders"),
        ({"dropout": 0.5}, "the round is lost"),
        ({"ring_bits": 33}, "--ring-bits 33"),
        ({"ring_bits": 4}, "--ring-bits 4"),
    ],
)
def test_a_shape_that_is_no_round_is_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        shape(**changes)


def test_both_sides_are_measured_beside_their_floors() -> None:
    measured = secagg.measure(shape(parameters=100_000, rotated=True))
    site, hub = measured["participant"], measured["coordinator"]
    assert site["masks"] == 10
    assert hub["masks_expanded"] == 28
    assert site["upload_bytes"] == 250_000
    assert 0 < site["nmse"] < 1e-4
    assert all(value > 0 for figures in (site, hub) for name, value in figures.items() if name.endswith("_s"))
    assert site["total_s"] > 0.5 * site["floor.mask_floor_s"]
