"""Masks in training: every optimiser, autocast and torch.compile keep them exactly, and what breaks them is named."""

import copy
import shutil
from collections.abc import Callable

import pytest
import torch
from networks import chain, same_bits, samples, state_of, train
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune as torch_prune

import nettrim
from nettrim import ArgumentError, MaskError

OPTIMISERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01, nesterov=True),
    "Adam": lambda model: torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=0.01, amsgrad=True),
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1),
}


def masks_of(model: nn.Module, seed: int = 3) -> dict[str, Tensor]:
    """Half of every weight."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(value.shape, generator=generator) < 0.5 for name, value in model.named_parameters() if value.dim() > 1}


def finetune(model: nn.Module, optimiser: torch.optim.Optimizer, run: Callable[[Tensor], Tensor], steps: int = 8) -> None:
    inputs, labels = samples(64, 12), torch.arange(64) % 5
    for _ in range(steps):
        optimiser.zero_grad()
        F.cross_entropy(run(inputs).float(), labels).backward()
        optimiser.step()


def has_exact_zeros(model: nn.Module, masks: dict[str, Tensor]) -> bool:
    """The zeros are +0 to the bit, and they are all that is zero."""
    state = model.state_dict()
    return all(not bool(state[name][~mask].view(torch.int32).any()) and bool(state[name][mask].all()) for name, mask in masks.items())


@pytest.mark.parametrize("name", OPTIMISERS)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("pruned", [True, False], ids=["zeros", "dense weights under masks"])
def test_an_optimiser_keeps_the_zeros(name: str, autocast: bool, pruned: bool) -> None:
    model = chain(12, 16, 5)
    masks = masks_of(model)
    if pruned:
        for parameter, mask in masks.items():
            model.get_parameter(parameter).data.masked_fill_(~mask, 0)
    before = state_of(model)
    assert nettrim.apply_masks(model, masks) is model

    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model(x)

    optimiser = OPTIMISERS[name](model)
    for _ in range(3):
        finetune(model, optimiser, run, steps=3)
        nettrim.check_masks(model, masks)
    seen = {}
    model[0].register_forward_hook(lambda module, args, out: seen.update(weight=module.weight.detach().clone()))
    run(samples(2, 12))
    assert torch.equal(seen["weight"] != 0, masks["0.weight"])
    assert nettrim.remove_masks(model) is model
    assert has_exact_zeros(model, masks)
    assert not any(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("backend", ["aot_eager"] + ["inductor"] * (shutil.which("g++") is not None))  # inductor compiles C++
def test_compiled_training_is_that_of_the_plain_network(backend: str) -> None:
    torch._dynamo.reset()
    plain = chain(12, 16, 5)
    masks = masks_of(plain)
    compiled = copy.deepcopy(nettrim.apply_masks(plain, masks))
    run = torch.compile(compiled, backend=backend)
    finetune(plain, OPTIMISERS["SGD"](plain), plain)
    finetune(compiled, OPTIMISERS["SGD"](compiled), run)
    nettrim.check_masks(run, masks)
    nettrim.remove_masks(run)
    nettrim.remove_masks(plain)
    assert has_exact_zeros(compiled, masks)
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[key], value, rtol=1e-3, atol=1e-5)
    with pytest.raises(ArgumentError, match=r"compiled.*apply them first"):
        nettrim.apply_masks(run, masks)


def test_the_state_has_torchs_names_and_loads() -> None:
    model = chain(12, 16, 5)
    masks = masks_of(model)
    reference = copy.deepcopy(model)
    for name, mask in masks.items():
        owner, leaf = name.rsplit(".", 1)
        torch_prune.custom_from_mask(reference.get_submodule(owner), leaf, mask)
    nettrim.apply_masks(model, masks)
    assert {"0.weight_orig", "0.weight_mask", "0.bias", "2.weight_orig", "2.weight_mask", "2.bias"} == set(model.state_dict())
    assert same_bits(state_of(model), state_of(reference)) and torch_prune.is_pruned(model)
    finetune(model, OPTIMISERS["Adam"](model), model)
    other = nettrim.apply_masks(chain(12, 16, 5, seed=9), masks)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(samples(3, 12)), model(samples(3, 12)))
    nettrim.remove_masks(other)
    assert list(dict(other.named_parameters())) and set(other.state_dict()) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert not torch_prune.is_pruned(other)


def test_prune_finetune_prune_again(digits: tuple[Tensor, Tensor]) -> None:
    images, labels = digits
    model = train(chain(64, 32, 10), images[:600], labels[:600], steps=80)
    first = nettrim.prune(model, images[:200], sparsity=0.9)
    dense = copy.deepcopy(first.model)
    tuned = nettrim.apply_masks(first.model, first.masks)

    def loss() -> float:
        return F.cross_entropy(tuned(images[:600]), labels[:600]).item()

    before = loss()
    optimiser = torch.optim.Adam(tuned.parameters(), lr=2e-3)
    for _ in range(20):
        optimiser.zero_grad()
        F.cross_entropy(tuned(images[:600]), labels[:600]).backward()
        optimiser.step()
    assert loss() < before
    with pytest.raises(ArgumentError, match="make it permanent first"):
        nettrim.prune(tuned, images[:200], sparsity=0.95)
    nettrim.remove_masks(tuned)
    nettrim.check_masks(tuned, first.masks)
    again = nettrim.prune(tuned, images[:200], sparsity=0.95, preserve_zeros=True)
    nettrim.check_masks(again.model, first.masks)
    kept = sum(int(mask.sum()) for mask in again.masks.values())
    assert abs(kept - 0.05 * sum(mask.numel() for mask in first.masks.values())) <= len(first.masks)
    assert not torch.equal(dense[0].weight, tuned[0].weight)


def test_a_merged_adapter_is_caught_with_its_parameter_and_count() -> None:
    model = chain(12, 16, 5)
    masks = masks_of(model)
    nettrim.remove_masks(nettrim.apply_masks(model, masks))
    nettrim.check_masks(model, masks)
    nettrim.check_masks(nettrim.to_sparse(model, layers=["0", "2"]), masks)
    with torch.no_grad():  # what peft's merge_and_unload does: W += B A
        model[0].weight += torch.randn(16, 2) @ torch.randn(2, 12)
    lost = int((~masks["0.weight"]).sum())
    with pytest.raises(MaskError, match=rf"0\.weight: {lost} of {lost} zeros lost") as caught:
        nettrim.check_masks(model, masks)
    assert "2.weight" not in str(caught.value)
    with pytest.raises(MaskError, match=rf"0\.weight: {lost} of"):
        nettrim.check_masks(nettrim.to_sparse(model, layers=["0"]), masks)
    with torch.no_grad():
        model[2].weight[~masks["2.weight"]] = torch.nan
    with pytest.raises(MaskError, match=r"2\.weight: "):
        nettrim.check_masks(model, masks)


def test_a_value_that_is_not_finite_leaves_exact_zeros() -> None:
    model = chain(4, 3)
    masks = {"0.weight": torch.tensor([[True, False, True, False]] * 3)}
    nettrim.apply_masks(model, masks)
    with torch.no_grad():
        model[0].weight_orig[0, 1], model[0].weight_orig[1, 1] = torch.inf, -1.0
    nettrim.remove_masks(model)
    assert has_exact_zeros(model, masks)


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    return model


REFUSED: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], object], str]] = {
    "unknown": (lambda: chain(4, 3), lambda model: {"1.weight": torch.ones(3, 4, dtype=torch.bool)}, "no parameter of the model.*0.weight"),
    "no tensor": (lambda: chain(4, 3), lambda model: {"0.in_features": torch.ones(3, 4, dtype=torch.bool)}, "no parameter of the model"),
    "shape": (lambda: chain(4, 3), lambda model: {"0.weight": torch.ones(4, 3, dtype=torch.bool)}, r"bool \(4, 3\); expected torch.bool \(3, 4\)"),
    "dtype": (lambda: chain(4, 3), lambda model: {"0.weight": torch.ones(3, 4)}, "float32"),
    "not a mask": (lambda: chain(4, 3), lambda model: {"0.weight": None}, "is NoneType; expected torch.bool"),
    "empty": (lambda: chain(4, 3), lambda model: {}, "masks is empty"),
    "no mapping": (lambda: chain(4, 3), lambda model: [1], "masks is a list"),
    "masked": (lambda: nettrim.apply_masks(chain(4, 3), masks_of(chain(4, 3))), lambda model: masks_of(chain(4, 3)), "remove_masks"),
    "shared": (tied, lambda model: {"0.weight": torch.eye(4, dtype=torch.bool)}, r"shared \(0.weight, 1.weight\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_and_changes_nothing(name: str) -> None:
    make, masks, message = REFUSED[name]
    model = make()
    before = state_of(model)
    with pytest.raises(ArgumentError, match=message):
        nettrim.apply_masks(model, masks(model))  # type: ignore[arg-type]
    assert same_bits(state_of(model), before)


def test_a_later_error_leaves_the_first_parameter_alone() -> None:
    model = chain(4, 4, 3)
    masks = masks_of(model)
    masks["2.weight"] = masks["2.weight"][:1]
    with pytest.raises(ArgumentError, match="2.weight"):
        nettrim.apply_masks(model, masks)
    assert not torch_prune.is_pruned(model)


def test_the_other_two_refuse_what_is_no_model_or_has_no_masks() -> None:
    with pytest.raises(ArgumentError, match="no masks to remove"):
        nettrim.remove_masks(chain(4, 3))
    with pytest.raises(ArgumentError, match="model is a int"):
        nettrim.check_masks(3, {"0.weight": torch.ones(1)})  # type: ignore[arg-type]
