"""The task of the chaos run, in the sites' worker processes: what `known_update` says, and a short while of nothing.

Not a test itself. A site's processes find it by `PYTHONPATH`.
"""

import torch
from tests.chaos.known_update import PARAMETERS, examples, known_loss, known_update, train_for_a_while
from torch import nn

from maskwork.task import EvaluationResult, Task, TrainingConfig, TrainingResult


class Known(Task):
    """Adds the known update of its site's seed to the one parameter."""

    def __init__(self, site: str) -> None:
        self._site = site

    def build_model(self) -> nn.Module:
        return nn.Linear(PARAMETERS, 1, bias=False)

    def load_data(self) -> None:
        pass

    def train(self, model: nn.Module, config: TrainingConfig, *, seed: int) -> TrainingResult:
        train_for_a_while(seed)
        (weight,) = model.parameters()
        with torch.no_grad():
            base = weight.detach().view(-1).numpy()
            weight.view(-1).add_(torch.from_numpy(known_update(base, seed)))
        return TrainingResult(examples(self._site), {"loss": known_loss(seed)})

    def evaluate(self, model: nn.Module) -> EvaluationResult:
        return EvaluationResult(0)
