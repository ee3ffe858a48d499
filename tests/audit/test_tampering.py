"""Every way of tampering with a log, at every place: found, and the record is named.

A forger without the owner's key can change the file; the owner can also sign it again. Both are here, and what cannot
be found from one copy alone is a test too, with what does find it.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cryptography import x509
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.audit.recorded import SITES, judged, recorded, rewritten, signed_anew, site_signer
from tests.simulation.identities import COORDINATOR_SIGNER, FEDERATION, ROOTS

from maskwork.audit import chain
from maskwork.audit.lines import LineError, decode_line, encode_line, record_bytes
from maskwork.audit.records import HeadKept, HistoryAccepted, Opened, Operator, Record, Service
from maskwork.audit.verify import Problem, verify_chain
from maskwork.net.authority import Authority
from maskwork.net.identity import Role, to_der
from maskwork.secagg.keys import SoftwareSigner

LOG = recorded().coordinator
SIZE = len(LOG)
every_place = st.integers(min_value=0, max_value=SIZE - 1)
many = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def problems(lines: list[bytes] | tuple[bytes, ...]) -> list[Problem]:
    return verify_chain(lines, ROOTS).problems


def first(lines: list[bytes]) -> Problem:
    found = problems(lines)
    assert found, "nothing was found"
    return found[0]


def kind(index: int) -> str:
    return decode_line(LOG[index]).kind


def test_what_was_written_is_good(tmp_path: Path) -> None:
    found = judged(tmp_path, LOG, **{n.replace("-", "_"): log for n, log in recorded().sites.items()})
    assert found.problems == []
    assert found.notes == []
    assert found.chain.size == SIZE >= 20
    assert [site.name for site in found.sites] == list(SITES)


# --- without the owner's key ------------------------------------------------------------------------------------------


@many
@given(place=every_place, data=st.data())
def test_a_byte_that_is_changed_is_found_in_its_record(place: int, data: st.DataObject) -> None:
    line = bytearray(LOG[place])
    at = data.draw(st.integers(min_value=0, max_value=len(line) - 2))  # the last is the line's end: see below
    line[at] ^= data.draw(st.integers(min_value=1, max_value=255))
    found = first(b"".join([*LOG[:place], bytes(line), *LOG[place + 1 :]]).splitlines(keepends=True))
    assert found.index == place


@many
@given(place=every_place)
def test_a_record_that_is_changed_with_its_head_is_found_by_its_signature(place: int) -> None:
    """The forger makes a consistent chain of it, to the end: no key of the owner's is needed for that."""
    forged, head = list(LOG[:place]), verify_chain(LOG[:place], ROOTS).heads[-1]
    for entry in map(decode_line, LOG[place:]):
        data = record_bytes(entry.record, index=entry.index, at=entry.at + (1.0 if entry.index == place else 0.0))
        head = chain.next_head(head, entry.index, chain.record_digest(data))
        forged.append(encode_line(data, chain.SignedHead(entry.index + 1, head, entry.signed.signature)))
    found = problems(forged)
    assert (found[0].index, found[0].kind) == (place, kind(place))
    assert "signed" in found[0].what or "certificate" in found[0].what


@many
@given(place=st.integers(min_value=0, max_value=SIZE - 2), length=st.integers(min_value=1, max_value=5))
def test_records_that_are_removed_are_named(place: int, length: int) -> None:
    end = min(place + length, SIZE - 1)
    found = first([*LOG[:place], *LOG[end:]])
    assert found.index == place
    assert f"record {end} ({kind(end)})" in found.what
    assert (f"records {place} to {end - 1}" if end - 1 > place else f"record {place}") in found.what


@many
@given(data=st.data())
def test_records_that_changed_places_are_named(data: st.DataObject) -> None:
    one = data.draw(st.integers(min_value=0, max_value=SIZE - 2))
    other = data.draw(st.integers(min_value=one + 1, max_value=SIZE - 1))
    lines = list(LOG)
    lines[one], lines[other] = lines[other], lines[one]
    found = problems(lines)
    assert found[0].index == one
    assert any(p.index == one and p.kind == kind(one) for p in found[1:]), "the one that came late is named too"


@many
@given(place=every_place, of=every_place)
def test_a_record_that_is_repeated_elsewhere_is_named(place: int, of: int) -> None:
    found = problems([*LOG[:place], LOG[of], *LOG[place:]])
    assert found[0].index in (place, of)
    if of < place:
        assert (found[0].index, found[0].kind) == (of, kind(of))


