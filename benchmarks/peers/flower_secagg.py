"""The mathematics of one masked round of Flower's SecAgg+, without a network: the twin of `maskwork bench secagg`.

    benchmarks/peers/.venv/bin/python benchmarks/peers/flower_secagg.py --participants 10 --params 1000000 --dropouts 3

Flower's own code does all the work: `SecAggPlusWorkflow` on the server's side and `secaggplus_mod` on the other,
joined by what stands for its `Grid` and calls the mod at once. Times are taken at the borders of the functions that
those two call, and around their stages; what the joint itself takes is left out. Each side runs in a process of its
own, so that its peak of memory is its own: in the participant's, one participant uploads; in the server's, uploads
arrive masked from a third process.

It is NOT a deployment (that is `flower_round.py`): the model is not sent out, and no message is turned into protobuf.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import logging
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import wraps
from multiprocessing import get_context
from types import ModuleType
from typing import Any, Final

import numpy as np
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.common import Code, FitRes, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage
from flwr.compat.common import recorddict_compat as compat
from flwr.server.client_manager import SimpleClientManager
from flwr.server.compat.grid_client_proxy import GridClientProxy
from flwr.server.compat.legacy_context import LegacyContext
from flwr.server.strategy import FedAvg
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD
from flwr.server.workflow.constant import Key as WorkflowKey
from flwr.server.workflow.secure_aggregation.secaggplus_workflow import SecAggPlusWorkflow, WorkflowState
from flwr.supercore.task_identity import TaskIdentity

# Flower's packages hide these two modules behind a function and a class of theirs.
mod_module: Final = importlib.import_module("flwr.client.mod.secure_aggregation.secaggplus_mod")
workflow_module: Final = importlib.import_module("flwr.server.workflow.secure_aggregation.secaggplus_workflow")

EXAMPLES: Final = 1000
"""Of every participant; also the largest weight that the workflow allows by default, as in Maskwork's benchmark."""
UPDATE_NORM: Final = 0.99

# What the two call, by what it is done for. A name that Flower renames fails at once, in `Stopwatch.watch`.
PARTICIPANT_CALLS: Final = {
    "encode": ("parameters_to_ndarrays", "parameters_multiply", "quantize", "factor_combine"),
    "mask": (
        "bytes_to_private_key",
        "bytes_to_public_key",
        "generate_shared_key",
        "pseudo_rand_gen",
        "parameters_addition",
        "parameters_subtraction",
        "parameters_mod",
    ),
    "serialise": ("ndarray_to_bytes",),
}
SERVER_CALLS: Final = {
    "reconstruct": ("combine_shares", "bytes_to_private_key", "bytes_to_public_key", "generate_shared_key"),
    "remove": ("pseudo_rand_gen", "parameters_addition", "parameters_subtraction"),
}


@dataclass(frozen=True, slots=True)
class Shape:
    """What is measured.

    Attributes:
        participants: n; everybody is everybody's neighbour.
        params: d.
        dropouts: Participants that deal their shares and are then gone.
        threshold: t.
        clipping_range: Of each coordinate.
        repeats: Rounds that count; one more comes first.
    """

    participants: int
    params: int
    dropouts: int
    threshold: int
    clipping_range: float
    repeats: int

    def workflow(self) -> SecAggPlusWorkflow:
        """Flower's server side, with its own defaults for everything else."""
        return SecAggPlusWorkflow(
            num_shares=1.0,
            reconstruction_threshold=self.threshold / self.participants,
            max_weight=float(EXAMPLES),
            clipping_range=self.clipping_range,
        )


