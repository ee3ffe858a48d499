"""Training, in the worker process: the global model in, the update kept in memory, the masked update out.

`maskwork.participant.training_calls` has the requests and results, and the same functions for a caller without torch.

It is NOT where a model is optimised (the site's `Task` does that), and it opens no connection.

Rules it upholds:

1. An unmasked update is never written to disk and never leaves this process. One is kept, under its session.
2. Only parameters that require grad are federated, and the buffers that belong to the state dict if the task says so.
3. Given the global model, the config and the seed, training gives the same update: torch runs on a fixed number of
   threads with deterministic algorithms, and nothing but the global model lives from round to round.
4. NaN and infinity are refused with the tensor's name, before an update exists.
"""

import hashlib
import os
import random
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np
import torch
from torch import Tensor, nn

from maskwork.errors import UserError
from maskwork.metrics import statistic_values
from maskwork.participant.training_calls import MaskRequest, MaskResult, TaskInfo, TrainRequest, TrainSummary
from maskwork.secagg.encoding import encode_statistics
from maskwork.secagg.masking import MaskedTiles, mask_statistics
from maskwork.secagg.ring import packed_size
from maskwork.task import Task, TaskError, TrainingConfig, TrainingError, checked_metrics, load_task
from maskwork.tensors import Float32Array, Schema, TensorSpec, first_non_finite, read_finite_vector

_DTYPES: Final[Mapping[torch.dtype, str]] = {
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
_MODEL_SEED: Final = 0  # what a model draws when it is built is overwritten by the global model, or must not differ


class Trainer:
    """A task's module, and training rounds on it. The task's data must have been loaded."""

    def __init__(self, task: Task) -> None:
        """Build the task's module.

        Raises:
            TaskError: It has nothing to federate, or a tensor of a dtype that cannot be.
        """
        self._task = task
        seed_generators(_MODEL_SEED)
        self._model = task.build_model()
        self.schema = schema_of(federated_tensors(task, self._model))
        names = {spec.name for spec in self.schema.tensors}
        self._local = {
            name: buffer.detach().clone() for name, buffer in self._model.named_buffers() if name not in names
        }
        saved = self._model.state_dict().keys()
        self.info = TaskInfo(
            self.schema, tuple(name for name, b in self._local.items() if name in saved and b.is_floating_point())
        )

    def run(
        self, model_vector: Float32Array, config: TrainingConfig, seed: int, *, out: Float32Array | None = None
    ) -> tuple[Float32Array, TrainSummary]:
        """One round: evaluate the global model, train it, and take the difference.

        Args:
            model_vector: float32[d], the global model; left as it is, unless it is `out` too.
            config: The job's training config.
            seed: See `Task.train`.
            out: float32[d] for the update; None: a vector of its own.

        Returns:
            The update float32[d], trained minus global, and what was measured.

        Raises:
            TrainingError: Something is not finite, or the task reported nonsense; the text says where.
        """
        started = time.perf_counter()
        model, task = self._model, self._task
        self._load(model_vector)
        with torch.no_grad():
            evaluated = task.evaluate(model.eval())
        evaluation_metrics = checked_metrics("evaluation", evaluated, least=0)
        self._load(model_vector)  # whatever an evaluation may have left behind
        seed_generators(seed)
        trained = task.train(model.train(), config, seed=seed)
        train_metrics = checked_metrics("training", trained, least=1)
        model.zero_grad(set_to_none=True)
        update = self._trained_minus(model_vector, np.empty_like(model_vector) if out is None else out)
        summary = TrainSummary(
            examples=trained.examples,
            train_metrics=train_metrics,
            evaluation_examples=evaluated.examples,
            evaluation_metrics=evaluation_metrics,
            update_norm=float(np.linalg.norm(update)),
            seconds=time.perf_counter() - started,
        )
        return update, summary

    def _load(self, model_vector: Float32Array) -> None:
        load_vector(federated_tensors(self._task, self._model), self.schema, model_vector)
        with torch.no_grad():
            buffers = dict(self._model.named_buffers())
            for name, value in self._local.items():
                buffers[name].copy_(value)

    def _trained_minus(self, model_vector: Float32Array, out: Float32Array) -> Float32Array:
        tensors = federated_tensors(self._task, self._model)
        if difference := self.schema.difference(schema_of(tensors)):
            raise TrainingError(f"training changed which tensors are federated: {difference} (after training)")
        readable = model_vector if model_vector.flags.writeable else model_vector.copy()  # torch warns of others
        before, after = torch.from_numpy(readable), torch.from_numpy(out)
        with torch.no_grad():
            for spec, start, stop in self.schema.spans():
                trained = tensors[spec.name].to(torch.float32).reshape(-1)
                torch.sub(trained, before[start:stop], out=after[start:stop])
        if (at := first_non_finite(out)) is not None:  # whatever is subtracted, NaN and infinity stay what they are
            name = self.schema.tensor_at(at).name
            raise TrainingError(f"after training, tensor {name!r} holds NaN or infinity: lower the learning rate?")
        return out


def train_once(
    task: Task, model_vector: Float32Array, config: TrainingConfig, seed: int
) -> tuple[Float32Array, TrainSummary]:
    """One round of a task whose data has been loaded, on a module built for it. See `Trainer.run`."""
    return Trainer(task).run(model_vector, config, seed)


def initial_vector(task: Task, seed: int) -> tuple[Schema, Float32Array]:
    """A fresh model of a task: its schema and float32[d], drawn from `seed`. Needs none of the task's data.

    Raises:
        TaskError: As `Trainer`.
    """
    seed_generators(seed)
    tensors = federated_tensors(task, task.build_model())
    schema = schema_of(tensors)
    return schema, to_vector(tensors, schema)


def use_threads(threads: int) -> None:
    """Give torch that many threads and deterministic algorithms. Sums depend on the number of threads.

    Raises:
        ValueError: It is not positive.
    """
    if threads < 1:
        raise ValueError(f"training runs on 1 thread or more, not {threads}")
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)


