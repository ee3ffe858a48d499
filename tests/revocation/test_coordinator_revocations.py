"""What a new revocation list does at the coordinator: to open sessions, at every stage, to connections and to plans."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
import structlog
from cryptography import x509
from tests.coordinator.local_federation import (
    AUTHORITY,
    FOUR,
    ISSUED,
    SITES,
    LocalCoordinator,
    LocalSite,
    connect_all,
    federation,
)
from tests.revocation.lists import DAY, list_of, signed_list

from maskwork import job_events as events
from maskwork.coordinator.happenings import ListChanged
from maskwork.coordinator.records import JobState
from maskwork.coordinator.revocations import TELL_AGAIN_S, RevocationFile
from maskwork.errors import StorageUnavailable, UserError
from maskwork.job import Cohort, Deadlines
from maskwork.net.authority import Authority
from maskwork.net.identity import Role, serial_bytes
from maskwork.net.kept_list import KeptList
from maskwork.net.revocation import MAX_LIST_BYTES, NO_LIST, RevocationError, RevocationList
from maskwork.secagg.messages import (
    AdvertiseKeys,
    Advertisements,
    ConsistencyCheck,
    DeliveredShares,
    ShareKeys,
    SurvivorSets,
    SurvivorSignatures,
    Unmask,
)
from maskwork.wire import codec
from maskwork.wire.codec import OpenSession, UploadReady

NOW = 1_800_000_000.0


def certificate_of(name: str) -> x509.Certificate:
    return x509.load_pem_x509_certificate(ISSUED[name].cert_pem)


def listing(number: int, *names: str) -> RevocationList:
    issued_at = certificate_of(SITES[0]).not_valid_before_utc.timestamp() + 300
    return list_of(AUTHORITY, number, *map(certificate_of, names), now=issued_at)


# --- sessions, connections and plans ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("withheld", "heard", "stage", "counted"),
    [
        (AdvertiseKeys, OpenSession, "advertise-keys", False),
        (ShareKeys, Advertisements, "share-keys", False),
        (UploadReady, DeliveredShares, "masked-update", False),
        (ConsistencyCheck, SurvivorSets, "consistency-check", True),
        (Unmask, SurvivorSignatures, "unmask", True),
    ],
)
async def test_a_member_that_is_revoked_loses_its_place_at_every_stage_and_the_round_commits_with_the_rest(
    tmp_path: Path, withheld: type, heard: type, stage: str, counted: bool
) -> None:
    async with federation(tmp_path) as (coordinator, sites):
        coordinator.add_job(cohort=FOUR)
        sites["site-b"].silent = {withheld}
        await connect_all(coordinator, sites)
        await sites["site-b"].until_heard(heard)
        await coordinator.driver.post(ListChanged(listing(6, "site-b")))
        assert (await coordinator.until_ended()).state is JobState.COMPLETED
        (drop,) = coordinator.store.drops("job-1")
        assert (drop.participant, drop.stage, drop.reason) == ("site-b", stage, "revoked")
        assert "revocation list 6: unspecified" in drop.detail
        # What was uploaded before is in the sum, and cannot be taken out of it.
        (committed,) = coordinator.store.rounds("job-1")
        assert committed.survivors == (SITES if counted else ("site-a", "site-c", "site-d"))
        assert sites["site-b"].closing().phrase == "left out of this session: revoked"


async def test_the_rosters_after_it_lack_a_revoked_member_and_name_the_list(tmp_path: Path) -> None:
    async with federation(tmp_path) as (coordinator, sites):
        coordinator.add_job(rounds=2, cohort=Cohort(min_participants=3, max_participants=4, wait_s=0.05))
        sites["site-b"].silent = {UploadReady}
        await connect_all(coordinator, sites)
        await sites["site-b"].until_heard(DeliveredShares)
        made = listing(6, "site-b")
        await coordinator.driver.post(ListChanged(made))
        assert (await coordinator.until_ended()).state is JobState.COMPLETED
        first, second = (codec.decode_plan(a.plan_bytes) for a in coordinator.store.attempts("job-1"))
        assert (first.revocation_number, first.revocation_digest) == (0, bytes(32))
        assert (second.revocation_number, second.revocation_digest) == (6, made.digest)
        assert [entry.participant for entry in second.roster] == ["site-a", "site-c", "site-d"]


async def test_a_member_of_the_session_fetches_the_list_that_its_plan_names(tmp_path: Path) -> None:
    async with federation(tmp_path) as (coordinator, sites):
        made = listing(6)
        await coordinator.driver.post(ListChanged(made))
        coordinator.add_job(cohort=FOUR)
        sites["site-b"].silent = {UploadReady}
        await connect_all(coordinator, sites)
        await sites["site-b"].until_heard(DeliveredShares)
        offer = await sites["site-b"].until_heard(OpenSession)
        assert isinstance(offer, OpenSession)
        assert offer.revocation_list_size == len(made.der)
        member = sites["site-b"].site
        assert coordinator.driver.download(member, made.digest) == made.der
        await coordinator.driver.post(ListChanged(listing(7)))
        await coordinator.settled()
        assert coordinator.driver.download(member, made.digest) == made.der  # a session keeps its plan's list
        stranger = LocalSite("site-b", AUTHORITY.issue(Role.PARTICIPANT, "site-b", now=NOW)).site
        assert coordinator.driver.download(stranger, made.digest) is None


async def test_without_a_list_nothing_is_fetched_under_the_digest_of_none(tmp_path: Path) -> None:
    async with federation(tmp_path) as (coordinator, sites):
        coordinator.add_job(cohort=FOUR)
        sites["site-b"].silent = {UploadReady}
        await connect_all(coordinator, sites)
        await sites["site-b"].until_heard(DeliveredShares)
        assert coordinator.driver.download(sites["site-b"].site, bytes(32)) is None


async def test_a_connection_that_opens_while_the_list_comes_is_closed(tmp_path: Path) -> None:
    async with federation(tmp_path, SITES[:1]) as (coordinator, sites):
        await coordinator.driver.post(ListChanged(listing(6, "site-a")))
        site = await sites["site-a"].connect(coordinator.driver)
        assert site._pump is not None
        async with asyncio.timeout(20):
            await site._pump  # its stream ended
        assert site.heard == []


async def test_an_operator_reads_why_a_job_waits_and_a_new_certificate_is_let_in(tmp_path: Path) -> None:
    async with federation(tmp_path, SITES[:3]) as (coordinator, sites):
        coordinator.add_job(deadlines=Deadlines(reconnect_s=0.01))
        sites["site-b"].silent = {UploadReady}
        await connect_all(coordinator, sites)
        await sites["site-b"].until_heard(DeliveredShares)
        await coordinator.driver.post(ListChanged(listing(6, "site-b")))
        waiting = await coordinator.until(
            lambda e: isinstance(e, events.Waiting) and "2 of the 3" in e.detail and "site-b" in e.detail
        )
        assert isinstance(waiting, events.Waiting)
        assert "site-b: revoked (its certificate is on revocation list 6: unspecified)" in waiting.detail
        issued = AUTHORITY.issue(
            Role.PARTICIPANT, "site-b", now=certificate_of("site-b").not_valid_before_utc.timestamp()
        )
        await LocalSite("site-b", issued).connect(coordinator.driver)
        assert (await coordinator.until_ended()).state is JobState.COMPLETED


async def test_a_connected_site_that_is_revoked_between_two_rounds_is_named_where_the_job_waits(tmp_path: Path) -> None:
    async with federation(tmp_path, SITES[:2]) as (coordinator, sites):
        coordinator.add_job()
        await connect_all(coordinator, sites)
        await coordinator.driver.post(ListChanged(listing(6, "site-b")))
        told = await coordinator.until(lambda e: isinstance(e, events.Waiting) and "revoked" in e.detail)
        assert isinstance(told, events.Waiting)
        assert "1 of the 3" in told.detail
        assert "site-b: revoked" in told.detail


async def test_a_session_that_is_resumed_has_no_revoked_member(tmp_path: Path) -> None:
    coordinator, sites = LocalCoordinator(tmp_path), {name: LocalSite(name) for name in SITES}
    coordinator.start()
    coordinator.add_job(cohort=FOUR)
    sites["site-b"].silent = sites["site-c"].silent = {Unmask}
    await connect_all(coordinator, sites)
    await sites["site-c"].until_heard(SurvivorSignatures)
    await coordinator.settled()
    await coordinator.crash()
    for site in sites.values():
        assert site._pump is not None
        site._pump.cancel()
    restarted = LocalCoordinator(tmp_path, revocations=listing(6, "site-b"))
    restarted.start()
    try:
        sites["site-c"].silent = set()
        for name in ("site-a", "site-c", "site-d"):
            await sites[name].connect(restarted.driver, active=True)
        assert (await restarted.until_ended()).state is JobState.COMPLETED
        assert [(d.participant, d.reason) for d in restarted.store.drops("job-1")] == [("site-b", "revoked")]
    finally:
        await restarted.crash()


# --- the operator's file ----------------------------------------------------------------------------------------------

CA = Authority.create("ward", now=NOW)
LEAF = x509.load_pem_x509_certificate(CA.issue(Role.PARTICIPANT, "site-a", now=NOW).cert_pem)
Line = dict[str, object]


class Desk:
    """A `RevocationFile` whose clock a test sets, and what it told."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path, self.now = folder, folder / "revoked.crl", NOW
        self.told: list[int] = []
        self.begun = self.again()

    def again(self) -> RevocationFile:
        """As after a restart."""
        made = RevocationFile(
            self.path,
            KeptList(self.folder / "state" / "revoked.crl", CA.roots, now=self.now),
            CA.roots,
            clock=lambda: self.now,
        )

        async def told(new: RevocationList) -> None:
            self.told.append(new.number)

        made.tell(told)
        return made

    def put(self, der: bytes) -> None:
        aside = self.path.with_name("aside")
        aside.write_bytes(der)
        aside.replace(self.path)

    async def look(self) -> list[Line]:
        with structlog.testing.capture_logs() as lines:
            await self.begun.look()
        return [dict(line) for line in lines]


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