@many
@given(place=st.integers(min_value=1, max_value=SIZE))
def test_a_record_that_is_inserted_is_named(place: int) -> None:
    before = decode_line(LOG[place - 1])
    data = record_bytes(Service(event="nothing happened"), index=place, at=before.at)
    head = chain.next_head(before.signed.head, place, chain.record_digest(data))
    forged = encode_line(data, chain.SignedHead(place + 1, head, bytes(64)))
    found = first([*LOG[:place], forged, *LOG[place:]])
    assert (found.index, found.kind) == (place, "service")


@pytest.mark.parametrize("whose", ["site-1", "another coordinator"])
def test_a_record_that_somebody_else_signed_is_named(whose: str) -> None:
    place = recorded().index_of("committed")
    stranger = Authority.create(FEDERATION, now=1_799_999_000.0).issue(
        Role.COORDINATOR, "main", now=1_799_999_000.0, dns_names=["localhost"]
    )
    signer = site_signer(whose) if whose == "site-1" else _signer(stranger.key_pem)
    entry = decode_line(LOG[place])
    signed = chain.sign_head(signer, FEDERATION, place + 1, entry.signed.head)
    data = record_bytes(entry.record, index=place, at=entry.at)
    found = problems([*LOG[:place], encode_line(data, signed), *LOG[place + 1 :]])
    assert [(p.index, p.kind) for p in found] == [(place, "committed")]
    assert "not signed by spiffe://simulated/coordinator/main" in found[0].what


def test_a_log_of_another_federation_is_not_believed() -> None:
    other = Authority.create(FEDERATION, now=1_799_999_000.0)
    found = verify_chain(LOG, other.roots).problems
    assert (found[0].index, found[0].kind) == (0, "opened")
    assert "was not signed by the CA" in found[0].what


def test_a_log_that_claims_another_federation_than_its_certificate_is_not_believed() -> None:
    entries = [(entry.record, entry.at) for entry in map(decode_line, LOG)]
    opened = entries[0][0].model_copy(update={"federation": "elsewhere"})
    found = first(signed_anew([(opened, entries[0][1]), *entries[1:]], COORDINATOR_SIGNER, "elsewhere"))
    assert (found.index, found.kind) == (0, "opened")
    assert "federation" in found.what


def test_a_participant_that_signs_what_follows_is_named() -> None:
    """A `signer` record may bring another certificate of the owner's, and nobody else's."""
    from tests.simulation.identities import member

    from maskwork.audit.records import Signer

    records: list[tuple[Record, float]] = [(e.record, e.at) for e in map(decode_line, LOG[:5])]
    lines = signed_anew([*records, (Signer(certificate=member(0).certificate), records[-1][1])], member(0).signer)
    found = problems([*LOG[:5], lines[5]])
    assert (found[0].index, found[0].kind) == (5, "signer")
    assert "goes on as that of" in found[0].what


@pytest.mark.parametrize("cut", [1, 40, 300])
def test_an_incomplete_last_line_is_named(cut: int) -> None:
    found = first([*LOG[:-1], LOG[-1][:-cut]])
    assert found.index == SIZE - 1
    assert "incomplete" in found.what


@pytest.mark.parametrize(
    "line", [b"\n", b"{}\n", b"not a log\n", LOG[3].replace(b'"record":{', b'"record": {'), LOG[3] + b"\n"]
)
def test_a_line_that_is_none_is_named(line: bytes) -> None:
    found = first(b"".join([*LOG[:3], line, *LOG[4:]]).splitlines(keepends=True))
    assert found.index in (3, 4)


@pytest.mark.parametrize(
    "change",
    [
        {"index": 1 << 63}, {"index": 1 << 64}, {"index": -1}, {"index": True}, {"at": 10**400}, {"at": 1e300},
        {"at": -1e300}, {"at": -1}, {"at": True}, {"data": {"detail": "\ud800", "event": "started"}},
    ],
    ids=str,
)  # fmt: skip
def test_a_record_that_nothing_can_be_computed_with_is_named_even_of_its_owner(change: dict[str, object]) -> None:
    entry = decode_line(LOG[3])
    told = {"at": entry.at, "data": {"detail": "", "event": "started"}, "index": 3, "kind": "service", **change}
    data = json.dumps(told, sort_keys=True, separators=(",", ":")).encode()
    head = chain.next_head(decode_line(LOG[2]).signed.head, 3, chain.record_digest(data))
    line = encode_line(data, chain.sign_head(COORDINATOR_SIGNER, FEDERATION, 4, head))
    found = first([*LOG[:3], line, *LOG[4:]])
    assert found.index == 3
    with pytest.raises(LineError):  # so that `audit show` says so too
        decode_line(line)