def seed_generators(seed: int) -> None:
    """Seed torch's, numpy's and Python's global generators, which a site's code may use. None makes a secret."""
    torch.manual_seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    random.seed(seed)


# --- a module's tensors ---------------------------------------------------------------------------------------------


def federated_tensors(task: Task, model: nn.Module) -> dict[str, Tensor]:
    """The tensors that travel, by their names in the state dict; a parameter that is shared appears once."""
    tensors: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if task.federates_buffers:
        saved = model.state_dict().keys()
        tensors |= {name: b for name, b in model.named_buffers() if name in saved and b.is_floating_point()}
    return tensors


def schema_of(tensors: Mapping[str, Tensor]) -> Schema:
    """The schema of a module's federated tensors.

    Raises:
        TaskError: There are none, or one has a dtype that cannot be federated.
    """
    specs = []
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise TaskError(
                f"the task's tensor {name!r} is {tensor.dtype}; federated are {', '.join(_DTYPES.values())}"
            )
        specs.append(TensorSpec(name, _DTYPES[tensor.dtype], tuple(tensor.shape)))
    if not specs:
        raise TaskError("no parameter of the task's model requires grad, so there is nothing to train")
    return Schema(tuple(specs))


def load_vector(tensors: Mapping[str, Tensor], schema: Schema, vector: Float32Array) -> None:
    """Copy float32[schema.size] into the tensors, each in its own dtype."""
    flat = torch.from_numpy(vector if vector.flags.writeable else vector.copy())
    with torch.no_grad():
        for spec, start, stop in schema.spans():
            tensors[spec.name].copy_(flat[start:stop].view(spec.shape))


def to_vector(tensors: Mapping[str, Tensor], schema: Schema) -> Float32Array:
    """The tensors as float32[schema.size]."""
    vector = np.empty(schema.size, np.float32)
    flat = torch.from_numpy(vector)
    with torch.no_grad():
        for spec, start, stop in schema.spans():
            flat[start:stop].view(spec.shape).copy_(tensors[spec.name])
    return vector


# --- what the agent calls -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Kept:
    session_id: bytes
    update: Float32Array = field(repr=False)
    summary: TrainSummary = field(repr=False)


@dataclass(slots=True)
class _WorkerState:
    trainer: Trainer | None = None
    kept: _Kept | None = None
    vector: Float32Array = field(default_factory=lambda: np.empty(0, np.float32))

    def room(self, length: int) -> Float32Array:
        """float32[length] for a model, then its update; the same from round to round, since pages are slow to get."""
        if len(self.vector) != length:
            self.vector = np.empty(length, np.float32)
        return self.vector


_state = _WorkerState()  # of this process, which serves one agent


