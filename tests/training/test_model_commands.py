"""`maskwork model init`: what is written and what is said."""

from pathlib import Path

import pytest
import safetensors.torch
from torch import nn
from typer.testing import CliRunner, Result

from maskwork.errors import UserError
from maskwork.participant.model_commands import app, parse_options
from maskwork.task import TaskError
from maskwork.tensors import model_digest, read_header


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(app, ["init", *arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception  # as the `maskwork` command would see it
    return result


def test_an_initial_model_from_its_seed(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    result = run("--task", "digits", "--seed", "1", "-o", str(path))
    assert result.exit_code == 0
    assert "9610 parameters in 4 tensors" in result.output
    assert model_digest(path).hex() in result.output
    assert read_header(path).metadata == {"format": "pt", "maskwork.seed": "1", "maskwork.task": "digits"}
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    model.load_state_dict(safetensors.torch.load_file(path))

    again, other = tmp_path / "again", tmp_path / "other"
    run("--task", "digits", "-o", str(again))
    run("--task", "digits", "--seed", "2", "-o", str(other))
    assert again.read_bytes() == path.read_bytes() != other.read_bytes()


def test_a_file_is_replaced_only_when_asked(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"precious")
    with pytest.raises(UserError, match="--force"):
        run("--task", "digits", "-o", str(path))
    assert path.read_bytes() == b"precious"
    assert run("--task", "digits", "-o", str(path), "--force").exit_code == 0


def test_a_task_of_ones_own_with_options(tmp_path: Path) -> None:
    result = run("--task", "site_tasks:Blobs", "--option", "examples=3", "-o", str(tmp_path / "m"))
    assert "131 parameters" in result.output
    with pytest.raises(TaskError, match="did you mean 'examples'"):
        run("--task", "site_tasks:Blobs", "--option", "example=3", "-o", str(tmp_path / "n"))
    assert not (tmp_path / "n").exists()


def test_options_are_json_or_text() -> None:
    given = ["a=1", "b=0.5", "c=true", "d=null", "e=/data/x=y", 'f="1"', "g="]
    assert parse_options(given) == {"a": 1, "b": 0.5, "c": True, "d": None, "e": "/data/x=y", "f": "1", "g": ""}


@pytest.mark.parametrize(
    ("pairs", "said"), [(["a"], "expected key=value"), (["=1"], "key=value"), (["a=1", "a=2"], "twice")]
)
def test_options_that_are_none(pairs: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_options(pairs)
