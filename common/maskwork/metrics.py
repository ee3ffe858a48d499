"""What the masked statistics of a round mean: their names, their bounds, and how sums become means.

Both sides use it: the coordinator to write a plan's statistics and to read their sum, a participant to fill them in.
A metric is a mean per example at the site; what travels is that mean times the site's number of examples, so that
the sum over sites divided by the sum of examples is the mean over everybody's examples.

It measures nothing itself; the site's task does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from maskwork.secagg.plan import StatisticSpec

EXAMPLES = "examples"
EVALUATION_EXAMPLES = "eval.examples"


def statistic_specs(metrics: Mapping[str, float], weight_cap: int) -> tuple[StatisticSpec, ...]:
    """The statistics of a plan: the example counts, and each metric's sum over at most `weight_cap` examples.

    Args:
        metrics: largest absolute value per example, by name ("train.loss", "eval.accuracy").
        weight_cap: most examples of one site, in training and in evaluation alike.
    """
    specs = [StatisticSpec(EXAMPLES, float(weight_cap))]
    if any(name.startswith("eval.") for name in metrics):
        specs.append(StatisticSpec(EVALUATION_EXAMPLES, float(weight_cap)))
    specs.extend(StatisticSpec(name, bound * weight_cap) for name, bound in sorted(metrics.items()))
    return tuple(specs)


def statistic_values(
    names: Sequence[str],
    *,
    examples: int,
    training: Mapping[str, float],
    evaluation_examples: int,
    evaluation: Mapping[str, float],
) -> tuple[float, ...]:
    """One site's statistics, in the plan's order.

    Raises:
        ValueError: the plan asks for a metric that the site's task does not measure.
    """
    values = []
    for name in names:
        group, _, metric = name.partition(".")
        if name == EXAMPLES:
            values.append(float(examples))
        elif name == EVALUATION_EXAMPLES:
            values.append(float(evaluation_examples))
        elif group == "train" and metric in training:
            values.append(training[metric] * examples)
        elif group == "eval" and metric in evaluation:
            values.append(evaluation[metric] * evaluation_examples)
        else:
            known = ", ".join(sorted([f"train.{m}" for m in training] + [f"eval.{m}" for m in evaluation]))
            raise ValueError(f"the plan asks for {name}; this site's task measures {known or 'nothing'}")
    return tuple(values)


def means(names: Sequence[str], sums: Sequence[float]) -> dict[str, float]:
    """Sums over all survivors as counts and means; a metric over no examples is left out."""
    by_name = dict(zip(names, sums, strict=True))
    result = {}
    for name, total in by_name.items():
        if name in (EXAMPLES, EVALUATION_EXAMPLES):
            result[name] = total
            continue
        count = by_name[EXAMPLES if name.startswith("train.") else EVALUATION_EXAMPLES]
        if count > 0:
            result[name] = total / count
    return result
