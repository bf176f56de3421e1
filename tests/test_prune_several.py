"""Pruning modules that hold several matrices: attention, recurrent layers and their cells."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import by_name, solved_on
from torch import Tensor, nn
from torch.nn import functional as F

from nettrim import PruneResult, layers, prune
from nettrim.layers import Call


class Recurrent(nn.Module):
    def __init__(self, kind: Any, **options: Any) -> None:
        super().__init__()
        self.rnn = kind(5, 6, batch_first=True, **options)
        width = (options.get("proj_size") or 6) * (1 + options.get("bidirectional", False))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class Cells(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.cell, self.head = kind(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


class Attending(nn.Module):
    """Attention of one sequence to a shorter one of another width, a residual sum and a head."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, kdim=5, vdim=5, batch_first=True, **options)
        self.first, self.head = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.zeros(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        h = self.first(x)
        return self.head(h + self.attention(h, x, x, attn_mask=mask, need_weights=False)[0])


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "RNN": lambda: Recurrent(nn.RNN, nonlinearity="relu"),
    "LSTM": lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True),
    "LSTM with a projection": lambda: Recurrent(nn.LSTM, proj_size=4),
    "GRU": lambda: Recurrent(nn.GRU, bias=False),
    "LSTM cell": lambda: Cells(nn.LSTMCell),
    "GRU cell": lambda: Cells(nn.GRUCell),
    "attention": Attending,
    "attention without bias": lambda: Attending(bias=False),
    "an encoder": lambda: nn.TransformerEncoderLayer(5, 1, 12, batch_first=True, activation="gelu"),
}


def calls(model: nn.Module, name: str, x: Tensor) -> list[Call]:
    seen: list[Call] = []
    handle = model.get_submodule(name).register_forward_hook(lambda m, args, kwargs, out: seen.append(Call(args, kwargs, out)), with_kwargs=True)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    with torch.no_grad():
        model.eval()(x)
    torch.backends.mha.set_fastpath_enabled(fast)
    handle.remove()
    return seen


def check(model: nn.Module, result: PruneResult, x: Tensor) -> None:
    """Parallel mode: every promise from the dense network's own rows and the stored matrices."""
    dense = layers.matrices(model)
    stored = layers.matrices(result.model)
    assert {layer.name for layer in result.report.layers} == set(dense)
    for layer in result.report.layers:
        matrix = dense[layer.name]
        owner = layer.name.removesuffix(f".{matrix.part.label}") if matrix.part.label else layer.name
        seen = calls(model, owner, x)
        A = torch.cat([matrix.input_rows(call) for call in seen]).detach().double()
        change = stored[layer.name].as_matrix().double() - matrix.as_matrix().double()
        difference = A @ change.T
        if layer.activation == "gelu":
            Z = A @ matrix.as_matrix().double().T
            difference = F.gelu(Z + difference) - F.gelu(Z)
        assert layer.rows == len(A)
        assert layer.discrepancy == pytest.approx(float(difference.norm()), rel=1e-3, abs=1e-5), layer.name
        assert layer.discrepancy <= layer.epsilon
        assert layer.shape == matrix.shape and layer.nonzeros == int((stored[layer.name].weights() != 0).sum())


def data(name: str) -> Tensor:
    torch.manual_seed(3)
    return torch.randn(60, 4, 5)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("options", ({"epsilon": 0.2}, {"sparsity": 0.5}), ids=str)
def test_the_callers_random_numbers_are_left_alone(name: str, options: dict[str, Any]) -> None:
    """Nothing is drawn from the process's generator: what another thread draws meanwhile is what it would be."""
    x, model = data(name), NETWORKS[name]()
    before = torch.get_rng_state()
    prune(model, x, **options)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_promise_of_every_matrix_is_kept(name: str) -> None:
    x = data(name)
    model = NETWORKS[name]().eval()
    for options in ({"epsilon": 0.2}, {"sparsity": 0.5, "allocation": "uniform"}):
        result = prune(model, x, mode="parallel", **options)
        assert not result.report.skipped and result.report.certificate.holds
        assert "no product with one matrix" in result.report.certificate.explanation or "more than once" in result.report.certificate.explanation
        check(model, result, solved_on(x)[0])
        assert result.report.density < 0.97
    every = {key for key, parameter in model.named_parameters() if "weight" in key and parameter.dim() > 1}
    assert set(result.masks) == every
    for key, mask in result.masks.items():
        assert torch.equal(mask, result.model.get_parameter(key) != 0)


