"""The neighbours that select by chance, Learn & Drop and StressedNets: their mechanisms on cases with known answers."""

import math
from dataclasses import replace

import pytest
import torch
from neighbouring import separable, task
from torch import Tensor, nn
from torch.distributions import Bernoulli, Normal, kl_divergence

from benchmarks.data import Dataset
from benchmarks.neighbours import bernoulli, learn_drop, models, node_selection, spectral_dropout, stressed
from benchmarks.neighbours.contract import Task
from benchmarks.neighbours.judge import live_layers


@pytest.fixture(scope="module")
def data() -> Dataset:
    return separable()


# --- Spectral Dropout


@pytest.mark.parametrize("n", [1, 2, 7, 300])
def test_the_dct_is_orthonormal_and_scipys(n: int) -> None:
    from scipy.fft import dct

    D = spectral_dropout.dct_matrix(n)
    torch.testing.assert_close(D @ D.T, torch.eye(n), rtol=0, atol=1e-5)
    x = torch.linspace(-1, 2, n)
    torch.testing.assert_close(D @ x, torch.from_numpy(dct(x.double().numpy(), norm="ortho")).float(), rtol=0, atol=1e-4)


def test_weak_coefficients_of_a_given_signal_are_off() -> None:
    D = spectral_dropout.dct_matrix(8)
    signal = 2 * D[3] - 1 * D[5] + 0.01 * D[1] + 0.02 * D[6]
    gone = spectral_dropout.weak((signal @ D.T)[None], 0.75)[0]
    assert gone.tolist() == [True, True, True, False, True, False, True, True]
    layer = spectral_dropout.SpectralDropout(8, share=0.75, off=1.0)
    torch.testing.assert_close(layer.train()(signal[None])[0], 2 * D[3] - D[5])
    assert torch.equal(layer.eval()(signal[None])[0], signal)


def test_strong_coefficients_always_pass() -> None:
    torch.manual_seed(0)
    layer = spectral_dropout.SpectralDropout(16, share=0.5, off=0.5).train()
    x = torch.randn(200, 16)
    before, after = x @ layer.D.T, layer(x) @ layer.D.T
    gone = spectral_dropout.weak(before, 0.5)
    torch.testing.assert_close(after[~gone], before[~gone], rtol=0, atol=1e-5)
    off = after[gone].abs() < 1e-5
    assert 0.45 < off.float().mean() < 0.55


# --- Bernoulli multipliers


def test_the_change_of_the_loss_is_estimated_without_bias() -> None:
    """For L = (ξ₁ − 3 ξ₂)²: trapezoids are exact for a square, and the mean of the steps is E[L|1] − E[L|0]."""
    torch.manual_seed(0)
    pairs, step = 40_000, 1e-3  # so small that no θ leaves [0, 1]
    gate = bernoulli.Multipliers(torch.zeros(2 * pairs), step)
    theta = torch.tensor([0.6, 0.3]).repeat_interleave(pairs)
    gate.theta = theta.clone()
    first, second = gate.draw().split(pairs)
    (first - 3 * second).square().sum().backward()
    gate.update()
    change = ((theta - gate.theta) / step).view(2, pairs).mean(dim=1)
    # E[L | ξ₁] = ξ₁² − 6 ξ₁ 0.3 + 9 · 0.3, E[L | ξ₂] = 0.6 − 6 · 0.6 ξ₂ + 9 ξ₂²
    torch.testing.assert_close(change, torch.tensor([1 - 1.8, 9 - 3.6]), rtol=0.02, atol=0.02)


def test_theta_is_projected_and_pays_its_price() -> None:
    gate = bernoulli.Multipliers(torch.tensor([0.1, 0.1, 0.1]), step=1.0)
    gate.theta = torch.tensor([0.05, 0.5, 1.0])
    gate.drawn = torch.tensor([1.0, 1.0, 1.0], requires_grad=True)
    gate.drawn.grad = torch.tensor([0.0, -0.3, -5.0])
    gate.update()
    assert gate.theta.tolist() == pytest.approx([0.0, 0.5 + 0.3 - 0.1, 1.0])
    assert gate.kept.tolist() == [False, True, True]