def configure(import_path: str, options: Mapping[str, object], threads: int = 1) -> TaskInfo:
    """Load the site's task and its data into this process; whatever was kept before is forgotten.

    Args:
        import_path: "package.module:ClassName".
        options: Of the site's configuration, passed to the constructor by name.
        threads: For torch; the same number gives the same sums.

    Raises:
        TaskError: The task cannot be used; the text says why.
    """
    _state.trainer = _state.kept = None
    use_threads(threads)
    task = load_task(import_path, options)
    try:
        task.load_data()
        _state.trainer = Trainer(task)
    except UserError:
        raise
    except Exception as error:  # the site's own code may raise anything; its operator is told where
        raise TaskError(f"task {import_path}: getting ready failed: {described(error)}") from error
    return _state.trainer.info


def described(error: BaseException) -> str:
    """What a site's own code raised, and where: the type, the words, and the innermost line."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"


def train(request: TrainRequest) -> TrainSummary:
    """Evaluate the global model on the site's held-out data, train it, and keep the update in memory.

    An update that was kept before is forgotten first.

    Raises:
        ModelFileError: The model file is malformed or holds something that is not finite.
        TrainingError: The model is not the task's, naming the tensor; or training went wrong.
    """
    trainer = _state.trainer
    if trainer is None:
        raise RuntimeError("configure comes before train")
    _state.kept = None
    schema, vector = read_finite_vector(request.model_path, allocate=_state.room)
    if difference := schema.difference(trainer.schema):
        raise TrainingError(
            f"the job's model is not one of this task: {difference} (here: the model, there: the task); "
            "make one with `maskwork model init`, from the same task with the same options"
        )
    if schema.size != request.parameters:
        raise TrainingError(f"the plan counts {request.parameters} parameters, its model has {schema.size}")
    try:
        update, summary = trainer.run(vector, request.config, request.seed, out=vector)
    except UserError:
        raise
    except Exception as error:  # the site's own code may raise anything; its operator is told where
        raise TrainingError(f"the task failed: {described(error)}") from error
    _state.kept = _Kept(request.session_id, update, summary)
    return summary


def mask(request: MaskRequest) -> MaskResult:
    """Encode, mask and pack the update that `train` kept into a new file, and the statistics beside it.

    The update stays until `discard` or the next `train`: the same request again writes the same bytes.

    Raises:
        TrainingError: No update is kept under this session, or the plan asks for a metric that was not measured.
        EncodingError: The update, the weight or a statistic is refused; no file is left.
        OSError: The file exists, or the disk failed; no file is left.
    """
    kept = _state.kept
    if kept is None or kept.session_id != request.session_id:
        raise TrainingError(
            f"no update is kept for session {request.session_id.hex()[:16]}: the worker was started again since, "
            "or another session was trained"
        )
    statistics = _masked_statistics(kept.summary, request)
    tiles = MaskedTiles(
        kept.update,
        kept.summary.examples,
        encoding=request.encoding,
        keys=request.keys,
        rotation_seed=request.rotation_seed,
    )
    size, digest = packed_size(len(kept.update), request.encoding.ring_bits), hashlib.sha256()
    with _new_file(request.output) as file:
        for tile in tiles:  # hashed and written while it is in the cache
            digest.update(tile.data)
            file.write(tile.data)
    return MaskResult(size, statistics, tiles.clamped, digest.digest())


def discard(session_id: bytes) -> None:
    """Forget the update of a session, if it is the one that is kept."""
    if _state.kept is not None and _state.kept.session_id == session_id:
        _state.kept.update.fill(0)  # its memory is kept for the next round
        _state.kept = None


def _masked_statistics(summary: TrainSummary, request: MaskRequest) -> bytes:
    names = [spec.name for spec in request.statistics]
    try:
        values = statistic_values(
            names,
            examples=summary.examples,
            training=summary.train_metrics,
            evaluation_examples=summary.evaluation_examples,
            evaluation=summary.evaluation_metrics,
        )
    except ValueError as error:
        raise TrainingError(str(error)) from None
    bounds = [spec.bound for spec in request.statistics]
    # Clamped, not refused: the bounds are the coordinator's, and a refusal would tell it on which side a value lies.
    # The count of examples alone is not clamped: it is the weight of the update, and `mask_update` refuses it.
    within = [values[0], *(min(max(v, -bound), bound) for v, bound in zip(values[1:], bounds[1:], strict=True))]
    encoded = encode_statistics(within, bounds, names)
    return mask_statistics(encoded, request.keys.statistics)


@contextmanager
def _new_file(path: Path) -> Iterator[BinaryIO]:
    """A file for this user alone; none is left if anything goes wrong."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with open(descriptor, "wb") as file:
            yield file
    except BaseException:
        path.unlink(missing_ok=True)
        raise
