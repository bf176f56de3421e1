"""What need not be computed, is not; and where it may not be left out, it is not: the weights are those of the whole network, bit for bit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import same_bits, state_of
from torch import Tensor, nn
from torch.nn import functional as F

import nettrim
from nettrim import budgets, grams, observation, stages
from nettrim.layers import Kind, register

WIDTH = 10  # batches of 7 samples do not begin where memory is aligned


class Known(nn.Module):
    """A type of the user's own whose forward depends on more than the rows."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(outputs, inputs) / inputs**0.5), None

    def forward(self, x: Tensor, _scale: float) -> Tensor:
        return F.linear(F.dropout(x, 0.5, self.training), self.weight)


@register(Known)
class KnownKind(Kind):
    pass


class Flattening(Known):
    """Its rows come out flattened."""

    def forward(self, x: Tensor, _scale: float) -> Tensor:
        return super().forward(x.flatten(0, -2), _scale)


@register(Flattening)
class FlatteningKind(Kind):
    pass


class Twice(nn.Linear):
    """Called twice in a pass: its second input depends on its own weights."""


@register(Twice)
class TwiceKind(Kind):
    repeats = True


Ending = Callable[["Residual", Tensor, Tensor], Tensor]


class Residual(nn.Module):
    def __init__(self, ending: Ending) -> None:
        super().__init__()
        self.up, self.down, self.own = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), Known(WIDTH, WIDTH)
        self.ending, self.limit, self.largest = ending, 1e9, 0.0

    def forward(self, x: Tensor) -> Tensor:
        return self.ending(self, x, torch.tanh(self.up(x)))


def summed(block: Residual, x: Tensor, h: Tensor) -> Tensor:
    return x + block.down(h)


def deciding(block: Residual, x: Tensor, h: Tensor) -> Tensor:
    """It clamps what is larger than the dense network makes it."""
    out = x + block.down(h)
    largest = float(out.detach().abs().max())
    block.largest = max(block.largest, largest)
    return out.clamp(-block.limit, block.limit) if largest > block.limit else out


def through_data(block: Residual, x: Tensor, h: Tensor) -> Tensor:
    """What is written this way raises no version."""
    out = x + block.down(h)
    out.data.mul_(1.5)
    return out


def gaps(block: Residual, x: Tensor, h: Tensor) -> Tensor:
    return x + block.down(torch.cat([h, h], -1)[..., ::2])


def behind_a_norm(block: Residual, x: Tensor, h: Tensor) -> Tensor:
    return F.layer_norm(x + block.down(h), (WIDTH,))


def written_into(block: Residual, x: Tensor, h: Tensor) -> Tensor:
    return (x + block.down(h)).mul_(1.5)


def alone(block: Residual, x: Tensor, h: Tensor) -> Tensor:
    return block.down(h) * 1.5


def read(block: Residual, x: Tensor, h: Tensor) -> Tensor:
    """A decision that no operation of torch shows."""
    out = x + block.down(h)
    largest = max(out.detach().abs().flatten(0, -1).float().tolist())
    block.largest = max(block.largest, largest)
    return out.clamp(-block.limit, block.limit) if largest > block.limit else out


def own(block: Residual, x: Tensor, h: Tensor) -> Tensor:
    return x + block.own(h, 1.0)


class Stack(nn.Module):
    def __init__(self, ending: Ending) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 2)
        self.blocks = nn.Sequential(*(Residual(ending) for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(x)))


