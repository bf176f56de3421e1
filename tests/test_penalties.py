"""The public penalties, projections and criteria: known answers on given matrices, each error, and what they do to a loss's gradient."""

import pytest
import torch
from torch import Tensor, nn

from nettrim import ArgumentError, criteria, penalties


def chain() -> nn.Sequential:
    """2 inputs, 2 hidden units, 1 output, with given weights."""
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0, -4.0], [0.0, 0.0]]))
        model[2].weight.copy_(torch.tensor([[12.0, -5.0]]))
        for layer in (model[0], model[2]):
            layer.bias.fill_(100.0)  # biases never count
    return model


def convolutions() -> nn.Sequential:
    """One filter of four 3s, another of zeros; read at 2 × 2 positions by a linear layer."""
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Flatten(), nn.Linear(8, 1))
    with torch.no_grad():
        model[0].weight[0] = 3.0
        model[0].weight[1] = 0.0
        model[2].weight.copy_(torch.tensor([[4.0, 4.0, 4.0, 4.0, 1.0, 1.0, 1.0, 1.0]]))
    return model


def test_norms_of_a_given_network() -> None:
    model = chain()
    assert penalties.l1(model).item() == 3 + 4 + 12 + 5
    assert penalties.l2(model).item() == 9 + 16 + 144 + 25


def test_group_norms_of_given_matrices() -> None:
    model = chain()
    assert penalties.incoming_groups(model).item() == pytest.approx(5 + 0 + 13)
    assert penalties.outgoing_groups(model).item() == pytest.approx(3 + 4 + 12 + 5)
    assert penalties.incoming_groups(model, by_size=True).item() == pytest.approx(2**0.5 * (5 + 13))
    # filters: ‖(3,3,3,3)‖ = 6; a row of the linear layer: √(4·16 + 4)
    assert penalties.incoming_groups(convolutions()).item() == pytest.approx(6 + 68**0.5)
    # the one input channel: 6; eight columns of the linear layer
    assert penalties.outgoing_groups(convolutions()).item() == pytest.approx(6 + 4 * 4 + 4 * 1)


def test_joined_channels_are_what_makes_and_what_reads_a_unit() -> None:
    # (3, -4, 12) and (0, 0, -5)
    assert penalties.joined_channels(chain()).item() == pytest.approx(13 + 5)
    # a channel is read at four positions: (3,3,3,3, 4,4,4,4) and (0,0,0,0, 1,1,1,1)
    model = convolutions()
    norms = penalties.joined_norms(penalties.weights(model), "0", "2")
    assert norms.tolist() == pytest.approx([10.0, 2.0])
    assert penalties.joined_channels(model, [("0", "2")]).item() == pytest.approx(12.0)


def test_length_and_curvature_of_a_given_path() -> None:
    straight = [torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0]]), torch.tensor([[6.0, 8.0]])]
    assert penalties.feature_flow(straight, curvature=7.0).item() == pytest.approx(10.0)  # length 5 + 5, no curvature
    back = [torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 0.0]])]
    assert penalties.feature_flow(back, curvature=1.0).item() == pytest.approx(10 + 10)  # ‖0 − 2(3, 4) + 0‖ = 10
    padded = [torch.tensor([[0.0, 0.0, 5.0]]), torch.tensor([[3.0, 4.0]])]
    assert penalties.feature_flow(padded).item() == pytest.approx(50**0.5)  # (3, 4, 0 − 5)
    two = [torch.tensor([[0.0], [0.0]]), torch.tensor([[1.0], [3.0]])]
    assert penalties.feature_flow(two).item() == pytest.approx(2.0)  # the mean over samples


@pytest.mark.parametrize("penalty", [penalties.l1, penalties.incoming_groups, penalties.outgoing_groups, penalties.joined_channels])
def test_gradients_are_finite_where_a_group_is_zero(penalty) -> None:
    model = chain()
    with torch.no_grad():
        model[2].weight[:, 1] = 0
    penalty(model).backward()
    for layer in (model[0], model[2]):
        assert layer.weight.grad.isfinite().all() and layer.weight.grad.abs().sum() > 0
        assert layer.bias.grad is None
    assert not model[0].weight.grad[1].any()  # a group that is zero stays so


