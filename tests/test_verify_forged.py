"""``nettrim.verify`` against forgers: whatever is changed in a report, a network, its masks or the data, is noticed, and named."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
from networks import chain, samples
from torch import nn

import nettrim
from nettrim import PruneResult, Report, Verification, digests

LOWER = 0.99
MODEL, INPUTS = chain(10, 14, 9, 6), samples(80, 10)
CALLS: dict[str, dict[str, Any]] = {
    "cascade": {"penalty": "l1", "epsilon": 0.15},
    "parallel, papers' set": {"penalty": "l1", "epsilon": 0.15, "mode": "parallel", "consistency": "paper"},
    "sparsity": {"sparsity": 0.6},
    "l0": {"epsilon": 0.2, "penalty": "l0"},
    "loose": {"penalty": "l1", "epsilon": 0.15, "max_iter": 12, "tol": 1e-9},
}
RESULTS = {name: nettrim.prune(MODEL, INPUTS, **options) for name, options in CALLS.items()}
by_call = pytest.mark.parametrize("call", CALLS)
# what no one can compute again: only the report's own digest tells that it was changed (docs/verify.md)
UNKNOWABLE = {"seconds", "iterations"}


def check(result: PruneResult, **changes: Any) -> Verification:
    given: dict[str, Any] = {"dense_model": MODEL, "pruned_model": result.model, "calibration": INPUTS, "report": result.report} | changes
    return nettrim.verify(given.pop("dense_model"), given.pop("pruned_model"), given.pop("calibration"), given.pop("report"), **given)


def names(found: Verification) -> set[str]:
    return {check.what for check in found.broken}


def resealed(report: Report) -> Report:
    """What a forger does who knows of the digest of the report."""
    body = {key: value for key, value in report.to_dict().items() if key not in ("schema", "digests")}
    return dataclasses.replace(report, digests=report.digests | {"report": digests.record_digest(body)})


def lowered(value: float) -> float:
    return math.floor(value * LOWER) if isinstance(value, int) else value * LOWER


def forgeries(report: Report) -> dict[str, Report]:
    """The report with each of its figures lowered by 1 %, by where it is."""
    found = {}
    for field in ("density", "seconds"):
        found[field] = dataclasses.replace(report, **{field: lowered(getattr(report, field))})
    for key, value in vars(report.certificate).items():
        if isinstance(value, float):
            found[f"certificate.{key}"] = dataclasses.replace(report, certificate=dataclasses.replace(report.certificate, **{key: lowered(value)}))
    for index, layer in enumerate(report.layers):
        for key, value in vars(layer).items():
            if isinstance(value, int | float) and value != 0:
                changed = dataclasses.replace(layer, **{key: lowered(value)})
                found[f"{layer.name}.{key}"] = dataclasses.replace(report, layers=(*report.layers[:index], changed, *report.layers[index + 1 :]))
        for side in range(2):
            shape = tuple(lowered(length) if place == side else length for place, length in enumerate(layer.shape))
            changed = dataclasses.replace(layer, shape=shape)
            found[f"{layer.name}.shape[{side}]"] = dataclasses.replace(report, layers=(*report.layers[:index], changed, *report.layers[index + 1 :]))
    for key, value in report.options.items():
        if isinstance(value, int | float) and not isinstance(value, bool) and value != 0:
            found[f"options.{key}"] = dataclasses.replace(report, options={**report.options, key: lowered(value)})
    return found


@by_call
def test_what_prune_made_is_proven(call: str) -> None:
    result = RESULTS[call]
    found = check(result, masks=result.masks)
    assert found.holds and found.complete, str(found)
    again = check(result, report=Report.from_dict(result.report.to_dict()), masks=result.masks)
    assert again.checks == found.checks


@by_call
def test_every_figure_lowered_by_a_hundredth_is_noticed(call: str) -> None:
    for where, report in forgeries(RESULTS[call].report).items():
        found = check(RESULTS[call], report=report, bounds=False)
        assert "digest of the report" in names(found), where


def figures_that_say_something() -> list[tuple[str, str]]:
    """Figures that must not move even where the forger has renewed the digest; of the options, those that made the figures."""
    made_by = {
        "cascade": ("epsilon", "gamma", "bias_weight"),
        "parallel, papers' set": ("epsilon", "bias_weight"),
        "loose": ("epsilon", "gamma", "bias_weight"),
        "l0": ("epsilon", "gamma"),
        "sparsity": (),
    }
    return [
        (call, where)
        for call, result in RESULTS.items()
        for where in forgeries(result.report)
        if where.rpartition(".")[2] not in UNKNOWABLE and (not where.startswith("options.") or where.partition(".")[2] in made_by[call])
    ]


@pytest.mark.parametrize(("call", "where"), figures_that_say_something())
def test_and_so_it_is_with_a_new_digest(call: str, where: str) -> None:
    found = check(RESULTS[call], report=resealed(forgeries(RESULTS[call].report)[where]))
    assert not found.holds
    figure = where.rpartition(".")[2].partition("[")[0]
    if not where.startswith("options."):  # an option shows by the figures that it made
        expected = {figure, "gap"} if figure in ("objective", "lower_bound") else {figure}
        assert names(found) & expected, (where, names(found))


@pytest.mark.parametrize("call", ("cascade", "parallel, papers' set"))
def test_a_bound_raised_by_a_hundredth_is_refuted(call: str) -> None:
    """With the gap made to fit and a new digest: what it claims is false, so weights within the budget disprove it."""
    report = RESULTS[call].report
    for index, layer in enumerate(report.layers):
        raised = 1.01 * layer.lower_bound
        forged = dataclasses.replace(layer, lower_bound=raised, gap=abs(layer.objective - raised) / layer.objective)
        forged = dataclasses.replace(forged, status="optimal" if forged.gap <= 1e-3 else "feasible")
        changed = dataclasses.replace(report, layers=(*report.layers[:index], forged, *report.layers[index + 1 :]))
        assert names(check(RESULTS[call], report=resealed(changed))) >= {"lower_bound"}


def test_a_bound_that_is_false_below_the_objective_is_refuted_too() -> None:
    """A solution far from its optimum leaves room for a false bound that no comparison of stated figures can tell: the verifier's own weights do."""
    report = RESULTS["loose"].report
    optimal = RESULTS["cascade"].report.layers[0]
    layer = report.layers[0]
    assert layer.epsilon == optimal.epsilon and layer.objective > 1.02 * optimal.objective  # the same program, solved worse
    for bound, good in ((optimal.lower_bound, True), (0.5 * (optimal.objective + layer.objective), False)):
        forged = dataclasses.replace(layer, lower_bound=bound, gap=(layer.objective - bound) / layer.objective)
        found = check(RESULTS["loose"], report=resealed(dataclasses.replace(report, layers=(forged, *report.layers[1:]))))
        assert found.complete == good, str(found)
        assert names(found) == (set() if good else {"lower_bound"})


