"""Layers whose outputs are added to something, as in residual connections: found, observed, and pruned so that the sum comes out right."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nettrim
from nettrim import calibration, capture, layers, stages, taking
from nettrim.errors import RouteError
from nettrim.tracing import trace

RUN = calibration.runner(None)


class Residual(nn.Module):
    """Two blocks of a decoder's kind, each ``x + lower(gelu(upper(norm(x))))``."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.upper = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(2))
        self.lower = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for upper, lower in zip(self.upper, self.lower, strict=True):
            x = x + lower(nn.functional.gelu(upper(self.norm(x))))
        return self.head(self.norm(x))


class Convolved(nn.Module):
    """A block of a ResNet: the BatchNorm's output is what is added, and a ReLU is behind the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.outer = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(6)
        self.norm.running_mean, self.norm.running_var = torch.randn(6), torch.rand(6) + 0.5
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.norm(self.outer(torch.relu(self.inner(x)))) + x)
        return self.head(x.mean((2, 3)))


class Added(nn.Module):
    """One layer, and some way in which what it puts out is added."""

    def __init__(self, add: Callable[[Tensor, Tensor, nn.Linear], Tensor]) -> None:
        super().__init__()
        self.fc, self.other, self.add = nn.Linear(4, 4), nn.Linear(4, 4), add

    def forward(self, x: Tensor) -> Tensor:
        skip = self.other(x) * 2
        return self.add(self.fc(x), skip, self.other)


def data(count: int = 60, width: int = 12) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("add", "summed"),
    [
        (lambda z, skip, other: z + skip, True),
        (lambda z, skip, other: skip + z, True),
        (lambda z, skip, other: skip.add_(z), True),
        (lambda z, skip, other: z.add_(skip), True),
        (lambda z, skip, other: nn.functional.dropout(z, training=False) + skip, True),
        (lambda z, skip, other: z.view(-1, 2, 4) + skip.view(-1, 2, 4), True),
        (lambda z, skip, other: z + z, False),
        (lambda z, skip, other: z + 1.0, False),
        (lambda z, skip, other: z + skip[:1], False),
        (lambda z, skip, other: torch.add(z, skip, alpha=2), False),
        (lambda z, skip, other: torch.relu(z) + skip, False),
        (lambda z, skip, other: (z + skip) * z, False),
        (lambda z, skip, other: z + other(skip), False),  # which is pruned later
        (lambda z, skip, other: z.t().contiguous() + skip[:4], False),  # in another order, though of the same shape
        (lambda z, skip, other: z - skip, False),
    ],
)
def test_what_counts_as_a_sum(add: Callable[..., Tensor], summed: bool) -> None:
    found = {layer.name: layer for layer in trace(Added(add), [torch.randn(4, 4)], RUN).layers}
    assert found["fc"].summed is summed


@pytest.mark.parametrize("add", [lambda z, s, o: z + s, lambda z, s, o: s.add_(z), lambda z, s, o: z.add_(s), lambda z, s, o: z[None] + s[None]])
def test_what_is_added_is_seen(add: Callable[..., Tensor]) -> None:
    model, x = Added(add), torch.randn(6, 4)
    (seen,) = capture.kept(model, [x], RUN, layers.only_matrix(model.fc), summed=True)
    assert torch.equal(seen.Z, model.fc(x))
    assert seen.beside is not None
    torch.testing.assert_close(seen.beside, model.other(x) * 2, rtol=0, atol=1e-6)
    (given,) = capture.kept(model, [x], RUN, layers.only_matrix(model.fc), summed=True, given=True)
    assert torch.equal(given.kept, x) and not len(given.Z) and given.beside is not None
    torch.testing.assert_close(given.beside, seen.beside, rtol=0, atol=1e-6)
    assert "forward" not in vars(model.fc)
    ((found, *_),) = taking.together(model, [x], RUN, {"fc": layers.only_matrix(model.fc)}, summed=["fc"])
    assert torch.equal(found["fc"].beside, seen.beside)  # type: ignore[arg-type]


def test_a_convolution_is_seen_with_its_batchnorm() -> None:
    model, x = Convolved().eval(), torch.randn(2, 3, 5, 5)
    assert [layer.name for layer in trace(model, [x], RUN).layers if layer.summed] == ["outer"]
    (seen,) = capture.kept(model, [x], RUN, layers.matrices_of(model.outer)[0], summed=True)
    assert seen.beside is not None
    expected = torch.relu(model.stem(x)).permute(0, 2, 3, 1).reshape(-1, 6)
    torch.testing.assert_close(seen.beside, expected)


def test_a_sum_that_is_gone_is_an_error() -> None:
    model = Added(lambda z, skip, other: z * skip)
    with pytest.raises(RouteError, match="'fc' is added to another tensor in the dense network, and not in calibration batch 0 of the pruned one"):
        list(capture.kept(model, [torch.randn(4, 4)], RUN, layers.only_matrix(model.fc), summed=True))


@pytest.mark.parametrize("repair", (1.0, 0.5))
@pytest.mark.parametrize("way", ({}, {"max_rows": 40}), ids=("all rows", "some rows"))
def test_with_all_weights_kept_the_sum_is_fitted(repair: float, way: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, x = Residual(), data()
    shares = {"first": 0.7, "lower.0": 0.0}
    result = nettrim.prune(model, x, sparsity=shares, targets=list(shares), repair=repair, fidelity="layer", holdout=0.0, **way)

    def inner(net: Any, stem: Any) -> tuple[Tensor, Tensor]:
        h = stem(x)
        return h, nn.functional.gelu(net.upper[0](net.norm(h)))

    pruned: Any = result.model
    (h, A), (h_off, A_off) = inner(model, model.first), inner(pruned, pruned.first)
    Y = model.lower[0](A) + h - h_off
    target = repair * Y + (1 - repair) * model.lower[0](A_off)
    ones = torch.cat([A_off, torch.ones(len(x), 1)], 1).double()
    W = torch.cat([pruned.lower[0].weight, pruned.lower[0].bias[:, None]], 1).double()
    if not way:
        expected = torch.linalg.lstsq(ones, target.double()).solution.T
        torch.testing.assert_close(W, expected, rtol=1e-3, atol=1e-4)
        sum_error = (h_off + pruned.lower[0](A_off) - (h + model.lower[0](A))).norm()
        if repair == 1:  # the least that there can be
            least = (ones @ expected.T - Y).norm().detach()
            assert float(sum_error.detach()) == pytest.approx(float(least), rel=1e-4)
    checked = nettrim.verify(model, pruned, x, result.report)
    assert checked.holds, str(checked)
    assert not [check for check in checked.checks if check.outcome == "not proven" and check.what == "objective"]


@pytest.mark.parametrize(("repair", "damping"), [(1.0, 0.0), (0.5, 0.0), (0.0, 0.0), (0.5, 0.1), (1.0, 0.03)])
@pytest.mark.parametrize(
    ("make", "asked"),
    [
        (Residual, {"sparsity": 0.6}),
        (Residual, {"pattern": "2:4"}),
        (Residual, {"sparsity": 0.5, "pattern": "neuron"}),
        (Convolved, {"sparsity": 0.6}),
        (Convolved, {"sparsity": 0.6, "max_rows": 300}),
    ],
)
def test_promises_and_objectives_are_verified(make: Callable[[], nn.Module], repair: float, damping: float, asked: dict[str, Any]) -> None:
    torch.manual_seed(1)
    model = make().eval()
    x = data(80) if make is Residual else torch.randn(40, 3, 6, 6)
    result = nettrim.prune(model, x, repair=repair, damping=damping, **asked)
    assert result.report.certificate.holds
    checked = nettrim.verify(model, result.model, x, result.report)
    assert checked.holds, str(checked)


def test_every_route_gives_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2)
    blocks = nn.Sequential(*(Block() for _ in range(3)))
    x, asked = list(data().split(20)), {"sparsity": 0.6, "repair": 0.5, "fidelity": "layer", "allocation": "uniform"}
    block_by_block = nettrim.prune(blocks, x, **asked)
    assert block_by_block.report.options["blocks"] == "the network: 3 blocks"
    whole = nettrim.prune(blocks, x, **asked, blocks=None)
    assert _same(whole.model, block_by_block.model)
    monkeypatch.setattr(stages, "HELD_ELEMENTS", 10)
    assert _same(nettrim.prune(blocks, x, **asked).model, whole.model)


def test_blocks_of_neurons_may_be_solved_elsewhere() -> None:
    torch.manual_seed(6)
    model, x = Residual(), data()
    asked = {"pattern": "2:4", "neurons": 6, "fidelity": "layer"}
    with ThreadPoolExecutor(2) as executor:
        apart = nettrim.prune(model, x, **asked, executor=executor)
    for a, b in zip(apart.model.parameters(), nettrim.prune(model, x, **asked).model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.upper, self.lower = nn.LayerNorm(12), nn.Linear(12, 24), nn.Linear(24, 12)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.lower(nn.functional.gelu(self.upper(self.norm(x))))


def test_the_sums_are_nearer_to_the_dense_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(4)
    model, x = nn.Sequential(*(Block() for _ in range(6))), data(400)
    asked = {"sparsity": 0.7, "fidelity": "layer", "allocation": "uniform"}
    with_sums = nettrim.prune(model, x, **asked).report.certificate
    monkeypatch.setattr(stages.Ask, "wants_sum", lambda self, layer: False)
    without = nettrim.prune(model, x, **asked).report.certificate
    assert with_sums.relative_measured < 0.9 * without.relative_measured
    assert with_sums.holdout is not None and without.holdout is not None
    assert with_sums.holdout < without.holdout


@pytest.mark.parametrize("asked", ({"epsilon": 0.1}, {"sparsity": 0.5, "mode": "parallel"}, {"sparsity": 0.5, "repair": 0.0}), ids=str)
def test_what_does_not_look_at_sums(asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(5)
    model, x = Residual(), data()
    result = nettrim.prune(model, x, **asked)
    monkeypatch.setattr(stages.Ask, "wants_sum", lambda self, layer: False)
    assert _same(nettrim.prune(model, x, **asked).model, result.model)


def _same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(ours, theirs) for ours, theirs in zip(a.parameters(), b.parameters(), strict=True))


def test_a_forward_pass_in_inference_mode() -> None:
    model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4))
    run = torch.inference_mode()(lambda net, batch: net(batch))
    asked: dict[str, Any] = {"sparsity": 0.5, "fidelity": "layer", "allocation": "uniform"}
    assert _same(nettrim.prune(model, data(), **asked, forward_fn=run).model, nettrim.prune(model, data(), **asked).model)
