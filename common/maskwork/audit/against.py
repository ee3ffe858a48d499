"""Does the coordinator's log tell the history that a site was shown? Pure.

This is what finds what one copy of a log cannot show: records cut off at its end, and a coordinator that wrote its
history anew and signed it again. The site kept signed heads and the digests under them, so the very record is named.
A liar who also holds every site's key and log is not found by anybody.
"""

from __future__ import annotations

from collections.abc import Iterator

from maskwork.audit.chain import DIGEST_BYTES
from maskwork.audit.contents import Facts
from maskwork.audit.records import HeadKept
from maskwork.audit.site_contents import SiteFacts
from maskwork.audit.verify import Chain, Problem


def compare(chain: Chain, facts: Facts, site: Chain, site_facts: SiteFacts) -> Iterator[Problem]:
    """What of the site's log contradicts the coordinator's."""
    if chain.owner is None or site.owner is None or chain.owner.federation != site.owner.federation:
        yield Problem(None, "", "the two logs are not of one federation")
        return
    yield from _heads(chain, site, site_facts)
    yield from _sessions(facts, site, site_facts)


def notes(site: Chain, site_facts: SiteFacts) -> Iterator[str]:
    """What a reader should know although no record is wrong: histories refused, and others accepted."""
    name = "a site" if site.owner is None else site.owner.name
    for index, record in site_facts.refused:
        yield (
            f"{name} refused a history of the coordinator (its record {index}): it holds head "
            f"{record.kept_head.hex()[:16]}… of {record.kept_size} records and was shown "
            f"{record.offered_head.hex()[:16]}… of {record.offered_size}, both signed: {record.detail}"
        )
    if site_facts.accepted_head is not None:
        yield (
            f"{name}'s operator accepted another history at {site_facts.accepted_head.size} records "
            f"(its record {site_facts.accepted}): what it was shown before is not compared"
        )


def _heads(chain: Chain, site: Chain, facts: SiteFacts) -> Iterator[Problem]:
    name = "the site" if site.owner is None else site.owner.name
    accepted = facts.accepted_head
    if accepted is not None and (accepted.size > chain.size or chain.heads[accepted.size] != accepted.head):
        yield Problem(None, "", f"{name} accepted a history that is not this one", by_head=True)
    for index, kept in facts.heads:
        if index < facts.accepted:
            continue
        found = _first_other(chain, kept)
        if found is None:
            if kept.size > chain.size:
                most = max(other.size for at, other in facts.heads if at >= index)
                what = f"the log ends here; {name} holds a signed head of {most} records: it was cut off"
                yield Problem(chain.size, "", what, by_head=True)
                return
            if chain.heads[kept.size] == kept.head:
                continue
            what = f"one of the records from {kept.since} to {kept.size - 1} is not what {name} was shown and holds"
            what = f"{what} a signed head of: history was written anew"
            yield Problem(kept.since, _kind(chain, kept.since), what, by_head=True)
            return
        what = f"not the record that {name} was shown and holds a signed head of: history was written anew"
        yield Problem(found, _kind(chain, found), what, by_head=True)
        return


def _first_other(chain: Chain, kept: HeadKept) -> int | None:
    """The first record of those under a kept head that is another one in the log."""
    for place in range(len(kept.digests) // DIGEST_BYTES):
        index = kept.since + place
        if index >= chain.size:
            return None
        if chain.entries[index].digest != kept.digests[place * DIGEST_BYTES : (place + 1) * DIGEST_BYTES]:
            return index
    return None


def _kind(chain: Chain, index: int) -> str:
    return chain.entries[index].kind if index < chain.size else ""


def _sessions(facts: Facts, site: Chain, site_facts: SiteFacts) -> Iterator[Problem]:
    name = "site" if site.owner is None else site.owner.name
    for session, seen in site_facts.sessions.items():
        if seen.plan_at < site_facts.accepted:
            continue
        mine = facts.sessions.get(session)
        if mine is None:
            what = "the coordinator signed this plan, and its log does not have it"
            yield Problem(seen.plan_at, "plan", what, log=name)
            continue
        if seen.released is not None and seen.signed is not None:
            told = mine.survivors
            sets = (seen.signed.u1, seen.signed.u2, seen.signed.u3)
            if told is None or (told.u1, told.u2, told.u3) != sets:
                what = "this site helped to unmask these survivors, and the coordinator's log has no such record"
                yield Problem(seen.plan_at, "released", what, log=name)
