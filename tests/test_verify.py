"""``nettrim.verify`` on honest results: everything that prune can be asked for is proven, or it is said why not; the table; what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from networks import chain, hooks_of, same_bits, samples, state_of
from problems import KINDS, STRUCTURES, TRAINED_PROGRAMS, random_program, trained_program
from torch import nn

import nettrim
from nettrim import ArgumentError, LayerProgram, Report, Verification
from nettrim.checking.bound import Problem, bound
from nettrim.checking.results import compare, decide

INPUTS = samples(80, 12)


def network(**options: Any) -> nn.Sequential:
    return chain(12, 16, 8, 4, **options)


def verified(model: nn.Module, inputs: Any, **options: Any) -> Verification:
    result = nettrim.prune(model, inputs, **options)
    return nettrim.verify(model, result.model, inputs, result.report, masks=result.masks, forward_fn=options.get("forward_fn"))


ASKED: list[dict[str, Any]] = [
    {"penalty": "l1", "epsilon": 0.15},
    {"penalty": "l1", "epsilon": 0.15, "mode": "parallel"},
    {"penalty": "l1", "epsilon": 0.15, "consistency": "paper"},
    {"penalty": "l1", "epsilon": 0.15, "consistency": "paper", "mode": "parallel"},
    {"epsilon": 0.2, "penalty": "l0"},
    {"penalty": "l1", "epsilon": 0.15, "bias_weight": 0.0},
    {"penalty": "l1", "epsilon": 0.15, "bias_weight": 0.3, "holdout": 0.0},
    {"penalty": "l1", "epsilon": 0.15, "kappa": 0.99, "gamma": 1.3},
    {"penalty": "l1", "epsilon": {"0": 0.1, "re:[24]": 0.2}},
    {"epsilon": {nn.Linear: 0.1}},
    {"penalty": "l1", "epsilon": 0.15, "max_rows": 60, "seed": 4},
    {"penalty": "l1", "epsilon": 0.15, "ignore": "2"},
    {"sparsity": 0.6},
    {"sparsity": 0.6, "mode": "parallel"},
    {"sparsity": 0.6, "allocation": "uniform"},
    {"sparsity": 0.5, "repair": 0.5, "max_rows": 40},
    {"sparsity": 0.5, "pattern": "block:2x2"},
    {"pattern": "2:4"},
    {"sparsity": 0.4, "pattern": "neuron"},
    {"sparsity": {"0": 0.5, "2": 0.3}},
    {"sparsity": 0.5, "preserve_zeros": True},
    {"sparsity": 0.6, "fidelity": "layer"},
    {"sparsity": 0.6, "fidelity": "diagonal", "repair": 0.5},
    {"budget": 0.3},
]


@pytest.mark.parametrize("options", ASKED, ids=lambda options: ",".join(f"{key}={value}" for key, value in options.items()))
def test_everything_that_can_be_asked_for_is_proven(options: dict[str, Any]) -> None:
    found = verified(network(), INPUTS, **options)
    assert found.complete, str(found)
    assert len(found.checks) > 40


@pytest.mark.parametrize("goal", ({"penalty": "l1", "epsilon": 0.15}, {"sparsity": 0.5}))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float16, torch.bfloat16))
def test_in_every_dtype(dtype: torch.dtype, goal: dict[str, float]) -> None:
    found = verified(network().to(dtype), INPUTS.to(dtype), **goal)
    assert found.complete, str(found)


def test_networks_that_are_no_chain_and_batches_that_are_no_tensor() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.one, self.two, self.last = nn.Linear(12, 9), nn.Linear(12, 9, bias=False), nn.Linear(9, 3)

        def forward(self, x: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"out": self.last((self.one(x) + self.two(x)).relu_() * scale)}

    batches = [{"x": part, "scale": torch.ones(len(part), 1)} for part in samples(90, 12).view(30, 3, 12).split(7)]
    batches = [{"x": batch["x"], "scale": torch.ones(len(batch["x"]), 1, 1)} for batch in batches]
    model = Sum()
    before, hooks = state_of(model), hooks_of(model)
    found = verified(model, batches, epsilon=0.2)
    assert found.complete, str(found)
    assert {check.what: check.found for check in found.checks}["guaranteed"] is None
    assert same_bits(before, state_of(model)) and hooks_of(model) == hooks


def test_a_single_layer_and_a_layer_with_dead_inputs() -> None:
    torch.manual_seed(1)
    assert verified(nn.Linear(12, 5), INPUTS, epsilon=0.2).complete
    dead = INPUTS.clone()
    dead[:, 3:9] = 0
    assert verified(network(), dead, epsilon=0.2).complete
    assert verified(network(), torch.zeros(40, 12), epsilon=0.2).holds


def test_reweighting_is_said_not_to_be_proven() -> None:
    found = verified(network(), INPUTS, epsilon=0.15, penalty="l1", reweight=2)
    assert found.holds and not found.complete
    assert {check.what for check in found.unproven} == {"objective", "lower_bound"} and "reweighting" in str(found)


def test_bounds_and_digests_can_be_left_out() -> None:
    model = network()
    result = nettrim.prune(model, INPUTS, epsilon=0.15, penalty="l1")
    quick = nettrim.verify(model, result.model, INPUTS, result.report, bounds=False)
    assert quick.holds and {check.what for check in quick.unproven} == {"lower_bound"}
    unsigned = Report.from_dict(result.report.to_dict() | {"digests": {}})
    found = nettrim.verify(model, result.model, INPUTS, unsigned)
    assert found.holds and [check.what for check in found.unproven] == ["digests"]


def test_layers_kept_dense() -> None:
    model = network()
    result = nettrim.prune(model, INPUTS, epsilon=0.15, penalty="l1", kappa=1e-12, on_failure="keep_dense")
    assert "kept dense" in result.report.skipped["4"]
    assert nettrim.verify(model, result.model, INPUTS, result.report).complete


def test_the_table() -> None:
    model = network()
    result = nettrim.prune(model, INPUTS, epsilon=0.15, penalty="l1")
    found = nettrim.verify(model, result.model, INPUTS, result.report)
    assert str(found).startswith(f"verification holds: {len(found.checks)} of {len(found.checks)} checks")
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["holds"] is True
    forged = dataclasses.replace(result.report, density=math.nan)
    broken = nettrim.verify(model, result.model, INPUTS, forged, bounds=False)
    assert str(broken).startswith("VERIFICATION FAILS") and "network: density: stated nan" in str(broken)
    assert not broken.holds and not Verification(()).holds and not Verification(()).complete
    json.dumps(broken.to_dict(), allow_nan=False)


def test_a_figure_that_is_no_number_never_holds() -> None:
    assert compare("a", "b", math.nan, math.nan).outcome == "broken"
    assert compare("a", "b", math.inf, math.inf).outcome == "holds"
    assert compare("a", "b", math.inf, 1.0, 1e9).outcome == "broken"
    assert compare("a", "b", 1.0, 1.1, 0.2).outcome == "holds"
    assert decide("a", "b", None, None, None).outcome == "not proven"


def test_what_is_refused() -> None:
    model = network()
    report = nettrim.prune(model, INPUTS, epsilon=0.15, penalty="l1").report
    for arguments, words in (
        (("model", model, INPUTS, report), "dense_model is a str"),
        ((model, None, INPUTS, report), "pruned_model is a NoneType"),
        ((model, model, INPUTS, report.to_dict()), "report is a dict"),
    ):
        with pytest.raises(ArgumentError, match=words):
            nettrim.verify(*arguments)  # type: ignore[arg-type]
    for key, value in (("gamma", "x"), ("gamma", True), ("mode", 3), ("holdout", 2), ("seed", 0.5), ("epsilon", {"re:(": 1.0}), ("pattern", "0:0")):
        forged = dataclasses.replace(report, options={**report.options, key: value})
        with pytest.raises(ArgumentError, match=f"option {key}="):
            nettrim.verify(model, model, INPUTS, forged)


def test_another_architecture_is_broken_not_a_crash() -> None:
    model, other = network(), chain(12, 16, 16, 8, 4)
    result = nettrim.prune(model, INPUTS, epsilon=0.15, penalty="l1")
    for dense, pruned in ((model, other), (other, result.model)):
        assert not nettrim.verify(dense, pruned, INPUTS, result.report).holds


# -- the verifier's own bound -------------------------------------------------------------------------------------------------------


def problem_of(program: LayerProgram) -> Problem:
    A, Y, V = (None if array is None else array.numpy() for array in program.arrays)
    assert A is not None and Y is not None and program.epsilon is not None and isinstance(program.l1_weights, torch.Tensor)
    if program.one_sided and V is None:
        V = np.zeros_like(Y)
    return Problem(A, Y, program.l1_weights.double().numpy(), program.epsilon, program.relu, V)


@pytest.mark.parametrize("kind", [name for name, kind in KINDS.items() if kind.budget])
@pytest.mark.parametrize("structure", [name for name in STRUCTURES if name != "weighted"])
def test_it_proves_what_solvers_prove(kind: str, structure: str) -> None:
    program = random_program(KINDS[kind], 1, structure)
    solution = nettrim.solve(program, tol=1e-3)
    found = bound(problem_of(program), solution.weights.numpy(), stated=solution.lower_bound)
    assert found.lower >= solution.lower_bound * (1 - 1e-6)
    assert found.lower <= solution.objective * (1 + 1e-4)


@pytest.mark.parametrize("kind", [name for name, kind in KINDS.items() if kind.budget and not kind.one_sided])
@pytest.mark.parametrize("index", range(0, TRAINED_PROGRAMS, 3))
def test_it_closes_the_gap_from_both_sides(kind: str, index: int) -> None:
    program = trained_program(KINDS[kind], index)
    solution = nettrim.solve(program, tol=1e-2)
    found = bound(problem_of(program), solution.weights.numpy(), stated=math.inf)
    assert found.lower <= found.upper * (1 + 1e-12) <= solution.objective * (1 + 1e-9)
    exact = nettrim.solve(program, "cvxpy", tol=1e-6).objective
    assert found.lower == pytest.approx(exact, rel=1e-5) and found.upper == pytest.approx(exact, rel=1e-3)
