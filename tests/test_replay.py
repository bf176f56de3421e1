"""What stored layers put out is computed once, and only where it would come out again; the dense network's wide inputs are known along directions."""

import contextlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import chain, same_bits, samples, state_of
from torch import Tensor, nn
from torch.nn import functional as F

import nettrim
from nettrim import observing, stages
from nettrim.layers import matrices_of
from nettrim.memory import Room
from nettrim.passes import evaluation
from nettrim.replay import Replay

WIDTH = 40
ASKED: dict[str, Any] = {"sparsity": 0.6, "allocation": "uniform", "holdout": 0.0, "fidelity": "layer"}


class Block(nn.Module):
    def __init__(self, inner: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.query, self.key, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)
        self.up, self.down, self.inner = nn.Linear(WIDTH, 56), nn.Linear(56, WIDTH), inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self, x)


def residual(block: Any, x: Tensor) -> Tensor:
    h = x + block.out(torch.tanh(block.query(x)) * block.key(x))
    return h + block.down(F.silu(block.up(h)))


def behind_a_norm(block: Any, x: Tensor) -> Tensor:
    h = F.layer_norm(x + block.out(torch.tanh(block.query(x)) * block.key(x)), (WIDTH,))
    return F.layer_norm(h + block.down(F.gelu(block.up(h))), (WIDTH,))


def in_place(block: Any, x: Tensor) -> Tensor:
    h = x + block.out(block.query(x).mul_(block.key(x)).tanh_())
    return h + block.down(block.up(h).relu_())


def gaps(block: Any, x: Tensor) -> Tensor:
    h = x + block.out(torch.tanh(block.query(x)).repeat(1, 1, 2)[..., ::2] * block.key(x.transpose(0, 1)).transpose(0, 1))
    return h + block.down(F.silu(block.up(h)))


class Stack(nn.Module):
    def __init__(self, inner: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 2)
        self.blocks = nn.Sequential(*(Block(inner) for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(x)))


def data() -> list[Tensor]:
    return list(torch.randn(24, 5, 4, generator=torch.Generator().manual_seed(1)).split(7))


def autocast(model: nn.Module, batch: Tensor) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return model(batch).float()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64), ids=str)
@pytest.mark.parametrize("inner", (residual, behind_a_norm, in_place, gaps))
def test_weights_are_those_of_the_whole_network(inner: Callable[[Any, Tensor], Tensor], dtype: torch.dtype) -> None:
    model, x = Stack(inner).to(dtype), [batch.to(dtype) for batch in data()]
    blocks, whole = nettrim.prune(model, x, **ASKED, blocks="blocks"), nettrim.prune(model, x, **ASKED, blocks=None)
    assert same_bits(state_of(blocks.model), state_of(whole.model))
    assert nettrim.verify(model, blocks.model, x, blocks.report, bounds=False).holds


@pytest.mark.parametrize("asked", [{"epsilon": 0.2}, {"epsilon": 0.2, "penalty": "l1"}, {"pattern": "2:4", "fidelity": "layer", "repair": 0.5}])
def test_other_ways_to_ask(asked: dict[str, Any]) -> None:
    model = Stack(behind_a_norm)
    blocks, whole = (nettrim.prune(model, data(), holdout=0.0, **asked, blocks=way) for way in ("blocks", None))
    assert same_bits(state_of(blocks.model), state_of(whole.model))
    assert blocks.report.certificate.holds


def test_under_autocast_everything_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked, disturbed = Stack(behind_a_norm), {**ASKED, "forward_fn": autocast}, []
    observe = stages.Block.observe

    def noted(self: Any, layer: Any, ask: Any) -> Any:
        found = observe(self, layer, ask)
        disturbed.append(found.disturbed)
        return found

    monkeypatch.setattr(stages.Block, "observe", noted)
    found = nettrim.prune(model, data(), **asked, ignore=["embed", "blocks.0.*"])
    assert disturbed[:2] == [False, False] and all(disturbed[2:]) and len(disturbed) == 11  # query and key of the second block
    found = nettrim.prune(model, data(), **asked)
    assert str(found.report.options["blocks"]).startswith("none")
    monkeypatch.setattr(stages.Block, "observe", stages.Stage.observe)
    assert same_bits(state_of(found.model), state_of(nettrim.prune(model, data(), **asked).model))


