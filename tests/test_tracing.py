"""What follows a layer, what it reads, and what is skipped: found by running, on networks with a known answer."""

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nettrim import calibration
from nettrim.errors import ArgumentError, CalibrationError
from nettrim.tracing import Trace, TracedLayer, trace

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


class Net(nn.Module):
    """Layers a, b, c of width 6 and a forward given as a function of the module and the input."""

    def __init__(self, forward: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.function = forward
        self.kept: Any = None

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def run_trace(model: nn.Module, data: Any = None, forward_fn: Any = None) -> Trace:
    data = torch.randn(4, 6) if data is None else data
    return trace(model, calibration.batches(data), calibration.runner(forward_fn))


def by_name(found: Trace) -> dict[str, TracedLayer]:
    return {layer.name: layer for layer in found.layers}


RELUS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "module": nn.ReLU(),
    "in place module": nn.ReLU(inplace=True),
    "torch.relu": torch.relu,
    "method": lambda y: y.relu(),
    "relu_": lambda y: y.relu_(),
    "clamp": lambda y: y.clamp(min=0),
    "clamp 0.0": lambda y: torch.clamp(y, 0.0),
    "clamp_": lambda y: y.clamp_(min=0),
    "clamp_min": lambda y: torch.clamp_min(y, 0),
    "clamp_min_": lambda y: y.clamp_min_(0),
    "threshold": lambda y: F.threshold(y, 0, 0),
    "threshold_": lambda y: F.threshold(y, 0, 0, inplace=True),
    "twice": lambda y: F.relu(F.relu(y)),
    "two of the same": lambda y: y.relu() if y.relu().dim() == 2 else y,
    "dropout before": lambda y: F.relu(nn.Dropout().eval()(y)),
    "reshaped": lambda y: F.relu(y.reshape(2, 2, 6)).flatten(0, 1),
    "transposed": lambda y: F.relu(y.t().unsqueeze(0)).squeeze(0).permute(1, 0),
    "contiguous": lambda y: F.relu(y.t().contiguous()).t(),
    "copied": lambda y: F.relu(y.detach().clone()[:]),
    "same dtype": lambda y: F.relu(y.to(y.dtype, copy=True)),
    "in place on a view": lambda y: (y.view(-1).relu_(), y)[1],
    "in place on a copy": lambda y: y.clone().relu_(),
}

NOT_RELUS: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": lambda y: y * 1,
    "random leaky": lambda y: F.rrelu(y, training=True),
    "an activation that may rise fast": lambda y: F.leaky_relu(y, -0.5),
    "clamp above": lambda y: y.clamp(min=0.1),
    "clamp both": lambda y: y.clamp(0, 1),
    "clamp max": lambda y: y.clamp(max=0),
    "threshold of another value": lambda y: F.threshold(y, 0, 1),
    "residual": lambda y: F.relu(y) + y,
    "residual in place": lambda y: F.relu(y).add_(y),
    "concatenated": lambda y: torch.cat([F.relu(y), y])[:4],
    "scaled first": lambda y: F.relu(y * 2),
    "shifted in place": lambda y: y.add_(1).relu_(),
    "a part of it": lambda y: torch.cat([F.relu(y[:, :3]), y[:, 3:]], 1),
    "in place on a part": lambda y: (y[:, :3].relu_(), y)[1],
    "one column, expanded": lambda y: F.relu(y[:, :1].expand(4, 6)),
    "negated": lambda y: F.relu(torch._neg_view(y)),
    "rounded": lambda y: F.relu(y.half()).float(),
    "looked at": lambda y: F.relu(y) * float(y.sum()),
    "copied, then used": lambda y: F.relu(y) + y.clone(),
    "view used before in place": lambda y: (y.view(-1).exp(), y.relu_())[1],
    "random dropout": lambda y: F.relu(F.dropout(y, 0.5, True)),
    "written elsewhere": lambda y: torch.clamp(y, 0, out=torch.empty_like(y)) + 0 * y,
}


