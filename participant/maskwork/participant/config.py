"""A site's configuration file: TOML, every key checked, unknown keys refused with the nearest known one."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from maskwork.settings import Address, FilePath, Section, check_state_directory, read_toml

Option = str | int | float | bool | None | tuple[str, ...]


class TaskConfig(Section):
    """The code and the data behind one task name.

    Attributes:
        use: import path of the site's Task, "package.module:ClassName".
        options: passed to it by name.
        threads: torch threads for training; results depend on it.
    """

    use: str
    options: dict[str, Option] = Field(default_factory=dict)
    threads: int = Field(default=1, ge=1, le=1024)


class ParticipantConfig(Section):
    """What `maskwork participant run` reads.

    Attributes:
        coordinator: address that the agent dials, HOST:PORT.
        identity: directory with ca.pem, cert.pem and key.pem of this site; key.pem is its user's alone.
        state: directory for the site's durable records; losing it means losing the memory of what was released.
        policy: the site's policy file; absent: the strict default.
        seed: from it, the job, the round and the site's name the training seed is derived.
        tasks: by the name that jobs use.
        log_level: debug, info, warning or error.
    """

    coordinator: Address
    identity: FilePath
    state: FilePath
    policy: FilePath | None = None
    seed: int = Field(default=0, ge=0, lt=2**63)
    tasks: dict[str, TaskConfig]
    log_level: str = Field(default="info", pattern="^(debug|info|warning|error)$")


def read_config(path: Path) -> ParticipantConfig:
    """Read and check a configuration file; paths in it are relative to it.

    Raises:
        UserError: unreadable, no TOML, or invalid, or `state` is no directory; the text names the file and the key.
    """
    config = read_toml(path, ParticipantConfig, what="a configuration file")
    base = path.parent
    check_state_directory(base / config.state, file=path)
    return config.model_copy(
        update={
            "identity": base / config.identity,
            "state": base / config.state,
            "policy": None if config.policy is None else base / config.policy,
        }
    )
