"""The sparsity benchmark: each pruner against known answers, the judge, and the command at its tiny size, offline."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor, nn

from benchmarks import data, networks, pruners, sparsity, sparsity_judge, sparsity_minilm, sparsity_options
from benchmarks.mnist import linear_layers
from benchmarks.pruners import PRUNERS
from benchmarks.solver_problems import correlated_layer
from nettrim.errors import ConvergenceError

PEERS = tuple(PRUNERS)
UPDATING = ("sparsegpt", "alps", "fistapruner")


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing that a test trains lands in the checkout, or comes from it; one network serves all tests here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "CACHE", tmp_path_factory.mktemp("cache"))
        yield


def layer(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Weights (15, 40) of a random layer and the Gram matrix of its inputs, which are correlated."""
    A, _ = correlated_layer(300, 40, 15, seed=3, dtype=torch.float64)
    W = torch.randn(15, 40, generator=torch.Generator().manual_seed(4), dtype=dtype)
    return W, A.T @ A


# --- the pruners


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kept", [7, 150, 157, 301, 600])
@pytest.mark.parametrize("method", PEERS)
def test_exactly_so_many_weights_are_kept(method: str, kept: int, dtype: torch.dtype) -> None:
    W, G = layer(dtype)
    before = W.clone(), G.clone()
    pruned = PRUNERS[method](W, G, kept)
    assert pruned.shape == W.shape and pruned.dtype == dtype and pruned.isfinite().all()
    # what FISTA has shrunk to 0 may be more than what had to go
    assert pruned.count_nonzero() == kept or (method == "fistapruner" and pruned.count_nonzero() < kept)
    assert torch.equal(W, before[0]) and torch.equal(G, before[1])


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:8"])
@pytest.mark.parametrize("method", PEERS)
def test_patterns_hold_in_every_group_of_inputs(method: str, pattern: str) -> None:
    W, G = layer()
    pruned = PRUNERS[method](W, G, pattern)
    n, m = pruners.parse_pattern(pattern)
    counts = pruned.view(15, -1, m).count_nonzero(dim=2)
    assert (counts <= n).all() if method == "fistapruner" else (counts == n).all()
    assert sparsity_minilm.keeps(pruned, pattern) and not sparsity_minilm.keeps(W, pattern)


@pytest.mark.parametrize("pattern", ["4", "0:4", "5:4", "a:b", "2:4:8"])
def test_what_is_no_pattern_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="expected 'n:m'"):
        pruners.parse_pattern(pattern)


def test_a_pattern_that_does_not_divide_the_inputs_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 7; this layer has 40"):
        pruners.magnitude(*layer(), "3:7")


@pytest.mark.parametrize("kept", [60, 180, "2:4"])
@pytest.mark.parametrize("method", UPDATING)
def test_updated_weights_are_no_worse_than_the_largest(method: str, kept: pruners.Kept) -> None:
    W, G = layer()
    error = sparsity_judge.layer_error
    assert error(W, PRUNERS[method](W, G, kept), G) < error(W, pruners.magnitude(W, G, kept), G)


def test_alps_is_the_best_of_the_peers_on_a_layer() -> None:
    W, G = layer()
    errors = {method: sparsity_judge.layer_error(W, prune(W, G, 180), G) for method, prune in PRUNERS.items()}
    assert min(errors, key=lambda method: errors[method]) == "alps"


def test_magnitude_and_wanda_keep_what_scores_highest() -> None:
    W = torch.tensor([[3.0, -2.0, 1.0, 0.5], [-9.0, 8.0, 7.0, -6.0]])
    G = torch.diag(torch.tensor([1.0, 1.0, 100.0, 1e4])).double()
    assert pruners.magnitude(W, G, 4).tolist() == [[0, 0, 0, 0], [-9, 8, 7, -6]]
    # scores |w| * (1, 1, 10, 100), neuron by neuron
    assert pruners.wanda(W, G, 4).tolist() == [[0, 0, 1, 0.5], [0, 0, 7, -6]]
    # the odd one goes where the next score is higher: 9 against 3
    assert pruners.wanda(W, G, 5).tolist() == [[0, 0, 1, 0.5], [-9, 0, 7, -6]]
    assert pruners.wanda(W, G, "1:2").tolist() == [[3, 0, 0, 0.5], [-9, 0, 0, -6]]