@dataclass(slots=True)
class Stopwatch:
    """Seconds and calls, by what they were for."""

    seconds: dict[str, float] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def around(self, purpose: str) -> Iterator[None]:
        """Time a block."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[purpose] = self.seconds.get(purpose, 0.0) + time.perf_counter() - began

    def watched(self, purpose: str, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, timed and counted."""

        @wraps(function)
        def timed(*args: object, **named: object) -> object:
            self.calls[name] = self.calls.get(name, 0) + 1
            with self.around(purpose):
                return function(*args, **named)

        return timed

    def watch(self, module: ModuleType, calls: dict[str, tuple[str, ...]]) -> None:
        """Time the functions that a module of Flower calls, under the names by which it knows them."""
        for purpose, names in calls.items():
            for name in names:
                setattr(module, name, self.watched(purpose, name, getattr(module, name)))

    def take(self, purpose: str) -> float:
        """Seconds since the last time, which are forgotten."""
        return self.seconds.pop(purpose, 0.0)

    def forget(self) -> None:
        """Begin anew."""
        self.seconds.clear()
        self.calls.clear()


@dataclass(slots=True)
class Participant:
    """One of Flower's participants: what its ClientApp keeps between messages, and the mod that answers them."""

    context: Context

    @classmethod
    def new(cls, node_id: int) -> Participant:
        """Nothing has been sent to it."""
        return cls(Context(run_id=1, node_id=node_id, node_config={}, state=RecordDict(), run_config={}))

    def answer(self, message: Message, fit: Callable[[Message, Context], Message]) -> Message:
        """To a message of any stage; `fit` trains."""
        return mod_module.secaggplus_mod(message, self.context, fit)


class Joint:
    """In the place of Flower's Grid, as far as the workflow asks for one.

    It hands the workflow's messages to participants of this very process, and masked uploads to `collect`.
    """

    def __init__(self, shape: Shape, collect: Callable[[Participant, Message], Message]) -> None:
        """Participants 1 to n; `collect` answers the messages that ask for a masked upload."""
        self.participants = {i: Participant.new(i) for i in range(1, shape.participants + 1)}
        self.watch = Stopwatch()
        self.first: dict[str, list[float]] = {}
        self._collect = collect

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """All answers."""
        with self.watch.around("joint"):
            return [self._answer(message) for message in messages]

    def _answer(self, message: Message) -> Message:
        stage = message.content.config_records[RECORD_KEY_CONFIGS][Key.STAGE]
        node_id = message.metadata.dst_node_id
        # As if it had come over a wire: what a participant takes out of a message must not be missing from the next.
        message = copy.deepcopy(message)
        if stage == Stage.COLLECT_MASKED_VECTORS:
            return self._collect(self.participants[node_id], message)
        began = time.perf_counter()
        answer = self.participants[node_id].answer(message, no_training)
        self.first.setdefault(str(stage), []).append(time.perf_counter() - began)
        return answer

    def get_node_ids(self) -> Iterable[int]:
        """Everybody is there."""
        return list(self.participants)


def no_training(message: Message, context: Context) -> Message:
    """For the stages that train nothing."""
    raise AssertionError("only a masked upload is trained for")


def gone(message: Message) -> Message:
    """What the server is told of a participant that does not answer."""
    return Message(Error(code=3, reason="gone"), reply_to=message)


def update_of(d: int) -> np.ndarray:
    """Everybody's update."""
    update = np.random.default_rng(1).standard_normal(d, np.float32)
    update *= np.float32(UPDATE_NORM / float(np.linalg.norm(update)))
    return update


def fit_result(message: Message, update: np.ndarray) -> Message:
    """What a ClientApp returns after training."""
    result = FitRes(Status(Code.OK, ""), ndarrays_to_parameters([update]), EXAMPLES, {})
    return Message(compat.fitres_to_recorddict(result, keep_input=False), reply_to=message)


