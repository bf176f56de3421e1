"""Architectures: which layers `nettrim.prune` takes, what it makes of what follows them, and what it says of the others."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from networks import by_name, samples, solved_on
from torch import Tensor, nn
from torch.nn import functional as F

from nettrim import PruneResult, prune


class Net(nn.Module):
    """Layers a, b, c (6 to 6) and whatever else is needed, with a forward given as a function."""

    def __init__(self, forward: Callable[["Net", Any], Any], **modules: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        for name, module in modules.items():
            setattr(self, name, module)
        self.function = forward

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


@dataclass(frozen=True)
class Case:
    """A network, the activation of each layer that is pruned, in execution order, words from the reason for each other one."""

    model: Callable[[], nn.Module]
    pruned: dict[str, str | None]
    skipped: dict[str, str] = field(default_factory=dict)
    chain: bool = False
    shape: tuple[int, ...] = (40, 6)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "relu6": F.relu6}


class Odd(nn.Conv2d):
    """A convolution that computes something else."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight.abs(), bias)


def tied() -> Net:
    net = Net(lambda n, x: n.c(F.relu(n.b(F.relu(n.a(x))))))
    net.b.weight = net.a.weight
    return net


RELU, PLAIN = "relu", None
STRAIGHT = {"a": RELU, "b": RELU, "c": PLAIN}
CASES = {
    "F.relu": Case(lambda: Net(lambda n, x: n.c(F.relu(n.b(F.relu(n.a(x)))))), STRAIGHT, chain=True),
    "relu_ in place": Case(lambda: Net(lambda n, x: n.c(n.b(n.a(x).relu_()).relu_())), STRAIGHT, chain=True),
    "clamp": Case(lambda: Net(lambda n, x: n.c(torch.clamp(n.b(n.a(x).clamp(min=0)), 0))), STRAIGHT, chain=True),
    "dropout and flatten": Case(
        lambda: Net(lambda n, x: n.c(n.flat(F.relu(n.b(n.drop(F.relu(n.a(x))))))), drop=nn.Dropout(0.5), flat=nn.Flatten()), STRAIGHT, chain=True
    ),
    "no bias": Case(
        lambda: Net(lambda n, x: n.c(F.relu(n.d(x))), d=nn.Linear(6, 6, bias=False)),
        {"d": RELU, "c": PLAIN},
        {"a": "never ran", "b": "never ran"},
        True,
    ),
    "GELU": Case(lambda: Net(lambda n, x: n.c(F.gelu(n.b(F.relu(n.a(x)))))), {"a": RELU, "b": "gelu", "c": PLAIN}, chain=True),
    "ReLU6": Case(lambda: Net(lambda n, x: n.c(F.relu6(n.b(F.relu(n.a(x)))))), {"a": RELU, "b": "relu6", "c": PLAIN}, chain=True),
    "residual": Case(lambda: Net(lambda n, x: n.c(F.relu(n.a(x)) + n.b(x))), {"a": RELU, "b": PLAIN, "c": PLAIN}),
    "residual before the ReLU": Case(lambda: Net(lambda n, x: n.c(F.relu(n.a(x) + n.b(x)))), {"a": PLAIN, "b": PLAIN, "c": PLAIN}),
    "concatenation": Case(
        lambda: Net(lambda n, x: n.d(torch.cat([F.relu(n.a(x)), F.relu(n.b(x)), n.c(x)], -1)), d=nn.Linear(18, 4)),
        {"a": RELU, "b": RELU, "c": PLAIN, "d": PLAIN},
    ),
    "the output used before its ReLU too": Case(
        lambda: Net(lambda n, x: (lambda h: n.c(n.b(F.relu(h)) + h))(n.a(x))), {"a": PLAIN, "b": PLAIN, "c": PLAIN}
    ),
    "a layer returned beside": Case(lambda: Net(lambda n, x: (lambda h: (n.b(F.relu(h)), h))(n.a(x))), {"a": PLAIN, "b": PLAIN}, {"c": "never ran"}),
    "a dict returned": Case(
        lambda: Net(lambda n, x: (lambda h: {"out": n.b(h), "features": h})(F.relu(n.a(x)))), {"a": RELU, "b": PLAIN}, {"c": "never ran"}
    ),
    "nested": Case(
        lambda: nn.Sequential(nn.Sequential(nn.Linear(6, 8), nn.ReLU()), nn.Sequential(nn.Sequential(nn.Linear(8, 3)))),
        {"0.0": RELU, "1.0.0": PLAIN},
        chain=True,
    ),
    "tokens": Case(lambda: Net(lambda n, x: n.c(F.relu(n.b(F.relu(n.a(x)))))), STRAIGHT, chain=True, shape=(12, 5, 6)),
    "shared weights": Case(tied, {"c": PLAIN}, {"a": "its weight is shared with 'b.weight'", "b": "its weight is shared with 'a.weight'"}, True),
    "called twice": Case(lambda: Net(lambda n, x: n.c(F.relu(n.a(F.relu(n.a(x)))))), {"c": PLAIN}, {"a": "called 2 times", "b": "never ran"}),
    "never run": Case(lambda: Net(lambda n, x: n.c(F.relu(n.a(x)))), {"a": RELU, "c": PLAIN}, {"b": "never ran"}, True),
    "empty": Case(
        lambda: Net(lambda n, x: n.c(torch.cat([F.relu(n.a(x)), n.d(x)], -1)), d=nn.Linear(6, 0)),
        {"a": RELU, "c": PLAIN},
        {"b": "never ran", "d": "empty"},
    ),
    "convolution": Case(
        lambda: nn.Sequential(Odd(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 3)),
        {"3": RELU, "5": PLAIN},
        {"0": "Odd replaces nn.Conv2d's _conv_forward"},
        True,
        (30, 1, 6, 6),
    ),
    "parameters of the model itself": Case(
        lambda: Net(lambda n, x: n.c(F.relu(n.a(x + n.shift))), shift=nn.Parameter(torch.ones(1, 6))),
        {"a": RELU, "c": PLAIN},
        {"b": "never ran", "Net": "not a supported layer type"},
        True,
    ),
    "a forward of its own": Case(
        lambda: Net(lambda n, x: n.c(F.relu(n.d(x))), d=type("Odd", (nn.Linear,), {"forward": lambda self, x: F.linear(x, self.weight.abs())})(6, 6)),
        {"c": PLAIN},
        {"a": "never ran", "b": "never ran", "d": "Odd replaces"},
        True,
    ),
}


