"""What the processes of a run left behind, read with SQL and SHA-256: with no store and no ledger of ours.

Only plans and model files are decoded by our own code. `read` returns one frozen value, `Written`; models stay on the
disk and are read when they are asked for. Nothing is judged here. Not a test itself.
"""

import hashlib
import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.chaos.federation import Life

from maskwork.audit.reading import judge
from maskwork.net.identity import TrustRoots
from maskwork.secagg.plan import RoundPlan
from maskwork.tensors import Float32Array, read_vector
from maskwork.wire import codec


@dataclass(frozen=True, slots=True)
class Job:
    """A row of the coordinator's `jobs`."""

    job: str
    state: str
    rounds_total: int
    initial_model: str
    current_model: str
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Attempt:
    """A row of the coordinator's `attempts`, its plan read."""

    job: str
    round_number: int
    attempt: int
    session: str
    opened_at: float
    outcome: str
    nonce: str
    base_model: str
    roster: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Round:
    """A row of the coordinator's `rounds`."""

    job: str
    round_number: int
    attempt: int
    session: str
    model: str
    survivors: tuple[str, ...]
    statistics: Mapping[str, float]
    committed_at: float


@dataclass(frozen=True, slots=True)
class Released:
    """A survivor set that was asked for (at the coordinator) or answered for (at a site)."""

    job: str
    session: str
    base_model: str
    survivors: frozenset[str]


@dataclass(frozen=True, slots=True)
class TakenUp:
    """A row of a site's `attempts`; they come in the order in which they were written."""

    job: str
    round_number: int
    attempt: int
    session: str


@dataclass(frozen=True, slots=True)
class SiteLedger:
    """What one site remembers."""

    taken_up: tuple[TakenUp, ...]
    released: tuple[Released, ...]


@dataclass(frozen=True, slots=True)
class Written:
    """Everything that was written in a run.

    Attributes:
        jobs: In the order of submission.
        attempts: By job, round and attempt.
        rounds: By job and round, as the table has them.
        asked: Survivor sets that the coordinator asked for.
        ledgers: By site.
        models: By the digest in a file's name, the digest of its bytes.
        logs: By file, its lines.
        lives: Every process that was started.
        secrets: Strings that no log may hold.
        audit: What is wrong with the audit logs.
    """

    jobs: tuple[Job, ...] = ()
    attempts: tuple[Attempt, ...] = ()
    rounds: tuple[Round, ...] = ()
    asked: tuple[Released, ...] = ()
    ledgers: Mapping[str, SiteLedger] = field(default_factory=dict)
    models: Mapping[str, str] = field(default_factory=dict)
    logs: Mapping[str, Sequence[str]] = field(default_factory=dict)
    lives: tuple[Life, ...] = ()
    secrets: tuple[str, ...] = ()
    audit: tuple[str, ...] = ()


class ModelFolder:
    """The vectors of a run's models, by digest; the last few are kept."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._kept: dict[str, Float32Array] = {}

    def __call__(self, digest: str) -> Float32Array:
        if digest not in self._kept:
            if len(self._kept) > 2:
                self._kept.pop(next(iter(self._kept)))
            self._kept[digest] = read_vector(self._folder / f"{digest}.safetensors")[1]
        return self._kept[digest]


def models_of(home: Path) -> ModelFolder:
    return ModelFolder(home / "coordinator-state" / "models")


def read(home: Path, lives: Sequence[Life]) -> Written:
    state = home / "coordinator-state"
    with closing(_opened(state / "coordinator.sqlite")) as database:
        jobs, attempts = tuple(_jobs(database)), tuple(_attempts(database))
        rounds, asked = tuple(_rounds(database)), tuple(_asked(database))
    ledgers = {
        folder.parent.name.removeprefix("state-"): _ledger(folder) for folder in home.glob("state-*/ledger.sqlite")
    }
    return Written(
        jobs=jobs,
        attempts=attempts,
        rounds=rounds,
        asked=asked,
        ledgers=ledgers,
        models={path.stem: _sha256(path) for path in (state / "models").glob("*.safetensors")},
        logs={path.name: path.read_text(errors="replace").splitlines() for path in (home / "logs").glob("*.log")},
        lives=tuple(lives),
        secrets=tuple(_key_lines(home)),
        audit=tuple(_audit(home)),
    )


def _audit(home: Path) -> Iterator[str]:
    roots = TrustRoots.from_file(home / "coordinator-main" / "ca.pem")
    judged = judge(home / "coordinator-state" / "audit.log", roots, sorted(home.glob("state-*/audit.log")))
    yield from map(str, judged.problems)
    yield from judged.notes


def _opened(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    database.row_factory = sqlite3.Row
    return database


def _jobs(database: sqlite3.Connection) -> Iterator[Job]:
    for row in database.execute("select * from jobs order by position"):
        models = row["initial_model"].hex(), row["current_model"].hex()
        yield Job(row["job_id"], row["state"], row["rounds_total"], *models, row["reason"])


def _attempts(database: sqlite3.Connection) -> Iterator[Attempt]:
    for row in database.execute("select * from attempts order by job_id, round_number, attempt"):
        plan: RoundPlan = codec.decode_plan(row["plan_bytes"])
        yield Attempt(
            job=row["job_id"],
            round_number=row["round_number"],
            attempt=row["attempt"],
            session=row["session_id"].hex(),
            opened_at=row["opened_at"],
            outcome=row["outcome"] or "",
            nonce=plan.nonce.hex(),
            base_model=plan.model_digest.hex(),
            roster=tuple(entry.participant for entry in plan.roster),
        )


def _rounds(database: sqlite3.Connection) -> Iterator[Round]:
    for row in database.execute("select * from rounds order by job_id, round_number"):
        yield Round(
            job=row["job_id"],
            round_number=row["round_number"],
            attempt=row["attempt"],
            session=row["session_id"].hex(),
            model=row["model"].hex(),
            survivors=tuple(json.loads(row["survivors_json"])),
            statistics=json.loads(row["statistics_json"]),
            committed_at=row["committed_at"],
        )


def _asked(database: sqlite3.Connection) -> Iterator[Released]:
    for row in database.execute("select * from releases"):
        survivors = frozenset(json.loads(row["survivors_json"]))
        yield Released(row["job_id"], row["session_id"].hex(), row["base_model"].hex(), survivors)


def _ledger(path: Path) -> SiteLedger:
    with closing(_opened(path)) as database:
        taken_up = tuple(
            TakenUp(row["job"], row["round_number"], row["attempt"], row["session_id"].hex())
            for row in database.execute("select * from attempts order by rowid")
        )
        released = tuple(_released(row) for row in database.execute("select * from releases order by position"))
    return SiteLedger(taken_up, released)


def _released(row: Mapping[str, Any]) -> Released:
    survivors = frozenset(json.loads(row["survivors_json"]))
    return Released(row["job"], row["session_id"].hex(), row["model_digest"].hex(), survivors)


def _key_lines(home: Path) -> Iterator[str]:
    """The lines of every private key of the run, without their headers."""
    for path in home.glob("*/key.pem"):
        yield from (line for line in path.read_text().splitlines() if line and not line.startswith("-----"))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
