"""Traces in which linear layers compute nothing, once a batch has shown that no values decide: what they find is what runs that compute find."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nettrim import calibration, prune, tracing
from nettrim.tracing import Trace, trace

RUN = calibration.runner()


class Net(nn.Module):
    def __init__(self, forward: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6, bias=False), nn.Linear(6, 6)
        self.norm, self.table, self.function = nn.LayerNorm(6), nn.Embedding(6, 6), forward

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def data(batches: int = 4) -> list[Tensor]:
    return list(torch.randn(4 * batches - 1, 3, 6, generator=torch.Generator().manual_seed(0)).split(4))


def products(model: nn.Module, batches: list[Tensor], monkeypatch: pytest.MonkeyPatch, run: calibration.Run = RUN) -> tuple[Trace, int]:
    """The trace, and how many products of linear layers were computed for it."""
    count, own = 0, F.linear

    def counted(*args: Any) -> Tensor:
        nonlocal count
        count += 1
        return own(*args)

    with monkeypatch.context() as patch:
        patch.setattr(F, "linear", counted)
        found = trace(model, batches, run)
    return found, count


def computed(model: nn.Module, batches: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> Trace:
    """The trace of runs that compute everything."""
    with monkeypatch.context() as patch:
        patch.setattr(tracing, "skimmed", lambda *given: None)
        return trace(model, batches, RUN)


def same(a: Trace, b: Trace) -> bool:
    fields = ("name", "function", "norm", "reads", "reads_alone", "skip_reason", "spread", "rows", "summed")
    layers = [[tuple(getattr(layer, field) for field in fields) for layer in found.layers] for found in (a, b)]
    return a.skipped == b.skipped and a.not_chain_reason == b.not_chain_reason and layers[0] == layers[1]


def by_values(net: Any, x: Tensor, reading: Callable[[Tensor], bool]) -> Tensor:
    h = net.a(x)
    return net.c(net.b(h) if reading(h) else h)  # zeros would go the other way


PLAIN: dict[str, Callable[[Any, Tensor], Any]] = {
    "chain": lambda net, x: net.c(F.relu(net.b(F.relu(net.a(x))))),
    "residual": lambda net, x: net.norm(x + net.c(F.gelu(net.b(net.a(x))))),
    "by keyword": lambda net, x: net.c(input=net.b(F.relu(net.a(input=x)))),
    "by shape": lambda net, x: net.c(net.b(F.relu(net.a(x)) if len(x) == 4 else F.gelu(net.a(x)))),
    "called twice": lambda net, x: net.c(net.b(net.a(net.a(x)))),
    "returned": lambda net, x: (net.b(y := net.a(x)), y),
    "values before the first layer": lambda net, x: net.c(net.b(F.relu(net.a(x)) if float(x.sum()) > -1e9 else F.gelu(net.a(x)))),
    "looked up": lambda net, x: net.c(net.table(net.b(net.a(x)).argmax(-1))),
    "what zeros make NaN": lambda net, x: net.c(F.relu(net.b(F.normalize(h := net.a(x), dim=-1, eps=0) / h))),
}


@pytest.mark.parametrize("name", PLAIN)
def test_products_are_those_of_the_first_batch_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = Net(PLAIN[name]), data()
    found, count = products(model, batches, monkeypatch)
    assert count == products(model, batches[:1], monkeypatch)[1]
    assert same(found, computed(model, batches, monkeypatch))
    assert all(layer.rows == sum(len(batch) * 3 for batch in batches) for layer in found.layers if name != "called twice")
    assert all("forward" not in vars(module) and not module._forward_hooks for module in model.modules())


READINGS: dict[str, Callable[[Tensor], bool]] = {
    "item": lambda h: h.sum().item() != 0,
    "bool": lambda h: bool((h != 0).any()),
    "list": lambda h: h.tolist()[0][0][0] != 0,
    "array": lambda h: h.numpy().any(),
    "nonzero": lambda h: len(h.nonzero()) > 0,
    "masked": lambda h: len(h[h != 0]) > 0,
}


@pytest.mark.parametrize("name", READINGS)
def test_where_values_of_layers_may_decide_everything_is_computed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = Net(lambda net, x: by_values(net, x, READINGS[name])), data()
    found, count = products(model, batches, monkeypatch)
    assert count == 3 * len(batches)
    assert same(found, computed(model, batches, monkeypatch)) and "b" not in found.skipped


def test_a_batch_that_decides_though_the_first_did_not_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = Net(lambda net, x: by_values(net, x, lambda h: len(x) == 4 or float(h.abs().sum()) > 0)), data()
    found, count = products(model, batches, monkeypatch)
    assert count == 3 + 3
    assert same(found, computed(model, batches, monkeypatch)) and "b" not in found.skipped


def test_a_model_that_refuses_zeros_is_run_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(net: Any, x: Tensor) -> Tensor:
        h = net.a(x)
        if len(x) < 4 and not bool(h.any()):
            raise ValueError("nothing there")
        return net.c(net.b(h).relu())

    batches = data()
    assert same(trace(Net(refusing), batches, RUN), computed(Net(refusing), batches, monkeypatch))


def test_a_batch_that_cannot_be_run_is_named() -> None:
    batches = [*data(), torch.randn(4, 3, 5)]
    with pytest.raises(calibration.CalibrationError, match="calibration batch 4"):
        trace(Net(PLAIN["residual"]), batches, RUN)


@pytest.mark.parametrize("autocast", (True, False))
def test_what_decides_the_dtype_is_computed(autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(model: nn.Module, batch: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model(batch.transpose(0, 1) if not autocast else batch)  # rows with gaps are computed too, of the first layer

    model, batches = Net(PLAIN["chain"]), data()
    found, count = products(model, batches, monkeypatch, run)
    assert count == (3 * 4 if autocast else 3 + 3)
    assert [layer.activation for layer in found.layers] == ["relu", "relu", None]


def test_a_network_that_counts_its_calls_is_seen_as_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        net.calls = getattr(net, "calls", 0) + 1
        return net.c(net.b(net.a(x)) if net.calls % 2 else net.a(x))

    found, count = products(Net(forward), data(), monkeypatch)
    assert found.skipped["b"] == "ran in 2 of 4 calibration batches only (not in batch 1)"
    assert count == 3


def test_buffers_that_a_pass_writes_are_as_they_were() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 2)
            self.register_buffer("mean", torch.zeros(6))

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            self.mean += h.mean((0, 1))
            return self.b(h)

    model = Counting()
    trace(model, data(), RUN)
    assert torch.equal(model.mean, torch.zeros(6))
    result = prune(model, data(), sparsity=0.5, fidelity="layer", allocation="uniform")
    assert torch.equal(model.mean, torch.zeros(6)) and result.report.certificate.holds
