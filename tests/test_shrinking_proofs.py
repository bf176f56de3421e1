"""Where ``nettrim.shrink`` may take neurons out, proven by tracing, and where it leaves them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import same_bits, samples, state_of
from test_shrinking import Net, assert_same, sizes
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as torch_prune

import nettrim
from nettrim import calibration
from nettrim.tracing import trace

PROVEN: dict[str, Callable[[Net, Tensor], Any]] = {
    "functional": lambda n, x: n.c(F.relu(n.b(F.relu(n.a(x))))),
    "in place": lambda n, x: n.c(n.b(n.a(x).relu_()).relu_()),
    "clamped": lambda n, x: n.c(n.b(n.a(x).clamp(min=0)).clamp_(min=0)),
    "by keyword": lambda n, x: n.c(input=F.relu(n.b(input=F.relu(n.a(x))))),
    "reshaped": lambda n, x: n.c(F.relu(n.b(F.relu(n.a(x.view(3, 4, 6)).flatten(0, 1)))).unsqueeze(1)).squeeze(1),
    "rows in another order": lambda n, x: n.c(F.relu(n.b(F.relu(n.a(x.view(3, 4, 6)).transpose(0, 1).contiguous())))),
    "within a network that is no chain": lambda n, x: (n.c(F.relu(n.b(F.relu(n.a(x.sin()))))) * x).softmax(-1),
    "a residual sum around it": lambda n, x: x + n.c(F.relu(n.b(F.relu(n.a(x))))),
    "several outputs": lambda n, x: (x.sum(), {"out": n.c(F.relu(n.b(F.relu(n.a(x)))))}),
    "copied": lambda n, x: n.c(F.relu(n.b(F.relu(n.a(x)).clone()))),
}


def everything(output: Any) -> Tensor:
    return output[1]["out"] if isinstance(output, tuple) else output


@pytest.mark.parametrize("name", PROVEN)
def test_what_is_proven_is_shrunk(name: str) -> None:
    model = Net(PROVEN[name])
    smaller = nettrim.shrink(model, samples(12, 6))
    assert sizes(smaller) == {"a": (3, 6), "b": (5, 3), "c": (6, 5)}
    x = samples(12, 6, seed=4)
    with torch.no_grad():
        torch.testing.assert_close(everything(smaller(x)), everything(model(x)))


def test_the_feed_forward_part_of_a_transformer() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(2)), nn.Linear(8, 3))
    with torch.no_grad():
        model[0].linear1.weight[:5] = 0
        model[1].linear2.weight[:, 9:] = 0
    x = torch.randn(4, 7, 8)
    smaller = nettrim.shrink(model, [x, x[:2]])
    assert smaller[0].linear1.out_features == smaller[0].linear2.in_features == 11
    assert smaller[1].linear1.out_features == smaller[1].linear2.in_features == 9
    assert_same(model, smaller, x)  # in evaluation mode, by torch's fused kernel
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        assert_same(model, smaller, x)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_batches_and_a_forward_fn() -> None:
    model = Net(lambda n, x: n.c(F.relu(n.b(F.relu(n.a(x["x"]))))))
    x = samples(12, 6)
    smaller = nettrim.shrink(model, [{"y": x[:5]}, {"y": x[5:]}], forward_fn=lambda m, batch: m({"x": batch["y"]}))
    assert sizes(smaller) == {"a": (3, 6), "b": (5, 3), "c": (6, 5)}


def twice(n: Net, x: Tensor) -> Tensor:
    return n.b(F.relu(n.a(F.relu(n.a(x)))))


def keeping(n: Net, x: Tensor) -> Tensor:
    n.kept = F.relu(n.a(x))
    return n.b(n.kept)


def only_small_batches(n: Net, x: Tensor) -> Tensor:
    h = F.relu(n.a(x))
    return n.b(h) if len(x) < 6 else n.b(h) + h


# each of them reads a in b (or would), and something forbids to take a neuron out
UNPROVEN: dict[str, Callable[[Net, Tensor], Any]] = {
    "residual sum": lambda n, x: (lambda h: h + n.b(h))(F.relu(n.a(x))),
    "residual sum of the pre-activation": lambda n, x: (lambda z: z + n.b(F.relu(z)))(n.a(x)),
    "two readers": lambda n, x: (lambda h: n.b(h) + n.c(h))(F.relu(n.a(x))),
    "two readers, one before the ReLU": lambda n, x: (lambda z: n.b(F.relu(z)) + n.c(z))(n.a(x)),
    "two ReLUs, two readers": lambda n, x: (lambda z: n.b(F.relu(z)) + n.c(F.relu(z)))(n.a(x)),
    "returned": lambda n, x: (lambda h: (n.b(h), h))(F.relu(n.a(x))),
    "returned as a copy": lambda n, x: (lambda h: (n.b(h), h.clone().t()))(F.relu(n.a(x))),
    "kept": keeping,
    "a statistic of it": lambda n, x: (lambda h: n.b(h) / (1 + h.norm()))(F.relu(n.a(x))),
    "a branch on it": lambda n, x: (lambda h: n.b(h) if h.sum() > 0 else n.b(h) * 2)(F.relu(n.a(x))),
    "in one batch only": only_small_batches,
    "another activation": lambda n, x: n.b(F.gelu(n.a(x))),
    "scaled": lambda n, x: n.b(F.relu(n.a(x)) * 2),
    "a part": lambda n, x: n.b(F.relu(n.a(x))[:4]),
    "tokens for neurons": lambda n, x: n.b(F.relu(n.a(x.view(2, 6, 6))).transpose(1, 2)),
    "tokens for neurons, in memory too": lambda n, x: n.b(F.relu(n.a(x.view(2, 6, 6))).transpose(1, 2).contiguous()),
    "shuffled": lambda n, x: (lambda h: n.b(h.t().reshape(h.shape)))(F.relu(n.a(x))),
    "a fixed number": lambda n, x: n.b(F.relu(n.a(x)).view(-1, 6)),
    "a fixed number that fails": lambda n, x: n.b(F.relu(n.a(x)).view(12, 6)),
    "heads": lambda n, x: n.b(F.relu(n.a(x)).view(12, 2, 3).flatten(1)),
    "called twice": twice,
    "weights used outside": lambda n, x: n.b(F.relu(n.a(x))) + n.b.weight.sum(),
    "weights used instead": lambda n, x: F.linear(F.relu(n.a(x)), n.b.weight),
    "the last layer": lambda n, x: F.relu(n.a(x)),
}


@pytest.mark.parametrize("name", UNPROVEN)
def test_what_is_not_proven_is_left_alone(name: str) -> None:
    model = Net(UNPROVEN[name])
    x = samples(12, 6)
    smaller = nettrim.shrink(model, [x, x[:5]] if name == "in one batch only" else x)
    assert same_bits(state_of(model), state_of(smaller))


def shared(net: Net) -> None:
    net.c.weight = net.b.weight


def viewed(net: Net) -> None:
    net.c.weight = nn.Parameter(net.a.weight.data[:, :])


def with_a_buffer(net: Net) -> None:
    class Scaled(nn.Linear):
        pass

    net.b.__class__ = Scaled
    net.b.register_buffer("scale", torch.ones(6))


def with_a_closure(net: Net) -> None:
    net.forward = lambda x: net.b(F.relu(net.a(x)))  # type: ignore[method-assign]


def with_a_hook(net: Net) -> None:
    net.a.register_forward_hook(lambda module, args, out: out + 1)


CHANGES = {
    "shared weight": shared,
    "shared memory": viewed,
    "shared module": lambda net: setattr(net, "again", net.a),
    "weight norm": lambda net: parametrizations.weight_norm(net.b),
    "pruning mask": lambda net: torch_prune.identity(net.a, "weight"),
    "a subclass that holds more": with_a_buffer,
    "a forward that a copy does not run": with_a_closure,
    "a hook that changes the output": with_a_hook,
}


@pytest.mark.parametrize("name", CHANGES)
def test_layers_that_are_more_than_they_seem_are_left_alone(name: str) -> None:
    model = Net(lambda n, x: n.b(F.relu(n.a(x))))
    CHANGES[name](model)
    smaller = nettrim.shrink(model, samples(12, 6))
    assert same_bits(state_of(model), state_of(smaller))


def test_flattened_tokens_are_left_alone() -> None:
    model = Net(lambda n, x: n.d(F.relu(n.a(x.view(2, 6, 6))).flatten(1)), d=nn.Linear(36, 6))
    assert same_bits(state_of(model), state_of(nettrim.shrink(model, samples(12, 6))))


def test_what_cannot_be_proven_does_not_keep_the_rest_from_shrinking() -> None:
    model = Net(lambda n, x: n.c(F.relu(n.b(F.relu(n.a(x)).view(12, 6)))))
    assert sizes(nettrim.shrink(model, samples(12, 6))) == {"a": (6, 6), "b": (5, 6), "c": (6, 5)}
    model = Net(lambda n, x: n.c(F.relu(n.b(F.relu(n.a(x))))))
    torch_prune.identity(model.a, "weight")
    assert sizes(nettrim.shrink(model, samples(12, 6))) == {"a": (6, 6), "b": (5, 6), "c": (6, 5)}
    torch_prune.remove(model.a, "weight")
    assert sizes(nettrim.shrink(model, samples(12, 6))) == {"a": (3, 6), "b": (5, 3), "c": (6, 5)}


def test_the_trace_says_who_is_the_only_reader() -> None:
    x = samples(12, 6)

    def alone(forward: Callable[[Net, Tensor], Any], data: Any = x) -> dict[str, bool]:
        found = trace(Net(forward), calibration.batches(data), calibration.runner())
        return {layer.name: layer.reads_alone for layer in found.layers}

    assert alone(PROVEN["functional"]) == {"a": False, "b": True, "c": True}
    assert alone(lambda n, x: n.b(n.a(x))) == {"a": False, "b": True}
    for name in ("residual sum", "returned", "returned as a copy", "kept", "a statistic of it", "a branch on it"):
        assert not any(alone(UNPROVEN[name]).values()), name
    assert not any(alone(UNPROVEN["two readers"]).values())
    assert alone(only_small_batches, x[:5])["b"] and not alone(only_small_batches, [x[:5], x])["b"]