async def test_a_list_that_appears_is_in_force_and_told_once(desk: Desk) -> None:
    desk.begun.begin(required=False)
    assert desk.begun.current is NO_LIST
    assert await desk.look() == []
    desk.put(signed_list(CA, 1, [LEAF], now=NOW))
    (line,) = await desk.look()
    assert (line["event"], line["number"], line["entries"]) == ("revocation list in force", 1, 1)
    assert serial_bytes(LEAF) in desk.begun
    assert await desk.look() == []
    assert desk.told == [1]
    desk.put(signed_list(CA, 3, now=NOW))
    await desk.look()
    assert (desk.told, serial_bytes(LEAF) in desk.begun) == ([1, 3], False)


REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "older": (lambda: signed_list(CA, 4, now=NOW), "revocation list 4, where list 5 was seen"),
    "equivocation": (lambda: signed_list(CA, 5, now=NOW), "another list of that number"),
    "another-ca": (lambda: signed_list(Authority.create("ward", now=NOW), 9, now=NOW), "not signed by a CA"),
    "half-written": (lambda: signed_list(CA, 9, now=NOW)[:-9], "not an X.509 revocation list"),
    "too-long": (lambda: bytes(MAX_LIST_BYTES + 1), f"it has {MAX_LIST_BYTES + 1} bytes"),
}


