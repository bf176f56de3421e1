"""Networks for the tests, and what nettrim promises about them computed again: own forward pass in float64, own formulas."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nettrim import PruneResult, calibration


def chain(*widths: int, seed: int = 0, bias: bool = True, last_relu: bool = False, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Linear layers with a ReLU between two of them."""
    torch.manual_seed(seed)
    modules: list[nn.Module] = []
    for inputs, outputs in zip(widths, widths[1:], strict=False):
        modules += [nn.Linear(inputs, outputs, bias=bias), nn.ReLU()]
    return nn.Sequential(*(modules if last_relu else modules[:-1])).to(dtype)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def samples(count: int, width: int, seed: int = 1) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def train(model: nn.Module, inputs: Tensor, labels: Tensor, steps: int = 60) -> nn.Module:
    """Full-batch Adam: enough to make weights that mean something."""
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimiser.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimiser.step()
    optimiser.zero_grad()
    return model.eval()


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def bits(tensor: Tensor) -> Tensor:
    """The tensor's bytes: equal only for the same bits, NaN included."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(bits(a[name]), bits(b[name])) for name in a)


def hooks_of(model: nn.Module) -> int:
    """How many hooks there are on any module, of any sort."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def solved_on(inputs: Tensor, holdout: float = 0.1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The samples solved on and those kept out, for one tensor of samples."""
    kept_out = torch.zeros(len(inputs), dtype=torch.bool)
    kept_out[calibration.holdout_indices([inputs], holdout, seed)] = True
    return inputs[~kept_out], inputs[kept_out]


@dataclass(frozen=True)
class Stage:
    """One linear layer of a chain, everything in float64."""

    name: str
    relu: bool
    weight: Tensor
    bias: Tensor
    pruned_weight: Tensor
    pruned_bias: Tensor
    dense_inputs: Tensor
    pruned_inputs: Tensor

    def output(self, inputs: Tensor, *, pruned: bool) -> Tensor:
        Z = inputs @ self.pruned_weight.T + self.pruned_bias if pruned else inputs @ self.weight.T + self.bias
        return Z.clamp(min=0) if self.relu else Z

    @property
    def targets(self) -> Tensor:
        return self.output(self.dense_inputs, pruned=False)

    def discrepancy(self, mode: str) -> float:
        """``‖relu(output) − Y‖_F`` of the pruned layer on what its program saw."""
        seen = self.pruned_inputs if mode == "cascade" else self.dense_inputs
        return float((self.output(seen, pruned=True) - self.targets).norm())

    def dense_misfits(self) -> tuple[float, float]:
        """``Σ_Ω (v − y)²`` and ``Σ_{Ωᶜ} max(v, 0)²`` of the dense weights on the pruned inputs (everything is Ω without a ReLU)."""
        V, Y = self.pruned_inputs @ self.weight.T + self.bias, self.targets
        support = Y > 0 if self.relu else torch.ones_like(Y, dtype=torch.bool)
        on = float((V - Y).square()[support].sum())
        return on, float(V.clamp(min=0).square()[~support].sum())

    def spectral_norm(self, *, pruned: bool) -> float:
        return float(torch.linalg.svdvals(self.pruned_weight if pruned else self.weight)[0])


def stages(model: nn.Sequential, pruned: nn.Sequential, inputs: Tensor) -> list[Stage]:
    """Run a chain and its pruned form side by side in float64."""
    dense_stream = pruned_stream = inputs.double()
    found = []
    children = list(model.named_children())
    for index, (name, module) in enumerate(children):
        if not isinstance(module, nn.Linear):
            continue
        other = pruned.get_submodule(name)
        zero = torch.zeros(module.out_features, dtype=torch.float64)
        stage = Stage(
            name,
            any(isinstance(after, nn.ReLU) for _, after in children[index + 1 : index + 2]),
            module.weight.detach().double(),
            zero if module.bias is None else module.bias.detach().double(),
            other.weight.detach().double(),
            zero if other.bias is None else other.bias.detach().double(),
            dense_stream,
            pruned_stream,
        )
        dense_stream, pruned_stream = stage.output(dense_stream, pruned=False), stage.output(pruned_stream, pruned=True)
        found.append(stage)
    return found


def bound_by_hand(found: list[Stage], promised: dict[str, float], mode: str, gamma: float = 1.1) -> float:
    """The bound of the 2017 paper's Theorems 1 and 2 without normalised weights, for one budget for all layers."""
    bound = 0.0
    # a layer whose inputs no pruning has disturbed is as good as a first one
    for index, stage in enumerate(found):
        if mode == "parallel":
            bound = stage.spectral_norm(pruned=True) * bound + promised[stage.name]
        elif index == 0 or torch.equal(stage.dense_inputs, stage.pruned_inputs):
            bound = promised[stage.name]
        else:
            bound = math.sqrt(gamma) * stage.spectral_norm(pruned=False) * bound
    return bound


def end_to_end(model: nn.Module, pruned: nn.Module, inputs: Tensor) -> tuple[float, float]:
    """The output discrepancy in float64, absolute and relative."""
    dense, other = copy.deepcopy(model).double().eval(), copy.deepcopy(pruned).double().eval()
    with torch.no_grad():
        expected = dense(inputs.double())
        difference = float((other(inputs.double()) - expected).norm())
    norm = float(expected.norm())
    return difference, difference / norm if norm else (math.inf if difference else 0.0)


def promises(result: PruneResult) -> dict[str, float]:
    return {layer.name: layer.epsilon for layer in result.report.layers}


def by_name(result: PruneResult) -> dict[str, Any]:
    return {layer.name: layer for layer in result.report.layers}
