"""A made-up report, with any of its fields changed."""

import dataclasses
import math

from nettrim.report import Certificate, LayerReport, Report
from nettrim.solvers import HistoryPoint


def layer(name="fc1", **changes):
    base = LayerReport(
        name=name,
        shape=(300, 784),
        rows=900,
        nonzeros=58800,
        density=0.25,
        epsilon=2.5,
        discrepancy=2.4375,
        relative_discrepancy=0.0975,
        accumulated=0.125,
        holdout=0.11,
        objective=310.25,
        lower_bound=310.125,
        gap=0.0004,
        status="optimal",
        iterations=120,
        seconds=1.5,
        solver="admm",
        activation="relu",
        weight_bytes=4 * 300 * 784,
        history=(HistoryPoint(20, 0.25, math.inf, 0.0), HistoryPoint(40, 0.5, 400.0, 300.0), HistoryPoint(120, 1.5, 310.25, 310.125)),
    )
    return dataclasses.replace(base, **changes)


def certificate(**changes):
    base = Certificate(
        holds=True,
        guaranteed=4.56,
        measured=1.23,
        holdout=0.032,
        relative_measured=0.028,
        explanation="a chain of 2 layers",
    )
    return dataclasses.replace(base, **changes)


def report(*layers, **changes):
    base = Report(
        layers=layers or (layer(), layer("fc2", activation=None, shape=(10, 300))),
        skipped={"conv": "Conv2d is not supported"},
        certificate=certificate(),
        options={"epsilon": 0.1, "mode": "cascade", "consistency": "relaxed", "ignore": ["head"]},
        density=0.25,
        seconds=3.25,
    )
    return dataclasses.replace(base, **changes)
