"""The model files: named by their digests, complete or not there, swept without losing what is needed."""

import errno
import hashlib
import os
from pathlib import Path

import pytest

from maskwork.coordinator.models import ModelDamaged, ModelStore, ModelTooLarge
from maskwork.errors import StoreError

BYTES = b"a model" * 1000
DIGEST = hashlib.sha256(BYTES).digest()


@pytest.fixture
def models(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "state" / "models")


def listing(models: ModelStore) -> list[str]:
    return sorted(os.listdir(models.directory))


def write(path: Path) -> None:
    path.write_bytes(BYTES)


def test_a_written_model_is_found_under_its_digest(models: ModelStore) -> None:
    assert models.put(write) == DIGEST
    assert models.path(DIGEST) == models.directory / f"{DIGEST.hex()}.safetensors"
    assert models.verify(DIGEST).read_bytes() == BYTES
    assert listing(models) == [f"{DIGEST.hex()}.safetensors"]


def test_a_file_is_copied_and_stays(models: ModelStore, tmp_path: Path) -> None:
    source = tmp_path / "m.safetensors"
    source.write_bytes(BYTES)
    assert models.put_file(source) == DIGEST
    assert source.read_bytes() == BYTES
    assert models.verify(DIGEST).read_bytes() == BYTES


def test_a_source_that_is_not_there_is_named(models: ModelStore, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="nowhere"):
        models.put_file(tmp_path / "nowhere")
    assert listing(models) == []


def test_chunks_are_put_together(models: ModelStore) -> None:
    chunks = (BYTES[at : at + 999] for at in range(0, len(BYTES), 999))
    assert models.import_stream(chunks, max_bytes=len(BYTES)) == DIGEST
    assert models.verify(DIGEST).read_bytes() == BYTES


def test_a_stream_over_its_bound_leaves_nothing(models: ModelStore) -> None:
    with pytest.raises(ModelTooLarge, match=str(len(BYTES) - 1)):
        models.import_stream([BYTES], max_bytes=len(BYTES) - 1)
    assert listing(models) == []


def test_a_stream_that_breaks_off_leaves_nothing(models: ModelStore) -> None:
    with models.incoming(max_bytes=100) as model:
        model.write(b"half")
        assert model.size == 4
    assert listing(models) == []


def test_an_incoming_model_is_committed_once(models: ModelStore) -> None:
    with models.incoming(max_bytes=len(BYTES)) as model:
        model.write(BYTES)
        assert model.commit() == DIGEST
        with pytest.raises(RuntimeError, match="once"):
            model.commit()
    assert listing(models) == [f"{DIGEST.hex()}.safetensors"]


def test_a_full_disk_leaves_nothing_and_says_so(models: ModelStore) -> None:
    def fills_the_disk(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with pytest.raises(StoreError, match=r"the disk is full.*Free some space") as caught:
        models.put(fills_the_disk)
    assert caught.value.file.startswith(str(models.directory))
    assert listing(models) == []


def test_a_writer_that_fails_leaves_nothing(models: ModelStore) -> None:
    def fails(path: Path) -> None:
        path.write_bytes(b"half")
        raise KeyError("a fault of the writer's own")

    with pytest.raises(KeyError):
        models.put(fails)
    assert listing(models) == []


@pytest.mark.parametrize("damage", [BYTES[:-1], BYTES + b"!", b"b" + BYTES[1:], b""])
def test_damage_is_found_and_the_file_named(models: ModelStore, damage: bytes) -> None:
    models.put(write)
    models.path(DIGEST).write_bytes(damage)
    with pytest.raises(ModelDamaged, match=f"{DIGEST.hex()}.*is damaged.*backup"):
        models.verify(DIGEST)


def test_putting_a_model_again_heals_it(models: ModelStore) -> None:
    models.put(write)
    models.path(DIGEST).write_bytes(b"damaged")
    models.put(write)
    models.verify(DIGEST)


def test_a_missing_model_is_named(models: ModelStore) -> None:
    with pytest.raises(ModelDamaged, match=f"{DIGEST.hex()}.*is missing"):
        models.path(DIGEST)
    with pytest.raises(ModelDamaged, match="is missing"):
        models.verify(DIGEST)


def test_a_digest_has_32_bytes(models: ModelStore) -> None:
    with pytest.raises(RuntimeError, match="32 bytes"):
        models.path(b"../../etc/passwd")


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match="file/models"):
        ModelStore(tmp_path / "file" / "models")


def test_a_sweep_deletes_what_an_earlier_process_left(models: ModelStore) -> None:
    models.put(write)
    unneeded = models.put(lambda path: path.write_bytes(b"unneeded"))
    (models.directory / ".incoming-left-by-a-killed-process").write_bytes(b"half")
    (models.directory / "README").write_bytes(b"the operator's own")
    restarted = ModelStore(models.directory)
    deleted = restarted.sweep({DIGEST})
    assert deleted == (".incoming-left-by-a-killed-process", f"{unneeded.hex()}.safetensors")
    assert listing(models) == sorted(["README", f"{DIGEST.hex()}.safetensors"])


def test_a_sweep_without_a_single_row_leaves_every_model(models: ModelStore) -> None:
    """A database that was lost, moved away or mistyped is a new and empty one: the models must outlast that."""
    models.put(write)
    (models.directory / ".incoming-left-by-a-killed-process").write_bytes(b"half")
    assert ModelStore(models.directory).sweep(()) == (".incoming-left-by-a-killed-process",)
    models.verify(DIGEST)


def test_a_sweep_leaves_models_from_before_the_first_that_a_row_refers_to(models: ModelStore) -> None:
    models.put(write)
    an_hour_ago = os.stat(models.path(DIGEST)).st_mtime - 3600
    os.utime(models.path(DIGEST), (an_hour_ago, an_hour_ago))
    first_of_another_database = models.put(lambda path: path.write_bytes(b"another"))
    assert ModelStore(models.directory).sweep({first_of_another_database}) == ()
    models.verify(DIGEST)


def test_a_sweep_spares_what_a_row_is_about_to_refer_to(models: ModelStore) -> None:
    models.put(write)
    with models.incoming(max_bytes=len(BYTES)) as model:
        model.write(BYTES[:10])
        assert models.sweep(()) == ()
        model.write(BYTES[10:])
        assert model.commit() == DIGEST
    models.verify(DIGEST)


def test_bytes_are_durable_before_the_name_and_the_name_before_put_returns(tmp_path: Path) -> None:
    """A real fsync cannot be seen from here; that it is asked for, of what and when, can."""
    name = f"{DIGEST.hex()}.safetensors"
    seen: list[tuple[bool, bool]] = []

    def record(path: Path) -> None:
        seen.append((path.is_dir(), (tmp_path / name).exists()))
        if path.is_file():
            assert path.read_bytes() == BYTES

    models = ModelStore(tmp_path, fsync=record)
    models.put(write)
    assert seen == [(False, False), (True, True)]
    seen.clear()
    models.path(DIGEST).unlink()
    models.import_stream([BYTES], max_bytes=len(BYTES))
    assert seen == [(False, False), (True, True)]
