"""The neighbours' mechanisms, each on a case whose answer is known: criteria, schedules and penalties."""

import copy
from dataclasses import replace

import pytest
import torch
from neighbouring import separable, task
from torch import Tensor, nn

from benchmarks.data import Dataset
from benchmarks.neighbours import dropnet, dsd, feature_flow, large, mars, models, norms, oicsr, refined, selection, sparse_group_lasso, taylor, vip
from benchmarks.neighbours.contract import Outcome, Task, outcome, zeros
from benchmarks.neighbours.judge import live_layers, live_units
from nettrim import ArgumentError, criteria, penalties


@pytest.fixture(scope="module")
def data() -> Dataset:
    return separable()


def planted(data: Dataset) -> nn.Sequential:
    """16-5-3: hidden unit i < 3 is pixel i, read by class i; unit 3 has tiny weights, unit 4 is large but hardly read."""
    model = nn.Sequential(nn.Linear(16, 5), nn.ReLU(), nn.Linear(5, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for i in range(3):
            model[0].weight[i, i] = 1.0
            model[2].weight[i, i] = 4.0
        model[0].weight[3, 5:] = 1e-3
        model[2].weight[:, 3] = 1.0
        model[0].weight[4, 5:] = 0.5
        model[2].weight[:, 4] = 1e-4
    return model


# --- what all share


def test_the_same_seed_gives_the_same_network(data: Dataset) -> None:
    first, second, other = (Task(data, "dense", 4, seed=seed, batch=20).trained() for seed in (0, 0, 1))
    for one, two, three in zip(first.parameters(), second.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two) and not torch.equal(one, three)


def test_a_shared_start_counts_its_seconds(data: Dataset) -> None:
    shared: dict = {}
    first, second = (Task(data, "dense", 4, 0, shared=shared) for _ in range(2))
    one = first.trained()
    two = second.trained()
    assert first.borrowed == 0 < second.borrowed
    assert torch.equal(one[0].weight, two[0].weight) and one[0].weight is not two[0].weight


def test_held_out_images_are_not_trained_on(data: Dataset) -> None:
    one = task(data)
    assert len(one.held_inputs) == 200 and len(one.inputs) == 800
    assert torch.equal(torch.cat([one.inputs, one.held_inputs]), data.train_inputs)
    assert len(task(data, samples=300).inputs) == 240


def test_zeros_are_held_in_training_and_named(data: Dataset) -> None:
    model = task(data).build()
    with torch.no_grad():
        model[0].weight[2] = 0
    found = zeros(model)
    assert set(found) == {"0.weight", "2.weight", "4.weight"} and not found["0.weight"][2].any()
    trained = task(data).fit(copy.deepcopy(model), 2, masks=found)
    assert not trained[0].weight[2].any() and trained[0].weight[3].any()
    assert not torch.equal(trained[0].weight, model[0].weight)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_shares_of_scores(share: float) -> None:
    scores = {"a": torch.arange(8.0).view(2, 4), "b": 100 + torch.arange(8.0)}
    everything = selection.kept_by_share(scores, share, by_layer=False)
    # all of "a" is below all of "b", and each keeps one
    assert [int(kept.sum()) for kept in everything.values()] == {0: [8, 8], 0.25: [4, 8], 0.5: [1, 8], 1: [1, 1]}[share]
    each = selection.kept_by_share(scores, share, by_layer=True)
    assert [int((~kept).sum()) for kept in each.values()] == [min(round(8 * share), 7)] * 2
    assert each["a"].shape == (2, 4)


def test_the_largest_share_is_found(data: Dataset) -> None:
    """Three weights of 48 decide; all others may go, and nothing that loses accuracy is returned."""
    model = nn.Sequential(nn.Linear(16, 3))
    with torch.no_grad():
        model[0].weight.fill_(1e-3)
        model[0].weight[:, :3] = torch.eye(3)
    one = task(data)
    result = selection.prune_weights(one, model, criteria.magnitude, retrain=False)
    kept = result.masks["0.weight"]
    assert 2 <= int(kept.sum()) <= 3 and int(kept[:, :3].diagonal().sum()) == int(kept.sum())  # two of three classes tell the third
    assert one.held_accuracy(result.model) >= one.held_accuracy(model) - selection.TOLERANCE


def test_units_go_with_their_readers() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 2))
    assert models.hidden_units(model) == [("0", "3"), ("3", "5")]
    models.drop_units(model, "0", "3", torch.tensor([True, False, True]))
    assert not model[0].weight[1].any() and model[0].bias[1] == 0 and model[0].weight[[0, 2]].all()
    gone = (model[3].weight == 0).all(dim=0)
    assert gone.tolist() == [False] * 4 + [True] * 4 + [False] * 4
    assert live_units(model) == (6, 7) and live_layers(model) == 3
    x = torch.rand(5, 1, 3, 3)
    with torch.no_grad():
        before = model(x)
        model[0].bias[1] = 7.0  # whatever the unit does, nobody reads it
        assert torch.equal(model(x), before)


