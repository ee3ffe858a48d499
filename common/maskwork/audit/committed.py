"""Which models a coordinator's log says were committed, and where its chain stood: what a model file is held against.

It reads no model and no signature (`maskwork.model_signature` does).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from maskwork.audit.reading import judge
from maskwork.errors import UserError
from maskwork.net.identity import TrustRoots


@dataclass(frozen=True, slots=True)
class CommittedModels:
    """What a verified log says of models.

    Attributes:
        models: (job, round) to the digest that the round's commit names, but for rounds that were taken back.
        heads: the chain's head after each number of records, from none on.
    """

    models: dict[tuple[str, int], bytes]
    heads: tuple[bytes, ...]


def committed_models(log: Path, roots: TrustRoots) -> CommittedModels:
    """Verify a coordinator's log and read its commits.

    Raises:
        StoreError: it cannot be read.
        UserError: something is wrong with it, or it is a site's.
    """
    judged = judge(log, roots)
    if judged.problems:
        first, more = judged.problems[0], len(judged.problems) - 1
        rest = f" and {more} more" if more else ""
        raise UserError(f"{log} is not to be relied upon: {first}{rest}. `maskwork audit verify` names every record")
    if judged.facts is None:
        raise UserError(f"{log} is a site's log: the coordinator's has the commits (`maskwork audit fetch`)")
    standing = {
        (job, c.round_number): c.model_out for job, facts in judged.facts.jobs.items() for c in facts.standing()
    }
    return CommittedModels(standing, tuple(judged.chain.heads))