def test_a_penalised_unit_that_nothing_needs_dies() -> None:
    """y = relu(x₁): the second hidden unit sees noise only, and the group penalty takes it away while the first stays."""
    torch.manual_seed(0)
    x = torch.randn(256, 2)
    y = x[:, :1].relu()
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        model[2].weight.copy_(torch.tensor([[1.0, 0.3]]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(800):
        optimizer.zero_grad()
        ((model(x) - y).square().mean() + 0.05 * penalties.joined_channels(model)).backward()
        optimizer.step()
    norms = penalties.joined_norms(penalties.weights(model), "0", "2")
    assert norms[1] < 0.05 < 1 < norms[0]


def test_the_hard_threshold_is_the_minimiser() -> None:
    weight = torch.tensor([-2.0, -0.5, 0.1, 0.9, 1.1])
    penalty, coupling = 0.5, 1.0  # the threshold is 1
    found = penalties.hard_threshold(weight, penalty, coupling)
    assert found.tolist() == pytest.approx([-2.0, 0.0, 0.0, 0.0, 1.1])

    def value(v: Tensor) -> Tensor:
        return penalty * (v != 0).float() + coupling / 2 * (v - weight) ** 2

    for other in (torch.zeros(5), weight, 0.5 * weight):
        assert (value(found) <= value(other) + 1e-7).all()


def reference_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in penalties.weights(model).items()}


def test_projected_rows_in_closed_form() -> None:
    model = nn.Sequential(nn.Linear(2, 3, bias=False))
    with torch.no_grad():
        model[0].weight.zero_()
    reference = reference_of(model)
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0, -1.0], [0.5, 0.25], [1.0, -1.0]]))
    penalties.project_rows(model, reference, 1.0)
    # (3, −1): the threshold is 2, as |3| − 2 = 1; (1, −1): ½ off each; the middle row is within
    assert model[0].weight.tolist() == [[1.0, 0.0], [0.5, 0.25], [0.5, -0.5]]


@pytest.mark.parametrize("radius", [0.0, 0.3, 2.0, 100.0])
def test_the_projection_is_the_nearest_point(radius: float) -> None:
    """Against a fine search along the dual: the soft-threshold whose sizes add up to the radius; and no other feasible point is nearer."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 5, 2), nn.ReLU())
    reference = reference_of(model)
    with torch.no_grad():
        model[0].weight.add_(torch.randn_like(model[0].weight))
    moved = (model[0].weight - reference["0"]).detach().flatten(1).double()
    penalties.project_rows(model, reference, radius)
    found = (model[0].weight - reference["0"]).detach().flatten(1).double()
    assert (found.abs().sum(dim=1) <= radius + 1e-5).all()
    for before, after in zip(moved, found, strict=True):
        low, high = 0.0, float(before.abs().max())
        if before.abs().sum() <= radius:
            high = 0.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if (before.abs() - middle).clamp_min(0).sum() > radius else (low, middle)
        torch.testing.assert_close(after, before.sign() * (before.abs() - high).clamp_min(0), rtol=0, atol=1e-5)


def test_rows_within_the_radius_keep_their_bits() -> None:
    model = chain()
    reference = reference_of(model)
    with torch.no_grad():
        model[0].weight[0, 0] += 0.3
    before = [weight.clone() for weight in penalties.weights(model).values()]
    penalties.project_rows(model, reference, 0.5)
    assert all(torch.equal(weight, kept) for weight, kept in zip(penalties.weights(model).values(), before, strict=True))


def test_errors_say_what_is_wrong() -> None:
    with pytest.raises(ArgumentError, match="no linear or convolution layer"):
        penalties.l1(nn.ReLU())
    with pytest.raises(ArgumentError, match="'9' is no linear"):
        penalties.joined_channels(chain(), [("0", "9")])
    with pytest.raises(ArgumentError, match="3 inputs, which is no multiple of the 2 outputs"):
        penalties.joined_channels(nn.Sequential(nn.Linear(2, 2), nn.Linear(3, 1)))
    with pytest.raises(ArgumentError, match="no pair"):
        penalties.joined_channels(nn.Linear(2, 2))
    with pytest.raises(ArgumentError, match="positive"):
        penalties.hard_threshold(torch.ones(2), 0.0, 1.0)
    with pytest.raises(ArgumentError, match="radius=-1"):
        penalties.project_rows(chain(), reference_of(chain()), -1.0)
    with pytest.raises(ArgumentError, match="no tensor of shape \\(1, 2\\) for '2'"):
        penalties.project_rows(chain(), {"0": torch.zeros(2, 2)}, 1.0)
    for features in ([torch.zeros(2, 3)], [torch.zeros(2, 3), torch.zeros(1, 3)]):
        with pytest.raises(ArgumentError, match="of the same samples"):
            penalties.feature_flow(features)


def test_criteria_on_given_weights() -> None:
    weight = torch.tensor([[3.0, -4.0], [0.0, 1.0]])
    assert criteria.magnitude(weight).tolist() == [[3, 4], [0, 1]]
    assert criteria.unit_norms(weight).tolist() == [7, 1]
    assert criteria.unit_norms(weight, order=2).tolist() == [5, 1]
    assert criteria.unit_norms(torch.ones(2, 3, 2, 2)).tolist() == [12, 12]


def test_taylor_is_the_loss_without_the_unit() -> None:
    """For a linear loss Σ v_i a_i the first order is exact: what is lost without unit i is |mean v_i a_i|."""
    activations = torch.tensor([[1.0, 2.0], [3.0, 2.0]])
    gradients = torch.tensor([[2.0, 0.5], [2.0, 0.5]])
    scores = criteria.taylor(activations, gradients)
    assert scores[0] / scores[1] == pytest.approx((2 + 6) / (1 + 1))
    assert scores.norm() == pytest.approx(1.0)
    # of a convolution: over positions first, so that +1 and −1 cancel
    maps = torch.tensor([[[1.0, -1.0], [1.0, 1.0]]])
    assert criteria.taylor(maps, torch.ones_like(maps)).tolist() == [0, 1]