def test_a_unit_that_is_made_and_not_read_does_not_count() -> None:
    model = planted(separable(300))
    with torch.no_grad():
        model[2].weight[:, 4] = 0
    assert live_units(model) == (4, 5)
    with pytest.raises(ArgumentError, match="expected an nn.Sequential"):
        models.hidden_units(nn.Linear(2, 2))


def test_networks_take_rows_of_pixels() -> None:
    for pixels, sizes in ((784, {"dense": 266_200, "filters": 150 + 2400 + 256 * 120 + 120 * 84 + 840}), (64, {})):
        x = torch.rand(3, pixels)
        data = Dataset("none", x, torch.tensor([0, 1, 9]), x, torch.tensor([0, 1, 9]))
        for name, build in models.MODELS.items():
            model = build(data)
            assert model(x).shape == (3, 10)
            if name in sizes:
                assert sum(weight.numel() for weight in penalties.weights(model).values()) == sizes[name]


# --- criteria


def test_taylor_finds_the_unit_that_nothing_needs(data: Dataset) -> None:
    scores = taylor.scores(planted(data), data.train_inputs[:200], data.train_labels[:200])["0"]
    assert scores[3] < scores[:3].min() and scores[4] < 0.01 * scores[:3].min()


def test_vip_finds_what_says_nothing_of_the_class(data: Dataset) -> None:
    outputs = vip.hidden_outputs(planted(data), data.train_inputs)["0"]
    assert outputs.shape == (1000, 5)
    scores = vip.importance(outputs, data.train_labels, 2)
    assert scores[3:].max() < 0.3 < 1 < scores[:3].min()
    assert scores.square().mean().item() == pytest.approx(1.0)  # as VIP is defined


def test_vip_takes_filters_by_their_strongest_position() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
    x = torch.rand(3, 1, 2, 2)
    with torch.no_grad():
        expected = model[1](model[0](x)).amax(dim=(2, 3))
    assert torch.equal(vip.hidden_outputs(model, x)["0"], expected)


def test_refined_scores_are_norms_times_what_the_input_is_not_zero() -> None:
    model = nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 1), nn.ReLU(), nn.Linear(1, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 1, 1, 1], [-1, -1, -1, -1]]))
        model[0].bias.zero_()
        model[2].weight.copy_(torch.tensor([[3.0, 5.0]]))
    x = torch.tensor([[1.0, 0, 0, 0], [1, 0, 0, 0]])  # 1/4 is not 0; then the first unit is 1 and the second 0
    found = refined.scores(model, x)
    assert found["0"].tolist() == [1.0, 1.0] and found["2"].tolist() == [4.0]


def test_large_weights_go_first_and_zeros_last() -> None:
    weight = torch.tensor([0.0, -5.0, 1.0, 2.0])
    kept = selection.kept_by_share({"w": large.score(weight)}, 0.5, by_layer=True)["w"]
    assert kept.tolist() == [True, False, True, False]


def test_a_tenth_of_the_weights_goes_the_largest_of_each_round(data: Dataset) -> None:
    one = task(data, epochs=8)
    trained = one.trained()
    result = large.run(one)
    gone = torch.cat([~mask.flatten() for mask in result.masks.values()])
    assert float(gone.float().mean()) == pytest.approx(large.SHARE, abs=0.01)
    sizes = torch.cat([weight.detach().abs().flatten() for weight in penalties.weights(trained).values()])
    first = sizes.topk(round(large.SHARE / 2 * len(sizes))).indices
    assert gone[first].all()


def test_filters_keep_the_fully_connected_units(data: Dataset) -> None:
    from benchmarks.neighbours import units

    result = units.l1_filters(task(data, "filters", 4))
    assert all(result.masks[f"{layer}.weight"].any(dim=1).all() for layer in ("8", "10"))
    assert selection.kept_by_share({"a": criteria.unit_norms(torch.tensor([[1.0, 1], [3, -3], [0.1, 0]]))}, 1 / 3, by_layer=True)["a"].tolist() == [
        True,
        True,
        False,
    ]


# --- schedules


def test_dropnet_drops_the_quietest_fifth() -> None:
    scores = {"0": torch.tensor([0.1, 5.0, 3.0, 0.2, 4.0]), "2": torch.tensor([0.05, 9.0, 8.0, 7.0, 6.0])}
    alive = {name: torch.ones(5, dtype=torch.bool) for name in scores}
    once = dropnet.dropped(scores, alive, 0.2)
    assert once["0"].tolist() == [False, True, True, True, True] and once["2"].tolist() == [False, True, True, True, True]
    twice = dropnet.dropped(scores, once, 0.2)  # a fifth of eight: two, the next quietest
    assert twice["0"].tolist() == [False, True, False, False, True] and torch.equal(twice["2"], once["2"])
    everything = dropnet.dropped(scores, alive, 1.0)
    assert [int(kept.sum()) for kept in everything.values()] == [1, 1] and everything["0"][1] and everything["2"][1]


