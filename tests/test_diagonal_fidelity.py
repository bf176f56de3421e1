"""``fidelity="diagonal"``: every output weighed by itself, by gradients that take no more memory than a block of the network."""

from typing import Any

import pytest
import torch
from networks import chain, hooks_of, samples
from test_blockwise import TOKENS, Decoder, Mixer, decoder
from torch import Tensor, nn

from nettrim import ArgumentError, calibration, finding, prune, sensitivity, verify
from nettrim.metrics import Metric
from nettrim.sensitivity import output_metrics
from nettrim.tracing import trace


def metrics(model: nn.Module, inputs: Tensor, **asked: Any) -> dict[str, Metric]:
    batches = calibration.batches(list(inputs.split(4)))
    found = output_metrics(model, batches, calibration.runner(), trace(model, batches, calibration.runner()).layers, 0, **asked)  # type: ignore[arg-type]
    assert found is not None
    return found


def test_it_is_the_diagonal_of_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensitivity, "_DRAWS", 1)  # the same signs
    monkeypatch.setattr(Metric, "leading", Metric.of)
    whole, alone = metrics(decoder(), TOKENS), metrics(decoder(), TOKENS, diagonal=True)
    assert alone.keys() == whole.keys()
    for name, found in alone.items():
        assert whole[name].couples and not found.couples
        torch.testing.assert_close(found.own, whole[name].diagonal, rtol=1e-4, atol=0)


def test_it_serves_the_networks_output_less_than_the_matrix_and_more_than_the_layers_own() -> None:
    torch.manual_seed(0)
    model, inputs = chain(20, 30, 30, 4), samples(2000, 20)
    with torch.no_grad():  # outputs that the next layer reads to very different degrees
        model[2].weight.mul_(torch.logspace(-1, 1, 30))
    left = [prune(model, inputs, sparsity={"*": 0.8}, fidelity=how).report.certificate.relative_measured for how in ("network", "diagonal", "layer")]
    assert left[0] < left[1] < 0.8 * left[2]


def by_blocks(model: nn.Module, inputs: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Diagonals of all layers in blocks, from the whole network's gradients, and block by block."""
    batches, run = calibration.batches(list(inputs.split(4))), calibration.runner()
    chain = finding.find(model, *finding.candidates(model, "auto"), batches, run)
    wanted = [layer for layer in trace(model, batches, run).layers if chain.place(layer.module_name) is not None]
    found = [output_metrics(model, batches, run, wanted, 0, diagonal=True, chain=how) for how in (None, chain)]
    assert found[0] is not None and found[1] is not None and found[0].keys() == found[1].keys()
    return tuple({name: metric.own for name, metric in each.items()} for each in found)  # type: ignore[return-value]


class Inner(Mixer):
    """With layers whose matrices no module puts out."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.GRU(12, 12, batch_first=True)

    def mixed(self, hidden: Tensor, window: Tensor, turn: Tensor) -> Tensor:
        return super().mixed(self.again(hidden)[0], window, turn)


def of(kind: type[Mixer]) -> Decoder:
    model = decoder()
    torch.manual_seed(2)
    model.blocks = nn.ModuleList(kind() for _ in range(3))
    return model.eval()


class TestBlocks:
    def test_they_are_walked_back_one_by_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        walked: list[bool] = []
        inner = sensitivity._walked
        monkeypatch.setattr(sensitivity, "_walked", lambda *a: walked.append(inner(*a)) or walked[-1])
        model = decoder().train()
        expected, found = by_blocks(model, TOKENS)
        assert walked and all(walked)
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=0)
        assert model.training and hooks_of(model) == 0
        assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())

    def test_what_is_kept_for_the_gradients_is_of_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        sizes = [0]
        monkeypatch.setattr(sensitivity, "give_back", lambda: sizes.append(0))  # when a block is done

        def pack(tensor: Tensor) -> Tensor:
            sizes[-1] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            by_blocks(decoder(), TOKENS[:4])
        whole, *parts = (size for size in sizes if size)  # the head's is the first of the parts
        assert len(parts) == 3 and max(parts) < 0.5 * whole

    def test_one_through_which_no_gradient_comes(self) -> None:
        class Detaching(Mixer):
            def mixed(self, hidden: Tensor, window: Tensor, turn: Tensor) -> Tensor:
                return super().mixed(hidden, window, turn).detach()

        with pytest.raises(ArgumentError, match="no gradient comes through the network"):
            prune(of(Detaching), TOKENS, sparsity=0.5, fidelity="diagonal", targets="blocks.*")

    def test_where_other_layers_are_pruned_the_whole_network_is(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sensitivity, "_walked", lambda *a: pytest.fail("walked"))
        for model in (decoder(), of(Inner)):
            result = prune(model, list(TOKENS.split(4)), sparsity=0.5, fidelity="diagonal")
            assert verify(model, result.model, list(TOKENS.split(4)), result.report).holds

    @pytest.mark.parametrize("targets", ("blocks.*", "*"))
    def test_the_weights_are_those_of_the_whole_network(self, targets: str) -> None:
        asked: dict[str, Any] = {"sparsity": 0.5, "fidelity": "diagonal", "holdout": 0.0, "targets": targets}
        results = [prune(decoder(), list(TOKENS.split(4)), **asked, **how) for how in ({}, {"blocks": None})]  # type: ignore[arg-type]
        for one, other in zip(*(result.model.parameters() for result in results), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        assert verify(decoder(), results[0].model, list(TOKENS.split(4)), results[0].report).holds


@pytest.mark.parametrize("way", ("eager", "sdpa"))
@pytest.mark.parametrize("fidelity", ("network", "diagonal", "layer"))
def test_decoders_that_use_their_cache(way: str, fidelity: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 23}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, attn_implementation=way)).eval()
    mask = torch.ones_like(TOKENS)
    mask[::2, :2] = 0
    batches = [{"input_ids": tokens, "attention_mask": own} for tokens, own in zip(TOKENS.split(4), mask.split(4), strict=True)]
    result = prune(model, batches, sparsity=0.5, fidelity=fidelity, targets="model.layers.*")
    assert result.report.options["blocks"] == "model.layers: 2 blocks"
    assert verify(model, result.model, batches, result.report).holds


@pytest.mark.parametrize("neurons", (None, 7))
def test_where_every_output_has_its_own_number_of_weights_it_changes_nothing_and_is_not_measured(
    monkeypatch: pytest.MonkeyPatch, neurons: int | None
) -> None:
    monkeypatch.setattr(sensitivity, "_output_metrics", lambda *a, **k: pytest.fail("measured"))
    model, inputs = chain(16, 24, 8), samples(200, 16)
    one, other = (prune(model, inputs, pattern="2:4", fidelity=how, neurons=neurons) for how in ("diagonal", "layer"))
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True))
    assert verify(model, one.model, inputs, one.report).holds


@pytest.mark.parametrize("goal", ({"sparsity": 0.6}, {"sparsity": {"*": 0.6}}, {"sparsity": 0.5, "pattern": "block:2x2"}, {"budget": 0.3}), ids=str)
def test_its_objective_is_proven_by_verify(goal: dict[str, Any]) -> None:
    model, inputs = chain(16, 24, 8, dtype=torch.float32), samples(300, 16)
    result = prune(model, inputs, fidelity="diagonal", **goal)
    found = verify(model, result.model, inputs, result.report)
    assert found.complete, str(found)
    assert result.report.certificate.holds
