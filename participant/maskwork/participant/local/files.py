"""Configuration and job files as people write them, and a port to listen on.

It is NOT where anything is started or read.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from typing import Final

from maskwork.job import JobSpec

HOST: Final = "127.0.0.1"


def free_port() -> int:
    """A port of this machine that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def job_text(spec: JobSpec, model: str) -> str:
    """A job file that says what `spec` says, without what is left at its default."""
    said = spec.model_dump(mode="json", exclude_defaults=True)
    tables = {key: value for key, value in said.items() if isinstance(value, dict)}
    top = {key: value for key, value in said.items() if key not in tables}
    return toml({**top, "model": model}) + "".join(toml(table, name) for name, table in tables.items())


def toml(values: Mapping[str, object], table: str = "") -> str:
    """A flat TOML table: JSON's strings, numbers, booleans and lists are TOML's."""
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]
    return "\n".join([*([f"\n[{table}]"] if table else []), *lines]) + "\n"
