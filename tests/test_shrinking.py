"""`nettrim.shrink`: which neurons go, that the function stays, and what is left alone."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import chain, hooks_of, same_bits, samples, state_of, train
from torch import Tensor, nn
from torch.nn import functional as F

import nettrim
from nettrim import shrinking

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


class Net(nn.Module):
    """Layers a, b, c of width 6, of which a has three neurons that do nothing for b, and b one for c; and a forward given as a function."""

    def __init__(self, forward: Callable[["Net", Any], Any], **modules: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        with torch.no_grad():
            self.a.weight[1:3] = 0
            self.a.bias[1:3] = torch.tensor([1.0, -1.0])
            self.b.weight[:, 4] = 0
            self.c.weight[:, 5] = 0
        for name, module in modules.items():
            setattr(self, name, module)
        self.function = forward

    def forward(self, x: Any) -> Any:
        return self.function(self, x)


def layer(weight: list[list[float]], bias: list[float] | None) -> nn.Linear:
    module = nn.Linear(len(weight[0]), len(weight), bias=bias is not None)
    with torch.no_grad():
        module.weight.copy_(torch.tensor(weight))
        if bias is not None:
            module.bias.copy_(torch.tensor(bias))
    return module


def sizes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """By linear layer, (outputs, inputs), which module and parameters agree on."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            found[name] = (module.out_features, module.in_features)
            assert tuple(module.weight.shape) == found[name]
            assert module.bias is None or tuple(module.bias.shape) == (module.out_features,)
    return found


