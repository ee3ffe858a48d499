"""Events of an invented job, short to write."""

from maskwork.job_events import (
    Answered,
    AttemptOpened,
    Dropped,
    JobEvent,
    RoundCommitted,
    StageOpened,
)

JOB = "3f9a1c"
SITES = ("north", "south", "east", "west", "centre")
T0 = 1_790_000_000.0
STATISTICS = {"examples": 1437.0, "train.loss": 0.5, "eval.examples": 360.0, "eval.loss": 0.75, "eval.accuracy": 0.875}


def attempt_opened(round_number: int = 1, attempt: int = 1, *, sites: tuple[str, ...] = SITES) -> AttemptOpened:
    return AttemptOpened(JOB, T0, round_number, attempt, sites, 4, bytes(32))


def stage_opened(
    stage: str, round_number: int = 1, attempt: int = 1, *, at: float = T0, expected: tuple[str, ...] = SITES
) -> StageOpened:
    return StageOpened(JOB, at, round_number, attempt, stage, expected)


def answered(stage: str, site: str, round_number: int = 1, attempt: int = 1) -> Answered:
    return Answered(JOB, T0, round_number, attempt, stage, site)


def dropped(site: str, round_number: int = 1, attempt: int = 1, *, stage: str = "masked-update") -> Dropped:
    return Dropped(JOB, T0, round_number, attempt, stage, site, "deadline", "no answer before the deadline")


def committed(round_number: int = 1, attempt: int = 1, *, dropouts: tuple[str, ...] = ()) -> RoundCommitted:
    return RoundCommitted(
        job_id=JOB,
        at=T0 + 10 * round_number,
        round_number=round_number,
        attempt=attempt,
        survivors=tuple(site for site in SITES if site not in dropouts),
        dropouts=dropouts,
        statistics=STATISTICS,
        stage_seconds={"masked-update": 1.0},
        seconds=1.5,
        uplink_bytes=2_090_000,
        model_digest=bytes(32),
        committed_at=T0 + 10 * round_number,
    )


def whole_round(round_number: int = 1) -> list[JobEvent]:
    """A round in which north falls silent during the upload."""
    left = SITES[1:]
    return [
        attempt_opened(round_number),
        stage_opened("advertise-keys", round_number),
        *(answered("advertise-keys", site, round_number) for site in SITES),
        stage_opened("masked-update", round_number),
        *(answered("masked-update", site, round_number) for site in left),
        dropped("north", round_number),
        committed(round_number, dropouts=("north",)),
    ]
