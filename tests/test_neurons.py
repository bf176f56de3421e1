"""Whole neurons: the ones that the next layer needs least go, and the network gets smaller."""

import copy
import itertools

import pytest
import torch
from networks import chain, samples
from torch import nn

import nettrim
from nettrim.neurons import least_needed


def misfit_without(A: torch.Tensor, Y: torch.Tensor, removed: tuple[int, ...]) -> float:
    kept = [j for j in range(A.shape[1]) if j not in removed]
    return float((Y - A[:, kept] @ torch.linalg.lstsq(A[:, kept], Y).solution).square().sum())


@pytest.mark.parametrize("seed", range(4))
def test_one_column_is_the_best_there_is_and_several_are_close(seed):
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(60, 3, generator=generator, dtype=torch.float64) @ torch.randn(3, 7, generator=generator, dtype=torch.float64)
    A += 0.5 * torch.randn(60, 7, generator=generator, dtype=torch.float64)
    Y = A @ torch.randn(7, 4, generator=generator, dtype=torch.float64)
    candidates = torch.tensor([True] * 6 + [False])
    for count in (1, 3):
        removed = least_needed(A.T @ A, Y.T @ A, count, candidates)
        assert int(removed.sum()) == count
        assert not bool(removed[6])
        found = misfit_without(A, Y, tuple(torch.nonzero(removed).flatten().tolist()))
        best = min(misfit_without(A, Y, subset) for subset in itertools.combinations(range(6), count))
        assert found <= (1.0001 if count == 1 else 1.5) * best + 1e-9


def test_dead_columns_go_first():
    A = torch.randn(40, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    A[:, [1, 3]] = 0
    removed = least_needed(A.T @ A, (A @ torch.ones(5, 2, dtype=torch.float64)).T @ A, 2, torch.ones(5, dtype=torch.bool))
    assert torch.nonzero(removed).flatten().tolist() == [1, 3]


@pytest.mark.parametrize("mode", ["cascade", "parallel"])
def test_half_the_neurons_are_removed_and_the_network_shrinks(mode, digits_network):
    model, calibration, images, labels = digits_network
    result = nettrim.prune(model, calibration, sparsity=0.5, pattern="neuron", mode=mode)
    assert result.report.certificate.holds
    first, second, last = (result.model[index] for index in (0, 2, 4))
    assert int((first.weight == 0).all(1).sum()) == 16
    assert int((second.weight == 0).all(1).sum()) == 12
    gone = (first.weight == 0).all(1)
    assert not bool(first.bias[gone].any())
    assert not bool(second.weight[:, gone].any())
    small = nettrim.shrink(result.model, calibration[:10])
    assert [tuple(layer.weight.shape) for layer in (small[0], small[2], small[4])] == [(16, 64), (12, 16), (10, 12)]
    torch.testing.assert_close(small(images), result.model(images), rtol=1e-4, atol=1e-4)
    assert float((small(images).argmax(1) == labels).float().mean()) > float((model(images).argmax(1) == labels).float().mean()) - 0.2
    assert last.weight.shape == (10, 24)


def test_layers_that_cannot_lose_neurons_are_skipped_by_name():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.three = nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, x):
            h = self.one(x).relu()
            return self.three((self.two(h) + h).relu())

    model = Residual()
    with pytest.raises(nettrim.ArgumentError, match="no layer"):
        nettrim.prune(model, samples(50, 8), sparsity=0.5, pattern="neuron")
    both = nn.Sequential(chain(8, 10, 8), model)
    result = nettrim.prune(both, samples(50, 8), sparsity=0.5, pattern="neuron")
    assert "1.two" in result.report.skipped
    assert "not read by one layer alone" in result.report.skipped["1.two"]


def test_the_model_is_left_as_it_was(digits_network):
    model, calibration, _, _ = digits_network
    before = copy.deepcopy(model.state_dict())
    nettrim.prune(model, calibration, sparsity=0.5, pattern="neuron")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_convolutions_keep_their_neurons_and_that_is_said():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 10), nn.ReLU(), nn.Linear(10, 3))
    result = nettrim.prune(model, torch.randn(60, 1, 8), sparsity=0.5, pattern="neuron")
    assert result.report.skipped == {"0": "pattern='neuron' takes neurons out of nn.Linear layers, and this is of a Conv1d"}
    assert int((result.model[3].weight == 0).all(1).sum()) == 5
    smaller = nettrim.shrink(result.model, torch.randn(60, 1, 8))
    assert smaller[0].weight.shape == (4, 1, 3) and smaller[3].weight.shape == (5, 24)
