"""A task of any size that trains in no time: every parameter goes up by a constant. It needs no data."""

from __future__ import annotations

import torch
from torch import nn

from maskwork.participant.bench.sizes import EXAMPLES
from maskwork.task import EvaluationResult, Task, TrainingConfig, TrainingResult


class Flat(nn.Module):
    """One vector of parameters."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(size))


class Constant(Task):
    """Adds `step` to each of `size` parameters."""

    def __init__(self, size: int, step: float = 1e-4) -> None:
        self._size, self._step = size, step

    def build_model(self) -> nn.Module:
        """One vector of zeros."""
        return Flat(self._size)

    def load_data(self) -> None:
        """There is none."""

    def train(self, model: nn.Module, config: TrainingConfig, *, seed: int) -> TrainingResult:
        """No training at all, so that a round's time is the framework's own."""
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(self._step)
        return TrainingResult(EXAMPLES, {"loss": 0.5})

    def evaluate(self, model: nn.Module) -> EvaluationResult:
        """Nothing is held out."""
        return EvaluationResult(0)
