"""The baselines are what they say: the same training, none of the aggregation code."""

import ast
from pathlib import Path

import numpy as np
import pytest

from maskwork.participant.demo import baselines
from maskwork.participant.demo.baselines import CommonTestSet, clipped, repeat_plain, train_centrally
from maskwork.participant.demo.federation import DemoOptions
from maskwork.participant.tasks.digits import Digits
from maskwork.participant.training import initial_vector, train_once, use_threads
from maskwork.task import TrainingConfig, training_seed

OPTIONS = DemoOptions(rounds=2, participants=4, seed=5, alpha=0.5)
TRAINING = TrainingConfig(epochs=1, batch_size=16, learning_rate=0.05)


def test_no_aggregation_code_is_used() -> None:
    source = Path(baselines.__file__).read_text()
    imported = [
        name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    ]
    assert "numpy" in imported
    assert not [name for name in imported if name.startswith(("maskwork.secagg", "maskwork.coordinator"))]


def test_clipping() -> None:
    update = np.array([3.0, 4.0], np.float32)
    assert clipped(update, 10.0).tolist() == [3.0, 4.0]
    assert clipped(update, 5.0).tolist() == [3.0, 4.0]
    assert np.allclose(clipped(update, 1.0), [0.6, 0.8], rtol=1e-15)
    assert clipped(update, 1.0).dtype == np.float64


def test_a_plain_round_is_the_weighted_mean_of_its_survivors_clipped_updates() -> None:
    _, initial = initial_vector(Digits(), 5)
    survivors = [("site-a", "site-b", "site-d"), ("site-b", "site-c")]
    clip_norm = 0.5
    run = repeat_plain(
        OPTIONS,
        "job-1",
        survivors,
        initial=initial,
        training=TRAINING,
        clip_norm=clip_norm,
        test_set=CommonTestSet(OPTIONS),
    )
    use_threads(1)
    model = initial.astype(np.float64)
    for number, members in enumerate(survivors, 1):
        sums, weights = np.zeros_like(model), 0
        start = model.astype(np.float32)
        for site in members:
            task = Digits("abcd".index(site[-1]), 4, alpha=0.5, seed=5)
            task.load_data()
            seed = training_seed(5, job="job-1", round_number=number, participant=site)
            update, summary = train_once(task, start, TRAINING, seed)
            norm = np.sqrt((update.astype(np.float64) ** 2).sum())
            assert norm > clip_norm, "the test is meant to clip"
            sums += summary.examples * update * (clip_norm / norm)
            weights += summary.examples
        model = (start + (sums / weights).astype(np.float32)).astype(np.float64)
    assert np.abs(run.model - model).max() < 1e-5
    assert len(run.accuracies) == 2
    assert not np.array_equal(run.model, initial)


def test_central_training_sees_everybodys_data_and_learns() -> None:
    _, initial = initial_vector(Digits(), 5)
    test_set = CommonTestSet(OPTIONS)
    before = initial.copy()
    trained = train_centrally(OPTIONS, TRAINING, initial)
    assert np.array_equal(initial, before)
    assert test_set.accuracy(initial) < 0.3
    assert test_set.accuracy(trained) > 0.8


def test_accuracy_is_a_share() -> None:
    test_set = CommonTestSet(OPTIONS)
    zeros = np.zeros(9610, np.float32)
    labels = [int(target) for _, target in Digits.test_data(5)]  # type: ignore[attr-defined]  # has a length
    assert test_set.accuracy(zeros) == pytest.approx(labels.count(0) / len(labels))
