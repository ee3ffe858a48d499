"""What encryption at rest costs the coordinator: each of a round's steps on files, with and without it.

    python benchmarks/at_rest.py [--parameters 10000000] [--repeats 5]

Spooling an upload as it arrives, adding it to the sum, the next model from the sum (which hashes, reads and writes a
model), and sending a model to a site. The unmasking itself costs the same either way and is left out. The bytes are on
the file system of the temporary directory; what is measured includes its writes, and the fsyncs of the model.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from maskwork.coordinator import aggregation
from maskwork.coordinator.models import ModelStore
from maskwork.coordinator.sealed import MasterKey, MasterKeys
from maskwork.coordinator.shape import SessionShape
from maskwork.coordinator.spool import Spool
from maskwork.coordinator.vault import UploadSeal, Vault
from maskwork.secagg.keys import Segment
from maskwork.tensors import Schema, TensorSpec, file_bytes, read_vector, write_model_to

CHUNK = 1 << 20
SESSION = bytes(32)


def timed(work: Callable[[], object]) -> float:
    """Seconds."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def spooled(folder: Path, shape: SessionShape, body: bytes, member: int, vault: Vault | None) -> Spool:
    """An upload that arrived in chunks."""
    seal = vault and UploadSeal(vault, vault.accumulator(SESSION), vault.upload(SESSION, member))
    spool = Spool(folder / f"upload-{member}", shape, seal)
    with spool.writing() as writer:
        for at in range(0, shape.update_bytes, CHUNK):
            writer.write(Segment.UPDATE, at, body[at : min(at + CHUNK, shape.update_bytes)])
        writer.write(Segment.STATISTICS, 0, body[shape.update_bytes :])
    return spool


def measure(folder: Path, parameters: int, repeats: int, vault: Vault | None) -> dict[str, float]:
    """Seconds of each step, the least of all repeats: others use this machine too."""
    shape = SessionShape(parameters, 27, 2)
    body = os.urandom(shape.upload_bytes)
    accumulator = folder / "accumulator"
    aggregation.create_accumulator(accumulator, shape, seal=vault and (vault, SESSION))
    made: list[Spool] = []

    def spool() -> None:
        made.append(spooled(folder, shape, body, len(made), vault))

    def add() -> None:
        aggregation.add_upload(accumulator, made[-1].path, shape, made[-1].seal)

    models = ModelStore(folder / "models", vault=vault)
    schema = Schema((TensorSpec("w", "F32", (parameters,)),))
    vector = np.ones(parameters, np.float32)

    def write(to: ModelStore) -> bytes:
        return to.write_in_order(
            lambda file: write_model_to(file, schema, vector, {}, named="model"), max_bytes=file_bytes(schema, {})
        )

    digest = write(models)

    def renew() -> None:
        models.verify(digest)
        read_vector(models.file(digest))
        write(models)

    def send() -> None:
        with models.file(digest).open() as file:
            while file.read(CHUNK):
                pass

    steps = (spool, add, renew, send)
    rows = [[timed(step) for step in steps] for _ in range(repeats)]
    return {step.__name__: min(column) for step, column in zip(steps, zip(*rows, strict=True), strict=True)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="what encryption at rest costs")
    parser.add_argument("--parameters", type=int, default=10_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    asked = parser.parse_args()
    vault = Vault("bench", MasterKeys(MasterKey(os.urandom(32))))
    found = {}
    for name, used in (("warm-up", None), ("plain", None), ("encrypted", vault)):
        with tempfile.TemporaryDirectory() as folder:
            found[name] = measure(Path(folder), asked.parameters, asked.repeats, used)
    print(f"{asked.parameters} parameters; milliseconds, the least of {asked.repeats}")
    for step in found["plain"]:
        plain, sealed = 1000 * found["plain"][step], 1000 * found["encrypted"][step]
        print(f"  {step:6} plain {plain:8.1f}   encrypted {sealed:8.1f}   difference {sealed - plain:8.1f}")
    print(f"  greatest resident memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")


if __name__ == "__main__":
    main()
