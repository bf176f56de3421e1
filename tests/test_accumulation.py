"""Discrepancies beyond the promise, against float64 by hand: through the depth of the whole network, and on samples kept out."""

import pytest
import torch
from networks import chain, hooks_of, samples, solved_on, stages
from torch import nn

import nettrim
from nettrim import accumulation, calibration, layers
from nettrim.tracing import trace

RUN = calibration.runner(None)


def traced(model, batches):
    return trace(model, batches, RUN).layers


def through(found):
    """Relative discrepancy of every layer's output, each network on its own inputs."""
    return [
        float((stage.output(stage.pruned_inputs, pruned=True) - stage.targets).norm() / stage.targets.norm()) for stage in found
    ]


@pytest.mark.parametrize("options", [{"mode": "parallel"}, {"mode": "cascade"}, {"mode": "cascade", "max_rows": 250}])
def test_accumulated_is_that_of_the_whole_networks(digits_network, options):
    model, images, _, _ = digits_network
    result = nettrim.prune(model, images, epsilon=0.2, **options)
    expected = through(stages(model, result.model, solved_on(images)[0]))
    assert [layer.accumulated for layer in result.report.layers] == pytest.approx(expected, rel=1e-4)
    own = [layer.relative_discrepancy for layer in result.report.layers]
    if options["mode"] == "cascade":
        assert [layer.accumulated for layer in result.report.layers] == own
    if options["mode"] == "parallel":
        assert result.report.layers[-1].accumulated > own[-1] * 1.1, "what the layers before left is in it"


@pytest.mark.parametrize("mode", ["parallel", "cascade"])
def test_holdout_is_measured_on_the_samples_kept_out(digits_network, mode):
    model, images, _, _ = digits_network
    result = nettrim.prune(model, images, epsilon=0.2, mode=mode)
    expected = [
        stage.discrepancy(mode) / float(stage.targets.norm()) for stage in stages(model, result.model, solved_on(images)[1])
    ]
    assert [layer.holdout for layer in result.report.layers] == pytest.approx(expected, rel=1e-4)
    if mode == "cascade":
        assert result.report.layers[-1].holdout == pytest.approx(result.report.certificate.holdout, rel=1e-4)


def test_without_samples_kept_out_there_is_none(digits_network):
    model, images, _, _ = digits_network
    assert [layer.holdout for layer in nettrim.prune(model, images, epsilon=0.3, holdout=0).report.layers] == [None] * 3


class Routed(nn.Module):
    """The second layer runs only for batches whose first entry is small."""

    def __init__(self, always):
        super().__init__()
        self.first, self.second, self.always = nn.Linear(6, 6), nn.Linear(6, 6), always

    def forward(self, x):
        x = self.first(x)
        return self.second(x) if self.always or x[0, 0] < 0 else x


def test_a_layer_that_does_not_run_alike_has_none():
    torch.manual_seed(0)
    dense, other = Routed(True), Routed(False)
    other.load_state_dict(dense.state_dict())
    batches = [samples(10, 6, seed) for seed in range(6)]
    found = accumulation.accumulated(dense, other, traced(dense, batches), batches, RUN)
    assert found == {"first": 0.0, "second": None}


def test_a_layer_that_the_samples_kept_out_do_not_reach_has_none():
    torch.manual_seed(0)
    model = Routed(False)
    with torch.no_grad():
        model.first.weight[0] = torch.tensor([1.0, 0, 0, 0, 0, 0])
        model.first.bias[0] = 0.0
    reached, missed = samples(1, 6), samples(1, 6)
    reached[0, 0], missed[0, 0] = -1.0, 1.0
    batches = [reached.clone() + 0.01 * samples(1, 6, seed) for seed in range(40)]
    for index in calibration.holdout_indices(batches, 0.1, 0):
        batches[index] = missed + 0.01 * samples(1, 6, int(index))
    report = nettrim.prune(model, batches, epsilon=0.3).report
    assert [layer.holdout is None for layer in report.layers] == [False, True]


def test_little_memory_gives_the_same_figures_and_leaves_no_hook(digits_network, monkeypatch):
    model, images, _, _ = digits_network
    pruned = nettrim.prune(model, images, epsilon=0.3, mode="parallel").model
    batches = calibration.batches(list(images.split(70)))
    wanted = traced(model, batches)
    at_once = accumulation.accumulated(model, pruned, wanted, batches, RUN)
    monkeypatch.setattr(accumulation, "_ELEMENTS", 1)
    assert accumulation.accumulated(model, pruned, wanted, batches, RUN) == at_once
    assert at_once["4"] > 0 and hooks_of(model) == hooks_of(pruned) == 0


def test_an_output_of_zeros_is_no_division():
    model = chain(4, 3)
    zero, other = chain(4, 3), chain(4, 3)
    with torch.no_grad():
        for parameter in zero.parameters():
            parameter.zero_()
    batches = [samples(5, 4)]
    assert accumulation.accumulated(zero, zero, traced(zero, batches), batches, RUN) == {"0": 0.0}
    assert accumulation.accumulated(zero, other, traced(zero, batches), batches, RUN) == {"0": float("inf")}
    assert accumulation.accumulated(model, zero, traced(model, batches), batches, RUN) == {"0": 1.0}
    assert accumulation.accumulated(model, zero, [], batches, RUN) == {}


def test_behind_batchnorms_and_for_the_matrices_of_a_recurrent_module():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 5, 3), nn.BatchNorm1d(5), nn.ReLU(), nn.Conv1d(5, 4, 2)).eval()
    model[1].running_mean.uniform_(-1, 1)
    x = torch.randn(40, 2, 8)
    result = nettrim.prune(model, x, epsilon=0.3, mode="parallel", holdout=0)
    with torch.no_grad():
        first, other = model[:3](x), result.model[:3](x)
        expected = [float((other - first).norm() / first.norm()), float((result.model(x) - model(x)).norm() / model(x).norm())]
    assert [layer.accumulated for layer in result.report.layers] == pytest.approx(expected, rel=1e-4)
    rnn = nn.Sequential(nn.RNN(3, 4, batch_first=True)).eval()
    x = torch.randn(40, 6, 3)
    result = nettrim.prune(rnn, x, epsilon=0.3, holdout=0)
    call, pruned_call = (layers.Call((x,), {}, None) for _ in range(2))
    states = layers.matrix(rnn, "0.weight_hh_l0"), layers.matrix(result.model, "0.weight_hh_l0")
    Z, other = states[0].output_rows(call).detach(), states[1].output_rows(pruned_call).detach()
    assert result.report.layers[1].accumulated == pytest.approx(float((other - Z).norm() / Z.norm()), rel=1e-4)
