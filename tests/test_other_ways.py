"""Networks whose values decide what runs: the pruned one may take another way than the dense one, and no bound is stated for it then."""

import dataclasses
from typing import Any

import pytest
import torch
from networks import samples
from torch import Tensor, nn

import nettrim

INPUTS = samples(200, 10)


class Routed(nn.Module):
    """A chain of three layers, of which the second runs where the first one's output is large enough: in the dense network just so."""

    def __init__(self, seed: int, other: str = "left out") -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b, self.c = nn.Linear(10, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        with torch.no_grad():
            self.b.bias.add_(3.0)
        self.other, self.least, self.last = other, 0.0, 0.0
        with torch.no_grad():
            self(INPUTS)
        self.least = self.last - 1e-6

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        self.last = float(h[0].detach().sum())
        if self.last > self.least:
            h = torch.relu(self.b(h))
        elif self.other == "doubled":
            h = 2.0 * torch.relu(self.b(h))
        elif self.other == "another activation":
            h = torch.tanh(self.b(h))
        return self.c(h)


def diverted(other: str, **options: Any) -> tuple[nn.Module, nettrim.PruneResult]:
    """A network whose pruned form takes the other way."""
    for seed in range(20):
        model = Routed(seed, other)
        result = nettrim.prune(model, [INPUTS], mode="parallel", holdout=0, **options)
        with torch.no_grad():
            result.model(INPUTS)
        if result.model.last <= result.model.least:  # type: ignore[operator]
            return model, result
    raise AssertionError("none of the networks takes another way")


GOALS: tuple[dict[str, Any], ...] = (
    {"epsilon": 0.01}, {"sparsity": 0.5}, {"epsilon": 0.01, "targets": ["a", "c"]}, {"sparsity": 0.5, "max_rows": 50},
)  # fmt: skip


@pytest.mark.parametrize("options", GOALS, ids=str)
@pytest.mark.parametrize("other", ("left out", "doubled", "another activation"))
def test_no_bound_is_stated_for_another_chain(other: str, options: dict[str, Any]) -> None:
    model, result = diverted(other, **options)
    certificate = result.report.certificate
    assert certificate.guaranteed is None and "pruned network" in certificate.explanation
    assert all(layer.discrepancy <= layer.epsilon for layer in result.report.layers) and certificate.holds
    if other == "left out" and "targets" not in options:
        assert result.report.layers[1].accumulated is None
    found = nettrim.verify(model, result.model, [INPUTS], result.report)
    assert found.holds, str(found)
    # and a bound that somebody states all the same is found
    stated = dataclasses.replace(certificate, guaranteed=2 * certificate.measured)
    forged = nettrim.verify(model, result.model, [INPUTS], dataclasses.replace(result.report, certificate=stated))
    assert "guaranteed" in {check.what for check in forged.broken}


def test_a_layer_that_the_pruned_network_alone_runs_takes_the_bound() -> None:
    """The dense network leaves the second layer out, and the pruned one does not."""
    for seed in range(20):
        model = Routed(seed)
        model.least = model.least + 2e-6
        result = nettrim.prune(model, [INPUTS], mode="parallel", holdout=0, epsilon=0.01)
        with torch.no_grad():
            result.model(INPUTS)
        if result.model.last > result.model.least:  # type: ignore[operator]
            break
    certificate = result.report.certificate
    assert result.model.last > result.model.least and certificate.guaranteed is None  # type: ignore[operator]
    assert "layer 'b' does not run alike in the pruned network" in certificate.explanation
    assert nettrim.verify(model, result.model, [INPUTS], result.report).holds


def test_a_layer_of_a_cascade_that_the_pruned_network_leaves_out_is_named() -> None:
    """No report of ours says so; of one that does, the layer's figures are not said to hold."""
    model, result = diverted("left out", sparsity=0.5)
    report = dataclasses.replace(result.report, options={**result.report.options, "mode": "cascade"})
    found = nettrim.verify(model, result.model, [INPUTS], report)
    assert "not checked here: it does not run alike in the pruned network" in {check.note for check in found.unproven if check.subject == "layer b"}