def legacy_context(shape: Shape, joint: Joint) -> LegacyContext:
    """The workflow's own, with a model of one parameter: the model is not what is measured."""
    n = shape.participants
    strategy = FedAvg(
        fraction_fit=1.0, fraction_evaluate=0.0, min_fit_clients=n, min_evaluate_clients=n, min_available_clients=n
    )
    manager = SimpleClientManager()
    for node_id in joint.get_node_ids():
        manager.register(GridClientProxy(node_id, joint, 1))
    state = RecordDict()
    state.config_records[MAIN_CONFIGS_RECORD] = ConfigRecord({WorkflowKey.CURRENT_ROUND: 1})
    model = ndarrays_to_parameters([np.zeros(1, np.float32)])
    state.array_records[MAIN_PARAMS_RECORD] = compat.parameters_to_arrayrecord(model, keep_input=True)
    context = Context(run_id=1, node_id=0, node_config={}, state=state, run_config={})
    return LegacyContext(context, strategy=strategy, client_manager=manager)


def become_a_task() -> None:
    """Messages can be made only by a process that Flower has given a task; and its log would drown the figures."""
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
    logging.getLogger("flwr").setLevel(logging.CRITICAL)


def peak_rss_bytes() -> int:
    """The largest resident set that this process ever had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    """Of each figure; the first round was for warming up."""
    return {name: statistics.median(taken[name] for taken in rounds[1:]) for name in rounds[0]}


# --- a participant --------------------------------------------------------------------------------------------------


def measure_participant(shape: Shape) -> dict[str, float]:
    """Seconds of one participant's work on one update, bytes, memory."""
    become_a_task()
    before = peak_rss_bytes()
    update = update_of(shape.params)
    watch = Stopwatch()
    watch.watch(mod_module, PARTICIPANT_CALLS)
    rounds = [_participants_round(shape, update, watch) for _ in range(1 + shape.repeats)]
    return {
        **medians(rounds),
        "peak_memory_bytes": float(peak_rss_bytes() - before),
        "update_bytes": float(update.nbytes),
    }


def _participants_round(shape: Shape, update: np.ndarray, watch: Stopwatch) -> dict[str, float]:
    found: dict[str, float] = {}

    def fit(message: Message, _: Context) -> Message:
        with watch.around("fit"):
            return fit_result(message, update)

    def collect(participant: Participant, message: Message) -> Message:
        if participant.context.node_id != 1:
            return gone(message)
        watch.forget()
        with watch.around("total"):
            answer = participant.answer(message, fit)
        masked = answer.content.config_records[RECORD_KEY_CONFIGS][Key.MASKED_PARAMETERS]
        found["encode_s"] = watch.take("encode")
        found["mask_s"] = watch.take("mask")
        found["serialise_s"] = watch.take("serialise")
        found["total_s"] = watch.take("total") - watch.take("fit")
        found["upload_bytes"] = float(sum(map(len, masked)))
        found["masks"] = float(watch.calls["pseudo_rand_gen"])
        return answer

    joint = Joint(shape, collect)
    context, state, workflow = legacy_context(shape, joint), WorkflowState(), shape.workflow()
    assert workflow.setup_stage(joint, context, state)
    assert workflow.share_keys_stage(joint, context, state)
    workflow.collect_masked_vectors_stage(joint, context, state)  # fails, as it must: one alone is below the threshold
    found["make_keys_s"] = statistics.median(joint.first[Stage.SETUP])
    found["share_keys_s"] = statistics.median(joint.first[Stage.SHARE_KEYS])
    return found


# --- the server -----------------------------------------------------------------------------------------------------


def measure_server(shape: Shape) -> dict[str, float]:
    """Seconds of the server's work on one round, memory, and the error of the mean that comes out."""
    become_a_task()
    before = peak_rss_bytes()
    watch = Stopwatch()
    watch.watch(workflow_module, SERVER_CALLS)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=become_a_task) as crowd:
        done = [_servers_round(shape, watch, crowd) for _ in range(1 + shape.repeats)]
    peak = peak_rss_bytes() - before  # before the error is looked at, which takes memory too
    update = update_of(shape.params)
    error = done[-1][1] - update
    nmse = float(np.dot(error, error) / np.dot(update, update))
    return {**medians([figures for figures, _ in done]), "peak_memory_bytes": float(peak), "nmse": nmse}


