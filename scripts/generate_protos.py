"""Generate ``common/maskwork/wire/v1`` from ``protos/``: message types, service stubs and their type stubs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SERVICES = ("audit.proto", "enrolment.proto", "federation.proto", "jobs.proto")


def main() -> None:
    """Run protoc twice: every file for its messages, the services for their stubs as well."""
    folder = ROOT / "protos" / "maskwork" / "wire" / "v1"
    every = [str(path) for path in sorted(folder.glob("*.proto"))]
    services = [str(folder / name) for name in SERVICES]
    protoc = [sys.executable, "-m", "grpc_tools.protoc", f"--proto_path={ROOT / 'protos'}"]
    plugins = [
        f"--plugin={name}={Path(sys.executable).parent / name}" for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")
    ]
    out = ROOT / "common"
    subprocess.run([*protoc, *plugins, f"--python_out={out}", f"--mypy_out=quiet:{out}", *every], check=True)
    subprocess.run(
        [*protoc, *plugins, f"--grpc_python_out={out}", f"--mypy_grpc_out=quiet:{out}", *services], check=True
    )
    package = out / "maskwork" / "wire" / "v1" / "__init__.py"
    package.write_text('"""Generated from protos/maskwork/wire/v1 by `make protos`. Do not edit."""\n')


if __name__ == "__main__":
    main()
