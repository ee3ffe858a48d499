"""A coordinator whose state is encrypted: it works as any other, and its disk holds nothing that can be read.

The whole of it: rounds, restarts in the middle, keys that are missing or wrong, turning encryption on, rotation that is
killed and repeated, and what somebody with the disk can put there.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.coordinator.local_federation import (
    NOW,
    PARAMETERS,
    SITES,
    LocalCoordinator,
    LocalSite,
    connect_all,
    federation,
    mean_update,
    model_of,
)
from tests.coordinator.test_driver_rollback import break_file, run_until

from maskwork.coordinator import aggregation, at_rest, sealed
from maskwork.coordinator.at_rest import open_vault, rotate
from maskwork.coordinator.at_rest_key import Encryption
from maskwork.coordinator.models import ModelDamaged, ModelStore
from maskwork.coordinator.records import EvidenceRecord, JobState
from maskwork.coordinator.sealed import MasterKey, MasterKeys, NotSealed, WrongKey
from maskwork.coordinator.shape import SessionShape
from maskwork.coordinator.spool import Spool
from maskwork.coordinator.store import Store
from maskwork.coordinator.vault import UploadSeal, Vault
from maskwork.errors import StoreError, UserError
from maskwork.secagg.keys import Segment
from maskwork.secagg.messages import ShareKeys, SurvivorSignatures, Unmask
from maskwork.tensors import read_vector

FIRST, SECOND = (MasterKey(hashlib.sha256(bytes([i])).digest()) for i in range(2))
VAULT = Vault("ward", MasterKeys(FIRST))
ROTATING = Vault("ward", MasterKeys(SECOND, FIRST), accept_plain=True)
TRANSCRIPT = b"transcript " * 10_000  # longer than a page of the database
ROTATED = Vault("ward", MasterKeys(SECOND))


async def run_a_job(folder: Path, vault: Vault | None) -> bytes:
    """A job of two rounds, from beginning to end; its last model's digest."""
    async with federation(folder, SITES[:3], vault=vault) as (coordinator, sites):
        coordinator.add_job(rounds=2)
        await connect_all(coordinator, sites)
        record = await coordinator.until_ended()
        assert record.state is JobState.COMPLETED, record.reason
        np.testing.assert_allclose(model_of(coordinator, record.current_model), 2 * mean_update(SITES[:3]), atol=1e-5)
        return record.current_model


async def stopped_before_unmasking(folder: Path, vault: Vault | None) -> dict[str, LocalSite]:
    """A federation whose coordinator is killed when it has asked for Unmask."""
    coordinator, sites = LocalCoordinator(folder, vault=vault), {name: LocalSite(name) for name in SITES[:3]}
    coordinator.start()
    coordinator.add_job()
    sites["site-c"].silent = {Unmask}
    await connect_all(coordinator, sites)
    await sites["site-c"].until_heard(SurvivorSignatures)
    await coordinator.settled()
    await coordinator.crash()
    for site in sites.values():
        assert site._pump is not None
        site._pump.cancel()
        site.silent = set()
    return sites


async def resume(folder: Path, vault: Vault | None, sites: dict[str, LocalSite]) -> None:
    async with federation(folder, vault=vault) as (restarted, _):
        for site in sites.values():
            await site.connect(restarted.driver, active=True)
        record = await restarted.until_ended()
        assert record.state is JobState.COMPLETED
        assert len(restarted.store.attempts("job-1")) == 1
        np.testing.assert_allclose(model_of(restarted, record.current_model), mean_update(SITES[:3]), atol=1e-5)


def dealt_by(site: LocalSite) -> bytes:
    """A piece of every transcript: a commitment that the site sent."""
    return next(m for m in site.said if isinstance(m, ShareKeys)).shares[1].self_commitment