def test_sparsegpt_refits_the_columns_to_the_right() -> None:
    # one neuron, two inputs: the second takes over what the first contributed along it
    G = torch.tensor([[1.0, 0.5], [0.5, 4.0]], dtype=torch.float64)
    pruned = pruners.sparsegpt(torch.tensor([[0.1, 1.0]], dtype=torch.float64), G, 1, damping=0.0)
    torch.testing.assert_close(pruned, torch.tensor([[0.0, 1 + 0.1 * 0.5 / 4]], dtype=torch.float64))


def test_sparsegpt_gives_every_block_its_share() -> None:
    W, G = layer()
    pruned = pruners.sparsegpt(W, G, 150, block=8)
    assert [int(part.count_nonzero()) for part in pruned.split(8, dim=1)] == [30] * 5


@pytest.mark.parametrize("method", UPDATING)
def test_inputs_that_are_never_there_lose_their_weights(method: str) -> None:
    W, G = layer()
    G = G.clone()
    G[:5], G[:, :5] = 0, 0
    W[:, :5] *= 100
    pruned = PRUNERS[method](W, G, 100)
    assert pruned.isfinite().all()
    if method != "alps":  # its ridge term pays for them: they are the largest weights
        assert not pruned[:, :5].any()


def test_alps_reaches_a_planted_support() -> None:
    generator = torch.Generator().manual_seed(0)
    A, _ = correlated_layer(400, 40, 10, seed=1)
    planted = torch.zeros(10, 40, dtype=torch.float64)
    for row in planted:
        row[torch.randperm(40, generator=generator)[:6]] = 1 + torch.rand(6, generator=generator, dtype=torch.float64)
    noise = 0.02 * torch.randn(10, 40, generator=generator, dtype=torch.float64)
    pruned = pruners.alps(planted + noise, A.T @ A, 60)
    assert torch.equal(pruned != 0, planted != 0)
    assert sparsity_judge.layer_error(planted + noise, pruned, A.T @ A) < 0.02


def test_alps_weights_are_optimal_on_their_support() -> None:
    W, G = layer()
    pruned = pruners.alps(W, G, 180, refine=200)
    H = G + 0.01 * G.diagonal().mean() * torch.eye(40, dtype=torch.float64)
    gradient = ((pruned - W) @ H)[pruned != 0]
    assert gradient.abs().max() < 1e-8 * (W @ H).abs().max()


def test_fistas_lasso_meets_its_optimality_conditions() -> None:
    W, G = layer()
    C = W @ G
    penalty = 0.1 * float(C.abs().max())
    solution = pruners.lasso(C, G, penalty, torch.zeros_like(W), max_iter=50_000, tol=1e-12)
    gradient = solution @ G - C
    on = solution != 0
    assert 0 < on.sum() < W.numel()
    torch.testing.assert_close(gradient[on], -penalty * solution[on].sign(), rtol=0, atol=1e-6 * penalty)
    assert gradient[~on].abs().max() <= penalty * (1 + 1e-9)


def test_fistapruner_aims_at_the_dense_stream_where_it_has_it() -> None:
    W, G = layer()
    A, _ = correlated_layer(300, 40, 15, seed=3)
    disturbed = A + 0.3 * torch.randn(A.shape, generator=torch.Generator().manual_seed(5), dtype=A.dtype)
    G = disturbed.T @ disturbed
    target = A @ W.T
    alone = pruners.fistapruner(W, G, 180)
    corrected = pruners.fistapruner(W, G, 180, (A.T @ disturbed, A.T @ A))
    assert (disturbed @ corrected.T - target).norm() < (disturbed @ alone.T - target).norm()


# --- the judge


def tiny_network(inputs: int = 12) -> nn.Sequential:
    torch.manual_seed(0)
    return networks.build(inputs, (10, 8), 4)


def test_every_layer_keeps_its_share_to_one_weight() -> None:
    assert sparsity_judge.kept_weights(tiny_network(), 0.1, 0.25) == {"0": 12, "2": 8, "4": 8}