def watched_rows(result: PruneResult, dense: nn.Module, name: str, x: Tensor, *, cascade: bool) -> tuple[Tensor, Tensor]:
    """What the layer was given and what the dense one put out, by hooks of the test's own; float64 rows."""
    seen: dict[str, Tensor] = {}
    handles = [
        dense.get_submodule(name).register_forward_hook(lambda module, args, out: seen.update(x=args[0].clone(), y=out.clone())),
        result.model.get_submodule(name).register_forward_hook(lambda module, args, out: seen.update(pruned_x=args[0].clone())),
    ]
    with torch.no_grad():
        dense.eval()(x)
        result.model.eval()(x)
    for handle in handles:
        handle.remove()
    return seen["pruned_x" if cascade else "x"].double().flatten(0, -2), seen["y"].double().flatten(0, -2)


@pytest.mark.parametrize("mode", ("cascade", "parallel"))
@pytest.mark.parametrize("name", CASES)
def test_what_is_pruned_and_what_is_said(name: str, mode: str) -> None:
    case = CASES[name]
    model = case.model()
    inputs = torch.randn(case.shape, generator=torch.Generator().manual_seed(3))
    result = prune(model, inputs, epsilon=0.2, mode=mode)
    assert {layer.name: layer.activation for layer in result.report.layers} == case.pruned
    assert list(case.pruned) == [layer.name for layer in result.report.layers]  # execution order
    assert set(result.report.skipped) == set(case.skipped)
    for layer, words in case.skipped.items():
        assert words in result.report.skipped[layer]
    certificate = result.report.certificate
    assert certificate.holds
    assert (certificate.guaranteed is not None) == case.chain, certificate.explanation
    assert case.chain or certificate.explanation.startswith("no bound for the network: ")
    x = solved_on(inputs)[0]
    for layer in result.report.layers:
        A, Z = watched_rows(result, model, layer.name, x, cascade=mode == "cascade")
        module = result.model.get_submodule(layer.name)
        out = A @ module.weight.detach().double().T + (0 if module.bias is None else module.bias.detach().double())
        if layer.activation is not None:
            out, Z = ACTIVATIONS[layer.activation](out), ACTIVATIONS[layer.activation](Z)
        assert layer.rows == len(A)
        assert layer.discrepancy == pytest.approx(float((out - Z).norm()), rel=1e-4, abs=1e-6)
        assert layer.discrepancy <= layer.epsilon
        if mode == "parallel":
            assert layer.epsilon == pytest.approx(0.2 * float(Z.norm()), rel=1e-5)
    for left in set(case.skipped) & set(dict(model.named_modules())):
        for before, after in zip(model.get_submodule(left).parameters(), result.model.get_submodule(left).parameters(), strict=True):
            assert torch.equal(before, after)


def test_an_undisturbed_branch_has_the_epsilon_budget() -> None:
    """Two branches on the same input, joined: the second reads what no pruning has touched."""
    model = Net(lambda n, x: n.c(F.relu(n.a(x)) + F.relu(n.b(x))))
    inputs = samples(60, 6)
    result = prune(model, inputs, epsilon=0.2)
    x = solved_on(inputs)[0]
    for name in ("a", "b"):
        _, Z = watched_rows(result, model, name, x, cascade=True)
        assert by_name(result)[name].epsilon == pytest.approx(0.2 * float(Z.clamp(min=0).norm()), rel=1e-5)
    A, Z = watched_rows(result, model, "c", x, cascade=True)
    misfit = (A @ model.c.weight.detach().double().T + model.c.bias.detach().double() - Z).norm()
    assert by_name(result)["c"].epsilon == pytest.approx(1.1**0.5 * float(misfit), rel=1e-4)


def test_kinds_of_patterns_reach_the_layers() -> None:
    class Head(nn.Linear):
        pass

    model = Net(lambda n, x: n.head(F.relu(n.b(F.relu(n.a(x))))), head=Head(6, 3))
    inputs = samples(60, 6)
    for choice in ({"ignore": Head}, {"targets": ["a", "re:b|c"]}, {"targets": "[ab]"}):
        result = prune(model, inputs, epsilon=0.2, **choice)
        assert set(result.masks) == {"a.weight", "b.weight"}
        assert "head" in result.report.skipped and "c" in result.report.skipped
    assert set(prune(model, inputs, epsilon={Head: 0.2}).masks) == {"head.weight"}
