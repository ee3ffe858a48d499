"""The commands of docs/enrolment.md, run in the page's order in one directory, with a coordinator of its file."""

import asyncio
import os
import sys
import time
from pathlib import Path

import pytest
from tests.docs.test_pages import BLOCKS, ROOT, SHELL, TOML_BLOCKS
from tests.e2e.services import PATIENCE_S, Service, free_port

from maskwork.net.diagnosis import check_own_files
from maskwork.net.identity import IdentityFiles, Role
from maskwork.net.register import Register

pytestmark = pytest.mark.e2e

PAGE = ROOT / "docs" / "enrolment.md"
FINGERPRINT = "CA=sha256:$(maskwork pki show ca | awk '/fingerprint/ {print $2}')\n"


async def shell(text: str, home: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        *("bash", "-e", "-c", text),
        cwd=home,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    async with asyncio.timeout(PATIENCE_S):
        said, _ = await process.communicate()
    assert process.returncode == 0, said.decode()


async def test_the_commands_of_the_page_do_what_it_says(tmp_path: Path) -> None:
    ports = {"8750": str(free_port()), "8751": str(free_port())}

    def here(text: str) -> str:
        for there, free in ports.items():
            text = text.replace(there, free)
        return text.replace("0.0.0.0", "localhost")

    blocks = [here(block.text) for block in BLOCKS if block.page == PAGE and block.language in SHELL]
    (config,) = [here(block.text) for block in TOML_BLOCKS if block.page == PAGE]
    assert FINGERPRINT in blocks[0]
    (tmp_path / "coordinator.toml").write_text(config)
    dialling = next(number for number, block in enumerate(blocks) if "localhost:" in block)
    await shell("".join(blocks[:dialling]), tmp_path)
    hub = await Service.start("hub", "coordinator", "run", "--config", str(tmp_path / "coordinator.toml"))
    try:
        await hub.logged("coordinator ready")
        await shell(FINGERPRINT + "".join(blocks[dialling:]), tmp_path)
        assert await hub.terminate() == 0
    finally:
        if hub.process.returncode is None:
            await hub.kill()
    members = {"hub": Role.COORDINATOR, "alice": Role.OPERATOR, "bob": Role.RESEARCHER}
    for name, role in {**members, "site-a": Role.PARTICIPANT, "site-b": Role.PARTICIPANT}.items():
        files = IdentityFiles.in_directory(tmp_path / name)
        assert check_own_files(files, now=time.time(), role=role).name == name
    issued = [line.identity.name for line in Register(tmp_path / "ca").certificates()]
    assert sorted(issued) == ["alice", "bob", "bob", "hub", "site-a", "site-a", "site-b", "site-b"]
    for token in ("site-b.token", "bob.token"):
        secret = (tmp_path / token).read_text().strip().rpartition(":")[2]
        assert secret not in hub.text
