"""Why a participant is out of an attempt, for people: "site-b declined: cohort 4 < 5".

One wording for the coordinator's log, the reason why a job waits or failed, `maskwork job show` and `maskwork job
watch`. A refusal of a site's own policy reads as one; everything else is named by its `DropReason`. Pure text: what
follows from a drop is the coordinator's business.
"""

from __future__ import annotations

from typing import Final

from maskwork.secagg.errors import AbortReason, DeclineCode, DropReason

_OWN_WORDS: Final = ("declined: ", "withdrew: ")
_CODES: Final = frozenset(code.value for code in DeclineCode)


def because(reason: str, detail: str) -> str:
    """Why one is out, without its name: "declined: cohort 4 < 5", or "deadline (no answer before the deadline)"."""
    if reason == DropReason.DECLINED.value:
        return f"declined: {_without_code(detail)}"
    policy = f"{AbortReason.POLICY.value}: "
    if reason == DropReason.WITHDREW.value and detail.startswith(policy):
        return f"withdrew: {detail.removeprefix(policy)}"
    return f"{reason} ({detail})" if detail else reason


def named(participant: str, why: str) -> str:
    """Who is out and why, given what `because` said: "site-b declined: cohort 4 < 5"."""
    return f"{participant} {why}" if why.startswith(_OWN_WORDS) else f"{participant}: {why}"


def decline_code(reason: str, detail: str) -> DeclineCode | None:
    """The code of a site that declined; None for any other drop."""
    code = detail.partition(": ")[0]
    return DeclineCode(code) if reason == DropReason.DECLINED.value and code in _CODES else None


def _without_code(detail: str) -> str:
    code, _, said = detail.partition(": ")
    return said if code in _CODES and said else detail
