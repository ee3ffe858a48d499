"""Which job somebody means by what they typed."""

import pytest
from tests.jobs.fake_job_service import summary

from maskwork.errors import UserError
from maskwork.jobs_client import find_job

JOBS = [
    summary("3f9a1c", name="digits"),
    summary("3f9b77", name="lora"),
    summary("a81200", name="chest"),
    summary("a8", name="short"),
    summary("c0ffee", name="lora"),
    summary("d1", name="a81200"),
]


@pytest.mark.parametrize(
    ("wanted", "job_id"),
    [
        ("3f9a1c", "3f9a1c"),
        ("3f9a", "3f9a1c"),
        ("digits", "3f9a1c"),
        ("a8", "a8"),
        ("a81200", "a81200"),
        ("c", "c0ffee"),
    ],
)
def test_an_id_a_prefix_or_a_name(wanted: str, job_id: str) -> None:
    assert find_job(JOBS, wanted).job_id == job_id


@pytest.mark.parametrize("wanted", ["3f9", "lora", "a"])
def test_what_could_be_several_is_refused_with_their_ids(wanted: str) -> None:
    with pytest.raises(UserError, match=r"could be any of [23] jobs") as caught:
        find_job(JOBS, wanted)
    assert all(j.job_id in str(caught.value) for j in JOBS if j.name == wanted or j.job_id.startswith(wanted))


def test_a_name_that_begins_like_another_jobs_id_is_refused() -> None:
    with pytest.raises(UserError, match="could be any of 2"):
        find_job([summary("cafe01", name="x"), summary("77", name="cafe")], "cafe")


@pytest.mark.parametrize("wanted", ["zz", "", "digit", "9a1c"])
def test_what_is_no_job_is_refused(wanted: str) -> None:
    with pytest.raises(UserError, match="maskwork job list"):
        find_job(JOBS, wanted)
