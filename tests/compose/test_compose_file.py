"""What docker-compose.yml and the Dockerfile promise, read from them: needs no container engine.

That containers really are so is the matter of `test_compose_cluster.py`; this one also runs where that is skipped.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from maskwork.coordinator.config import read_config
from maskwork.job import read_job_file
from maskwork.participant.config import ParticipantConfig

ROOT: Final = Path(__file__).resolve().parents[2]
COMPOSE: Final[dict[str, Any]] = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
SERVICES: Final[dict[str, dict[str, Any]]] = COMPOSE["services"]
DOCKERFILE: Final = (ROOT / "Dockerfile").read_text(encoding="utf-8")
SCRIPTS: Final = ("make-identities", "researcher", "take-a-site")
LOCK: Final = dict(
    line.lower().split("==")
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if not line.startswith("#")
)


@dataclass(slots=True)
class Stage:
    """One stage of the Dockerfile: what it begins from, and its instructions with their continuation lines."""

    parent: str
    instructions: list[str] = field(default_factory=list)

    @property
    def copied_from(self) -> list[str]:
        return re.findall(r"COPY --from=(\S+)", "\n".join(self.instructions))


def stages() -> dict[str, Stage]:
    found: dict[str, Stage] = {}
    text = "\n".join(line for line in DOCKERFILE.splitlines() if not line.startswith("#"))
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        if begun := re.fullmatch(r"FROM (\S+) AS (\S+)", line):
            stage = found[begun[2]] = Stage(begun[1])
        elif found and line:
            stage.instructions.append(line)
    return found


def behind(target: str) -> set[str]:
    """The stages that `target` holds something of."""
    stage = stages()[target]
    return {target}.union(*(behind(name) for name in (stage.parent, *stage.copied_from) if name in stages()))


def requirements(stage: str) -> list[str]:
    """The names of what the Dockerfile's stage installs from others, besides what it names itself."""
    (folders,) = re.findall(r"python requirements\.py ([^>]*)>", "\n".join(stages()[stage].instructions))
    command = [sys.executable, str(ROOT / "docker" / "requirements.py"), *folders.split()]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [re.split(r"[\[<>=]", line)[0].lower() for line in printed.splitlines()]


# --- docker-compose.yml -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_has_no_rights_that_it_does_not_need(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"cap_add", "privileged", "user", "pid", "ipc", "devices", "ports", "expose"} & service.keys()
    assert service.get("network_mode") == "none" or service["networks"] == ["federation"]


def test_the_network_has_no_way_out() -> None:
    assert COMPOSE["networks"] == {"federation": {"internal": True}}


def test_a_key_is_mounted_for_its_owner_alone() -> None:
    def mounts(volume: str) -> dict[str, str]:
        found = [(name, m) for name, s in SERVICES.items() for m in s["volumes"] if m.partition(":")[0] == volume]
        return {name: "ro" if mount.endswith(":ro") else "rw" for name, mount in found}

    assert mounts("ca") == {"identities": "rw"}
    assert mounts("site-identities") == {"identities": "rw", "participant": "ro"}
    assert mounts("coordinator-identity") == {"identities": "rw", "coordinator": "ro"}
    assert mounts("researcher-identity") == {"identities": "rw", "researcher": "ro"}
    assert mounts("coordinator-state") == {"coordinator": "rw"}
    assert mounts("site-state") == {"participant": "rw"}


def test_what_must_last_is_on_a_named_volume() -> None:
    named = set(COMPOSE["volumes"])
    for name, service in SERVICES.items():
        for mount in service["volumes"]:
            assert mount.partition(":")[0] in named or mount.endswith("job.toml:ro"), f"{name}: {mount}"