def test_units_that_nothing_needs_are_off_and_the_others_on(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six hidden units, of which three read noise and are not read by anyone: the price alone moves them."""
    monkeypatch.setattr(bernoulli, "UNIT_PRICE", 5e-3)

    def planted(self: Task) -> nn.Sequential:
        model = nn.Sequential(nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 3))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
            for i in range(3):
                model[0].weight[i, i] = 1.0
                model[2].weight[i, i] = 4.0
                model[0].weight[3 + i, 8:] = -1.0  # never on
        return model

    monkeypatch.setattr(Task, "build", planted)
    result = bernoulli.units(task(data), by_cost=False)
    assert result.masks["0.weight"].any(dim=1).tolist() == [True, True, True, False, False, False]


def test_prices_follow_what_units_cost() -> None:
    model = nn.Sequential(nn.Linear(10, 4), nn.ReLU(), nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 3))
    same = bernoulli.unit_prices(model, 0.5, by_cost=False)
    assert {name: set(price.tolist()) for name, price in same.items()} == {"0": {0.5}, "2": {0.5}}
    by_cost = bernoulli.unit_prices(model, 0.5, by_cost=True)
    assert by_cost["0"][0] / by_cost["2"][0] == pytest.approx((10 + 2) / (4 + 3))
    assert torch.cat(list(by_cost.values())).mean().item() == pytest.approx(0.5)


def test_a_block_that_is_off_passes_its_input_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bernoulli, "BLOCK_PRICE", 1e3)  # no block is worth that
    data = separable(600, 64)
    result = bernoulli.blocks(task(data, "residual", 4))
    assert result.notes["theta"] == [0.0] * 4
    assert live_layers(result.model) == 2  # the stem and the last layer
    x = torch.rand(2, 12, 8, 8)
    blocks = [module for module in result.model if isinstance(module, models.Residual)]
    with torch.no_grad():
        assert all(torch.equal(block(x), x) for block in blocks)


# --- spike and slab


def test_the_divergence_is_torchs() -> None:
    torch.manual_seed(0)
    gamma, mean, deviation = torch.rand(5), torch.randn(5, 3), torch.rand(5, 3) + 0.1
    found = node_selection.divergence(gamma, mean, deviation, 0.2, prior=0.7)
    choice = kl_divergence(Bernoulli(gamma), Bernoulli(torch.tensor(0.2)))
    slab = kl_divergence(Normal(mean, deviation), Normal(0.0, 0.7)).sum(dim=1)
    torch.testing.assert_close(found, (choice + gamma * slab).sum())


def test_inclusion_falls_with_fan_in_and_width() -> None:
    assert node_selection.inclusion(784, 100) == pytest.approx(math.exp(-node_selection.RATE * 785) / 100)
    assert node_selection.inclusion(784, 100) < node_selection.inclusion(300, 100) < node_selection.inclusion(300, 10)


# --- Learn & Drop


def test_change_is_relative() -> None:
    before, after = {"w": torch.tensor([1.0, -3.0])}, {"w": torch.tensor([2.0, -3.0])}
    assert learn_drop.change(before, after) == 0.25


def test_a_front_that_is_done_is_run_once(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learn_drop, "DONE", 1.1)  # every layer is done after its first epoch
    one = task(replace(data, train_inputs=10 * data.train_inputs), epochs=3)
    model = one.build()
    monkeypatch.setattr(one, "build", lambda: model)
    training: list[bool] = []
    negative: list[bool] = []
    model[0].register_forward_hook(lambda module, inputs, output: training.append(torch.is_grad_enabled()))
    model[3].register_forward_hook(lambda module, inputs, output: negative.append(bool((inputs[0] < 0).any())))
    result = learn_drop.run(one)
    steps = len(one.inputs) // 20
    assert result.notes["front"] == 3 and result.notes["dropped_at"] == [0]
    assert training == [True] * steps + [False]  # one epoch, then once for what the rest is given
    assert negative == [True] * 3 * steps  # pixels, which are as many as the units, are never below 0
    # what the front computes is what the rest was trained on: the whole network does as well
    assert one.held_accuracy(result.model) > 0.8


def test_what_is_dropped_stays_and_the_rest_goes_on_in_one_training(data: Dataset) -> None:
    one = task(data, epochs=4)
    model = one.build()
    tail = learn_drop.Tail(model)
    inputs, moved, seen = one.inputs, [], 0
    before = {place: learn_drop.snapshot(model[place]) for place in (0, 2, 4)}

    def after_epoch(epoch: int) -> None:
        nonlocal inputs, before
        moved.append([learn_drop.change(before[place], learn_drop.snapshot(model[place])) for place in before])
        before = {place: learn_drop.snapshot(model[place]) for place in before}
        if epoch == 1:
            inputs = tail.drop(3, inputs)
            with torch.no_grad():
                torch.testing.assert_close(inputs, model[:3](one.inputs))

    def given() -> Tensor:
        nonlocal seen
        seen += 1
        return inputs

    one.fit(tail, 4, inputs=given, after_epoch=after_epoch)
    assert seen == one.spent == 4
    assert [[change > 0 for change in each] for each in moved] == [[True] * 3, [True] * 3, [False, False, True], [False, False, True]]


# --- StressedNets


def test_survival_grows_with_strength_and_never_revives() -> None:
    weight = torch.tensor([0.0, 0.1, 1.0, 5.0])
    chance = stressed.survival(weight, resources=0.8)
    assert chance[0] == 0 and (chance.diff() > 0).all() and chance[3] <= 0.8
    scale = 0.5 * weight[1:].mean()
    assert chance[2].item() == pytest.approx(0.8 * (1 - math.exp(-1 / scale)))


def test_offspring_inherit_as_often_as_they_should() -> None:
    model = nn.Sequential(nn.Linear(200, 200))
    with torch.no_grad():
        model[0].weight.fill_(0.3)
    stressed.offspring(model, seed=1)
    expected = stressed.RESOURCES * (1 - math.exp(-1 / stressed.STRENGTH))
    assert float((model[0].weight != 0).float().mean()) == pytest.approx(expected, abs=0.01)
    again = nn.Sequential(nn.Linear(200, 200))
    with torch.no_grad():
        again[0].weight.fill_(0.3)
    stressed.offspring(again, seed=1)
    assert torch.equal(again[0].weight, model[0].weight)


def test_generations_shrink(data: Dataset) -> None:
    one = task(data)
    result = stressed.run(one)
    sizes = result.notes["generations"]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] < 24 * 16 + 24 * 16 + 16 * 3
    assert sum(int(mask.sum()) for mask in result.masks.values()) <= sizes[-1] and one.held_accuracy(result.model) > 0.9
