"""The worker's functions: the release equals the plain sum, and what cannot be right is said, not committed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.secagg.cohort import make_plan, statistics_of, survivors_sum, weight_of
from tests.secagg.harness import Federation

from maskwork.coordinator import aggregation
from maskwork.coordinator.aggregation import Convicted, Implausible, Released, ReleaseRequest
from maskwork.coordinator.models import ModelStore
from maskwork.coordinator.shape import SessionShape
from maskwork.secagg import server_states
from maskwork.secagg.client_states import UploadUpdate
from maskwork.secagg.encoding import decode_sum
from maskwork.secagg.keys import rotation_seed
from maskwork.secagg.plan import RoundPlan
from maskwork.tensors import Schema, TensorSpec, read_header, read_vector, write_model


class Session:
    """A finished session of the pure halves, with its uploads and its unmasking job."""

    def __init__(self, folder: Path, *, dies: dict[int, type] | None = None, **changes: object) -> None:
        self.plan: RoundPlan = make_plan(5, **changes)
        self.federation = Federation(self.plan, dies_before=dies).run()
        if not isinstance(self.federation.state, server_states.Completed):
            self.federation.deadline()
        self.shape = SessionShape(self.plan.parameters, self.plan.encoding.ring_bits, len(self.plan.statistics))
        self.survivors = self.federation.survivors
        self.accumulator = folder / "accumulator"
        aggregation.create_accumulator(self.accumulator, self.shape)
        for index in sorted(self.survivors):
            upload = self.federation.members[index].upload
            assert upload is not None
            path = folder / f"upload-{index}"
            path.write_bytes(upload[0] + upload[1])
            aggregation.add_upload(self.accumulator, path, self.shape)
            assert not path.exists()
        self.models = ModelStore(folder / "models")
        self.before = np.linspace(-1, 1, self.plan.parameters, dtype=np.float32)
        schema = Schema((TensorSpec("w", "F32", (self.plan.parameters,)),))
        self.model = self.models.put(lambda path: write_model(path, schema, self.before, {}))

    def request(self) -> ReleaseRequest:
        jobs = [e.job for e in self.federation.effects if isinstance(e, server_states.RemoveMasks)]
        return ReleaseRequest(
            accumulator=self.accumulator,
            shape=self.shape,
            encoding=self.plan.encoding,
            job=jobs[0],
            survivors=len(self.survivors),
            models=self.models.directory,
            model=self.model,
            metadata=(("job", "job-1"), ("round", "3")),
        )

    def expected(self) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
        """The slow obvious twin: the encoded updates of the survivors, added up without a mask."""
        plain = survivors_sum(self.federation.id, self.plan, self.survivors, 0)
        mean = np.empty(self.plan.parameters, np.float32)
        decode_sum(
            plain,
            self.plan.encoding,
            rotation_seed=rotation_seed(self.federation.id),
            total_weight=sum(weight_of(i) for i in self.survivors),
            out_f32=mean,
        )
        return self.before + mean


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return Session(tmp_path)


def test_the_release_is_the_plain_sum_to_the_bit(session: Session) -> None:
    released = aggregation.release(session.request())
    assert isinstance(released, Released)
    path = session.models.path(released.model)
    np.testing.assert_array_equal(read_vector(path)[1], session.expected())
    wanted = [sum(column) for column in zip(*(statistics_of(i) for i in session.survivors), strict=True)]
    assert list(released.statistics) == wanted
    assert dict(read_header(path).metadata) == {"job": "job-1", "round": "3"}


def test_dropouts_after_the_shares_leave_no_mask_behind(tmp_path: Path) -> None:
    session = Session(tmp_path, dies={2: UploadUpdate})
    assert session.survivors == frozenset({0, 1, 3, 4})
    released = aggregation.release(session.request())
    assert isinstance(released, Released)
    np.testing.assert_array_equal(read_vector(session.models.path(released.model))[1], session.expected())


def test_a_release_can_be_repeated_because_the_accumulator_stays_as_it_was(session: Session) -> None:
    before = session.accumulator.read_bytes()
    first = aggregation.release(session.request())
    assert session.accumulator.read_bytes() == before
    assert aggregation.release(session.request()) == first


def test_an_upload_of_another_length_changes_nothing(session: Session, tmp_path: Path) -> None:
    before = session.accumulator.read_bytes()
    for length in (session.shape.upload_bytes - 1, session.shape.upload_bytes + 1, 0):
        upload = tmp_path / "wrong"
        upload.write_bytes(bytes(length))
        with pytest.raises(ValueError, match=f"{length} bytes"):
            aggregation.add_upload(session.accumulator, upload, session.shape)
    assert session.accumulator.read_bytes() == before


def test_a_sum_that_was_cut_short_is_no_sum_of_zeros(session: Session, tmp_path: Path) -> None:
    upload = tmp_path / "upload"
    upload.write_bytes(bytes(session.shape.upload_bytes))
    whole = session.accumulator.read_bytes()
    for kept in (0, 8, len(whole) - 1):
        session.accumulator.write_bytes(whole[:kept])
        with pytest.raises(ValueError, match="cut short"):
            aggregation.add_upload(session.accumulator, upload, session.shape)
        assert upload.exists()


@pytest.mark.parametrize("examples", [4.0, 5 * 100 + 1.0, 100.5, -3.0])
def test_example_counts_that_no_honest_survivors_can_have_are_implausible(session: Session, examples: float) -> None:
    honest = sum(weight_of(i) for i in session.survivors)
    raw = np.memmap(session.accumulator, np.uint8, "r+")
    counted = raw[:8].view(np.uint64)
    counted += np.array([int((examples - honest) * 2**20) % 2**64], np.uint64)
    released = aggregation.release(session.request())
    assert released == Implausible(f"the survivors' example counts add up to {examples}")


def test_a_model_that_is_not_finite_any_more_is_not_kept(session: Session) -> None:
    path = session.models.path(session.model)
    infinite = path.read_bytes()[:-4] + np.float32(np.inf).tobytes()
    model = session.models.put(lambda path: path.write_bytes(infinite))
    kept = sorted(session.models.directory.iterdir())
    released = aggregation.release(replace(session.request(), model=model))
    assert isinstance(released, Implausible)
    assert "not finite" in released.detail
    assert sorted(session.models.directory.iterdir()) == kept


def test_shares_that_do_not_reconstruct_what_was_announced_convict_the_dealer(session: Session) -> None:
    request = session.request()
    seeds = request.job.self_seeds
    tampered = replace(seeds[1], commitment=bytes(32))
    job = replace(request.job, self_seeds=(seeds[0], tampered, *seeds[2:]))
    released = aggregation.release(replace(request, job=job))
    assert isinstance(released, Convicted)
    assert released.dealer == 1


def test_a_damaged_global_model_is_not_built_upon(session: Session) -> None:
    path = session.models.path(session.model)
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(Exception, match="is damaged"):
        aggregation.release(session.request())


def test_a_new_accumulator_never_replaces_another(session: Session) -> None:
    with pytest.raises(FileExistsError):
        aggregation.create_accumulator(session.accumulator, session.shape)
