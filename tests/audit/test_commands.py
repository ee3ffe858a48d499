"""`maskwork audit` and `maskwork participant accept-history` as typed: exit codes, what is said, what is written."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from tests.audit.recorded import recorded, rewritten
from tests.simulation.identities import ROOTS
from typer.testing import CliRunner

from maskwork.audit.lines import decode_line
from maskwork.audit.records import Dropped, JobEnded, Record
from maskwork.audit.report import Outcome
from maskwork.audit_commands import app
from maskwork.errors import UserError
from maskwork.net.authority import Authority
from maskwork.net.identity import Role
from maskwork.participant.audit import LOG_NAME
from maskwork.participant.commands import app as participant_app
from maskwork.participant.ledger import Ledger

LOG = recorded().coordinator


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A log, two sites' logs and the CA."""
    write(tmp_path / "log", LOG)
    for name in ("site-1", "site-5"):
        write(tmp_path / name, recorded().sites[name])
    (tmp_path / "ca.pem").write_bytes(ROOTS.certificates[0].public_bytes(Encoding.PEM))
    return tmp_path


def write(path: Path, lines: tuple[bytes, ...] | list[bytes]) -> Path:
    path.write_bytes(b"".join(lines))
    return path


def run(*words: str | Path) -> tuple[int, str]:
    """The command's exit code and everything it said; an error for the person comes out as it would on a terminal."""
    result = CliRunner().invoke(app, [*map(str, words)])
    if isinstance(result.exception, UserError):
        return 1, f"error: {result.exception}"
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def verify(folder: Path, *words: str | Path) -> tuple[int, str]:
    return run("verify", folder / "log", "--ca", folder / "ca.pem", *words)


def test_a_good_log_is_said_to_be_good_and_what_was_not_looked_at(folder: Path) -> None:
    code, said = verify(folder)
    assert code == 0
    assert "the log of spiffe://simulated/coordinator/main" in said
    assert f"{len(LOG)} records" in said
    assert "not looked at: whether its end was cut off" in said
    code, said = verify(folder, "--against", folder / "site-1", "--against", folder / "site-5")
    assert code == 0
    assert "compared with site-1, which holds 3 heads" in said
    assert "not looked at" not in said


def test_a_tampered_log_ends_with_1_and_the_record(folder: Path) -> None:
    write(folder / "log", [*LOG[:7], *LOG[8:]])
    code, said = verify(folder)
    assert code == 1
    assert "record 7" in said
    assert "NOT GOOD" in said
    code, said = verify(folder, "--json")
    told = json.loads(said)
    assert (code, told["good"]) == (1, False)
    assert told["problems"][0]["index"] == 7


def test_many_problems_are_counted_rather_than_listed(folder: Path) -> None:
    write(folder / "log", [LOG[0], *(b"{}\n" for _ in range(40))])
    code, said = verify(folder)
    assert code == 1
    assert "and 20 more" in said


def test_a_log_written_anew_is_found_with_a_sites_alone(folder: Path) -> None:
    def lie(records: list[tuple[Record, float]]) -> None:
        at = recorded().index_of("committed", last=True)
        records[at] = (records[at][0].model_copy(update={"statistics": {"train.loss": 0.1}}), records[at][1])

    write(folder / "log", rewritten(LOG, lie))
    assert verify(folder)[0] == 0, "what remains: the last round's record, before any site was shown a head over it"
    first = recorded().index_of("job-submitted")

    def earlier(records: list[tuple[Record, float]]) -> None:
        records[first] = (records[first][0].model_copy(update={"submitted_by": "somebody"}), records[first][1])

    write(folder / "log", rewritten(LOG, earlier))
    code, said = verify(folder, "--against", folder / "site-1")
    assert code == 1
    assert f"record {first} (job-submitted): not the record that site-1 was shown" in said


def test_another_ca_believes_nothing(folder: Path) -> None:
    Authority.create("simulated", now=time.time()).write(folder / "other")
    code, said = run("verify", folder / "log", "--ca", folder / "other" / "ca.pem")
    assert code == 1
    assert "record 0 (opened)" in said
    assert "nobody that can be believed" in said


