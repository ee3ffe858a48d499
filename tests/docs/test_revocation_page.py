"""The commands of docs/revocation.md, run in the page's order in one directory by a real shell."""

import os
import subprocess
import sys
import time
from pathlib import Path

from tests.docs.test_pages import BLOCKS, ROOT, SHELL

from maskwork.net.diagnosis import check_own_files
from maskwork.net.identity import IdentityFiles, Role, TrustRoots, load_certificate
from maskwork.net.revocation import LIST_FILE, RevocationList

PAGE = ROOT / "docs" / "revocation.md"


def test_the_commands_of_the_page_do_what_it_says(tmp_path: Path) -> None:
    blocks = [block.text for block in BLOCKS if block.page == PAGE and block.language in SHELL]
    assert len(blocks) >= 8
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-e", "-c", "".join(blocks)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("revocation list") >= 5
    now = time.time()
    for directory, role in (("hub", Role.COORDINATOR), ("site-a", Role.PARTICIPANT)):
        files = IdentityFiles.in_directory(tmp_path / directory)
        assert check_own_files(files, now=now, role=role).name == directory
        assert TrustRoots.from_file(files.ca).certificates == (load_certificate(tmp_path / "ca-2" / "ca.pem"),)
    roots = TrustRoots.from_file(tmp_path / "hub" / "ca.pem")
    final = RevocationList.parse((tmp_path / "hub" / LIST_FILE).read_bytes(), roots, now=now)
    assert (final.number, len(final.revoked)) == (19, 1)
