"""``nettrim.verify`` of layers that are more than ``nn.Linear``: proven through their own forward, or said to be not proven, and forgeries found."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nettrim
from nettrim import Verification
from nettrim.pipeline import PruneResult


def samples(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.last = nn.GRU(5, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.rnn(x)[0][:, -1])
        return out


def normalised(*modules: nn.Module) -> nn.Sequential:
    """With BatchNorms whose scales and shifts are not 1 and 0."""
    model = nn.Sequential(*modules)
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_mean is not None and norm.running_var is not None:
            with torch.no_grad():
                norm.weight.uniform_(0.5, 2.0)
                norm.bias.normal_()
                norm.running_mean.normal_()
                norm.running_var.uniform_(0.5, 2.0)
    return model


def images() -> nn.Sequential:
    return normalised(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU6(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(32, 5),
    )  # fmt: skip


NETWORKS: dict[str, tuple[Any, Tensor]] = {
    "convolutions": (lambda: nn.Sequential(nn.Conv1d(2, 6, 3), nn.ReLU(), nn.Conv1d(6, 4, 2), nn.Flatten(), nn.Linear(20, 3)), samples(40, 2, 8)),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose1d(2, 4, 2, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)), samples(40, 2, 4)),
    "activations": (lambda: nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 9), nn.Sigmoid(), nn.Linear(9, 4)), samples(120, 6)),
    "images": (images, samples(40, 3, 6, 6)),
    "normalised": (lambda: normalised(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Linear(9, 4)), samples(120, 6)),
    "an encoder": (lambda: nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), samples(40, 5, 8)),
    "recurrent": (Recurrent, samples(40, 7, 5)),
}
GOALS: list[dict[str, Any]] = [
    {"epsilon": 0.2, "penalty": "l1"},
    {"epsilon": 0.2, "penalty": "l1", "mode": "parallel"},
    {"epsilon": 0.2, "max_rows": 100},
    {"sparsity": 0.5},
    {"sparsity": 0.5, "mode": "parallel", "fidelity": "layer"},
    {"sparsity": 0.5, "fidelity": "diagonal"},
]


def pruned(name: str, **options: Any) -> tuple[nn.Module, PruneResult]:
    make, inputs = NETWORKS[name]
    torch.manual_seed(1)
    model: nn.Module = make().eval()
    return model, nettrim.prune(model, inputs, **options)


def verified(name: str, model: nn.Module, result: PruneResult) -> Verification:
    return nettrim.verify(model, result.model, NETWORKS[name][1], result.report, masks=result.masks)


@pytest.mark.parametrize("options", GOALS, ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_not_proven_is_named_and_all_else_holds(name: str, options: dict[str, Any]) -> None:
    model, result = pruned(name, on_failure="keep_dense", **options)
    found = verified(name, model, result)
    assert found.holds, str(found)
    expected = {"an encoder": "MultiheadAttention", "recurrent": "GRU"}.get(name)
    if expected is None:
        # an ℓ1 program with groups, or with a ReLU between other ends, has a bound that the verifier has no way to
        allowed = {"layer 0", "layer 3"} if name == "images" and options.get("penalty") == "l1" else set()
        assert {check.subject for check in found.unproven} == allowed
        assert all(check.what == "lower_bound" and "not proven here" in check.note for check in found.unproven)
    else:
        assert found.unproven
        assert all(expected in check.note and "not checked here" in check.note for check in found.unproven)
        inner = {f"layer {layer.name}" for layer in result.report.layers if "rnn" in layer.name or "attn" in layer.name}
        assert {check.subject for check in found.unproven} == inner


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize(
    "options",
    (
        {"sparsity": 0.02, "mode": "parallel", "max_rows": 15},
        {"sparsity": 0.0, "repair": 0.5, "max_rows": 15},
        {"sparsity": 0.9, "pattern": "block:2x2"},
    ),
    ids=str,
)
def test_rounding_of_a_sample_far_larger_than_the_others_breaks_nothing(options: dict[str, Any], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = normalised(
        nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4), nn.ReLU6(), nn.Flatten(),
        nn.Linear(128, 8),
    ).to(dtype)  # fmt: skip
    x = samples(40, 4, 6, 6).to(dtype)
    x[0] *= 100
    result = nettrim.prune(model.eval(), x, **options)
    broken = [check for check in nettrim.verify(model, result.model, x, result.report).checks if check.outcome == "broken"]
    assert not broken


@pytest.mark.parametrize("mode", ("cascade", "parallel"))
@pytest.mark.parametrize("function", (nn.GELU(), nn.ReLU()), ids=("GELU", "ReLU"))
def test_rounding_of_what_an_activation_puts_out_next_to_nothing_of_breaks_nothing(function: nn.Module, mode: str) -> None:
    """Neurons far below 0: what their pre-activations are off by, half-precision numbers, is no small part of the misfit, and of the objective."""
    for seed in range(5):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(16, 32), function, nn.Linear(32, 16), function, nn.Linear(16, 4))
        with torch.no_grad():
            model[0].bias[:8] -= 20
            model[2].bias[:4] -= 20
        model, x = model.to(torch.bfloat16), torch.rand(200, 16).to(torch.bfloat16).split(100)
        result = nettrim.prune(model, list(x), sparsity={"*": 0.3}, mode=mode)
        assert not nettrim.verify(model, result.model, list(x), result.report).broken
        with torch.no_grad():
            result.model[4].weight.mul_(0.9)
        assert not nettrim.verify(model, result.model, list(x), result.report).holds


def test_weights_that_were_moved_are_found_beside_a_sample_far_larger_than_the_others() -> None:
    """What rounding moves is no more than all rounding: half-precision weights shrunk by a few per cent break their promise."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 16)).to(torch.bfloat16).eval()
    x = samples(200, 32).to(torch.bfloat16)
    x[0] *= 1000
    result = nettrim.prune(model, x, epsilon=0.02)
    with torch.no_grad():
        result.model[0].weight.mul_(0.96)
    broken = {check.what for check in nettrim.verify(model, result.model, x, result.report).broken}
    assert {"promise kept", "discrepancy", "relative_discrepancy"} <= broken


