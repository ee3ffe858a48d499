"""What a site owner implements, and what a job says about training.

A `Task` builds the `torch.nn.Module`, loads the site's data, trains and evaluates. It is found by an import path in the
*site's* configuration: no code ever comes over the wire. `maskwork.participant.tasks.supervised.SupervisedTask` is the
ready half of one for the usual case.

It is NOT where training runs (`maskwork.participant.training`), and it imports no torch, so that the coordinator and
the agent can name a job's `TrainingConfig` without it.

Rules it upholds:

1. `TrainingConfig` has one canonical form; its SHA-256 is what a plan carries.
2. What a task measures is checked here before anything is made of it; it leaves the site only within masked sums.
3. What is wrong with a site's task is told by name, with what to do.
"""

import abc
import difflib
import hashlib
import importlib
import inspect
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from maskwork.errors import UserError

if TYPE_CHECKING:
    from torch import nn

MAX_CONFIG_BYTES: Final = 4096


class TaskError(UserError):
    """A site's task cannot be used: not found, not a `Task`, or its options are wrong."""


class TrainingError(UserError):
    """Training or evaluation went wrong at this site; the text says where."""


class TrainingConfigError(UserError, ValueError):
    """A training configuration is malformed, out of range or not in its canonical form."""


class TrainingConfig(BaseModel):
    """How a participant trains in one round: SGD with momentum. Part of the job, the same at every site.

    Attributes:
        epochs: Passes over the site's training data per round.
        batch_size: Examples per step.
        learning_rate: SGD's learning rate.
        momentum: SGD's momentum; starts from zero in every round.
        weight_decay: L2 penalty.
        max_gradient_norm: Gradients are clipped to this L2 norm in each step; None: they are not.

    Raises:
        pydantic.ValidationError: On construction, for an unknown field or a value out of range.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    epochs: Annotated[int, Field(ge=1, le=10_000)] = 1
    batch_size: Annotated[int, Field(ge=1, le=1 << 20)] = 32
    learning_rate: Annotated[float, Field(gt=0, le=1e6)] = 0.1
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    max_gradient_norm: Annotated[float, Field(gt=0, le=1e9)] | None = None

    def canonical_json(self) -> bytes:
        """The one form that is hashed and sent: sorted keys, no white space, shortest floats that read back equal."""
        return json.dumps(self.model_dump(), sort_keys=True, separators=(",", ":"), allow_nan=False).encode()

    def digest(self) -> bytes:
        """SHA-256 of the canonical JSON: 32 bytes."""
        return hashlib.sha256(self.canonical_json()).digest()

    @classmethod
    def from_canonical_json(cls, data: bytes) -> "TrainingConfig":
        """Read what a coordinator sent.

        Raises:
            TrainingConfigError: Too long, not JSON, unknown or bad fields, or not the canonical form.
        """
        if len(data) > MAX_CONFIG_BYTES:
            raise TrainingConfigError(f"the training config has {len(data)} bytes, more than {MAX_CONFIG_BYTES}")
        try:
            config = cls.model_validate_json(data)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False, include_context=False)[0]
            where = ".".join(map(str, first["loc"])) or "as a whole"
            raise TrainingConfigError(f"the training config is not valid, {where}: {first['msg']}") from None
        if config.canonical_json() != data:
            raise TrainingConfigError("the training config is not in its canonical form")
        return config


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """What a task reports after training.

    Attributes:
        examples: How many different examples it trained on (n_i): the weight of this site's update.
        metrics: Means over those examples by name, such as {"loss": 0.3}; names are a-z, 0-9 and _.
    """

    examples: int
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """What a task reports after evaluation.

    Attributes:
        examples: How many held-out examples; 0 if the site has none.
        metrics: Means over those examples by name, such as {"loss": 0.3, "accuracy": 0.91}.
    """

    examples: int
    metrics: Mapping[str, float] = field(default_factory=dict)


class Task(abc.ABC):
    """A model, a site's data, and how one is trained on the other.

    One object lives in the site's worker process and serves round after round. The constructor takes the options of
    the site's configuration by name and is quick; data is read in `load_data`, so that a researcher without any data
    can make an initial model from the same class.

    Attributes:
        federates_buffers: Whether floating-point buffers that are part of the state dict (such as the running
            statistics of batch normalisation) are averaged like parameters. If not, they start every round as
            `build_model` made them: the only state that lives from round to round is the global model.
    """

    federates_buffers: ClassVar[bool] = False

    @abc.abstractmethod
    def build_model(self) -> "nn.Module":
        """The module, on whatever device the task uses. Called once per worker process.

        Only parameters that require grad are federated. What is frozen must come out the same at every site: load it
        from a file, do not draw it at random.
        """

    @abc.abstractmethod
    def load_data(self) -> None:
        """Read the site's data. Called once per worker process, before `train` and `evaluate`."""

    @abc.abstractmethod
    def train(self, model: "nn.Module", config: TrainingConfig, *, seed: int) -> TrainingResult:
        """Train `model` in place; it holds the global model and is in training mode.

        Args:
            model: What `build_model` returned.
            config: The job's training config.
            seed: For shuffling and the like. The same seed must give the same weights: an attempt that failed is
                repeated, and must not show a second update for the same model. torch, numpy and random are seeded
                with it before the call.

        Raises:
            TrainingError: If training went wrong, saying where.
        """

    @abc.abstractmethod
    def evaluate(self, model: "nn.Module") -> EvaluationResult:
        """Measure `model` on the site's held-out data; it is in evaluation mode, and no gradients are recorded."""


