"""Sums for programs that repeat the dense outputs, from the inputs in both networks: the same as from the rows, once for layers with one input."""

import pickle
from typing import Any

import pytest
import torch
from networks import samples
from test_blockwise import TOKENS, decoder
from torch import Tensor, nn

from nettrim import calibration, prune, verify
from nettrim.grams import Gram, moments
from nettrim.observing import Layer, observe
from nettrim.stages import Ask, Block
from nettrim.tracing import TracedLayer, trace


def wide(bias: bool = True) -> tuple[nn.Sequential, nn.Sequential, Tensor]:
    """A network whose second layer has more outputs than inputs, and one whose first layer lost half of its weights."""
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(10, 6), nn.Tanh(), nn.Linear(6, 20, bias=bias), nn.GELU(), nn.Linear(20, 3)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    with torch.no_grad():
        models[1][0].weight[:, ::2] = 0
    return models[0], models[1], samples(300, 10)


@pytest.mark.parametrize("bias", (True, False))
def test_they_are_those_of_the_rows(bias: bool) -> None:
    dense, pruned, x = wide(bias)
    batches, run = calibration.batches(list(x.split(100))), calibration.runner()
    layer = next(found for found in trace(dense, batches, run).layers if found.name == "2")
    by_rows, by_inputs = (observe(layer, dense, pruned, batches, run, device=None, crosses=how) for how in (False, True))
    assert (by_rows.made, by_inputs.made) == (False, True)
    expected, found = by_rows.aims, by_inputs.aims
    assert expected is not None and found is not None
    assert torch.equal(found.G, expected.G)
    torch.testing.assert_close(found.C, expected.C, rtol=0, atol=1e-6 * float(expected.C.norm()))
    exact = torch.tanh(dense[0](x)).double()
    disturbed = torch.tanh(pruned[0](x)).double()
    Z = exact @ dense[2].weight.double().T + (dense[2].bias.double() if bias else 0)
    torch.testing.assert_close(found.C[:, :6], (Z.T @ disturbed).detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("cascade", (True, False))
def test_where_nothing_is_disturbed_they_follow_from_the_inputs(cascade: bool) -> None:
    dense, _, x = wide()
    batches, run = calibration.batches(list(x.split(100))), calibration.runner()
    for layer in trace(dense, batches, run).layers:
        seen = observe(layer, dense, dense if cascade else None, batches, run, device=None, sums=True)
        assert seen.made and not seen.disturbed and seen.aims is not None
        A, Z = (torch.cat(parts).double() for parts in zip(*seen.observation.chunks(), strict=True))
        torch.testing.assert_close(seen.aims.C, Z.T @ A, rtol=0, atol=1e-6 * float((Z.T @ A).norm()))


def test_nor_do_they_where_outputs_are_rounded_or_nothing_shows() -> None:
    dense, _, x = wide()
    run = calibration.runner()
    for model, batches in ((Casting(*dense), [x]), (nn.Sequential(nn.Linear(10, 6, bias=False)), [torch.zeros(50, 10), x])):
        layer = trace(model, batches, run).layers[0]
        seen = observe(layer, model, None, batches, run, device=None, sums=True)
        assert not seen.made and seen.aims is not None
        A, Z = (torch.cat(parts).double() for parts in zip(*seen.observation.chunks(), strict=True))
        torch.testing.assert_close(seen.aims.C, Z.T @ A)


class Beside(nn.Module):
    """A layer that is given what no layer has disturbed, and whose output is added to something that one has."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = nn.Linear(10, 12), nn.Linear(10, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        c = self.first(x).tanh()
        return self.last(c + self.second(x))


@pytest.mark.parametrize("fidelity", ("network", "layer"))
def test_a_sum_s_part_makes_up_for_what_is_beside_it(fidelity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = {}
    inner = Block.observe

    def observe(self: Block, layer: TracedLayer, ask: Ask) -> Layer:
        made[layer.name] = inner(self, layer, ask)
        return made[layer.name]

    monkeypatch.setattr(Block, "observe", observe)
    model, x = Beside(), samples(300, 10)
    result = prune(model, x, sparsity={"*": 0.5}, fidelity=fidelity)
    assert made["first"].made and not made["second"].disturbed and not made["second"].made
    assert verify(model, result.model, x, result.report).holds


def test_no_pass_over_the_rows_where_all_is_known() -> None:
    gram, W = Gram(torch.eye(3, dtype=torch.float64), torch.full((3, 3), 2.0, dtype=torch.float64)), torch.ones(5, 3)
    found = moments(gram, iter(()), W)
    assert torch.equal(found.C, torch.full((5, 3), 6.0, dtype=torch.float64))


@pytest.fixture
def observed(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[bool, int]]:
    """Of every layer that was observed whether its sums were made so, and of what."""
    made: dict[str, tuple[bool, int]] = {}
    inner = Block.observe

    def observe(self: Block, layer: TracedLayer, ask: Ask) -> Layer:
        found = inner(self, layer, ask)
        assert found.gram is not None
        made[found.name] = found.made and found.gram.cross is not None, id(found.gram.cross)
        return found

    monkeypatch.setattr(Block, "observe", observe)
    return made


def test_layers_with_one_input_share_them(observed: dict[str, tuple[bool, int]]) -> None:
    model, data = decoder(), list(TOKENS.split(4))
    result = prune(model, data, sparsity=0.5, allocation="uniform", fidelity="layer", repair=0.6)
    assert observed["blocks.1.gate"][0] and observed["blocks.1.gate"] == observed["blocks.1.up"]
    assert not observed["blocks.1.query"][0] and not observed["blocks.1.down"][0]  # no more outputs than inputs, and a sum
    assert verify(model, result.model, data, result.report).holds


@pytest.mark.parametrize("asked", ({"epsilon": 0.2}, {"sparsity": 0.5, "mode": "parallel"}, {"sparsity": 0.5, "max_rows": 50}), ids=str)
def test_they_are_not_made_where_no_program_is_of_them(asked: dict[str, Any], observed: dict[str, tuple[bool, int]]) -> None:
    dense, _, x = wide()
    assert prune(dense, x, **asked).report.certificate.holds
    assert {crossed for crossed, _ in observed.values()} == {False}


class Casting(nn.Sequential):
    """Runs under autocast of its own: what its layers put out is rounded."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x).float()


def test_they_are_of_the_rows_where_outputs_are_not_what_the_weights_make_of_the_inputs(observed: dict[str, tuple[bool, int]]) -> None:
    dense, _, x = wide()
    model = Casting(*dense)
    result = prune(model, x, sparsity={"*": 0.5}, repair=0.5, fidelity="layer")
    assert not observed["2"][0]
    assert verify(model, result.model, x, result.report).holds


class Mixed(nn.Module):
    """A layer whose output is added and a wide one are given the same input, of more entries than directions are taken of it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.first, self.up, self.down, self.leave = (nn.Linear(*sizes) for sizes in ((10, 40), (40, 40), (40, 60), (60, 40), (40, 3)))

    def forward(self, x: Tensor) -> Tensor:
        c = self.enter(x).tanh()
        h = c + self.first(c)
        return self.leave(h + self.down(self.up(c).tanh()))


@pytest.mark.parametrize("fidelity", ("network", "layer"))
def test_a_wide_layer_behind_one_of_a_sum_with_the_same_input(fidelity: str) -> None:
    model, x = Mixed(), samples(300, 10)
    result = prune(model, x, sparsity={"*": 0.5}, fidelity=fidelity)
    assert verify(model, result.model, x, result.report).holds


def test_wide_inputs_are_held_where_they_are_wanted(observed: dict[str, tuple[bool, int]]) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(10, 40), nn.Tanh(), nn.Linear(40, 60), nn.Tanh(), nn.Linear(60, 5)), samples(300, 10)
    result = prune(model, x, sparsity={"*": 0.5})
    assert observed["2"][0] and not observed["4"][0]
    assert verify(model, result.model, x, result.report).holds


def test_they_do_not_travel_with_programs() -> None:
    gram = pickle.loads(pickle.dumps(Gram(torch.eye(2), torch.eye(2))))
    assert gram.cross is None and gram.G is not None