def renewed(result: PruneResult, model: nn.Module, **changes: Any) -> Report:
    """A report whose digests fit another pruned network or other data."""
    inputs, dense = changes.get("calibration", INPUTS), changes.get("dense_model", MODEL)
    return digests.sign(result.report, dense, model, nettrim.calibration.batches(inputs))


@by_call
@pytest.mark.parametrize("new_digests", (False, True))
def test_one_weight_changed(call: str, new_digests: bool) -> None:
    result = RESULTS[call]
    for name in ("0", "2", "4"):
        for size in (1.01, 0.0):
            model = copy.deepcopy(result.model)
            with torch.no_grad():
                weight = model.get_submodule(name).get_parameter("weight").view(-1)
                weight[int(weight.abs().argmax())] *= size
            report = renewed(result, model) if new_digests else result.report
            found = check(result, pruned_model=model, report=report, masks=result.masks, bounds=False)
            assert ("digest of the pruned model" in names(found)) is not new_digests
            assert any(check.subject == f"layer {name}" for check in found.broken), str(found)


def test_the_smallest_change_of_a_weight_shows_in_the_digest() -> None:
    model = copy.deepcopy(RESULTS["cascade"].model)
    with torch.no_grad():
        weight = model.get_submodule("2").get_parameter("weight").view(-1)
        weight[0] = torch.nextafter(weight[0], torch.tensor(9.0))
    assert names(check(RESULTS["cascade"], pruned_model=model, bounds=False)) >= {"digest of the pruned model"}