def test_services_come_back_and_one_shots_do_not() -> None:
    assert {name: service["restart"] for name, service in SERVICES.items()} == {
        "identities": "no",
        "coordinator": "unless-stopped",
        "participant": "unless-stopped",
        "researcher": "no",
    }
    assert {name for name, service in SERVICES.items() if "healthcheck" in service} == {"coordinator", "participant"}
    for name in ("coordinator", "participant"):
        assert SERVICES[name]["depends_on"] == {"identities": {"condition": "service_completed_successfully"}}
        assert SERVICES[name]["healthcheck"]["test"][:4] == ["CMD", "maskwork", name, "health"]
        assert SERVICES[name]["stop_grace_period"] == "20s"


# --- the Dockerfile ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["coordinator", "participant"])
def test_an_image_runs_as_a_user_without_rights(target: str) -> None:
    stage = stages()[target]
    users = [line for line in (*stages()[stage.parent].instructions, *stage.instructions) if line.startswith("USER")]
    assert users == ["USER 10001:10001"]


@pytest.mark.parametrize("target", ["coordinator", "participant"])
def test_an_image_is_not_made_of_what_built_it(target: str) -> None:
    stage = stages()[target]
    assert stage.parent == "runtime"
    assert stages()["runtime"].parent == "${PYTHON_IMAGE}"
    for line in (*stages()["runtime"].instructions, *stage.instructions):
        assert not re.search(r"\bpip\b|\bapt\b|apt-get", line), line


def test_the_coordinators_image_holds_no_torch() -> None:
    held = behind("coordinator")
    assert held == {"coordinator", "coordinator-code", "coordinator-packages", "runtime", "tools", "wheels"}
    for name in held:
        assert "torch" not in "\n".join(stages()[name].instructions), name
    (installed,) = (line for line in stages()["coordinator-code"].instructions if "pip" in line)
    assert "maskwork_participant" not in installed
    assert not {"torch", "scikit-learn"} & set(requirements("coordinator-packages"))
    assert {"torch", "scikit-learn"} <= set(requirements("participant-packages"))


def test_every_version_in_an_image_is_the_locks() -> None:
    installs = re.findall(r"pip (?:--python \S+ )?install [^&\n]*", re.sub(r"\\\n\s*", " ", DOCKERFILE))
    assert len(installs) == 6
    for install in installs:
        assert "-c constraints.txt" in install or "--no-index" in install, install
    for stage in ("coordinator-packages", "participant-packages"):
        assert set(requirements(stage)) <= LOCK.keys()
    assert LOCK["torch"] == "2.13.0"


def test_what_an_image_is_built_from_is_let_through_and_nothing_else() -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [line for line in ignored if line and not line.startswith("#")]
    assert rules[0] == "*"
    allowed = {line.removeprefix("!") for line in rules if line.startswith("!")}
    copied = {
        word.partition("/")[0]
        for line in DOCKERFILE.splitlines()
        if line.startswith("COPY") and "--from" not in line
        for word in line.split()[1:-1]
        if not word.startswith("--")
    }
    assert copied == allowed


# --- what is in the images --------------------------------------------------------------------------------------------


def test_the_files_of_the_trial_are_ones_that_their_readers_accept() -> None:
    assert read_config(ROOT / "docker" / "coordinator.toml").listen == "0.0.0.0:8750"
    assert read_job_file(ROOT / "docker" / "job.toml").task == "digits"
    script = (ROOT / "docker" / "take-a-site").read_text(encoding="utf-8")
    written = script.partition("<<TOML\n")[2].partition("\nTOML\n")[0]
    for expression, value in (("$((site - 1))", "2"), ("$sites", "10"), ("$site", "3")):
        assert expression in written
        written = written.replace(expression, value)
    site = ParticipantConfig.model_validate(tomllib.loads(written))
    assert (site.identity, site.state) == (Path("/identities/sites/site-3"), Path("/state/site-3"))
    assert site.tasks["digits"].options == {"shard": 2, "of": 10, "alpha": 0.5}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_one_that_a_plain_shell_reads(script: str) -> None:
    path = ROOT / "docker" / script
    assert path.read_text(encoding="utf-8").startswith("#!/bin/sh\n")
    subprocess.run(["sh", "-n", path], check=True)