def test_a_method_sees_the_inputs_of_the_network_pruned_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = tiny_network(), torch.rand(50, 12)
    seen = []

    def first_column_only(W: Tensor, G: Tensor, kept: pruners.Kept) -> Tensor:
        seen.append((G, kept))
        return W * (torch.arange(W.shape[1]) == 0)

    monkeypatch.setitem(PRUNERS, "magnitude", first_column_only)
    pruned = sparsity_judge.prune_by_peer(model, x, {"0": 1, "2": 2, "4": 3}, "magnitude")
    with torch.no_grad():
        for (G, kept), depth in zip(seen, (0, 2, 4), strict=True):
            inputs = pruned[:depth](x).double()
            torch.testing.assert_close(G, inputs.T @ inputs)
            assert kept == depth // 2 + 1
    assert all(torch.equal(a.bias, b.bias) for a, b in zip(linear_layers(model).values(), linear_layers(pruned).values(), strict=True))
    assert all(int(layer.weight.count_nonzero()) == layer.weight.numel() for layer in linear_layers(model).values())


def test_layer_errors_are_measured_behind_the_relu() -> None:
    model, x = tiny_network(), torch.rand(50, 12)
    assert set(sparsity_judge.layer_errors(model, model, x).values()) == {0.0}
    pruned = sparsity_judge.prune_by_peer(model, x, {"0": 30, "2": 20, "4": 10}, "wanda")
    errors = sparsity_judge.layer_errors(model, pruned, x)
    with torch.no_grad():
        for name, depth in (("0", 2), ("2", 4), ("4", 5)):
            dense = model[:depth](x)
            assert errors[name] == pytest.approx(float((pruned[:depth](x) - dense).norm() / dense.norm()), rel=1e-5)


def test_ours_is_asked_for_the_same_number_of_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = tiny_network(), torch.rand(50, 12)
    called: dict[str, Any] = {}

    def prune(model: nn.Module, calibration: Tensor, **arguments: Any) -> Any:
        called.update(arguments)
        return type("PruneResult", (), {"model": model})

    monkeypatch.setattr("benchmarks.sparsity_judge.nettrim.prune", prune)
    monkeypatch.setitem(sparsity_judge.OURS, "variant", {"repair": 0.5})
    sparsity_judge.prune_by_ours(model, x, {"0": 12, "2": 8, "4": 8}, "variant", seed=3)
    assert {name: round((1 - share) * size) for (name, share), size in zip(called["sparsity"].items(), (120, 80, 32), strict=True)} == {
        "0": 12,
        "2": 8,
        "4": 8,
    }
    assert (called["mode"], called["holdout"], called["seed"], called["repair"]) == ("cascade", 0.0, 3, 0.5)


# --- the linear layers of a model


def test_layers_are_captured_in_the_order_in_which_they_run_and_measured() -> None:
    model, x = tiny_network(), torch.rand(6, 5, 12)
    layers = sparsity_minilm.capture(model, lambda: model(x))
    assert [one.name for one in layers] == ["0", "2", "4"]
    assert torch.equal(layers[0].A, x.flatten(0, 1)) and layers[1].A.shape == (30, 10)
    torch.testing.assert_close(layers[0].G, layers[0].A.double().T @ layers[0].A.double())
    assert not any(module._forward_pre_hooks for module in model.modules())
    measured = sparsity_minilm.measure_layers(layers, "wanda", 0.5)
    assert measured["within"] and [one["nonzeros"] for one in measured["layers"].values()] == [60, 40, 16]
    pruned = pruners.wanda(layers[0].W, layers[0].G, 60)
    direct = (layers[0].A @ (pruned - layers[0].W).T).norm() / (layers[0].A @ layers[0].W.T).norm()
    assert measured["layers"]["0"]["error"] == pytest.approx(float(direct), rel=1e-4)
    assert measured["mean_error"] == pytest.approx(sum(one["error"] for one in measured["layers"].values()) / 3)


def test_the_gram_matrix_is_in_the_time_of_those_that_are_given_it() -> None:
    model, x = tiny_network(), torch.rand(30, 12)
    layers = [replace(one, seconds=1000.0) for one in sparsity_minilm.capture(model, lambda: model(x))]
    charged = {method for method in sparsity_judge.METHODS if sparsity_minilm.measure_layers(layers, method, 0.5)["seconds"] > 2999}
    assert charged == {"wanda", "sparsegpt", "alps", "fistapruner"}


def test_a_pruner_that_keeps_too_many_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRUNERS, "magnitude", lambda W, G, kept: W)
    model, x = tiny_network(), torch.rand(30, 12)
    layers = sparsity_minilm.capture(model, lambda: model(x))
    assert not sparsity_minilm.measure_layers(layers, "magnitude", 0.5)["within"]


