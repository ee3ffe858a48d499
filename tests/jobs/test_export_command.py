"""`maskwork model export` before it speaks to anybody: what is there already stays there."""

from pathlib import Path

import pytest

from maskwork.errors import UserError
from maskwork.job_commands import export

ANYONE = Path("nobody")


def test_a_file_that_exists_is_not_replaced_unasked(tmp_path: Path) -> None:
    kept = tmp_path / "job.toml"
    kept.write_text("mine")
    with pytest.raises(UserError, match=r"job\.toml is there already: name another, or add --force"):
        export("digits", "127.0.0.1:1", ANYONE, kept)
    assert kept.read_text() == "mine"


@pytest.mark.parametrize("force", [False, True])
def test_what_is_no_file_is_never_replaced(tmp_path: Path, *, force: bool) -> None:
    for path in (tmp_path, Path("/dev/null")):
        with pytest.raises(UserError, match="is there already: name a file"):
            export("digits", "127.0.0.1:1", ANYONE, path, force=force)
