"""The server's side: FedAvg over everybody in every round, with SecAgg+ as the workflow of a round unless it is plain.

After every round, all seconds so far and the distance of the mean from the constant go into the file that the run's
configuration names.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from flwr.app import Context
from flwr.common import ndarrays_to_parameters, parameters_to_ndarrays
from flwr.compat.common.recorddict_compat import arrayrecord_to_parameters
from flwr.server import LegacyContext, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.server.workflow import DefaultWorkflow, SecAggPlusWorkflow
from flwr.server.workflow.constant import MAIN_PARAMS_RECORD
from flwr.server.workflow.default_workflows import default_fit_workflow
from flwr.serverapp import Grid, ServerApp

app = ServerApp()

CONSTANT = 0.01


class Reported:
    """A workflow of one round, and the report of it."""

    def __init__(self, workflow: Callable[[Grid, Context], None], report: Path) -> None:
        """Nothing has run."""
        self._workflow = workflow
        self._report = report
        self._seconds: list[float] = []

    def __call__(self, grid: Grid, context: Context) -> None:
        """One round."""
        began = time.perf_counter()
        self._workflow(grid, context)
        self._seconds.append(time.perf_counter() - began)
        model = arrayrecord_to_parameters(context.state.array_records[MAIN_PARAMS_RECORD], keep_input=True)
        [mean] = parameters_to_ndarrays(model)
        report = {
            "round_s": self._seconds,
            "largest_error": float(np.max(np.abs(mean - CONSTANT))),
            "model_type": str(mean.dtype),
        }
        part = self._report.with_suffix(".part")
        part.write_text(json.dumps(report), encoding="utf-8")
        part.replace(self._report)


@app.main()
def main(grid: Grid, context: Context) -> None:
    """All rounds."""
    asked = context.run_config
    n = int(asked["participants"])
    zero = ndarrays_to_parameters([np.zeros(int(asked["params"]), np.float32)])
    strategy = FedAvg(
        fraction_fit=1.0,
        fraction_evaluate=0.0,
        min_fit_clients=n,
        min_evaluate_clients=n,
        min_available_clients=n,
        initial_parameters=zero,
    )
    legacy = LegacyContext(context, config=ServerConfig(num_rounds=int(asked["rounds"])), strategy=strategy)
    threshold = 2 * n // 3 + 1
    masked = SecAggPlusWorkflow(num_shares=1.0, reconstruction_threshold=threshold / n)
    fit = Reported(masked if asked["masked"] else default_fit_workflow, Path(str(asked["report"])))
    DefaultWorkflow(fit_workflow=fit)(grid, legacy)
