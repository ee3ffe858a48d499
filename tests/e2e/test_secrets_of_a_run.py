"""Everything that a whole run wrote is searched for every secret that was in it.

A coordinator that encrypts its state and four sites: two rounds commit, a model is exported, somebody sends garbage, a
site's training fails, somebody starts the coordinator with another key; the coordinator is killed while uploads come in
and started again; then everybody is killed when three of four have answered the unmasking. What is searched is all that
is left: state directories with databases and their write-ahead logs, sums, sites' scratch, logs, standard output and
error, configurations, exported files and signatures. What is looked for, and how, is in `known_secrets` and
`secret_search`.

What counts as failure: any piece of any of them in any file but those that hold it by purpose: the private keys' own
files and the at-rest key's; a model's numbers in what researchers have and in the sites' own scratch, which is theirs
to encrypt. That the search can fail at all is shown on the same files.
"""

from __future__ import annotations

import shutil
import signal
import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from tests.e2e.known_secrets import RECORDER, KnownSession, pieces, private_scalars, recorded
from tests.e2e.services import SITES, Service, World
from tests.e2e.wide_task import SIDE, update_of
from tests.secret_search import search

from maskwork.coordinator import sealed_sum
from maskwork.coordinator.at_rest_key import parse_key, write_new_key
from maskwork.coordinator.models import ModelStore
from maskwork.coordinator.sealed import MasterKeys
from maskwork.coordinator.shape import SessionShape
from maskwork.coordinator.store import Store
from maskwork.coordinator.vault import Vault
from maskwork.dumps import DEBUGGABLE
from maskwork.model_commands import write_signature
from maskwork.net import tls
from maskwork.net.identity import Role
from maskwork.secagg.plan import session_id
from maskwork.tensors import Schema, TensorSpec, read_vector, write_model
from maskwork.wire import codec

# isort: split
import grpc

pytestmark = pytest.mark.e2e

EXPECTED_FILES = (
    "coordinator.sqlite",
    "coordinator.sqlite-wal",
    "accumulator",
    "ledger.sqlite",
    "audit.log",
    ".log",
    ".sig",
)


class RecordedWorld(World):
    """Its coordinator encrypts; every process writes down what it draws, in a folder beside."""

    def __init__(self, home: Path, records: Path) -> None:
        (home / "logs").mkdir(parents=True)
        super().__init__(home, logs=home / "logs")
        self.records = records
        records.mkdir()
        (records / "sitecustomize.py").write_text(RECORDER)
        write_new_key(home / "at-rest.key")
        self.initial = (0.1 * np.random.default_rng(7).normal(size=SIDE * SIDE)).astype(np.float32)

    @property
    def vault(self) -> Vault:
        return Vault("ward", MasterKeys(parse_key((self.home / "at-rest.key").read_text(), source="")))

    def coordinator_config(self, **changes: str | float) -> Path:
        path = super().coordinator_config()
        key = str(changes.get("key", "at-rest.key"))
        path.write_text(path.read_text() + f'log_level = "debug"\n[encryption]\nkey_file = "{key}"\n')
        return path

    def site_config(self, site: str, **changes: str) -> Path:
        return super().site_config(site, log_level="debug", **changes)

    def task(self, site: str) -> tuple[str, str, dict[str, object]]:
        return "gated", "wide_task:Wide", {"gate": str(self.gate.path), "site": site}

    def model(self) -> Path:
        self.models += 1
        path = self.home / f"initial-{self.models}.safetensors"
        write_model(path, Schema((TensorSpec("weight", "F32", (SIDE, SIDE)),)), self.models * self.initial, {})
        return path

    async def start(self, name: str, group: str, config: Path, *, environment: dict[str, str] | None = None) -> Service:
        assert environment is None
        ours = f"{self.records}:{Path(__file__).parent}"
        record = str(self.records / f"{len(self.all)}-{name}")
        return await super().start(
            name,
            group,
            config,
            environment={"PYTHONPATH": ours, "MASKWORK_TEST_RECORD": record, DEBUGGABLE: ""},
        )

    def drawn(self, name: str, file: str, function: str) -> list[bytes]:
        paths = sorted(self.records.glob(f"*-{name}"))
        return [value for path in paths for value in recorded(path, file, function)]

    def files(self) -> list[Path]:
        """All that is left, but for the files that are there to hold a secret."""
        left = [path for path in self.home.rglob("*") if path.is_file() and not path.is_symlink()]
        return [path for path in left if path.name not in ("key.pem", "at-rest.key", "other.key")]


