"""The task `digits`: laws of its shards, its model, and that it learns."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from maskwork.participant.tasks.digits import (
    MIN_SHARD,
    Digits,
    load_digits,
    split_held_out,
    split_shards,
    split_test,
)
from maskwork.participant.tasks.supervised import Examples
from maskwork.participant.training import (
    federated_tensors,
    initial_vector,
    load_vector,
    schema_of,
    train_once,
    use_threads,
)
from maskwork.task import TaskError, TrainingConfig

LABELS = load_digits()[1]
alphas = st.one_of(st.none(), st.floats(0.01, 100))


def rows(examples: Examples) -> set[bytes]:
    return {inputs.numpy().tobytes() for inputs, _ in (examples[i] for i in range(len(examples)))}  # type: ignore[arg-type]  # a TensorDataset


@given(of=st.integers(1, 50), alpha=alphas, seed=st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_shards_are_a_partition_without_small_parts(of: int, alpha: float | None, seed: int) -> None:
    pool, tests = split_test(len(LABELS), seed=seed, test_fraction=0.2)
    np.testing.assert_array_equal(np.sort(np.concatenate([pool, tests])), np.arange(len(LABELS)))
    shards = split_shards(LABELS[pool], of, alpha=alpha, seed=seed)
    assert len(shards) == of
    np.testing.assert_array_equal(np.sort(np.concatenate(shards)), np.arange(len(pool)))
    assert min(map(len, shards)) >= MIN_SHARD
    if alpha is None:
        assert max(map(len, shards)) - min(map(len, shards)) <= 1
    for number, shard in enumerate(shards):
        parts = split_held_out(shard, shard_number=number, seed=seed, fraction=0.15)
        np.testing.assert_array_equal(np.sort(np.concatenate(parts)), shard)
        assert all(len(part) > 0 for part in parts)
    again = split_shards(LABELS[pool], of, alpha=alpha, seed=seed)
    assert all(np.array_equal(a, b) for a, b in zip(shards, again, strict=True))


def test_a_small_alpha_is_skewed_and_a_large_one_is_not() -> None:
    def largest_class_share(alpha: float) -> float:
        shards = split_shards(LABELS, 5, alpha=alpha, seed=1)
        return float(np.mean([np.bincount(LABELS[shard]).max() / len(shard) for shard in shards]))

    assert largest_class_share(0.1) > 0.35
    assert largest_class_share(1000.0) < 0.13


def test_seeds_differ() -> None:
    one, two = (split_shards(LABELS, 5, alpha=0.5, seed=seed) for seed in (1, 2))
    assert not np.array_equal(one[0], two[0])


def test_too_many_shards_are_refused() -> None:
    with pytest.raises(TaskError, match="1797 examples cannot be cut into 180 shards of 10"):
        split_shards(LABELS, 180, alpha=None, seed=1)
    assert min(map(len, split_shards(LABELS, 179, alpha=0.01, seed=1))) == MIN_SHARD


def test_sites_and_the_test_set_share_nothing() -> None:
    tasks = [Digits(i, 5, alpha=0.5, seed=3) for i in range(5)]
    parts = [rows(part) for task in tasks for part in (task.training_data(), task.validation_data())]
    tests = rows(Digits.test_data(3))
    everything = [*parts, tests]
    assert sum(map(len, everything)) == len(set().union(*everything)) == 1797
    pooled = Digits.pooled(5, alpha=0.5, seed=3)
    assert rows(pooled.training_data()) == set().union(*parts[::2])
    assert rows(pooled.validation_data()) == set().union(*parts[1::2])


def test_what_a_site_sees() -> None:
    inputs, target = Digits(1, 5).training_data()[0]
    assert inputs.shape == (64,)
    assert inputs.dtype == torch.float32
    assert target.dtype == torch.int64
    stacked = torch.stack([x for x, _ in (Digits.test_data()[i] for i in range(359))])
    assert (float(stacked.min()), float(stacked.max())) == (0.0, 1.0)
    assert len(Digits.test_data()) == 359  # type: ignore[arg-type]  # a TensorDataset


def test_the_model_needs_no_data() -> None:
    task = Digits()
    schema, vector = initial_vector(task, 1)
    assert [str(spec) for spec in schema.tensors] == [
        "'0.bias' F32[128]",
        "'0.weight' F32[128, 64]",
        "'2.bias' F32[10]",
        "'2.weight' F32[10, 128]",
    ]
    assert schema.size == len(vector) == 9610


def test_it_learns_centrally() -> None:
    use_threads(1)
    task = Digits.pooled(5, alpha=0.5)
    task.load_data()
    _, vector = initial_vector(task, 1)
    update, summary = train_once(task, vector, TrainingConfig(epochs=5), seed=1)
    assert summary.examples == 1222
    assert summary.evaluation_metrics["accuracy"] < 0.3  # of the model as it was received
    model = task.build_model()
    tensors: dict[str, Tensor] = federated_tensors(task, model)
    load_vector(tensors, schema_of(tensors), vector + update)
    assert task.evaluate_on(model, Digits.test_data()).metrics["accuracy"] > 0.9


def test_without_scikit_learn_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)  # how Python marks what cannot be imported
    with pytest.raises(TaskError, match=r"pip install 'maskwork-participant\[digits\]'"):
        Digits.test_data()
