"""A layer as a matrix and back: exact in every dtype, refused by name where it cannot be."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nettrim import layers
from nettrim.errors import ArgumentError
from nettrim.precision import all_finite

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(torch.uint8)


def random_layer(inputs: int, outputs: int, bias: bool, dtype: torch.dtype, seed: int = 0) -> nn.Linear:
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(inputs, outputs, bias=bias).to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            # exponents over the whole range of the dtype, subnormals and signed zeros among them
            exponent = torch.empty(parameter.shape, dtype=torch.float64).uniform_(-24, 15, generator=generator)
            sign = torch.randint(-1, 2, parameter.shape, generator=generator)
            parameter.copy_((sign * 2**exponent).to(dtype))
    return layer


@settings(max_examples=60, deadline=None)
@given(
    inputs=st.integers(1, 7),
    outputs=st.integers(1, 7),
    bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_write_back_of_as_matrix_is_the_identity_bit_for_bit(
    inputs: int, outputs: int, bias: bool, dtype: torch.dtype, seed: int
) -> None:
    layer = random_layer(inputs, outputs, bias, dtype, seed)
    before = {name: bits(parameter).clone() for name, parameter in layer.named_parameters()}
    identities = {name: id(parameter) for name, parameter in layer.named_parameters()}
    matrix = layers.as_matrix(layer)
    assert matrix.shape == (outputs, inputs + bias) and matrix.dtype == dtype
    layers.write_back(layer, matrix)
    layers.write_back(layer, matrix.to(torch.float64))
    for name, parameter in layer.named_parameters():
        assert torch.equal(bits(parameter), before[name])
        assert id(parameter) == identities[name] and parameter.requires_grad


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 4), min_size=0, max_size=3),
    inputs=st.integers(1, 5),
    outputs=st.integers(1, 5),
    bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_rows_times_the_matrix_are_the_layers_output(
    shape: list[int], inputs: int, outputs: int, bias: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(inputs, outputs, bias=bias).to(dtype)
    x = torch.randn(*shape, inputs).to(dtype)
    out = layer(x)
    a, z = layers.input_rows(layer, x), layers.output_rows(layer, out)
    assert a.shape == (math.prod(shape), inputs + bias) and z.shape == (math.prod(shape), outputs)
    product = a.double() @ layers.as_matrix(layer).double().T
    tolerance = 16 * torch.finfo(dtype).eps * (1 + float(product.abs().max()))
    assert torch.allclose(product, z.double(), atol=tolerance)
    wide = a.to(layers.compute_dtype(layer))
    stored = layers.forward_rows(layer, wide)
    assert stored.dtype == layers.compute_dtype(layer) and not stored.requires_grad
    assert torch.allclose(stored, z.to(stored.dtype), atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_as_matrix_is_a_copy_and_compute_dtype_is_at_least_float32(dtype: torch.dtype) -> None:
    layer = nn.Linear(3, 2, bias=False).to(dtype)
    before = layer.weight.detach().clone()
    layers.as_matrix(layer).zero_()
    assert torch.equal(layer.weight, before)
    assert layers.compute_dtype(layer) == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_forward_rows_runs_in_chunks_without_hooks_and_takes_no_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(3, 2)
    layer.register_forward_hook(lambda *_: pytest.fail("a hook was run"))
    a = torch.cat([torch.randn(11, 3), torch.ones(11, 1)], 1)
    whole = layers.forward_rows(layer, a)
    monkeypatch.setattr("nettrim.layers.views.ROWS_PER_CHUNK", 4)
    assert torch.allclose(layers.forward_rows(layer, a), whole)
    assert layers.forward_rows(layer, a[:0]).shape == (0, 2)
    with pytest.raises(ArgumentError, match=r"\(11, 3\).*\(P, 4\).*column of ones"):
        layers.forward_rows(layer, a[:, :3])


@pytest.mark.parametrize(
    ("value", "message"),
    [(math.nan, "'bias' holds NaN"), (math.inf, "'bias' holds NaN"), (7e4, "'bias'.*beyond the range")],
)
def test_write_back_refuses_and_writes_nothing(value: float, message: str) -> None:
    layer = nn.Linear(3, 2).half()
    before = layers.as_matrix(layer)
    matrix = torch.zeros(2, 4)
    matrix[1, 3] = value
    with pytest.raises(ArgumentError, match=message):
        layers.write_back(layer, matrix)
    with pytest.raises(ArgumentError, match=r"\(2, 3\).*\(2, 4\)"):
        layers.write_back(layer, torch.zeros(2, 3))
    assert torch.equal(layers.as_matrix(layer), before)


class Inheriting(nn.Linear):
    pass


class Overriding(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 2


def test_subclasses_count_when_they_inherit_the_forward() -> None:
    assert layers.is_supported(nn.Linear(2, 2)) and layers.is_supported(Inheriting(2, 2))
    patched = nn.Linear(2, 2)
    patched.forward = lambda x: x  # type: ignore[method-assign]
    for module in (Overriding(2, 2), patched, nn.Bilinear(1, 1, 1)):
        assert not layers.is_supported(module)
        with pytest.raises(ArgumentError, match=type(module).__name__):
            layers.as_matrix(module)
    assert "replaces" in layers.unsupported_reason(Overriding(2, 2))
    assert "Bilinear" in layers.unsupported_reason(nn.Bilinear(1, 1, 1))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("key", ["weight", "bias"])
def test_check_parameters_names_nan_and_infinity(bad: float, key: str) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))
    layers.check_parameters(model)
    with torch.no_grad():
        model.get_parameter(f"2.{key}").view(-1)[1] = bad
    with pytest.raises(ArgumentError, match=rf"'2\.{key}' holds 1 NaN or infinite"):
        layers.check_parameters(model)


def test_check_parameters_names_what_holds_no_values() -> None:
    with pytest.raises(ArgumentError, match=r"'0\.weight' is on the meta device"):
        layers.check_parameters(nn.Sequential(nn.Linear(3, 2, device="meta")))
    with pytest.raises(ArgumentError, match=r"'0\.weight' is not initialised"):
        layers.check_parameters(nn.Sequential(nn.LazyLinear(2)))


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_check_parameters_names_quantised_weights() -> None:
    layer = nn.Linear(3, 2)
    layer.weight = nn.Parameter(torch.ones(2, 3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ArgumentError, match=r"'0\.weight' has dtype torch.int8"):
        layers.check_parameters(nn.Sequential(layer))
    quantised = nn.Module()
    quantised.register_buffer("weight", torch.quantize_per_tensor(torch.ones(2, 3), 0.1, 0, torch.qint8))
    with pytest.raises(ArgumentError, match=r"'0\.weight' is quantised"):
        layers.check_parameters(nn.Sequential(quantised))


@pytest.mark.parametrize("dtype", (torch.float16, torch.float32))
def test_numbers_whose_sum_overflows_are_finite(dtype: torch.dtype) -> None:
    large = torch.full((40, 30), 0.9 * torch.finfo(dtype).max, dtype=dtype)
    assert all_finite(large) and all_finite(-large) and all_finite(torch.cat([large, -large]))
    for bad in (torch.nan, torch.inf, -torch.inf):
        large[3, 4] = bad
        assert not all_finite(large) and not all_finite(torch.cat([large, -large]))
    assert all_finite(torch.empty(0, dtype=dtype))