async def test_no_secret_is_in_anything_that_a_whole_run_wrote(tmp_path: Path) -> None:
    world = RecordedWorld(tmp_path / "home", tmp_path / "records")
    await world.gate.open()
    try:
        await world.start_coordinator()
        for site in SITES:
            await world.start_site(site)
        committed = await two_rounds_and_an_export(world)
        await garbage(world)
        await another_key(world)
        await killed_twice(world)
    finally:
        await world.close()

    sessions = known_sessions(world)
    assert [s.plan.round_number for s in sessions] == [1, 2, 1, 1, 1]
    check_that_they_are_the_secrets(world, sessions[-1])
    secrets = {name: secret for s in sessions for name, secret in s.all()}
    assert len(secrets) == 5 * 4 * (6 + 2 + 3 * (1 + 2 + 2))
    secrets |= private_scalars({f"of {path.parent.name}": path.read_bytes() for path in world.home.rglob("key.pem")})
    secrets |= private_scalars({"of the CA": ca_key(world, tmp_path / "ca")})
    secrets["at-rest key"] = world.vault.keys.current.raw
    data_keys = world.drawn("coordinator", "sealed.py", "SealedWriter.__init__")
    assert len(data_keys) >= 10
    secrets |= {f"data key {i}": key for i, key in enumerate(data_keys)}
    for site in SITES:
        secrets |= pieces(f"update of {site}", update_of(site))
        for name, model in committed.items():
            secrets |= pieces(f"{name} as {site} trained it", model + update_of(site))
    secrets |= pieces("mean update", np.mean([update_of(site) for site in SITES], axis=0, dtype=np.float32))

    files = world.files()
    for expected in EXPECTED_FILES:
        assert any(path.name.endswith(expected) and path.stat().st_size for path in files), expected
    assert [str(found) for found in search(secrets, files)] == []

    models = {k: v for name, model in committed.items() for k, v in pieces(name, model).items()}
    owners = [p for p in files if p.suffix == ".safetensors" and p.parent == world.home]
    owners += [p for p in files if "scratch" in p.parts]
    assert [str(f) for f in search(models, [p for p in files if p not in owners])] == []
    assert {f.spelling for f in search(models, owners)} == {"bytes"}  # the same search finds them where they may be

    planted = world.home / "logs" / "planted.log"
    for name, secret in secrets.items():
        planted.write_text(f"{{'event': 'a mistake', 'detail': '{secret.hex()}'}}")
        assert {found.secret for found in search({name: secret}, [planted])} == {name}


async def two_rounds_and_an_export(world: RecordedWorld) -> dict[str, np.ndarray[tuple[int], np.dtype[np.float32]]]:
    """The models of a job by their rounds; 0: the initial one."""
    models = {"model 0": world.initial}
    async with world.job("whole", rounds=2) as watch:
        assert (await watch.ended()).state == "completed"
        async with world.client() as client:
            for number in (1, 2):
                to = world.home / f"exported-{number}.safetensors"
                exported = await client.export(watch.job_id, to, round_number=number)
                assert exported.signed is not None
                write_signature(to, exported.signed)
                models[f"model {number}"] = read_vector(to)[1]
    mean = np.mean([update_of(site) for site in SITES], axis=0)
    np.testing.assert_allclose(models["model 2"], world.initial + 2 * mean, atol=1e-4)
    return models


async def garbage(world: RecordedWorld) -> None:
    """What cannot be decoded, from a member; and a training that fails when its site has dealt its shares."""
    files = world.identity(Role.PARTICIPANT, "site-x")
    async with grpc.aio.secure_channel(
        world.address, tls.channel_credentials(files), options=tls.CHANNEL_OPTIONS
    ) as channel:
        connect: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(
            "/maskwork.wire.v1.FederationService/Connect"
        )
        call = connect(iter([b"\xff" * 400]))
        with pytest.raises(grpc.aio.AioRpcError):
            async for _ in call:
                pass
    world.gate.held = {"site-d"}
    async with world.job("failing") as watch:
        await watch.answered("share-keys", *SITES)
        await world.gate.reached("site-d")
        world.gate.release("site-d", b"!")
        assert (await watch.committed(1)).survivors == SITES[:3]
        assert (await watch.ended()).state == "completed"


