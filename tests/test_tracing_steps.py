"""What is folded in behind a layer, and what is not: BatchNorms, pooling and activations in the forms that people write."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nettrim import calibration
from nettrim.tracing import TracedLayer, trace


class Net(nn.Module):
    """A convolution ``a`` or a linear layer ``l``, a BatchNorm ``n`` of as many outputs, and a forward given as a function."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], outputs: int = 4) -> None:
        super().__init__()
        self.a, self.l = nn.Conv2d(2, outputs, 3), nn.Linear(5, outputs)
        self.n, self.m = nn.BatchNorm2d(outputs), nn.BatchNorm1d(outputs)
        self.other, self.live = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs, track_running_stats=False)
        for norm in (self.n, self.m, self.other):
            norm.running_mean.uniform_(-1, 1)
            norm.running_var.uniform_(0.5, 2)
            norm.weight.data.uniform_(-1, 1)
        self.function = forward

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def traced(forward: Callable[[Any, Tensor], Any], x: Tensor | None = None, outputs: int = 4) -> tuple[TracedLayer, Net]:
    torch.manual_seed(0)
    model = Net(forward, outputs)
    x = torch.randn(6, 2, 5, 7) if x is None else x
    found = trace(model, calibration.batches([x, x[:3]]), calibration.runner())
    return next(layer for layer in found.layers if layer.name in "al"), model


LINEAR = torch.randn(6, 3, 5)
WITH: dict[str, tuple[Callable[[Any, Tensor], Any], str | None, Tensor | None]] = {
    "conv": (lambda n, x: n.n(n.a(x)), None, None),
    "conv relu": (lambda n, x: F.relu(n.n(n.a(x))), "relu", None),
    "in place": (lambda n, x: n.n(n.a(x)).relu_(), "relu", None),
    "channels last": (lambda n, x: F.relu(n.n(n.a(x.to(memory_format=torch.channels_last)))), "relu", None),
    "copied in between": (lambda n, x: F.relu(n.n(n.a(x).contiguous(memory_format=torch.channels_last))), "relu", None),
    "pooled": (lambda n, x: F.relu(F.max_pool2d(n.n(n.a(x)), 2)), "relu", None),
    "a sum behind": (lambda n, x: F.relu(n.n(n.a(x)) + 1), None, None),
    "used twice behind the ReLU": (lambda n, x: (lambda h: h + h.mean())(F.relu(n.n(n.a(x)))), "relu", None),
    "another norm behind": (lambda n, x: F.relu(n.other(n.n(n.a(x)))), None, None),
    "functional": (lambda n, x: F.relu(F.batch_norm(n.a(x), n.n.running_mean, n.n.running_var, n.n.weight, n.n.bias)), "relu", None),
    "tokens, channels moved": (lambda n, x: F.relu(n.m(n.l(x).transpose(1, 2))), "relu", LINEAR),
    "tokens, flattened": (lambda n, x: F.relu(n.m(n.l(x).flatten(0, 1))), "relu", LINEAR),
    "one sample without a batch dimension": (lambda n, x: F.gelu(n.n(n.a(x[0])[None])), "gelu", None),
}


@pytest.mark.parametrize("name", WITH)
@pytest.mark.parametrize("outputs", (4, 1))
def test_a_batchnorm_is_folded_in(name: str, outputs: int) -> None:
    forward, activation, x = WITH[name]
    layer, model = traced(forward, x, outputs)
    assert layer.norm is not None and layer.activation == activation
    norm = model.n if layer.name == "a" else model.m
    z = torch.randn(50, outputs, 1, 1) if layer.name == "a" else torch.randn(50, outputs)
    shape = (1, -1, 1, 1)[: z.dim()]
    expected = norm.eval()(z).detach().double()
    torch.testing.assert_close(z.double() * layer.norm.scale.view(shape) + layer.norm.shift.view(shape), expected, rtol=1e-5, atol=1e-5)