def test_a_hook_that_changes_an_output_does_so_every_time() -> None:
    model = Stack(behind_a_norm)
    for block in model.blocks:
        block.query.register_forward_hook(lambda module, args, out: 2 * out)  # type: ignore[union-attr]
    blocks, whole = nettrim.prune(model, data(), **ASKED, blocks="blocks"), nettrim.prune(model, data(), **ASKED, blocks=None)
    assert same_bits(state_of(blocks.model), state_of(whole.model))


def test_each_stored_layer_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the pruned network's blocks: in every pass anew without what is known."""
    model, computed = Stack(behind_a_norm), Counter[str]()
    original = nn.Linear.forward
    names: dict[int, str] = {}
    record = stages.Block.observe

    def noted(self: Any, layer: Any, ask: Any) -> Any:
        names.update({id(module): name for name, module in self.pruned.named_modules()})
        return record(self, layer, ask)

    def counted(self: nn.Linear, x: Tensor) -> Tensor:
        computed[names.get(id(self), "")] += 1
        return original(self, x)

    monkeypatch.setattr(stages.Block, "observe", noted)
    monkeypatch.setattr(nn.Linear, "forward", counted)
    nettrim.prune(model, data(), **ASKED, blocks="blocks", targets="blocks.*")
    batches, own = len(data()), {name: count for name, count in computed.items() if name in dict(model.blocks[0].named_modules()) and name}
    assert own == dict.fromkeys(own, 3 * batches) and len(own) == 5  # three blocks; those of the dense network have no name here


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64), ids=str)
def test_the_last_pass_of_a_chain_measures_what_the_network_puts_out(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """To the bit, without a layer computed again: those that were stored have put the same out when they were measured."""
    model, computed = chain(20, 33, 17, 5).to(dtype), Counter[int]()
    inputs = list(samples(200, 20).to(dtype).split(70))
    original = nn.Linear.forward

    def counted(self: nn.Linear, x: Tensor) -> Tensor:
        computed[id(self)] += 1
        return original(self, x)

    monkeypatch.setattr(nn.Linear, "forward", counted)
    result = nettrim.prune(model, inputs, sparsity={"*": 0.7}, holdout=0.0)
    assert [computed[id(module)] for module in result.model if isinstance(module, nn.Linear)] == [3, 3, 3]
    assert result.report.certificate.guaranteed is not None
    with torch.no_grad():
        dense, pruned = (torch.cat([each(x) for x in inputs]).double() for each in (model, result.model))
    assert result.report.certificate.measured == float((pruned - dense).norm()) > 0


class Drifting(nn.Sequential):
    """What the first layer is given grows from call to call."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x * (1 + 0.2 * self.calls))


def noisy(model: nn.Module, x: Tensor) -> Any:
    return model(x + 0.3 * torch.randn_like(x))


@pytest.mark.parametrize(
    ("model", "forward"),
    ((Drifting(*chain(12, 16, 5)), None), (chain(12, 16, 5), noisy)),
    ids=("from call to call", "noise before it"),
)
def test_a_network_that_is_given_something_else_in_the_end_is_measured_as_it_is_then(model: nn.Module, forward: Any) -> None:
    """What its layers were seen to put out before would keep the promise, whatever the network does."""
    torch.manual_seed(0)
    found = nettrim.prune(model, [samples(100, 12)], sparsity={"*": 0.5}, holdout=0.0, forward_fn=forward).report.certificate
    assert found.guaranteed is not None and found.measured > found.guaranteed and not found.holds


class TestReplay:
    def setup_method(self) -> None:
        torch.manual_seed(0)
        self.layer, self.x = nn.Linear(6, 4), [torch.randn(3, 6), torch.randn(2, 6)]
        self.replay = Replay()
        self.rows = self.replay.record(self.layer, self.x, 5)
        self.calls = 0

    def played(self, *inputs: Tensor, index: int = 0) -> list[Tensor]:
        original = nn.Linear.forward

        def counted(module: nn.Linear, x: Tensor) -> Tensor:
            self.calls += 1
            return original(module, x)

        with pytest.MonkeyPatch.context() as patch, evaluation(self.layer):
            patch.setattr(nn.Linear, "forward", counted)
            with self.replay.played(index):
                return [self.layer(x) for x in inputs]

    def test_what_it_returns_is_played_once_in_the_shape_of_the_input(self) -> None:
        assert self.rows is not None and torch.equal(self.rows, torch.cat([self.layer(x) for x in self.x]).detach())
        first, second = self.played(self.x[0][None], self.x[0] + 1)
        assert first.shape == (1, 3, 4) and torch.equal(first[0], self.rows[:3])
        assert torch.equal(second, self.layer(self.x[0] + 1)) and self.calls == 1
        first.zero_()  # a copy
        assert torch.equal(self.played(self.x[1], index=1)[0], self.rows[3:])
        assert "forward" not in vars(self.layer)

    @pytest.mark.parametrize("change", ("rows", "dtype", "gaps"))
    def test_other_inputs_are_computed(self, change: str) -> None:
        x = {"rows": self.x[1], "dtype": self.x[0].double(), "gaps": self.x[0].T.contiguous().T}[change]
        with contextlib.suppress(RuntimeError):  # which torch computes no more than before
            assert torch.equal(self.played(x)[0], self.layer(x))
        assert self.calls == 1

    def test_of_changed_parameters_nothing_is_known(self) -> None:
        with torch.no_grad():
            self.layer.weight.mul_(2)
        assert self.replay.outputs_of(self.layer) == []
        assert torch.equal(self.played(self.x[0])[0], self.layer(self.x[0])) and self.calls == 1

    def test_what_runs_alone(self) -> None:
        (matrix,) = matrices_of(self.layer)
        assert self.replay.runs_alone(matrix, self.x) and not self.replay.runs_alone(matrix, [self.x[0].double()])
        (convolution,) = matrices_of(nn.Conv1d(2, 3, 1))
        assert not self.replay.runs_alone(convolution, [])

    def test_rooms_say_when_not_all_rows_are_in_them(self) -> None:
        room = Room(3)
        assert room.rows is None
        first = room.put(torch.ones(2, 4))
        assert room.rows is None
        assert torch.equal(room.put(torch.zeros(2, 4)), torch.zeros(2, 4)) and room.rows is None
        room.put(torch.zeros(1, 4))
        assert room.rows is None and torch.equal(first, torch.ones(2, 4))


@pytest.mark.parametrize("change", (0.0, 1e-7, 1e-3, 1.0))
def test_whether_wide_inputs_differ_is_seen_along_directions(change: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """What decides is whether more than rounding has changed in one row of many."""
    torch.manual_seed(0)
    model = nn.Linear(WIDTH, 3)
    (layer,) = nettrim.tracing.trace(model, [torch.randn(4, WIDTH)], nettrim.calibration.runner()).layers
    A, Z = torch.randn(100, WIDTH), torch.randn(100, 3)
    B = A.clone()
    B[17, 5] += change * float(A.norm())
    R = observing.directions(layer.matrix, None)
    assert R is not None and R.shape == (WIDTH, 8)
    seen = [
        observing.observed(layer, lambda held=held: iter([stages.Seen(held, Z)]), lambda: iter([stages.Seen(B, Z)]), device=None, along=along)  # type: ignore[misc]
        for held, along in ((A, None), (A @ R, R))
    ]
    assert [found.disturbed for found in seen] == [change > 1e-4] * 2
    (few,) = matrices_of(nn.Linear(31, 3))
    assert observing.directions(few, None) is None  # they are held as they are
    with pytest.raises(nettrim.errors.RouteError, match=r"\(100, 40\) in the pruned network and \(99, 40\)"):
        observing.observed(layer, lambda: iter([stages.Seen((A @ R)[1:], Z)]), lambda: iter([stages.Seen(B, Z)]), device=None, along=R)
