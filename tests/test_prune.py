"""What `nettrim.prune` promises on a chain: budgets, discrepancies, the cascade's rule, masks and counts, each computed again here."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from networks import by_name, chain, same_bits, samples, solved_on, stages, state_of
from torch import Tensor, nn

import nettrim
from nettrim import InfeasibleError

prune = partial(nettrim.prune, penalty="l1")  # the papers' program

MODES = ("parallel", "cascade")
SETS = ("relaxed", "paper")


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).float().mean())


@pytest.mark.parametrize("consistency", SETS)
@pytest.mark.parametrize("mode", MODES)
def test_a_trained_network_keeps_every_promise(digits_network: Any, mode: str, consistency: str) -> None:
    model, inputs, test_inputs, test_labels = digits_network
    before = state_of(model)
    result = prune(model, inputs, epsilon=0.1, mode=mode, consistency=consistency)
    solved, _ = solved_on(inputs)
    found = stages(model, result.model, solved)
    assert [layer.name for layer in result.report.layers] == ["0", "2", "4"]
    assert [layer.activation for layer in result.report.layers] == ["relu", "relu", None]
    for stage, layer in zip(found, result.report.layers, strict=True):
        norm = float(stage.targets.norm())
        assert layer.rows == len(solved)
        assert layer.shape == tuple(stage.weight.shape)
        assert layer.discrepancy == pytest.approx(stage.discrepancy(mode), rel=1e-4)
        assert layer.relative_discrepancy == pytest.approx(layer.discrepancy / norm, rel=1e-5)
        assert layer.discrepancy <= layer.epsilon
        assert layer.status == ("optimal" if layer.gap <= 1e-3 else "feasible")
        assert layer.gap <= 2e-2
        assert layer.lower_bound <= layer.objective * (1 + 1e-3)
        assert layer.objective == pytest.approx(float(stage.pruned_weight.abs().sum() + stage.pruned_bias.abs().sum()), rel=1e-5)
        assert layer.objective < float(stage.weight.abs().sum() + stage.bias.abs().sum())
        if mode == "parallel" or stage is found[0]:
            assert layer.epsilon == pytest.approx(0.1 * norm, rel=1e-5)
    assert result.report.certificate.holds
    assert result.report.skipped == {}
    assert result.report.density < 0.8
    assert accuracy(result.model, test_inputs, test_labels) > accuracy(model, test_inputs, test_labels) - 0.1
    assert same_bits(state_of(model), before)


@pytest.mark.parametrize("gamma", (1.0, 1.1, 2.0))
def test_cascade_budget_on_the_relaxed_set(gamma: float) -> None:
    model, inputs = chain(10, 12, 8, 5), samples(150, 10)
    result = prune(model, inputs, epsilon=0.1, gamma=gamma)
    for stage in stages(model, result.model, solved_on(inputs)[0])[1:]:
        layer = by_name(result)[stage.name]
        assert layer.epsilon == pytest.approx(math.sqrt(gamma * sum(stage.dense_misfits())), rel=1e-4)
        assert layer.discrepancy == pytest.approx(stage.discrepancy("cascade"), rel=1e-4)


@pytest.mark.parametrize("gamma", (1.0, 1.1, 2.0))
def test_cascade_promise_on_the_papers_set(gamma: float) -> None:
    model, inputs = chain(10, 12, 8, 5), samples(150, 10)
    result = prune(model, inputs, epsilon=0.1, gamma=gamma, consistency="paper")
    for stage in stages(model, result.model, solved_on(inputs)[0])[1:]:
        on, off = stage.dense_misfits()
        layer = by_name(result)[stage.name]
        assert (off > 0) == stage.relu
        assert layer.epsilon == pytest.approx(math.sqrt(gamma * on + off), rel=1e-4)
        # the program itself: the misfit on Ω, and z <= v off Ω up to its tolerance
        Z = stage.pruned_inputs @ stage.pruned_weight.T + stage.pruned_bias
        V = stage.pruned_inputs @ stage.weight.T + stage.bias
        Y = stage.targets
        support = Y > 0 if stage.relu else torch.ones_like(Y, dtype=torch.bool)
        assert float((Z - Y)[support].norm()) <= math.sqrt(gamma * on) * (1 + 1e-5)
        assert float((Z - V)[~support].clamp(min=0).norm()) <= 2e-4 * math.sqrt(gamma * on)


def test_papers_set_in_parallel_stays_silent_off_the_support() -> None:
    model, inputs = chain(10, 12, 8, 5), samples(150, 10)
    result = prune(model, inputs, epsilon=0.1, mode="parallel", consistency="paper")
    for stage in stages(model, result.model, solved_on(inputs)[0]):
        if stage.relu:
            out = stage.output(stage.dense_inputs, pruned=True)
            assert float(out[stage.targets <= 0].norm()) <= 2e-4 * by_name(result)[stage.name].epsilon


def test_the_relaxed_optimum_is_never_above_the_papers(digits_network: Any) -> None:
    model, inputs, _, _ = digits_network
    relaxed, paper = (prune(model, inputs, epsilon=0.1, mode="parallel", consistency=each, targets=["0", "2"]) for each in SETS)
    for name, layer in by_name(paper).items():
        assert by_name(relaxed)[name].objective <= layer.objective * (1 + 2e-3)


@pytest.mark.parametrize("consistency", SETS)
def test_kappa_tightens_the_last_layer_only(consistency: str) -> None:
    model, inputs = chain(10, 12, 8, 5), samples(150, 10)
    result = prune(model, inputs, epsilon=0.1, kappa=0.92, consistency=consistency)
    _, middle, last = stages(model, result.model, solved_on(inputs)[0])
    on, off = middle.dense_misfits()
    gammas = (1.1, 1.0) if consistency == "paper" else (1.1, 1.1)
    assert by_name(result)["2"].epsilon == pytest.approx(math.sqrt(gammas[0] * on + gammas[1] * off), rel=1e-4)
    assert by_name(result)["4"].epsilon == pytest.approx(math.sqrt(0.92 * 1.1 * sum(last.dense_misfits())), rel=1e-4)
    assert result.report.certificate.holds


@pytest.mark.parametrize("consistency", SETS)
def test_an_infeasible_kappa_says_what_would_be_feasible(consistency: str) -> None:
    model, inputs = chain(10, 12, 8, 5), samples(150, 10)
    before = state_of(model)
    with pytest.raises(InfeasibleError, match=r"layer '4'.*raise kappa, or gamma, by a factor above [\d.]+") as caught:
        prune(model, inputs, epsilon=0.1, kappa=0.01, consistency=consistency)
    assert same_bits(state_of(model), before)
    factor = float(str(caught.value).split("by a factor above ")[1].split()[0].rstrip("."))
    enough = min(0.01 * factor * 1.02, 1.0)
    assert prune(model, inputs, epsilon=0.1, kappa=enough, consistency=consistency).report.certificate.holds
    with pytest.raises(InfeasibleError):
        prune(model, inputs, epsilon=0.1, kappa=0.01 * factor * 0.95, consistency=consistency)


def test_keep_dense_lists_what_could_not_be_solved() -> None:
    model, inputs = chain(10, 12, 8, 5), samples(150, 10)
    events: list[nettrim.ProgressEvent] = []
    result = prune(model, inputs, epsilon=0.1, kappa=0.01, on_failure="keep_dense", progress=events.append)
    assert [layer.name for layer in result.report.layers] == ["0", "2"]
    assert list(result.report.skipped) == ["4"]
    assert result.report.skipped["4"].startswith("kept dense: no weights keep the budget")
    assert torch.equal(result.model[4].weight, model[4].weight)
    assert set(result.masks) == {"0.weight", "2.weight"}
    assert [(event.layer, event.status) for event in events][2] == ("4", "infeasible")
    assert result.report.certificate.holds
    assert result.report.certificate.guaranteed >= result.report.certificate.measured


def test_keep_dense_when_every_layer_fails() -> None:
    """A budget below what float16 can hold: the only layer stays dense, and the report says so."""
    model, inputs = chain(10, 6, dtype=torch.float16), samples(150, 10)
    result = prune(model, inputs, epsilon=1e-5, on_failure="keep_dense")
    assert result.report.layers == () and result.masks == {}
    assert result.report.skipped["0"].startswith("kept dense: ")
    assert same_bits(state_of(result.model), state_of(model))
    certificate = result.report.certificate
    assert certificate.holds and certificate.measured == 0 and "no layer was pruned" in certificate.explanation
    assert result.report.density == 1
    assert "kept dense" in str(result.report)


@pytest.mark.parametrize("mode", MODES)
def test_a_mapping_sets_each_layers_own_budget(mode: str) -> None:
    model, inputs = chain(10, 12, 8, 5), samples(150, 10)
    result = prune(model, inputs, epsilon={"*": 0.2, "2": 0.3, "re:0": 0.05}, mode=mode)
    for stage in stages(model, result.model, solved_on(inputs)[0]):
        share = {"0": 0.2, "2": 0.3, "4": 0.2}[stage.name]  # the name before patterns, the first pattern before later ones
        assert by_name(result)[stage.name].epsilon == pytest.approx(share * float(stage.targets.norm()), rel=1e-5)
    assert result.report.certificate.holds


def test_layers_without_a_budget_of_their_own_stay_dense() -> None:
    model, inputs = chain(10, 12, 8, 5), samples(150, 10)
    result = prune(model, inputs, epsilon={"2": 0.1})
    assert [layer.name for layer in result.report.layers] == ["2"]
    assert set(result.report.skipped) == {"0", "4"}
    assert all("epsilon" in reason for reason in result.report.skipped.values())
    assert torch.equal(result.model[0].weight, model[0].weight)


@pytest.mark.parametrize("choice", ({"ignore": "0"}, {"ignore": ["re:[0]"]}, {"targets": ["2", "4"]}, {"targets": "re:[24]"}))
def test_the_first_pruned_layer_has_the_epsilon_budget(choice: dict[str, Any]) -> None:
    model, inputs = chain(10, 12, 8, 5), samples(150, 10)
    result = prune(model, inputs, epsilon=0.1, **choice)
    _, middle, last = stages(model, result.model, solved_on(inputs)[0])
    assert by_name(result)["2"].epsilon == pytest.approx(0.1 * float(middle.targets.norm()), rel=1e-5)
    assert by_name(result)["4"].epsilon == pytest.approx(math.sqrt(1.1 * sum(last.dense_misfits())), rel=1e-4)
    assert set(result.report.skipped) == {"0"}
    assert result.report.certificate.guaranteed is not None


@pytest.mark.parametrize("weight", (0.0, 1.0, 50.0))
def test_the_weight_of_the_bias_column(weight: float) -> None:
    model, inputs = chain(10, 12, 5), samples(150, 10) + 1
    result = prune(model, inputs, epsilon=0.2, mode="parallel", bias_weight=weight)
    for stage in stages(model, result.model, solved_on(inputs)[0]):
        expected = float(stage.pruned_weight.abs().sum() + weight * stage.pruned_bias.abs().sum())
        assert by_name(result)[stage.name].objective == pytest.approx(expected, rel=1e-5)


def test_a_free_bias_leaves_smaller_weights() -> None:
    model, inputs = chain(10, 12, 5), samples(150, 10) + 1
    free, counted = (prune(model, inputs, epsilon=0.2, mode="parallel", bias_weight=weight).model for weight in (0.0, 1.0))
    assert free[0].weight.detach().abs().sum() < counted[0].weight.detach().abs().sum()


def test_masks_and_density_count_weights_only() -> None:
    model, inputs = chain(10, 12, 5), samples(150, 10)
    result = prune(model, inputs, epsilon=0.3)
    assert set(result.masks) == {"0.weight", "2.weight"}
    parameters = dict(result.model.named_parameters())
    for name, mask in result.masks.items():
        assert mask.dtype == torch.bool and mask.shape == parameters[name].shape
        assert torch.equal(mask, parameters[name] != 0)
        layer = by_name(result)[name.removesuffix(".weight")]
        assert layer.nonzeros == int(mask.sum()) < mask.numel()
        assert layer.density == layer.nonzeros / mask.numel()
    assert result.report.density == sum(int(mask.sum()) for mask in result.masks.values()) / (12 * 10 + 5 * 12)


def test_a_model_that_is_itself_a_layer() -> None:
    result = prune(chain(10, 6)[0], samples(60, 10), epsilon=0.1)
    assert set(result.masks) == {"weight"} == set(dict(result.model.named_parameters())) - {"bias"}
    assert result.report.certificate.holds


def test_the_named_solvers_agree() -> None:
    model, inputs = chain(6, 7, 4), samples(60, 6)
    results = [prune(model, inputs, epsilon=0.15, mode="parallel", consistency="paper", solver=name) for name in ("prox_admm", "admm", "cvxpy")]
    assert [result.report.layers[0].solver for result in results] == ["prox_admm", "admm", "cvxpy"]
    for result in results:
        assert result.report.certificate.holds
        for layer, reference in zip(result.report.layers, results[-1].report.layers, strict=True):
            assert layer.objective == pytest.approx(reference.objective, rel=5e-3)


def test_a_tighter_tolerance_proves_a_smaller_gap() -> None:
    model, inputs = chain(8, 6), samples(60, 8)
    assert prune(model, inputs, epsilon=0.2, tol=1e-6).report.layers[0].gap <= 1e-6
