"""2:4 results and torch's semi-structured form: what prune gives converts and converts back bit for bit; what breaks a rule is named."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from networks import bits, chain, samples
from torch import Tensor, nn
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

import nettrim
from nettrim import semi_structured, sparsify
from nettrim.timing import Timing

HALVES = [torch.float16, torch.bfloat16]


def round_trip(weight: Tensor) -> Tensor:
    """Through torch's own conversion, which runs on a CPU too."""
    packed, meta = sparse_semi_structured_from_dense_cutlass(weight)
    assert packed.shape == (weight.shape[0], weight.shape[1] // 2)
    return sparse_semi_structured_to_dense_cutlass(packed, meta)


def patterned(rows: int = 64, columns: int = 128, dtype: torch.dtype = torch.float16) -> Tensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[:, ::2] = 0
    return weight


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("mode", ["cascade", "parallel"])
@pytest.mark.parametrize("cast", ["before", "after"])
def test_a_pruned_result_passes_torchs_rules_and_comes_back_bit_for_bit(dtype: torch.dtype, mode: str, cast: str) -> None:
    model = chain(128, 64, 64, dtype=dtype if cast == "before" else torch.float32)
    result = nettrim.prune(model, samples(160, 128), pattern="2:4", mode=mode)
    for name, mask in result.masks.items():
        weight = result.model.get_parameter(name).detach().to(dtype)
        assert semi_structured.refusal(weight) is None
        assert torch.equal(bits(round_trip(weight)), bits(weight)) and 2 * int(mask.sum()) == mask.numel()


def test_of_2_to_4_in_float32_torch_would_drop_values_without_a_word() -> None:
    result = nettrim.prune(chain(64, 64), samples(160, 64), pattern="2:4")
    weight = result.model.get_parameter("0.weight").detach()
    assert not torch.equal(round_trip(weight), weight)  # why the rules are asked first
    assert "torch.float32 has no form of 2:4" in str(semi_structured.refusal(weight))


def test_one_value_too_many_is_counted() -> None:
    weight = patterned()
    assert semi_structured.refusal(weight) is None
    weight[3, 4] = weight[9, 0] = 1.0
    assert "2 groups of 4 inputs hold more than 2" in str(semi_structured.refusal(weight))
    assert not torch.equal(round_trip(weight), weight)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(64, 128), (32, 64), (16, 16), (32, 32), (48, 48), (31, 64), (32, 60), (64, 8)])
def test_shapes_and_dtypes_are_those_that_torch_takes(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """Against the validation that torch's tensors run first, of either backend, with a device that it takes."""
    weight = torch.zeros(shape, dtype=dtype)
    taken = False
    for backend in (SparseSemiStructuredTensorCUTLASS, SparseSemiStructuredTensorCUSPARSELT):
        stand_in: Any = SimpleNamespace(is_cuda=True, dim=weight.dim, is_contiguous=weight.is_contiguous, dtype=dtype, shape=weight.shape)
        try:
            backend._validate_device_dim_dtype_shape(stand_in)
            taken = True
        except RuntimeError:
            pass
    assert (semi_structured.refusal(weight) is None) == taken


def test_a_cpu_layer_and_an_old_device_are_left_with_their_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(128, 64, dtype=torch.float16)
    assert "for CUDA devices, and it is on 'cpu'" in str(semi_structured.convert(layer))
    cuda = _on_cuda(layer)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "compute capability (7, 5)" in str(semi_structured.convert(cuda))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert "hold more than 2" in str(semi_structured.convert(cuda))


def _on_cuda(layer: nn.Linear) -> Any:
    """What `convert` reads of a layer, with a weight that says it is on a CUDA device."""

    class Elsewhere(Tensor):
        device = SimpleNamespace(type="cuda")  # type: ignore[assignment]

    weight = layer.weight.detach().as_subclass(Elsewhere)
    return SimpleNamespace(weight=weight, bias=layer.bias, in_features=layer.in_features, out_features=layer.out_features, training=False)


def test_what_torch_refuses_or_changes_is_a_reason_not_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(128, 64, dtype=torch.float16)
    layer.weight.data = patterned()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    def refuse(weight: Tensor) -> Tensor:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", refuse)
    assert semi_structured.convert(_on_cuda(layer)) == "torch refused it: no such kernel"
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda weight: weight + 1)
    assert semi_structured.convert(_on_cuda(layer)) == "torch's semi-structured form holds other values"


def test_a_conversion_is_timed_as_any_other_form_and_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of a 2:4 layer through to_sparse and to_dense, with torch's packed tensor of the CPU."""
    model = chain(128, 64, bias=True, dtype=torch.float16)
    model[0].weight.data = patterned()

    def convert(linear: nn.Linear) -> nn.Linear:
        other = copy.deepcopy(linear)
        packed, meta = sparse_semi_structured_from_dense_cutlass(linear.weight.detach())
        tensor = SparseSemiStructuredTensorCUTLASS(linear.weight.shape, packed, meta, None, None, None)
        other.weight = nn.Parameter(tensor, requires_grad=False)
        return other

    monkeypatch.setattr(semi_structured, "convert", convert)
    monkeypatch.setattr(sparsify, "_forms", lambda linear, nonzeros: {"2:4": semi_structured.convert(linear)})
    monkeypatch.setattr(sparsify, "_check_same", lambda *args: None)  # there is no product of it on a CPU
    monkeypatch.setattr(sparsify, "compare", lambda calls, cpu: {form: Timing(1.0, 1.5) for form in calls})
    sparse = nettrim.to_sparse(model, batch=64)
    (layer,) = sparse.nettrim_sparse_report.layers
    assert layer.form == "2:4" and semi_structured.is_converted(sparse[0])
    assert layer.dense_bytes == 2 * 64 * 129 and layer.bytes == 64 * 64 * 2 + 64 * 128 // 16 * 2 + 2 * 64  # values, 4 bits a group, bias
    (layer,) = nettrim.to_sparse(sparse).nettrim_sparse_report.layers
    assert layer.reason == "it has a semi-structured form already" and layer.nonzeros is None
    assert torch.equal(nettrim.to_dense(sparse)[0].weight, model[0].weight)