def test_dropnet_scores_are_mean_sizes_of_activations(data: Dataset) -> None:
    model = planted(data)
    found = dropnet.node_scores(model, data.train_inputs)["0"]
    with torch.no_grad():
        torch.testing.assert_close(found, model[:2](data.train_inputs).abs().mean(dim=0))


def test_dropnet_keeps_the_last_network_above_kappa(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dropnet, "KAPPA", 0.9)
    # an epoch must be enough to learn from the start
    one = task(replace(data, train_inputs=10 * data.train_inputs))
    result = dropnet.run(one)
    kept = live_units(result.model)[0]
    assert kept <= 40 * 0.8 ** (result.notes["cycles"] - 1) + 3  # rounding, cycle by cycle
    assert result.notes["cycles"] > 1 and one.held_accuracy(result.model) > 0.95


def test_dsd_is_dense_in_the_end(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    one = task(data)
    held: list[float] = []
    fit = one.fit

    def watched(model: nn.Module, epochs: int, **options) -> nn.Module:
        held.append(float(torch.cat([mask.flatten() for mask in options["masks"].values()]).float().mean()) if options.get("masks") else 1.0)
        return fit(model, epochs, **options)

    monkeypatch.setattr(one, "fit", watched)
    result = dsd.run(one)
    assert held == pytest.approx([1.0, 0.5, 1.0], abs=0.01)
    # dead units get no gradient, and stay as they were
    assert torch.cat([mask.flatten() for mask in result.masks.values()]).float().mean() > 0.7


# --- penalties


def loses_noise(result: Outcome) -> bool:
    """Whether the noise pixels have fewer first-layer weights left than the pixels that say the class."""
    kept = result.masks["0.weight"].float().mean(dim=0)
    return bool(kept[3:].mean() < 0.8 * kept[:3].mean())


def test_an_l1_penalty_lets_the_noise_go(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norms, "L1", 3e-3)
    one = task(data, epochs=12)
    result = norms.l1(one)
    assert loses_noise(result) and one.held_accuracy(result.model) > 0.97


def test_the_sparse_group_lasso_leaves_the_zeros_of_its_copy(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_group_lasso, "PENALTY", 2e-4)
    monkeypatch.setattr(sparse_group_lasso, "EVERY", 5)
    one = task(data, epochs=12)
    result = sparse_group_lasso.run(one)
    kept = float(torch.cat([mask.flatten() for mask in result.masks.values()]).float().mean())
    assert kept < 0.9 and loses_noise(result) and one.held_accuracy(result.model) > 0.97
    assert result.notes["coupling"] == pytest.approx(sparse_group_lasso.COUPLING * sparse_group_lasso.GROWTH)


def test_oicsr_removes_the_unit_of_least_joined_norm(data: Dataset) -> None:
    model = planted(data)
    norms_of = penalties.joined_norms(penalties.weights(model), "0", "2").detach()
    assert norms_of.argmin() == 4 or norms_of.argmin() == 3
    result = oicsr.run(task(data))
    left = penalties.joined_norms(penalties.weights(result.model), "0", "2")
    assert int((left == 0).sum()) == int((~result.masks["0.weight"].any(dim=1)).sum()) > 0


def test_features_are_those_behind_the_relus(data: Dataset) -> None:
    model = task(data).build()
    features = feature_flow.Features(model)
    x = data.train_inputs[:7]
    for _ in range(2):  # of the last forward pass only
        model(x)
    assert [tuple(value.shape) for value in features.values] == [(7, 16), (7, 24), (7, 16)]
    assert torch.equal(features.values[0], x) and torch.equal(features.values[1], model[:2](x))
    features.remove()
    assert not model._forward_pre_hooks and not any(module._forward_hooks for module in model)


def test_mars_moves_no_row_further_than_the_radius(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mars, "RADIUS", 0.05)
    result = mars.run(task(data))
    assert 0.04 < result.notes["moved"] <= 0.05 + 1e-5
    share = 1 - float(torch.cat([mask.flatten() for mask in result.masks.values()]).float().mean())
    assert share == pytest.approx(result.notes["share"], abs=0.01)


def test_dropout_shares_the_modules() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    wrapped = norms.with_dropout(model, 0.5)
    assert [type(module).__name__ for module in wrapped] == ["Linear", "ReLU", "Dropout", "Linear"]
    assert wrapped[0] is model[0] and wrapped[3] is model[2]


def test_an_outcome_names_its_zeros() -> None:
    model = planted(separable(300))
    found: Tensor = outcome(model, told=1).masks["0.weight"]
    assert int(found.sum()) == 3 + 11 + 11 and outcome(model, told=1).notes == {"told": 1}