def files_under(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# --- a coordinator with a key ---------------------------------------------------------------------------------------


async def test_an_encrypted_coordinator_computes_the_same_models(tmp_path: Path) -> None:
    """Named by the digests of the plain ones: the same job gives the same digest either way."""
    (tmp_path / "sealed").mkdir()
    (tmp_path / "plain").mkdir()
    digest = await run_a_job(tmp_path / "sealed", VAULT)
    assert digest == await run_a_job(tmp_path / "plain", None)
    models = ModelStore(tmp_path / "sealed" / "models", vault=VAULT)
    content = models.file(digest).read_bytes()
    assert hashlib.sha256(content).digest() == digest
    assert models.file(digest).size == len(content)
    assert content == (tmp_path / "plain" / "models" / f"{digest.hex()}.safetensors").read_bytes()


async def test_nothing_of_a_model_is_on_the_disk_of_an_encrypted_coordinator(tmp_path: Path) -> None:
    for vault, found in ((None, True), (VAULT, False)):
        folder = tmp_path / str(found)
        folder.mkdir()
        digest = await run_a_job(folder, vault)
        plain = ModelStore(folder / "models", vault=vault).file(digest).read_bytes()
        everything = b"".join(files_under(folder).values())
        assert (plain[-4 * PARAMETERS :] in everything) is found
        assert (b'"dtype":"F32"' in everything) is found


async def test_a_session_is_resumed_from_an_encrypted_accumulator_and_transcript(tmp_path: Path) -> None:
    sites = await stopped_before_unmasking(tmp_path, VAULT)
    (session,) = (tmp_path / "sessions").iterdir()
    assert os.listdir(session) == ["accumulator"]
    assert sealed.is_sealed(session / "accumulator")
    database = b"".join(body for path, body in files_under(tmp_path).items() if ".sqlite" in path.name)
    assert dealt_by(sites["site-a"]) not in database
    await resume(tmp_path, VAULT, sites)


async def test_without_encryption_that_transcript_would_be_found(tmp_path: Path) -> None:
    sites = await stopped_before_unmasking(tmp_path, None)
    database = b"".join(body for path, body in files_under(tmp_path).items() if ".sqlite" in path.name)
    assert dealt_by(sites["site-a"]) in database


def add_evidence(store: Store, session: bytes, accused: str) -> None:
    store.add_evidence(EvidenceRecord("job-1", session, "dealer-equivocated", accused, TRANSCRIPT, NOW))


async def test_an_encrypted_record_opens_in_its_own_row_alone(tmp_path: Path) -> None:
    await run_a_job(tmp_path, VAULT)
    with Store.open(f"sqlite:///{tmp_path}/coordinator.sqlite", vault=VAULT) as store:
        session = store.attempts("job-1")[0].session_id
        for accused in ("site-a", "site-b"):
            add_evidence(store, session, accused)
        assert [e.transcript for e in store.evidence("job-1")] == [TRANSCRIPT] * 2
        with store._engine.begin() as connection:
            rows = connection.exec_driver_sql("SELECT transcript FROM evidence").scalars().all()
            assert not any(b"transcript" in row for row in rows)
            connection.exec_driver_sql("UPDATE evidence SET transcript = ? WHERE accused = 'site-b'", (rows[0],))
        with pytest.raises(StoreError, match="changed, or is another one's"):
            store.evidence("job-1")
        with store._engine.begin() as connection:
            connection.exec_driver_sql("UPDATE evidence SET transcript = ?", (TRANSCRIPT,))
        with pytest.raises(NotSealed, match="accept_plain"):
            store.evidence("job-1")
    with Store.open(f"sqlite:///{tmp_path}/coordinator.sqlite") as store:
        add_evidence(store, session, "site-c")


# --- spools ---------------------------------------------------------------------------------------------------------


def test_an_upload_that_is_cut_goes_on_where_it_was_and_is_never_plain_on_the_disk(tmp_path: Path) -> None:
    shape = SessionShape(parameters=200_000, ring_bits=20, statistics=2)
    body = hashlib.shake_256(b"upload").digest(shape.upload_bytes)
    session = bytes(32)
    spool = Spool(tmp_path / "u", shape, UploadSeal(VAULT, VAULT.accumulator(session), VAULT.upload(session, 1)))
    at = 0
    for step in (1, 65_535, 65_537, 131_072, 10_000, 500_000):
        with spool.writing() as writer:
            for start in range(at, min(at + step, shape.update_bytes), 50_000):
                piece = body[start : min(start + 50_000, at + step, shape.update_bytes)]
                writer.write(Segment.UPDATE, start, piece)
            at = spool.received
    with spool.writing() as writer:
        writer.write(Segment.STATISTICS, 0, body[shape.update_bytes :])
    assert spool.complete
    with VAULT.open(tmp_path / "u", VAULT.upload(session, 1)) as file:
        assert file.read() == body
    raw = (tmp_path / "u").read_bytes()
    assert not any(body[start : start + 16] in raw for start in range(0, len(body) - 16, 997))
    with pytest.raises(StoreError, match="is not the upload"):  # another member's upload in its place
        VAULT.open(tmp_path / "u", VAULT.upload(session, 2))


def test_an_upload_of_another_length_or_member_changes_nothing_and_leaves_no_file(tmp_path: Path) -> None:
    shape = SessionShape(parameters=1000, ring_bits=20, statistics=2)
    accumulator, session = tmp_path / "accumulator", bytes(32)
    aggregation.create_accumulator(accumulator, shape, seal=(VAULT, session))
    before = accumulator.read_bytes()
    seal = UploadSeal(VAULT, VAULT.accumulator(session), VAULT.upload(session, 1))
    for length in (0, shape.upload_bytes - 1, shape.upload_bytes + 1):
        with (tmp_path / "upload").open("w+b", buffering=0) as file:
            writer = sealed.SealedWriter(file)
            writer.write(bytes(length))
            writer.seal(seal.upload, FIRST)
        with pytest.raises(ValueError, match=f"{length} bytes where"):
            aggregation.add_upload(accumulator, tmp_path / "upload", shape, seal)
        other = replace(seal, upload=VAULT.upload(session, 2))
        with pytest.raises(StoreError, match="is not the upload"):
            aggregation.add_upload(accumulator, tmp_path / "upload", shape, other)
    assert accumulator.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["accumulator", "upload"]


# --- keys that are missing or wrong ---------------------------------------------------------------------------------


def settings(folder: Path, key: MasterKey, name: str = "key", **others: object) -> Encryption:
    path = folder / name
    if not path.exists():
        path.write_text(key.raw.hex())
        path.chmod(0o600)
    return Encryption.model_validate({"key_file": path, **others})


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    (tmp_path / "keys").mkdir()
    return tmp_path / "keys"


async def test_a_wrong_or_missing_key_at_the_start_is_told_and_nothing_is_touched(tmp_path: Path, keys: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    await run_a_job(state, VAULT)
    before = files_under(state)
    cases: list[tuple[Encryption, str]] = [
        (settings(keys, SECOND, "second"), f"encrypted with the key {FIRST.id.hex()}.*gives {SECOND.id.hex()}"),
        (Encryption(), f"encrypted with the key {FIRST.id.hex()}, and no encryption is configured"),
        (Encryption(key_file=keys / "lost"), r"lost: the key .* cannot be read \(No such file"),
        (Encryption(key_env="NO_SUCH_VARIABLE"), "no environment variable NO_SUCH_VARIABLE"),
    ]
    for wrong, said in cases:
        with pytest.raises(UserError, match=said) as caught:
            open_vault(wrong, federation="ward", state=state)
        assert FIRST.raw.hex() not in str(caught.value)
        assert SECOND.raw.hex() not in str(caught.value)
        assert files_under(state) == before
    opened = open_vault(settings(keys, FIRST), federation="ward", state=state)
    assert opened == VAULT


async def test_a_plain_model_is_refused_where_the_state_is_encrypted(tmp_path: Path, keys: Path) -> None:
    """A downgrade: somebody with the disk puts a plain file, of the right digest even, in place of an encrypted one."""
    digest = await run_a_job(tmp_path, VAULT)
    models = ModelStore(tmp_path / "models", vault=VAULT)
    plain = models.file(digest).read_bytes()
    models.path(digest).write_bytes(plain)
    for use in (models.verify, lambda d: models.file(d).open(), lambda d: read_vector(models.file(d))):
        with pytest.raises(NotSealed, match=r"is not encrypted.*rotate-key.*accept_plain"):
            use(digest)
    with pytest.raises(NotSealed, match="is not encrypted"):
        open_vault(settings(keys, FIRST), federation="ward", state=tmp_path)
    accepting = open_vault(settings(keys, FIRST, accept_plain=True), federation="ward", state=tmp_path)
    assert accepting is not None
    assert ModelStore(tmp_path / "models", vault=accepting).file(digest).read_bytes() == plain


async def test_a_plain_accumulator_is_refused_where_the_state_is_encrypted(tmp_path: Path) -> None:
    await stopped_before_unmasking(tmp_path, VAULT)
    (session,) = (tmp_path / "sessions").iterdir()
    with VAULT.open(session / "accumulator", VAULT.accumulator(bytes.fromhex(session.name))) as file:
        plain = file.read()
    (session / "accumulator").write_bytes(plain)
    with pytest.raises(NotSealed):
        VAULT.open(session / "accumulator", VAULT.accumulator(bytes.fromhex(session.name)))


async def test_another_models_file_under_a_models_name_is_damage(tmp_path: Path) -> None:
    digest = await run_a_job(tmp_path, VAULT)
    models = ModelStore(tmp_path / "models", vault=VAULT)
    other = next(path for path in models.directory.iterdir() if path != models.path(digest))
    shutil.copy(other, models.path(digest))
    with pytest.raises(ModelDamaged, match="is not the model that was encrypted under this name"):
        models.verify(digest)
    with pytest.raises(ModelDamaged):
        models.file(digest).open()


async def test_a_damaged_encrypted_model_rolls_the_job_back_as_a_plain_one_does(tmp_path: Path) -> None:
    stopped, sites = await run_until(tmp_path, 2, rounds=3, vault=VAULT)
    with Store.open(f"sqlite:///{tmp_path}/coordinator.sqlite", vault=VAULT) as store:
        newest = store.rounds("job-1")[-1].model
    break_file(stopped, newest, "damaged")
    with pytest.raises(ModelDamaged, match="in chunk 0"):
        stopped.models.verify(newest)
    async with federation(tmp_path, vault=VAULT) as (restarted, _):
        await connect_all(restarted, sites)
        record = await restarted.until_ended()
        assert (record.state, record.rolled_back) == (JobState.COMPLETED, 1)
        np.testing.assert_allclose(model_of(restarted, record.current_model), 3 * mean_update(SITES[:3]), atol=1e-4)


async def test_a_wrong_key_rolls_nothing_back(tmp_path: Path) -> None:
    """As if the models were damaged, every job would lose all its rounds."""
    await run_until(tmp_path, 2, rounds=3, vault=VAULT)
    other = Vault("ward", MasterKeys(SECOND))
    coordinator = LocalCoordinator(tmp_path, vault=other)
    coordinator.start()
    assert coordinator.loop is not None
    with pytest.raises(WrongKey, match=FIRST.id.hex()):
        await coordinator.loop
    assert coordinator.store.rolled_back_rounds("job-1") == ()
    await coordinator.crash()


# --- turning it on, and rotating ------------------------------------------------------------------------------------


class Crash(BaseException):
    """The process ends here."""


def rotate_with(folder: Path, vault: Vault, sync: Callable[[Path], None] = lambda _: None) -> at_rest.Rotated:
    with Store.open(f"sqlite:///{folder}/coordinator.sqlite", vault=vault) as store:
        return rotate(vault, store=store, state=folder, sync=sync)


async def test_encryption_is_turned_on_for_a_state_that_was_plain(tmp_path: Path, keys: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    sites = await stopped_before_unmasking(state, None)
    plain = files_under(state / "models")
    with Store.open(f"sqlite:///{state}/coordinator.sqlite") as store:
        for accused in ("site-a", "site-b"):
            add_evidence(store, store.attempts("job-1")[0].session_id, accused)
        with store._engine.begin() as connection:  # its pages are free now, and still say what they said
            connection.exec_driver_sql("PRAGMA secure_delete = OFF")  # as most builds of SQLite have it
            connection.exec_driver_sql("DELETE FROM evidence WHERE accused = 'site-b'")
    assert b"transcript transcript" in b"".join(files_under(state).values())
    with pytest.raises(NotSealed):
        open_vault(settings(keys, FIRST), federation="ward", state=state)
    converting = open_vault(settings(keys, FIRST, accept_plain=True), federation="ward", state=state)
    assert converting is not None
    done = rotate_with(state, converting)
    assert (done.encrypted, done.rewrapped, done.rows) == (len(plain) + 1, 0, 2)
    vault = open_vault(settings(keys, FIRST), federation="ward", state=state)
    assert vault is not None
    models = ModelStore(state / "models", vault=vault)
    for path, content in plain.items():
        assert sealed.is_sealed(path)
        assert models.file(bytes.fromhex(path.stem)).read_bytes() == content
    everything = b"".join(files_under(state).values())
    assert b"transcript transcript" not in everything  # not even in a page that the database had no use for any more
    assert not any(content[-4 * PARAMETERS :] in everything for content in plain.values() if any(content[-24:]))
    await resume(state, vault, sites)


async def test_a_plain_model_that_is_damaged_is_not_encrypted_as_it_is(tmp_path: Path) -> None:
    digest = await run_a_job(tmp_path, None)
    path = ModelStore(tmp_path / "models").path(digest)
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] + b"\x7f")
    with pytest.raises(StoreError, match="is damaged: it is not encrypted as it is"):
        rotate_with(tmp_path, Vault("ward", MasterKeys(FIRST), accept_plain=True))
    assert path.read_bytes() == raw[:-1] + b"\x7f"


async def test_the_old_key_opens_nothing_after_a_rotation(tmp_path: Path) -> None:
    sites = await stopped_before_unmasking(tmp_path, VAULT)
    done = rotate_with(tmp_path, ROTATING)
    assert (done.rewrapped, done.encrypted, done.rows) == (2, 0, 1)
    old = ModelStore(tmp_path / "models", vault=VAULT)
    for path in old.directory.iterdir():
        with pytest.raises(WrongKey, match=SECOND.id.hex()):
            old.verify(bytes.fromhex(path.stem))
    with (
        Store.open(f"sqlite:///{tmp_path}/coordinator.sqlite", vault=VAULT) as store,
        pytest.raises(WrongKey, match=SECOND.id.hex()),
    ):
        store.resume_record("job-1")
    assert rotate_with(tmp_path, ROTATING) == at_rest.Rotated(0, 0, 0, SECOND.id)
    await resume(tmp_path, ROTATED, sites)


@pytest.mark.parametrize("plain", [False, True])
async def test_a_rotation_killed_at_any_point_is_repeated_and_until_then_both_keys_open_everything(
    tmp_path: Path, plain: bool
) -> None:
    (tmp_path / "0").mkdir()
    sites = await stopped_before_unmasking(tmp_path / "0", None if plain else VAULT)
    for survives in range(40):
        folder = tmp_path / str(survives + 1)
        shutil.copytree(tmp_path / "0", folder)
        left = iter(range(survives))

        def sync(_: Path, left: Iterator[int] = left) -> None:
            if next(left, None) is None:
                raise Crash

        try:
            rotate_with(folder, ROTATING, sync)
        except Crash:
            everything = ModelStore(folder / "models", vault=ROTATING)
            for path in everything.directory.glob("*.safetensors"):
                everything.verify(bytes.fromhex(path.stem))
            rotate_with(folder, ROTATING)
            for path in everything.directory.glob("*.safetensors"):  # and the key before is not needed any more
                ModelStore(folder / "models", vault=ROTATED).verify(bytes.fromhex(path.stem))
            continue
        break
    else:
        raise AssertionError("it never ended")
    assert survives >= 4
    await resume(folder, ROTATED, sites)