def outputs(model: nn.Module, x: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(x)


def assert_same(model: nn.Module, smaller: nn.Module, x: Any, tolerance: float = 1e-5) -> None:
    expected = outputs(model, x).double()
    assert float((outputs(smaller, x).double() - expected).norm()) <= tolerance * float(expected.norm())


# ------------------------------------------------------------------------------------------------ what is removed


FIRST = layer([[1, 2], [0, 0], [0, 0], [3, 4]], [5, 2, -1, 6])
LAST = [[1.0, 10, 100, 0], [2, 20, 200, 0]]


@pytest.mark.parametrize(
    ("activation", "expected"),
    ((nn.ReLU(), [7 + 2 * 10, 8 + 2 * 20]), (nn.Identity(), [7 + 2 * 10 - 100, 8 + 2 * 20 - 200])),
)
def test_constant_and_unread_neurons_go_and_constants_move_into_the_bias(activation: nn.Module, expected: list[float]) -> None:
    model = nn.Sequential(copy.deepcopy(FIRST), activation, layer(LAST, [7, 8]))
    smaller = nettrim.shrink(model, samples(5, 2))
    assert sizes(smaller) == {"0": (1, 2), "2": (2, 1)}
    assert smaller[0].weight.tolist() == [[1, 2]] and smaller[0].bias.tolist() == [5]
    assert smaller[2].weight.tolist() == [[1], [2]] and smaller[2].bias.tolist() == expected


def test_a_bias_is_made_only_for_a_constant() -> None:
    model = nn.Sequential(copy.deepcopy(FIRST), nn.ReLU(), layer(LAST, None))
    smaller = nettrim.shrink(model, samples(5, 2))
    assert smaller[2].bias.tolist() == [20, 40] and smaller[2].bias.requires_grad
    for bias in (None, [5.0, 0, -1, 6]):  # no bias, and one that the ReLU makes nothing of
        smaller = nettrim.shrink(nn.Sequential(layer(FIRST.weight.tolist(), bias), nn.ReLU(), layer(LAST, None)), samples(5, 2))
        assert sizes(smaller) == {"0": (1, 2), "2": (2, 1)} and smaller[2].bias is None
        assert (smaller[0].bias is None) == (bias is None)


def test_one_removal_leads_to_the_next_in_both_directions() -> None:
    model = chain(3, 3, 3, 3, 2)
    with torch.no_grad():
        model[0].weight[0] = 0  # constant, and with it the neuron that reads nothing else
        model[2].weight[0] = torch.tensor([1.0, 0, 0])
        model[6].weight[:, 2] = 0  # unread, and with it the neuron that nobody else reads
        model[4].weight[:2, 2] = 0
    smaller = nettrim.shrink(model, samples(9, 3))
    assert sizes(smaller) == {"0": (2, 3), "2": (1, 2), "4": (2, 1), "6": (2, 2)}
    assert_same(model, smaller, samples(50, 3, seed=4))


@pytest.mark.parametrize("index", (0, 2, 4, 6))
def test_a_layer_keeps_one_neuron_and_outputs_are_never_removed(index: int) -> None:
    model = chain(3, 4, 5, 4, 2)
    with torch.no_grad():
        model[index].weight.zero_()
    smaller = nettrim.shrink(model, samples(9, 3))
    assert sizes(smaller) == {"0": (1, 3), "2": (1, 1), "4": (1, 1), "6": (2, 1)}
    assert_same(model, smaller, samples(9, 3, seed=4))
    assert same_bits(state_of(smaller), state_of(nettrim.shrink(smaller, samples(9, 3))))


def smallest(model: nn.Sequential) -> list[int]:
    """Widths by the definition, one neuron after the other until none can go, in float64: the oracle."""
    linear = [module for module in model if isinstance(module, nn.Linear)]
    W = [module.weight.detach().double() for module in linear]
    b = [torch.zeros(module.out_features).double() if module.bias is None else module.bias.detach().double() for module in linear]
    relu = [isinstance(after, nn.ReLU) for module, after in zip(model, list(model)[1:], strict=False) if isinstance(module, nn.Linear)]
    todo = True
    while todo:
        todo = False
        for i in range(len(linear) - 1):
            for j in range(len(W[i])):
                if W[i][j].any() and W[i + 1][:, j].any():
                    continue
                if not W[i][j].any():
                    b[i + 1] = b[i + 1] + W[i + 1][:, j] * (b[i][j].clamp(min=0) if relu[i] else b[i][j])
                last = len(W[i]) == 1
                todo = todo or not last or bool(W[i][j].any() or W[i + 1][:, j].any())
                if last:
                    W[i], b[i], W[i + 1] = W[i] * 0, b[i] * 0, W[i + 1] * 0
                else:
                    rest = [k for k in range(len(W[i])) if k != j]
                    W[i], b[i], W[i + 1] = W[i][rest], b[i][rest], W[i + 1][:, rest]
                break
    return [len(weight) for weight in W]


@st.composite
def networks(draw: st.DrawFn) -> nn.Sequential:
    """Chains of integer weights, many of them zero, so that every sum is exact."""
    widths = draw(st.lists(st.integers(1, 6), min_size=2, max_size=6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    density = draw(st.sampled_from((0.1, 0.3, 0.6, 1.0)))
    modules: list[nn.Module] = []
    for inputs, units in zip(widths, widths[1:], strict=False):
        module = nn.Linear(inputs, units, bias=draw(st.booleans()))
        with torch.no_grad():
            for parameter in module.parameters():
                kept = torch.rand(parameter.shape, generator=generator) < density
                parameter.copy_(torch.randint(-2, 3, parameter.shape, generator=generator) * kept)
        modules += [module, draw(st.sampled_from((nn.ReLU(), nn.ReLU(inplace=True), nn.Identity(), nn.Dropout())))]
    return nn.Sequential(*modules).double()


@settings(max_examples=150, deadline=None)
@given(networks())
def test_any_chain_is_the_same_function_at_the_smallest_size(model: nn.Sequential) -> None:
    before = state_of(model)
    x = torch.randint(-3, 4, (20, model[0].in_features), generator=torch.Generator().manual_seed(0)).double()
    smaller = nettrim.shrink(model, x[:5])
    assert [units for units, _ in sizes(smaller).values()] == smallest(model)
    assert torch.equal(outputs(smaller, x), outputs(model, x))
    assert same_bits(before, state_of(model))


# --------------------------------------------------------------------------------------------- dtypes, devices, flags


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16))
def test_dtypes_and_wide_layers(dtype: torch.dtype, device: str) -> None:
    """More neurons than half-precision numbers can count."""
    model = chain(8, 700, 300, 5, dtype=dtype).to(device)
    with torch.no_grad():
        model[0].weight[::2] = 0
        model[2].weight[100:] = 0
    smaller = nettrim.shrink(model, samples(30, 8))
    assert sizes(smaller) == {"0": (350, 8), "2": (100, 350), "4": (5, 100)}
    assert all(parameter.dtype == dtype and parameter.device.type == device for parameter in smaller.parameters())
    assert_same(model, smaller, samples(200, 8, seed=4).to(device, dtype), shrinking.TOLERANCE[dtype])


def test_the_model_stays_and_flags_are_kept() -> None:
    model = Net(lambda n, x: n.c(F.relu(n.b(n.drop(F.relu(n.a(x)))))), drop=nn.Dropout()).train()
    model.drop.eval()
    model.a.weight.requires_grad_(False)
    model.b.bias.requires_grad_(False)
    model(samples(5, 6)).sum().backward()
    before, flags, parameters = state_of(model), [module.training for module in model.modules()], list(model.parameters())
    smaller = nettrim.shrink(model, samples(5, 6))
    assert sizes(smaller) == {"a": (3, 6), "b": (5, 3), "c": (6, 5)}
    assert same_bits(before, state_of(model)) and [p is q for p, q in zip(parameters, model.parameters(), strict=True)]
    assert hooks_of(model) == hooks_of(smaller) == 0
    for network in (model, smaller):
        assert [module.training for module in network.modules()] == flags
        assert [name for name, p in network.named_parameters() if not p.requires_grad] == ["a.weight", "b.bias"]
    assert [name for name, _ in model.named_modules()] == [name for name, _ in smaller.named_modules()]
    assert [type(module) for module in model.modules()] == [type(module) for module in smaller.modules()]
    assert_same(model, smaller, samples(50, 6, seed=4))


def test_nothing_to_remove_gives_an_equal_copy() -> None:
    for model in (chain(4, 6, 3), nn.Linear(3, 2), nn.Flatten(), nn.Conv1d(1, 1, 3)):
        x = samples(5, 4)[:, None] if isinstance(model, nn.Conv1d) else samples(5, 3 if isinstance(model, nn.Linear) else 4)
        smaller = nettrim.shrink(model, x)
        assert smaller is not model and same_bits(state_of(model), state_of(smaller))
        assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in smaller.parameters()}


