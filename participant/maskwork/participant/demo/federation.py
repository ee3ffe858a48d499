"""The demo's federation on disk: a CA, certificates, configuration files and a job file, all in the run's folder.

They are what people write for a deployment of their own, and the demo reads nothing but these files: any of them can
be taken up by hand with the ``maskwork`` command after the demo has ended.

It is NOT where anything is started.

Rule it upholds: a run has a folder of its own; one that holds something already is left alone.
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

from maskwork.errors import UserError
from maskwork.job import Cohort, Deadlines, EncodingSpec, JobSpec
from maskwork.net.authority import Authority
from maskwork.net.identity import IdentityFiles, Role
from maskwork.participant.local.files import HOST, job_text, toml
from maskwork.task import TrainingConfig

FEDERATION: Final = "demo"
FEWEST_PARTICIPANTS: Final = 4
"""With three, the threshold is three: nobody could be lost."""
MOST_PARTICIPANTS: Final = len(string.ascii_lowercase)
FEWEST_ROUNDS: Final = 4
"""Two faults in two rounds, and a round after each in which the victim is back."""

TRAINING: Final = TrainingConfig(epochs=5, batch_size=16, learning_rate=0.02, momentum=0.9)
ENCODING: Final = EncodingSpec(clip_norm=5.0, weight_cap=10_000)  # all digits are 1,797, so no site counts for more
# A killed site is given up after half a second, so its round goes on without it; the next round waits for the site to
# be back, which takes it a few seconds (it loads torch again).
DEADLINES: Final = Deadlines(
    advertise_keys_s=30, share_keys_s=30, masked_update_s=60, consistency_check_s=30, unmask_s=30, reconnect_s=0.5
)
WAIT_FOR_ALL_S: Final = 60.0
MAX_ATTEMPTS: Final = 5


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """What is asked for: how many rounds and sites, the seed of everything, and how skewed the shards are."""

    rounds: int = 20
    participants: int = 5
    seed: int = 1
    alpha: float = 0.5

    @property
    def sites(self) -> tuple[str, ...]:
        """The participants' names; the site of index i holds shard i."""
        return tuple(f"site-{letter}" for letter in string.ascii_lowercase[: self.participants])

    def shard(self, site: str) -> dict[str, int | float]:
        """The options of the task `digits` at a site."""
        return {"shard": self.sites.index(site), "of": self.participants, "alpha": self.alpha, "seed": self.seed}

    def job(self) -> JobSpec:
        """The job that is submitted."""
        cohort = Cohort(
            participants=self.sites,
            min_participants=self.participants - 1,
            max_participants=self.participants,
            wait_s=WAIT_FOR_ALL_S,
        )
        return JobSpec(
            name="demo",
            task="digits",
            rounds=self.rounds,
            max_attempts=MAX_ATTEMPTS,
            training=TRAINING,
            cohort=cohort,
            encoding=ENCODING,
            deadlines=DEADLINES,
        )


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Where everything of one run lies."""

    root: Path

    @property
    def logs(self) -> Path:
        """One log for each process."""
        return self.root / "logs"

    @property
    def models(self) -> Path:
        """Initial, masked, plain and centralised model."""
        return self.root / "models"

    @property
    def job(self) -> Path:
        """The job file."""
        return self.root / "job.toml"

    @property
    def summary(self) -> Path:
        """What came out."""
        return self.root / "summary.json"

    @property
    def plot(self) -> Path:
        """Accuracy and loss over the rounds."""
        return self.root / "accuracy.png"

    @property
    def researcher(self) -> IdentityFiles:
        """Whoever submits the job."""
        return IdentityFiles.in_directory(self.root / "researcher" / "identity")

    def member(self, name: str) -> Path:
        """Identity, state and configuration of one process."""
        return self.root / name

    def config(self, name: str) -> Path:
        """A process's configuration file."""
        return self.member(name) / ("coordinator.toml" if name == "coordinator" else "participant.toml")


def create_folder(out: Path | None, *, now: float) -> RunFolder:
    """Make the run's folder: `out`, or ``runs/demo-TIMESTAMP`` in the current directory.

    Raises:
        UserError: It holds something already, or cannot be made.
    """
    stamp = datetime.fromtimestamp(now).strftime("%Y%m%d-%H%M%S")
    root = Path("runs") / f"demo-{stamp}" if out is None else out
    try:
        root.mkdir(parents=True, exist_ok=True)
        taken = any(root.iterdir())
    except OSError as error:
        raise UserError(
            f"{root}: cannot be made the run's folder ({error.strerror}); choose another with --out"
        ) from None
    if taken:
        raise UserError(f"{root} holds something already: choose another folder with --out, or remove it")
    folder = RunFolder(root)
    folder.logs.mkdir()
    folder.models.mkdir()
    return folder


def write_federation(folder: RunFolder, options: DemoOptions, port: int, *, now: float) -> None:
    """Make the CA, a certificate for everybody, and every configuration file.

    Args:
        folder: New.
        options: Of the run.
        port: The coordinator's, on `HOST`.
        now: Unix time in seconds.
    """
    authority = Authority.create(FEDERATION, now=now)
    authority.write(folder.root / "ca")
    coordinator = authority.issue(Role.COORDINATOR, "coordinator", now=now, ip_addresses=[HOST])
    coordinator.write(folder.member("coordinator") / "identity")
    authority.issue(Role.RESEARCHER, "researcher", now=now).write(folder.researcher.cert.parent)
    where = {"listen": f"{HOST}:{port}", "identity": "identity", "state": "state"}
    folder.config("coordinator").write_text(toml(where), encoding="utf-8")
    for site in options.sites:
        authority.issue(Role.PARTICIPANT, site, now=now).write(folder.member(site) / "identity")
        own = {"coordinator": f"{HOST}:{port}", "identity": "identity", "state": "state", "seed": options.seed}
        task = {"use": "maskwork.participant.tasks.digits:Digits"}
        text = toml(own) + toml(task, "tasks.digits") + toml(options.shard(site), "tasks.digits.options")
        folder.config(site).write_text(text, encoding="utf-8")
    folder.job.write_text(job_text(options.job(), "models/initial.safetensors"), encoding="utf-8")
