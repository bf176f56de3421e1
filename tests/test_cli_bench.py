"""`nettrim bench` on an output folder: what it measures, and when it cannot."""

import json

import numpy as np
import tiny_models
from commands import calibration_file, nettrim
from networks import chain, samples
from torch.export import Dim, export
from torch.export import save as save_program

import nettrim as package


def test_a_row_for_each_form(tmp_path):
    data = ("--calibration", calibration_file(tmp_path))
    assert nettrim("prune", "commands:make_chain", *data, "--sparsity", 0.5, "--out", tmp_path / "out", "--quiet").exit_code == 0
    result = nettrim("bench", tmp_path / "out", "--batch", 1, "--batch", 2, "--threads", 1, "--json")
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    found = json.loads(result.stdout)
    assert {(one["form"], one["batch"]) for one in found["timings"]} >= {("dense", 1), ("dense", 2), ("sparse", 1), ("sparse", 2)}
    assert found["bytes"]["dense"] == 4 * (8 * 12 + 12 + 12 * 4 + 4)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Speed, batch 1, threads 1" in page and "times dense" in page and "Compressed file" in page
    printed = nettrim("bench", tmp_path / "out", "--batch", 1, "--threads", 1).stdout
    assert "dense" in printed and "compressed file" in printed and "batch 1: ms" in printed


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
        result = nettrim("bench", out, "--batch", 2, "--threads", 1)
        assert result.exit_code == 0, result.output


def test_what_it_refuses(tmp_path):
    result = nettrim("bench", tmp_path)
    assert result.exit_code == 1 and "has no report.json; expected a folder that 'nettrim prune' wrote" in result.stderr
    package.save(package.prune(chain(8, 12, 4), samples(60, 8), sparsity=0.5), tmp_path / "out")
    result = nettrim("bench", tmp_path / "out", "--model", "commands:make_chain")
    assert result.exit_code == 1 and "give --calibration" in result.stderr
    np.save(tmp_path / "narrow.npy", samples(10, 7).numpy())
    result = nettrim("bench", tmp_path / "out", "--model", "commands:make_chain", "--calibration", tmp_path / "narrow.npy")
    assert result.exit_code == 1 and len(result.stderr.splitlines()) == 1 and "could not run" in result.stderr
    assert nettrim("bench", tmp_path / "out", "--batch", 0).exit_code == 2