def test_a_kind_that_is_not_known_is_named() -> None:
    entry = decode_line(LOG[3])
    told = {"at": entry.at, "data": {}, "index": 3, "kind": "novelty"}
    data = json.dumps(told, sort_keys=True, separators=(",", ":")).encode()
    found = first([*LOG[:3], encode_line(data, entry.signed), *LOG[4:]])
    assert found.index == 3
    assert "'novelty'" in found.what


def test_an_empty_log_is_no_good_log() -> None:
    assert "empty" in problems([])[0].what


# --- what one copy cannot show, and what a site's log shows -----------------------------------------------------------


@pytest.mark.parametrize("left", [SIZE - 1, SIZE // 2, 1])
def test_a_log_cut_off_at_its_end_is_found_by_a_sites_head_alone(left: int, tmp_path: Path) -> None:
    cut = LOG[:left]
    assert verify_chain(cut, ROOTS).problems == []
    held = max(e.record.size for e in map(decode_line, recorded().sites["site-1"]) if e.kind == "head-kept")  # type: ignore[attr-defined]
    found = judged(tmp_path, cut, site_1=recorded().sites["site-1"]).problems
    if left >= held:
        assert not [p for p in found if "cut off" in p.what]  # nobody was shown what followed
    else:
        assert found[0].index == left
        assert f"holds a signed head of {held} records: it was cut off" in found[0].what


def last_head_shown() -> int:
    sizes = [e.record.size for e in map(decode_line, recorded().sites["site-1"]) if e.kind == "head-kept"]  # type: ignore[attr-defined]
    return int(max(sizes))


@many
@given(place=st.integers(min_value=1, max_value=last_head_shown() - 1))
def test_a_history_written_anew_and_signed_again_is_named_to_the_record(place: int, tmp_path: Path) -> None:
    """A liar that holds the coordinator's key: the log itself is flawless, the site's log names the record."""

    def lie(records: list[tuple[Record, float]]) -> None:
        record, at = records[place]
        records[place] = (record, at + 0.5)

    forged = rewritten(LOG, lie)
    assert verify_chain(forged, ROOTS).problems == []
    found = judged(tmp_path, forged, site_1=recorded().sites["site-1"]).problems
    assert any(
        (p.index, p.kind) == (place, kind(place)) and "not the record that site-1 was shown" in p.what for p in found
    ), found


def test_a_rewritten_end_that_no_site_was_shown_is_not_found_by_anybody(tmp_path: Path) -> None:
    """What remains: after the last plan, nobody holds a head until the next one."""

    def lie(records: list[tuple[Record, float]]) -> None:
        record, at = records[-1]
        records[-1] = (record, at + 0.5)

    forged = rewritten(LOG, lie)
    assert judged(tmp_path, forged, site_1=recorded().sites["site-1"]).problems == []


def test_a_fork_that_drops_an_operators_action_is_named(tmp_path: Path) -> None:
    place = recorded().index_of("plan")

    def hide(records: list[tuple[Record, float]]) -> None:
        hidden = Operator(action="abort", by="spiffe://simulated/operator/olga", fingerprint=bytes(32), job="job-1")
        records.insert(place, (hidden, records[place][1]))

    forged = rewritten(LOG, hide)
    assert verify_chain(forged, ROOTS).problems == []
    found = judged(tmp_path, forged, site_2=recorded().sites["site-2"]).problems
    assert any(p.index == place and "site-2" in p.what for p in found)


def test_a_plan_that_a_site_holds_and_the_log_does_not_is_named(tmp_path: Path) -> None:
    """The coordinator takes the whole last round out, and nothing is left of it but what the sites hold."""
    last = recorded().index_of("plan", last=True)
    found = judged(tmp_path, rewritten(LOG, lambda records: records.__delitem__(slice(last, None))),
                   site_1=recorded().sites["site-1"]).problems  # fmt: skip
    assert any(p.log == "site-1" and p.kind == "plan" and "does not have it" in p.what for p in found)


def test_a_sites_own_log_is_judged_as_strictly(tmp_path: Path) -> None:
    site = recorded().sites["site-1"]
    assert judged(tmp_path, site).problems == []
    found = judged(tmp_path, LOG, site_1=[*site[:4], *site[5:]]).problems
    assert (found[0].log, found[0].index) == ("site-1", 4)


def test_a_sites_log_is_not_compared_with_sites(tmp_path: Path) -> None:
    site = recorded().sites["site-1"]
    assert "only a coordinator's log" in judged(tmp_path, site, site_2=site).problems[0].what
    assert "is not a site's" in judged(tmp_path, LOG, site_1=LOG).problems[0].what


def _signer(pem: bytes) -> SoftwareSigner:
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    return SoftwareSigner(load_pem_private_key(pem, None))  # type: ignore[arg-type]  # our CA issues P-256 keys only


def test_somebody_who_keeps_no_log_is_not_believed() -> None:
    authority = Authority.create("ward", now=1_799_999_000.0)
    issued = authority.issue(Role.OPERATOR, "olga", now=1_799_999_000.0)
    der = to_der(x509.load_pem_x509_certificate(issued.cert_pem))
    lines = signed_anew(
        [(Opened(federation="ward", certificate=der), 1_800_000_000.0)], _signer(issued.key_pem), "ward"
    )
    (found,) = verify_chain(lines, authority.roots).problems
    assert (found.index, found.kind) == (0, "opened")
    assert "keeps no audit log by its role" in found.what


def test_a_site_that_kept_too_many_digests_to_write_down_still_names_the_part(tmp_path: Path) -> None:
    place = recorded().index_of("job-submitted")

    def lie(records: list[tuple[Record, float]]) -> None:
        records[place] = (records[place][0], records[place][1] + 0.5)

    def forget(records: list[tuple[Record, float]]) -> None:
        for at, (record, when) in enumerate(records):
            if isinstance(record, HeadKept):
                records[at] = (record.model_copy(update={"digests": b""}), when)

    site = rewritten(recorded().sites["site-1"], forget, site_signer("site-1"))
    found = judged(tmp_path, rewritten(LOG, lie), site_1=site).problems
    assert any("one of the records from 0 to" in p.what and p.by_head for p in found), found
    assert judged(tmp_path, LOG, site_1=site).problems == []


def test_a_second_beginning_is_named() -> None:
    records: list[tuple[Record, float]] = [(e.record, e.at) for e in map(decode_line, LOG[:4])]
    (found,) = verify_chain(signed_anew([*records, records[0]], COORDINATOR_SIGNER), ROOTS).problems
    assert (found.index, found.kind) == (4, "opened")
    assert "begins with one" in found.what
    beginning = verify_chain(signed_anew(records[1:], COORDINATOR_SIGNER), ROOTS).problems[0]
    assert (beginning.index, beginning.kind) == (0, "service")


@pytest.mark.parametrize("change", ["taken out", "other"])
def test_survivors_that_a_site_helped_to_unmask_cannot_be_denied(change: str, tmp_path: Path) -> None:
    """Of the last round no site was shown a head yet; but the site's own signed sets say what it was asked for."""
    last = recorded().index_of("survivors", last=True)

    def lie(records: list[tuple[Record, float]]) -> None:
        if change == "taken out":
            del records[last:]
        else:
            records[last] = (records[last][0].model_copy(update={"u3": b"\x0f"}), records[last][1])

    found = judged(tmp_path, rewritten(LOG, lie), site_1=recorded().sites["site-1"]).problems
    assert any(p.log == "site-1" and "helped to unmask these survivors" in p.what for p in found), found


def test_a_record_that_can_be_written_in_two_ways_is_refused_even_of_its_owner() -> None:
    entry = decode_line(LOG[3])
    data = record_bytes(entry.record, index=3, at=entry.at).replace(b'"index":3', b'"index": 3')
    head = chain.next_head(decode_line(LOG[2]).signed.head, 3, chain.record_digest(data))
    line = encode_line(data, chain.sign_head(COORDINATOR_SIGNER, FEDERATION, 4, head))
    found = first([*LOG[:3], line])
    assert found.index == 3
    assert "canonical" in found.what


def test_an_accepted_history_that_is_not_this_one_is_named(tmp_path: Path) -> None:
    def accept(size: int, head: bytes) -> list[bytes]:
        record = HistoryAccepted(size=size, head=head, reason="for a test")
        site = recorded().sites["site-1"]
        return rewritten(site, lambda records: records.append((record, records[-1][1])), site_signer("site-1"))

    heads = verify_chain(LOG, ROOTS).heads
    good = judged(tmp_path, LOG, site_1=accept(5, heads[5]))
    assert good.problems == []
    assert "accepted another history at 5 records" in good.notes[0]
    for size, head in ((5, heads[4]), (SIZE + 1, heads[4])):
        (found,) = judged(tmp_path, LOG, site_1=accept(size, head)).problems
        assert "accepted a history that is not this one" in found.what
