"""What the agent asks of its training worker, and what it gets back: importable without torch.

The agent passes these functions to its `maskwork.worker.WorkerProcess`; each imports `maskwork.participant.training`,
and torch with it, where it runs. So the agent stays small and starts at once::

    worker = WorkerProcess(
        name="training", preload=PRELOAD, setup=functools.partial(configure, import_path, options)
    )
    summary = await worker.call(train, TrainRequest(...))

It is NOT where anything is computed, and it keeps no state: that is in the worker, in `maskwork.participant.training`.

Rules it upholds: everything here can be pickled and is small (vectors travel as files); keys have no repr.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from maskwork.secagg.encoding import Encoding
from maskwork.secagg.masking import MaskingKeys
from maskwork.secagg.plan import StatisticSpec
from maskwork.task import TrainingConfig
from maskwork.tensors import Schema

PRELOAD: Final = (
    "maskwork.participant.training",
    "maskwork.participant.tasks.supervised",
    # torch imports these when an optimiser is first made, or deterministic algorithms are first asked for: one second.
    "torch._dynamo",
    "torch._inductor.config",
)
"""What the fork server imports once, so that a worker starts with torch in milliseconds; a name it lacks is skipped."""


@dataclass(frozen=True, slots=True)
class TaskInfo:
    """What a site's task looks like from outside.

    Attributes:
        schema: The tensors that it federates; a job's initial model must have the same.
        local_buffers: Floating-point buffers that it does not federate: they start anew in every round.
    """

    schema: Schema
    local_buffers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TrainRequest:
    """One round's training.

    Attributes:
        session_id: Under which the update is kept.
        model_path: The global model; its digest has been checked.
        parameters: The plan's number of coordinates.
        config: The job's training config; its digest has been checked.
        seed: From `maskwork.task.training_seed`: the same in every attempt at a round.
    """

    session_id: bytes
    model_path: Path
    parameters: int
    config: TrainingConfig
    seed: int


@dataclass(frozen=True, slots=True)
class TrainSummary:
    """What training measured. For this site's eyes: it leaves the site only within masked sums.

    Attributes:
        examples: n_i, the weight of the update.
        train_metrics: Means over the training examples, by name.
        evaluation_examples: m_i, held-out examples; 0 if there are none.
        evaluation_metrics: Means over those, of the global model as it was received.
        update_norm: L2 norm of the update before clipping.
        seconds: What evaluation and training took.
    """

    examples: int
    train_metrics: Mapping[str, float]
    evaluation_examples: int
    evaluation_metrics: Mapping[str, float]
    update_norm: float
    seconds: float


@dataclass(frozen=True, slots=True)
class MaskRequest:
    """Encoding and masking of the update that `train` kept.

    Attributes:
        session_id: Of the training.
        encoding: The plan's.
        keys: This session's mask keys and rounding key.
        rotation_seed: 32 bytes; not looked at without rotation.
        statistics: The plan's, in its order.
        output: A path where no file is yet; the packed masked update is written there. The caller unlinks it.
    """

    session_id: bytes
    encoding: Encoding
    keys: MaskingKeys = field(repr=False)
    rotation_seed: bytes
    statistics: tuple[StatisticSpec, ...]
    output: Path


@dataclass(frozen=True, slots=True)
class MaskResult:
    """What masking wrote.

    Attributes:
        update_bytes: Length of the file at `MaskRequest.output`.
        statistics: The masked statistics, eight bytes each.
        clamped: How many coordinates were clamped; for this site's eyes.
        digest: SHA-256 of the file, for the site's audit log.
    """

    update_bytes: int
    statistics: bytes = field(repr=False)
    clamped: int
    digest: bytes = b""


def configure(import_path: str, options: Mapping[str, object], threads: int = 1) -> TaskInfo:
    """Load the site's task and its data. See `maskwork.participant.training.configure`."""
    from maskwork.participant import training

    return training.configure(import_path, options, threads)


def train(request: TrainRequest) -> TrainSummary:
    """Evaluate and train, and keep the update. See `maskwork.participant.training.train`."""
    from maskwork.participant import training

    return training.train(request)


def mask(request: MaskRequest) -> MaskResult:
    """Mask the update that was kept. See `maskwork.participant.training.mask`."""
    from maskwork.participant import training

    return training.mask(request)


def discard(session_id: bytes) -> None:
    """Forget a session's update. See `maskwork.participant.training.discard`."""
    from maskwork.participant import training

    training.discard(session_id)
