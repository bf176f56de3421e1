"""Each neighbour's `run` on a network whose useless units are planted: what goes, what stays, and what it was trained with."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from neighbouring import separable, task
from torch import Tensor, nn

from benchmarks.data import Dataset
from benchmarks.neighbours import (
    bernoulli,
    dropnet,
    dropneuron,
    feature_flow,
    fuse,
    models,
    node_selection,
    norms,
    oicsr,
    refined,
    spectral_dropout,
    stressed,
    vip,
)
from benchmarks.neighbours.contract import Outcome, Task
from benchmarks.neighbours.judge import live_layers, live_units
from benchmarks.neighbours.registry import METHODS


@pytest.fixture(scope="module")
def data() -> Dataset:
    return separable()


def planted(data: Dataset, filters: bool = False) -> nn.Sequential:
    """Five units, linear or filters of the whole image: unit i < 3 is pixel i, read by class i; unit 3 has tiny weights, unit 4 is hardly read."""
    if filters:
        model = nn.Sequential(nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 5, 4), nn.ReLU(), nn.Flatten(), nn.Linear(5, 3))
    else:
        model = nn.Sequential(nn.Linear(16, 5), nn.ReLU(), nn.Linear(5, 3))
    ((layer, reader),) = models.hidden_units(model)
    made, read = model.get_submodule(layer), model.get_submodule(reader)
    rows = torch.zeros(5, 16)
    rows[:3, :3] = torch.diag(torch.tensor([1.0, 1.05, 1.1]))
    rows[3, 5:] = 1e-3
    rows[4, 5:] = 0.5
    columns = torch.zeros(3, 5)
    columns[:, :3] = torch.diag(torch.tensor([4.0, 4.1, 4.2]))
    columns[0, 3:] = torch.tensor([0.9, 1e-4])
    with torch.no_grad():
        made.weight.copy_(rows.view_as(made.weight))
        read.weight.copy_(columns)
        made.bias.zero_()
        read.bias.zero_()
    return model


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Task], nn.Sequential]], list[tuple[nn.Module, dict[str, Any]]]]:
    """Let every task start from a given network and train nothing; gives the list of what it was asked to train, and how."""

    def patch(build: Callable[[Task], nn.Sequential]) -> list[tuple[nn.Module, dict[str, Any]]]:
        asked: list[tuple[nn.Module, dict[str, Any]]] = []

        def fit(self: Task, model: nn.Module, epochs: int, **options: Any) -> nn.Module:
            asked.append((model, options))
            self.spent += epochs
            return model.eval()

        monkeypatch.setattr(Task, "build", build)
        monkeypatch.setattr(Task, "fit", fit)
        return asked

    return patch


# --- which units go

GONE = {
    "unit norm": {3},
    "L1 filters": {3},
    "Taylor": {3, 4},
    "Taylor filters": {3, 4},
    "PLS + VIP": {3, 4},
    "layer-wise refined": {3},
    "DropNet": {3},
    "OICSR": {3, 4},
    "feature flow": {3},
}


@pytest.mark.parametrize("name", GONE)
def test_the_planted_units_go_and_no_other(name: str, data: Dataset, untrained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms of what makes a unit see unit 3 alone, and all that look at what is read see unit 4 too."""
    monkeypatch.setattr(vip, "COMPONENTS", 2)
    filters = METHODS[name].network == "filters"
    untrained(lambda self: planted(data, filters))
    one = task(data, METHODS[name].network)
    result = METHODS[name].run(one)
    (layer, reader), *_ = models.hidden_units(result.model)
    made = result.model.get_submodule(layer).weight.detach().flatten(1).any(dim=1)
    read = result.model.get_submodule(reader).weight.detach().any(dim=0)
    assert set((~made).nonzero().flatten().tolist()) == GONE[name] and torch.equal(made, read)
    assert one.held_accuracy(result.model) == 1


@pytest.mark.parametrize(
    "name",
    ["l1", "l2", "dropout", "magnitude global", "magnitude by test", "DropNeuron li", "DropNeuron lo", "DropNeuron li + lo", "spectral dropout",
     "magnitude + MARS", "sparse group lasso"],
)  # fmt: skip
def test_the_planted_weights_go_and_no_other(name: str, data: Dataset, untrained: Any) -> None:
    """Of all weights together the six that tell the classes are the largest; the tiny ones of unit 3 and the one that reads unit 4 go."""
    untrained(lambda self: planted(data))
    result = METHODS[name].run(task(data))
    kept, read = result.masks["0.weight"], result.masks["2.weight"]
    assert kept[:3, :3].diagonal().all() and read[:, :3].diagonal().all()
    assert not kept[3].any() and not read[0, 4]


