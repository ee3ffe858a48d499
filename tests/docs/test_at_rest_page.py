"""docs/at-rest.md is carried out, from its first line to its last: what it writes into files and what it types."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tests.docs.test_pages import ROOT, blocks_of, words_of
from tests.jobs.fake_job_service import Federation
from tests.store.test_coordinator_store import new_job

from maskwork.coordinator.at_rest import open_vault
from maskwork.coordinator.config import read_config
from maskwork.coordinator.models import ModelStore
from maskwork.coordinator.sealed import is_sealed
from maskwork.coordinator.store import Store
from maskwork.errors import UserError
from maskwork.model_commands import write_signature
from maskwork.net.identity import Role

MASKWORK = Path(sys.executable).parent / "maskwork"
PAGE = ROOT / "docs" / "at-rest.md"
MODEL = b"a model of before encryption was turned on"


def steps() -> Iterator[tuple[str, str]]:
    """(`toml`, a file) and (`sh`, a line), in the order of the page."""
    for block in blocks_of(PAGE):
        if block.language == "toml":
            yield "toml", block.text
        else:
            yield from (("sh", line) for line in block.text.splitlines())


def test_what_the_page_says_to_do_does_it(tmp_path: Path) -> None:
    federation = Federation(tmp_path / "pki")
    federation.authority.issue(Role.COORDINATOR, "main", now=time.time() - 60, dns_names=["localhost"]).write(
        tmp_path / "identity"
    )
    models = ModelStore(tmp_path / "state" / "models")
    digest = models.import_stream([MODEL], max_bytes=len(MODEL))
    with Store.open(f"sqlite:///{tmp_path}/state/coordinator.sqlite") as store:
        store.add_job(replace(new_job(), initial_model=digest, current_model=digest))
    (tmp_path / "ca.pem").write_bytes(federation.researcher.ca.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(MODEL)
    write_signature(tmp_path / "model.safetensors", federation.signed(MODEL, job_id="job", round_number=3))

    opened = 0
    for kind, text in steps():
        if kind == "toml":
            (tmp_path / "coordinator.toml").write_text(text)
            continue
        words = words_of(text)
        assert words[0] == "maskwork"
        done = subprocess.run(
            [MASKWORK, *words[1:]], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120
        )
        if "--audit" in words:
            assert done.returncode == 1  # there is no such log here: what cannot be read never agrees
            continue
        assert done.returncode == 0, done.stderr
        if "rotate-key" in words:
            config = read_config(tmp_path / "coordinator.toml")
            vault = open_vault(config.encryption, federation="ward", state=config.state)
            sealed = ModelStore(tmp_path / "state" / "models", vault=vault)
            assert is_sealed(sealed.path(digest))
            assert sealed.file(digest).read_bytes() == MODEL
            opened += 1
    assert opened == 2
    first = read_config(tmp_path / "coordinator.toml").encryption.model_copy(
        update={"key_file": tmp_path / "at-rest.key", "old_key_file": None}
    )
    with pytest.raises(UserError, match="is encrypted with the key"):
        open_vault(first, federation="ward", state=tmp_path / "state")
