"""What a run comes to: faults by kind and moment, rounds, attempts, recovery times; as numbers and as a Markdown page.

Pure functions of what was done and written. A recovery is counted as it was, with every other fault that fell into it;
a coordinator that was killed again before it could send a plan has none, and is counted as such.
"""

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tests.chaos.campaign import Struck
from tests.chaos.federation import COORDINATOR, Life
from tests.chaos.plan import KILLS, MOMENTS, Kind
from tests.chaos.written import Written


@dataclass(frozen=True, slots=True)
class Spread:
    """Of some durations: how many, the median and the longest, in seconds."""

    count: int
    median_s: float
    worst_s: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Spread":
        if not seconds:
            return cls(0, 0.0, 0.0)
        return cls(len(seconds), round(statistics.median(seconds), 2), round(max(seconds), 2))


@dataclass(frozen=True, slots=True)
class Figures:
    """What a run came to.

    Attributes:
        seed: Of the plan.
        seconds: The whole run took.
        kills: Faults that were SIGKILLs.
        faults: How many of each kind landed at each moment.
        jobs: Completed.
        rounds: Committed.
        attempts: By how they ended.
        restart_to_plan: From each start of a coordinator after a kill to its next plan.
        killed_before_plan: Starts that were killed again before that.
        fault_to_commit: From each fault to the next committed round.
        violations: What is wrong.
    """

    seed: int
    seconds: float
    kills: int
    faults: dict[tuple[Kind, str], int]
    jobs: int
    rounds: int
    attempts: dict[str, int]
    restart_to_plan: Spread
    killed_before_plan: int
    fault_to_commit: Spread
    violations: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        counts = {
            kind.value: {moment: n for (k, moment), n in sorted(self.faults.items()) if k is kind} for kind in Kind
        }
        spreads = {
            name: {"count": s.count, "median_s": s.median_s, "worst_s": s.worst_s}
            for name, s in (("restart_to_plan", self.restart_to_plan), ("fault_to_commit", self.fault_to_commit))
        }
        return {
            "seed": self.seed,
            "seconds": round(self.seconds, 1),
            "kills": self.kills,
            "faults": counts,
            "jobs": self.jobs,
            "rounds": self.rounds,
            "attempts": self.attempts,
            "killed_before_plan": self.killed_before_plan,
            **spreads,
            "violations": list(self.violations),
        }


def figures(
    written: Written, struck: Sequence[Struck], *, seed: int, seconds: float, violations: Sequence[str]
) -> Figures:
    to_plan, killed_before = restarts_to_plans(written)
    commits = sorted(r.committed_at for r in written.rounds)
    return Figures(
        seed=seed,
        seconds=seconds,
        kills=sum(s.kind in KILLS for s in struck),
        faults=dict(Counter((s.kind, s.landed) for s in struck)),
        jobs=sum(job.state == "completed" for job in written.jobs),
        rounds=len(written.rounds),
        attempts=dict(sorted(Counter(a.outcome or "open" for a in written.attempts).items())),
        restart_to_plan=Spread.of(to_plan),
        killed_before_plan=killed_before,
        fault_to_commit=Spread.of([after[0] - s.at for s in struck if (after := [c for c in commits if c > s.at])]),
        violations=tuple(violations),
    )


def restarts_to_plans(written: Written) -> tuple[list[float], int]:
    """Seconds from each start of a coordinator but the first to the next plan; and how many never sent one.

    The last start of a run, and one that had no job left, may never send one: they are not counted at all.
    """
    plans = sorted(a.opened_at for a in written.attempts)
    starts: list[Life] = [life for life in written.lives if life.service == COORDINATOR][1:]
    found, killed_before = [], 0
    for life in starts:
        following = next((at for at in plans if at >= life.started_at), None)
        if following is not None and (not life.ended_at or following <= life.ended_at):
            found.append(following - life.started_at)
        elif life.killed:
            killed_before += 1
    return found, killed_before


def markdown(f: Figures, command: str) -> str:
    moments = [m for m in MOMENTS if any((kind, m) in f.faults for kind in Kind)]
    head = ["fault", *moments, "all"]
    rows = [[kind.value, *(str(f.faults.get((kind, m), 0)) for m in moments), str(_sum(f, kind=kind))] for kind in Kind]
    rows.append(["all", *(str(_sum(f, moment=m)) for m in moments), str(sum(f.faults.values()))])
    attempts = ", ".join(f"{count} {outcome}" for outcome, count in f.attempts.items())
    measured = [
        ["faults (of these kills)", f"{sum(f.faults.values())} ({f.kills})"],
        ["time", f"{f.seconds / 60:.1f} min"],
        ["jobs completed", str(f.jobs)],
        ["rounds committed", str(f.rounds)],
        ["attempts", f"{sum(f.attempts.values())}: {attempts}"],
        ["coordinator's restart to its next plan, median", f"{f.restart_to_plan.median_s:.2f} s"],
        ["… worst", f"{f.restart_to_plan.worst_s:.2f} s (of {f.restart_to_plan.count})"],
        ["… killed again before it", str(f.killed_before_plan)],
        ["a fault to the next committed round, median", f"{f.fault_to_commit.median_s:.2f} s"],
        ["… worst", f"{f.fault_to_commit.worst_s:.2f} s (of {f.fault_to_commit.count})"],
        ["violations", str(len(f.violations))],
    ]
    parts = [f"`{command}`", _table(head, rows), _table(["", ""], measured)]
    parts += ["\n".join(f"- {wrong}" for wrong in f.violations)] if f.violations else []
    return "\n\n".join(parts) + "\n"


def _sum(f: Figures, *, kind: Kind | None = None, moment: str | None = None) -> int:
    return sum(n for (k, m), n in f.faults.items() if (kind is None or k is kind) and (moment is None or m == moment))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