def test_files_that_are_not_there_are_said_so(folder: Path) -> None:
    assert "no-log" in run("verify", folder / "no-log", "--ca", folder / "ca.pem")[1]


def test_records_are_shown_as_lines_and_as_json(folder: Path) -> None:
    code, said = run("show", folder / "log", "--kind", "dropped")
    assert code == 0
    assert "participant=site-5" in said
    assert len(said.splitlines()) == 1
    code, said = run("show", folder / "log", "--json")
    shown = [json.loads(line) for line in said.splitlines()]
    assert [record["index"] for record in shown] == list(range(len(LOG)))
    assert shown[0]["data"]["federation"] == "simulated"
    assert "characters)" in run("show", folder / "log", "--kind", "plan")[1], "a plan is not printed in full"
    write(folder / "log", [*LOG[:3], b"nonsense\n"])
    assert "line 4" in run("show", folder / "log")[1]


# --- the report -------------------------------------------------------------------------------------------------------


def report(folder: Path, *words: str | Path, job: str = "job") -> tuple[int, str, str, dict[str, object]]:
    page, data = folder / "report.html", folder / "report.json"
    asked = ("report", job, "--log", folder / "log", "--ca", folder / "ca.pem", "--out", page, "--json", data)
    code, said = run(*asked, *words)
    if not page.exists():
        return code, said, "", {}
    return code, said, page.read_text(encoding="utf-8"), json.loads(data.read_text(encoding="utf-8"))