def test_the_smaller_network_can_be_trained_copied_saved_and_loaded() -> None:
    model = Net(lambda n, x: x)  # a lambda cannot be pickled: its layers can
    x = samples(60, 6)
    with torch.inference_mode():  # of the caller, which must not leave its mark on the new parameters
        smaller = nettrim.shrink(nn.Sequential(model.a, nn.ReLU(), model.b, nn.ReLU(), model.c), x)
    copied = copy.deepcopy(smaller)
    file = io.BytesIO()
    torch.save(smaller, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    copied.load_state_dict(loaded.state_dict())
    for other in (copied, loaded):
        assert sizes(other) == sizes(smaller) == {"0": (3, 6), "2": (5, 3), "4": (6, 5)}
        assert torch.equal(outputs(other, x), outputs(smaller, x))
    labels = (x[:, 0] > 0).long()
    before = F.cross_entropy(outputs(smaller, x), labels)
    assert F.cross_entropy(outputs(train(smaller, x, labels), x), labels) < before / 2


# --------------------------------------------------------------------------------------------------------- with prune


def test_after_prune(digits_network: tuple[nn.Sequential, Tensor, Tensor, Tensor]) -> None:
    model, images, test_images, _ = digits_network
    pruned = nettrim.prune(model, images, epsilon=0.4, mode="parallel").model
    assert isinstance(pruned, nn.Sequential)
    smaller = nettrim.shrink(pruned, images)
    assert [units for units, _ in sizes(smaller).values()] == smallest(pruned)
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in pruned.parameters())
    assert_same(pruned, smaller, test_images)


# -------------------------------------------------------------------------------------------------------------- errors


def test_arguments_are_checked() -> None:
    model = chain(4, 3, 2)
    with pytest.raises(nettrim.ArgumentError, match="model is a dict"):
        nettrim.shrink({}, samples(5, 4))  # type: ignore[arg-type]
    with pytest.raises(nettrim.ArgumentError, match="forward_fn=3"):
        nettrim.shrink(model, samples(5, 4), forward_fn=3)  # type: ignore[arg-type]
    with pytest.raises(nettrim.CalibrationError, match="no calibration sample"):
        nettrim.shrink(model, samples(0, 4))
    with pytest.raises(nettrim.CalibrationError, match="could not run"):
        nettrim.shrink(model, samples(5, 3))
    model.lock = open(__file__)  # type: ignore[assignment]
    with model.lock, pytest.raises(nettrim.ArgumentError, match="cannot be copied"):
        nettrim.shrink(model, samples(5, 4))


OTHER: dict[str, tuple[Callable[[Net, Tensor], Any], str]] = {
    "a mean over the neurons": (lambda n, x: n.b(F.relu(n.a(x))) / n.a.out_features, "output differs from the model's"),
    "random": (lambda n, x: n.b(F.relu(n.a(x))) + torch.rand(6), "output differs from the model's"),
    "another shape": (lambda n, x: (lambda h: n.b(h)[: h.shape[-1]])(F.relu(n.a(x))), "output has shape"),
    "a number that must be": (lambda n, x: n.b(F.relu(n.a(x)))[:, : 1 + [3, 5].index(n.a.out_features - 1)], "does not run on the sample"),
}


@pytest.mark.parametrize("name", OTHER)
def test_a_network_that_would_compute_something_else_is_not_returned(name: str) -> None:
    forward, message = OTHER[name]
    model = Net(forward)
    before = state_of(model)
    with pytest.raises(nettrim.NetTrimError, match=message) as caught:
        nettrim.shrink(model, samples(12, 6))
    assert "'a', 'b' were made smaller" in str(caught.value) and "The model is unchanged" in str(caught.value)
    assert same_bits(before, state_of(model)) and hooks_of(model) == 0


def test_constants_beyond_half_precision_are_refused() -> None:
    model = nn.Sequential(layer([[0, 0], [0, 0], [1, 0]], [60000, 60000, 1]), nn.ReLU(), layer([[1, -1, 1], [1, 1, 1]], None)).half()
    with pytest.raises(nettrim.NetTrimError, match=r"layer '2' reads.*beyond the range of torch.float16 \(size 1.2e\+05\)"):
        nettrim.shrink(model, samples(5, 2))
