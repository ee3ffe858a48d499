"""A file system of a few megabytes that a test makes, fills and mends. Not a test itself.

It is a tmpfs of its own: that takes the right to mount, which root in a container may lack; a test is skipped then, and
says so.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


class SmallDisk:
    """A mounted file system, and what fills it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._filler = root / "filler"

    def fill(self) -> None:
        """Leave not one byte."""
        with self._filler.open("ab", buffering=0) as file:
            for size in (1 << 20, 4096, 1):
                try:
                    while True:
                        file.write(bytes(size))
                except OSError:
                    continue

    def fill_but(self, left: int) -> None:
        """Leave about so many bytes."""
        with self._filler.open("ab", buffering=0) as file:
            while os.statvfs(self.root).f_bavail * os.statvfs(self.root).f_frsize > left:
                file.write(bytes(1 << 16))

    def empty(self) -> None:
        """Give back what `fill` took."""
        self._filler.unlink(missing_ok=True)

    def remount(self, how: str) -> None:
        """Make it read-only ("ro") or writable again ("rw")."""
        subprocess.run(["mount", "-o", f"remount,{how}", self.root], check=True, timeout=30)


@contextmanager
def small_disk(root: Path, *, megabytes: int = 16) -> Iterator[SmallDisk]:
    """Mount one at `root`; it is gone afterwards."""
    root.mkdir(parents=True, exist_ok=True)
    options = f"size={megabytes}m,mode=0755"
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", root], capture_output=True, text=True, timeout=30, check=False
    )
    if mounted.returncode:
        pytest.skip(f"this user ({os.geteuid()}) may not mount a file system here: {mounted.stderr.strip()}")
    try:
        yield SmallDisk(root)
    finally:
        subprocess.run(["umount", "--lazy", root], check=True, timeout=30)