def checked_metrics(what: str, result: TrainingResult | EvaluationResult, *, least: int) -> dict[str, float]:
    """The metrics of a result as plain floats.

    Args:
        what: "training" or "evaluation", for the error.
        result: As a site's task returned it, so nothing of it is taken for granted.
        least: The fewest examples that make sense.

    Raises:
        TrainingError: The count is not a whole number from `least`, or a metric is not a finite number.
    """
    examples: object = result.examples
    if type(examples) is not int or examples < least:
        raise TrainingError(f"{what} reported {examples!r} examples: expected a whole number, {least} or more")
    metrics: dict[str, float] = {}
    for name, value in result.metrics.items():
        try:
            metrics[name] = float(value)  # also of a numpy or torch scalar
        except (TypeError, ValueError):
            raise TrainingError(f"{what} reported no number as the metric {name!r}, but {type(value)}") from None
        if not math.isfinite(metrics[name]):
            raise TrainingError(f"{what} reported {metrics[name]} as the metric {name!r}: lower the learning rate?")
    return metrics


def training_seed(site_seed: int, *, job: str, round_number: int, participant: str) -> int:
    """The seed of one participant's training in one round: the same in every attempt at it.

    Args:
        site_seed: What the site configured; whoever knows it and the data can repeat the training.
        job: The job's id.
        round_number: Of the plan.
        participant: The participant's name.

    Returns:
        An integer from 0 to 2^63 - 1.
    """
    said = json.dumps(["maskwork/v1/training-seed", site_seed, job, round_number, participant])
    return int.from_bytes(hashlib.sha256(said.encode()).digest()[:8], "big") >> 1


def load_task(import_path: str, options: Mapping[str, object]) -> Task:
    """Import a site's task and construct it. Its data is not read yet.

    Args:
        import_path: "package.module:ClassName".
        options: Passed to the constructor by name.

    Raises:
        TaskError: It cannot be imported, is not a `Task`, or does not take these options.
    """
    made = _task_class(import_path)
    _check_options(import_path, inspect.signature(made).parameters, options)
    try:
        return made(**options)
    except (TypeError, ValueError) as error:
        raise TaskError(f"task {import_path}: its options were refused: {error}") from error


def _task_class(import_path: str) -> type[Task]:
    module_name, colon, class_name = import_path.partition(":")
    if not (colon and class_name.isidentifier() and all(part.isidentifier() for part in module_name.split("."))):
        raise TaskError(f"{import_path!r} is not an import path: expected package.module:ClassName")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise TaskError(
            f"task {import_path}: there is no module {error.name!r}; install its package in this Python environment, "
            "or put its folder on PYTHONPATH"
        ) from error
    except UserError:
        raise
    except Exception as error:  # whatever a site's module raises while it is imported
        raise TaskError(f"task {import_path}: importing it failed: {type(error).__name__}: {error}") from error
    found: object = getattr(module, class_name, None)
    if found is None:
        raise TaskError(f"task {import_path}: the module has no {class_name!r}{_nearest(class_name, dir(module))}")
    if not isinstance(found, type) or not issubclass(found, Task):
        raise TaskError(f"task {import_path}: {class_name} is not a subclass of maskwork.task.Task")
    if missing := sorted(getattr(found, "__abstractmethods__", ())):
        raise TaskError(f"task {import_path}: {class_name} does not define {', '.join(missing)}")
    return found


def _check_options(
    import_path: str, parameters: Mapping[str, inspect.Parameter], options: Mapping[str, object]
) -> None:
    named = {
        name: parameter
        for name, parameter in parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for option in options:
        if option not in named and not takes_any:
            known = _nearest(option, named) or f"; its options are {', '.join(named) or 'none'}"
            raise TaskError(f"task {import_path} has no option {option!r}{known}")
    for name, parameter in named.items():
        if parameter.default is parameter.empty and name not in options:
            raise TaskError(f"task {import_path} needs the option {name!r}: give it in the task's options")


def _nearest(word: str, known: Mapping[str, object] | Sequence[str]) -> str:
    nearest = difflib.get_close_matches(word, known, 1)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""
