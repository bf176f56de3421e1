"""The speed benchmark: its layers and files, its verdicts, and the command at its tiny size."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from benchmarks import speed
from nettrim.timing import Timing


def command(*arguments: str) -> Any:
    return CliRunner().invoke(speed.main, arguments)


def test_the_tiny_command_prints_every_section_and_resumes(tmp_path: Path) -> None:
    out = tmp_path / "speed.json"
    result = command("--tiny", "--out", str(out))
    assert result.exit_code == 0, result.output
    for words in ("layers: times as fast as dense", "blocks: times", "csr, batch 1", "bsr, batch 16", "files: bytes", "compressed file", "written"):
        assert words in result.output
    runs = json.loads(out.read_text())["runs"]
    assert [run["settings"]["section"] for run in runs] == ["layers"] * 4 + ["blocks"] * 3 + ["files"] * 2
    assert all(run["csr"]["microseconds"] > 0 and run["csr"]["speedup"] > 0 for run in runs[:-2])
    before = out.read_text()
    assert command("--tiny", "--out", str(out)).exit_code == 0
    assert out.read_text() == before


@pytest.mark.parametrize("side", [1, 4])
def test_a_layer_keeps_its_share_in_its_blocks(side: int) -> None:
    weight = speed.layer(128, 0.1, side, seed=0).weight.detach()
    assert 0.07 < float((weight != 0).float().mean()) < 0.13
    full = (weight != 0).unflatten(0, (-1, side)).unflatten(2, (-1, side)).sum((1, 3))
    assert set(full.unique().tolist()) == {0, side * side}


def test_bytes_are_those_of_values_positions_and_bias() -> None:
    found = speed.measure_file({"width": 64, "kept": 0.5, "side": 1, "seed": 0})
    nonzeros = int(speed.layer(64, 0.5, 1, 0).weight.count_nonzero())
    assert found["dense"] == 4 * (64 * 64 + 64) and found["csr"] == 8 * nonzeros + 4 * 65 + 4 * 64
    assert found["file"] == pytest.approx(4 * nonzeros + 512 + 256, abs=600)


@pytest.mark.parametrize(("speedup", "code"), [(2.6, 0), (2.4, 1)])
def test_what_is_wanted_is_judged(speedup: float, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def compare(calls: dict[str, Any], cpu: bool, threads: int, turns: int) -> dict[str, Timing]:
        assert (cpu, threads, turns) == (True, 1, 25) and all(torch.is_tensor(call()) for call in calls.values())
        return {form: Timing(1e-4, 1.0 if form == "dense" else speedup) for form in calls}

    monkeypatch.setattr(speed.timing, "compare", compare)
    result = command("--widths", "1024", "--kept", ".1,.05", "--batches", "1", "--threads", "1", "--out", str(tmp_path / "speed.json"))
    assert result.exit_code == code, result.output
    assert "reached: 10% kept" in result.output and ("MISSED: 5% kept" in result.output) == bool(code)


@pytest.mark.parametrize("arguments", [("--kept", "2"), ("--widths", "30"), ("--threads", "0"), ("--batches", "x")])
def test_wrong_options_are_refused(arguments: tuple[str, str]) -> None:
    assert command("--tiny", *arguments).exit_code == 2
