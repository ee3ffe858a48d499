"""A task of three numbers whose training waits until the test lets it go on; not a test itself.

A site's processes run it, found by `PYTHONPATH`. It says over a Unix socket that training began, and reads one byte.
"""

import socket

import torch
from torch import nn

from maskwork.task import EvaluationResult, Task, TrainingConfig, TrainingResult


class Gated(Task):
    """Adds `step` to every weight. `gate` is the path of the test's socket, `site` what it is told."""

    def __init__(self, gate: str, site: str, step: float) -> None:
        self._gate, self._site, self._step = gate, site, step

    def build_model(self) -> nn.Module:
        return nn.Linear(2, 1, bias=False)

    def load_data(self) -> None:
        pass

    def train(self, model: nn.Module, config: TrainingConfig, *, seed: int) -> TrainingResult:
        with socket.socket(socket.AF_UNIX) as gate:
            gate.connect(self._gate)
            gate.sendall(self._site.encode() + b"\n")
            answer = gate.recv(1)
        if answer == b"!":
            raise LookupError("the data is gone")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(self._step)
        return TrainingResult(10, {"loss": 0.5})

    def evaluate(self, model: nn.Module) -> EvaluationResult:
        return EvaluationResult(0)