WITHOUT: dict[str, tuple[Callable[[Any, Tensor], Any], str | None, Tensor | None]] = {
    "statistics of the batch": (lambda n, x: F.relu(n.live(n.a(x))), None, None),
    "two readers": (lambda n, x: F.relu(n.n(h := n.a(x))) + h.mean(), None, None),
    "two norms": (lambda n, x: F.relu(n.n(h := n.a(x))) + n.other(h), None, None),
    "behind a maximum, which a negative scale turns": (lambda n, x: F.relu(n.n(F.max_pool2d(n.a(x), 2))), None, None),
    "behind the ReLU": (lambda n, x: n.n(F.relu(n.a(x))), "relu", None),
    "other dimensions, of the same size": (lambda n, x: F.relu(n.m(n.l(x))), None, torch.randn(6, 4, 5)),
    "half of them": (lambda n, x: F.relu(n.n(n.a(torch.cat([x, x]))[: len(x)])), None, None),
}


@pytest.mark.parametrize("name", WITHOUT)
def test_a_batchnorm_that_says_something_else_is_not(name: str) -> None:
    forward, activation, x = WITHOUT[name]
    layer, _ = traced(forward, x)
    assert layer.norm is None and layer.activation == activation


def test_statistics_that_change_between_batches_are_not_folded_in() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        mean = net.n.running_mean + float(len(x) < 5)
        return F.relu(F.batch_norm(net.a(x), mean, net.n.running_var))

    layer, _ = traced(forward)
    assert layer.norm is None and layer.activation is None


ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], str | None]] = {
    "relu6": (F.relu6, "relu6"),
    "hardtanh": (lambda z: F.hardtanh(z, -2, 3), "hardtanh"),
    "leaky": (lambda z: F.leaky_relu(z, 0.3), "leaky_relu"),
    "steep leaky": (lambda z: F.leaky_relu(z, 2.5), "leaky_relu"),
    "elu": (lambda z: F.elu(z, 1.7), "elu"),
    "tanh": (torch.tanh, "tanh"),
    "sigmoid in place": (lambda z: z.sigmoid_(), "sigmoid"),
    "hardsigmoid": (F.hardsigmoid, "hardsigmoid"),
    "gelu": (F.gelu, "gelu"),
    "gelu with tanh": (lambda z: F.gelu(z, approximate="tanh"), "gelu"),
    "silu in place": (lambda z: F.silu(z, inplace=True), "silu"),
    "mish": (F.mish, "mish"),
    "hardswish": (F.hardswish, "hardswish"),
    "selu is another function": (F.selu, None),
    "softplus is not known": (F.softplus, None),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_is_what_it_computes_and_as_steep_as_is_said(name: str) -> None:
    function, expected = ACTIVATIONS[name]
    layer, _ = traced(lambda n, x: function(n.a(x)) * 1)
    assert layer.activation == expected
    if layer.function is None:
        return
    z = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    out = function(z.clone())
    torch.testing.assert_close(layer.function(z), out, rtol=0, atol=0)
    slope = float((out.diff() / z.diff()).abs().max())
    assert 0.98 * layer.function.lipschitz <= slope <= layer.function.lipschitz * (1 + 1e-9)
    assert not layer.function.monotone or bool((out.diff() >= 0).all())


@pytest.mark.parametrize(
    ("pool", "followed"),
    (
        (lambda z: F.max_pool2d(z, 2), True),
        (lambda z: F.adaptive_max_pool2d(z, 1), True),
        (lambda z: F.max_pool1d(z.flatten(1)[:, None], 3), True),
        (lambda z: F.avg_pool2d(z, 2), False),
        (lambda z: z.amax((2, 3)), False),
    ),
)
def test_maxima_change_places_with_what_never_falls(pool: Callable[[Tensor], Tensor], followed: bool) -> None:
    assert traced(lambda n, x: F.relu(pool(n.a(x))))[0].activation == ("relu" if followed else None)
    assert traced(lambda n, x: F.leaky_relu(pool(n.a(x))))[0].activation == ("leaky_relu" if followed else None)
    assert traced(lambda n, x: F.gelu(pool(n.a(x))))[0].activation is None  # it falls first
    assert traced(lambda n, x: (lambda h: F.relu(pool(h)) + h.mean())(n.a(x)))[0].activation is None
    assert traced(lambda n, x: (lambda h: F.relu(h) + h.mean())(pool(n.a(x))))[0].activation is None
