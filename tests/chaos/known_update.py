"""What a site of the chaos run adds to a model: a function of the model and of the round's training seed, nothing else.

The seed follows from site, job and round (`maskwork.task.training_seed`), so whoever has the base model and the names
of the survivors can say what the next model must be, without asking any of the processes. Weights are powers of two:
the number of examples in a sum names its survivors. Not a test itself, and free of torch.
"""

import time
from collections.abc import Sequence
from typing import Final

import numpy as np

from maskwork.tensors import Float32Array, Schema, TensorSpec

SITES: Final = ("site-a", "site-b", "site-c", "site-d", "site-e")
PARAMETERS: Final = 340_000
"""So many that an upload is two chunks, and can be cut between them."""
SCHEMA: Final = Schema((TensorSpec("weight", "F32", (1, PARAMETERS)),))
CLIP_NORM: Final = 1.0
WEIGHT_CAP: Final = 16
_SIZE: Final = 1e-3
_DECAY: Final = 0.1
LONGEST_TRAINING_S: Final = 0.1


def examples(site: str) -> int:
    return 1 << SITES.index(site)


def known_update(base: Float32Array, seed: int) -> Float32Array:
    """Never clipped: its norm is a third of the clip norm, and the decay keeps the model itself small."""
    drawn = np.random.default_rng(seed).uniform(-_SIZE, _SIZE, len(base)).astype(np.float32)
    return np.asarray(drawn - np.float32(_DECAY) * base, np.float32)


def known_loss(seed: int) -> float:
    """Eighths, which fixed point holds exactly."""
    return (seed % 800) / 8


def train_for_a_while(seed: int) -> None:
    """Stands for the training itself, so that a round has a middle."""
    time.sleep(seed % 1009 / 1009 * LONGEST_TRAINING_S)


def initial_vector(number: int) -> Float32Array:
    """A model that no other job of the run begins with: on one model, sites answer for one survivor set only."""
    return np.full(PARAMETERS, number * 1e-4, np.float32)


def weighted_mean(updates: Sequence[tuple[int, Float32Array]]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    total = sum(n for n, _ in updates)
    summed = np.zeros(len(updates[0][1]), np.float64)
    for n, update in updates:
        summed += n * update.astype(np.float64)
    return summed / total
