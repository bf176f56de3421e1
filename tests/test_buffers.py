"""Models whose forward changes, fills, resizes or replaces their buffers, or whose buffers cannot be written into: pruned, and left as they were."""

from typing import Any

import pytest
import torch
from networks import same_bits, samples, state_of
from torch import Tensor, nn

import nettrim
from nettrim import passes, safeguard
from nettrim.buffers import Buffers

INPUTS = samples(100, 8)


class Holder(nn.Module):
    """Two layers, and a buffer."""

    def __init__(self, buffer: Tensor | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)
        self.register_buffer("n", buffer)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))


class Counting(Holder):
    n: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        self.n = torch.zeros(1) if self.n is None else self.n + 1
        return super().forward(x)


class Growing(Holder):
    n: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.n.resize_(self.n.numel() + 1)
        return super().forward(x)


class Caching(Holder):
    """A table for as many rows as the longest batch, made anew for a longer one, as models with rotary embeddings have it."""

    n: Tensor

    def __init__(self, buffer: Tensor | None) -> None:
        super().__init__(buffer)
        self.longest = 1

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.longest:
            self.longest = len(x)
            self.register_buffer("n", torch.arange(len(x)) / 100.0)
        return super().forward(x) + self.n[: len(x), None]


class Late(Holder):
    """Registers a buffer when it first runs."""

    ready = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.ready:
            self.register_buffer("late", torch.ones(4))
            self.ready = True
        return super().forward(x) * self.late


NAN = torch.tensor([float("nan"), 1.0])
MODELS: dict[str, Any] = {
    "expanded": lambda: Holder(torch.ones(1, 1).expand(3, 3)),
    "NaN": lambda: Holder(NAN.clone()),
    "None, filled": lambda: Counting(None),
    "replaced": lambda: Counting(torch.zeros(1)),
    "resized": lambda: Growing(torch.zeros(2)),
    "a table": lambda: Caching(torch.arange(1) / 100.0),
    "a late one": lambda: Late(None),
}


@pytest.mark.parametrize("fails", (False, True), ids=("prunes", "fails"))
@pytest.mark.parametrize("name", MODELS)
def test_a_model_with_such_a_buffer_is_pruned_and_left_as_it_was(name: str, fails: bool) -> None:
    model = MODELS[name]().train()
    before, buffers = state_of(model), dict(model._buffers)
    if fails:
        with pytest.raises(nettrim.ConvergenceError):
            nettrim.prune(model, INPUTS, epsilon=1e-12)
    else:
        result = nettrim.prune(model, INPUTS, epsilon=0.2)
        assert result.report.certificate.holds
        assert nettrim.verify(model, result.model, INPUTS, result.report).holds
        result.model(INPUTS)  # and it runs
    assert model.training and all(module.training for module in model.modules())
    assert same_bits(state_of(model), before)
    assert {key: value is None for key, value in model._buffers.items()} == {key: value is None for key, value in buffers.items()}
    model(INPUTS)


class Averaging(Holder):
    """Adds what it computes to a buffer, in place."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        self.n += h.mean(0)  # type: ignore[operator]
        return self.b(h * (1 + 0 * self.n))  # type: ignore[operator]


@pytest.mark.parametrize("view", (False, True))
def test_gradients_do_not_stay_in_a_buffer_that_was_written_into(view: bool) -> None:
    model = Averaging(torch.zeros(2, 16)[1] if view else torch.zeros(16))
    result = nettrim.prune(model, list(INPUTS.split(30)), sparsity=0.5)
    assert result.report.certificate.holds
    for network in (model, result.model):
        assert network.n.grad_fn is None and not network.n.requires_grad
        assert torch.equal(network.n, torch.zeros(16))


def test_what_was_not_changed_stays_the_same_tensor_and_is_not_written_into() -> None:
    model = Holder(torch.ones(1, 1).expand(3, 3))
    buffer, version = model.n, model.n._version  # type: ignore[union-attr]
    with passes.evaluation(model):
        model(INPUTS)
    assert model.n is buffer and buffer._version == version  # type: ignore[union-attr]


def test_an_expanded_buffer_whose_number_changed_is_replaced_by_a_copy() -> None:
    base = torch.ones(1, 1)
    model = Holder(base.expand(3, 3))
    with passes.evaluation(model):
        base.mul_(2)
    assert torch.equal(model.n, torch.ones(3, 3))  # type: ignore[arg-type]


def test_modules_with_one_buffer_between_them_keep_one() -> None:
    shared = torch.zeros(2)
    model = nn.Sequential(Holder(shared), Holder(shared))
    kept = Buffers(model.modules())
    shared.resize_(3)
    kept.put_back()
    assert model[0].n is model[1].n and torch.equal(model[0].n, torch.zeros(2))  # type: ignore[arg-type]


def test_a_scripted_model_is_refused_by_name_and_left_as_it_was() -> None:
    model = torch.jit.script(nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4)))
    before = state_of(model)
    with pytest.raises(nettrim.ArgumentError, match="no layer to prune"):
        nettrim.prune(model, INPUTS, epsilon=0.2)
    assert same_bits(state_of(model), before)


def test_a_step_of_putting_back_that_fails_keeps_no_other_from_being_done(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Holder(torch.zeros(2)).train()
    before = safeguard.Before(model)
    monkeypatch.setattr(Buffers, "put_back", lambda self: 1 / 0)
    model.eval()
    model.a.weight.requires_grad_(False)
    model.a.register_forward_hook(lambda *_: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    torch.set_grad_enabled(False)
    try:
        with pytest.raises(ZeroDivisionError):
            before.put_back()
        assert torch.is_grad_enabled() and torch.get_num_threads() == threads
    finally:
        torch.set_grad_enabled(True)
        torch.set_num_threads(threads)
    assert model.training and model.a.weight.requires_grad and not model.a._forward_hooks
