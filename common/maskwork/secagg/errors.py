"""The error tree of the protocol core and the enumerated reasons that travel with it.

Four kinds, never mixed: a peer misbehaved (`PeerError`), we misused our own API (`IllegalEvent`, a
`RuntimeError`), the world failed (not here: the core touches no world), and the round ended early, which is
not an exception at all but a state (`Aborted`, in `client` and `server`).

The enumerations are stable: their values are logged, stored and sent. The text of an exception is for our
own log; a peer is told the code and a short generic phrase (`phrase`), never the detail.
"""

from __future__ import annotations

from enum import StrEnum


class DropReason(StrEnum):
    """Why the coordinator leaves one participant out of the rest of a session."""

    MALFORMED = "malformed"
    WRONG_STAGE = "wrong-stage"
    NOT_A_MEMBER = "not-a-member"
    CONFLICTING_REPEAT = "conflicting-repeat"
    BAD_SIGNATURE = "bad-signature"
    DEGENERATE_KEY = "degenerate-key"
    REPEATED_KEY = "repeated-key"
    WRONG_RECIPIENTS = "wrong-recipients"
    WRONG_COMMITMENTS = "wrong-commitments"
    WRONG_LENGTH = "wrong-length"
    WRONG_SHARES = "wrong-shares"
    SHARE_MISMATCH = "share-mismatch"
    FALSE_ACCUSATION = "false-accusation"
    DISHONEST_DEALER = "dishonest-dealer"
    DISPUTED_CIPHERTEXT = "disputed-ciphertext"
    EQUIVOCATED_DEALER = "equivocated-dealer"
    DEADLINE = "deadline"
    DISCONNECTED = "disconnected"
    DECLINED = "declined"
    WITHDREW = "withdrew"
    REVOKED = "revoked"


class AbortReason(StrEnum):
    """Why a session ended before its sum was released. Used by both halves."""

    # Either half.
    TOO_FEW_PARTICIPANTS = "too-few-participants"
    CANCELLED = "cancelled"
    STORAGE_FAILED = "storage-failed"
    # The coordinator's half.
    COMPLAINT_UPHELD = "complaint-upheld"
    COMPLAINT_REJECTED = "complaint-rejected"
    COMPLAINT_DISPUTED = "complaint-disputed"
    DEALER_EQUIVOCATED = "dealer-equivocated"
    AGGREGATION_FAILED = "aggregation-failed"
    # The participant's half: the coordinator, or a neighbour it relays, failed a check.
    BAD_PLAN = "bad-plan"
    BAD_PLAN_SIGNATURE = "bad-plan-signature"
    WRONG_MODEL = "wrong-model"
    NOT_IN_ROSTER = "not-in-roster"
    UNSAFE_THRESHOLD = "unsafe-threshold"
    UNEXPECTED_MESSAGE = "unexpected-message"
    EQUIVOCATION = "equivocation"
    BAD_SETS = "bad-sets"
    WRONG_NEIGHBOURS = "wrong-neighbours"
    BAD_CERTIFICATE = "bad-certificate"
    BAD_PEER_SIGNATURE = "bad-peer-signature"
    DEGENERATE_KEY = "degenerate-key"
    REPEATED_KEY = "repeated-key"
    BAD_COMMITMENT_PROOF = "bad-commitment-proof"
    COMPLAINED = "complained"
    TOO_FEW_SIGNATURES = "too-few-signatures"
    SAME_MODEL = "same-model"
    RING_CUT = "ring-cut"
    TRAINING_FAILED = "training-failed"
    ENCODING_REFUSED = "encoding-refused"
    POLICY = "policy"
    """What is left of the cohort is not what the site's own policy asks for."""


class DeclineCode(StrEnum):
    """Why a participant will not take part in a plan. The detail that goes with it is shown to the operator."""

    POLICY = "policy"
    COHORT_TOO_SMALL = "cohort-too-small"
    TOO_FEW_SURVIVORS = "too-few-survivors"
    COLLUDERS = "colluders"
    UNSAFE_THRESHOLD = "unsafe-threshold"
    GRAPH = "graph"
    ENCODING = "encoding"
    TASK = "task"
    TRAINING_CONFIG = "training-config"
    WRONG_MODEL = "wrong-model"
    STALE_ATTEMPT = "stale-attempt"
    SAME_MODEL = "same-model"
    REVOCATION = "revocation"
    AUDIT = "audit"
    PRIVACY = "privacy"
    NOT_IN_ROSTER = "not-in-roster"
    BAD_PLAN = "bad-plan"
    BUSY = "busy"
    PAUSED = "paused"
    """Not now; the site connects anew when it can be asked again."""
    PARTICIPATION = "participation"
    """Not in this round; the site can be asked again in a later one."""


class PeerError(Exception):
    """A peer broke the protocol. Carries the enumerated reason; the detail is for our own log only."""

    def __init__(self, reason: DropReason, detail: str) -> None:
        super().__init__(f"{reason.value}: {detail}")
        self.reason = reason
        self.detail = detail

    @property
    def phrase(self) -> str:
        """What the peer itself may be told."""
        return f"refused: {self.reason.value}"


class CoordinatorError(Exception):
    """The coordinator, or what it relayed, failed a check of the participant. The session is over for us."""

    def __init__(self, reason: AbortReason, detail: str) -> None:
        super().__init__(f"{reason.value}: {detail}")
        self.reason = reason
        self.detail = detail


class PlanRefused(Exception):
    """A participant will not take part in a plan; becomes a `Decline` message."""

    def __init__(self, code: DeclineCode, detail: str) -> None:
        super().__init__(f"{code.value}: {detail}")
        self.code = code
        self.detail = detail


class PlanError(ValueError):
    """A round plan contradicts itself, is not canonical, or is out of range."""


class DealerEquivocated(Exception):
    """Shares that match a dealer's signed commitments reconstruct a secret that does not match its public half."""

    def __init__(self, dealer: int, secret: str) -> None:
        super().__init__(dealer, secret)  # both, so that it can be sent from process to process
        self.dealer = dealer
        self.secret = secret

    def __str__(self) -> str:
        return f"the shares that participant {self.dealer} dealt of its {self.secret} do not reconstruct it"


class IllegalEvent(RuntimeError):
    """Our own code fed a state machine an event that its state does not admit; the state is unchanged."""
