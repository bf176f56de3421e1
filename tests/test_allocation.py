"""How one sparsity is spread: metrics against their definition, the least sum against enumeration, and less lost at the end."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from networks import chain, hooks_of, samples
from torch import nn

import nettrim
from nettrim import ArgumentError, allocation, calibration
from nettrim.allocation import Curve, spread
from nettrim.metrics import Metric
from nettrim.sensitivity import output_metrics
from nettrim.tracing import trace


def layers_of(model, inputs):
    return trace(model, calibration.batches(inputs), calibration.runner()).layers


def damped(S):
    return S + 0.1 * S.diagonal().mean() * torch.eye(len(S), dtype=S.dtype)


def test_metrics_are_the_mean_products_of_the_jacobian():
    model = chain(6, 5, 4, 3, dtype=torch.float64)
    inputs = samples(3000, 6).double()
    found = output_metrics(model, calibration.batches(inputs), calibration.runner(), layers_of(model, inputs), 0)
    torch.testing.assert_close(found["4"].matrix, damped(torch.eye(3, dtype=torch.float64)), rtol=0, atol=0.05)
    # by hand for the first layer: ∂f/∂z = W₃ diag(z₂ > 0) W₂ diag(z₁ > 0)
    with torch.no_grad():
        z1 = model[0](inputs)
        z2 = model[2](z1.relu())
        jacobians = torch.einsum("ij,pj,jk,pk->pik", model[4].weight, (z2 > 0).double(), model[2].weight, (z1 > 0).double())
        exact = torch.einsum("pik,pil->kl", jacobians, jacobians) / len(inputs)
    torch.testing.assert_close(found["0"].matrix, Metric.leading(damped(exact)).matrix, rtol=0, atol=0.1 * float(exact.diagonal().max()))


def noted(monkeypatch):
    """The matrices that metrics are made of, in the order in which they are."""
    sums = []
    inner = Metric.leading
    monkeypatch.setattr(Metric, "leading", lambda S: (sums.append(S), inner(S))[1])
    return sums


def test_of_very_wide_layers_the_diagonal_is_taken(monkeypatch):
    sums = noted(monkeypatch)
    model, inputs = chain(6, 5, 3, dtype=torch.float64), samples(500, 6).double()
    whole = output_metrics(model, calibration.batches(inputs), calibration.runner(), layers_of(model, inputs), 0)
    monkeypatch.setattr("nettrim.sensitivity._WIDEST", 4)
    found = output_metrics(model, calibration.batches(inputs), calibration.runner(), layers_of(model, inputs), 0)
    assert found["2"].couples and not found["0"].couples
    torch.testing.assert_close(found["0"].own / found["0"].own.mean(), sums[0].diagonal() / sums[0].diagonal().mean())
    torch.testing.assert_close(found["2"].matrix, whole["2"].matrix)
    assert nettrim.prune(model, inputs, sparsity={"*": 0.5}).report.certificate.holds


def test_a_layer_that_the_output_does_not_feel_counts_all_errors_alike():
    model = chain(6, 5, 3)
    with torch.no_grad():
        model[2].weight.zero_()
    found = output_metrics(model, calibration.batches(samples(50, 6)), calibration.runner(), layers_of(model, samples(50, 6)), 0)
    assert torch.equal(found["0"].matrix, torch.eye(5))


def test_fidelity_to_the_network_serves_its_output_and_fidelity_to_the_layer_the_layer():
    model, inputs = chain(20, 30, 12, 4), samples(2000, 20)
    reports = {how: nettrim.prune(model, inputs, sparsity={"*": 0.8}, fidelity=how).report for how in ("network", "layer")}
    assert reports["network"].certificate.relative_measured < 0.95 * reports["layer"].certificate.relative_measured
    assert reports["network"].layers[0].discrepancy > reports["layer"].layers[0].discrepancy


def test_metrics_leave_the_model_as_it_was():
    model = chain(6, 5, 3).train()
    before = copy.deepcopy(model.state_dict())
    model[0].weight.requires_grad_(False)
    assert output_metrics(model, calibration.batches(samples(50, 6)), calibration.runner(), layers_of(model, samples(50, 6)), 0) is not None
    assert model.training
    assert hooks_of(model) == 0
    assert [parameter.requires_grad for parameter in model.parameters()] == [False, True, True, True]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Skipping(nn.Module):
    """What is added in place to a ReLU's output is written into what the ReLU's gradient is made of."""

    def __init__(self, in_place):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.in_place = nn.Linear(6, 6), nn.Linear(6, 3), in_place

    def forward(self, x):
        h = self.one(x).relu()
        return self.two(h.add_(x) if self.in_place else h + x)


def test_networks_that_write_into_what_gradients_are_made_of():
    data, run = calibration.batches(samples(50, 6)), calibration.runner()
    models = [Skipping(way) for way in (True, False)]
    found, expected = (output_metrics(model, data, run, layers_of(model, samples(50, 6)), 0) for model in models)
    assert all(torch.equal(found[name].matrix, expected[name].matrix) for name in ("one", "two"))
    assert nettrim.prune(models[0], samples(50, 6), sparsity=0.5).report.certificate.holds


class Detached(nn.Module):
    """A network through which no gradient comes."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.two(self.one(x).relu().detach()).detach()