def test_the_same_share_of_each_layer_is_that_of_the_one_that_needs_most(data: Dataset, untrained: Any) -> None:
    """The reader keeps its three of 15, and so the first layer no less than about a fifth of 80: its largest."""
    untrained(lambda self: planted(data))
    result = METHODS["magnitude per layer"].run(task(data))
    kept, read = result.masks["0.weight"], result.masks["2.weight"]
    assert torch.equal(read, torch.eye(3, 5) > 0) and int(kept.sum()) == pytest.approx(14, abs=1)
    assert kept[:3, :3].diagonal().all() and kept[4, 5:].all()


def test_a_neuron_that_is_not_read_goes_whole(data: Dataset, untrained: Any) -> None:
    """DropNeuron: unit 4's reading weight is cut, so its eleven incoming ones, each larger than others that stay, go with it."""
    model = planted(data)
    with torch.no_grad():
        model[0].weight[4] *= 100
        model[0].bias[4] = 7.0
    scores = {name: weight.detach().abs() for name, weight in (("0", model[0].weight), ("2", model[2].weight))}
    dropneuron.cut(model, scores, share=0.0)
    assert model[0].weight[4, 5:].all() and live_units(model) == (5, 5)
    dropneuron.cut(model, scores, share=(55 + 10 + 11 + 1) / 95)  # the zeros, the tiny ones and the least
    assert not model[0].weight[3:].any() and model[0].bias[4] == 0 and not model[2].weight[:, 3:].any()
    assert live_units(model) == (3, 5) and int(model[0].weight.count_nonzero()) == 3
    untrained(lambda self: planted(data))
    assert not METHODS["DropNeuron li + lo"].run(task(data)).masks["0.weight"][4].any()


