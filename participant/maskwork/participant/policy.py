"""What a site agrees to: a TOML file at the site, looked at before anything is done for a plan.

The coordinator has no say in it. The keys are here, each rule is a function of `policy_rules`, and `Policy.decide` is
the one mechanism. What the protocol itself demands (thresholds, session binding) holds under any policy and is checked
in the core; so are the rules about members, once more, whenever the members that are left change (`SiteRules`).

The default is strict wherever a site need not be known for it: complete graph, at least one tolerated colluder, no
second survivor set on one model, no list of revocations older than a week. Whom a site trusts, which jobs it wants and
when, only its owner knows.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Final, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from maskwork.participant.hours import Hours
from maskwork.participant.policy_rules import Finding, Refusal, findings
from maskwork.secagg.errors import DeclineCode
from maskwork.secagg.plan import RoundPlan
from maskwork.settings import Section, read_toml

__all__ = ["Finding", "Policy", "Refusal", "read_policy"]

DAY_S: Final = 86_400.0
_NAME: Final = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,126}[a-z0-9])?")


def _only_required(value: object) -> object:
    if value != "required":
        raise ValueError('only "required" is accepted: this program has no path on which an update is not masked')
    return value


def _checked_name(name: str) -> str:
    if _NAME.fullmatch(name) is None:  # a pattern among them: whoever is trusted is trusted by name
        raise ValueError(f"{name[:80]!r} is not a participant's name: it is written out, in a-z, 0-9, '.', '_' and '-'")
    return name


def _checked_pattern(pattern: str) -> str:
    if not pattern:
        raise ValueError("an empty text is the name of nothing: leave the key out to allow all, or remove the text")
    return pattern


Patterns = tuple[Annotated[str, AfterValidator(_checked_pattern)], ...]
Names = tuple[Annotated[str, AfterValidator(_checked_name)], ...]
SecureAggregation = Annotated[Literal["required"], BeforeValidator(_only_required)]


class Policy(Section):
    """A site's rules.

    Attributes:
        jobs: jobs that this site takes part in, by name, by id, or by a pattern with `*`, `?` or `[...]`; empty: every
            job.
        tasks: tasks that jobs may use here, by name or such a pattern; empty: every configured one.
        secure_aggregation: "required", and no other value: there is no path on which an update is not masked.
        max_rounds: most rounds of a job.
        min_cohort: fewest members of a roster.
        min_survivors: fewest members, verified by this site itself, over which a sum may be released.
        trusted_participants: members that this site trusts, by name; it counts itself only if it is named.
        trusted_organisations: organisations all of whose members it trusts; each is a name in `organisations`.
        organisations: members of each organisation. Certificates name none, so this site says who belongs to whom.
        min_trusted_survivors: fewest trusted members, verified by this site itself, over which a sum may be released.
        min_colluders: fewest colluding share holders that a plan must tolerate.
        sparse_graph: whether a neighbour graph may be used for large cohorts; if not, the complete graph is required.
        min_corrupt_permille: on the sparse graph, the least fraction of corrupt members, in thousandths, that a plan's
            search must have assumed.
        min_survivor_difference: on one model, in how many members a later survivor set must differ from an earlier
            one; absent: only the same set is ever answered for.
        min_value_bits: coarsest encoding accepted.
        max_value_bits: finest encoding accepted.
        min_clip_norm: smallest clip norm.
        max_clip_norm: largest clip norm.
        max_weight: most examples that this site may count for.
        min_weight_cap: smallest weight cap accepted. A site refuses to upload when it has more examples than the cap,
            and refusing shows that it has; so let this be above what this site will ever have.
        max_model_bytes: largest model that is downloaded.
        max_participation: of `participation_window` consecutive rounds of a job, the largest share that this site
            takes part in.
        participation_window: rounds over which the share is taken; all rounds of a job that has fewer.
        revocation_list: "required": no plan without a revocation list; "if-published": one must be in order once the
            federation has published any.
        max_revocation_age_days: greatest age of the revocation list.
        hours: when a session may begin.
        privacy_mechanism: not yet enforceable; a policy that sets it is refused.
        max_epsilon: not yet enforceable; a policy that sets it is refused.
        max_delta: not yet enforceable; a policy that sets it is refused.
    """

    jobs: Patterns = ()
    tasks: Patterns = ()
    secure_aggregation: SecureAggregation = "required"
    max_rounds: int = Field(default=1000, ge=1)
    min_cohort: int = Field(default=3, ge=3)
    min_survivors: int = Field(default=3, ge=3)
    trusted_participants: Names = ()
    trusted_organisations: tuple[str, ...] = ()
    organisations: dict[str, Names] = Field(default_factory=dict)
    min_trusted_survivors: int = Field(default=0, ge=0)
    min_colluders: int = Field(default=1, ge=0)
    sparse_graph: bool = False
    min_corrupt_permille: int = Field(default=50, ge=1, lt=500)
    min_survivor_difference: int | None = Field(default=None, ge=2)
    min_value_bits: int = Field(default=8, ge=2, le=32)
    max_value_bits: int = Field(default=24, ge=2, le=32)
    min_clip_norm: float = Field(default=1e-6, gt=0)
    max_clip_norm: float = Field(default=1000.0, gt=0)
    max_weight: int = Field(default=2**31 - 1, ge=1)
    min_weight_cap: int = Field(default=10_000, ge=1)
    max_model_bytes: int = Field(default=16 << 30, ge=1)
    max_participation: float = Field(default=1.0, gt=0, le=1)
    participation_window: int = Field(default=100, ge=1, le=1_000_000)
    revocation_list: Literal["if-published", "required"] = "if-published"
    max_revocation_age_days: float = Field(default=7.0, gt=0, le=3650)
    hours: Hours | None = None
    privacy_mechanism: str | None = None
    max_epsilon: float | None = None
    max_delta: float | None = None

    @field_validator("privacy_mechanism", "max_epsilon", "max_delta", mode="before")
    @classmethod
    def _not_yet(cls, value: object) -> object:
        raise ValueError(
            "not yet enforceable: no plan can carry differential privacy in this version, so a policy that asked for "
            "it would promise what nobody checks; remove the key"
        )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        """Refuse a policy that no plan could pass, or a key of which another one makes nothing."""
        unknown = sorted(set(self.trusted_organisations) - self.organisations.keys())
        if unknown:
            raise ValueError(f"trusted_organisations: {unknown[0][:80]!r} is not in the table [organisations]")
        empty = [name for name in self.trusted_organisations if not self.organisations[name]]
        if empty:
            raise ValueError(f"trusted_organisations: {empty[0][:80]!r} has no members in the table [organisations]")
        if self.trusted and not self.min_trusted_survivors:
            raise ValueError("trusted_participants protects from nothing without min_trusted_survivors: set it")
        if Fraction(str(self.max_participation)) * self.participation_window < 1:
            raise ValueError("max_participation is below one round in a participation_window: no plan could pass")
        if self.min_trusted_survivors > len(self.trusted):
            trusted = f"the {len(self.trusted)} members that are trusted"
            raise ValueError(f"min_trusted_survivors: {self.min_trusted_survivors} are more than {trusted}")
        for least, most in (
            ("min_value_bits", "max_value_bits"),
            ("min_clip_norm", "max_clip_norm"),
            ("min_weight_cap", "max_weight"),
        ):
            if getattr(self, least) > getattr(self, most):
                raise ValueError(f"{least} is above {most}: no plan could pass")
        return self

    @property
    def trusted(self) -> frozenset[str]:
        """Every member that this site trusts, by name or by organisation."""
        by_organisation = (self.organisations[name] for name in self.trusted_organisations)
        return frozenset(self.trusted_participants).union(*by_organisation)

    def decide(self, plan: RoundPlan, *, now: float, rounds_taken: Collection[int]) -> tuple[Refusal, ...]:
        """Every rule that a plan breaks; none: the site takes part.

        Args:
            plan: what is proposed.
            now: seconds since the epoch.
            rounds_taken: rounds of the plan's job that this site has taken up before, from its durable records.
        """
        found = findings(self, plan, now=now, rounds_taken=rounds_taken)
        return tuple(finding.refusal for finding in found if finding.refusal is not None)

    def open_at(self, now: float) -> bool:
        """Whether a session may begin at `now`, in seconds since the epoch."""
        return self.hours is None or self.hours.open_at(now)

    def revocation_refusal(self, number: int, this_update: float | None, now: float) -> Refusal | None:
        """What speaks against the revocation list that the site holds; None if nothing does.

        Args:
            number: the list's number, for the text.
            this_update: when it was signed, in seconds since the epoch; None: the federation has published no list.
            now: seconds since the epoch.
        """
        if this_update is None:
            missing = "no revocation list is published, and this site requires one"
            return Refusal(DeclineCode.REVOCATION, missing) if self.revocation_list == "required" else None
        age_days = (now - this_update) / DAY_S
        if age_days > self.max_revocation_age_days:
            detail = f"revocation list {number} is {age_days:.1f} days old > {self.max_revocation_age_days:g}"
            return Refusal(DeclineCode.REVOCATION, detail)
        return None


def read_policy(path: Path) -> Policy:
    """Read and check a policy file.

    Raises:
        UserError: unreadable, no TOML, or invalid; the text names the file and the key.
    """
    return read_toml(path, Policy, what="a policy")
