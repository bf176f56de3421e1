"""The neighbours that select by chance, and those that change the depth: their mechanisms on cases with known answers."""

import math
from dataclasses import replace

import pytest
import torch
from neighbouring import separable, task
from torch import Tensor, nn
from torch.distributions import Bernoulli, Normal, kl_divergence
from torch.nn import functional

from benchmarks.data import Dataset
from benchmarks.neighbours import bernoulli, cafo, fuse, learn_drop, models, node_selection, spectral_dropout, stressed
from benchmarks.neighbours.contract import Task
from benchmarks.neighbours.judge import live_layers, live_units


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


# --- FuseInit


def test_an_affine_layer_is_fused_exactly() -> None:
    """Where no ReLU is ever off, two layers are one affine map, and fusing them changes nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    with torch.no_grad():
        model[0].bias.fill_(50.0)
    x = torch.randn(500, 6)
    short, nonlinearity = fuse.fused(model, "0", x)
    assert nonlinearity < 1e-6 and [type(module).__name__ for module in short] == ["Linear", "ReLU", "Linear"]
    with torch.no_grad():
        torch.testing.assert_close(short(x), model(x), rtol=0, atol=0.02)
    assert fuse.fused(model, "2", x)[1] > nonlinearity


def test_the_fused_map_is_the_least_squares_one() -> None:
    """For x standard normal and one unit, relu(x) ≈ x/2 + 1/√(2π), and 1 − (1/4)/(1/2 − 1/2π) of the variance is left."""
    x = torch.randn(200_000, 1, generator=torch.Generator().manual_seed(0))
    B, d, error = fuse.affine_fit(x, x.relu())
    assert B.item() == pytest.approx(0.5, abs=0.01) and d.item() == pytest.approx(1 / math.sqrt(2 * math.pi), abs=0.01)
    assert error == pytest.approx(1 - 0.25 / (0.5 - 1 / (2 * math.pi)), abs=0.01)


# --- CaFo


def test_a_predictor_is_ridge_regression(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cafo, "RIDGE", 0.0)
    torch.manual_seed(0)
    x = torch.randn(50, 4)
    W, b = torch.randn(3, 4), torch.randn(3)
    predictor = nn.Linear(4, 3)
    cafo.fit_predictor(predictor, x, x @ W.T + b)
    torch.testing.assert_close(predictor.weight.detach(), W, rtol=0, atol=1e-5)
    torch.testing.assert_close(predictor.bias.detach(), b, rtol=0, atol=1e-5)


def test_predictions_are_summed_and_no_block_sees_another(data: Dataset) -> None:
    torch.manual_seed(0)
    model = cafo.Cascade([16, 24, 16], 3)
    x = data.train_inputs[:5]
    h = model.blocks[0](x).relu()
    expected = model.predictors[0](h) + model.predictors[1](model.blocks[1](h).relu())
    torch.testing.assert_close(model(x), expected)
    before = [parameter.detach().clone() for parameter in model.blocks[1].parameters()]
    cafo.train_block(model.blocks[0], data.train_inputs, data.train_labels, 3, epochs=1, batch_size=50)
    assert all(torch.equal(one, two) for one, two in zip(before, model.blocks[1].parameters(), strict=True))


def test_feedback_alignment_learns(data: Dataset) -> None:
    one = task(data)
    result = cafo.run(one)
    assert one.held_accuracy(result.model) > 0.9
    assert live_units(result.model) == (40, 40) and result.start is not None
    # each predictor is fitted to the classes by itself
    target = functional.one_hot(one.labels, 3).float()
    with torch.no_grad():
        x = one.inputs
        for block, predictor in zip(result.model.blocks, result.model.predictors, strict=True):
            x = block(x).relu()
            expected = nn.Linear(x.shape[1], 3)
            cafo.fit_predictor(expected, x, target)
            torch.testing.assert_close(predictor.weight, expected.weight)
            assert float((predictor(x).argmax(dim=1) == one.labels).float().mean()) > 0.9


def test_the_error_comes_back_through_the_feedback_and_the_relu() -> None:
    """Two samples, two units, two classes, all by hand."""
    block, predictor = nn.Linear(1, 2), nn.Linear(2, 2)
    with torch.no_grad():
        block.weight.copy_(torch.tensor([[1.0], [-1.0]]))
        predictor.weight.zero_()  # every class has probability ½, whatever the features
        for layer in (block, predictor):
            layer.bias.zero_()
    x, wanted, feedback = torch.tensor([[2.0], [-3.0]]), torch.eye(2), torch.tensor([[5.0, 7.0], [11.0, 17.0]])
    found = cafo.feedback_gradients(block, predictor, feedback, x, wanted)
    # E = [[−¼, ¼], [¼, −¼]]; E F = ±[1.5, 2.5]; unit 1 is on for the first sample, unit 2 for the second
    assert found[0].tolist() == [[1.5 * 2], [-2.5 * -3]] and found[1].tolist() == [1.5, -2.5]
    assert found[2].tolist() == [[-0.25 * 2, 0.25 * 3], [0.25 * 2, -0.25 * 3]] and found[3].tolist() == [0.0, 0.0]


def test_a_block_learns_from_its_feedback_alone(data: Dataset) -> None:
    torch.manual_seed(0)
    block = nn.Linear(16, 24)
    before = block.weight.detach().clone()
    cafo.train_block(block, data.train_inputs, data.train_labels, 3, epochs=1, batch_size=50)
    assert int((block.weight != before).any(dim=1).sum()) > 12  # all but units that are never on
