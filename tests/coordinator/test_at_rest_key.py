"""The key's three sources, what is said of one that is no key, and the two commands."""

from __future__ import annotations

import base64
import hashlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tests.store.test_coordinator_store import new_job

from maskwork.coordinator.at_rest_key import Encryption, parse_key, read_keys, write_new_key
from maskwork.coordinator.config import read_config
from maskwork.coordinator.models import ModelStore
from maskwork.coordinator.sealed import MasterKey, key_ids
from maskwork.coordinator.store import Store
from maskwork.errors import UserError
from maskwork.net.authority import Authority
from maskwork.net.identity import Role

RAW = hashlib.sha256(b"key").digest()
MASKWORK = Path(sys.executable).parent / "maskwork"
GOOD = 'identity = "id"\nstate = "state"\n'
NOW = 1_800_000_000.0


def key_file(folder: Path, text: str = RAW.hex(), name: str = "key") -> Path:
    path = folder / name
    path.write_text(text)
    path.chmod(0o600)
    return path


def written(folder: Path, text: str) -> Path:
    path = folder / "coordinator.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    "text",
    [
        RAW.hex(),
        RAW.hex().upper() + "\n",
        base64.b64encode(RAW).decode(),
        base64.urlsafe_b64encode(RAW).decode() + "\r\n",
    ],
)
def test_a_key_is_read_from_hex_and_base64(text: str) -> None:
    assert parse_key(text, source="here") == MasterKey(RAW)


@pytest.mark.parametrize(
    "text",
    [
        "",
        RAW.hex()[:-1],
        RAW.hex() + "0",
        base64.b64encode(RAW[:31]).decode(),
        base64.b64encode(RAW)[:-1].decode(),
        "é" * 44,
    ],
)
def test_what_is_no_key_is_told_without_a_word_of_it(text: str) -> None:
    with pytest.raises(UserError, match=r"^here does not hold a key: expected 32 bytes .*encryption-key new") as caught:
        parse_key(text, source="here")
    assert not text or text[:8] not in str(caught.value)
    assert caught.value.__suppress_context__


