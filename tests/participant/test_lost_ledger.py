"""A site whose ledger is lost or older than its audit log does not start; one that was killed does."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

import pytest
from tests.participant.local_site import CERTIFICATES, ISSUED, NAMES, NOW, OWN, Table, signer_of
from typer.testing import CliRunner

from maskwork.errors import StoreError
from maskwork.participant.audit import LOG_NAME, SiteTrail
from maskwork.participant.audit_commands import open_trail
from maskwork.participant.commands import app
from maskwork.participant.config import ParticipantConfig, TaskConfig
from maskwork.participant.ledger import DATABASE_NAME, Ledger
from maskwork.secagg.plan import survivors_digest


class Killed(BaseException):
    """The process ends here."""


@asynccontextmanager
async def a_site(folder: Path) -> AsyncIterator[Table]:
    """The participant under test, with its log on the disk."""
    folder.mkdir(exist_ok=True)
    (folder / "state").mkdir(exist_ok=True)
    trail = SiteTrail.open(
        folder / "state" / LOG_NAME,
        federation="test",
        certificate=CERTIFICATES[OWN],
        signer=signer_of(ISSUED[OWN]),
        clock=lambda: NOW,
        fsync=lambda _: None,
    )
    table = await Table(folder, audit=trail).start()
    try:
        yield table
    finally:
        await table.close()
        trail.close()


def start(folder: Path) -> None:
    """What the agent opens first, with the identity that the log is of."""
    ISSUED[OWN].write(folder / "identity")
    config = ParticipantConfig(
        coordinator="localhost:1",
        identity=folder / "identity",
        state=folder / "state",
        tasks={"digits": TaskConfig(use="m:T")},
    )
    with Ledger.open(config.state) as ledger, closing(open_trail(config, ledger)):
        pass


def restart(folder: Path) -> None:
    shutil.rmtree(folder / "identity")
    start(folder)


def lose_the_ledger(folder: Path) -> None:
    for path in (folder / "state").glob(f"{DATABASE_NAME}*"):
        path.unlink()


async def test_a_lost_ledger_ends_the_start_and_says_what_to_do(tmp_path: Path) -> None:
    async with a_site(tmp_path) as table:
        await table.play(table.offer())
    start(tmp_path)
    lose_the_ledger(tmp_path)
    for _ in range(2):  # the first refusal leaves nothing that the second would take for the ledger
        with pytest.raises(StoreError) as caught:
            restart(tmp_path)
        told = str(caught.value)
        assert caught.value.file == str(tmp_path / "state" / DATABASE_NAME)
        assert "lacks 1 of 1 plans taken up and 1 of 1 survivor sets answered for that audit.log" in told
        for words in ("Restore it from a backup", "move audit.log away too", "auditors", "knows nothing of what it"):
            assert words in told
    assert [path.name for path in (tmp_path / "state").glob(f"{DATABASE_NAME}*")] == [DATABASE_NAME], "no -wal is left"
    (tmp_path / "state" / LOG_NAME).rename(tmp_path / "for-auditors.log")
    restart(tmp_path)


async def test_a_ledger_from_before_the_last_release_ends_the_start_and_the_right_one_does_not(tmp_path: Path) -> None:
    ledger, old = tmp_path / "state" / DATABASE_NAME, tmp_path / "old"
    async with a_site(tmp_path) as table:
        await table.play(table.offer())
    shutil.copy(ledger, old)
    async with a_site(tmp_path) as table:
        await table.play(table.offer(round_number=4, previous_survivors=survivors_digest(NAMES)))
    right = shutil.copy(ledger, tmp_path / "right")
    shutil.copy(old, ledger)
    with pytest.raises(StoreError, match="lacks 1 of 2 plans taken up and 1 of 2 survivor sets answered for"):
        start(tmp_path)
    shutil.copy(right, ledger)
    restart(tmp_path)


async def test_a_plan_that_was_taken_up_is_missed_as_a_release_is(tmp_path: Path) -> None:
    async with a_site(tmp_path) as table:
        await table.propose(table.offer())
    lose_the_ledger(tmp_path)
    with pytest.raises(StoreError, match=r"lacks 1 of 1 plans taken up that audit\.log"):
        start(tmp_path)


@pytest.mark.parametrize("write", ["accepted", "releasing"])
async def test_killed_between_the_ledger_and_the_log_a_site_starts_again(write: str, tmp_path: Path) -> None:
    def killed(*_: object) -> None:
        raise Killed

    async with a_site(tmp_path) as table:
        setattr(table.driver._audit, write, killed)
        with pytest.raises(Killed):
            await table.play(table.offer())
    with Ledger.read(tmp_path / "state") as ledger:
        assert (len(ledger.sessions_taken_up()), len(ledger.sessions_released())) == (1, write == "releasing")
    start(tmp_path)


async def test_without_its_ledger_no_other_history_is_accepted_either(tmp_path: Path) -> None:
    async with a_site(tmp_path) as table:
        await table.play(table.offer())
    lose_the_ledger(tmp_path)
    ISSUED[OWN].write(tmp_path / "identity")
    config = tmp_path / "participant.toml"
    config.write_text(
        'coordinator = "localhost:1"\nidentity = "identity"\nstate = "state"\n[tasks.digits]\nuse = "m:T"\n'
    )
    words = ["accept-history", "--config", str(config), "--size", "7", "--head", "ab" * 32, "--reason", "a backup"]
    refused = CliRunner().invoke(app, words)
    assert isinstance(refused.exception, StoreError)
    assert "survivor sets answered for" in str(refused.exception)