@pytest.mark.parametrize("name", RELUS)
def test_relu_in_all_its_forms_makes_a_chain(name: str) -> None:
    found = run_trace(Net(lambda net, x: net.c(RELUS[name](net.b(RELUS[name](net.a(x)))))))
    layers = by_name(found)
    assert list(layers) == ["a", "b", "c"]
    assert [layers[n].activation for n in "abc"] == ["relu", "relu", None]
    assert [layers[n].reads for n in "abc"] == [None, "a", "b"]
    assert found.chain and found.not_chain_reason is None and not found.skipped


@pytest.mark.parametrize("name", NOT_RELUS)
def test_anything_else_is_no_relu(name: str) -> None:
    found = run_trace(Net(lambda net, x: net.c(F.relu(net.b(NOT_RELUS[name](net.a(x)))))))
    layers = by_name(found)
    assert [layers[n].activation for n in "abc"] == [None, "relu", None]
    assert [layers[n].reads for n in "abc"] == [None, None, "b"]
    assert not found.chain and "input of layer 'b' is not exactly the output of layer 'a'" in str(
        found.not_chain_reason
    )


def keep(net: Any, x: Tensor) -> Tensor:
    y = net.a(x)
    net.kept = y
    return net.c(net.b(F.relu(y)))


class Output:
    def __init__(self, out: Tensor, hidden: Tensor) -> None:
        self.out, self.hidden = out, hidden


RETURNED: dict[str, Callable[[Any, Tensor], Any]] = {
    "in a tuple": lambda net, x: (lambda y: (net.c(net.b(F.relu(y))), y))(net.a(x)),
    "in a dict": lambda net, x: (lambda y: {"out": net.c(net.b(F.relu(y))), "hidden": [y]})(net.a(x)),
    "in an object": lambda net, x: (lambda y: Output(net.c(net.b(F.relu(y))), y))(net.a(x)),
    "as a view": lambda net, x: (lambda y: (net.c(net.b(F.relu(y))), y.t()))(net.a(x)),
    "as a copy": lambda net, x: (lambda y: (y.clone(), net.c(net.b(y.relu_()))))(net.a(x)),
    "kept": keep,
}


@pytest.mark.parametrize("name", RETURNED)
def test_a_pre_activation_that_leaves_the_network_is_another_use(name: str) -> None:
    found = run_trace(Net(RETURNED[name]))
    assert by_name(found)["a"].activation is None and by_name(found)["b"].reads is None
    assert not found.chain


def test_layers_that_follow_each_other_directly_and_a_relu_at_the_end() -> None:
    found = run_trace(Net(lambda net, x: (net.c(net.b(net.a(x)).flatten().view(4, 6)).relu(),)))
    assert [layer.activation for layer in found.layers] == [None, None, "relu"]
    assert [layer.reads for layer in found.layers] == [None, "a", "b"]
    assert found.chain


CHAINS: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "softmax at the end": (
        lambda net, x: net.c(net.b(net.a(x))).softmax(-1),
        "output is not exactly the output of its last",
    ),
    "two outputs": (lambda net, x: (net.c(net.b(net.a(x))), x), "output is not exactly"),
    "skip connection": (lambda net, x: net.c(net.b(net.a(x)) + x), "input of layer 'c'"),
    "branches": (lambda net, x: net.c(net.a(x)) + net.b(x), "input of layer 'c'|input of layer 'b'"),
    "something else between": (lambda net, x: net.c(net.b(net.a(x).exp())), "input of layer 'b'"),
    "a part": (lambda net, x: net.c(net.b(net.a(x))[:2]), "input of layer 'c'"),
    "rows repeated": (lambda net, x: net.c(net.b(net.a(x))[:1].expand(4, 6)), "input of layer 'c'"),
    "changed in place": (lambda net, x: net.c(net.b(net.a(x).relu_().add_(1))), "input of layer 'b'.*after its ReLU"),
}


@pytest.mark.parametrize("name", CHAINS)
def test_what_is_no_chain_says_where(name: str) -> None:
    forward, reason = CHAINS[name]
    found = run_trace(Net(forward))
    assert not found.chain and re.search(reason, str(found.not_chain_reason))