def test_each_source_gives_the_key(tmp_path: Path) -> None:
    environment = {"THE_KEY": RAW.hex()}
    sources = (
        Encryption(key_file=key_file(tmp_path)),
        Encryption(key_env="THE_KEY"),
        Encryption(key_command=("printf", "%s\n", RAW.hex())),
    )
    for source in sources:
        assert read_keys(source, environment=environment).current == MasterKey(RAW)
    assert environment == {}  # so that a worker does not inherit it


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ({"key_env": "NO_SUCH"}, "key_env: there is no environment variable NO_SUCH"),
        ({"key_command": ("false",)}, "key_command: false ended with exit code 1"),
        ({"key_command": ("no-such-program",)}, "key_command: no-such-program cannot be run: No such file"),
        ({"key_command": ("echo", "hunter2")}, "key_command: what echo printed does not hold a key"),
        ({"key_file": Path("no-such-file")}, "no-such-file: the key .* cannot be read"),
    ],
)
def test_a_source_that_gives_no_key_is_told(source: dict[str, object], says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        read_keys(Encryption.model_validate(source))
    assert "hunter2" not in str(caught.value)


def test_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = key_file(tmp_path)
    for mode in (0o640, 0o604, 0o620):
        path.chmod(mode)
        with pytest.raises(UserError, match=f"others can .*chmod 600 {path}"):
            read_keys(Encryption(key_file=path))


def test_the_old_key_is_another_one(tmp_path: Path) -> None:
    path = key_file(tmp_path)
    with pytest.raises(UserError, match="are the same"):
        read_keys(Encryption(key_file=path, old_key_file=path))
    other = key_file(tmp_path, hashlib.sha256(b"old").hexdigest(), "old")
    keys = read_keys(Encryption(key_file=path, old_key_file=other))
    assert keys.old is not None
    assert keys.old.id != keys.current.id


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ("", "give exactly one of key_file, key_env and key_command"),
        ('key_file = "k"\nkey_env = "K"\n', "exactly one"),
        ('old_key_file = "k"\n', "exactly one"),
        ("accept_plain = true\n", "exactly one"),
        ('key_file = "k"\nold_key_env = "K"\nold_key_file = "o"\n', "at most one of old_key_file"),
        ("key_command = []\n", "encryption.key_command"),
        ('key_fil = "k"\n', "encryption.key_fil: no such key; did you mean key_file"),
    ],
)
def test_a_table_that_is_not_clear_is_refused(tmp_path: Path, table: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        read_config(written(tmp_path, GOOD + "[encryption]\n" + table))


def test_the_keys_files_are_relative_to_the_configuration(tmp_path: Path) -> None:
    assert not read_config(written(tmp_path, GOOD)).encryption.wanted
    config = read_config(written(tmp_path, GOOD + '[encryption]\nkey_file = "k"\nold_key_file = "/etc/old"\n'))
    assert (config.encryption.key_file, config.encryption.old_key_file) == (tmp_path / "k", Path("/etc/old"))


def test_a_new_key_is_its_owners_alone_and_never_replaces_another(tmp_path: Path) -> None:
    made = write_new_key(tmp_path / "key")
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    assert parse_key((tmp_path / "key").read_text(), source="").id.hex() == made.id
    assert made.text not in repr(made)
    with pytest.raises(UserError, match="is there already"):
        write_new_key(tmp_path / "key")
    with pytest.raises(UserError, match="cannot be written"):
        write_new_key(tmp_path / "no" / "key")
    assert write_new_key(None).text != made.text


def run(*arguments: str | Path, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [MASKWORK, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, **(environment or {})},
    )


def test_the_commands_make_a_key_encrypt_what_is_there_and_rotate_to_another_key(tmp_path: Path) -> None:
    authority = Authority.create("ward", now=NOW)
    authority.issue(Role.COORDINATOR, "main", now=NOW, dns_names=["localhost"]).write(tmp_path / "id")
    models, database = ModelStore(tmp_path / "state" / "models"), f"sqlite:///{tmp_path}/state/coordinator.sqlite"
    digest = models.import_stream([b"a model"], max_bytes=7)
    ids = {}
    for name in ("one", "two"):
        made = run("coordinator", "encryption-key", "new", "--output", tmp_path / name)
        assert (made.returncode, made.stdout) == (0, "")
        assert (tmp_path / name).read_text().strip() not in made.stderr
        ids[name] = parse_key((tmp_path / name).read_text(), source="").id
    assert len(base64.b64decode(run("coordinator", "encryption-key", "new").stdout)) == 32

    def rotate(table: str) -> subprocess.CompletedProcess[str]:
        return run("coordinator", "rotate-key", "--config", written(tmp_path, GOOD + table))

    assert "no encryption is configured" in rotate("").stderr
    with Store.open(database) as store:
        store.add_job(replace(new_job(), initial_model=digest, current_model=digest))
        in_use = rotate('[encryption]\nkey_file = "one"\n')
        assert (in_use.returncode, "is in use by another coordinator" in in_use.stderr) == (1, True)
        assert models.path(digest).read_bytes() == b"a model"
    done = rotate('[encryption]\nkey_file = "one"\n')
    assert done.returncode == 0, done.stderr
    assert f"opens with the key {ids['one'].hex()} alone" in done.stdout
    assert key_ids(models.path(digest)) == (ids["one"],)
    without = rotate('[encryption]\nkey_file = "two"\n')
    assert (without.returncode, f"encrypted with the key {ids['one'].hex()}" in without.stderr) == (1, True)
    done = rotate('[encryption]\nkey_file = "two"\nold_key_file = "one"\n')
    assert done.returncode == 0, done.stderr
    assert key_ids(models.path(digest)) == (ids["two"],)
    for word in ((tmp_path / name).read_text().strip() for name in ids):
        assert not any(word in said for result in (in_use, without, done) for said in (result.stdout, result.stderr))
