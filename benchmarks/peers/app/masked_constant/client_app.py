"""The participants' side: a constant, behind the mod that masks it unless the run is plain.

It is a little different in every answer and in every place, because Flower sends equal pieces of data only once.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
from flwr.app import Context, Message
from flwr.client import Client, NumPyClient
from flwr.client.mod import secaggplus_mod
from flwr.clientapp import ClientApp

EXAMPLES = 100
CONSTANT = 0.01
VARIATION = 1e-5


class Constant(NumPyClient):
    """Trains nothing."""

    def __init__(self, params: int) -> None:
        """The update has `params` parameters."""
        self._params = params

    def fit(self, parameters: list[np.ndarray], config: dict) -> tuple[list[np.ndarray], int, dict]:
        """The constant."""
        middle = CONSTANT + random.uniform(-VARIATION, VARIATION)
        return [np.linspace(middle - VARIATION, middle + VARIATION, self._params, dtype=np.float32)], EXAMPLES, {}


def client(context: Context) -> Client:
    """For each message a new one, as Flower has it."""
    return Constant(int(context.run_config["params"])).to_client()


def masked_unless_plain(
    message: Message, context: Context, call_next: Callable[[Message, Context], Message]
) -> Message:
    """SecAgg+, or nothing at all."""
    if context.run_config["masked"]:
        return secaggplus_mod(message, context, call_next)
    return call_next(message, context)


app = ClientApp(client_fn=client, mods=[masked_unless_plain])
