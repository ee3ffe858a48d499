"""Every crash that a campaign found, by name, as the input that made it."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.coordinator.local_federation import AUTHORITY, FOUR, ISSUED, PATIENCE_S, connect_all, federation, spec
from tests.fuzz import recordings

from maskwork.coordinator.config import read_config as read_coordinator_config
from maskwork.errors import UserError
from maskwork.job import parse_spec, read_job_file
from maskwork.net.diagnosis import load_private_key
from maskwork.net.identity import IdentityError, TrustRoots, load_certificate, to_der
from maskwork.participant.config import read_config as read_participant_config
from maskwork.participant.policy import read_policy
from maskwork.wire.codec import UploadGrant, UploadReady

READERS = (read_job_file, read_policy, read_coordinator_config, read_participant_config)


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ("a = " + "[" * 5000, "nested too deeply"),
        ("a = " + "{b = " * 5000, "nested too deeply"),
        ("a = " + "9" * 5000, "digits"),
        ("# " + "x" * (4 << 20), "more than"),
    ],
)
def test_toml_that_its_parser_cannot_take_is_a_mistake_in_the_file(
    tmp_path: Path, read: Callable[[Path], object], toml: str, words: str
) -> None:
    path = tmp_path / "file.toml"
    path.write_text(toml)
    with pytest.raises(UserError, match=words):
        read(path)


@pytest.mark.parametrize("key", ["identity", "state"])
def test_a_path_with_a_nul_in_it_is_a_mistake_in_the_file(tmp_path: Path, key: str) -> None:
    path = tmp_path / "file.toml"
    keys = {"identity": '"identity"', "state": '"state"', key: '"a\\u0000b"'}
    path.write_text("".join(f"{name} = {value}\n" for name, value in keys.items()))
    with pytest.raises(UserError, match=f"{key}: .*NUL"):
        read_coordinator_config(path)


def test_a_job_with_a_hundred_thousand_mistakes_is_refused_in_few_words_and_soon() -> None:
    wrong = {**json.loads(spec().canonical_json()), **{f"round{i}": 1 for i in range(100_000)}}
    began = time.process_time()
    with pytest.raises(ValueError, match="and 99992 more") as refused:
        parse_spec(json.dumps(wrong).encode())
    assert len(str(refused.value)) < 2000
    assert time.process_time() - began < 5  # each key compared with every known one took minutes


def test_a_key_of_a_megabyte_is_not_told_whole() -> None:
    wrong = {**json.loads(spec().canonical_json()), "r" * (1 << 20): 1}
    with pytest.raises(ValueError, match="no such key") as refused:
        parse_spec(json.dumps(wrong).encode())
    assert len(str(refused.value)) < 500


def certificate_of_no_version() -> bytes:
    """site-a's certificate as X.509 version 4, which there is not."""
    der = recordings.der_certificates()[0]
    at = der.index(bytes.fromhex("a003020102"))
    return der[: at + 4] + b"\x03" + der[at + 5 :]


def certificate_without_a_readable_subject() -> bytes:
    """The CA's certificate with a name that is no UTF-8."""
    der = to_der(AUTHORITY.certificate)
    at = der.index(bytes.fromhex("06035504"), der.index(b"\x17\x0d"))  # after the validity comes the subject
    return der[: at + 7] + b"\xff" + der[at + 8 :]


def as_pem(der: bytes) -> bytes:
    return b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(der) + b"-----END CERTIFICATE-----\n"


@pytest.mark.parametrize("spoilt", [certificate_of_no_version(), certificate_without_a_readable_subject()])
def test_a_certificate_file_that_its_parser_chokes_on_late_is_malformed(tmp_path: Path, spoilt: bytes) -> None:
    path = tmp_path / "cert.pem"
    path.write_bytes(as_pem(spoilt))
    with pytest.raises(IdentityError, match="is not a PEM certificate"):
        load_certificate(path)
    with pytest.raises(IdentityError, match="is not a PEM certificate"):
        TrustRoots.from_pem(as_pem(spoilt))


def test_a_private_key_of_a_kind_that_there_is_not_is_malformed(tmp_path: Path) -> None:
    key = ISSUED["site-a"].key_pem
    der = base64.b64decode(b"".join(key.splitlines()[1:-1]))
    at = der.index(bytes.fromhex("06072a8648ce3d0201"))  # id-ecPublicKey
    spoilt = base64.encodebytes(der[: at + 3] + b"\x46" + der[at + 4 :])
    path = tmp_path / "key.pem"
    path.write_bytes(b"-----BEGIN PRIVATE KEY-----\n" + spoilt + b"-----END PRIVATE KEY-----\n")
    path.chmod(0o600)
    with pytest.raises(IdentityError, match="not an unencrypted PEM private key"):
        load_private_key(path)


async def test_a_member_that_asks_for_its_grant_again_and_again_holds_no_slot_by_that(tmp_path: Path) -> None:
    async with federation(tmp_path, max_uploads=1) as (coordinator, sites):
        coordinator.add_job(cohort=FOUR)
        for site in sites.values():
            site.silent = {UploadGrant}  # granted, and nothing is streamed
        await connect_all(coordinator, sites)
        async with asyncio.timeout(PATIENCE_S):
            while not all(any(isinstance(m, UploadReady) for m in site.said) for site in sites.values()):
                await asyncio.sleep(0)
        await coordinator.settled()
        session_runner = coordinator.driver._jobs.runner
        assert session_runner is not None
        (granted,) = [key for key in session_runner.session.timers if isinstance(key, tuple) and key[0] == "grant"]
        before = session_runner.session.timers[granted]
        for site in sites.values():
            await site.say(UploadReady())
        await coordinator.settled()
        assert session_runner.session.timers[granted] is before
        assert not before.cancelled()