@pytest.mark.parametrize(("make", "said"), REFUSED.values(), ids=REFUSED)
async def test_a_list_that_is_refused_leaves_the_one_before_in_force(
    desk: Desk, make: Callable[[], bytes], said: str
) -> None:
    desk.put(signed_list(CA, 5, [LEAF], now=NOW))
    desk.begun.begin(required=True)
    desk.put(make())
    (line,) = await desk.look()
    assert (line["event"], line["log_level"], line["in_force"]) == ("revocation list refused", "error", 5)
    assert said in str(line["detail"])
    assert await desk.look() == []  # said once, not every second
    assert serial_bytes(LEAF) in desk.begun
    restarted = desk.again()
    restarted.begin(required=True)  # nor after a restart
    assert serial_bytes(LEAF) in restarted
    assert desk.told == []


async def test_a_file_that_goes_away_is_told_and_its_list_stays_in_force(desk: Desk) -> None:
    desk.put(signed_list(CA, 5, [LEAF], now=NOW))
    desk.begun.begin(required=True)
    desk.path.unlink()
    (line,) = await desk.look()
    assert (line["event"], line["in_force"]) == ("the revocation list's file is gone", 5)
    assert await desk.look() == []
    assert serial_bytes(LEAF) in desk.begun
    desk.again().begin(required=True)


def test_a_coordinator_does_not_start_with_a_list_that_it_cannot_use(desk: Desk) -> None:
    with pytest.raises(UserError, match=r"revoked\.crl"):
        desk.begun.begin(required=True)
    desk.again().begin(required=False)
    desk.put(b"no list")
    with pytest.raises(UserError, match=r"revoked\.crl: not an X\.509"):
        desk.again().begin(required=False)


