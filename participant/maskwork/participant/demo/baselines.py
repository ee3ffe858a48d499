"""What the masked model is held against: the same rounds without any masking, and training on the pooled data.

The plain repetition uses the same trainer, the same seeds and each round's recorded survivors, and takes the float64
weighted mean of the clipped updates in numpy.

It is NOT allowed any of the aggregation code: no encoding, no masks, nothing of `maskwork.secagg`. That is what makes
the comparison one.

Rule it upholds: it runs with as many torch threads as the sites do, since sums depend on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from maskwork.participant.demo.federation import DemoOptions
from maskwork.participant.tasks.digits import Digits
from maskwork.participant.training import Trainer, federated_tensors, load_vector, schema_of, use_threads
from maskwork.task import TrainingConfig, training_seed
from maskwork.tensors import Float32Array

SITE_THREADS: Final = 1
"""torch threads at the sites: the default of their configuration, which the demo leaves as it is."""


@dataclass(frozen=True, slots=True)
class PlainRun:
    """The plain repetition: the model float32[d] after the last round, and the test accuracy after each."""

    model: Float32Array
    accuracies: tuple[float, ...]


class CommonTestSet:
    """The digits that no site holds."""

    def __init__(self, options: DemoOptions) -> None:
        """Read them."""
        self._task = Digits(seed=options.seed)
        self._module = self._task.build_model()
        self._schema = schema_of(federated_tensors(self._task, self._module))
        self._examples = Digits.test_data(options.seed)

    def accuracy(self, model: Float32Array) -> float:
        """The share that a model float32[d] gets right, 0 to 1."""
        load_vector(federated_tensors(self._task, self._module), self._schema, model)
        return self._task.evaluate_on(self._module, self._examples).metrics["accuracy"]


def repeat_plain(
    options: DemoOptions,
    job_id: str,
    survivors: Sequence[Sequence[str]],
    *,
    initial: Float32Array,
    training: TrainingConfig,
    clip_norm: float,
    test_set: CommonTestSet,
) -> PlainRun:
    """Train the same rounds again, in this process, in clear.

    Args:
        options: Of the run.
        job_id: The masked job's, from which the seeds are derived.
        survivors: Names by round, from the first.
        initial: float32[d], the model that the masked job began with.
        training: The job's training config.
        clip_norm: The job's L2 clip norm.
        test_set: What accuracy is measured on.
    """
    use_threads(SITE_THREADS)
    trainers = {site: _trainer(_site_task(options, site)) for site in options.sites}
    model, accuracies = initial.copy(), []
    for number, members in enumerate(survivors, 1):
        total, weights = np.zeros(len(model)), 0
        for site in members:
            seed = training_seed(options.seed, job=job_id, round_number=number, participant=site)
            update, summary = trainers[site].run(model, training, seed)
            total += summary.examples * clipped(update, clip_norm)
            weights += summary.examples
        model += (total / weights).astype(np.float32)
        accuracies.append(test_set.accuracy(model))
    return PlainRun(model, tuple(accuracies))


def train_centrally(options: DemoOptions, training: TrainingConfig, initial: Float32Array) -> Float32Array:
    """Train on all sites' data as one, as many passes over it as the federated rounds make together: float32[d]."""
    use_threads(SITE_THREADS)
    task = Digits.pooled(options.participants, alpha=options.alpha, seed=options.seed)
    passes = training.model_copy(update={"epochs": training.epochs * options.rounds})
    update, _ = _trainer(task).run(initial, passes, options.seed)
    return initial + update


def clipped(update: Float32Array, clip_norm: float) -> NDArray[np.float64]:
    """An update float32[d] scaled down to an L2 norm of `clip_norm` if it is longer: float64[d]."""
    exact = update.astype(np.float64)
    norm = float(np.linalg.norm(exact))
    return exact if norm <= clip_norm else exact * (clip_norm / norm)


def _site_task(options: DemoOptions, site: str) -> Digits:
    shard = options.sites.index(site)
    return Digits(shard, options.participants, alpha=options.alpha, seed=options.seed)


def _trainer(task: Digits) -> Trainer:
    task.load_data()
    return Trainer(task)
