"""The published cases of tests/vectors/v1/sharing.json: byte for byte what the generator writes, and each one holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.vectors.generate_graph_sharing import FOLDER, documents

from maskwork.secagg import sharing

Case = dict[str, Any]
ERRORS = {"SharingError": sharing.SharingError}


def good_and_bad(section: str) -> tuple[list[Case], list[Case]]:
    everything: list[Case] = json.loads(Path(FOLDER / "sharing.json").read_text(encoding="utf-8"))[section]
    good, bad = [c for c in everything if "error" not in c], [c for c in everything if "error" in c]
    assert good
    assert bad
    return good, bad


def deal(case: Case) -> list[str]:
    shares = sharing.split(
        bytes.fromhex(case["secret"]),
        holders=case["holders"],
        threshold=case["threshold"],
        rand=bytes.fromhex(case["rand"]),
    )
    return [share.hex() for share in shares]


def put_together(case: Case) -> str:
    coefficients = sharing.lagrange_at_zero([x for x, _ in case["shares"]])
    return sharing.combine_with(coefficients, [bytes.fromhex(share) for _, share in case["shares"]]).hex()


def test_the_file_is_what_the_generator_writes() -> None:
    assert (FOLDER / "sharing.json").read_bytes() == documents()["sharing.json"].encode()


def test_dealings() -> None:
    good, bad = good_and_bad("split")
    for case in good:
        assert deal(case) == case["shares"], case["name"]
    for case in bad:
        with pytest.raises(ERRORS[case["error"]]):
            deal(case)


def test_combinations() -> None:
    good, bad = good_and_bad("combine")
    for case in good:
        assert put_together(case) == case["secret"]
        assert sharing.combine({x: bytes.fromhex(share) for x, share in case["shares"]}).hex() == case["secret"]
        coefficients = sharing.lagrange_at_zero([x for x, _ in case["shares"]])
        assert [f"{c:066x}" for c in coefficients] == case["lagrange_at_zero"]
    for case in bad:
        with pytest.raises(ERRORS[case["error"]]):
            put_together(case)