@pytest.mark.parametrize("name", NETWORKS)
def test_cascade_and_one_sparsity_for_all(name: str) -> None:
    x = data(name)
    model = NETWORKS[name]().eval()
    result = prune(model, x, sparsity=0.4)
    entries = sum(math.prod(layer.shape) for layer in result.report.layers)
    assert abs(sum(layer.nonzeros for layer in result.report.layers) - 0.6 * entries) <= 1
    assert result.report.certificate.holds
    budgeted = prune(model, x, epsilon=0.1)
    assert budgeted.report.certificate.holds and budgeted.report.certificate.relative_measured < 0.5
    # one matrix after the other: where a recurrent module has lost weights, its states are those that it now goes through
    dense, there = layers.matrices(model), layers.matrices(budgeted.model)
    last = budgeted.report.layers[-1]
    if last.name == "head":
        solved = solved_on(x)[0]
        A, Z = (calls(m, "head", solved)[0] for m in (budgeted.model, model))
        out = there["head"].input_rows(A) @ there["head"].as_matrix().T - dense["head"].output_rows(Z)
        assert last.discrepancy == pytest.approx(float(out.norm()), rel=1e-3)


def test_in_a_cascade_the_states_are_those_of_the_module_pruned_so_far() -> None:
    """The recurrent matrix of an LSTM sees the states that the pruned input matrix and the dense recurrent one make."""
    x = data("LSTM")
    torch.manual_seed(0)
    model = Recurrent(nn.LSTM).eval()
    result = prune(model, x, epsilon=0.3, holdout=0)
    halfway = copy.deepcopy(model)
    halfway.rnn.weight_ih_l0.data.copy_(result.model.rnn.weight_ih_l0)
    halfway.rnn.bias_ih_l0.data.copy_(result.model.rnn.bias_ih_l0)
    recurrent = layers.matrix(model, "rnn.weight_hh_l0")
    A = recurrent.of(halfway.rnn).input_rows(calls(halfway, "rnn", x)[0]).double()
    target = recurrent.output_rows(calls(model, "rnn", x)[0]).double()
    stored = layers.matrix(result.model, "rnn.weight_hh_l0").as_matrix().double()
    layer = by_name(result)["rnn.weight_hh_l0"]
    assert layer.discrepancy == pytest.approx(float((A @ stored.T - target).norm()), rel=1e-3)
    dense = float((A @ recurrent.as_matrix().double().T - target).norm())
    assert layer.epsilon == pytest.approx(math.sqrt(1.1) * dense, rel=1e-3)


def test_names_types_and_patterns_choose_matrices() -> None:
    x = data("LSTM")
    model = Recurrent(nn.LSTM).eval()
    both = ["rnn.weight_ih_l0", "rnn.weight_hh_l0"]
    for targets, chosen in (("rnn", both), (nn.LSTM, both), ("rnn.weight_hh_l0", both[1:]), ("*hh*", both[1:]), (nn.Linear, ["head"])):
        result = prune(model, x, sparsity=0.5, targets=targets)
        assert [layer.name for layer in result.report.layers] == chosen
        assert set(result.report.skipped) == {*both, "head"} - set(chosen)
    result = prune(model, x, epsilon={"rnn": 0.3, "rnn.weight_hh_l0": 0.1, "head": 0.2}, mode="parallel")
    assert {layer.name: round(layer.epsilon * layer.relative_discrepancy / layer.discrepancy, 3) for layer in result.report.layers} == {
        "rnn.weight_ih_l0": 0.3, "rnn.weight_hh_l0": 0.1, "head": 0.2,
    }  # fmt: skip
    with_two = prune(NETWORKS["attention"](), x, pattern="1:2", ignore=["attention.in_proj_*", "first"])
    kept = layers.matrix(with_two.model, "attention.out_proj").weights() != 0
    assert bool((kept.view(6, 3, 2).sum(2) == 1).all()) and "ignored, as asked" in with_two.report.skipped["attention.in_proj_q"]


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(5, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, torch.full((len(x),), x.shape[1]), batch_first=True)
        return self.head(self.rnn(packed)[1][0])


def test_what_cannot_be_read_is_skipped_by_name() -> None:
    result = prune(Packed(), data("GRU"), sparsity=0.5)
    assert [layer.name for layer in result.report.layers] == ["head"]
    for name in ("rnn.weight_ih_l0", "rnn.weight_hh_l0"):
        assert "PackedSequence" in result.report.skipped[name]


def test_a_gpt2_of_hugging_face() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=50, n_positions=16)
    model = transformers.GPT2LMHeadModel(config).eval()
    tokens = {"input_ids": torch.randint(0, 50, (40, 8))}
    result = prune(model, tokens, sparsity=0.5, forward_fn=lambda model, batch: model(**batch, use_cache=False).logits)
    names = [layer.name for layer in result.report.layers]
    assert names == [f"transformer.h.{block}.{part}" for block in (0, 1) for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
    assert by_name(result)["transformer.h.0.attn.c_attn"].shape == (48, 16)
    assert result.masks["transformer.h.0.attn.c_attn.weight"].shape == (16, 48)
    assert "shared with" in result.report.skipped["lm_head"] and "looks its weights up" in result.report.skipped["transformer.wpe"]
    assert result.report.certificate.holds
    for layer in result.report.layers:
        assert layer.activation is None  # GPT-2 writes its GELU out, as a formula
