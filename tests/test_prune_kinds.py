"""Pruning networks of every layer type: promises measured again by running the stored modules themselves."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from networks import by_name, solved_on
from torch import Tensor, nn
from torch.nn import functional as F

from nettrim import PruneResult, layers, prune

transformers = pytest.importorskip("transformers.pytorch_utils")


def trained_norms(model: nn.Module, seed: int = 0) -> nn.Module:
    """BatchNorms as training leaves them: statistics of their own, scales of either sign, and one output scaled by 0."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            count = module.num_features
            module.running_mean.copy_(torch.randn(count, generator=generator))
            module.running_var.copy_(0.5 + torch.rand(count, generator=generator))
            if module.affine:
                module.weight.data.copy_(torch.randn(count, generator=generator))
                module.weight.data[1] = 0.0
                module.bias.data.copy_(0.5 * torch.randn(count, generator=generator))
    return model.eval()


class Residual(nn.Module):
    """The block that ResNets are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm2(self.second(F.relu(self.norm1(self.first(x))))) + x)


Way = Callable[[Tensor], Tensor]


def way(*modules: Any) -> Way:
    return lambda x: nn.Sequential(*(copy.deepcopy(m).double() if isinstance(m, nn.Module) else m for m in modules))(x)


@dataclass
class Case:
    """A network, the shape of its inputs, and by layer the activation reported and what makes its output of its module's."""

    model: Callable[[], nn.Module]
    shape: tuple[int, ...]
    layers: dict[str, tuple[str | None, Callable[[Any], Way]]]
    chain: bool = False
    options: dict[str, Any] = field(default_factory=dict)


def plain(model: Any) -> Way:
    return lambda x: x


def relu(model: Any) -> Way:
    return F.relu


def norm_relu(name: str) -> Callable[[Any], Way]:
    return lambda model: way(model.get_submodule(name), nn.ReLU())


def norm_only(name: str) -> Callable[[Any], Way]:
    return lambda model: way(model.get_submodule(name))


IMAGE = (40, 2, 7, 6)
CASES = {
    "convolutions": Case(
        lambda: nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(24, 5)),
        IMAGE,
        {"0": ("relu", relu), "2": ("relu", relu), "5": (None, plain)},
        chain=True,
    ),
    "pooling before the ReLU, between, and at the end": Case(
        lambda: nn.Sequential(
            nn.Conv2d(2, 6, 3), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(6, 4, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
        ),
        IMAGE,
        {"0": ("relu", relu), "3": ("relu", relu), "7": (None, plain)},
    ),
    "averages before the ReLU are something else": Case(
        lambda: nn.Sequential(nn.Conv2d(2, 6, 3), nn.AvgPool2d(2), nn.ReLU(), nn.Conv2d(6, 4, 2)), IMAGE, {"0": (None, plain), "3": (None, plain)}
    ),
    "BatchNorm": Case(
        lambda: nn.Sequential(
            nn.Conv2d(2, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(24, 5),
            nn.BatchNorm1d(5, affine=False), nn.ReLU(inplace=True), nn.Linear(5, 3),
        ),
        IMAGE,
        {"0": ("relu", norm_relu("1")), "3": (None, norm_only("4")), "6": ("relu", norm_relu("7")), "9": (None, plain)},
        chain=True,
    ),
    "grouped, depthwise and dilated": Case(
        lambda: nn.Sequential(
            nn.Conv2d(2, 6, 3, groups=2, padding="same", padding_mode="reflect"), nn.BatchNorm2d(6), nn.ReLU(),
            nn.Conv2d(6, 6, 3, groups=6, dilation=2, bias=False), nn.BatchNorm2d(6), nn.ReLU6(), nn.Conv2d(6, 4, 1), nn.Hardswish(),
        ),
        IMAGE,
        {"0": ("relu", norm_relu("1")), "3": ("relu6", lambda model: way(model[4], nn.ReLU6())), "6": ("hardswish", lambda model: F.hardswish)},
        chain=True,
    ),
    "a residual block": Case(
        lambda: nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU(), Residual(), nn.Conv2d(4, 3, 2)),
        IMAGE,
        {"0": ("relu", relu), "2.first": ("relu", norm_relu("2.norm1")), "2.second": (None, norm_only("2.norm2")), "3": (None, plain)},
    ),
    "one dimension, without a batch of three": Case(
        lambda: nn.Sequential(
            nn.Conv1d(2, 5, 3, padding=1, padding_mode="circular"), nn.BatchNorm1d(5), nn.LeakyReLU(0.2), nn.ConvTranspose1d(5, 4, 4, 2, padding=1)
        ),
        (30, 2, 9),
        {"0": ("leaky_relu", lambda model: way(model[1], nn.LeakyReLU(0.2))), "3": (None, plain)},
        chain=True,
    ),
    "three dimensions and transposed": Case(
        lambda: nn.Sequential(
            nn.Conv3d(1, 4, 2), nn.MaxPool3d(2, 1), nn.SiLU(), nn.ConvTranspose3d(4, 2, 2, stride=2, groups=2), nn.Tanh(), nn.Conv3d(2, 2, 1)
        ),
        (20, 1, 4, 4, 4),
        {"0": (None, plain), "3": ("tanh", lambda model: torch.tanh), "5": (None, plain)},
    ),
    "a transposed linear layer": Case(
        lambda: nn.Sequential(transformers.Conv1D(8, 6), nn.GELU(approximate="tanh"), transformers.Conv1D(4, 8)),
        (30, 3, 6),
        {"0": ("gelu", lambda model: lambda x: F.gelu(x, approximate="tanh")), "2": (None, plain)},
        chain=True,
    ),
}