@pytest.mark.parametrize(
    "damage",
    [lambda der: b"", lambda der: der[:-9], lambda der: der + bytes(MAX_LIST_BYTES)],
    ids=["empty", "cut", "long"],
)
def test_a_coordinator_does_not_start_with_an_older_file_when_the_list_that_it_kept_is_damaged(
    desk: Desk, damage: Callable[[bytes], bytes]
) -> None:
    kept, older = desk.folder / "state" / "revoked.crl", signed_list(CA, 4, now=NOW)
    desk.put(newest := signed_list(CA, 5, [LEAF], now=NOW))
    desk.begun.begin(required=True)
    kept.write_bytes(damage(kept.read_bytes()))
    desk.put(older)
    with pytest.raises(UserError, match=f"{kept}.*Put the newest list of the CA there"):
        desk.again().begin(required=True)
    assert kept.read_bytes() == damage(newest)
    kept.write_bytes(newest)
    restarted = desk.again()
    restarted.begin(required=True)
    assert serial_bytes(LEAF) in restarted


def test_a_list_that_was_kept_of_a_ca_that_is_trusted_no_more_is_left_aside(desk: Desk) -> None:
    (desk.folder / "state").mkdir()
    (desk.folder / "state" / "revoked.crl").write_bytes(signed_list(Authority.create("ward", now=NOW), 9, now=NOW))
    desk.put(signed_list(CA, 10, [LEAF], now=NOW))
    restarted = desk.again()
    restarted.begin(required=True)
    assert restarted.current.number == 10


async def test_a_list_that_sites_refuse_by_its_date_is_told_each_hour(desk: Desk) -> None:
    desk.put(signed_list(CA, 5, now=NOW))
    desk.begun.begin(required=True)
    desk.now = NOW + 7 * DAY
    assert await desk.look() == []
    desk.now += 1
    (line,) = await desk.look()
    assert line["event"] == "sites refuse the revocation list"
    assert "refresh-list" in str(line["detail"])
    assert await desk.look() == []
    desk.now += TELL_AGAIN_S
    assert len(await desk.look()) == 1
    desk.put(signed_list(CA, 6, now=desk.now))
    assert [line["event"] for line in await desk.look()] == ["revocation list in force"]


async def test_a_list_that_could_not_be_read_is_in_force_as_soon_as_it_can_and_the_trouble_is_told_once(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.put(signed_list(CA, 5, [LEAF], now=NOW))

    def denied(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(self))

    with monkeypatch.context() as without_rights:  # what `chmod` mends, which leaves size, time and inode as they were
        without_rights.setattr(Path, "read_bytes", denied)
        assert [line["event"] for line in await desk.look()] == ["revocation list refused"]
        assert await desk.look() == []
    assert [line["event"] for line in await desk.look()] == ["revocation list in force"]
    assert desk.told == [5]
    assert await desk.look() == []


async def test_a_list_that_the_state_directory_did_not_take_is_tried_again(desk: Desk) -> None:
    desk.put(signed_list(CA, 5, [LEAF], now=NOW))
    state = desk.folder / "state"
    state.write_text("in the way")
    assert [line["event"] for line in await desk.look()] == ["revocation list refused"]
    assert await desk.look() == []
    state.unlink()
    assert [line["event"] for line in await desk.look()] == ["revocation list in force"]
    assert desk.told == [5]


class FullDisk(KeptList):
    """A kept list whose disk takes nothing."""

    def keep(self, new: RevocationList) -> None:
        raise StorageUnavailable("the disk is full", file="revoked.crl", remedy="Free some space on it.")


async def test_a_list_that_the_full_disk_cannot_keep_is_in_force_all_the_same(tmp_path: Path) -> None:
    kept = FullDisk(tmp_path / "state" / "revoked.crl", CA.roots, now=NOW)
    file = RevocationFile(tmp_path / "revoked.crl", kept, CA.roots, clock=lambda: NOW)
    (tmp_path / "revoked.crl").write_bytes(signed_list(CA, 5, [LEAF], now=NOW))
    with structlog.testing.capture_logs() as lines:
        await file.look()
    assert [line["event"] for line in lines] == ["the revocation list cannot be kept", "revocation list in force"]
    assert serial_bytes(LEAF) in file
    with pytest.raises(RevocationError, match="another list of that number"):
        kept.hold(list_of(CA, 5, now=NOW))
    with pytest.raises(RevocationError, match="where list 5"):
        kept.hold(list_of(CA, 4, now=NOW))
