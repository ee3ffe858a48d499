"""The ready half of a task: supervised learning by SGD. A site adds its model, its data and perhaps its loss.

It is NOT for training loops of another kind (two models, no targets, an optimiser of one's own): those implement
`maskwork.task.Task`.

Rules it upholds: the same seed gives the same weights; a loss that is not finite ends training, and the error says in
which epoch and batch.
"""

import abc
import math
from collections.abc import Mapping
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from maskwork.task import EvaluationResult, Task, TrainingConfig, TrainingError, TrainingResult

Examples: TypeAlias = Dataset[tuple[Tensor, ...]]
"""Pairs of an input and its target, with a length and an index, such as a `TensorDataset`."""


class SupervisedTask(Task):
    """A task over pairs of an input and a target; `build_model`, `training_data` and `validation_data` are the site's.

    Attributes:
        device: Where `build_model` puts the module; batches are moved there.
        loader_workers: Processes that read examples ahead; 0 reads them in the training process.
        evaluation_batch_size: Examples per step when nothing is learnt.
    """

    device: ClassVar[str] = "cpu"
    loader_workers: ClassVar[int] = 0
    evaluation_batch_size: ClassVar[int] = 1024

    @abc.abstractmethod
    def training_data(self) -> Examples:
        """The examples that this site trains on; read once."""

    @abc.abstractmethod
    def validation_data(self) -> Examples:
        """Held-out examples of this site, on which the global model is evaluated in every round; read once."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of a batch, a scalar; cross-entropy unless overridden."""
        return functional.cross_entropy(outputs, targets)

    def metrics(self, outputs: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
        """Further means over a batch by name, each a scalar: the accuracy where targets are classes, else nothing."""
        if outputs.dim() != 2 or targets.dim() != 1 or targets.is_floating_point():
            return {}
        return {"accuracy": (outputs.argmax(1) == targets).float().mean()}

    def load_data(self) -> None:
        """Read both parts of the site's data."""
        self._training = self.training_data()
        self._validation = self.validation_data()

    def train(self, model: nn.Module, config: TrainingConfig, *, seed: int) -> TrainingResult:
        """SGD with momentum over shuffled batches; the metrics are those of the last epoch, as it went."""
        optimizer = torch.optim.SGD(
            [parameter for parameter in model.parameters() if parameter.requires_grad],
            lr=config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
        batches = self._training_batches(config, seed)
        means = _Means()
        for epoch in range(1, config.epochs + 1):
            means = _Means()
            for number, (inputs, targets) in enumerate(batches, 1):
                optimizer.zero_grad()
                loss = self._measure(model, inputs, targets, means)
                if not math.isfinite(loss.item()):
                    raise TrainingError(
                        f"epoch {epoch}, batch {number}: the loss is {loss.item()}; "
                        "lower the learning rate, or look at this batch's data"
                    )
                loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
                if config.max_gradient_norm is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), config.max_gradient_norm)
                optimizer.step()
        return TrainingResult(_length(self._training), means.result())

    def evaluate(self, model: nn.Module) -> EvaluationResult:
        """Loss and metrics over the site's held-out examples."""
        return self.evaluate_on(model, self._validation)

    def evaluate_on(self, model: nn.Module, examples: Examples) -> EvaluationResult:
        """Loss and metrics over any examples, such as a common test set. Changes nothing about the module."""
        was_training = model.training
        model.eval()
        means = _Means()
        with torch.no_grad():
            for inputs, targets in DataLoader(examples, self.evaluation_batch_size, num_workers=self.loader_workers):
                self._measure(model, inputs, targets, means)
        model.train(was_training)
        return EvaluationResult(_length(examples), means.result())

    def _training_batches(self, config: TrainingConfig, seed: int) -> "DataLoader[tuple[Tensor, ...]]":
        examples = _length(self._training)
        if examples == 0:
            raise TrainingError("this site's training data is empty")
        return DataLoader(
            self._training,
            config.batch_size,
            shuffle=True,
            generator=torch.Generator().manual_seed(seed),
            num_workers=self.loader_workers,
            # A last batch of a single example has no variance, and batch normalisation fails on it.
            drop_last=examples > config.batch_size and examples % config.batch_size == 1,
        )

    def _measure(self, model: nn.Module, inputs: Tensor, targets: Tensor, means: "_Means") -> Tensor:
        inputs, targets = inputs.to(self.device), targets.to(self.device)
        outputs = model(inputs)
        loss = self.loss(outputs, targets)
        means.add(len(targets), {"loss": loss.detach(), **self.metrics(outputs.detach(), targets)})
        return loss


class _Means:
    """Means over examples from means over batches."""

    def __init__(self) -> None:
        self._examples = 0
        self._sums: dict[str, float] = {}

    def add(self, examples: int, metrics: Mapping[str, Tensor]) -> None:
        self._examples += examples
        for name, value in metrics.items():
            self._sums[name] = self._sums.get(name, 0.0) + examples * float(value)

    def result(self) -> dict[str, float]:
        return {name: total / self._examples for name, total in self._sums.items()}


def _length(examples: Examples) -> int:
    length = getattr(examples, "__len__", None)
    if length is None:
        raise TrainingError(f"{type(examples).__name__} has no length; a federated update is weighted by its examples")
    return int(length())
