"""The coordinator's configuration file: TOML, every key checked, unknown keys refused with the nearest known one."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from maskwork.coordinator.at_rest_key import Encryption
from maskwork.net.authority import LEAF_DAYS
from maskwork.settings import Address, FilePath, Section, check_state_directory, read_toml


class CoordinatorConfig(Section):
    """What `maskwork coordinator run` reads.

    Attributes:
        listen: address and port for participants, operators and researchers.
        identity: directory with ca.pem, cert.pem and key.pem of this coordinator; key.pem is its user's alone.
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
        enrolment_listen: address and port on which members enrol by a token, without a certificate; absent: none do.
        enrolment_ca: directory of the CA (ca.pem and ca-key.pem), so that this coordinator enrols and renews by itself;
            absent: certificates are signed by whoever holds the CA's key, elsewhere. See docs/enrolment.md.
        enrolment_days: validity of the certificates that this coordinator signs.
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
    enrolment_listen: Address | None = None
    enrolment_ca: FilePath | None = None
    enrolment_days: int = Field(default=LEAF_DAYS, ge=1, le=36500)
    encryption: Encryption = Encryption()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if "encryption" in self.model_fields_set and not self.encryption.wanted:
            raise ValueError("encryption: give exactly one of key_file, key_env and key_command")
        if self.enrolment_listen is not None and self.enrolment_ca is None:
            raise ValueError("enrolment_listen: to enrol members, this coordinator needs enrolment_ca, the CA's key")
        return self

    @property
    def database_url(self) -> str:
        """Where the tables are."""
        return self.database or f"sqlite:///{self.state / 'coordinator.sqlite'}"


def read_config(path: Path) -> CoordinatorConfig:
    """Read and check a configuration file; paths in it are relative to it.

    Raises:
        UserError: unreadable, no TOML, or invalid, or `state` is no directory; the text names the file and the key.
    """
    config = read_toml(path, CoordinatorConfig, what="a configuration file")
    base = path.parent
    check_state_directory(base / config.state, file=path)
    paths: dict[str, object] = {
        "identity": base / config.identity,
        "state": base / config.state,
        "encryption": config.encryption.relative_to(base),
    }
    for key in ("revocation_list", "enrolment_ca"):
        if (path_given := getattr(config, key)) is not None:
            paths[key] = base / path_given
    return config.model_copy(update=paths)
