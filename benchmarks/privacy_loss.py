"""What noise costs in accuracy: ``python benchmarks/privacy_loss.py [--seeds 3] [--output FILE]``.

Federated averaging of a softmax regression on scikit-learn's digits (1,797 images; a fifth is held out for the test),
simulated in one process without masking: 10 participants, 50 participants, and 50 that hold two digits each for the
most part. Updates are clipped to the median norm of the first round's; Gaussian noise whose expected norm is `ratio`
times √rounds times the clip norm is added to each round's mean. The ratio is what the noise of all rounds together
comes to, in units of the way that the model can go in them: `maskwork.privacy.planning` estimates with the same one.

It writes every run's means, and the curve `MEASURED_LOSS` of that module: percentage points of test accuracy lost
against the same run without noise, the mean over cohorts, rounds and seeds, made monotone. `worst` is the worst of the
cohorts. It is NOT a forecast for another task: a model of 650 parameters on easy images is what was measured.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

RATIOS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0)
ROUNDS = (10, 30, 100)
CLASSES, PIXELS = 10, 65
LOCAL_STEPS, LEARNING_RATE = 5, 0.5


@dataclass(frozen=True, slots=True)
class Cohort:
    """How the training images are split.

    Attributes:
        name: In the results.
        participants: How many.
        skewed: Whether images are dealt in order of their digit, so that most participants hold one or two digits.
    """

    name: str
    participants: int
    skewed: bool


COHORTS = (Cohort("10 alike", 10, False), Cohort("50 alike", 50, False), Cohort("50 of two digits", 50, True))


def digits(rng: np.random.Generator) -> tuple[FloatArray, IntArray, FloatArray, IntArray]:
    """Images with a constant appended and their digits, for training and for the test, in random order."""
    images, labels = load_digits(return_X_y=True)
    order = rng.permutation(len(labels))
    x = np.hstack([images / 16, np.ones((len(labels), 1))])[order]
    y = np.asarray(labels, np.int64)[order]
    held_out = len(y) // 5
    return x[held_out:], y[held_out:], x[:held_out], y[:held_out]


def shares(cohort: Cohort, y: IntArray) -> list[IntArray]:
    """The indices of each participant's images."""
    order = np.argsort(y, kind="stable") if cohort.skewed else np.arange(len(y))
    return [np.asarray(part) for part in np.array_split(order, cohort.participants)]


def local_update(model: FloatArray, x: FloatArray, y: IntArray) -> FloatArray:
    """Where some steps of gradient descent on one participant's images lead, less where they began."""
    at, wanted = model.copy(), np.eye(CLASSES)[y]
    for _ in range(LOCAL_STEPS):
        scores = x @ at
        scores -= scores.max(axis=1, keepdims=True)
        odds = np.exp(scores)
        at -= LEARNING_RATE / len(y) * x.T @ (odds / odds.sum(axis=1, keepdims=True) - wanted)
    return at - model


def accuracy_after(cohort: Cohort, rounds: int, ratio: float, seed: int) -> float:
    """Percent of the test images that the trained model tells right."""
    rng = np.random.default_rng(seed)
    x, y, test_x, test_y = digits(rng)
    parts = shares(cohort, y)
    model = np.zeros((PIXELS, CLASSES))
    clip_norm = float(np.median([np.linalg.norm(local_update(model, x[i], y[i])) for i in parts]))
    deviation = ratio * math.sqrt(rounds) * clip_norm / math.sqrt(model.size)
    for _ in range(rounds):
        updates = [local_update(model, x[i], y[i]) for i in parts]
        clipped = [u * (clip_norm / max(clip_norm, float(np.linalg.norm(u)))) for u in updates]
        model = model + np.mean(clipped, axis=0) + deviation * rng.standard_normal(model.shape)
    return 100 * float(np.mean(np.argmax(test_x @ model, axis=1) == test_y))


def main() -> None:
    """Measures and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/privacy-loss.json"))
    arguments = parser.parse_args()
    lost = np.zeros((len(COHORTS), len(ROUNDS), len(RATIOS)))
    best = np.zeros((len(COHORTS), len(ROUNDS)))
    for i, cohort in enumerate(COHORTS):
        for j, rounds in enumerate(ROUNDS):
            got = [[accuracy_after(cohort, rounds, r, seed) for r in RATIOS] for seed in range(arguments.seeds)]
            means = np.mean(got, axis=0)
            best[i, j], lost[i, j] = means[0], means[0] - means
            print(cohort.name, rounds, "rounds:", np.round(means, 1))
    curve = np.maximum.accumulate(np.maximum(lost.mean(axis=(0, 1)), 0))
    worst = np.maximum.accumulate(np.maximum(lost.max(axis=(0, 1)), 0))
    measured = {
        "seeds": arguments.seeds,
        "ratios": RATIOS,
        "accuracy_without_noise": {
            c.name: dict(zip(map(str, ROUNDS), best[i], strict=True)) for i, c in enumerate(COHORTS)
        },
        "points_lost": {
            c.name: {str(r): np.round(lost[i, j], 2).tolist() for j, r in enumerate(ROUNDS)}
            for i, c in enumerate(COHORTS)
        },
        "curve": np.round(curve, 2).tolist(),
        "worst": np.round(worst, 2).tolist(),
    }
    arguments.output.write_text(json.dumps(measured, indent=1) + "\n")


if __name__ == "__main__":
    main()
