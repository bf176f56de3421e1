"""The neighbours that change the depth, FuseInit and CaFo: their mechanisms on cases with known answers."""

import math

import pytest
import torch
from neighbouring import separable, task
from torch import nn
from torch.nn import functional

from benchmarks.data import Dataset
from benchmarks.neighbours import cafo, fuse
from benchmarks.neighbours.judge import live_units


@pytest.fixture(scope="module")
def data() -> Dataset:
    return separable()


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
