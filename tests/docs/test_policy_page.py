"""docs/policy.md: its example is a policy, its commands run, and they print what the page shows."""

from __future__ import annotations

import re
import shlex
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from tests.docs.test_pages import BLOCKS, ROOT
from tests.participant.test_policy_check import signed
from tests.secagg.cohort import make_plan

from maskwork.cli import installed_contributions, run
from maskwork.participant.ledger import Ledger
from maskwork.participant.policy import Policy
from maskwork.secagg.plan import RoundPlan

PAGE = ROOT / "docs" / "policy.md"
MEMBERS = ("uh-north", "st-mary", "elsewhere", "nowhere")


def block_after(mark: str) -> str:
    text = PAGE.read_text(encoding="utf-8")
    line = text[: text.index(f"<!-- {mark}")].count("\n") + 2
    return next(block.text for block in BLOCKS if block.page == PAGE and block.line == line)


def plan() -> RoundPlan:
    made = make_plan(4, colluders=1, job="readmission-0badcafe", task="readmission")
    roster = tuple(replace(e, participant=name) for e, name in zip(made.roster, MEMBERS, strict=True))
    return replace(made, roster=roster)


def words(line: str) -> list[str]:
    return shlex.split(line.replace("/var/lib/maskwork", "state"))


def maskwork(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as caught:
        run(installed_contributions(), arguments)
    return int(caught.value.code or 0), capsys.readouterr().out


def test_the_commands_of_the_page_run_and_print_what_it_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    offered = signed(plan(), refused_because="cohort 4 < 6")
    with Ledger.open(tmp_path / "state") as ledger:
        ledger.record_refused_plan(offered)
    Path("policy.toml").write_text(block_after("strict policy"))
    lines = next(b.text for b in BLOCKS if b.page == PAGE and b.language == "sh").splitlines()
    listing, printing, checking = [words(line) for line in lines]

    code, listed = maskwork(listing[1:], capsys)
    assert (code, "declined: cohort 4 < 6" in listed) == (0, True)
    at = printing.index("--json") + 1
    asked, (redirect, file) = [*printing[1:at], offered.session_id.hex()[:4], *printing[at + 1 : -2]], printing[-2:]
    code, printed = maskwork(asked, capsys)
    assert (code, redirect) == (0, ">")
    Path(file).write_text(printed)
    code, explained = maskwork(checking[1:], capsys)
    assert code == 1
    said = [" ".join(line.split()) for line in explained.splitlines()]
    for line in block_after("explanation").splitlines():
        shown = " ".join(line.split())
        assert any(real.startswith(shown) for real in said), f"{shown!r} is not among\n{explained}"


def test_every_key_is_on_the_page_with_its_default() -> None:
    table = PAGE.read_text(encoding="utf-8").split("## The keys")[1].split("\n**Participation")[0]
    for key in Policy.model_fields:
        assert re.search(rf"^\| .*`\[?{key}\]?`", table, re.MULTILINE), key


def test_the_strict_policy_is_stricter_than_the_default_wherever_it_says_anything() -> None:
    strict, default = Policy.model_validate(tomllib.loads(block_after("strict policy"))), Policy()
    for key in ("min_cohort", "min_survivors", "min_colluders", "min_trusted_survivors", "min_weight_cap"):
        assert getattr(strict, key) > getattr(default, key)
    for key in ("max_rounds", "max_clip_norm", "max_weight", "max_participation", "max_revocation_age_days"):
        assert getattr(strict, key) < getattr(default, key)
