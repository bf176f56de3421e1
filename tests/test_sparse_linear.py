"""SparseLinear against nn.Linear: every shape, dtype and form; its state, copies and casts; compile, export and gradients."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nettrim import ArgumentError, SparseLinear

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def linear(inputs: int = 16, outputs: int = 24, kept: float = 0.2, bias: bool = True, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    layer = nn.Linear(inputs, outputs, bias=bias)
    with torch.no_grad():
        layer.weight.masked_fill_(torch.rand(outputs, inputs) >= kept, 0)
    return layer.to(dtype)


def close(found: Tensor, expected: Tensor) -> bool:
    tolerance = TOLERANCE[expected.dtype]
    same = found.dtype == expected.dtype and found.shape == expected.shape and found.is_contiguous()
    return same and torch.allclose(found.double(), expected.double(), rtol=tolerance, atol=tolerance)


@dtypes
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("block", [1, 4, 8])
@pytest.mark.parametrize("kept", [0.0, 0.2, 1.0])
def test_it_computes_what_the_dense_layer_does(dtype: torch.dtype, bias: bool, block: int, kept: float) -> None:
    dense = linear(kept=kept, bias=bias, dtype=dtype)
    sparse = SparseLinear.from_linear(dense, block)
    for shape in ((16,), (1, 16), (5, 16), (2, 3, 16), (1, 1, 16), (0, 16), (2, 0, 16), (1, 1, 1, 16)):
        x = torch.randn(shape).to(dtype)
        assert close(sparse(x), dense(x)), shape
    x = torch.randn(16, 6).to(dtype).t()  # not contiguous
    assert close(sparse(x), dense(x)) and close(sparse(x[::2]), dense(x[::2]))
    back = sparse.to_linear()
    assert torch.equal(back.weight, dense.weight) and back.weight.dtype == dtype
    assert back.bias is None if dense.bias is None else torch.equal(back.bias, dense.bias)
    assert torch.equal(sparse.weight, dense.weight)
    assert sparse.form == ("csr" if block == 1 else f"bsr {block}x{block}")


@dtypes
def test_autocast_gives_the_dtype_that_a_dense_layer_gives(dtype: torch.dtype) -> None:
    dense = linear(dtype=dtype)
    sparse = SparseLinear.from_linear(dense)
    for rows in (1, 5):
        x = torch.randn(rows, 16).to(dtype)
        with torch.autocast("cpu", torch.bfloat16):
            found, expected = sparse(x), dense(x)
            assert found.dtype == expected.dtype == (torch.float64 if dtype == torch.float64 else torch.bfloat16)
            torch.testing.assert_close(found, expected, rtol=4e-2, atol=4e-2)
            if dtype == torch.float32:  # what an autocast layer before this one would hand on
                assert sparse(x.bfloat16()).dtype == torch.bfloat16


def test_the_state_is_saved_and_loaded_whatever_the_number_of_nonzeros() -> None:
    first, second = (nn.Sequential(SparseLinear.from_linear(linear(kept=kept, seed=seed))) for kept, seed in ((0.2, 1), (0.5, 2)))
    blocks = nn.Sequential(SparseLinear.from_linear(linear(kept=0.1, seed=3), 4))
    x = torch.randn(3, 16)
    first(x)  # its matrix is made, and must not be used after the load
    for source in (second, blocks):
        file = io.BytesIO()
        torch.save(source.state_dict(), file)
        file.seek(0)
        first.load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(first(x), source(x)) and torch.equal(first(x[:1]), source(x[:1]))
    assert list(second.state_dict()) == ["0.crow", "0.columns", "0.values", "0.bias"]
    second.load_state_dict(blocks.state_dict(), assign=True)
    assert torch.equal(second(x), blocks(x))
    file = io.BytesIO()
    torch.save(second, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), blocks(x))


def broken(**changes: Any) -> dict[str, Tensor]:
    state = SparseLinear.from_linear(linear()).state_dict()
    return {key: changes[key](value.clone()) if key in changes else value for key, value in state.items()}


def with_entry(index: int, value: int) -> Any:
    def change(tensor: Tensor) -> Tensor:
        tensor[index] = value
        return tensor

    return change


BROKEN = {
    "column out of range": {"columns": with_entry(3, 10_000_000)},
    "negative column": {"columns": with_entry(3, -5)},
    "rows beyond the end": {"crow": with_entry(-1, 10_000_000)},
    "rows that go back": {"crow": with_entry(2, 60)},
    "too few rows": {"crow": lambda tensor: tensor[:-1]},
    "values cut off": {"values": lambda tensor: tensor[:-1]},
    "long indices": {"columns": lambda tensor: tensor.long()},
    "whole values": {"values": lambda tensor: tensor.int()},
    "flat blocks": {"values": lambda tensor: tensor[:, None]},
    "oblong blocks": {"values": lambda tensor: tensor[:, None, None].expand(-1, 2, 3)},
}


@pytest.mark.parametrize("name", BROKEN)
def test_indices_that_would_read_elsewhere_are_refused(name: str) -> None:
    state = broken(**BROKEN[name])
    layer = SparseLinear.from_linear(linear(seed=5))
    x = torch.randn(2, 16)
    before = layer(x)
    with pytest.raises(RuntimeError, match="crow, columns and values|values have shape"):
        layer.load_state_dict(state)
    assert torch.equal(layer(x), before)
    with pytest.raises(ArgumentError):
        SparseLinear(16, 24, state["crow"], state["columns"], state["values"])


def test_a_state_without_a_key_says_so() -> None:
    layer = SparseLinear.from_linear(linear())
    with pytest.raises(RuntimeError, match="Missing key.*columns"):
        layer.load_state_dict({key: value for key, value in layer.state_dict().items() if key != "columns"})


def test_copies_casts_and_writes_are_seen() -> None:
    layer = SparseLinear.from_linear(linear())
    x = torch.randn(3, 16)
    before = layer(x)
    twin = copy.deepcopy(layer)
    twin.values.mul_(2)
    assert torch.equal(layer(x), before) and not torch.allclose(twin(x), before)
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        layer.to(dtype)
        out = layer(x.to(dtype))
        assert out.dtype == dtype and layer.values.dtype == layer.bias.dtype == dtype and layer.crow.dtype == torch.int32
    for dtype in (torch.float32, torch.bfloat16):  # bfloat16 is multiplied in float32, from a copy
        layer.to(dtype)
        layer(x.to(dtype))
        layer.values.mul_(2)
        layer.bias.zero_()
        expected = (x.to(dtype).double() @ layer.weight.double().t()).to(dtype)
        assert close(layer(x.to(dtype)), expected)
    layer.bias = torch.ones(24, dtype=torch.bfloat16)
    assert close(layer(x.bfloat16()) - 1, (layer(x.bfloat16()).double() - 1).bfloat16())
    with torch.inference_mode():
        inside = SparseLinear.from_linear(linear())
        assert torch.equal(inside(x), before)


def test_wrong_inputs_and_layers_are_refused() -> None:
    layer = SparseLinear.from_linear(linear())
    for x in (torch.randn(3, 15), torch.tensor(1.0), torch.randn(3, 16).double(), torch.ones(3, 16).long()):
        with pytest.raises(ArgumentError, match=r"expected torch.float32 \(..., 16\)"):
            layer(x)
    with pytest.raises(ArgumentError, match="not cut by blocks of 5x5"):
        SparseLinear.from_linear(linear(), 5)
    with pytest.raises(ArgumentError, match=r"bias is torch.float32 \(23,\); expected torch.float32 \(24,\)"):
        SparseLinear(16, 24, layer.crow, layer.columns, layer.values, torch.zeros(23))


def test_more_nonzeros_than_an_index_counts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nettrim.sparse_linear.LARGEST", 10)
    with pytest.raises(ArgumentError, match="more than 10 nonzeros"):
        SparseLinear.from_linear(linear())


def network() -> nn.Sequential:
    return nn.Sequential(SparseLinear.from_linear(linear()), nn.ReLU(), SparseLinear.from_linear(linear(24, 8, bias=False), 4))


def test_gradients_reach_the_inputs() -> None:
    dense, sparse = linear(), SparseLinear.from_linear(linear())
    for rows in (1, 3):
        x, y = (torch.ones(rows, 16).mul_(0.3).requires_grad_() for _ in range(2))
        dense(x).square().sum().backward()
        sparse(y).square().sum().backward()
        torch.testing.assert_close(x.grad, y.grad)


def test_compiled_it_is_one_operator() -> None:
    torch._dynamo.reset()
    model, x = network(), torch.randn(3, 16)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(x), model(x))
    with pytest.raises(Exception, match="no autograd formula"):  # loud, not a wrong gradient
        compiled(x.clone().requires_grad_()).sum().backward()


def test_repr_says_what_it_is() -> None:
    layer = SparseLinear.from_linear(linear(kept=1.0))
    assert repr(layer) == "SparseLinear(in_features=16, out_features=24, bias=True, nonzeros=384, form='csr')"
