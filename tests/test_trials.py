"""Options that are found by trying (budget, repair='auto'), the l0 penalty within an epsilon, and reweighted rounds."""

import copy

import pytest
import torch
from networks import chain, samples, state_of

import nettrim
from nettrim import ArgumentError, InfeasibleError, trials


@pytest.mark.parametrize("pattern", ["unstructured", "neuron"])
@pytest.mark.parametrize("budget", [0.05, 0.3])
def test_a_budget_is_kept_and_nearly_spent(digits_network, budget, pattern):
    model, calibration, _, _ = digits_network
    result = nettrim.prune(model, calibration, budget=budget, pattern=pattern, allocation="uniform")
    measured = result.report.certificate.relative_measured
    assert result.report.certificate.holds
    assert measured <= budget
    assert result.report.options["budget"] == budget
    sparsity = result.report.options["sparsity"]
    if pattern == "unstructured":
        assert measured >= 0.8 * budget
        assert result.report.density == pytest.approx(1 - sparsity, abs=2e-3)
    assert 0 < sparsity < 1


def test_a_larger_budget_leaves_fewer_weights(digits_network):
    model, calibration, _, _ = digits_network
    densities = [nettrim.prune(model, calibration, budget=budget).report.density for budget in (0.05, 0.1, 0.3)]
    assert densities == sorted(densities, reverse=True)


def test_a_budget_that_nothing_keeps_is_an_error_and_the_model_is_as_it_was(digits_network):
    model, calibration, _, _ = digits_network
    model = copy.deepcopy(model)
    before = state_of(model)
    with pytest.raises(InfeasibleError, match="budget=1e-09.*raise it"):
        nettrim.prune(model, calibration, budget=1e-9, inplace=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_error_names_the_last_sparsity_that_was_tried(digits_network, monkeypatch):
    model, calibration, _, _ = digits_network
    tried = []
    once = trials.once
    monkeypatch.setattr(trials, "once", lambda task, options: (tried.append(options.sparsity), once(task, options))[1])
    with pytest.raises(InfeasibleError) as caught:
        nettrim.prune(model, calibration, budget=1e-9)
    assert f"at a sparsity of {tried[-1]:.3g} the output is still off" in str(caught.value)


def test_repair_is_chosen_on_the_samples_kept_out(digits_network):
    model, calibration, _, _ = digits_network
    auto = nettrim.prune(model, calibration, sparsity=0.9, repair="auto")
    tried = {repair: nettrim.prune(model, calibration, sparsity=0.9, repair=repair) for repair in (1.0, 0.75, 0.5, 0.25)}
    best = min(tried.values(), key=lambda result: result.report.certificate.holdout)
    assert auto.report.certificate.holdout == best.report.certificate.holdout
    assert auto.report.options["repair"] == best.report.options["repair"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, "budget=0; expected a number above 0"),
        ({"budget": 0.1, "sparsity": 0.5}, "sparsity=0.5 and budget=0.1; expected exactly one"),
        ({"budget": 0.1, "pattern": "2:4"}, "which says the sparsity"),
        ({"sparsity": 0.5, "repair": "auto", "holdout": 0.0}, "repair='auto' with holdout=0"),
        ({"sparsity": 0.5, "repair": "some"}, "repair='some'"),
        ({"sparsity": 0.5, "allocation": "some"}, "allocation='some'; expected 'auto' or 'uniform'"),
        ({"sparsity": 0.5, "reweight": 2}, "reweight=2 was given without epsilon"),
        ({"sparsity": 0.5, "gamma": 1.2}, "gamma=1.2 was given without epsilon"),
        ({"epsilon": 0.1, "penalty": "l0", "reweight": 2}, "reweight=2; expected penalty='l1'"),
        ({"epsilon": 0.1, "penalty": "l0", "solver": "cvxpy"}, "solver='cvxpy'; expected penalty='l1'"),
        ({"epsilon": 0.1, "reweight": -1}, "reweight=-1; expected a whole number"),
        ({"epsilon": 0.1, "penalty": "l0", "consistency": "paper"}, "consistency='paper'; expected penalty='l1'"),
    ],
)
def test_what_makes_no_sense_is_refused(digits_network, options, message):
    model, calibration, _, _ = digits_network
    with pytest.raises(ArgumentError, match=message):
        nettrim.prune(model, calibration, **options)


@pytest.mark.parametrize("mode", ["cascade", "parallel"])
def test_l0_keeps_the_same_budget_with_fewer_weights(digits_network, mode):
    model, calibration, _, _ = digits_network
    fewest, shrunk = (nettrim.prune(model, calibration, epsilon=0.15, penalty=penalty, mode=mode) for penalty in ("l0", "l1"))
    assert fewest.report.certificate.holds
    assert fewest.report.density < 0.8 * shrunk.report.density
    for layer in fewest.report.layers:
        assert layer.discrepancy <= layer.epsilon
        assert layer.objective == layer.nonzeros


@pytest.mark.parametrize("executor", [False, True])
def test_reweighted_rounds_keep_the_budget_and_a_proof_with_fewer_weights(digits_network, executor):
    from concurrent.futures import ThreadPoolExecutor

    model, calibration, _, _ = digits_network
    with ThreadPoolExecutor(2) as pool:
        options = {"mode": "parallel", "penalty": "l1", "executor": pool if executor else None}
        once = nettrim.prune(model, calibration, epsilon=0.1, **options).report
        again = nettrim.prune(model, calibration, epsilon=0.1, reweight=2, **options).report
    assert again.certificate.holds
    assert again.density < once.density
    for layer in again.layers:
        assert layer.status == "optimal"
        assert layer.gap <= 1e-3
        assert layer.discrepancy <= layer.epsilon


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("epsilon", [0.05, 0.2])
def test_the_fewest_weights_are_never_more_than_the_papers_program_keeps(seed, epsilon):
    """Also where all weights leave no misfit at all, which says nothing of how many a budget needs."""
    model = chain(20, 40, 10, seed=seed)
    options = {"epsilon": epsilon, "mode": "parallel"}
    fewest, shrunk = (nettrim.prune(model, samples(300, 20), penalty=penalty, **options).report for penalty in ("l0", "l1"))
    for one, other in zip(fewest.layers, shrunk.layers, strict=True):
        assert one.nonzeros < other.nonzeros
        assert one.discrepancy <= one.epsilon
