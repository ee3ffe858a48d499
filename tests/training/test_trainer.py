"""One round of training: what is federated, determinism, and what is refused with which words."""

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from maskwork.participant.tasks.supervised import SupervisedTask
from maskwork.participant.training import Trainer, initial_vector, train_once, use_threads
from maskwork.task import Task, TaskError, TrainingConfig, TrainingError, load_task
from maskwork.tensors import write_model

CONFIG = TrainingConfig(epochs=2, batch_size=8, learning_rate=0.1)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    use_threads(1)


def loaded(name: str, **options: object) -> SupervisedTask:
    task = load_task(f"site_tasks:{name}", options)
    task.load_data()
    assert isinstance(task, SupervisedTask)
    return task


def names(task: Task) -> list[str]:
    return [spec.name for spec in initial_vector(task, 1)[0].tensors]


def test_the_update_is_trained_minus_global() -> None:
    task = loaded("Regression")
    _, vector = initial_vector(task, 1)
    before = vector.copy()
    update, summary = train_once(task, vector, TrainingConfig(epochs=200, batch_size=11, learning_rate=0.02), seed=1)
    np.testing.assert_array_equal(vector, before)
    assert update.dtype == np.float32
    bias, weight = (vector + update)[0], (vector + update)[1:]
    np.testing.assert_allclose(weight, 1, atol=1e-3)  # the targets are the sum of the features
    assert abs(bias) < 1e-3
    assert summary.update_norm == pytest.approx(float(np.linalg.norm(update)))
    assert summary.examples == summary.evaluation_examples == 33
    assert summary.train_metrics.keys() == summary.evaluation_metrics.keys() == {"loss"}
    assert summary.train_metrics["loss"] < 1e-4 < 0.1 < summary.evaluation_metrics["loss"]


def test_evaluation_is_of_the_global_model() -> None:
    task = loaded("Blobs")
    _, vector = initial_vector(task, 1)
    metrics = [train_once(task, vector, config, 1)[1].evaluation_metrics for config in (CONFIG, TrainingConfig())]
    assert metrics[0] == metrics[1]
    assert metrics[0].keys() == {"loss", "accuracy"}


def test_the_same_seed_gives_the_same_update() -> None:
    task = loaded("Blobs")  # with dropout and shuffling
    _, vector = initial_vector(task, 1)
    trainer = Trainer(task)
    first = trainer.run(vector, CONFIG, 1)[0].tobytes()
    other = trainer.run(vector, CONFIG, 2)[0].tobytes()
    assert first != other
    torch.rand(1000)  # whoever drew before does not matter
    assert trainer.run(vector, CONFIG, 1)[0].tobytes() == first  # nor does the round before
    assert train_once(loaded("Blobs"), vector, CONFIG, 1)[0].tobytes() == first  # nor the process's history


def test_initial_weights_follow_their_seed() -> None:
    task = loaded("Blobs")
    one, again, two = (initial_vector(task, seed)[1].tobytes() for seed in (1, 1, 2))
    assert one == again != two


def test_a_gradient_norm_can_be_bounded() -> None:
    task = loaded("Blobs", examples=8)
    _, vector = initial_vector(task, 1)
    config = TrainingConfig(batch_size=8, learning_rate=1.0, momentum=0.0, max_gradient_norm=1e-3)
    assert train_once(task, vector, config, 1)[1].update_norm == pytest.approx(1e-3, rel=1e-3)


# --- what is federated ----------------------------------------------------------------------------------------------


def test_an_adapter_is_just_a_smaller_vector() -> None:
    task = loaded("Adapted")
    schema, vector = initial_vector(task, 1)
    assert [str(spec) for spec in schema.tensors] == ["'0.down' F32[2, 4]", "'0.up' F32[1000, 2]"]
    model = task.build_model()
    assert schema.size == 2008 < sum(p.numel() for p in model.parameters()) / 3
    update, _ = train_once(task, vector, CONFIG, 1)
    assert np.abs(update).max() > 0


def test_running_statistics_stay_or_travel() -> None:
    apart, together = loaded("Normalised"), loaded("NormalisedTogether")
    assert set(names(together)) - set(names(apart)) == {"1.running_mean", "1.running_var"}
    assert Trainer(apart).info.local_buffers == ("1.running_mean", "1.running_var")
    assert Trainer(together).info.local_buffers == ()
    schema, vector = initial_vector(together, 1)
    update, _ = train_once(together, vector, CONFIG, 1)
    moved = {spec.name: np.abs(update[start:stop]).max() for spec, start, stop in schema.spans()}
    assert moved["1.running_mean"] > 0
    assert moved["1.running_var"] > 0


