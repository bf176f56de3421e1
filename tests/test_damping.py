"""Damped programs: what they are, for every kind of layer and way of holding rows; and that nothing else changes."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nettrim
from nettrim import ArgumentError, budgets, observation


def data(count: int = 80, width: int = 10) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(1)) @ torch.diag(torch.linspace(0.2, 3, width))


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 14), nn.GELU(), nn.Linear(14, 6))


def noisy(A: Tensor, W: Tensor, T: Tensor, damping: float) -> Tensor:
    """``argmin_V E ‖(A ∘ (1 + ξ)) Vᵀ − (T + (A ∘ ξ) Wᵀ)‖²`` with independent ξ of variance ``damping``, in closed form (the last column is free)."""
    energy = A.square().sum(0)
    energy[-1] = 0
    G, C = A.T @ A + damping * energy.diag(), T.T @ A + W * (damping * energy)
    return torch.linalg.solve(G, C.T).T


def with_ones(A: Tensor) -> Tensor:
    return torch.cat([A, torch.ones(len(A), 1)], 1).double()


def matrix(layer: Any) -> Tensor:
    return torch.cat([layer.weight.detach(), layer.bias.detach()[:, None]], 1).double()


@pytest.mark.parametrize("repair", (1.0, 0.5))
def test_with_all_weights_kept_it_is_the_least_squares_under_noise(repair: float) -> None:
    model, x = chain(), data()
    pruned: Any = nettrim.prune(model, x, sparsity={"0": 0.8, "2": 0.0}, repair=repair, damping=0.3, fidelity="layer", holdout=0.0).model
    A, off = (net[1](net[0](x)).detach() for net in (model, pruned))
    W = matrix(model[2])
    T = repair * with_ones(A) @ W.T + (1 - repair) * with_ones(off) @ W.T
    torch.testing.assert_close(matrix(pruned[2]), noisy(with_ones(off), W, T, 0.3), rtol=1e-3, atol=1e-4)


def test_the_noise_that_it_stands_for() -> None:
    generator, A = torch.Generator().manual_seed(2), with_ones(data(30, 4))
    W, T, V = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((3, 5), (30, 3), (3, 5)))
    found = []
    for _ in range(20_000):
        xi = torch.randn(A.shape, generator=generator, dtype=torch.float64) * 0.2**0.5
        xi[:, -1] = 0
        found.append(float(((A * (1 + xi)) @ V.T - (T + (A * xi) @ W.T)).square().sum()))
    energy = A[:, :-1].square().sum(0)
    expected = (A @ V.T - T).square().sum() + 0.2 * (energy * (V - W)[:, :-1].square()).sum()
    assert sum(found) / len(found) == pytest.approx(float(expected), rel=0.02)


def test_much_of_it_keeps_the_weights_that_are_kept() -> None:
    model, x = chain(), data()
    pruned: Any = nettrim.prune(model, x, sparsity=0.5, damping=1e6, fidelity="layer").model
    for layer, before in ((pruned[0], model[0]), (pruned[2], model[2])):
        kept = layer.weight != 0
        torch.testing.assert_close(layer.weight[kept], before.weight[kept], rtol=1e-3, atol=1e-4)  # type: ignore[index]


def test_an_input_that_is_always_0_is_not_kept_for_it() -> None:
    model, x = chain(), data()
    x[:, 4] = 0
    pruned: Any = nettrim.prune(model, x, sparsity=0.5, damping=1.0).model
    assert not bool(pruned[0].weight[:, 4].any())


WAYS: tuple[dict[str, Any], ...] = (
    {"sparsity": 0.6},
    {"sparsity": 0.6, "fidelity": "layer", "repair": 0.5},
    {"sparsity": 0.6, "mode": "parallel"},
    {"sparsity": 0.6, "max_rows": 50},
    {"pattern": "2:4", "ignore": "0"},
    {"sparsity": 0.5, "pattern": "neuron", "fidelity": "layer"},
)


@pytest.mark.parametrize("asked", WAYS, ids=str)
def test_the_certificate_holds_and_is_verified(asked: dict[str, Any]) -> None:
    if "pattern" in asked and asked["pattern"] == "2:4":
        model: nn.Module = nn.Sequential(nn.Linear(10, 12), nn.ReLU(), nn.Linear(12, 6))
    else:
        model = chain()
    result = nettrim.prune(model, data(), damping=0.1, **asked)
    assert result.report.certificate.holds
    checked = nettrim.verify(model, result.model, data(), result.report)
    assert checked.holds, str(checked)
    forged = nettrim.Report.from_dict({**result.report.to_dict(), "options": {**result.report.options, "damping": 0.5}})
    assert not nettrim.verify(model, result.model, data(), forged).holds


@pytest.mark.parametrize("groups", (1, 2))
def test_convolutions_and_their_groups(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=groups), nn.Flatten(), nn.Linear(16, 3))
    x, asked = torch.randn(40, 2, 6, 6), {"sparsity": 0.6, "damping": 0.1, "fidelity": "layer", "allocation": "uniform"}
    result = nettrim.prune(model, x, **asked)
    checked = nettrim.verify(model, result.model, x, result.report)
    assert checked.holds, str(checked)
    for module in (observation, budgets):
        monkeypatch.setattr(module, "HELD_ELEMENTS", 100)
    streamed = nettrim.prune(model, x, **asked)
    for a, b in zip(result.model.parameters(), streamed.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_blocks_of_neurons_elsewhere() -> None:
    model, x = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 8)), data(width=12)
    asked: dict[str, Any] = {"pattern": "2:4", "neurons": 4, "fidelity": "layer", "damping": 0.1}
    with ThreadPoolExecutor(2) as executor:
        apart = nettrim.prune(model, x, **asked, executor=executor)
    assert apart.report.certificate.holds
    for a, b in zip(apart.model.parameters(), nettrim.prune(model, x, **asked).model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", (-0.1, 1e10, 1e300, float("nan"), "much", True))
def test_what_is_refused(value: Any) -> None:
    with pytest.raises(ArgumentError, match="damping=.*; expected a number from 0 to 1e9"):
        nettrim.prune(chain(), data(), sparsity=0.5, damping=value)


def test_it_goes_with_sparsity() -> None:
    with pytest.raises(ArgumentError, match="damping was given with epsilon"):
        nettrim.prune(chain(), data(), epsilon=0.1, damping=0.1)
