"""What a site makes of the revocation list that a plan names: fetched, checked, kept, and only then used."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio
import structlog
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from tests.participant.local_site import AUTHORITY, COORDINATOR, ISSUED, NAMES, NOW, OWN, PATIENCE_S, Table
from tests.revocation.lists import DAY, signed_list

from maskwork.net.authority import Authority, IssuedIdentity
from maskwork.net.identity import IdentityProblem, Role, to_der
from maskwork.net.names import IdentityError
from maskwork.participant.client import CoordinatorLink, TurnedAway, is_refusal
from maskwork.participant.policy import Policy
from maskwork.secagg.errors import DeclineCode
from maskwork.secagg.messages import AdvertiseKeys, Decline
from maskwork.wire import codec
from maskwork.wire.codec import OpenSession

FED = "test"
ZEROS = bytes(32)


def certificate_of(issued: IssuedIdentity) -> x509.Certificate:
    return x509.load_pem_x509_certificate(issued.cert_pem)


OUTSIDER = certificate_of(AUTHORITY.issue(Role.PARTICIPANT, "site-x", now=NOW))
FIVE = signed_list(AUTHORITY, 5, [OUTSIDER], now=NOW)


@pytest_asyncio.fixture
async def table(tmp_path: Path) -> AsyncIterator[Table]:
    table = await Table(tmp_path / "site").start()
    yield table
    await table.close()


def offer_with(
    table: Table,
    der: bytes,
    number: int,
    *,
    digest: bytes | None = None,
    size: int | None = None,
    **changes: object,
) -> OpenSession:
    """An offer whose plan names the list `der` under a number; the coordinator sends `der` for its digest."""
    digest = hashlib.sha256(der).digest() if digest is None else digest
    table.link.blobs[digest] = der
    offer = table.offer(revocation_digest=digest, revocation_number=number, **changes)
    return replace(offer, revocation_list_size=len(der) if size is None else size)


async def answer(table: Table, offer: OpenSession) -> AdvertiseKeys | Decline:
    """What the site says to an offer. A list is read in a thread, so settling is not enough."""
    session = await table.propose(offer)
    async with asyncio.timeout(PATIENCE_S):
        while not (said := [m for s, m in table.link.sent if s == session]):
            await table.settle()
    (message,) = said
    assert isinstance(message, AdvertiseKeys | Decline)
    return message


async def refusal(table: Table, offer: OpenSession) -> str:
    declined = await answer(table, offer)
    assert isinstance(declined, Decline)
    assert declined.code is DeclineCode.REVOCATION
    assert "train" not in table.worker.calls
    return declined.detail


async def takes_part(table: Table, offer: OpenSession) -> bool:
    return isinstance(await answer(table, offer), AdvertiseKeys)


async def test_the_list_is_fetched_read_kept_and_used(table: Table) -> None:
    assert await takes_part(table, offer_with(table, FIVE, 5))
    assert table.ledger.highest_revocation_number(FED) == 5
    assert (table.folder / "revoked.crl").read_bytes() == FIVE
    work = table.driver._work
    assert work is not None
    assert work.state is not None
    site = work.state.session.site
    assert (site.rules.revocation_number, site.rules.revocation_digest) == (5, hashlib.sha256(FIVE).digest())
    assert site.verifier.is_revoked is table.driver.revocations.current  # type: ignore[attr-defined]  # ours
    with pytest.raises(ValueError, match="revoked"):
        site.verifier.verify_participant(to_der(OUTSIDER), NOW)


async def test_what_is_here_is_not_fetched_again(table: Table) -> None:
    assert await takes_part(table, offer_with(table, FIVE, 5))
    again = offer_with(table, FIVE, 5, attempt=2)
    del table.link.blobs[hashlib.sha256(FIVE).digest()]
    assert await takes_part(table, again)


async def test_it_is_on_the_disk_before_the_first_message(table: Table, tmp_path: Path) -> None:
    seen: list[tuple[int | None, bool]] = []
    send = table.link.send

    def watching(session: bytes, message: object) -> None:
        seen.append((table.ledger.highest_revocation_number(FED), (table.folder / "revoked.crl").exists()))
        send(session, message)  # type: ignore[arg-type]  # what the driver sends

    table.link.send = watching  # type: ignore[method-assign]  # the fake's own end
    assert await takes_part(table, offer_with(table, FIVE, 5))
    assert seen == [(5, True)]


def key_of(issued: IssuedIdentity) -> ec.EllipticCurvePrivateKey:
    key = load_pem_private_key(issued.key_pem, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key


STRANGER = Authority.create(FED, now=NOW)

BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "another-ca": (lambda: signed_list(STRANGER, 6, now=NOW), "wrong-ca"),
    "a-leaf": (lambda: signed_list(AUTHORITY, 6, now=NOW, key=key_of(ISSUED[0])), "wrong-ca"),
    "past-its-next-update": (lambda: signed_list(AUTHORITY, 6, now=NOW - 3 * DAY, days=2), "expired"),
    "from-the-future": (lambda: signed_list(AUTHORITY, 6, now=NOW + DAY), "not-yet"),
    "older-than-the-policy-allows": (
        lambda: signed_list(AUTHORITY, 6, now=NOW - 8 * DAY, days=30),
        "revocation list 6 is 8.0 days old > 7",
    ),
    "truncated": (lambda: signed_list(AUTHORITY, 6, now=NOW)[:-1], "malformed"),
    "altered": (lambda: signed_list(AUTHORITY, 6, now=NOW).replace(b"test", b"tesu"), "wrong-ca"),
    "another-number": (lambda: signed_list(AUTHORITY, 7, now=NOW), "equivocation"),
}


async def training_began(table: Table) -> None:
    """A site says that it takes part a moment before its training begins."""
    async with asyncio.timeout(30):
        while "train" not in table.worker.calls:
            await asyncio.sleep(0.001)


@pytest.mark.parametrize(("make", "said"), BAD.values(), ids=BAD)
async def test_a_list_that_is_not_good_is_declined_and_leaves_no_trace(
    table: Table, make: Callable[[], bytes], said: str
) -> None:
    assert await takes_part(table, offer_with(table, FIVE, 5))
    await training_began(table)
    table.worker.calls.clear()
    assert said in await refusal(table, offer_with(table, make(), 6, attempt=2))
    assert table.ledger.highest_revocation_number(FED) == 5
    assert (table.folder / "revoked.crl").read_bytes() == FIVE
    assert table.driver.active_session() == b""
    assert await takes_part(table, offer_with(table, FIVE, 5, attempt=3))


async def test_a_plan_that_names_one_list_while_another_is_sent(table: Table) -> None:
    other = signed_list(AUTHORITY, 5, now=NOW)
    named = hashlib.sha256(FIVE).digest()
    assert "equivocation" in await refusal(table, offer_with(table, other, 5, digest=named))


@pytest.mark.parametrize(
    ("der", "number", "said"),
    [
        (signed_list(AUTHORITY, 4, now=NOW), 4, "older: revocation list 4, where list 5 was seen before"),
        (signed_list(AUTHORITY, 5, now=NOW), 5, "equivocation: revocation list 5"),
        (b"", 0, "older: no revocation list, where list 5 was seen before"),
    ],
    ids=["lower", "same-number-other-content", "none"],
)
@pytest.mark.parametrize("restarted", [False, True])
async def test_what_was_seen_is_not_taken_back(
    tmp_path: Path, der: bytes, number: int, said: str, restarted: bool
) -> None:
    table = await Table(tmp_path / "site").start()
    try:
        assert await takes_part(table, offer_with(table, FIVE, 5))
        await training_began(table)
        if restarted:
            await table.close()
            table = await Table(tmp_path / "site").start()
        table.worker.calls.clear()
        offer = offer_with(table, der, number, digest=None if number else ZEROS, attempt=2)
        del table.link.blobs[offer.proposal.plan.revocation_digest]  # it is not even fetched
        assert said in await refusal(table, offer)
    finally:
        await table.close()


async def test_a_number_that_was_seen_outlives_the_file(tmp_path: Path) -> None:
    table = await Table(tmp_path / "site").start()
    assert await takes_part(table, offer_with(table, FIVE, 5))
    await table.close()
    (tmp_path / "site" / "revoked.crl").write_bytes(b"damaged")
    with structlog.testing.capture_logs() as lines:
        table = await Table(tmp_path / "site").start()
    assert [line["event"] for line in lines if "revocation" in line["event"]] == [
        "the revocation list that was kept is left aside"
    ]
    try:
        four = signed_list(AUTHORITY, 4, now=NOW)
        assert "where list 5 was seen" in await refusal(table, offer_with(table, four, 4, attempt=2))
        assert await takes_part(table, offer_with(table, FIVE, 5, attempt=3))
    finally:
        await table.close()


@pytest.mark.parametrize(
    ("number", "digest", "size"),
    [(0, b"\1" * 32, 10), (5, ZEROS, 10), (5, b"\1" * 32, 0)],
    ids=["number", "digest", "size"],
)
async def test_a_plan_that_names_half_a_list(table: Table, number: int, digest: bytes, size: int) -> None:
    assert "without saying which" in await refusal(table, offer_with(table, FIVE, number, digest=digest, size=size))


async def test_a_list_that_has_grown_too_old_is_declined_without_fetching_anything(tmp_path: Path) -> None:
    der = signed_list(AUTHORITY, 5, now=NOW - 5 * DAY, days=30)
    table = await Table(tmp_path / "site").start()
    assert await takes_part(table, offer_with(table, der, 5))
    await table.close()
    table = await Table(tmp_path / "site", Policy(min_weight_cap=1, max_revocation_age_days=4)).start()
    try:
        offer = offer_with(table, der, 5, attempt=2)
        table.link.blobs.clear()
        assert "5.0 days old > 4" in await refusal(table, offer)
    finally:
        await table.close()


@pytest.mark.parametrize("index", [OWN, 3])
async def test_a_roster_with_somebody_who_is_on_its_own_list(table: Table, index: int) -> None:
    der = signed_list(AUTHORITY, 5, [certificate_of(ISSUED[index])], now=NOW)
    said = await refusal(table, offer_with(table, der, 5))
    assert said == f"the certificate of {NAMES[index]} is on revocation list 5"
    assert table.ledger.highest_revocation_number(FED) == 5  # which was good, whatever the plan was


async def test_a_coordinator_that_is_on_the_list_is_left(table: Table) -> None:
    der = signed_list(AUTHORITY, 5, [certificate_of(COORDINATOR)], now=NOW)
    assert "coordinator's own certificate" in await refusal(table, offer_with(table, der, 5))
    await table.settle()
    assert table.link.redials == 1
    with pytest.raises(IdentityError) as caught:  # as the connection asks when it dials again
        AUTHORITY.roots.verify(to_der(certificate_of(COORDINATOR)), now=NOW, is_revoked=table.driver.revocations)
    assert caught.value.problem is IdentityProblem.REVOKED
    assert is_refusal(caught.value)
    assert not is_refusal(IdentityError(IdentityProblem.EXPIRED, "x"))


async def test_a_connection_to_a_coordinator_that_is_on_the_list_is_refused_by_the_site(
    table: Table, tmp_path: Path
) -> None:
    link = CoordinatorLink(
        "hub:1",
        ISSUED[OWN].write(tmp_path / "identity"),
        AUTHORITY.roots,
        federation=FED,
        tasks=(),
        active_session=table.driver.active_session,
        inbox=table.driver.inbox,
        is_revoked=table.driver.revocations,
    )
    welcome = codec.Welcome(1, to_der(certificate_of(COORDINATOR)))
    assert link._verify(welcome).name == "main"
    der = signed_list(AUTHORITY, 5, [certificate_of(COORDINATOR)], now=NOW)
    await refusal(table, offer_with(table, der, 5))
    with pytest.raises(IdentityError, match="revoked"):
        link._verify(welcome)


async def test_a_site_that_is_turned_away_ends_its_training_and_forgets_the_session(table: Table) -> None:
    table.worker.held = {"train"}
    await table.propose(table.offer())
    assert table.driver.active_session() != b""
    await table.driver.inbox.put(TurnedAway())
    await table.settle()
    assert (table.worker.cancelled, table.driver.active_session()) == (["train"], b"")
    await table.driver.inbox.put(TurnedAway())  # as after every later try
    await table.settle()


async def test_a_list_whose_download_breaks_is_fetched_again(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maskwork.participant.errands.DOWNLOAD_PAUSE_S", 0.0)
    table.link.broken_downloads = 3
    assert await takes_part(table, offer_with(table, FIVE, 5))
