"""What a job says about training, how a site's task is found, and what a task's results must be."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from maskwork.task import (
    EvaluationResult,
    TaskError,
    TrainingConfig,
    TrainingConfigError,
    TrainingError,
    TrainingResult,
    checked_metrics,
    load_task,
    training_seed,
)

DIGITS = "maskwork.participant.tasks.digits:Digits"


def test_the_canonical_form_is_pinned() -> None:
    config = TrainingConfig(epochs=2, batch_size=16, learning_rate=1, momentum=0.9)
    expected = (
        b'{"batch_size":16,"epochs":2,"learning_rate":1.0,"max_gradient_norm":null,"momentum":0.9,"weight_decay":0.0}'
    )
    assert config.canonical_json() == expected
    assert config.digest() == hashlib.sha256(expected).digest()
    assert TrainingConfig.from_canonical_json(expected) == config
    assert TrainingConfig(epochs=3).digest() != TrainingConfig(epochs=2).digest()


@pytest.mark.parametrize(
    "field",
    [
        {"epochs": 0},
        {"epochs": 1.5},
        {"epochs": True},
        {"batch_size": 0},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"momentum": float("nan")},
        {"weight_decay": float("nan")},
        {"max_gradient_norm": float("nan")},
        {"learning_rate": "0.1"},
        {"momentum": 1.0},
        {"momentum": -0.1},
        {"weight_decay": float("inf")},
        {"weight_decay": -1.0},
        {"max_gradient_norm": 0.0},
        {"learning_rat": 0.1},
    ],
)
def test_a_config_out_of_range_cannot_be_made(field: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=next(iter(field))):
        TrainingConfig.model_validate(field)


def test_a_config_cannot_be_changed() -> None:
    config = TrainingConfig()
    with pytest.raises(ValidationError, match="frozen"):
        config.epochs = 3


GOOD = json.loads(TrainingConfig().canonical_json())


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "as a whole"),
        (b"[]", "as a whole"),
        (b"\xff", "as a whole"),
        (b" " + TrainingConfig().canonical_json(), "canonical"),
        (json.dumps(GOOD).encode(), "canonical"),
        (json.dumps(GOOD | {"epochs": 0}).encode(), "epochs"),
        (json.dumps(GOOD | {"surprise": 1}).encode(), "surprise"),
        (json.dumps(GOOD | {"momentum": 0.95}, separators=(",", ":")).replace("0.95", "0.950").encode(), "canonical"),
        (b"{" + b" " * 5000 + b"}", "5002 bytes"),
    ],
)
def test_a_config_that_was_sent_is_checked(data: bytes, said: str) -> None:
    with pytest.raises(TrainingConfigError, match=said):
        TrainingConfig.from_canonical_json(data)


def test_training_seeds_differ_by_everything_but_the_attempt() -> None:
    seeds = {
        training_seed(seed, job=job, round_number=number, participant=name)
        for seed in (0, 1)
        for job in ("a", "b", "a1")
        for number in (1, 11)
        for name in ("x", "1x")
    }
    assert len(seeds) == 24
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert training_seed(7, job="j", round_number=3, participant="clinic") == 7797534211592980779


# --- finding a task -------------------------------------------------------------------------------------------------


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the import path, as a site would have for its own tasks."""
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_a_task_is_loaded_with_its_options() -> None:
    task = load_task(DIGITS, {"shard": 2, "of": 5, "alpha": 0.5})
    assert type(task).__name__ == "Digits"