def test_without_gradients_nothing_is_known_of_the_output_and_that_is_said():
    model = Detached()
    assert output_metrics(model, calibration.batches(samples(50, 6)), calibration.runner(), layers_of(model, samples(50, 6)), 0) is None
    with pytest.raises(ArgumentError, match="expected fidelity='layer' and allocation='uniform'"):
        nettrim.prune(model, samples(50, 6), sparsity=0.5)
    with pytest.raises(ArgumentError, match="expected fidelity='layer'$"):
        nettrim.prune(model, samples(50, 6), sparsity=0.5, allocation="uniform")
    assert nettrim.prune(model, samples(50, 6), sparsity=0.5, allocation="uniform", fidelity="layer").report.certificate.holds


def curve(size: int, power: float, scale: float) -> Curve:
    kept = np.array([2.0, 5.0, 10.0, 20.0])
    return Curve(kept, scale * kept**-power, size)


@pytest.mark.parametrize("total", [3, 20, 41, 60])
def test_the_sum_of_errors_is_least(total):
    found = {"a": curve(30, 1.0, 1.0), "b": curve(40, 2.0, 10.0), "c": curve(10, 0.5, 0.3)}
    kept = spread(found, total)
    assert sum(kept.values()) == total
    assert all(0 <= kept[name] <= found[name].size for name in kept)

    def error(numbers) -> float:
        return sum(float(found[name].at(np.array([count]))[0]) for name, count in zip(found, numbers, strict=True))

    best = min(error(numbers) for numbers in itertools.product(*(range(1, found[name].size + 1) for name in found)) if sum(numbers) == total)
    assert error(kept.values()) <= 1.05 * best


def test_a_curve_goes_through_its_points_and_on_beyond_them():
    found = curve(100, 2.0, 3.0)
    np.testing.assert_allclose(found.at(found.kept), found.error)
    np.testing.assert_allclose(found.at(np.array([1.0, 7.0, 50.0])), 3.0 * np.array([1.0, 7.0, 50.0]) ** -2.0)


def test_one_sparsity_is_met_over_all_layers_and_costs_less_than_the_same_in_each(digits_network):
    model, calibration_samples, images, _ = digits_network
    results = {
        how: nettrim.prune(model, calibration_samples, sparsity=0.85, allocation=how, holdout=0.0) for how in ("auto", "uniform")
    }
    total = sum(math.prod(layer.shape) for layer in results["auto"].report.layers)
    for result in results.values():
        assert result.report.certificate.holds
    assert sum(layer.nonzeros for layer in results["auto"].report.layers) == math.floor(0.15 * total + 0.5 + 1e-9)
    assert len({round(layer.density, 3) for layer in results["auto"].report.layers}) > 1
    with torch.no_grad():
        lost = {how: float((result.model(images) - model(images)).norm()) for how, result in results.items()}
    assert lost["auto"] < lost["uniform"]


def test_curves_are_measured_once_for_several_trials(digits_network, monkeypatch):
    model, calibration_samples, _, _ = digits_network
    calls = []
    measure = allocation.measure
    monkeypatch.setattr(allocation, "measure", lambda *args: (calls.append(1), measure(*args))[1])
    result = nettrim.prune(model, calibration_samples, budget=0.2)
    assert len(calls) == 1
    assert result.report.certificate.relative_measured <= 0.2


@pytest.mark.parametrize("factor", (1e-20, 1e20))
def test_gradients_beyond_the_range_of_the_layers_dtype_are_an_error_that_names_the_layer(factor):
    model = chain(6, 5, 3)
    with torch.no_grad():
        model[2].weight.mul_(factor)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ArgumentError, match=r"by layer '0' have a mean square of .*expected one well within the range of float32"):
        nettrim.prune(model, samples(50, 6), sparsity={"*": 0.5})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert nettrim.prune(model, samples(50, 6), sparsity={"*": 0.5}, fidelity="layer").report.certificate.holds