def test_without_transformers_the_error_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(data.DataError, match="pip install transformers"):
        sparsity_minilm.load_layers(1, 8, 0)


# --- the command


def invoke(out: Path, *arguments: str) -> Result:
    return CliRunner().invoke(sparsity.main, ["--data", "digits", "--out", str(out), *arguments], catch_exceptions=False)


def test_every_peer_is_run_judged_printed_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "results.json"
    result = invoke(out, "--methods", ",".join(PEERS))
    assert result.exit_code == 0, result.output
    content = json.loads(out.read_text())
    runs = content["runs"]
    assert content["benchmark"] == "sparsity" and "commit" in content["environments"][0]
    assert [(run["settings"]["kept"], run["settings"]["method"]) for run in runs] == [(k, m) for k in (0.5, 0.2) for m in PEERS]
    sizes = {"0": 64 * 24, "2": 24 * 16, "4": 16 * 10}
    for run in runs:
        share = run["settings"]["kept"]
        assert run["wanted"] == {"0": round(share * sizes["0"]), "2": round(share * sizes["2"]), "4": sizes["4"] // 4}
        # blocks of digits are black in some corners: what SparseGPT must keep there is 0 already
        assert run["within"] and (run["nonzeros"] == run["wanted"] or run["settings"]["method"] in UPDATING)
        assert 0 <= run["accuracy"] <= 1 and math.isfinite(run["logit_error"]) and run["seconds"] > 0
        assert set(run["layer_errors"]) == set(sizes)
    of = {(run["settings"]["method"], run["settings"]["kept"]): run for run in runs}
    assert of["alps", 0.2]["logit_error"] < of["sparsegpt", 0.2]["logit_error"] < of["magnitude", 0.2]["logit_error"]
    assert "tiny: test accuracy" in result.output and "relative error of each layer's output" in " ".join(result.output.split())
    assert out.with_name("results-accuracy.png").read_bytes().startswith(b"\x89PNG")

    def never(*_: Any) -> dict[str, Any]:
        raise AssertionError("pruned again")

    before = out.read_bytes()
    monkeypatch.setattr(sparsity, "measure", never)
    assert invoke(out, "--methods", ",".join(PEERS)).exit_code == 0
    assert out.read_bytes() == before


def test_a_failed_run_and_one_that_keeps_too_many_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> dict[str, Any]:
        raise ConvergenceError("no end in sight")

    out = tmp_path / "results.json"
    with monkeypatch.context() as patch:
        patch.setattr(sparsity, "measure", fail)
        result = invoke(out, "--methods", "magnitude", "--kept", ".2")
    assert result.exit_code == 1 and "1 of 1 runs failed" in result.output
    assert json.loads(out.read_text())["runs"][0]["error"] == "ConvergenceError: no end in sight"
    monkeypatch.setitem(PRUNERS, "magnitude", lambda W, G, kept: W)
    result = invoke(out, "--methods", "magnitude", "--kept", ".2")
    assert result.exit_code == 1 and "keeps too many" in result.output


@pytest.mark.parametrize("arguments", [["--only", "mnist"], ["--kept", "1.5"], ["--methods", "best"], ["--samples", "0"]])
def test_wrong_options_are_refused(arguments: list[str], tmp_path: Path) -> None:
    result = invoke(tmp_path / "results.json", *arguments)
    assert result.exit_code == 2 and arguments[0] in result.output


def test_other_ways_to_ask_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparsity, "DIGITS", replace(sparsity.DIGITS, epochs=20, samples=200))
    out = tmp_path / "results.json"
    result = invoke(out, "--data", "digits", "--only", "options")
    assert result.exit_code == 0, result.output
    assert "other ways to ask" in result.output
    runs = json.loads(out.read_text())["runs"]
    assert {run["settings"]["case"] for run in runs} == set(sparsity_options.CASES)
    by_case = {run["settings"]["case"]: run for run in runs}
    assert all(run["holds"] for run in runs)
    assert by_case["half the neurons"]["speed_up"] > 0
    assert by_case["sparsity 0.9, auto"]["density"] == pytest.approx(0.1, abs=0.01)
    assert by_case["epsilon 0.1, l0"]["density"] < by_case["epsilon 0.1, l1"]["density"]
