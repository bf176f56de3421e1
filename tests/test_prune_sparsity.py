"""``nettrim.prune(sparsity=)``: exact numbers of zeros, kept promises, both modes, patterns, repair, zeros that stay."""

import copy
import math

import pytest
import torch
from torch import nn

import nettrim
from nettrim import ArgumentError


@pytest.fixture
def network(digits_network):
    """A trained network, 64-32-24-10, and 300 samples."""
    return copy.deepcopy(digits_network[0]), digits_network[1]


def counts(model: nn.Module) -> dict[str, int]:
    return {name: int((module.weight != 0).sum()) for name, module in model.named_modules() if isinstance(module, nn.Linear)}


@pytest.mark.parametrize("mode", ["cascade", "parallel"])
@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.333])
def test_every_layer_has_exactly_the_share_of_zeros_and_keeps_its_promise(network, mode, sparsity):
    model, samples = network
    result = nettrim.prune(model, samples, sparsity=sparsity, allocation="uniform", mode=mode)
    for layer in result.report.layers:
        size = math.prod(layer.shape)
        assert abs(layer.nonzeros - (1 - sparsity) * size) <= 0.5 + 1e-6
        assert layer.nonzeros == counts(result.model)[layer.name] == int(result.masks[f"{layer.name}.weight"].sum())
        assert layer.discrepancy <= layer.epsilon
        assert layer.status == "feasible"
        assert layer.solver == "topk_admm"
    assert result.report.certificate.holds
    assert result.report.certificate.measured <= result.report.certificate.guaranteed
    assert result.report.options["sparsity"] == sparsity


def test_a_mapping_gives_layers_their_own_and_leaves_the_others_dense(network):
    model, samples = network
    names = list(counts(model))
    result = nettrim.prune(model, samples, sparsity={names[0]: 0.8, names[-1]: 0.25})
    assert [layer.name for layer in result.report.layers] == [names[0], names[-1]]
    assert result.report.skipped[names[1]] == "no key of the sparsity mapping matches it"
    assert result.report.layers[0].density == pytest.approx(0.2, abs=1e-3)
    assert result.report.layers[1].density == pytest.approx(0.75, abs=1e-2)


def test_it_beats_magnitude_at_the_same_numbers(network):
    model, samples = network
    result = nettrim.prune(model, samples, sparsity=0.9, holdout=0.0)
    magnitude = copy.deepcopy(model)
    with torch.no_grad():
        for module in magnitude.modules():
            if isinstance(module, nn.Linear):
                kept = round(0.1 * module.weight.numel())
                smallest = module.weight.abs().flatten().topk(kept).values[-1]
                module.weight.mul_(module.weight.abs() >= smallest)
        dense = model(samples)
        theirs = float((magnitude(samples) - dense).norm() / dense.norm())
    assert result.report.certificate.relative_measured < 0.5 * theirs


@pytest.mark.parametrize("pattern", ["2:4", "1:2"])
def test_n_of_m_says_the_sparsity(network, pattern):
    model, samples = network
    result = nettrim.prune(model, samples, pattern=pattern, ignore=list(counts(model))[-1:])
    n, m = (int(part) for part in pattern.split(":"))
    for layer in result.report.layers:
        weight = result.model.get_submodule(layer.name).weight
        assert bool(((weight != 0).view(-1, m).sum(1) == n).all())
    assert result.report.certificate.holds


def test_blocks_are_zero_together(network):
    model, samples = network
    first = next(iter(counts(model)))
    result = nettrim.prune(model, samples, sparsity=0.5, pattern="block:4x4", targets=first)
    weight = result.model.get_submodule(first).weight
    M, N = weight.shape
    blocks = (weight != 0).view(M // 4, 4, N // 4, 4).sum((1, 3))
    assert set(blocks.unique().tolist()) <= {0, 16}


def test_zeros_stay_where_asked(network):
    model, samples = network
    once = nettrim.prune(model, samples, sparsity=0.5, allocation="uniform").model
    twice = nettrim.prune(once, samples, sparsity=0.8, preserve_zeros=True)
    for name, mask in twice.masks.items():
        before = once.get_parameter(name) != 0
        assert not bool((mask & ~before).any())
    assert twice.report.density == pytest.approx(0.2, abs=1e-2)
    again = nettrim.prune(once, samples, sparsity=0.3, preserve_zeros=True, allocation="uniform")
    assert again.report.density == pytest.approx(0.5, abs=1e-2)  # no zero comes back, so there are more than asked for


def test_repair_leans_the_targets(network):
    model, samples = network
    measured = {
        repair: nettrim.prune(model, samples, sparsity=0.9, repair=repair, holdout=0.0).report.certificate for repair in (0.0, 0.5, 1.0)
    }
    assert all(certificate.holds for certificate in measured.values())
    assert measured[1.0].relative_measured < measured[0.0].relative_measured
    assert len({certificate.relative_measured for certificate in measured.values()}) == 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(network, dtype):
    model, samples = network
    result = nettrim.prune(model.to(dtype), samples.to(dtype), sparsity=0.7)
    assert result.report.certificate.holds
    assert result.report.density == pytest.approx(0.3, abs=1e-2)


@pytest.mark.parametrize("sparsity", [0.0, 1.0])
def test_the_ends(network, sparsity):
    model, samples = network
    result = nettrim.prune(model, samples, sparsity=sparsity, holdout=0.0)
    assert result.report.density == pytest.approx(1 - sparsity)
    assert result.report.certificate.holds
    if sparsity == 0:
        assert result.report.certificate.relative_measured < 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "epsilon=None and sparsity=None"),
        ({"epsilon": 0.1, "sparsity": 0.5}, "epsilon=0.1 and sparsity=0.5"),
        ({"sparsity": 1.5}, "sparsity=1.5; expected a number from 0 to 1"),
        ({"sparsity": True}, "sparsity=True"),
        ({"sparsity": {"nothing": 0.5}}, "sparsity: 'nothing' matches no"),
        ({"sparsity": 0.5, "pattern": "2:5x"}, "pattern='2:5x'; expected"),
        ({"sparsity": 0.4, "pattern": "2:4"}, "which says 0.5"),
        ({"epsilon": 0.1, "pattern": "2:4"}, "it goes with sparsity"),
        ({"sparsity": 0.5, "pattern": "block:7x1"}, "does not tile"),
        ({"sparsity": 0.5, "repair": 2}, "repair=2; expected a number from 0 to 1"),
        ({"sparsity": 0.5, "repair": 0.5, "mode": "parallel"}, "only a cascade"),
        ({"sparsity": 0.5, "consistency": "paper"}, "consistency='paper' was given without epsilon"),
        ({"epsilon": 0.1, "repair": 0.5}, "promised against the dense"),
        ({"epsilon": 0.1, "preserve_zeros": True}, "it goes with sparsity"),
    ],
)
def test_what_makes_no_sense_is_refused(network, options, message):
    model, samples = network
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ArgumentError, match=message):
        nettrim.prune(model, samples, **options)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_pattern_that_a_later_layer_cannot_have_is_refused_before_any_is_solved():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    events = []
    with pytest.raises(ArgumentError, match=r"layer '2' has weights of shape \(3, 6\), which pattern='2:4' does not tile"):
        nettrim.prune(model, torch.randn(50, 8), pattern="2:4", progress=events.append)
    assert not events
    assert nettrim.prune(model, torch.randn(50, 8), sparsity={"0": 0.5}, pattern="2:4").report.certificate.holds
