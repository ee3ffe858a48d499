"""Unmasking range by range, in several processes: to the bit what one pass over everything gives."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from maskwork.coordinator import unmasking
from maskwork.coordinator.forks import ChildDied, each_in_a_process, processors, shared_vector
from maskwork.coordinator.unmasking import cut, derive_masks, pieces, unmask
from maskwork.secagg import keys
from maskwork.secagg.encoding import Encoding, Rotation, decode_sum
from maskwork.secagg.errors import DealerEquivocated
from maskwork.secagg.keys import SecretKey
from maskwork.secagg.masking import remove_masks
from maskwork.secagg.prg import SignedKey
from maskwork.secagg.rotation import block_length
from maskwork.secagg.unmasking import MaskSecretShares, SelfSeedShares, UnmaskingJob, remaining_masks

SESSION, SEED = bytes(32), bytes(range(32))
NONE = Encoding(1.0, 10, 24, 28, Rotation.NONE)
ROTATED = Encoding(1.0, 10, 16, 20, Rotation.HADAMARD)
LENGTHS = [1, 2, 63, 64, 65, 1000, (1 << 16) - 1, 1 << 16, (1 << 17) + 5, 3 * (1 << 16) + 40_000]


@pytest.mark.parametrize("encoding", [NONE, ROTATED], ids=["exact", "rotated"])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_ranges_and_processes_change_nothing(
    length: int, processes: int, encoding: Encoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unmasking, "RANGE", 1 << 16)  # or every vector that a test can afford would be one piece
    monkeypatch.setattr(unmasking, "WORTH_A_PROCESS", 1)
    rng = np.random.default_rng(length)
    total = rng.integers(0, 1 << 32, length, np.uint32)
    masks = [SignedKey(bytes([i]) * 16, bool(i % 2)) for i in range(5)]
    before = rng.standard_normal(length, np.float32)
    model = shared_vector(length)
    model[:] = before
    unmask(
        lambda start, stop: total[start:stop].copy(),
        masks,
        encoding,
        rotation_seed=SEED,
        total_weight=30,
        model=model,
        processes=processes,
    )
    expected = total.copy()
    remove_masks(expected, masks)
    mean = np.empty(length, np.float32)
    decode_sum(expected, encoding, rotation_seed=SEED, total_weight=30, out_f32=mean)
    np.testing.assert_array_equal(model, before + mean)


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("length", [*LENGTHS, 5 * unmasking.RANGE + 77])
def test_the_ranges_cover_everything_once_and_cut_no_rotated_block(length: int, count: int, rotated: bool) -> None:
    ranges = cut(length, count, rotated=rotated)
    assert 1 <= len(ranges) <= count
    parts = [part for start, stop in ranges for part in pieces(start, stop, length=length)]
    assert parts[0][0] == 0
    assert parts[-1][1] == length
    assert all(a[1] == b[0] for a, b in pairwise(parts))
    assert all(start < stop for start, stop in parts)
    if rotated:
        block = block_length(length)
        last = (length // block - 1) * block
        assert all(start % block == 0 and start <= last for start, _ in parts)


# --- deriving the masks ---------------------------------------------------------------------------------------------


def a_job(survivors: int, dropouts: int) -> UnmaskingJob:
    """With a threshold of 1 every share is the secret itself."""
    seeds, dropped = [], []
    peers = {u: SecretKey(bytes([1, u % 256, u // 256]) + bytes(29)).public() for u in range(survivors)}
    for u in peers:
        seed = u.to_bytes(32, "big")
        seeds.append(SelfSeedShares(u, keys.seed_commitment(seed, owner=u, session=SESSION), {1: b"\0" + seed}))
    for u in range(survivors, survivors + dropouts):
        secret = b"\7" * 30 + u.to_bytes(2, "big")
        dropped.append(MaskSecretShares(u, SecretKey(secret).public(), {1: b"\0" + secret}, tuple(peers.items())))
    return UnmaskingJob(SESSION, tuple(seeds), tuple(dropped))


def sorted_keys(found: tuple[SignedKey, ...]) -> list[tuple[bytes, bool]]:
    return sorted((key.key, key.negative) for key in found)


@pytest.mark.parametrize("processes", [1, 2, 5])
def test_masks_derived_in_processes_are_the_same_masks(processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unmasking, "AGREEMENTS_WORTH_A_PROCESS", 10)
    job = a_job(survivors=20, dropouts=7)
    found, expected = derive_masks(job, processes=processes), remaining_masks(job)
    assert sorted_keys(found.update) == sorted_keys(expected.update)
    assert sorted_keys(found.statistics) == sorted_keys(expected.statistics)
    assert len(found.update) == 20 + 7 * 20


def test_a_dealer_is_convicted_whatever_process_finds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unmasking, "AGREEMENTS_WORTH_A_PROCESS", 1)
    job = a_job(survivors=4, dropouts=4)
    for cheat in range(8):
        seeds = [s if s.owner != cheat else SelfSeedShares(cheat, bytes(32), s.shares) for s in job.self_seeds]
        dropped = [
            s if s.owner != cheat else MaskSecretShares(cheat, keys.PublicKey(bytes(32)), s.shares, s.neighbours)
            for s in job.mask_secrets
        ]
        with pytest.raises(DealerEquivocated) as convicted:
            derive_masks(UnmaskingJob(SESSION, tuple(seeds), tuple(dropped)), processes=3)
        assert convicted.value.dealer == cheat


# --- processes ------------------------------------------------------------------------------------------------------


def test_results_come_in_order_and_no_process_is_left() -> None:
    here = os.getpid()

    def work(number: int) -> tuple[int, bool]:
        return number, os.getpid() == here

    done = each_in_a_process([partial(work, i) for i in range(4)])
    assert done == [(0, True), (1, False), (2, False), (3, False)]
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def fails() -> None:
    raise ValueError("in the child")


def dies() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hangs() -> None:
    signal.pause()


def test_an_error_in_a_child_is_raised_here_and_the_others_are_ended() -> None:
    began = time.monotonic()
    with pytest.raises(ValueError, match="in the child"):
        each_in_a_process([lambda: None, fails, hangs])
    with pytest.raises(ZeroDivisionError):
        each_in_a_process([lambda: 1 // 0, hangs])
    with pytest.raises(ChildDied):
        each_in_a_process([lambda: None, dies, hangs])
    assert time.monotonic() - began < 60


def test_children_end_with_their_parent(tmp_path: Path) -> None:
    told = tmp_path / "pid"

    def child() -> None:
        told.write_text(str(os.getpid()))
        hangs()

    middle = os.fork()
    if middle == 0:
        each_in_a_process([hangs, child])
        os._exit(0)
    while not told.exists() or not told.read_text():
        time.sleep(0.01)
    os.kill(middle, signal.SIGKILL)
    os.waitpid(middle, 0)
    pid = int(told.read_text())
    for _ in range(500):
        if not Path(f"/proc/{pid}").exists() or "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text():
            return
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("a child outlived its parent")


def test_there_is_at_least_one_processor() -> None:
    assert 1 <= processors() <= 8


def test_shared_memory_is_zeroed_and_seen_by_all() -> None:
    vector = shared_vector(3)
    assert vector.tolist() == [0, 0, 0]

    def write() -> None:
        vector[1] = 7

    each_in_a_process([lambda: None, write])
    assert vector.tolist() == [0, 7, 0]
