"""The job file: what a researcher asks the federation for, validated the same on both ends.

A `JobSpec` is written as TOML, travels as canonical JSON, and is checked again by the coordinator. It says nothing of
the sites' data and carries no code: `task` is a name that each site maps to its own code.

Unknown keys are refused with the nearest known one named.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator

from maskwork.settings import FilePath, Section, explain, read_toml
from maskwork.task import TrainingConfig

Name = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9._-]{0,62}[a-z0-9])?$")]
MetricName = Annotated[str, Field(pattern=r"^(train|eval)\.[a-z][a-z0-9_]{0,40}$")]
Seconds = Annotated[float, Field(gt=0, le=30 * 86_400)]


class Cohort(Section):
    """Who takes part in a round.

    Attributes:
        participants: names of the sites wanted; empty: every connected site that is configured for the task.
        min_participants: fewest members that a round is opened with.
        max_participants: most members.
        min_survivors: fewest members whose updates a committed round must hold.
        wait_s: once the minimum is there, how long to wait for the others before opening a round without them.
        graph: "complete", or "sparse" for more than 128 members (sites must allow it in their policy).
        corrupt_permille: on the sparse graph, thousandths of the members that may collude.
        dropout_permille: on the sparse graph, thousandths that may vanish.
    """

    participants: tuple[Name, ...] = ()
    min_participants: int = Field(default=3, ge=3, le=20_000)
    max_participants: int = Field(default=128, ge=3, le=20_000)
    min_survivors: int = Field(default=3, ge=3, le=20_000)
    wait_s: float = Field(default=10.0, ge=0, le=86_400)
    graph: Literal["complete", "sparse"] = "complete"
    corrupt_permille: int = Field(default=50, gt=0, lt=500)
    dropout_permille: int = Field(default=100, gt=0, lt=500)

    @model_validator(mode="after")
    def _consistent(self) -> Cohort:
        if len(set(self.participants)) != len(self.participants):
            raise ValueError("cohort.participants repeats a name")
        if self.min_participants > self.max_participants:
            raise ValueError("cohort.min_participants is above cohort.max_participants")
        if self.participants and len(self.participants) < self.min_participants:
            raise ValueError("cohort.participants names fewer sites than cohort.min_participants")
        if self.min_survivors > self.min_participants:
            raise ValueError("cohort.min_survivors is above cohort.min_participants")
        if self.graph == "complete" and self.max_participants > 128:
            raise ValueError('above 128 members cohort.graph must be "sparse"')
        return self


class EncodingSpec(Section):
    """How updates become ring elements.

    Attributes:
        preset: "exact" (24 bits, no rotation) or "compact" (16 bits, rotated).
        clip_norm: L2 norm to which each update is clipped before weighting. Sites send multiples of a step of
            clip_norm / 2^(value bits - 1) x weight_cap / examples of the site, so much too large a norm or cap leaves
            nothing of an update, and much too small a norm clips it away.
        weight_cap: the most examples that one site may count for.
        value_bits: overrides the preset's width, 8 to 24.
    """

    preset: Literal["exact", "compact"] = "exact"
    clip_norm: float = Field(default=10.0, gt=0, le=1e9)
    weight_cap: int = Field(default=100_000, ge=1, le=2**31 - 1)
    value_bits: int | None = Field(default=None, ge=8, le=24)


class Deadlines(Section):
    """How long each step may take, in seconds, and how long a broken connection may stay broken."""

    advertise_keys_s: Seconds = 60.0
    share_keys_s: Seconds = 60.0
    masked_update_s: Seconds = 3600.0
    consistency_check_s: Seconds = 60.0
    unmask_s: Seconds = 60.0
    reconnect_s: Seconds = 30.0


class JobSpec(Section):
    """One training job.

    Attributes:
        name: what people call it.
        task: the name under which sites have configured the code for it.
        rounds: rounds to commit.
        max_attempts: attempts at one round before the job is called failed.
        training: handed to the sites' task; its digest is in every plan.
        metrics: the largest absolute value, per example, that each metric can take ("train.loss", "eval.accuracy").
        cohort: who takes part.
        encoding: how updates are encoded.
        deadlines: how long the steps may take.
    """

    name: Name
    task: Name
    rounds: int = Field(ge=1, le=1_000_000)
    max_attempts: int = Field(default=20, ge=1, le=1_000_000)
    training: TrainingConfig = TrainingConfig()
    metrics: dict[MetricName, Annotated[float, Field(gt=0)]] = Field(
        default={"train.loss": 1000.0, "eval.loss": 1000.0, "eval.accuracy": 1.0}
    )
    cohort: Cohort = Cohort()
    encoding: EncodingSpec = EncodingSpec()
    deadlines: Deadlines = Deadlines()

    def canonical_json(self) -> bytes:
        """The spec as it travels and is stored."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":")).encode()


class JobFile(JobSpec):
    """A job file on a researcher's disk: the spec and the initial model beside it."""

    model: FilePath

    def spec(self) -> JobSpec:
        """The part that is sent."""
        return JobSpec(**{name: getattr(self, name) for name in JobSpec.model_fields})


def read_job_file(path: Path) -> JobFile:
    """Read and check a job file; `model` is resolved relative to it.

    Raises:
        UserError: unreadable, no TOML, or invalid; the text names the file, the key and what would be accepted.
    """
    job = read_toml(path, JobFile, what="a job file")
    return job.model_copy(update={"model": (path.parent / job.model).resolve()})


def parse_spec(spec_json: bytes) -> JobSpec:
    """The spec in its canonical JSON.

    Raises:
        ValueError: it is none; the text says which key is wrong.
    """
    try:
        return JobSpec.model_validate_json(spec_json)
    except ValidationError as error:
        raise ValueError(explain(error, JobSpec)) from error