def masked_upload(participant: Participant, message: Message, d: int) -> tuple[Participant, Message]:
    """One participant's, made in a process of the crowd."""
    answer = participant.answer(message, lambda asked, _: fit_result(asked, update_of(d)))
    return participant, answer


def _servers_round(shape: Shape, watch: Stopwatch, crowd: ProcessPoolExecutor) -> tuple[dict[str, float], np.ndarray]:
    def collect(participant: Participant, message: Message) -> Message:
        node_id = participant.context.node_id
        if node_id <= shape.dropouts:
            return gone(message)
        joint.participants[node_id], answer = crowd.submit(masked_upload, participant, message, shape.params).result()
        return answer

    joint = Joint(shape, collect)
    context, state, workflow = legacy_context(shape, joint), WorkflowState(), shape.workflow()
    context.strategy.aggregate_fit = watch.watched("strategy", "aggregate_fit", context.strategy.aggregate_fit)
    assert workflow.setup_stage(joint, context, state)
    assert workflow.share_keys_stage(joint, context, state)
    joint.watch.forget()
    with watch.around("collect"):
        assert workflow.collect_masked_vectors_stage(joint, context, state)
    accumulate = watch.take("collect") - joint.watch.take("joint")
    watch.forget()
    with watch.around("unmask"):
        assert workflow.unmask_stage(joint, context, state)
    reconstruct, strategy = watch.take("reconstruct"), watch.take("strategy")
    unmask = watch.take("unmask") - joint.watch.take("joint") - reconstruct - strategy
    figures = {
        "accumulate_s": accumulate / (shape.participants - shape.dropouts),
        "reconstruct_s": reconstruct,
        "remove_masks_s": watch.take("remove"),
        "unmask_s": unmask,
        "strategy_s": strategy,
        "masks_expanded": float(watch.calls["pseudo_rand_gen"]),
    }
    mean = compat.arrayrecord_to_parameters(context.state.array_records[MAIN_PARAMS_RECORD], keep_input=True)
    return figures, parameters_to_ndarrays(mean)[0]


# --- the command ----------------------------------------------------------------------------------------------------


def in_a_process(side: Callable[[Shape], dict[str, float]], shape: Shape) -> dict[str, float]:
    """Run one side where nothing else has taken memory before."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(side, shape).result()


def shape_of(asked: argparse.Namespace) -> Shape:
    """The shape that the command line asks for."""
    n = asked.participants
    threshold = asked.threshold or 2 * n // 3 + 1  # Maskwork's own on the complete graph
    if asked.dropouts > n - threshold:
        raise SystemExit(f"--dropouts {asked.dropouts}: {n - asked.dropouts} are left of the {threshold} that it takes")
    return Shape(n, asked.params, asked.dropouts, threshold, asked.clipping_range, asked.repeats)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="the mathematics of one round of Flower's SecAgg+")
    parser.add_argument("--participants", type=int, default=10)
    parser.add_argument("--params", type=int, default=1_000_000)
    parser.add_argument("--dropouts", type=int, default=3)
    parser.add_argument("--threshold", type=int, help="default: more than two thirds of the participants")
    parser.add_argument("--clipping-range", type=float, default=8.0, help="of each coordinate; 8 is Flower's default")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    shape = shape_of(parser.parse_args())
    measured = {
        "shape": asdict(shape),
        "participant": in_a_process(measure_participant, shape),
        "server": in_a_process(measure_server, shape),
    }
    if parser.parse_args().json:
        print(json.dumps(measured, indent=2))
        return
    print(f"n = {shape.participants}, t = {shape.threshold}, d = {shape.params:,}, {shape.dropouts} dropouts")
    for side in ("participant", "server"):
        print(side)
        for name, value in measured[side].items():
            print(f"  {name:18} {value:14.6g}")


if __name__ == "__main__":
    main()