@pytest.mark.parametrize(
    ("ending", "left_out"),
    [
        (summed, True),
        (deciding, False),
        (read, False),
        (through_data, False),
        (written_into, False),
        (behind_a_norm, False),
        (alone, False),
        (gaps, False),
        (own, False),
    ],
)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_the_pass_to_a_blocks_end(ending: Ending, left_out: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model: Any = Stack(ending).to(dtype)
    x = list(torch.randn(24, 5, 4).to(dtype).split(7))
    with torch.no_grad():
        for batch in x:
            model.eval()(batch)
    for block in model.blocks:
        block.limit = block.largest * 1.0001
    model.train()
    found: list[bool] = []
    original = stages.Block.pruned_ends
    monkeypatch.setattr(stages.Block, "pruned_ends", lambda self: (ends := original(self), found.append(bool(ends)))[0])
    asked: dict[str, Any] = {"sparsity": 0.6, "allocation": "uniform", "holdout": 0.0, "fidelity": "layer"}
    blocks = nettrim.prune(model, x, **asked, blocks="blocks")
    whole = nettrim.prune(model, x, **asked, blocks=None)
    assert found == [left_out] * 3
    assert same_bits(state_of(blocks.model), state_of(whole.model))
    assert blocks.report.certificate.measured == pytest.approx(whole.report.certificate.measured, rel=1e-6)
    checked = nettrim.verify(model, blocks.model, x, blocks.report)
    assert checked.holds, str(checked)


class Depthwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dw, self.out = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(self.dw(x).relu())


def test_depthwise_convolutions_in_blocks_that_are_nearly_too_large_to_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Sequential(Depthwise(), Depthwise()), nn.AvgPool2d(8), nn.Flatten(), nn.Linear(16, 2))
    for module in (stages, observation, budgets):
        monkeypatch.setattr(module, "HELD_ELEMENTS", 30 * 20 * 64)
    x = torch.randn(20, 3, 8, 8).split(10)
    asked: dict[str, Any] = {"sparsity": 0.5, "allocation": "uniform", "fidelity": "layer", "holdout": 0.0, "targets": ["*.dw"]}
    result = nettrim.prune(model, x, **asked, blocks="1")
    assert same_bits(state_of(result.model), state_of(nettrim.prune(model, x, **asked, blocks=None).model))


class Calls(nn.Module):
    def __init__(self, layer: nn.Module, how: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.layer, self.last, self.how = nn.Linear(5, 8), layer, nn.Linear(8, 3), how

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.how(self.layer, self.first(x).tanh()))


@pytest.mark.parametrize(
    ("make", "how"),
    [
        (lambda: Twice(8, 8), lambda layer, h: layer(layer(h).tanh()).tanh()),
        (lambda: Flattening(8, 8), lambda layer, h: h.flatten(0, 1) + layer(h, 1.0)),
        (lambda: nn.Linear(8, 8), lambda layer, h: h + layer(input=h)),
    ],
    ids=["twice", "flattened", "by keyword"],
)
def test_types_of_which_no_output_is_known_are_computed(make: Callable[[], nn.Module], how: Callable[[Any, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model, x = Calls(make(), how), torch.randn(40, 3, 5)
    result = nettrim.prune(model, x, sparsity=0.5, fidelity="layer", holdout=0.0)
    assert result.report.certificate.holds
    rows: list[Tensor] = []
    layer: Any = result.model.layer
    with torch.no_grad():
        handle = layer.register_forward_pre_hook(lambda module, args, kwargs: rows.append((*args, *kwargs.values())[0]), with_kwargs=True)
        result.model.eval()(x)
        handle.remove()
        assert len(rows) == (2 if isinstance(layer, Twice) else 1)
    checked = nettrim.verify(model, result.model, x, result.report)
    assert checked.holds, str(checked)


def test_sums_over_columns_leave_the_rows_as_they_are() -> None:
    for dtype in (torch.float32, torch.float64):
        A = torch.arange(6, dtype=dtype).view(3, 2)
        before = A.clone()
        assert grams.column_squares(A).tolist() == [20.0, 35.0]
        assert grams.square_sum(A) == 55
        assert torch.equal(A, before)


@pytest.mark.parametrize("options", ({}, {"fidelity": "layer"}, {"fidelity": "layer", "damping": 0.1}), ids=str)
@pytest.mark.parametrize("shape", ("linear", "grouped"))
def test_networks_in_float64(shape: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    if shape == "linear":
        model, x = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4)), torch.randn(200, 8)
    else:
        model, x = nn.Sequential(nn.Conv1d(4, 6, 3, groups=2), nn.Tanh(), nn.Conv1d(6, 4, 1)), torch.randn(40, 4, 9)
    single = nettrim.prune(model, x, sparsity=0.5, allocation="uniform", **options)
    double = nettrim.prune(model.double(), x.double(), sparsity=0.5, allocation="uniform", **options)
    for ours, theirs in zip(double.report.layers, single.report.layers, strict=True):
        assert ours.relative_discrepancy == pytest.approx(theirs.relative_discrepancy, rel=0.05)
    assert nettrim.verify(model, double.model, x.double(), double.report).holds


class Graph(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 3)
        self.edges = torch.eye(30).to_sparse()

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.sparse.mm(self.edges, self.one(x)).relu())


def test_a_network_with_sparse_tensors_has_sensitivities() -> None:
    assert nettrim.prune(Graph(), [torch.randn(30, 6)], sparsity=0.5, holdout=0.0).report.certificate.holds
