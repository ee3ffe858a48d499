"""Logs from files, judged: the one way in which commands and reports come to know what a log says.

It reads and hands over; what is checked is `verify`'s, `contents`', `site_contents`' and `against`'s.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from maskwork.audit import against
from maskwork.audit.contents import Facts, examine
from maskwork.audit.log import read_lines
from maskwork.audit.site_contents import SiteFacts, examine_site
from maskwork.audit.verify import Chain, Problem, verify_chain
from maskwork.net.identity import Role, TrustRoots


@dataclass(frozen=True, slots=True)
class SiteLog:
    """A site's log, read and judged."""

    chain: Chain
    facts: SiteFacts

    @property
    def name(self) -> str:
        """The site's."""
        return "" if self.chain.owner is None else self.chain.owner.name


@dataclass(slots=True)
class Judged:
    """A log with everything that was found wrong with it, and with sites' logs beside it.

    Attributes:
        chain: its records.
        facts: what a coordinator's log says; None for a site's log.
        sites: the sites' logs that it was compared with.
        problems: every record that something is wrong with.
        notes: what a reader should know although no record is wrong.
    """

    chain: Chain
    facts: Facts | None = None
    sites: list[SiteLog] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def judge(path: Path, roots: TrustRoots, site_logs: Iterable[Path] = ()) -> Judged:
    """Read a log and judge it; a coordinator's also against the logs of sites.

    What records say about each other is looked at only where the chain is whole: in a broken one everything that
    follows would be named too.

    Raises:
        StoreError: a file cannot be read.
    """
    chain = verify_chain(read_lines(path), roots)
    judged = Judged(chain, problems=list(chain.problems))
    if chain.owner is not None and chain.owner.role is Role.PARTICIPANT:
        _judge_site(judged, SiteLog(chain, _site_facts(chain, roots)))
        judged.problems.extend(
            Problem(None, "", f"{other}: only a coordinator's log is compared with those of sites")
            for other in site_logs
        )
        return judged
    judged.facts = examine(chain, roots)
    judged.problems.extend([] if chain.problems else judged.facts.problems)
    for other in site_logs:
        site_chain = verify_chain(read_lines(other), roots)
        site = SiteLog(site_chain, _site_facts(site_chain, roots))
        judged.sites.append(site)
        _judge_site(judged, site, log=site.name or str(other))
        if not chain.problems and not site_chain.problems:
            judged.problems.extend(against.compare(chain, judged.facts, site_chain, site.facts))
    return judged


def _site_facts(chain: Chain, roots: TrustRoots) -> SiteFacts:
    return SiteFacts() if chain.problems else examine_site(chain, roots)


def _judge_site(judged: Judged, site: SiteLog, log: str = "") -> None:
    """Take in what is wrong with a site's log by itself."""
    if log and site.chain.owner is not None and site.chain.owner.role is not Role.PARTICIPANT:
        judged.problems.append(Problem(None, "", f"the log of {site.chain.owner.uri} is not a site's", log=log))
    if log:
        judged.problems.extend(Problem(p.index, p.kind, p.what, log) for p in site.chain.problems)
    judged.problems.extend(Problem(p.index, p.kind, p.what, log) for p in site.facts.problems)
    judged.notes.extend(against.notes(site.chain, site.facts))
