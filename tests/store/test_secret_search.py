"""The search that a whole run's files are put through finds what it looks for, in every spelling and at every place."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from tests.secret_search import search, spellings

SECRET = hashlib.sha256(b"a secret").digest()


@pytest.mark.parametrize("at", range(8))
def test_every_spelling_is_found_wherever_it_stands(tmp_path: Path, at: int) -> None:
    file, noise = tmp_path / "f", hashlib.shake_256(b"noise").digest(4096)
    for name, spelled in spellings(SECRET):
        file.write_bytes(noise[: 100 + at] + spelled + noise)
        assert name in {found.spelling for found in search({"it": SECRET}, [file])}, name


@pytest.mark.parametrize("before", range(4))
def test_it_is_found_in_the_middle_of_something_in_base64(tmp_path: Path, before: int) -> None:
    import base64

    (tmp_path / "f").write_bytes(base64.b64encode(bytes(range(before)) + SECRET + b"more"))
    assert search({"it": SECRET}, [tmp_path / "f"])


@pytest.mark.parametrize("cut", [slice(0, 12), slice(0, 20), slice(20, 32), slice(10, 32)])
def test_half_a_secret_is_found(tmp_path: Path, cut: slice) -> None:
    (tmp_path / "f").write_bytes(b"-" + SECRET[cut] + b"-")
    assert search({"it": SECRET}, [tmp_path / "f"])


def test_what_is_not_there_is_not_found(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(hashlib.shake_256(b"noise").digest(1 << 20))
    (tmp_path / "empty").write_bytes(b"")
    assert search({"it": SECRET}, [tmp_path / "f", tmp_path / "empty"]) == []
