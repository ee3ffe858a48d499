"""What each of the three wheels holds: its own part of the namespace, and nothing that hides another's."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DISTRIBUTIONS = {"common": "maskwork", "coordinator": "maskwork-coordinator", "participant": "maskwork-participant"}
IGNORED = shutil.ignore_patterns("__pycache__", "*.pyc", ".git", ".mypy_cache", ".ruff_cache")

pytestmark = pytest.mark.xdist_group("wheels")


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Each distribution's wheel by its name, built from a copy, the three at the same time."""
    home = tmp_path_factory.mktemp("wheels")
    building = {}
    for folder, name in DISTRIBUTIONS.items():
        shutil.copytree(ROOT / folder, home / folder, ignore=IGNORED)
        command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir"]
        building[name] = subprocess.Popen(
            [*command, home / "dist", home / folder], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    for name, process in building.items():
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0, f"{name}: {output}"
    return {name: next((home / "dist").glob(f"{name.replace('-', '_')}-0*.whl")) for name in DISTRIBUTIONS.values()}


def files(wheel: Path) -> list[str]:
    """The names in a wheel without its metadata."""
    with zipfile.ZipFile(wheel) as archive:
        return [name for name in archive.namelist() if ".dist-info/" not in name]


def test_every_wheel_has_the_namespace_as_its_only_top_level_package(wheels: Mapping[str, Path]) -> None:
    for name, wheel in wheels.items():
        assert {path.partition("/")[0] for path in files(wheel)} == {"maskwork"}, name
        assert not [p for p in files(wheel) if {"tests", "common", "__pycache__"} & set(p.split("/"))], name


def test_no_wheel_claims_the_namespace_itself(wheels: Mapping[str, Path]) -> None:
    for name, wheel in wheels.items():
        assert "maskwork/__init__.py" not in files(wheel), name


def test_each_wheel_holds_its_own_part_alone(wheels: Mapping[str, Path]) -> None:
    common = {path.split("/")[1] for path in files(wheels["maskwork"])}
    assert not common & {"coordinator", "participant"}
    assert {"secagg", "wire", "net", "cli.py", "task.py", "tensors.py", "worker.py"} <= common
    for name in ("coordinator", "participant"):
        held = files(wheels[f"maskwork-{name}"])
        assert all(path.startswith(f"maskwork/{name}/") for path in held), held
        assert f"maskwork/{name}/__init__.py" in held


def test_the_wheels_hold_every_source_file_and_the_migrations(wheels: Mapping[str, Path]) -> None:
    for folder, name in DISTRIBUTIONS.items():
        sources = {
            path.relative_to(ROOT / folder).as_posix()
            for path in (ROOT / folder / "maskwork").rglob("*.py*")
            if "__pycache__" not in path.parts
        }
        assert set(files(wheels[name])) >= sources, name
    for name in ("coordinator", "participant"):
        held = files(wheels[f"maskwork-{name}"])
        assert f"maskwork/{name}/migrations/env.py" in held
        assert [path for path in held if path.startswith(f"maskwork/{name}/migrations/versions/")]


def test_the_wheels_need_each_other_as_they_should(wheels: Mapping[str, Path]) -> None:
    def needs(name: str) -> set[str]:
        with zipfile.ZipFile(wheels[name]) as archive:
            metadata = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
            lines = archive.read(metadata).decode().splitlines()
        required = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
        return {need.split(";")[0].strip() for need in required}

    def packages(name: str) -> set[str]:
        return {need.partition("[")[0].partition(">")[0].partition("=")[0] for need in needs(name)}

    assert not packages("maskwork") & {"torch", "maskwork-coordinator", "maskwork-participant"}
    assert not packages("maskwork-coordinator") & {"torch", "maskwork-participant"}
    assert "maskwork[database]==0.1.0" in needs("maskwork-coordinator") & needs("maskwork-participant")
    assert "torch==2.13.0" in needs("maskwork-participant")
    assert "maskwork-coordinator" not in packages("maskwork-participant")


IMPORT_EVERYTHING = """
import importlib, pkgutil, sys
target, libraries, wanted = sys.argv[1:]
sys.path[:0] = [target, libraries]
import maskwork.net
import maskwork
assert list(maskwork.__path__) == [target + "/maskwork"], maskwork.__path__
for module in pkgutil.walk_packages(maskwork.__path__, "maskwork."):
    if ".versions." not in module.name and not module.name.endswith(".env"):  # these run within Alembic
        importlib.import_module(module.name)
found = {name.split(".")[1] for name in sys.modules if name.startswith("maskwork.")}
assert found & {"coordinator", "participant"} == set(wanted.split(",")) & {"coordinator", "participant"}, found
assert "participant" in wanted or "torch" not in sys.modules
"""


@pytest.mark.parametrize("parts", [("maskwork",), ("maskwork", "maskwork-coordinator"), tuple(DISTRIBUTIONS.values())])
def test_what_is_installed_from_the_wheels_can_be_imported(
    wheels: Mapping[str, Path], tmp_path: Path, parts: tuple[str, ...]
) -> None:
    """A wheel is installed by unpacking it: ours have no scripts or data beside the packages."""
    for name in parts:
        with zipfile.ZipFile(wheels[name]) as archive:
            archive.extractall(tmp_path)
    wanted = ",".join(name.removeprefix("maskwork-") for name in parts)
    # Without `site`, whose .pth files would put the checkout in the path as well.
    libraries = sysconfig.get_path("purelib")
    command = [sys.executable, "-I", "-S", "-c", IMPORT_EVERYTHING, str(tmp_path), libraries, wanted]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
