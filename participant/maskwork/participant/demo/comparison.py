"""From the masked run to the summary: the baselines are trained and kept, everything is evaluated on one test set.

It is NOT where baselines are defined (`maskwork.participant.demo.baselines`) nor where figures are worded
(`maskwork.participant.demo.summary`).
"""

from __future__ import annotations

import numpy as np

from maskwork.participant.demo.baselines import CommonTestSet, PlainRun, repeat_plain, train_centrally
from maskwork.participant.demo.display import Display
from maskwork.participant.demo.federation import DemoOptions, RunFolder
from maskwork.participant.demo.masked_run import MaskedRun
from maskwork.participant.demo.summary import Accuracy, Summary, summarise
from maskwork.tensors import Float32Array, read_vector, write_model


def compare(folder: RunFolder, options: DemoOptions, masked: MaskedRun, display: Display) -> tuple[Summary, PlainRun]:
    """Train the baselines, keep their models in the run's folder, and put the figures together."""
    test_set, schema, model = CommonTestSet(options), *read_vector(masked.model)
    _, initial = read_vector(folder.models / "initial.safetensors")
    plain, centralised = _baselines(options, masked, initial, test_set=test_set, display=display)
    for name, vector in (("plain", plain.model), ("centralised", centralised)):
        write_model(folder.models / f"{name}.safetensors", schema, vector, {"format": "pt"})
    summary = summarise(
        participants=options.participants,
        rounds=options.rounds,
        committed=masked.rounds,
        turns=masked.turns,
        accuracy=Accuracy(*(test_set.accuracy(vector) for vector in (model, plain.model, centralised))),
        difference=float(np.abs(model - plain.model).max()),
        parameters=schema.size,
        model=masked.model.resolve(),
    )
    return summary, plain


def _baselines(
    options: DemoOptions, masked: MaskedRun, initial: Float32Array, *, test_set: CommonTestSet, display: Display
) -> tuple[PlainRun, Float32Array]:
    job = options.job()
    with display.busy(f"repeating the {len(masked.rounds)} rounds in clear, with the same survivors and seeds"):
        plain = repeat_plain(
            options,
            masked.job_id,
            [event.survivors for event in masked.rounds],
            initial=initial,
            training=job.training,
            clip_norm=job.encoding.clip_norm,
            test_set=test_set,
        )
    with display.busy("training on the pooled data, as many passes"):
        return plain, train_centrally(options, job.training, initial)
