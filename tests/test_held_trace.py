"""What a chain's layers are given and give is taken in its trace, not in a pass more: the same bits, and nothing that it may not hold."""

import dataclasses
import sys
from typing import Any

import pytest
import torch
from networks import chain, samples, state_of
from torch import Tensor, nn

import nettrim
from nettrim import calibration, layers, pipeline, prune, surveying
from nettrim.taking import Holding
from nettrim.tracing import trace

WAYS: dict[str, dict[str, Any]] = {
    "cascade": {"sparsity": 0.6},
    "parallel": {"sparsity": 0.6, "mode": "parallel"},
    "budgets": {"epsilon": 0.2},
    "some rows": {"sparsity": 0.6, "max_rows": 80},
    "repair": {"sparsity": 0.6, "repair": "auto"},
    "some layers": {"sparsity": 0.6, "ignore": ("2",)},
}


@pytest.fixture
def surveys(monkeypatch: pytest.MonkeyPatch) -> list[surveying.Survey]:
    """Every survey that is made."""
    made: list[surveying.Survey] = []
    inner = surveying.survey

    def noted(*args: Any, **kwargs: Any) -> surveying.Survey:
        made.append(inner(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(sys.modules["nettrim.prune"], "survey", noted)
    return made


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16), ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_the_same_bits_as_from_a_pass_of_its_own(way: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = chain(20, 16, 24, 6).to(dtype), [part.to(dtype) for part in samples(300, 20).split(100)]
    passes = []
    model.register_forward_hook(lambda module, args, out: passes.append(1))
    found, fewer = prune(model, batches, **WAYS[way]), len(passes)
    passes.clear()
    monkeypatch.setattr(surveying, "HELD_ELEMENTS", 0)
    expected = prune(model, batches, **WAYS[way])
    assert fewer < len(passes)
    assert all(torch.equal(a, b) for a, b in zip(state_of(found.model).values(), state_of(expected.model).values(), strict=True))
    assert [layer.discrepancy for layer in found.report.layers] == [layer.discrepancy for layer in expected.report.layers]
    assert nettrim.verify(model, found.model, batches, found.report).holds


@pytest.mark.parametrize("way", WAYS)
def test_what_was_seen_stays_as_it_was(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several trials look at the same tensors."""
    kept: list[tuple[Tensor, Tensor]] = []
    inner = pipeline.Whole.__init__

    def noted(self: Any, *args: Any) -> None:
        inner(self, *args)
        kept.extend((tensor, tensor.clone()) for found in self._seen for seen in found.values() for tensor in (seen.kept, seen.Z))

    monkeypatch.setattr(pipeline.Whole, "__init__", noted)
    prune(chain(20, 16, 24, 6).double(), samples(300, 20).double(), **WAYS[way])
    assert kept and all(torch.equal(tensor, copy) for tensor, copy in kept)


def test_it_is_what_the_layers_are_given_and_give(surveys: list[surveying.Survey]) -> None:
    model, x = chain(20, 16, 6), samples(90, 20)
    prune(model, [x[:50], x[50:]], sparsity=0.5, holdout=0)
    (survey,) = surveys
    assert survey.seen is not None and [set(found) for found in survey.seen] == [{"0", "2"}] * 2
    for found, part in zip(survey.seen, (x[:50], x[50:]), strict=True):
        with torch.no_grad():
            hidden = model[1](model[0](part))
            assert torch.equal(found["0"].kept, part) and torch.equal(found["0"].Z, model[0](part))
            assert torch.equal(found["2"].kept, hidden) and torch.equal(found["2"].Z, model[2](hidden))


class Twice(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        super().forward(x)
        return super().forward(x)


class Broken(nn.Sequential):
    """Puts out infinities in a layer whose output is not read."""

    def forward(self, x: Tensor) -> Tensor:
        self[0](x * torch.inf)
        return self[2](self[1](x))


@pytest.mark.parametrize(
    ("model", "limit"),
    ((chain(20, 16, 6), 5000), (Twice(nn.Linear(20, 6)), 10**6), (Broken(nn.Linear(20, 6), nn.Linear(20, 8), nn.Linear(8, 3)), 10**6)),
    ids=("more than is little", "a layer that runs twice", "infinities"),
)
def test_nothing_is_held(model: nn.Module, limit: int) -> None:
    holding = Holding(layers.matrices(model), None, limit)
    trace(model, calibration.batches(list(samples(200, 20).split(50))), calibration.runner(), within=holding.taking)
    assert holding.batches is None
    assert all(not module._forward_hooks for module in model.modules())


def test_a_layer_whose_weight_is_computed_is_left_to_be_refused() -> None:
    model, x = chain(20, 16, 6), samples(100, 20)
    masked = nettrim.apply_masks(model, {"0.weight": torch.ones(16, 20, dtype=torch.bool)})
    found = prune(masked, x, sparsity=0.5).report
    assert [layer.name for layer in found.layers] == ["2"] and "make it permanent first" in found.skipped["0"]


def test_a_network_that_is_no_chain_is_looked_at_by_itself(surveys: list[surveying.Survey]) -> None:
    class Sum(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return x + super().forward(x)

    assert prune(Sum(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 20)), samples(200, 20), sparsity=0.5).report.certificate.holds
    assert surveys[0].seen is None


def test_taking_leaves_the_trace_as_it_is() -> None:
    model, batches = chain(20, 16, 24, 6), calibration.batches(list(samples(200, 20).split(50)))
    holding = Holding(layers.matrices(model), None, 10**6)
    found, expected = (trace(model, batches, calibration.runner(), within=how) for how in (holding.taking, None))
    alone = [[dataclasses.replace(layer, matrix=expected.layers[0].matrix) for layer in one.layers] for one in (found, expected)]
    assert alone[0] == alone[1] and found.skipped == expected.skipped
    assert found.chain and holding.batches is not None and len(holding.batches) == 4