@pytest.mark.parametrize("name", ("0.weight", "4.weight"))
def test_a_mask_bit_flipped(name: str) -> None:
    result = RESULTS["cascade"]
    masks = {key: mask.clone() for key, mask in result.masks.items()}
    masks[name].view(-1)[3] ^= True
    broken = check(result, masks=masks, bounds=False).broken
    assert [(check.subject, check.what, check.found) for check in broken] == [("masks", name, 1)]
    assert names(check(result, masks={name: masks[name]}, bounds=False)) >= {"names", name}
    assert name in names(check(result, masks=masks | {name: masks[name].float()}, bounds=False))


@by_call
@pytest.mark.parametrize("new_digests", (False, True))
def test_other_calibration_data(call: str, new_digests: bool) -> None:
    result = RESULTS[call]
    for other in (samples(80, 10, seed=9), INPUTS.flip(0), INPUTS * 1.02):
        report = renewed(result, result.model, calibration=other) if new_digests else result.report
        found = names(check(result, calibration=other, report=report, bounds=False))
        assert ("digest of the calibration" in found) is not new_digests
        assert found & {"discrepancy", "epsilon", "holdout", "measured"}


def test_the_same_samples_in_other_batches_are_the_same_data() -> None:
    assert check(RESULTS["cascade"], calibration=list(INPUTS.split(16))).complete


@pytest.mark.parametrize("new_digests", (False, True))
def test_a_permuted_layer(new_digests: bool) -> None:
    """The neurons of one layer in another order, and the next layer's inputs with them: the network computes the same."""
    result = RESULTS["cascade"]
    model, order = copy.deepcopy(result.model), torch.arange(14).roll(1)
    with torch.no_grad():
        first, second = model.get_submodule("0"), model.get_submodule("2")
        first.weight.copy_(first.weight[order].clone())
        first.bias.copy_(first.bias[order].clone())
        second.weight.copy_(second.weight[:, order].clone())
    assert torch.allclose(model(INPUTS), result.model(INPUTS), atol=1e-5)
    found = check(result, pruned_model=model, report=renewed(result, model) if new_digests else result.report, bounds=False)
    assert {"discrepancy", "promise kept"} <= names(found)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float16, torch.bfloat16))
def test_another_dtype(dtype: torch.dtype) -> None:
    result = RESULTS["cascade"]
    found = check(result, pruned_model=copy.deepcopy(result.model).to(dtype))
    assert "dtypes and shapes" in names(found)
    both = copy.deepcopy(MODEL).to(dtype)
    assert names(check(result, dense_model=both, pruned_model=copy.deepcopy(result.model).to(dtype), bounds=False)) >= {"digest of the dense model"}


def test_another_dense_network() -> None:
    result, other = RESULTS["cascade"], chain(10, 14, 9, 6, seed=5)
    report = digests.sign(result.report, other, result.model, nettrim.calibration.batches(INPUTS))
    assert {"epsilon", "discrepancy", "measured"} <= names(check(result, dense_model=other, report=report, bounds=False))


def test_a_layer_that_was_not_pruned_must_not_change() -> None:
    result = nettrim.prune(MODEL, INPUTS, epsilon=0.15, penalty="l1", ignore="2")
    assert check(result).complete
    model = copy.deepcopy(result.model)
    with torch.no_grad():
        model.get_submodule("2").get_parameter("bias")[0] += 1e-3
    assert "other tensors" in names(check(result, pruned_model=model, report=renewed(result, model), bounds=False))
    silent = resealed(dataclasses.replace(result.report, skipped={}))
    assert names(check(result, report=silent, bounds=False)) == {"layers left dense"}


def test_names_and_words_are_checked_too() -> None:
    result = RESULTS["cascade"]
    layers = result.report.layers
    for change, expected in (
        ({"activation": None}, "activation"),
        ({"status": "feasible"}, "status"),
        ({"name": "nowhere"}, "layers"),
    ):
        forged = dataclasses.replace(result.report, layers=(dataclasses.replace(layers[0], **change), *layers[1:]))
        assert expected in names(check(result, report=resealed(forged), bounds=False))
    swapped = dataclasses.replace(result.report, layers=(layers[1], layers[0], layers[2]))
    assert "layers that ran" in names(check(result, report=resealed(swapped), bounds=False))
    broken = dataclasses.replace(result.report, certificate=dataclasses.replace(result.report.certificate, holds=False))
    assert names(check(result, report=resealed(broken), bounds=False)) == {"verdict"}