@pytest.mark.parametrize("name", ("convolutions", "transposed", "images", "activations", "normalised"))
@pytest.mark.parametrize("options", (GOALS[0], GOALS[3]), ids=str)
@pytest.mark.parametrize("place", (0, -1))
def test_weights_that_were_moved_are_found(name: str, options: dict[str, Any], place: int) -> None:
    model, result = pruned(name, **options)
    weight = nettrim.layers.matrix(result.model, result.report.layers[place].name).weight
    with torch.no_grad():
        weight.mul_(1.03)
    found = verified(name, model, result)
    assert "discrepancy" in {check.what for check in found.broken if check.subject == f"layer {result.report.layers[place].name}"}


@pytest.mark.parametrize("field", ("discrepancy", "epsilon", "objective", "rows", "nonzeros", "accumulated", "holdout", "weight_bytes"))
@pytest.mark.parametrize("place", (0, 1))
def test_figures_of_convolutions_that_were_changed_are_found(field: str, place: int) -> None:
    model, result = pruned("images", epsilon=0.2, penalty="l1", mode="parallel")
    layer = result.report.layers[place]
    value = getattr(layer, field)
    forged = dataclasses.replace(layer, **{field: value - 1 if isinstance(value, int) else 0.98 * value})
    layers = tuple(forged if one is layer else one for one in result.report.layers)
    found = nettrim.verify(model, result.model, NETWORKS["images"][1], dataclasses.replace(result.report, layers=layers))
    assert field in {check.what for check in found.broken if check.subject == f"layer {layer.name}"}


def test_rows_of_a_packed_weight_that_were_not_pruned_must_be_the_same() -> None:
    model, result = pruned("an encoder", sparsity=0.5, targets="self_attn.in_proj_q")
    assert verified("an encoder", model, result).holds
    forged = copy.deepcopy(result.model)
    with torch.no_grad():
        forged.self_attn.in_proj_weight[8, 0] += 1e-6  # type: ignore[union-attr,index,operator]  # of the keys
    found = nettrim.verify(model, forged, NETWORKS["an encoder"][1], result.report)
    assert [check.found for check in found.broken if check.what == "other tensors"] == ["self_attn.in_proj_weight"]


def test_a_layer_that_is_not_checked_is_never_said_to_hold_and_its_own_figures_can_break_it() -> None:
    model, result = pruned("recurrent", epsilon=0.2)
    layer = result.report.layers[0]
    assert layer.name == "rnn.weight_ih_l0"
    kept = [check.outcome for check in verified("recurrent", model, result).checks if check.what == "promise kept" and layer.name in check.subject]
    assert kept == ["not proven"]
    report = dataclasses.replace(result.report, layers=(dataclasses.replace(layer, discrepancy=2 * layer.epsilon), *result.report.layers[1:]))
    found = nettrim.verify(model, result.model, NETWORKS["recurrent"][1], report)
    assert "promise kept" in {check.what for check in found.broken if layer.name in check.subject}


def test_statistics_that_were_estimated_again() -> None:
    model, result = pruned("images", sparsity=0.5, recalibrate_batchnorm=True)
    found = verified("images", model, result)
    assert found.holds and found.complete, str(found)
    forged = copy.deepcopy(result.model)
    with torch.no_grad():
        forged[1].running_var *= 1.1  # type: ignore[index,operator]
    broken = nettrim.verify(model, forged, NETWORKS["images"][1], result.report).broken
    assert {"BatchNorm statistics", "measured"} <= {check.what for check in broken}
    # and without having been asked for, they are tensors that must be the same
    plain = dataclasses.replace(result.report, options={**result.report.options, "recalibrate_batchnorm": False})
    assert "other tensors" in {check.what for check in nettrim.verify(model, result.model, NETWORKS["images"][1], plain).broken}


def test_a_kind_whose_rows_are_wrong_proves_no_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    model, result = pruned("convolutions", epsilon=0.2, penalty="l1", mode="parallel")
    kind = nettrim.layers.find_kind(model[0])  # type: ignore[index,arg-type]
    assert kind is not None
    unfold = type(kind).unfold
    monkeypatch.setattr(type(kind), "unfold", lambda self, module, part, kept: 1.01 * unfold(self, module, part, kept))
    found = verified("convolutions", model, result)
    notes = [check.note for check in found.unproven if check.what == "lower_bound"]
    assert len(notes) == 2 and all("not what the module computes" in note for note in notes)
