"""The task `digits`: the 1,797 handwritten digits that ship with scikit-learn, cut into shards as sites hold them.

One seed cuts the digits into a common test set, which no shard sees, and a pool; the pool into shards, evenly at
random or by Dirichlet(α) over the classes (Hsu, Qi, Brown 2019, arXiv:1909.06335); each shard into a training and a
held-out part.

It is NOT a benchmark, and no data is fetched from anywhere.

Rules it upholds: shards are disjoint and their union is the pool; the same options give the same shards everywhere;
no shard has fewer than `MIN_SHARD` examples. Where a Dirichlet draw leaves fewer, examples move, one by one, from
whichever shard is then the largest.
"""

from collections.abc import Sequence
from typing import Final, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import TensorDataset

from maskwork.participant.tasks.supervised import Examples, SupervisedTask
from maskwork.task import TaskError

Indices: TypeAlias = NDArray[np.int64]

FEATURES: Final = 64
HIDDEN: Final = 128
CLASSES: Final = 10
MIN_SHARD: Final = 10

# What a random draw is for; each has a generator of its own, so that no option shifts another's draws.
_CUT_TEST, _CUT_SHARDS, _CUT_HELD_OUT = range(3)


class Digits(SupervisedTask):
    """One site's shard of the digits, and a two-layer perceptron for them."""

    def __init__(
        self,
        shard: int = 0,
        of: int = 1,
        *,
        alpha: float | None = None,
        seed: int = 1,
        test_fraction: float = 0.2,
        validation_fraction: float = 0.15,
    ) -> None:
        """Say which shard; nothing is read yet.

        Args:
            shard: From 0 to `of` - 1.
            of: Number of shards.
            alpha: Dirichlet concentration by class, small is skewed; None: evenly at random.
            seed: Of every cut; the same at every site.
            test_fraction: Of all digits, kept out of every shard.
            validation_fraction: Of the shard, held out for federated evaluation.

        Raises:
            ValueError: An option is out of range.
        """
        if not 0 <= shard < of:
            raise ValueError(f"shard is {shard}, but there are shards 0 to {of - 1}")
        if alpha is not None and not 0 < alpha < 1e6:
            raise ValueError(f"alpha is {alpha}: expected a positive number, or none for even shards")
        if not 0 < test_fraction < 1 or not 0 < validation_fraction < 1:
            raise ValueError("test_fraction and validation_fraction lie between 0 and 1")
        self._shards: tuple[int, ...] = (shard,)
        self._of, self._alpha, self._seed = of, alpha, seed
        self._test_fraction, self._validation_fraction = test_fraction, validation_fraction

    @classmethod
    def pooled(cls, of: int, *, alpha: float | None = None, seed: int = 1) -> "Digits":
        """All shards' training parts as one, and all their held-out parts as one: what central training would have."""
        task = cls(0, of, alpha=alpha, seed=seed)
        task._shards = tuple(range(of))
        return task

    @staticmethod
    def test_data(seed: int = 1, test_fraction: float = 0.2) -> Examples:
        """The common test set: inputs float32[64] in [0, 1] and targets int64 in 0..9."""
        features, labels = load_digits()
        return _dataset(features, labels, split_test(len(labels), seed=seed, test_fraction=test_fraction)[1])

    def build_model(self) -> nn.Module:
        """64 inputs, 128 hidden units with ReLU, 10 classes: 9,610 parameters."""
        return nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES))

    def training_data(self) -> Examples:
        """The shard without its held-out part."""
        return self._part(0)

    def validation_data(self) -> Examples:
        """The shard's held-out part."""
        return self._part(1)

    def _part(self, part: int) -> Examples:
        features, labels = load_digits()
        pool, _ = split_test(len(labels), seed=self._seed, test_fraction=self._test_fraction)
        shards = split_shards(labels[pool], self._of, alpha=self._alpha, seed=self._seed)
        held_out = self._validation_fraction
        cut = [
            split_held_out(shards[i], shard_number=i, seed=self._seed, fraction=held_out)[part] for i in self._shards
        ]
        return _dataset(features, labels, pool[np.concatenate(cut)])


def load_digits() -> tuple[NDArray[np.float32], Indices]:
    """All digits: features float32[1797, 64] in [0, 1] and labels int64[1797].

    Raises:
        TaskError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ModuleNotFoundError as error:
        raise TaskError(
            "the task digits needs scikit-learn, whose data set it is: pip install 'maskwork-participant[digits]'"
        ) from error
    features, labels = datasets.load_digits(return_X_y=True)
    return (features / 16).astype(np.float32), labels.astype(np.int64)


def split_test(count: int, *, seed: int, test_fraction: float) -> tuple[Indices, Indices]:
    """Cut 0..count-1 at random into the pool and the test set, each sorted."""
    order = np.random.default_rng((seed, _CUT_TEST)).permutation(count)
    tests = max(1, round(count * test_fraction))
    return np.sort(order[tests:]), np.sort(order[:tests])


def split_shards(labels: Indices, of: int, *, alpha: float | None, seed: int) -> list[Indices]:
    """Cut the pool into shards: positions in `labels`, sorted, disjoint, together all of them.

    Raises:
        TaskError: There are not `MIN_SHARD` examples for each.
    """
    if of * MIN_SHARD > len(labels):
        raise TaskError(f"{len(labels)} examples cannot be cut into {of} shards of {MIN_SHARD} or more")
    generator = np.random.default_rng((seed, _CUT_SHARDS))
    if alpha is None:
        return [np.sort(part) for part in np.array_split(generator.permutation(len(labels)), of)]
    shards: list[list[int]] = [[] for _ in range(of)]
    for label in range(CLASSES):
        members = generator.permutation(np.flatnonzero(labels == label))
        shares = np.cumsum(generator.dirichlet(np.full(of, alpha)))[:-1]
        for shard, part in zip(shards, np.split(members, np.rint(shares * len(members)).astype(int)), strict=True):
            shard.extend(part.tolist())
    _top_up(shards)
    return [np.array(sorted(shard), np.int64) for shard in shards]


def _top_up(shards: Sequence[list[int]]) -> None:
    while len(smallest := min(shards, key=len)) < MIN_SHARD:
        smallest.append(max(shards, key=len).pop())


def split_held_out(shard: Indices, *, shard_number: int, seed: int, fraction: float) -> tuple[Indices, Indices]:
    """Cut one shard at random into its training and its held-out part; each has at least one example."""
    order = np.random.default_rng((seed, _CUT_HELD_OUT, shard_number)).permutation(shard)
    held_out = min(max(1, round(len(shard) * fraction)), len(shard) - 1)
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def _dataset(features: NDArray[np.float32], labels: Indices, chosen: Indices) -> TensorDataset:
    return TensorDataset(torch.from_numpy(features[chosen]), torch.from_numpy(labels[chosen]))
