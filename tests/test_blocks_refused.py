"""Networks that fail where their blocks are bypassed or run alone: they are run whole, and the report says why."""

import threading

import pytest
import torch
from networks import same_bits, samples, state_of
from torch import Tensor, nn

import nettrim

INPUTS = samples(50, 10)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c, self.d = nn.Linear(10, 20), nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.d(torch.relu(self.c(x)))


class Deep(nn.Module):
    block: type[nn.Module] = Block

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.head = nn.ModuleList(self.block() for _ in range(3)), nn.Linear(10, 3)


class Scaled(Block):
    """Reads what the network holds ready during its own forward, and no longer."""

    shared: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shared["scale"] * self.d(torch.relu(self.c(x)))


class Sharing(Deep):
    block = Scaled

    def forward(self, x: Tensor) -> Tensor:
        Scaled.shared["scale"] = x.mean()
        try:
            for layer in self.layers:
                x = layer(x)
        finally:
            Scaled.shared.clear()
        return self.head(x)


class Locked(Block):
    def forward(self, x: Tensor, lock: object) -> Tensor:
        return super().forward(x)


class Locking(Deep):
    """Calls its blocks with an object that cannot be copied."""

    block = Locked

    def forward(self, x: Tensor) -> Tensor:
        lock = threading.Lock()
        for layer in self.layers:
            x = layer(x, lock)
        return self.head(x)


class Clamped(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(0, 1)


class Checking(Deep):
    """Refuses hidden states that its blocks cannot put out."""

    block = Clamped

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            if bool((x < 0).any()):
                raise ValueError("a block put out something negative")
        return self.head(x)


@pytest.mark.parametrize(
    ("kind", "reason"), ((Sharing, "KeyError: 'scale'"), (Locking, "TypeError: cannot pickle"), (Checking, "ValueError: a block"))
)
def test_it_is_run_whole_and_the_report_says_why(kind: type[Deep], reason: str) -> None:
    model = kind()
    before = state_of(model)
    result = nettrim.prune(model, INPUTS, epsilon=0.2)
    said = str(result.report.options["blocks"])
    assert said.startswith("none: run in parts, it fails (") and reason in said
    assert result.report.certificate.holds and same_bits(state_of(model), before)
    assert same_bits(state_of(result.model), state_of(nettrim.prune(model, INPUTS, epsilon=0.2, blocks=None).model))
    with pytest.raises(nettrim.ArgumentError, match=r"blocks='layers': run in parts, it fails.*leave blocks out"):
        nettrim.prune(model, INPUTS, epsilon=0.2, blocks="layers")
    assert all("forward" not in vars(module) and not module._forward_hooks for module in model.modules())
