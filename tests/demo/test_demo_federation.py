"""The demo's folder holds what a deployment's people would have written, and nothing is overwritten."""

import time
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskwork.coordinator.config import read_config as read_coordinator_config
from maskwork.errors import UserError
from maskwork.job import read_job_file
from maskwork.net.diagnosis import check_own_files
from maskwork.net.identity import IdentityFiles, Role, TrustRoots
from maskwork.participant.config import read_config as read_participant_config
from maskwork.participant.demo.federation import (
    DemoOptions,
    RunFolder,
    create_folder,
    write_federation,
)
from maskwork.participant.local.files import free_port, toml
from maskwork.secagg.graph import complete_threshold
from maskwork.task import load_task

OPTIONS = DemoOptions(rounds=7, participants=4, seed=3, alpha=0.25)
PORT = 50_123


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    made = create_folder(tmp_path_factory.mktemp("demo") / "run", now=0.0)
    write_federation(made, OPTIONS, PORT, now=time.time())
    return made


def test_the_job_file_says_what_the_options_say(folder: RunFolder) -> None:
    job = read_job_file(folder.job)
    assert job.spec() == OPTIONS.job()
    assert job.model == (folder.models / "initial.safetensors").resolve()
    assert job.rounds == 7
    assert job.cohort.participants == ("site-a", "site-b", "site-c", "site-d")


def test_one_lost_site_does_not_stop_a_round() -> None:
    for participants in range(4, 27):
        options = DemoOptions(participants=participants)
        assert participants - 1 >= complete_threshold(participants)
        assert options.job().cohort.min_participants == participants - 1


def test_every_site_has_a_shard_of_its_own(folder: RunFolder) -> None:
    shards = []
    for site in OPTIONS.sites:
        config = read_participant_config(folder.config(site))
        assert config.coordinator == f"127.0.0.1:{PORT}"
        assert config.seed == 3
        task = config.tasks["digits"]
        load_task(task.use, task.options)
        assert (task.options["of"], task.options["alpha"], task.options["seed"]) == (4, 0.25, 3)
        shards.append(task.options["shard"])
    assert shards == [0, 1, 2, 3]


def test_the_coordinator_listens_on_loopback_alone(folder: RunFolder) -> None:
    config = read_coordinator_config(folder.config("coordinator"))
    assert config.listen == f"127.0.0.1:{PORT}"
    assert config.state == folder.member("coordinator") / "state"


def test_everybody_has_a_certificate_of_their_role(folder: RunFolder) -> None:
    members = dict.fromkeys(OPTIONS.sites, Role.PARTICIPANT)
    for name, role in {**members, "coordinator": Role.COORDINATOR, "researcher": Role.RESEARCHER}.items():
        files = IdentityFiles.in_directory(folder.member(name) / "identity")
        roots = TrustRoots.from_file(folder.root / "ca" / "ca.pem")
        assert check_own_files(files, now=time.time(), role=role, roots=roots).name == name


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("all of it")
    with pytest.raises(UserError, match=r"holds something already.*--out"):
        create_folder(tmp_path, now=0.0)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be made .*--out"):
        create_folder(tmp_path / "file" / "run", now=0.0)


def test_the_folder_is_named_after_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = create_folder(None, now=time.mktime((2026, 7, 25, 10, 15, 0, 0, 0, -1)))
    assert made.root == Path("runs") / "demo-20260725-101500"
    assert made.logs.is_dir()


def test_a_free_port() -> None:
    assert 0 < free_port() < 65_536


@given(
    st.dictionaries(
        st.from_regex(r"[a-z_]{1,10}", fullmatch=True),
        st.booleans()
        | st.integers(-(2**63), 2**63 - 1)
        | st.floats(-1e15, 1e15)
        | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x7f"))
        | st.lists(st.text("ab\"\\'")),
    )
)
def test_a_toml_table_reads_back(values: dict[str, object]) -> None:
    assert tomllib.loads(toml(values)) == values
    assert tomllib.loads(toml(values, "a.table")) == {"a": {"table": values}}
