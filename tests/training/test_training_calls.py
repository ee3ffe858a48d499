"""The worker's functions: configure, train, mask, discard; called in this process."""

import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from maskwork.metrics import statistic_specs
from maskwork.participant import training, training_calls
from maskwork.participant.training import train_once
from maskwork.participant.training_calls import MaskRequest, TaskInfo, TrainRequest, TrainSummary
from maskwork.secagg.encoding import Encoding, EncodingError, decode_statistics, decode_sum, preset
from maskwork.secagg.masking import MaskingKeys, accumulate, remove_masks, remove_statistics_masks
from maskwork.secagg.plan import StatisticSpec
from maskwork.secagg.prg import SignedKey
from maskwork.task import TaskError, TrainingConfig, TrainingError, load_task
from maskwork.tensors import ModelFileError, Schema, TensorSpec, read_vector, write_model

SESSION, OTHER = bytes(32), bytes([1]) * 32
ENCODING = preset("exact", cohort=3, clip_norm=100.0, weight_cap=100)
STATISTICS = statistic_specs({"train.loss": 100.0, "eval.loss": 100.0, "eval.accuracy": 1.0}, 100)
KEYS = MaskingKeys((SignedKey(b"a" * 16, False), SignedKey(b"b" * 16, True)), (SignedKey(b"c" * 16, True),), b"r" * 16)


@pytest.fixture
def info() -> Iterator[TaskInfo]:
    yield training_calls.configure("site_tasks:Blobs", {})
    training_calls.discard(SESSION)


@pytest.fixture
def model(tmp_path: Path, info: TaskInfo) -> Path:
    path = tmp_path / "global.safetensors"
    vector = np.random.default_rng(1).standard_normal(info.schema.size).astype(np.float32)
    write_model(path, info.schema, vector, {})
    return path


def request(model: Path, session: bytes = SESSION, *, parameters: int = 131) -> TrainRequest:
    return TrainRequest(session, model, parameters, TrainingConfig(epochs=2, batch_size=8), 5)


def masking(
    output: Path,
    session: bytes = SESSION,
    *,
    encoding: Encoding = ENCODING,
    statistics: tuple[StatisticSpec, ...] = STATISTICS,
) -> MaskRequest:
    return MaskRequest(session, encoding, KEYS, bytes(32), statistics, output)