def test_the_second_pass_takes_what_the_first_could_not(data: Dataset, untrained: Any) -> None:
    """All units of the second layer are needed and of small score: they stop the first pass, and the first layer's useless one is left to its own."""

    def build(self: Task) -> nn.Sequential:
        model = nn.Sequential(nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
            for i in range(3):
                model[0].weight[i, i], model[2].weight[i, i], model[4].weight[i, i] = 10.0, 0.1 + 0.01 * i, 4.0 / (0.1 + 0.01 * i)
            model[0].weight[3, 7] = 5.0
        return model

    untrained(build)
    result = refined.run(task(data))
    assert result.notes["share"] < 1 / 7
    assert result.masks["0.weight"].any(dim=1).tolist() == [True, True, True, False] and result.masks["2.weight"].any(dim=1).all()


def test_the_layer_that_is_nearest_to_linear_is_fused(data: Dataset, untrained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second layer's ReLUs are never off, the first's are half of the time where they read noise."""

    def build(self: Task) -> nn.Sequential:
        model = nn.Sequential(nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
            model[0].weight[:3, :3], model[0].weight[3:, 3:6] = 2 * torch.eye(3), 40 * torch.eye(3)
            model[0].bias[3:] = -6.0
            model[2].weight[:3, :3], model[2].bias[:] = torch.eye(3), 9.0
            model[4].weight[:, :3] = 4 * torch.eye(3)
        return model

    untrained(build)
    result = fuse.run(task(data))
    assert [tuple(module.weight.shape) for module in result.model if isinstance(module, nn.Linear)] == [(6, 16), (3, 6)]
    assert result.notes["nonlinearity"]["2"] < 0.01 < 0.1 < result.notes["nonlinearity"]["0"] and result.notes["fused"]
    monkeypatch.setattr(fuse, "LIMIT", 0.0)
    assert len(fuse.run(task(data)).model) == 5


# --- what they are trained with

L1, LI, LO = dropneuron.L1, dropneuron.LI, dropneuron.LO
PENALTIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l1": lambda W, V: norms.L1 * (W.abs().sum() + V.abs().sum()),
    "l2": lambda W, V: norms.L2 * ((W**2).sum() + (V**2).sum()),
    "DropNeuron li": lambda W, V: L1 * (W.abs().sum() + V.abs().sum()) + LI * (W.norm(dim=1).sum() + V.norm(dim=1).sum()),
    "DropNeuron lo": lambda W, V: L1 * (W.abs().sum() + V.abs().sum()) + LO * (W.norm(dim=0).sum() + V.norm(dim=0).sum()),
    "OICSR": lambda W, V: oicsr.PENALTY * ((W**2).sum(dim=1) + (V**2).sum(dim=0)).sqrt().sum(),
}


@pytest.mark.parametrize("name", PENALTIES)
def test_training_is_under_the_papers_penalty_and_retraining_without(name: str, data: Dataset, untrained: Any) -> None:
    asked = untrained(lambda self: planted(data))
    model = planted(data)
    METHODS[name].run(task(data))
    penalties = [options.get("penalty") for _, options in asked]
    assert len(penalties) == 2 and penalties[1] is None
    expected = PENALTIES[name](model[0].weight.detach().double(), model[2].weight.detach().double())
    assert penalties[0]().item() == pytest.approx(expected.item(), rel=1e-5)


def test_feature_flow_is_of_the_features(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """One hidden layer: the path is input to ReLU, one difference and no curvature."""
    seen: list[tuple[float, float]] = []

    def fit(self: Task, model: nn.Module, epochs: int, **options: Any) -> nn.Module:
        if "penalty" in options:
            x = self.inputs[:9]
            path = model[1](model[0](x)).detach() - x  # 16 units, as many as pixels
            model(x)
            seen.append((options["penalty"]().item(), feature_flow.PENALTY * path.norm(dim=1).mean().item()))
        return model.eval()

    monkeypatch.setattr(Task, "build", lambda self: nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)))
    monkeypatch.setattr(Task, "fit", fit)
    feature_flow.run(task(data))
    assert len(seen) == 1 and seen[0][0] == pytest.approx(seen[0][1], rel=1e-4)


@pytest.mark.parametrize(("run", "kind"), [(norms.dropout, nn.Dropout), (spectral_dropout.run, spectral_dropout.SpectralDropout)])
def test_the_layer_is_there_in_training_and_not_afterwards(run: Callable[[Task], Outcome], kind: type, data: Dataset, untrained: Any) -> None:
    asked = untrained(lambda self: planted(data))
    result = run(task(data))
    (first, _), (second, _) = asked
    assert [type(module) for module in first] == [nn.Linear, nn.ReLU, kind, nn.Linear]
    assert [type(module) for module in second] == [type(module) for module in result.model] == [nn.Linear, nn.ReLU, nn.Linear]
    assert first[2].p == 1 - norms.KEEP if kind is nn.Dropout else (first[2].off, len(first[2].D)) == (spectral_dropout.OFF, 5)


def test_stress_is_a_tenth_of_not_being_inherited(data: Dataset, untrained: Any) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(400, 400, bias=False)
    with torch.no_grad():
        layer.weight.fill_(0.3)
    wrapped = stressed.Stressed(layer).train()
    chance = stressed.STRESS * (1 - stressed.survival(layer.weight)[0, 0].item())
    with torch.no_grad():
        off = wrapped(torch.eye(400)) == 0
        assert float(off.float().mean()) == pytest.approx(chance, rel=0.05) and not torch.equal(wrapped(torch.eye(400)) == 0, off)
        assert wrapped.eval()(torch.eye(400)).all()
    asked = untrained(lambda self: planted(data))
    stressed.run(task(data))
    assert [isinstance(model, stressed.Stressed) for model, _ in asked] == [True] * (stressed.GENERATIONS - 1) + [False]


def test_dropnet_goes_back_to_the_start(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training that doubles the weights: every cycle is given the start's, the last call what the kept cycle left."""
    given: list[Tensor] = []

    @torch.no_grad()
    def fit(self: Task, model: nn.Sequential, epochs: int, **options: Any) -> nn.Module:
        given.append(model[0].weight.clone())
        model[0].weight.mul_(2)
        self.spent += epochs
        return model.eval()

    monkeypatch.setattr(Task, "build", lambda self: planted(data))
    monkeypatch.setattr(Task, "fit", fit)
    dropnet.run(task(data))
    start = planted(data)[0].weight.detach()
    factors = [1] * (len(given) - 1) + [2]
    assert len(given) > 2 and all(torch.equal(one, k * start * one.any(dim=1, keepdim=True)) for one, k in zip(given, factors, strict=True))


# --- selection that is learnt


def test_a_block_that_is_needed_stays_and_one_that_does_nothing_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first block moves each pixel a row down, where the last layer reads it; the second makes nothing. All but the second is frozen."""
    data = separable()

    def build(self: Task) -> nn.Sequential:
        model = nn.Sequential(
            nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 1, 1), nn.ReLU(), models.Residual(1), models.Residual(1), nn.Flatten(), nn.Linear(16, 3)
        )
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
            model[1].weight.fill_(1.0)
            model[3].first.weight[0, 0, 1, 1] = 1.0
            model[3].second.weight[0, 0, 0, 1] = 1.0
            for i in range(3):
                model[6].weight[i, 4 + i] = 8.0
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        model[4].second.bias.requires_grad_()
        return model

    monkeypatch.setattr(Task, "build", build)
    one = task(data)
    result = bernoulli.blocks(one)
    assert result.notes["theta"][0] > 0.9 and result.notes["theta"][1] < 0.1
    assert result.model[3].second.weight[0, 0, 0, 1] == 1 and live_layers(result.model) == 4
    assert one.held_accuracy(result.model) > 0.95


def test_nodes_that_say_nothing_are_not_selected(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_selection, "PRIOR", 1.0)
    monkeypatch.setattr(Task, "build", lambda self: planted(data))
    one = task(data, epochs=24)
    result = node_selection.run(one)
    assert result.masks["0.weight"].any(dim=1).tolist() == [True, True, True, False, False]
    assert one.held_accuracy(result.model) > 0.9