def given(model: nn.Module, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """What a module is given and puts out, by a hook of the test's own."""
    seen: list[tuple[Tensor, Tensor]] = []
    handle = model.get_submodule(name).register_forward_hook(lambda module, args, out: seen.append((args[0].clone(), out.clone())))
    with torch.no_grad():
        model.eval()(x)
    handle.remove()
    return seen[0][0].double(), seen[0][1].double()


def network(case: Case) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(1)
    return trained_norms(case.model()), torch.randn(case.shape, generator=torch.Generator().manual_seed(2))


def check(case: Case, model: nn.Module, result: PruneResult, x: Tensor, mode: str) -> None:
    """Every promise, from the stored modules run as they are, in float64."""
    certificate = result.report.certificate
    assert certificate.holds, certificate.explanation
    assert (certificate.guaranteed is not None) == case.chain, certificate.explanation
    assert {layer.name: layer.activation for layer in result.report.layers} == {name: kind for name, (kind, _) in case.layers.items()}
    for layer in result.report.layers:
        behind = case.layers[layer.name][1](model)
        dense_in, dense_out = given(model, layer.name, x)
        pruned_in, _ = given(result.model, layer.name, x)
        stored = copy.deepcopy(result.model.get_submodule(layer.name)).double()
        with torch.no_grad():
            difference = behind(stored(pruned_in if mode == "cascade" else dense_in)) - behind(dense_out)
        assert layer.discrepancy == pytest.approx(float(difference.norm()), rel=2e-3, abs=1e-4), layer.name
        assert layer.discrepancy <= layer.epsilon
        mask = result.masks[f"{layer.name}.weight"]
        assert torch.equal(mask, stored.weight.detach() != 0) and layer.nonzeros == int(mask.sum())
        assert math.prod(layer.shape) == stored.weight.numel()
        if "epsilon" in result.report.options and result.report.options["epsilon"] and mode == "parallel":
            assert layer.epsilon == pytest.approx(0.2 * float(behind(dense_out).detach().norm()), rel=1e-4)


@pytest.mark.parametrize("mode", ("cascade", "parallel"))
@pytest.mark.parametrize("name", CASES)
def test_budgets_are_kept_by_the_stored_modules(name: str, mode: str) -> None:
    case = CASES[name]
    model, x = network(case)
    result = prune(model, x, epsilon=0.2, mode=mode, penalty="l1")
    check(case, model, result, solved_on(x)[0], mode)
    assert result.report.density < 1 and all(layer.gap <= 1.001e-3 for layer in result.report.layers)


@pytest.mark.parametrize("allocation", ("auto", "uniform"))
@pytest.mark.parametrize("name", CASES)
def test_one_sparsity_is_exact_and_promises_what_it_leaves(name: str, allocation: str) -> None:
    case = CASES[name]
    model, x = network(case)
    result = prune(model, x, sparsity=0.5, allocation=allocation)
    check(case, model, result, solved_on(x)[0], "cascade")
    total = sum(math.prod(layer.shape) for layer in result.report.layers)
    kept = sum(layer.nonzeros for layer in result.report.layers)
    if not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):  # whose 0 scales make zeros besides
        assert abs(kept - total / 2) <= (1 if allocation == "auto" else len(result.report.layers))
    assert kept <= total / 2 + len(result.report.layers)


@pytest.mark.parametrize("name", ("BatchNorm", "grouped, depthwise and dilated"))
@pytest.mark.parametrize("options", ({"consistency": "paper"}, {}, {"reweight": 1}), ids=str)
def test_the_other_ways_to_keep_a_budget(name: str, options: dict[str, Any]) -> None:
    case = CASES[name]
    model, x = network(case)
    for mode in ("cascade", "parallel"):
        check(case, model, prune(model, x, epsilon=0.2, mode=mode, **options), solved_on(x)[0], mode)


def test_a_pattern_holds_in_the_view_of_the_kernels() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2, bias=False), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2))
    result = prune(model, torch.randn(30, 4, 6, 6), pattern="1:2", holdout=0)
    for place in (0, 2):
        kept = layers.as_matrix(result.model[place])[:, : result.report.layers[place // 2].shape[1]] != 0
        assert bool((kept.view(kept.shape[0], -1, 2).sum(2) == 1).all())


def test_inputs_that_are_not_copied_are_not_changed_in_place() -> None:
    case = CASES["BatchNorm"]
    model, x = network(case)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = prune(model, x, epsilon=0.2, inplace=True)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed <= {f"{layer.name}.{key}" for layer in result.report.layers for key in ("weight", "bias")}
    assert result.model is model and by_name(result)["0"].density == int(result.masks["0.weight"].sum()) / result.masks["0.weight"].numel()


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_narrow_convolutions_are_certified_as_they_are_stored(dtype: torch.dtype) -> None:
    case = CASES["convolutions"]
    model, x = network(case)
    model = model.to(dtype)
    for options in ({"epsilon": 0.2}, {"sparsity": 0.5}):
        result = prune(model, x, **options)
        assert result.report.certificate.holds
        for layer in result.report.layers:
            stored = result.model.get_submodule(layer.name)
            assert stored.weight.dtype == dtype and layer.density < 1
            _, dense_out = given(model, layer.name, solved_on(x)[0].to(dtype))
            pruned_in, _ = given(result.model, layer.name, solved_on(x)[0].to(dtype))
            behind = case.layers[layer.name][1](model)
            out = copy.deepcopy(stored)(pruned_in.to(dtype)).detach().double()
            assert float((behind(out) - behind(dense_out)).norm()) <= layer.epsilon * (1 + 4 * torch.finfo(dtype).eps)
