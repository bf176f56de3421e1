"""What tracing leaves out, each with its reason."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_tracing import Net, by_name, chain, run_trace
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune


def tied(net: Any, x: Tensor) -> Tensor:
    return F.linear(net.c(net.a(x)), net.b.weight) + net.b(x)


SKIPPED: dict[str, tuple[Callable[[Any, Tensor], Any], dict[str, str]]] = {
    "called twice": (lambda net, x: net.c(net.b(net.a(net.a(x)))), {"a": "called 2 times"}),
    "never ran": (lambda net, x: net.c(net.a(x)), {"b": "never ran in the first calibration batch"}),
    "weight used elsewhere": (tied, {"b": "used outside its own forward, by aten.t"}),
    "weight used only": (lambda net, x: net.a(x) @ net.b.weight.T + net.c(x), {"b": "own forward never runs"}),
    "bias used elsewhere": (lambda net, x: net.c(net.b(net.a(x))) + net.b.bias, {"b": "bias is also used outside"}),
    "forward called directly": (lambda net, x: net.c(net.b.forward(net.a(x))), {"b": "own forward never runs"}),
}


@pytest.mark.parametrize("name", SKIPPED)
def test_layers_that_run_otherwise_are_skipped_with_the_reason(name: str) -> None:
    forward, reasons = SKIPPED[name]
    found = run_trace(Net(forward))
    assert set(found.skipped) == set(reasons)
    for layer, reason in reasons.items():
        assert reason in found.skipped[layer]
        if layer in by_name(found):
            assert by_name(found)[layer].skip_reason == found.skipped[layer]
    assert all(layer.skip_reason is None for layer in found.layers if layer.name not in reasons)


def test_the_output_of_a_layer_that_runs_twice_is_not_one_value() -> None:
    found = run_trace(Net(SKIPPED["called twice"][0]))
    assert [layer.reads for layer in found.layers] == [None, None, "b"]
    assert found.not_chain_reason == "layer 'a' runs more than once in a forward pass"


def test_shared_parameters_name_both() -> None:
    model = Net(chain)
    model.b.weight = model.a.weight
    model.c.bias.data = model.a.bias.data
    found = run_trace(model)
    assert (
        "weight is shared with 'b.weight'" in found.skipped["a"]
        and "bias is shared with 'c.bias'" in found.skipped["a"]
    )
    assert "'a.weight'" in found.skipped["b"] and "'a.bias'" in found.skipped["c"]
    assert found.chain

    model = Net(chain)
    model.alias = nn.Sequential(model.b)
    assert "the same module is registered as 'b' and 'alias.0'" in run_trace(model).skipped["b"]

    model = Net(chain)  # one flat buffer that holds all parameters, none of them shared
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(model.parameters()).detach(), model.parameters())
    assert not run_trace(model).skipped
    model = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6))
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(model.parameters()).detach(), model.parameters())
    assert not run_trace(model).skipped  # the norm's use of the buffer is no use of a layer's weights


def test_an_embedding_tied_to_the_head() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.body, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.body(self.embedding(ids)).relu())

    found = run_trace(Tied(), [torch.randint(9, (2, 5)), torch.randint(9, (3, 4))])
    assert "shared with 'embedding.weight'" in found.skipped["head"] and "Embedding" in found.skipped["embedding"]
    assert found.chain and by_name(found)["body"].skip_reason is None


def weight_norm(layer: nn.Linear) -> None:
    parametrizations.weight_norm(layer)


def old_weight_norm(layer: nn.Linear) -> None:
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(layer)


def pruning_mask(layer: nn.Linear) -> None:
    prune.l1_unstructured(layer, "weight", 0.5)


@pytest.mark.parametrize("change", [weight_norm, old_weight_norm, pruning_mask])
def test_a_reparametrised_weight_is_skipped_but_traced(change: Callable[[nn.Linear], None]) -> None:
    model = Net(chain)
    change(model.b)
    found = run_trace(model)
    assert list(found.skipped) == ["b"] and "its weight is computed from other parameters" in found.skipped["b"]
    assert found.chain and by_name(found)["b"].activation == "relu"


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_empty_layers_are_skipped() -> None:
    model = nn.Sequential(nn.Linear(6, 0), nn.ReLU(), nn.Linear(0, 3), nn.Linear(3, 2))
    found = run_trace(model)
    assert found.skipped == {"0": "empty: its weight has shape (0, 6)", "2": "empty: its weight has shape (3, 0)"}


class Doubling(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.eye(6))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix


def test_other_modules_that_hold_weights_are_named() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.bag, self.bilinear = nn.Embedding(3, 6), nn.EmbeddingBag(3, 6), nn.Bilinear(6, 6, 6)
            self.doubling, self.own, self.norm, self.fc = Doubling(6, 6), Own(), nn.LayerNorm(6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.own(self.doubling(self.bilinear(x, x))))
            index = torch.zeros(len(x), 1, dtype=torch.long)
            return self.fc(x + self.table(index)[:, 0] + self.bag(index))

    found = run_trace(Mixed())
    assert set(found.skipped) == {"table", "bag", "bilinear", "doubling", "own"}
    for name, words in {
        "table": "Embedding looks its weights up",
        "bag": "EmbeddingBag looks its weights up",
        "bilinear": "Bilinear is not a supported layer type",
        "doubling": "Doubling replaces nn.Linear's forward",
        "own": "Own is not",
    }.items():
        assert words in found.skipped[name]
    assert [layer.name for layer in found.layers] == ["fc"] and found.chain
    assert run_trace(nn.Sequential(Own())).not_chain_reason == "no supported layer ran"


def test_the_layers_of_a_transformer_encoder_run() -> None:
    encoder = nn.TransformerEncoderLayer(6, 2, 12, batch_first=True, activation="relu")
    found = run_trace(encoder, torch.randn(3, 4, 6))
    attention = [(f"self_attn.{part}", None) for part in ("in_proj_q", "in_proj_k", "in_proj_v", "out_proj")]
    assert [(layer.name, layer.activation) for layer in found.layers] == [*attention, ("linear1", "relu"), ("linear2", None)]
    assert by_name(found)["linear2"].reads == "linear1" and not found.skipped
    assert not found.chain
