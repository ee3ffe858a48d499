"""A task of 4096 weights that adds to them a vector known to the test; not a test itself.

Long and random enough that no piece of a model, an update or a sum is in a file by chance.
"""

import hashlib
import socket

import numpy as np
import torch
from torch import nn

from maskwork.task import EvaluationResult, Task, TrainingConfig, TrainingResult

SIDE = 64
SCALE = 0.01


def update_of(site: str) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """What the site adds to the weights in every round; its norm is about 0.6, below the clip norm."""
    seed = int.from_bytes(hashlib.sha256(site.encode()).digest()[:8], "big")
    return (SCALE * np.random.default_rng(seed).normal(size=SIDE * SIDE)).astype(np.float32)


class Wide(Task):
    """Adds the site's vector once the test lets it; told "!", it fails with the data in its error's cause."""

    def __init__(self, gate: str, site: str) -> None:
        self._gate, self._site = gate, site

    def load_data(self) -> None:
        pass

    def build_model(self) -> nn.Module:
        return nn.Linear(SIDE, SIDE, bias=False)

    def train(self, model: nn.Module, config: TrainingConfig, *, seed: int) -> TrainingResult:
        with socket.socket(socket.AF_UNIX) as gate:
            gate.connect(self._gate)
            gate.sendall(self._site.encode() + b"\n")
            if gate.recv(1) == b"!":
                raise LookupError("the data is gone")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.from_numpy(update_of(self._site).reshape(SIDE, SIDE)))
        return TrainingResult(10, {"loss": 0.5})

    def evaluate(self, model: nn.Module) -> EvaluationResult:
        return EvaluationResult(0)