async def another_key(world: RecordedWorld) -> None:
    """The same state, and a key that is not the one: it says so and ends."""
    write_new_key(world.home / "other.key")
    service = await world.start("wrong", "coordinator", world.coordinator_config(key="other.key"))
    assert await service.wait() == 1
    assert "is encrypted with the key" in service.text


async def killed_twice(world: RecordedWorld) -> None:
    """Killed when three of four uploads are in, and again, with everybody else, when three of four have unmasked."""
    world.gate.held = {"site-d"}
    async with world.job("killed") as watch:
        await watch.answered("masked-update", *SITES[:3])
        await world.gate.reached("site-d")
        await world.coordinator.kill()
        shutil.copytree(world.home / "coordinator-state", world.home / "first-kill")
        since = len(watch.events)
        await world.start_coordinator()
        await world.gate.left("site-d")
        await watch.answered("masked-update", *SITES[:3], since=since)
        await world.gate.reached("site-d")
        world.sites["site-a"].send(signal.SIGSTOP)  # has uploaded; will not sign for now
        world.gate.release("site-d")
        await watch.answered("consistency-check", *SITES[1:], since=since)
        world.sites["site-d"].send(signal.SIGSTOP)  # has signed; what is asked next, it will not hear
        world.sites["site-a"].send(signal.SIGCONT)
        await watch.answered("unmask", *SITES[:3], since=since)
        await world.coordinator.kill()  # first: it would go on without a site that is gone
        for service in world.sites.values():
            await service.kill()


def known_sessions(world: RecordedWorld) -> list[KnownSession]:
    """The sessions of the run, in order: every site took part in each, and drew one seed for each."""
    with closing(sqlite3.connect(world.home / "coordinator-state" / "coordinator.sqlite")) as database:
        rows = database.execute("SELECT plan_bytes FROM attempts ORDER BY opened_at").fetchall()
    seeds = {site: world.drawn(site, "participant/driver.py", "Driver._fetched") for site in SITES}
    assert {len(drawn) for drawn in seeds.values()} == {len(rows)}
    found = []
    for number, (plan_bytes,) in enumerate(rows):
        plan = codec.decode_plan(plan_bytes)
        found.append(KnownSession(plan, session_id(plan_bytes), [seeds[e.participant][number] for e in plan.roster]))
    return found


def check_that_they_are_the_secrets(world: RecordedWorld, session: KnownSession) -> None:
    """They lead to what the sites had announced and dealt, and unmask what the last session left: so they are what is
    to be looked for.
    """
    plan, state = session.plan, world.home / "coordinator-state"
    shape = SessionShape(plan.parameters, plan.encoding.ring_bits, len(plan.statistics))
    path = state / "sessions" / session.id.hex() / "accumulator"
    mean = session.mean_of(sealed_sum.read(path, shape, world.vault, session.id)[1], range(4), weight=40)
    np.testing.assert_allclose(mean, np.mean([update_of(site) for site in SITES], axis=0), atol=1e-5)
    with Store.open(f"sqlite:///{state / 'coordinator.sqlite'}", vault=world.vault) as store:
        (job,) = [job for job in store.jobs() if job.name == "killed"]
        resume = store.resume_record(job.job_id)
    assert resume is not None
    transcript = codec.decode_transcript(resume.blob)
    for u, made in enumerate(session.secrets):
        assert transcript.advertised[u].mask_key == made.mask_secret.public()
        assert transcript.advertised[u].encryption_key == made.encryption_secret.public()
        assert transcript.dealings[u].shares == session.dealing(u).shares


def ca_key(world: RecordedWorld, folder: Path) -> bytes:
    world.authority.write(folder)
    return (folder / "ca-key.pem").read_bytes()


def test_the_models_of_a_store_that_is_not_encrypted_would_be_found(tmp_path: Path) -> None:
    """The same search, on what a coordinator without a key writes."""
    vector = update_of("site-a")
    for vault, expected in ((None, {"bytes"}), (Vault("ward", MasterKeys(parse_key("00" * 32, source=""))), set())):
        models = ModelStore(tmp_path / str(vault is None), vault=vault)
        write_model(tmp_path / "m", Schema((TensorSpec("w", "F32", vector.shape),)), vector, {})
        models.put_file(tmp_path / "m")
        assert {f.spelling for f in search(pieces("model", vector), models.directory.iterdir())} == expected
