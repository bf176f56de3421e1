"""``fidelity="diagonal"``: every output weighed by itself, by gradients that take no more memory than a block of the network."""

from typing import Any

import pytest
import torch
from networks import chain, hooks_of, samples
from test_blockwise import TOKENS, Decoder, Mixer, decoder
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from nettrim import calibration, prune, sensitivity, verify
from nettrim.sensitivity import output_metrics
from nettrim.tracing import trace

BLOCKS = ("blocks.0", "blocks.1", "blocks.2")


def metrics(model: nn.Module, inputs: Tensor, **asked: Any) -> dict[str, Tensor]:
    batches = calibration.batches(list(inputs.split(4)))
    found = output_metrics(model, batches, calibration.runner(), trace(model, batches, calibration.runner()).layers, 0, **asked)  # type: ignore[arg-type]
    assert found is not None
    return found


def test_it_is_the_diagonal_of_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensitivity, "_DRAWS", 1)  # the same signs
    whole, alone = metrics(decoder(), TOKENS), metrics(decoder(), TOKENS, diagonal=True)
    assert alone.keys() == whole.keys()
    for name, found in alone.items():
        torch.testing.assert_close(found, whole[name].diagonal(), rtol=1e-5, atol=0)


def test_it_serves_the_networks_output_less_than_the_matrix_and_more_than_the_layers_own() -> None:
    torch.manual_seed(0)
    model, inputs = chain(20, 30, 30, 4), samples(2000, 20)
    with torch.no_grad():  # outputs that the next layer reads to very different degrees
        model[2].weight.mul_(torch.logspace(-1, 1, 30))
    left = [prune(model, inputs, sparsity={"*": 0.8}, fidelity=how).report.certificate.relative_measured for how in ("network", "diagonal", "layer")]
    assert left[0] < left[1] < 0.8 * left[2]


class TestBlocks:
    @pytest.mark.parametrize("diagonal", (False, True))
    def test_what_they_compute_again_is_the_same(self, diagonal: bool) -> None:
        model = decoder().train()
        expected, found = metrics(model, TOKENS, diagonal=diagonal), metrics(model, TOKENS, diagonal=diagonal, blocks=BLOCKS)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert model.training and hooks_of(model) == 0
        assert not any("forward" in vars(module) for module in model.modules())

    def test_nothing_that_they_compute_is_kept(self) -> None:
        kept: list[list[int]] = []
        for blocks in ((), BLOCKS):
            sizes: list[int] = []
            with torch.autograd.graph.saved_tensors_hooks(lambda tensor, sizes=sizes: sizes.append(tensor.numel()) or tensor, lambda tensor: tensor):
                metrics(decoder(), TOKENS, diagonal=True, blocks=blocks)
            kept.append(sizes)
        assert sum(kept[1]) < 0.2 * sum(kept[0])

    def test_a_block_that_writes_into_what_it_is_given(self) -> None:
        class Writing(Mixer):
            def mixed(self, hidden: Tensor, window: Tensor, turn: Tensor) -> Tensor:
                hidden += super().mixed(hidden, window, turn) - hidden
                return hidden

        def made(kind: type[Mixer]) -> Decoder:
            model, other = decoder(), Decoder()
            other.blocks = nn.ModuleList(kind() for _ in range(3))
            other.load_state_dict(model.state_dict())
            return other

        expected, found = metrics(made(Mixer), TOKENS, diagonal=True), metrics(made(Writing), TOKENS, diagonal=True, blocks=BLOCKS)
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=0)

    def test_a_block_that_computes_something_else_the_second_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Counting(Mixer):
            times = 0

            def mixed(self, hidden: Tensor, window: Tensor, turn: Tensor) -> Tensor:
                Counting.times += 1
                return super().mixed(hidden if Counting.times <= 3 else hidden.exp().log(), window, turn)

        model, expected = decoder(), metrics(decoder(), TOKENS[:4], diagonal=True)
        for place in range(3):
            other = Counting()
            other.load_state_dict(model.blocks[place].state_dict())
            model.blocks[place] = other
        raised: list[BaseException] = []
        inner = sensitivity._output_metrics

        def watched(*args: Any, **kwargs: Any) -> Any:
            try:
                return inner(*args, **kwargs)
            except CheckpointError as error:
                raised.append(error)
                Counting.times = 0
                raise

        monkeypatch.setattr(sensitivity, "_output_metrics", watched)
        batches, run = calibration.batches([TOKENS[:4]]), calibration.runner()
        layers = trace(model, batches, run).layers
        Counting.times = 0
        found = output_metrics(model, batches, run, layers, 0, diagonal=True, blocks=BLOCKS)  # type: ignore[arg-type]
        assert len(raised) == 1 and found is not None
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=0)

    def test_they_are_those_of_the_call(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[tuple[Any, Any]] = []
        inner = sensitivity._output_metrics
        monkeypatch.setattr(sensitivity, "_output_metrics", lambda *a, **k: seen.append((k["blocks"], k["diagonal"])) or inner(*a, **k))
        asked: dict[str, Any] = {"sparsity": 0.5, "fidelity": "diagonal", "holdout": 0.0}
        results = [prune(decoder(), list(TOKENS.split(4)), **asked, **how) for how in ({}, {"blocks": None})]  # type: ignore[arg-type]
        assert seen == [(BLOCKS, True), ((), True)]
        for one, other in zip(*(result.model.parameters() for result in results), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


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
