"""Writes tests/vectors/v1/graph.json and sharing.json: cases by which another implementation can check itself.

Run ``python tests/vectors/generate_graph_sharing.py``; the files change only with the version of the protocol.
Good cases state inputs and outputs. Bad ones state, under ``error``, the exception that must come, and under
``because`` why. Bytes are hexadecimal, fractions are ``"numerator/denominator"``, each x is a roster index + 1, and
the random bytes of a dealing are SHAKE-256 of a label, so that nothing here depends on a generator of ours.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

from maskwork.secagg.graph import (
    ABSENT_DIGEST,
    ThreatModel,
    complete_graph,
    complete_threshold,
    cuts_ring,
    find_parameters,
    graph_seed,
    harary_graph,
    parts_ring,
    window_bound,
    window_pair_bound,
)
from maskwork.secagg.sharing import PRIME, coefficient_bytes, lagrange_at_zero, split

Value = str | int | bool | Sequence["Value"] | Mapping[str, "Value"]
Case = dict[str, Value]

FOLDER = Path(__file__).parent / "v1"
HONEST, MALICIOUS = ThreatModel.SEMI_HONEST, ThreatModel.SEMI_MALICIOUS
SEED_WITH_REJECTION = (28).to_bytes(32, "big")
"""With 20,000 nodes this seed makes the shuffle throw a word away."""


def stream(length: int, label: str) -> bytes:
    """Bytes that anyone can make again."""
    return hashlib.shake_256(b"maskwork/v1/test-vector/" + label.encode()).digest(length)


def parameters() -> list[Case]:
    """Rows of the search for (k, t)."""
    wanted = [(HONEST, 5, 5, 10**e, 40) for e in range(1, 7)]
    wanted += [(MALICIOUS, 5, 5, 10**e, 40) for e in range(1, 7)]
    wanted += [(MALICIOUS, 10, 10, 10**e, 40) for e in range(2, 7)]
    wanted += [(MALICIOUS, 5, 30, 1_000, 40)]
    wanted += [
        (MALICIOUS, c, d, n, 100) for c, d in ((5, 5), (10, 10), (5, 30)) for n in (129, 200, 500, 1_000, 10_000)
    ]
    cases: list[Case] = []
    for model, corrupt, dropout, population, sigma in wanted:
        shares = Fraction(corrupt, 100), Fraction(dropout, 100)
        found = find_parameters(population, corrupt=shares[0], dropout=shares[1], model=model, sigma=sigma, eta=20)
        cases.append(
            search_arguments(model, corrupt, dropout, population=population, sigma=sigma)
            | {"degree": found.degree, "threshold": found.threshold}
        )
    bad = {
        "corrupt + 2·dropout exceeds 9/10": (MALICIOUS, 33, 33, 1_000, 100),
        "no degree below n - 1 is safe": (MALICIOUS, 30, 30, 20, 100),
        "fewer than 3 participants": (MALICIOUS, 5, 5, 2, 100),
    }
    for because, (model, corrupt, dropout, population, sigma) in bad.items():
        arguments = search_arguments(model, corrupt, dropout, population=population, sigma=sigma)
        cases.append(arguments | {"error": "GraphError", "because": because})
    return cases


def search_arguments(model: ThreatModel, corrupt: int, dropout: int, *, population: int, sigma: int) -> Case:
    """What `find_parameters` takes."""
    return {
        "model": model.value,
        "corrupt": f"{corrupt}/100",
        "dropout": f"{dropout}/100",
        "population": population,
        "sigma": sigma,
        "eta": 20,
    }


def thresholds() -> list[Case]:
    """What `check_threshold` lets pass, and what it refuses."""
    cases: list[Case] = []
    for n, colluders in ((3, 0), (4, 1), (5, 2), (7, 2), (10, 3), (128, 42)):
        t = complete_threshold(n)
        cases.append({"threshold": t, "holders": n, "colluders": colluders, "cohort": n, "complete_threshold": t})
    cases.append({"threshold": 194, "holders": 336, "colluders": 51, "cohort": 1_000})
    bad = {
        "cohort < 3": (2, 2, 0, 2),
        "t < 1": (0, 5, 0, 5),
        "t > m": (6, 5, 0, 5),
        "2t = m + c": (4, 5, 3, 5),
        "2t < m + c": (194, 336, 53, 1_000),
        "c < 0": (3, 6, -1, 7),
    }
    for because, (t, holders, colluders, cohort) in bad.items():
        arguments: Case = {"threshold": t, "holders": holders, "colluders": colluders, "cohort": cohort}
        cases.append(arguments | {"error": "ThresholdError", "because": because})
    return cases


def seeds() -> list[Case]:
    """`graph_seed`."""
    session = stream(32, "session")
    everyone = [stream(32, f"advertisement {i}") for i in range(4)]
    cases: list[Case] = []
    for digests in (everyone, [*everyone[:1], ABSENT_DIGEST, *everyone[2:]], everyone[::-1], []):
        seed = graph_seed(session, digests)
        cases.append(
            {"session_id": session.hex(), "advertisement_digests": [d.hex() for d in digests], "seed": seed.hex()}
        )
    for because, one, digest in (
        ("session id of 31 bytes", session[1:], everyone[0]),
        ("an absent member left out of its digest", session, b""),
    ):
        arguments: Case = {"session_id": one.hex(), "advertisement_digests": [digest.hex()]}
        cases.append(arguments | {"error": "GraphError", "because": because})
    return cases


def graphs() -> list[Case]:
    """Ring orders, neighbours and holders; the large one by its hash."""
    cases: list[Case] = []
    for n, degree, label in ((3, 2, "a"), (12, 4, "b"), (12, 4, "c"), (13, 12, "d"), (200, 30, "e")):
        seed = stream(32, f"graph {label}")
        made = harary_graph(n, degree, seed)
        cases.append(
            {
                "population": n,
                "degree": degree,
                "seed": seed.hex(),
                "ring_order": list(made.ring_order),
                "neighbours_of_first_and_last": [list(made.neighbours(0)), list(made.neighbours(n - 1))],
            }
        )
    order = harary_graph(20_000, 90, SEED_WITH_REJECTION).ring_order
    digest = hashlib.sha256(b"".join(node.to_bytes(4, "big") for node in order)).hexdigest()
    large: Case = {"population": 20_000, "degree": 90, "seed": SEED_WITH_REJECTION.hex()}
    cases.append(large | {"sha256_of_ring_order_as_4_byte_big_endian": digest})
    complete = complete_graph(4)
    cases.append({"population": 4, "complete": True, "holders_of_1": list(complete.holders(1))})
    for because, n, degree, seed in (
        ("odd degree", 12, 5, bytes(32)),
        ("degree not below n", 12, 12, bytes(32)),
        ("degree 0", 12, 0, bytes(32)),
        ("seed of 31 bytes", 12, 4, bytes(31)),
        ("fewer than 3 nodes", 2, 2, bytes(32)),
    ):
        arguments: Case = {"population": n, "degree": degree, "seed": seed.hex()}
        cases.append(arguments | {"error": "GraphError", "because": because})
    return cases


def bounds() -> list[Case]:
    """How many corrupt nodes one run, and two separate runs, may hold; σ = 100."""
    cases: list[Case] = []
    for n, corrupt, window in ((129, 5, 10), (500, 5, 27), (1_000, 5, 168), (1_000, 10, 66), (10_000, 10, 86)):
        share = Fraction(corrupt, 100)
        cases.append(
            {
                "population": n,
                "corrupt": f"{corrupt}/100",
                "window": window,
                "sigma": 100,
                "window_bound": window_bound(n, corrupt=share, window=window, sigma=100),
                "window_pair_bound": window_pair_bound(n, corrupt=share, window=window, sigma=100),
            }
        )
    return cases


def cuts() -> list[Case]:
    """Survivor sets on one graph, told by the ring positions that are missing."""
    seed = stream(32, "graph cut")
    made = harary_graph(20, 6, seed)
    cases: list[Case] = []
    for missing, bound in (
        ((), 0),
        ((2, 3, 4), 0),
        ((2, 3), 0),
        ((2, 3), 1),
        ((19, 0, 1), 0),
        ((2, 3, 4, 10, 11, 12), 0),
        ((2, 3, 4, 5, 6, 7), 0),
        ((2, 3, 4, 5, 6, 7, 8), 0),
        ((2, 3, 11, 12), 2),
        ((2, 3, 11, 12), 1),
    ):
        survivors = sorted(set(range(20)) - {made.ring_order[p] for p in missing})
        cases.append(
            {
                "population": 20,
                "degree": 6,
                "seed": seed.hex(),
                "survivors": survivors,
                "bound": bound,
                "cuts_ring": cuts_ring(made, survivors, bound),
                "parts_ring": parts_ring(made, survivors, bound),
            }
        )
    return cases


def dealings() -> list[Case]:
    """`split`, with the polynomial's random bytes."""
    cases: list[Case] = []
    for name, secret, holders, threshold, rand in (
        ("five holders, four suffice", stream(32, "s1"), range(1, 6), 4, stream(192, "r1")),
        ("roster with gaps", stream(32, "s2"), (2, 3, 5, 8, 13), 3, stream(128, "r2")),
        ("one share suffices", stream(32, "s3"), (1, 2), 1, b""),
        ("largest secret, largest random bytes", b"\xff" * 32, (1, 2, 3), 3, b"\xff" * 128),
        ("zero top coefficient", stream(32, "s4"), (1, 2, 3), 3, stream(64, "r4") + bytes(64)),
        ("coefficient equal to the prime is zero", bytes(32), (1, 2), 2, PRIME.to_bytes(64, "big")),
        ("largest x", stream(32, "s5"), (1, 2**32 - 1), 2, stream(64, "r5")),
        ("longer than one run of reductions", stream(32, "s6"), range(1, 41), 37, stream(coefficient_bytes(37), "r6")),
    ):
        shares = split(secret, holders=list(holders), threshold=threshold, rand=rand)
        arguments = split_arguments(name, secret, holders, threshold=threshold, rand=rand)
        cases.append(arguments | {"shares": [share.hex() for share in shares]})
    secret, rand = stream(32, "bad"), stream(64, "bad")
    for because, bad in {
        "a repeated x": split_arguments("bad", secret, (1, 2, 2), threshold=2, rand=rand),
        "x = 0 is the secret itself": split_arguments("bad", secret, (0, 1, 2), threshold=2, rand=rand),
        "x above 2^32 - 1": split_arguments("bad", secret, (1, 2**32), threshold=2, rand=rand),
        "more shares needed than dealt": split_arguments("bad", secret, (1,), threshold=2, rand=rand),
        "threshold 0": split_arguments("bad", secret, (1, 2), threshold=0, rand=b""),
        "random bytes for another threshold": split_arguments("bad", secret, (1, 2, 3), threshold=3, rand=rand),
        "secret of 31 bytes": split_arguments("bad", secret[1:], (1, 2), threshold=2, rand=rand),
    }.items():
        cases.append(bad | {"error": "SharingError", "because": because})
    return cases


