"""The coordinator's configuration file: what is accepted, and how a mistake is told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from maskwork.coordinator.config import read_config
from maskwork.errors import UserError
from maskwork.participant.config import read_config as read_participant

GOOD = 'identity = "id"\nstate = "/var/lib/maskwork"\n'


def written(folder: Path, text: str) -> Path:
    path = folder / "coordinator.toml"
    path.write_text(text)
    return path


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    config = read_config(written(tmp_path, GOOD))
    assert (config.identity, config.state) == (tmp_path / "id", Path("/var/lib/maskwork"))
    assert config.listen == "0.0.0.0:8750"
    assert config.database_url == "sqlite:////var/lib/maskwork/coordinator.sqlite"
    config = read_config(written(tmp_path, GOOD + 'database = "postgresql://db/x"\n'))
    assert config.database_url == "postgresql://db/x"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (GOOD + 'lsten = "0.0.0.0:1"\n', "lsten: no such key; did you mean listen"),
        (GOOD + "max_upload = 3\n", "did you mean max_uploads"),
        (GOOD + "zzz = 3\n", "zzz: no such key$"),
        (GOOD + 'listen = "8750"\n', "listen: "),
        (GOOD + "max_uploads = 0\n", "max_uploads: .*greater than or equal to 1"),
        (GOOD + 'log_level = "loud"\n', "log_level: "),
        ('identity = "id"\n', "state: Field required"),
        ("identity = \n", "cannot be read as a configuration file"),
    ],
)
def test_a_mistake_is_told_with_the_file_the_key_and_the_nearest_known_one(
    tmp_path: Path, text: str, says: str
) -> None:
    path = written(tmp_path, text)
    with pytest.raises(UserError, match=says) as caught:
        read_config(path)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize("address", ["127.0.0.1:99999", "https://localhost:8750", "8750", ":8750", "host:", "host:٣"])
def test_an_address_that_is_none_is_refused(address: str, tmp_path: Path) -> None:
    path = tmp_path / "coordinator.toml"
    path.write_text(f'listen = "{address}"\nidentity = "i"\nstate = "s"\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"listen: '.*' is not an address: expected HOST:PORT"):
        read_config(path)


def test_a_file_that_is_not_there_or_not_text_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        read_config(tmp_path / "missing.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="cannot be read"):
        read_config(tmp_path / "binary.toml")


@pytest.mark.parametrize("state", ["taken", "taken/below"])
@pytest.mark.parametrize("read", [read_config, read_participant], ids=["coordinator", "participant"])
def test_a_state_directory_that_is_a_file_is_told_by_its_key(
    read: Callable[[Path], object], state: str, tmp_path: Path
) -> None:
    taken = tmp_path / "taken"
    taken.write_text("something else")
    text = f'identity = "id"\nstate = "{state}"\n'
    if read is read_participant:
        text = 'coordinator = "hub:1"\n' + text + '[tasks.digits]\nuse = "m:T"\n'
    path = written(tmp_path, text)
    with pytest.raises(UserError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: state: {taken} is a file, not a directory.")
    taken.unlink()
    read(path)  # an agent or a coordinator makes it when it starts