class References(HTMLParser):
    """Whatever a page would fetch or run."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.found += [f"{tag} {name}" for name, _ in attrs if name in ("src", "href", "data", "srcset", "onload")]


def test_a_report_tells_the_job_and_every_claim_holds(folder: Path) -> None:
    code, said, page, told = report(folder, "--site-log", folder / "site-1", "--site-log", folder / "site-5")
    assert code == 0, said
    claims = told["claims"]
    assert isinstance(claims, list)
    assert {claim["outcome"] for claim in claims} == {Outcome.HOLDS}
    assert len(claims) == 9
    assert str(told["final_model"]) in page
    assert str(told["state"]) == "completed"
    assert [m["left_out"] for m in told["members"] if m["name"] == "site-5"][0]  # type: ignore[attr-defined]  # noqa: RUF015
    assert "shares that open a secret (t)" in page
    assert "the site&#x27;s own log" in page
    assert "<svg" in page


def test_a_report_is_whole_in_itself(folder: Path) -> None:
    page = report(folder)[2]
    references = References()
    references.feed(page)
    assert references.found == []
    assert not references.tags & {"script", "link", "img", "iframe", "object", "embed", "form", "base"}
    assert "default-src 'none'" in page
    urls = set(re.findall(r"(?:https?:)?//[\w.]+", page)) - {"//www.w3.org", "http://www.w3.org"}
    assert {url for url in urls if not url.startswith("//simulated")} == set()
    assert "url(" not in page


def test_what_others_said_is_escaped(folder: Path) -> None:
    evil = "<script>alert(1)</script>\"'&"

    def lie(records: list[tuple[Record, float]]) -> None:
        for at, (record, when) in enumerate(records):
            if isinstance(record, Dropped):
                records[at] = (record.model_copy(update={"detail": evil}), when)
            if isinstance(record, JobEnded):
                records[at] = (record.model_copy(update={"reason": evil}), when)

    write(folder / "log", rewritten(LOG, lie))
    page = report(folder)[2]
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 2


def test_without_a_sites_log_what_it_would_show_is_not_claimed(folder: Path) -> None:
    code, _, page, told = report(folder)
    outcomes = [claim["outcome"] for claim in told["claims"]]  # type: ignore[attr-defined]
    assert code == 0
    assert outcomes.count(Outcome.UNCHECKED) == 1
    assert "1 could not be checked" in page
    assert "no log of this site was given" in page


BROKEN: dict[str, tuple[Callable[[], list[bytes]], str]] = {
    "chain": (lambda: [*LOG[:9], *LOG[10:]], "No record of the coordinator's log was altered"),
    "signatures": (
        lambda: rewritten(LOG, _without_signatures),
        "A sum was unmasked only after enough holders of every secret had signed",
    ),
    "models": (lambda: rewritten(LOG, _another_model), "Each round began from the model of the last one"),
}


def _without_signatures(records: list[tuple[Record, float]]) -> None:
    at = recorded().index_of("survivors", last=True)
    records[at] = (records[at][0].model_copy(update={"signatures": {}}), records[at][1])


def _another_model(records: list[tuple[Record, float]]) -> None:
    at = recorded().index_of("committed", last=True)
    records[at] = (records[at][0].model_copy(update={"model_in": bytes(32)}), records[at][1])


@pytest.mark.parametrize("broken", BROKEN)
def test_a_claim_that_does_not_hold_is_said_so_and_ends_with_1(broken: str, folder: Path) -> None:
    make, claim = BROKEN[broken]
    write(folder / "log", make())
    code, said, page, told = report(folder)
    assert code == 1
    failed = [c["claim"] for c in told["claims"] if c["outcome"] == Outcome.FAILS]  # type: ignore[attr-defined]
    assert any(f.startswith(claim) for f in failed), failed
    assert "does not hold:" in said
    assert "claims do not hold" in page


def test_a_broken_log_is_not_claimed_to_agree_with_anybody(folder: Path) -> None:
    write(folder / "log", [*LOG[:9], *LOG[10:]])
    told = report(folder, "--site-log", folder / "site-1")[3]
    outcomes = [claim["outcome"] for claim in told["claims"]]  # type: ignore[attr-defined]
    assert outcomes.count(Outcome.UNCHECKED) == 2, "neither the heads nor the plans of site-1 were compared"


def test_a_history_written_anew_fails_its_claim(folder: Path) -> None:
    at = recorded().index_of("job-submitted")

    def lie(records: list[tuple[Record, float]]) -> None:
        records[at] = (records[at][0], records[at][1] + 0.5)

    write(folder / "log", rewritten(LOG, lie))
    code, _, _, told = report(folder, "--site-log", folder / "site-1")
    failed = [c["claim"] for c in told["claims"] if c["outcome"] == Outcome.FAILS]  # type: ignore[attr-defined]
    assert code == 1
    assert "Nothing was cut off at the end of the log, and the history was not written anew." in failed


def test_a_job_that_is_not_there_is_said_so(folder: Path) -> None:
    code, said, *_ = report(folder, job="nothing")
    assert code == 1
    assert "'nothing' means none of 1 of the jobs in this log" in said
    write(folder / "log", recorded().sites["site-1"])
    assert "made from the coordinator's log" in report(folder)[1]


# --- accept-history ---------------------------------------------------------------------------------------------------


def test_another_history_is_accepted_by_an_act_that_is_written_down(tmp_path: Path) -> None:
    authority = Authority.create("ward", now=time.time())
    authority.issue(Role.PARTICIPANT, "site-a", now=time.time()).write(tmp_path / "identity")
    config = tmp_path / "participant.toml"
    config.write_text(
        'coordinator = "localhost:1"\nidentity = "identity"\nstate = "state"\n[tasks.digits]\nuse = "m:T"\n'
    )
    (tmp_path / "state").mkdir()
    words = ["accept-history", "--config", str(config), "--size", "7", "--reason", "restored from a backup", "--head"]
    wrong = CliRunner().invoke(participant_app, [*words, "abc"])
    assert isinstance(wrong.exception, UserError)
    done = CliRunner().invoke(participant_app, [*words, "ab" * 32])
    assert done.exit_code == 0, done.output
    assert f"accepted:       {'ab' * 32} of 7 records" in done.output
    last = decode_line((tmp_path / "state" / LOG_NAME).read_bytes().splitlines(keepends=True)[-1])
    assert (last.kind, last.record.reason) == ("history-accepted", "restored from a backup")  # type: ignore[attr-defined]
    with Ledger.open(tmp_path / "state") as ledger:
        assert ledger.last_audit_head("ward") == bytes.fromhex("ab" * 32)
        running = CliRunner().invoke(participant_app, [*words, "cd" * 32])
        assert "in use by another agent" in str(running.exception)
