"""Tasks as sites might write them, for the tests of this folder; not a test itself."""

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from maskwork.participant.tasks.supervised import Examples, SupervisedTask
from maskwork.task import TrainingConfig, TrainingResult

EXAMPLES = 33  # a remainder of one at a batch size of 32


def blobs(examples: int) -> TensorDataset:
    """Four features, three classes that a linear map tells apart."""
    generator = torch.Generator().manual_seed(5)
    features = torch.randn(examples, 4, generator=generator)
    return TensorDataset(features, features[:, :3].argmax(1))


class Blobs(SupervisedTask):
    """The plain case, with dropout so that training draws random numbers."""

    def __init__(self, examples: int = EXAMPLES, held_out: int = 8) -> None:
        self._counts = examples, held_out

    def build_model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.3), nn.ReLU(), nn.Linear(16, 3))

    def training_data(self) -> Examples:
        return blobs(self._counts[0])

    def validation_data(self) -> Examples:
        return blobs(self._counts[1])


class LowRank(nn.Module):
    """A frozen linear layer with a trainable low-rank addition, as LoRA has it (Hu et al. 2021, section 4.1)."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, base.in_features) / rank)
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, inputs: Tensor) -> Tensor:
        addition: Tensor = inputs @ self.down.T @ self.up.T
        return self.base(inputs) + addition  # type: ignore[no-any-return]  # modules return Any


class Adapted(Blobs):
    """A large frozen layer, a small federated adapter."""

    def build_model(self) -> nn.Module:
        base = nn.Linear(4, 1000)
        nn.init.constant_(base.weight, 0.01)
        nn.init.zeros_(base.bias)
        return nn.Sequential(LowRank(base, 2), nn.ReLU(), nn.Linear(1000, 3).requires_grad_(False))


class Normalised(Blobs):
    """Batch normalisation whose running statistics stay at the site."""

    def build_model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))


class NormalisedTogether(Normalised):
    """The same, with the running statistics averaged."""

    federates_buffers = True


class Regression(Blobs):
    """A loss of its own, and so no accuracy."""

    def build_model(self) -> nn.Module:
        return nn.Linear(4, 1)

    def training_data(self) -> Examples:
        features, _ = blobs(EXAMPLES).tensors
        return TensorDataset(features, features.sum(1, keepdim=True))

    def validation_data(self) -> Examples:
        return self.training_data()

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.mse_loss(outputs, targets)


class Tied(Blobs):
    """A parameter that two layers share, and a half-precision one."""

    def build_model(self) -> nn.Module:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3))
        assert isinstance(model[0], nn.Linear)
        assert isinstance(model[1], nn.Linear)
        model[1].weight = model[0].weight
        return model


class Halves(Blobs):
    """Parameters in bfloat16."""

    def build_model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 3)).bfloat16()

    def training_data(self) -> Examples:
        features, labels = blobs(EXAMPLES).tensors
        return TensorDataset(features.bfloat16(), labels)

    def validation_data(self) -> Examples:
        return self.training_data()


class WithoutData(Blobs):
    """Its data is not where it should be."""

    def load_data(self) -> None:
        raise FileNotFoundError("no readmissions.csv")


class Broken(Blobs):
    """Its training has a mistake."""

    def train(self, model: nn.Module, config: TrainingConfig, *, seed: int) -> TrainingResult:
        raise KeyError("age")


class Poisoned(Blobs):
    """One example is not a number."""

    def training_data(self) -> Examples:
        features, labels = blobs(EXAMPLES).tensors
        features[7, 0] = torch.nan
        return TensorDataset(features, labels)


class Silent(Blobs):
    """Breaks its weights without a sign in its loss."""

    def train(self, model: nn.Module, config: TrainingConfig, *, seed: int) -> TrainingResult:
        with torch.no_grad():
            dict(model.named_parameters())["3.bias"][1] = torch.inf
        return TrainingResult(3)


class Unfreezing(Adapted):
    """Changes which parameters are trained."""

    def train(self, model: nn.Module, config: TrainingConfig, *, seed: int) -> TrainingResult:
        model.requires_grad_(True)
        return TrainingResult(3)


class Frozen(Blobs):
    """Nothing to train."""

    def build_model(self) -> nn.Module:
        return nn.Linear(4, 3).requires_grad_(False)


class Complex(Blobs):
    """A dtype that is not federated."""

    def build_model(self) -> nn.Module:
        return nn.Linear(4, 3, dtype=torch.complex64)
