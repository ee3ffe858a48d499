"""Write constraints.txt anew from what the working .venv holds, local build tags taken off."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

LOCK = Path(__file__).resolve().parent.parent / "constraints.txt"


def main() -> None:
    """Keep the comment at the top, replace every pin below it."""
    comment = [line for line in LOCK.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    frozen = subprocess.run(
        [sys.executable, "-m", "pip", "freeze", "--all", "--exclude-editable"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    pins = sorted((re.sub(r"\+\w+$", "", line) for line in frozen if "==" in line), key=str.lower)
    LOCK.write_text("\n".join([*comment, *pins]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
