"""`nettrim verify` on folders as they were written, and on folders that somebody changed."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import tiny_models
from commands import calibration_file, make_chain, nettrim
from networks import chain, samples
from torch.export import Dim, export
from torch.export import save as save_program

import nettrim as package


@pytest.fixture
def out(tmp_path) -> Path:
    options = ("--calibration", calibration_file(tmp_path), "--epsilon", 0.3, "--out", tmp_path / "out", "--quiet")
    result = nettrim("prune", "commands:make_chain", *options)
    assert result.exit_code == 0, result.output
    return tmp_path / "out"


def test_holds_from_the_recipe_alone(out):
    result = nettrim("verify", out)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith("verification holds: ") and "layer 0" in result.stdout
    printed = json.loads(nettrim("verify", out, "--json").stdout)
    assert printed["holds"] is True and len(printed["checks"]) > 20
    result = nettrim("verify", out, "--quiet", "--no-bounds")
    assert (result.exit_code, result.output) == (0, "")


def change_a_weight(out: Path) -> None:
    weights = safetensors.torch.load_file(out / "model.safetensors")
    entry = weights["0.weight"].view(-1)[weights["0.weight"].view(-1).abs().argmax()]
    entry.mul_(1.5)
    safetensors.torch.save_file(weights, out / "model.safetensors", metadata={"format": "pt"})


def flip_a_mask_bit(out: Path) -> None:
    masks = safetensors.torch.load_file(out / "masks.safetensors")
    masks["2.weight"][0, 0] ^= True
    safetensors.torch.save_file(masks, out / "masks.safetensors", metadata={"format": "pt"})


def lower_a_figure(out: Path) -> None:
    report = json.loads((out / "report.json").read_text())
    report["layers"][0]["discrepancy"] *= 0.99
    (out / "report.json").write_text(json.dumps(report))


@pytest.mark.parametrize("forge", [change_a_weight, flip_a_mask_bit, lower_a_figure])
def test_a_forged_folder(out, forge):
    forge(out)
    result = nettrim("verify", out)
    assert result.exit_code == 1 and result.stderr == ""
    assert result.stdout.startswith("VERIFICATION FAILS") and "BROKEN" in result.stdout


def test_other_networks_and_data(out, tmp_path):
    np.save(tmp_path / "other.npy", samples(60, 8, seed=9).numpy())
    assert nettrim("verify", out, "--calibration", tmp_path / "other.npy", "--quiet").exit_code == 1
    assert nettrim("verify", out, "--model", "commands:make_random", "--quiet").exit_code == 1
    safetensors.torch.save_file(make_chain().state_dict(), tmp_path / "w.safetensors")
    options = ("--model", "commands:make_random", "--weights", tmp_path / "w.safetensors", "--quiet")
    assert nettrim("verify", out, *options).exit_code == 0  # the same network by another way
    np.save(tmp_path / "samples.npy", samples(60, 8, seed=9).numpy())
    result = nettrim("verify", out)
    assert result.exit_code == 1 and "is not what it was when the recipe was written" in result.stderr


def test_saved_from_python(tmp_path):
    package.save(package.prune(chain(8, 12, 4), samples(60, 8), sparsity=0.5), tmp_path / "out")
    result = nettrim("verify", tmp_path / "out")
    assert result.exit_code == 1 and result.stderr.endswith("has no recipe that says the model; give --model\n")
    result = nettrim("verify", tmp_path / "out", "--model", "commands:make_chain")
    assert result.exit_code == 1 and result.stderr.endswith("says the calibration; give --calibration\n")
    options = ("--model", "commands:make_chain", "--calibration", calibration_file(tmp_path))
    assert nettrim("verify", tmp_path / "out", *options, "--quiet").exit_code == 0


def test_a_hugging_face_folder_and_a_program(tmp_path):
    tiny_models.llama(tmp_path / "llama")
    (tmp_path / "text.txt").write_text(tiny_models.TEXT)
    save_program(export(chain(8, 12, 4), (samples(3, 8),), dynamic_shapes=({0: Dim.AUTO},)), tmp_path / "net.pt2")
    for model, calibration, *more in (
        (tmp_path / "llama", tmp_path / "text.txt", "--sequence-length", 16, "--samples", 12),
        (tmp_path / "net.pt2", calibration_file(tmp_path)),
    ):
        out = tmp_path / f"{model.stem}-out"
        result = nettrim("prune", model, "--calibration", calibration, *more, "--sparsity", 0.5, "--out", out, "--quiet")
        assert result.exit_code == 0, result.output
        result = nettrim("verify", out)
        assert result.exit_code == 0, result.output


def test_what_it_refuses(out, tmp_path):
    result = nettrim("verify", tmp_path)
    assert result.exit_code == 1 and "has no report.json; expected a folder that 'nettrim prune' wrote" in result.stderr
    assert nettrim("verify", out, "--json", "--quiet").exit_code == 2
    (out / "model.safetensors").write_bytes(b"\x08\x00")
    result = nettrim("verify", out)
    assert result.exit_code == 1 and "model.safetensors is damaged" in result.stderr and len(result.stderr.splitlines()) == 1