def test_what_is_masked_is_the_update(tmp_path: Path, model: Path) -> None:
    summary = training_calls.train(request(model))
    result = training_calls.mask(masking(tmp_path / "update"))
    packed = np.fromfile(tmp_path / "update", np.uint8)
    assert len(packed) == result.update_bytes == -(-131 * ENCODING.ring_bits // 8)

    total = np.zeros(131, np.uint32)
    accumulate(total, packed, ENCODING.ring_bits)
    remove_masks(total, KEYS.update)
    mean = np.empty(131, np.float32)
    decode_sum(total, ENCODING, rotation_seed=bytes(32), total_weight=summary.examples, out_f32=mean)
    task = load_task("site_tasks:Blobs", {})
    task.load_data()
    expected, _ = train_once(task, read_vector(model)[1], request(model).config, 5)
    np.testing.assert_allclose(mean, expected, atol=1e-4)

    sums = np.frombuffer(result.statistics, "<u8").astype(np.uint64)
    remove_statistics_masks(sums, KEYS.statistics)
    assert dict(zip([spec.name for spec in STATISTICS], decode_statistics(sums), strict=True)) == pytest.approx(
        {
            "examples": 33,
            "eval.examples": 8,
            "train.loss": 33 * summary.train_metrics["loss"],
            "eval.loss": 8 * summary.evaluation_metrics["loss"],
            "eval.accuracy": 8 * summary.evaluation_metrics["accuracy"],
        },
        abs=1e-5,
    )


def test_the_same_request_gives_the_same_bytes(tmp_path: Path, model: Path) -> None:
    training_calls.train(request(model))
    first = training_calls.mask(masking(tmp_path / "a"))
    assert training_calls.mask(masking(tmp_path / "b")) == first
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o600


def test_nothing_but_the_masked_update_is_written(tmp_path: Path, model: Path) -> None:
    training_calls.train(request(model))
    assert os.listdir(tmp_path) == ["global.safetensors"]
    training_calls.mask(masking(tmp_path / "update"))
    assert sorted(os.listdir(tmp_path)) == ["global.safetensors", "update"]


def test_one_update_is_kept_under_its_session(tmp_path: Path, model: Path) -> None:
    output = tmp_path / "update"
    with pytest.raises(TrainingError, match="no update is kept for session 0000000000000000"):
        training_calls.mask(masking(output))
    training_calls.train(request(model))
    with pytest.raises(TrainingError, match="no update is kept for session 0101010101010101"):
        training_calls.mask(masking(output, OTHER))
    training_calls.discard(OTHER)  # is not kept: nothing happens
    training_calls.train(request(model, OTHER))
    with pytest.raises(TrainingError, match="no update"):
        training_calls.mask(masking(output))
    training_calls.mask(masking(output, OTHER))
    training_calls.discard(OTHER)
    with pytest.raises(TrainingError, match="no update"):
        training_calls.mask(masking(tmp_path / "again", OTHER))


def test_what_is_discarded_is_wiped(model: Path) -> None:
    """Its memory is kept for the next round; the update in it is not."""
    training_calls.train(request(model))
    kept = training._state.kept
    assert kept is not None
    assert kept.update.any()
    training_calls.discard(SESSION)
    assert not kept.update.any()
    training_calls.train(request(model, OTHER))
    again = training._state.kept
    assert again is not None
    assert again.update is kept.update
    training_calls.discard(OTHER)


def test_a_round_that_fails_keeps_no_earlier_update(tmp_path: Path, model: Path) -> None:
    training_calls.train(request(model))
    with pytest.raises(TrainingError, match="the plan counts 130 parameters, its model has 131"):
        training_calls.train(request(model, OTHER, parameters=130))
    with pytest.raises(TrainingError, match="no update"):
        training_calls.mask(masking(tmp_path / "update"))


def test_another_model_is_refused_by_tensor(tmp_path: Path, info: TaskInfo) -> None:
    path = tmp_path / "other.safetensors"
    other = Schema((*info.schema.tensors[1:], TensorSpec("0.bias", "F32", (4, 4))))
    write_model(path, other, np.zeros(other.size, np.float32), {})
    with pytest.raises(TrainingError, match=r"'0\.bias' F32\[4, 4\] here is F32\[16\] there.*maskwork model init"):
        training_calls.train(request(path))
    path.write_bytes(b"no model")
    with pytest.raises(ModelFileError, match=r"other\.safetensors"):
        training_calls.train(request(path))


def test_a_global_model_that_is_not_finite_is_refused(model: Path) -> None:
    damaged = bytearray(model.read_bytes())
    damaged[-4:] = b"\x00\x00\xc0\x7f"
    model.write_bytes(damaged)
    with pytest.raises(ModelFileError, match=r"tensor '3\.weight' holds NaN"):
        training_calls.train(request(model))


@pytest.mark.parametrize(
    ("encoding", "statistics", "error", "said"),
    [
        (preset("exact", cohort=3, clip_norm=1.0, weight_cap=32), STATISTICS, EncodingError, "weight 33"),
        (ENCODING, (StatisticSpec("examples", 32.0),), EncodingError, "'examples'"),
        (ENCODING, (StatisticSpec("eval.auc", 1.0),), TrainingError, "the plan asks for eval.auc; .* eval.loss"),
    ],
)
def test_what_cannot_be_encoded_leaves_no_file(
    tmp_path: Path,
    model: Path,
    *,
    encoding: Encoding,
    statistics: tuple[StatisticSpec, ...],
    error: type[Exception],
    said: str,
) -> None:
    training_calls.train(request(model))
    with pytest.raises(error, match=said):
        training_calls.mask(masking(tmp_path / "update", encoding=encoding, statistics=statistics))
    assert os.listdir(tmp_path) == ["global.safetensors"]


def test_a_tasks_own_mistakes_are_told_with_their_line(model: Path) -> None:
    at = r"\(site_tasks\.py, line \d+\)"
    with pytest.raises(TaskError, match=rf"WithoutData: getting ready failed: FileNotFoundError: no readmi.* {at}"):
        training_calls.configure("site_tasks:WithoutData", {})
    training_calls.configure("site_tasks:Broken", {})
    with pytest.raises(TrainingError, match=rf"the task failed: KeyError: 'age' {at}"):
        training_calls.train(request(model))


def test_a_metric_beyond_its_bound_is_clamped_and_not_refused(tmp_path: Path, model: Path) -> None:
    """The bounds are the coordinator's: a refusal would say on which side of one this site's value lies."""
    bounds = {spec.name: spec.bound for spec in STATISTICS} | {"train.loss": 0.5, "eval.examples": 3.0}
    statistics = tuple(StatisticSpec(spec.name, bounds[spec.name]) for spec in STATISTICS)
    training_calls.train(request(model))
    result = training_calls.mask(masking(tmp_path / "update", statistics=statistics))
    sums = np.frombuffer(result.statistics, "<u8").astype(np.uint64)
    remove_statistics_masks(sums, KEYS.statistics)
    decoded = dict(zip([spec.name for spec in STATISTICS], decode_statistics(sums), strict=True))
    assert (decoded["examples"], decoded["train.loss"], decoded["eval.examples"]) == (33.0, 0.5, 3.0)


def test_a_file_that_exists_is_not_overwritten(tmp_path: Path, model: Path) -> None:
    (tmp_path / "update").write_bytes(b"precious")
    training_calls.train(request(model))
    with pytest.raises(FileExistsError):
        training_calls.mask(masking(tmp_path / "update"))
    assert (tmp_path / "update").read_bytes() == b"precious"


def test_a_task_that_fails_to_configure_leaves_none(model: Path) -> None:
    with pytest.raises(TaskError):
        training_calls.configure("site_tasks:Frozen", {})
    with pytest.raises(RuntimeError, match="configure comes before train"):
        training_calls.train(request(model))


def test_requests_travel_and_keys_have_no_repr(tmp_path: Path, model: Path) -> None:
    summary = training_calls.train(request(model))
    assert isinstance(pickle.loads(pickle.dumps(summary)), TrainSummary)
    asked = masking(tmp_path / "update")
    assert pickle.loads(pickle.dumps(asked)) == asked
    assert "aaaa" not in repr(asked)
    assert "rrrr" not in repr(asked)
