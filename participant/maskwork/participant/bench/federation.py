"""A federation for benchmarks: certificates and configuration files in a folder, processes started from them.

Each runs the very commands of a deployment. The *plain* variant is the same processes with a PRG that expands nothing:
every message, check and byte is there, but no mask is. Its patch is written into the run's own folder and reaches the
processes through their PYTHONPATH alone; nothing installed can switch masks off.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from maskwork.job import Cohort, Deadlines, EncodingSpec, JobSpec
from maskwork.net.authority import Authority
from maskwork.net.identity import IdentityFiles, Role
from maskwork.participant.bench.sizes import EXAMPLES, TASK
from maskwork.participant.local.children import Children
from maskwork.participant.local.files import HOST, free_port, toml
from maskwork.participant.local.logs import coordinator_ready
from maskwork.tensors import Schema, TensorSpec, write_model

IDLE: Final = "idle"
"""A site with a model of one parameter that takes part in nothing: what a participant's imports alone cost."""

_NO_MASKS: Final = """\
from maskwork.secagg import prg
prg.MaskStreams.add_to = lambda self, acc: None
"""


@dataclass(frozen=True, slots=True)
class Federation:
    """One federation's files.

    Attributes:
        root: Its folder.
        port: The coordinator's, on loopback.
        sites: Names of its participants.
        environment: For its processes.
    """

    root: Path
    port: int
    sites: tuple[str, ...]
    environment: Mapping[str, str]

    @property
    def researcher(self) -> IdentityFiles:
        """Who submits."""
        return IdentityFiles.in_directory(self.root / "researcher")

    def identity(self, site: str) -> IdentityFiles:
        """A participant's certificate and key."""
        return IdentityFiles.in_directory(self.root / site / "identity")

    def name(self, member: str) -> str:
        """Of a process, unique among all federations of a run."""
        return f"{self.root.name}-{member}"


def create(root: Path, sites: tuple[str, ...], *, plain: bool = False) -> Federation:
    """Make the CA, a certificate for everybody, and the coordinator's configuration."""
    now = time.time()
    root.mkdir(parents=True)
    authority = Authority.create("bench", now=now)
    coordinator = authority.issue(Role.COORDINATOR, "coordinator", now=now, ip_addresses=[HOST])
    coordinator.write(root / "coordinator" / "identity")
    authority.issue(Role.RESEARCHER, "researcher", now=now).write(root / "researcher")
    for site in sites:
        authority.issue(Role.PARTICIPANT, site, now=now).write(root / site / "identity")
    port = free_port()
    where = {"listen": f"{HOST}:{port}", "identity": "identity", "state": "state", "log_level": "info"}
    (root / "coordinator" / "coordinator.toml").write_text(toml(where), encoding="utf-8")
    environment: dict[str, str] = {}
    if plain:
        patch = root / "plain"
        patch.mkdir()
        (patch / "sitecustomize.py").write_text(_NO_MASKS, encoding="utf-8")
        environment = {"PYTHONPATH": os.pathsep.join(filter(None, (str(patch), os.environ.get("PYTHONPATH", ""))))}
    return Federation(root, port, sites, environment)


def write_initial_model(folder: Path, parameters: int) -> Path:
    """A model of one vector of zeros, as the task has it."""
    path = folder / "initial.safetensors"
    schema = Schema((TensorSpec("weights", "F32", (parameters,)),))
    write_model(path, schema, np.zeros(parameters, np.float32), {})
    return path


async def start_coordinator(children: Children, federation: Federation) -> None:
    """Start it and wait until it listens."""
    name = federation.name("coordinator")
    config = str(federation.root / "coordinator" / "coordinator.toml")
    await children.start(name, "coordinator", "run", "--config", config, environment=federation.environment)
    await coordinator_ready(children.log(name))


async def start_sites(children: Children, federation: Federation, parameters: int, *, port: int) -> None:
    """Start every participant, a process (and a training worker) each; they dial `port`."""
    for site in federation.sites:
        own = {"coordinator": f"{HOST}:{port}", "identity": "identity", "state": "state"}
        task = {"use": "maskwork.participant.bench.task:Constant"}
        options = {"size": 1 if site == IDLE else parameters}
        text = toml(own) + toml(task, f"tasks.{TASK}") + toml(options, f"tasks.{TASK}.options")
        config = federation.root / site / "participant.toml"
        config.write_text(text, encoding="utf-8")
        arguments = ("participant", "run", "--config", str(config))
        await children.start(federation.name(site), *arguments, environment=federation.environment)


def job(federation: Federation, *, rounds: int, preset: str = "exact") -> JobSpec:
    """A job for all of its sites but the idle one."""
    sites = tuple(site for site in federation.sites if site != IDLE)
    many = len(sites) > 128
    return JobSpec(
        name="bench",
        task=TASK,
        rounds=rounds,
        max_attempts=3,
        metrics={"train.loss": 10.0},
        encoding=EncodingSpec.model_validate({"preset": preset, "clip_norm": 10.0, "weight_cap": 100 * EXAMPLES}),
        cohort=Cohort(
            participants=sites,
            min_participants=len(sites),
            max_participants=len(sites),
            wait_s=600,
            graph="sparse" if many else "complete",
        ),
        deadlines=Deadlines(),
    )
