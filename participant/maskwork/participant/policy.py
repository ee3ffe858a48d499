"""What a site agrees to: a TOML file at the site, looked at before anything is done for a plan.

The coordinator has no say in it. `Policy.decide` is the one mechanism: every rule is a line here, later ones are added
here. What the protocol itself demands (thresholds, session binding) holds under any policy and is checked in the core.

The default is strict: complete graph, at least one tolerated colluder, no second survivor set on one model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from maskwork.secagg.errors import DeclineCode
from maskwork.secagg.graph import GraphKind
from maskwork.secagg.plan import RoundPlan
from maskwork.settings import Section, read_toml


@dataclass(frozen=True, slots=True)
class Refusal:
    """One rule that a plan breaks; the detail is shown to the coordinator's operator."""

    code: DeclineCode
    detail: str


class Policy(Section):
    """A site's rules.

    Attributes:
        tasks: tasks that jobs may use here; empty: every configured one.
        min_cohort: fewest members of a roster.
        min_survivors: fewest members, verified by this site itself, over which a sum may be released.
        min_colluders: fewest colluding share holders that a plan must tolerate.
        sparse_graph: whether a neighbour graph may be used for large cohorts.
        min_survivor_difference: on one model, in how many members a later survivor set must differ from an earlier
            one; absent: only the same set is ever answered for.
        max_rounds: most rounds of a job.
        min_value_bits: coarsest encoding accepted.
        max_value_bits: finest encoding accepted.
        max_clip_norm: largest clip norm.
        max_weight: most examples that this site may count for.
        min_weight_cap: smallest weight cap accepted. A site refuses to upload when it has more examples than the cap,
            and refusing shows that it has; so let this be above what this site will ever have.
        min_corrupt_permille: on the sparse graph, the least fraction of corrupt members, in thousandths, that a plan's
            search must have assumed.
        max_model_bytes: largest model that is downloaded.
    """

    tasks: tuple[str, ...] = ()
    min_cohort: int = Field(default=3, ge=3)
    min_survivors: int = Field(default=3, ge=3)
    min_colluders: int = Field(default=1, ge=0)
    sparse_graph: bool = False
    min_survivor_difference: int | None = Field(default=None, ge=2)
    max_rounds: int = Field(default=1_000_000, ge=1)
    min_value_bits: int = Field(default=8, ge=2, le=32)
    max_value_bits: int = Field(default=32, ge=2, le=32)
    max_clip_norm: float = Field(default=1e9, gt=0)
    max_weight: int = Field(default=2**31 - 1, ge=1)
    min_weight_cap: int = Field(default=10_000, ge=1)
    min_corrupt_permille: int = Field(default=50, ge=1, lt=500)
    max_model_bytes: int = Field(default=16 << 30, ge=1)

    def decide(self, plan: RoundPlan) -> tuple[Refusal, ...]:
        """Every rule that a plan breaks; none: the site takes part."""
        return tuple(self._refusals(plan))

    def _refusals(self, plan: RoundPlan) -> Iterator[Refusal]:
        if self.tasks and plan.task not in self.tasks:
            yield Refusal(DeclineCode.TASK, f"task {plan.task} is not among those allowed")
        if plan.cohort < self.min_cohort:
            yield Refusal(DeclineCode.COHORT_TOO_SMALL, f"cohort {plan.cohort} < {self.min_cohort}")
        if plan.cohort < self.min_survivors:
            yield Refusal(DeclineCode.TOO_FEW_SURVIVORS, f"cohort {plan.cohort} < survivors {self.min_survivors}")
        if plan.graph.colluders < self.min_colluders:
            yield Refusal(DeclineCode.COLLUDERS, f"tolerated colluders {plan.graph.colluders} < {self.min_colluders}")
        if plan.graph.kind is GraphKind.SPARSE:
            yield from self._sparse_refusals(plan)
        if plan.rounds_total > self.max_rounds:
            yield Refusal(DeclineCode.POLICY, f"rounds {plan.rounds_total} > {self.max_rounds}")
        yield from self._encoding_refusals(plan)

    def _sparse_refusals(self, plan: RoundPlan) -> Iterator[Refusal]:
        if not self.sparse_graph:
            yield Refusal(DeclineCode.GRAPH, "the sparse graph is not allowed here")
        if plan.graph.corrupt_permille < self.min_corrupt_permille:
            assumed = f"corrupt members assumed {plan.graph.corrupt_permille} < {self.min_corrupt_permille} per mille"
            yield Refusal(DeclineCode.GRAPH, assumed)
        if plan.graph.degree + 1 < self.min_survivors:  # a site verifies its neighbours and itself, nobody else
            seen = f"{plan.graph.degree + 1} members seen here < survivors {self.min_survivors}"
            yield Refusal(DeclineCode.TOO_FEW_SURVIVORS, seen)

    def _encoding_refusals(self, plan: RoundPlan) -> Iterator[Refusal]:
        encoding = plan.encoding
        if not self.min_value_bits <= encoding.value_bits <= self.max_value_bits:
            allowed = f"{self.min_value_bits}..{self.max_value_bits}"
            yield Refusal(DeclineCode.ENCODING, f"value bits {encoding.value_bits} not within {allowed}")
        if encoding.clip_norm > self.max_clip_norm:
            yield Refusal(DeclineCode.ENCODING, f"clip norm {encoding.clip_norm:g} > {self.max_clip_norm:g}")
        if encoding.weight_cap < self.min_weight_cap:
            yield Refusal(DeclineCode.ENCODING, f"weight cap {encoding.weight_cap} < {self.min_weight_cap}")
        if encoding.weight_cap > self.max_weight:
            yield Refusal(DeclineCode.ENCODING, f"weight cap {encoding.weight_cap} > {self.max_weight}")


def read_policy(path: Path) -> Policy:
    """Read and check a policy file.

    Raises:
        UserError: unreadable, no TOML, or invalid; the text names the file and the key.
    """
    return read_toml(path, Policy, what="a policy")