def test_the_input_of_the_first_layer_is_of_no_matter_and_a_post_activation_may_be_looked_at() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        h = net.a(x.exp() + x.mean()).relu()
        h.norm()
        return net.c(net.b(h).relu())

    assert run_trace(Net(forward)).chain


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_train_mode_dropout_and_dtypes(dtype: torch.dtype, device: str) -> None:
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(6, 5), nn.Dropout(), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(5, 3, bias=False)
    ).to(device=device, dtype=dtype)
    model.train()
    model[2].eval()
    flags = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    found = run_trace(model, [torch.randn(4, 2, 3), torch.randn(1, 2, 3)])
    assert found.chain and [layer.activation for layer in found.layers] == ["relu", None]
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_single_layer_is_a_chain() -> None:
    found = run_trace(nn.Linear(6, 2))
    assert found.chain and found.layers[0].name == "" and found.layers[0].activation is None


def test_a_failing_batch_leaves_no_hook() -> None:
    model = Net(lambda net, x: net.c(net.b(net.a(x))[:, :5])).train()
    with pytest.raises(CalibrationError, match=r"Net could not run calibration batch 0 \(float32 \(4, 6\)\)") as caught:
        run_trace(model)
    assert isinstance(caught.value.__cause__, RuntimeError)
    modules = list(model.modules())
    assert all(module.training and not module._forward_hooks and not module._forward_pre_hooks for module in modules)


def test_a_forward_that_recovers_from_a_failed_layer_is_followed_on() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        y = net.a(x)
        h = F.relu(y)
        try:
            return net.b(x[:, :2])
        except RuntimeError:
            return net.c(h + y)

    assert by_name(run_trace(Net(forward)))["a"].activation is None


# ------------------------------------------------------------------------------------------------ what differs by batch


def test_what_holds_in_one_batch_only_does_not_hold() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        y = net.a(x)
        h = F.relu(y) if len(x) > 2 else F.gelu(y)
        return net.c(net.b(h).relu())

    data = [torch.randn(4, 6), torch.randn(2, 6)]
    found = run_trace(Net(forward), data)
    assert [layer.activation for layer in found.layers] == [None, "relu", None]
    assert [layer.reads for layer in found.layers] == [None, None, "b"] and not found.chain
    assert run_trace(Net(forward), data[:1]).chain


def test_order_that_differs_and_layers_that_are_missing() -> None:
    def swapped(net: Any, x: Tensor) -> Tensor:
        return net.c(net.b(net.a(x)) if len(x) > 2 else net.a(net.b(x)))

    data = [torch.randn(4, 6), torch.randn(2, 6)]
    found = run_trace(Net(swapped), data)
    assert set(found.skipped) == {"a", "b"} and "runs before 'a' in some batches" in found.skipped["b"]
    assert by_name(found)["c"].skip_reason is None
    assert "batch 1 does not run all layers in the same order" in str(found.not_chain_reason)

    def missing(net: Any, x: Tensor) -> Tensor:
        return net.c(net.b(net.a(x)) if len(x) > 2 else net.a(x))

    for batches, batch in ((data, 1), (data[::-1], 0)):
        found = run_trace(Net(missing), batches)
        assert [layer.name for layer in found.layers] == ["a", "b", "c"]
        assert found.skipped == {"b": f"ran in 1 of 2 calibration batches only (not in batch {batch})"}


def chain(net: Any, x: Tensor) -> Tensor:
    return net.c(net.b(net.a(x).relu()).relu())


def test_other_hooks_on_a_layer_are_seen_as_operations() -> None:
    model = Net(chain)
    model.a.register_forward_hook(lambda module, args, out: out * 2)
    model.b.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    found = run_trace(model)
    assert [layer.activation for layer in found.layers] == [None, "relu", None]
    assert [layer.reads for layer in found.layers] == [None, None, "b"]


def test_keyword_inputs_and_forward_fn() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        return net.c(input=net.b(input=net.a(input=x).relu()))

    found = run_trace(Net(forward), {"features": torch.randn(3, 6)}, lambda model, batch: model(batch["features"]))
    assert found.chain and [layer.reads for layer in found.layers] == [None, "a", "b"]


def test_parameters_are_checked_before_anything_runs() -> None:
    model = Net(lambda net, x: pytest.fail("the model was run"))
    model.b.weight.data[0, 0] = torch.nan
    with pytest.raises(ArgumentError, match=r"'b\.weight'"):
        run_trace(model)
