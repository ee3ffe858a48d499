"""The coordinator's configuration file: TOML, every key checked, unknown keys refused with the nearest known one."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from maskwork.coordinator.at_rest_key import Encryption
from maskwork.settings import Address, FilePath, Section, read_toml


class CoordinatorConfig(Section):
    """What `maskwork coordinator run` reads.

    Attributes:
        listen: address and port for participants, operators and researchers.
        identity: directory with ca.pem, cert.pem and key.pem of this coordinator.
        state: directory for the database, models and spooled uploads.
        revocation_list: the revocation list's file, looked at every second; absent: revoked.crl in the identity
            directory, if there is one.
        database: database URL; empty: SQLite in the state directory.
        max_uploads: uploads admitted at a time.
        max_downloads: downloads of models and certificates at a time.
        max_model_bytes: largest model that may be submitted.
        max_unfinished_jobs: jobs of one submitter that may be queued or running.
        max_connections: open connections, whoever they are from; further ones are closed as they come. Each takes a
            file descriptor, and the limit on those should be 500 above it.
        stall_s: longest wait for the next piece of an upload or submission, and for a caller to read what it asked for.
        log_level: debug, info, warning or error.
        encryption: encryption at rest.
    """

    listen: Address = "0.0.0.0:8750"
    identity: FilePath
    state: FilePath
    revocation_list: FilePath | None = None
    database: str = ""
    max_uploads: int = Field(default=8, ge=1, le=1024)
    max_downloads: int = Field(default=16, ge=1, le=1024)
    max_model_bytes: int = Field(default=16 << 30, ge=1)
    max_unfinished_jobs: int = Field(default=100, ge=1, le=100_000)
    max_connections: int = Field(default=2000, ge=16, le=1_000_000)
    stall_s: float = Field(default=60.0, gt=0, le=3600)
    log_level: str = Field(default="info", pattern="^(debug|info|warning|error)$")
    encryption: Encryption = Encryption()

    @model_validator(mode="after")
    def _a_table_says_something(self) -> Self:
        if "encryption" in self.model_fields_set and not self.encryption.wanted:
            raise ValueError("encryption: give exactly one of key_file, key_env and key_command")
        return self

    @property
    def database_url(self) -> str:
        """Where the tables are."""
        return self.database or f"sqlite:///{self.state / 'coordinator.sqlite'}"


def read_config(path: Path) -> CoordinatorConfig:
    """Read and check a configuration file; paths in it are relative to it.

    Raises:
        UserError: unreadable, no TOML, or invalid; the text names the file and the key.
    """
    config = read_toml(path, CoordinatorConfig, what="a configuration file")
    base = path.parent
    paths: dict[str, object] = {
        "identity": base / config.identity,
        "state": base / config.state,
        "encryption": config.encryption.relative_to(base),
    }
    if config.revocation_list is not None:
        paths["revocation_list"] = base / config.revocation_list
    return config.model_copy(update=paths)