@pytest.mark.parametrize(
    ("path", "options", "said"),
    [
        ("digits", {}, "not an import path: expected package.module:ClassName"),
        ("a.b:", {}, "not an import path"),
        ("a..b:C", {}, "not an import path"),
        ("a.b:C.d", {}, "not an import path"),
        ("no_such_package.tasks:Mine", {}, "there is no module 'no_such_package'; install"),
        ("maskwork.participant.tasks.digits:Digit", {}, "no 'Digit'; did you mean 'Digits'"),
        ("maskwork.task:TrainingConfig", {}, "not a subclass of maskwork.task.Task"),
        ("maskwork.task:training_seed", {}, "not a subclass of maskwork.task.Task"),
        ("maskwork.participant.tasks.supervised:SupervisedTask", {}, "does not define build_model, training_data"),
        (DIGITS, {"shrad": 1}, "no option 'shrad'; did you mean 'shard'?"),
        (DIGITS, {"zzz": 1}, "no option 'zzz'; its options are shard, of, alpha, seed"),
        (DIGITS, {"shard": 5, "of": 5}, "its options were refused: shard is 5, but there are shards 0 to 4"),
        (DIGITS, {"shard": "first"}, "its options were refused"),
        (DIGITS, {"alpha": 0}, "alpha is 0"),
        (DIGITS, {"validation_fraction": 1.0}, "lie between 0 and 1"),
    ],
)
def test_a_task_that_cannot_be_used(path: str, options: dict[str, object], said: str) -> None:
    with pytest.raises(TaskError) as caught:
        load_task(path, options)
    assert said in str(caught.value)


def test_a_site_module_that_fails_is_named(site: Path) -> None:
    (site / "site_broken.py").write_text("import also_absent\n")
    with pytest.raises(TaskError, match="no module 'also_absent'"):
        load_task("site_broken:Mine", {})
    (site / "site_typo.py").write_text("class Mine(:\n")
    with pytest.raises(TaskError, match="importing it failed: SyntaxError"):
        load_task("site_typo:Mine", {})
    (site / "site_raises.py").write_text("raise RuntimeError('no licence')\n")
    with pytest.raises(TaskError, match="importing it failed: RuntimeError: no licence"):
        load_task("site_raises:Mine", {})


def test_a_required_option_is_asked_for(site: Path) -> None:
    (site / "site_folder.py").write_text(
        "from maskwork.participant.tasks.digits import Digits\n"
        "class Mine(Digits):\n"
        "    def __init__(self, folder, **options):\n"
        "        super().__init__(**options)\n"
    )
    with pytest.raises(TaskError, match="needs the option 'folder'"):
        load_task("site_folder:Mine", {})
    assert type(load_task("site_folder:Mine", {"folder": "/data", "of": 3})).__name__ == "Mine"


# --- results --------------------------------------------------------------------------------------------------------


def test_metrics_become_plain_floats() -> None:
    result = EvaluationResult(0, {"a": 1, "b": float(np.float32(0.5)), "c": torch.tensor(0.25)})  # type: ignore[dict-item]  # untyped sites
    metrics = checked_metrics("evaluation", result, least=0)
    assert metrics == {"a": 1.0, "b": 0.5, "c": 0.25}
    assert all(type(value) is float for value in metrics.values())


@pytest.mark.parametrize(
    ("result", "said"),
    [
        (TrainingResult(0, {}), "0 examples: expected a whole number, 1 or more"),
        (TrainingResult(-1, {}), "-1 examples"),
        (TrainingResult(True, {}), "True examples"),
        (TrainingResult(2.0, {}), "2.0 examples"),  # type: ignore[arg-type]  # what an untyped site may return
        (TrainingResult(1, {"loss": float("nan")}), "nan as the metric 'loss'"),
        (TrainingResult(1, {"loss": None}), "no number as the metric 'loss'"),  # type: ignore[dict-item]  # the same
        (TrainingResult(1, {"loss": torch.zeros(2)}), "no number as the metric 'loss'"),  # type: ignore[dict-item]  # the same
    ],
)
def test_a_result_that_makes_no_sense(result: TrainingResult, said: str) -> None:
    with pytest.raises(TrainingError, match=said):
        checked_metrics("training", result, least=1)


@pytest.mark.parametrize(
    "module",
    [
        "maskwork.task",
        "maskwork.tensors",
        "maskwork.worker",
        "maskwork.participant.training_calls",
        "maskwork.participant.model_commands",
        "maskwork.participant.tasks",
    ],
)
def test_what_others_import_brings_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
