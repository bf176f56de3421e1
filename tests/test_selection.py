"""Patterns: what they match, what they leave, and which budget each layer gets."""

from typing import Any

import pytest
import torch
from torch import nn

from nettrim import ArgumentError, calibration
from nettrim.selection import matches, per_layer, positive, select, share_of_zeros
from nettrim.tracing import Trace, trace


class Special(nn.Linear):
    pass


def network() -> nn.Module:
    return nn.ModuleDict(
        {
            "encoder": nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)),
            "head": Special(4, 2),
            "unused": nn.Linear(2, 2),
            "conv": nn.Conv1d(1, 1, 1),
            "table": nn.Embedding(2, 4),
        }
    )


def traced(model: Any) -> Trace:
    run = calibration.runner(lambda model, x: model["head"](model["encoder"](x)))
    return trace(model, calibration.batches(torch.randn(5, 4)), run)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    (
        ("encoder.0", ["encoder.0"]),
        ("encoder.*", ["encoder.0", "encoder.2"]),
        ("*", ["encoder.0", "encoder.2", "head", "unused"]),
        ("re:.*[02]", ["encoder.0", "encoder.2"]),
        ("re:encoder", []),  # the whole name, not a part of it
        ("encoder", []),
        ("ENCODER.*", []),
        (Special, ["head"]),
        (nn.Linear, ["encoder.0", "encoder.2", "head", "unused"]),
        (nn.Conv1d, []),
    ),
)
def test_what_a_pattern_matches(pattern: Any, expected: list[str]) -> None:
    modules = {name: module for name, module in network().named_modules() if isinstance(module, nn.Linear)}
    assert [name for name, module in modules.items() if matches(pattern, name, module)] == expected


def test_names_with_glob_characters_match_themselves() -> None:
    assert matches("block[0]", "block[0]", nn.Linear(1, 1))


def test_every_layer_is_chosen_or_explained() -> None:
    model = network()
    found = traced(model)
    names, skipped = select(model, found, None, ())
    assert names == ["encoder.0", "encoder.2", "head"]
    assert set(skipped) == {"unused", "conv", "table"} and "never ran" in skipped["unused"] and "Embedding" in skipped["table"]
    names, skipped = select(model, found, ["head", "encoder.*"], "*.0")
    assert names == ["encoder.2", "head"]
    assert skipped["encoder.0"] == "ignored, as asked"
    names, skipped = select(model, found, "head", ())
    assert names == ["head"] and skipped["encoder.0"] == skipped["encoder.2"] == "not among the targets"
    assert select(model, found, nn.Linear, [nn.Conv1d, "unused"])[0] == ["encoder.0", "encoder.2", "head"]  # what cannot be pruned may be ignored


def test_select_leaves_the_trace_alone() -> None:
    model = network()
    found = traced(model)
    before = dict(found.skipped)
    select(model, found, "head", ())
    assert found.skipped == before


def test_an_order_of_names_does_not_matter() -> None:
    model = network()
    assert select(model, traced(model), ["head", "encoder.2", "encoder.0"], ())[0] == ["encoder.0", "encoder.2", "head"]


@pytest.mark.parametrize("targets", ([], ["unused"]))
def test_nothing_left_says_why(targets: list[str]) -> None:
    model = network()
    with pytest.raises(ArgumentError, match="no layer to prune.*unused: never ran" if targets else "not among the targets"):
        select(model, traced(model), targets, ())


NAMES = ["encoder.0", "encoder.2", "head"]


def relative_budgets(given: Any, skipped: dict[str, str]) -> dict[str, float]:
    return per_layer(traced(network()), NAMES, given, "epsilon", positive, skipped)


def test_one_number_is_for_all() -> None:
    skipped: dict[str, str] = {}
    assert relative_budgets(0.1, skipped) == dict.fromkeys(NAMES, 0.1)
    assert relative_budgets(torch.tensor(0.5).numpy()[()], skipped)["head"] == 0.5
    assert skipped == {}


@pytest.mark.parametrize(
    ("mapping", "expected"),
    (
        ({"encoder.*": 0.1, "*": 0.2}, {"encoder.0": 0.1, "encoder.2": 0.1, "head": 0.2}),
        ({"*": 0.2, "encoder.*": 0.1}, dict.fromkeys(NAMES, 0.2)),
        ({"*": 0.2, "head": 0.3}, {"encoder.0": 0.2, "encoder.2": 0.2, "head": 0.3}),
        ({Special: 0.3, nn.Linear: 0.1}, {"encoder.0": 0.1, "encoder.2": 0.1, "head": 0.3}),
        ({"re:enc.*0": 1}, {"encoder.0": 1.0}),
    ),
)
def test_a_mapping_in_order(mapping: Any, expected: dict[str, float]) -> None:
    skipped: dict[str, str] = {}
    assert relative_budgets(mapping, skipped) == expected
    assert set(skipped) == set(NAMES) - set(expected)


def test_a_key_for_a_layer_that_is_not_pruned_matches_nothing() -> None:
    with pytest.raises(ArgumentError, match="'unused' matches no.*encoder.0, encoder.2, head"):
        relative_budgets({"*": 0.1, "unused": 0.1}, {})


@pytest.mark.parametrize("value", (0, -1, float("nan"), float("inf"), True, "0.1", None, [0.1], 1j))
def test_budgets_that_are_none(value: Any) -> None:
    for given, name in ((value, "epsilon="), ({"head": value}, r"epsilon\['head'\]=")):
        with pytest.raises(ArgumentError, match=name):
            relative_budgets(given, {})


@pytest.mark.parametrize("value", (-0.1, 1.1, float("nan"), True, "0.1", None, [0.1], 1j))
def test_shares_of_zeros_that_are_none(value: Any) -> None:
    with pytest.raises(ArgumentError, match="sparsity="):
        per_layer(traced(network()), NAMES, value, "sparsity", share_of_zeros, {})


@pytest.mark.parametrize("value", (0, 0.0, 0.5, 1))
def test_shares_of_zeros(value: Any) -> None:
    assert per_layer(traced(network()), NAMES, value, "sparsity", share_of_zeros, {}) == dict.fromkeys(NAMES, float(value))