def split_arguments(name: str, secret: bytes, holders: Sequence[int], *, threshold: int, rand: bytes) -> Case:
    """What `split` takes."""
    return {
        "name": name,
        "secret": secret.hex(),
        "holders": list(holders),
        "threshold": threshold,
        "rand": rand.hex(),
    }


def combinations() -> list[Case]:
    """Shares put together: [x, share] pairs."""
    secret = stream(32, "combine")
    xs = (1, 2, 3, 4, 5)
    shares = dict(zip(xs, split(secret, holders=xs, threshold=3, rand=stream(128, "combine")), strict=True))
    cases: list[Case] = []
    for chosen in ((1, 2, 3), (5, 1, 4), (1, 2, 3, 4, 5)):
        cases.append(
            {
                "shares": [[x, shares[x].hex()] for x in chosen],
                "lagrange_at_zero": [f"{c:066x}" for c in lagrange_at_zero(chosen)],
                "secret": secret.hex(),
            }
        )
    one, two, three = ([x, shares[x].hex()] for x in (1, 2, 3))
    bad: dict[str, list[list[int | str]]] = {
        "a repeated x": [one, two, one],
        "x = 0": [[0, shares[1].hex()], two, three],
        "x above 2^32 - 1": [[2**32, shares[1].hex()], two, three],
        "no shares": [],
        "a share equal to the prime is not canonical": [[1, PRIME.to_bytes(33, "big").hex()], two, three],
        "a share of 32 bytes": [[1, shares[1][1:].hex()], two, three],
        "a share of 34 bytes": [[1, "00" + shares[1].hex()], two, three],
        "the combined value is 2^256, which no 32-byte secret is": [[1, (1 << 256).to_bytes(33, "big").hex()]],
    }
    for because, pairs in bad.items():
        cases.append({"shares": pairs, "error": "SharingError", "because": because})
    return cases


def documents() -> dict[str, str]:
    """The text of each file, by name."""
    graph: dict[str, Value] = {
        "parameters": parameters(),
        "thresholds": thresholds(),
        "seeds": seeds(),
        "graphs": graphs(),
        "bounds": bounds(),
        "cuts": cuts(),
    }
    sharing: dict[str, Value] = {"prime": f"{PRIME:066x}", "split": dealings(), "combine": combinations()}
    return {
        name: json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        for name, content in (("graph.json", graph), ("sharing.json", sharing))
    }


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, text in documents().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
