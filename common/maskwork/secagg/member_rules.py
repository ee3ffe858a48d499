"""A site's rules about the members that are left in a session, asked whenever fewer may be left than before.

At steps 1, 2 and 3, of U1, U2 and U3: U3 ⊆ U2 ⊆ U1, so a set that is too small at an earlier step cannot lead to one
that is large enough. The check of U2 is the one that protects most: it comes before the update is masked and uploaded,
and an update that was not uploaded is in no sum. The check of U3 stands before this site's signature; what t others
sign without it, it cannot stop (docs/policy.md).

Only members count whose certificate and step-0 signature this participant verified itself; what the coordinator says of
the others is not evidence. NOT here: what the plan itself asks for, which is `client`'s.
"""

from __future__ import annotations

from maskwork.secagg.client_states import SiteRules
from maskwork.secagg.errors import AbortReason, CoordinatorError
from maskwork.secagg.messages import Members
from maskwork.secagg.plan import RoundPlan


def check_members(verified: Members, *, plan: RoundPlan, rules: SiteRules) -> None:
    """Refuse to go on with too few members, or too few trusted ones.

    Args:
        verified: the roster indices that are left, as far as this participant verified them itself; its own included.
        plan: the session's.
        rules: the site's.

    Raises:
        CoordinatorError: POLICY; the text goes to the coordinator's operator and names nobody.
    """
    if len(verified) < rules.min_survivors:
        raise CoordinatorError(
            AbortReason.POLICY,
            f"{len(verified)} survivors verified here are fewer than the policy's {rules.min_survivors}",
        )
    trusted = rules.trusted.intersection(plan.participants(verified))
    if len(trusted) < rules.min_trusted_survivors:
        raise CoordinatorError(
            AbortReason.POLICY,
            f"trusted survivors verified here {len(trusted)} < {rules.min_trusted_survivors}",
        )