def test_buffers_that_stay_start_anew_in_every_round() -> None:
    task = loaded("Normalised")
    _, vector = initial_vector(task, 1)
    trainer = Trainer(task)
    update, summary = trainer.run(vector, CONFIG, 1)
    update_again, summary_again = trainer.run(vector, CONFIG, 1)
    assert update.tobytes() == update_again.tobytes()
    assert summary.evaluation_metrics == summary_again.evaluation_metrics


def test_a_last_batch_of_one_does_not_break_batch_normalisation() -> None:
    task = loaded("Normalised")
    _, vector = initial_vector(task, 1)
    assert train_once(task, vector, TrainingConfig(batch_size=32), 1)[1].examples == 33


def test_a_shared_parameter_travels_once() -> None:
    task = loaded("Tied")
    assert names(task) == ["0.bias", "0.weight", "1.bias", "2.bias", "2.weight"]
    _, vector = initial_vector(task, 1)
    assert np.abs(train_once(task, vector, CONFIG, 1)[0]).max() > 0


def test_half_precision_travels_as_it_is(tmp_path: Path) -> None:
    task = loaded("Halves")
    schema, vector = initial_vector(task, 1)
    assert {spec.dtype for spec in schema.tensors} == {"BF16"}
    update, _ = train_once(task, vector, CONFIG, 1)
    write_model(tmp_path / "m", schema, vector + update, {})
    model = task.build_model()
    model.load_state_dict(safetensors.torch.load_file(tmp_path / "m"))
    trained = torch.cat([p.detach().float().flatten() for _, p in sorted(model.named_parameters())])
    np.testing.assert_allclose(trained.numpy(), vector + update, rtol=2**-8)


def test_a_model_file_loads_in_plain_pytorch(tmp_path: Path) -> None:
    for name in ("Blobs", "NormalisedTogether"):
        schema, vector = initial_vector(loaded(name), 1)
        write_model(tmp_path / "m.safetensors", schema, vector + np.float32(0.5), {"format": "pt"})
        model = loaded(name).build_model()
        model.load_state_dict(safetensors.torch.load_file(tmp_path / "m.safetensors"))
        for spec, start, stop in schema.spans():
            got = model.state_dict()[spec.name].numpy().ravel()
            np.testing.assert_array_equal(got, vector[start:stop] + np.float32(0.5))


# --- what is refused ------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_says_where() -> None:
    task = loaded("Poisoned")
    _, vector = initial_vector(task, 1)
    with pytest.raises(TrainingError, match=r"epoch 1, batch \d: the loss is nan"):
        train_once(task, vector, CONFIG, 1)


def test_weights_that_are_not_finite_name_their_tensor() -> None:
    task = loaded("Silent")
    _, vector = initial_vector(task, 1)
    with pytest.raises(TrainingError, match=r"tensor '3\.bias' holds NaN or infinity"):
        train_once(task, vector, CONFIG, 1)


def test_federated_tensors_must_stay_the_same() -> None:
    task = loaded("Unfreezing")
    _, vector = initial_vector(task, 1)
    with pytest.raises(TrainingError, match=r"changed which tensors are federated: .*'0\.base\.bias'"):
        train_once(task, vector, CONFIG, 1)


@pytest.mark.parametrize(
    ("name", "said"),
    [("Frozen", "no parameter of the task's model requires grad"), ("Complex", "'weight' is torch.complex64")],
)
def test_models_that_cannot_be_federated(name: str, said: str) -> None:
    with pytest.raises(TaskError) as caught:
        Trainer(loaded(name))
    assert said in str(caught.value)


def test_a_site_without_examples() -> None:
    task = loaded("Blobs", examples=0)
    _, vector = initial_vector(task, 1)
    with pytest.raises(TrainingError, match="training data is empty"):
        train_once(task, vector, CONFIG, 1)
    _, summary = train_once(loaded("Blobs", held_out=0), vector, CONFIG, 1)
    assert (summary.evaluation_examples, summary.evaluation_metrics) == (0, {})


@pytest.mark.parametrize("threads", [0, -1])
def test_threads_are_positive(threads: int) -> None:
    with pytest.raises(ValueError, match="1 thread or more"):
        use_threads(threads)
