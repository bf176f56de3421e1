"""`checkpoint_dir`: no layer is solved twice, what comes out is the same to the bit, and a folder that is not this run's is refused by name."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpointing import INPUTS, files, heavier, in_fresh_process, model, same, state
from networks import chain
from torch import Tensor, nn

import nettrim
from nettrim import ArgumentError, CheckpointError, NetTrimError, prune, sealed

ASKED: dict[str, dict[str, Any]] = {
    "cascade": {"epsilon": 0.2},
    "parallel": {"epsilon": 0.2, "mode": "parallel", "max_rows": 40},
    "own budgets": {"epsilon": {"0": 0.1, nn.Linear: 0.3}, "reweight": 1},
    "exact zeros": {"sparsity": 0.5},
    "a pattern": {"pattern": "2:4", "ignore": "4"},
    "neurons": {"sparsity": 0.3, "pattern": "neuron"},
    "a budget": {"budget": 0.3},
    "repair": {"sparsity": 0.5, "repair": "auto"},
}


class Cut(Exception):
    """Stands for whatever ends a call."""


def cut_after(count: int) -> Callable[[object], None]:
    """A progress callable that ends the call when so many layers are done."""
    seen = []

    def progress(event: object) -> None:
        seen.append(event)
        if len(seen) == count:
            raise Cut

    return progress


@pytest.mark.parametrize("asked", ASKED)
def test_a_call_that_was_cut_off_goes_on_where_it_was(tmp_path: Path, solves: list[int], asked: str) -> None:
    undisturbed = prune(model(), INPUTS, **ASKED[asked])
    needed = len(solves)
    for count in range(1, needed):
        solves.clear()
        folder = tmp_path / str(count)
        with pytest.raises(Cut):
            prune(model(), INPUTS, checkpoint_dir=folder, progress=cut_after(count), **ASKED[asked])
        assert len(solves) == count
        result = prune(model(), INPUTS, checkpoint_dir=folder, **ASKED[asked])
        assert same(result, undisturbed)
        assert len(solves) == needed
        assert state(result) == {"folder": str(folder), "resumed": count, "solved": needed - count, "notes": []}
        if count == 4:
            break  # of the many trials of a budget, a few are enough


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16, torch.float16))
def test_every_dtype_comes_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    first = prune(model().to(dtype), INPUTS, epsilon=0.3, checkpoint_dir=tmp_path)
    again = prune(model().to(dtype), INPUTS, epsilon=0.3, checkpoint_dir=str(tmp_path), inplace=True)
    assert same(again, first) and state(again)["resumed"] == 3 and next(again.model.parameters()).dtype == dtype


def test_the_report_says_so_and_keeps_the_seconds(tmp_path: Path) -> None:
    first = prune(model(), INPUTS, epsilon=0.2, checkpoint_dir=tmp_path)
    again = prune(model(), INPUTS, epsilon=0.2, checkpoint_dir=tmp_path)
    assert again.report.layers == first.report.layers  # seconds included
    assert again.report.seconds >= sum(layer.seconds for layer in first.report.layers)
    assert f"checkpoint {tmp_path}: 3 layers taken from it, 0 solved" in str(again.report)
    assert nettrim.Report.from_dict(again.report.to_dict()) == again.report
    assert "checkpoint" not in prune(model(), INPUTS, epsilon=0.2).report.options


def test_nothing_in_the_folder_can_run_anything(tmp_path: Path) -> None:
    prune(model(), INPUTS, sparsity=0.5, checkpoint_dir=tmp_path)
    for path in (path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"):
        assert path.suffix in (".json", ".safetensors")
        if path.suffix == ".json":
            json.loads(path.read_text())
        else:
            sealed.read(path)


# --------------------------------------------------------------------------------------------------------- of another run


def with_buffer(value: float) -> nn.Module:
    other = model()
    other.register_buffer("scale", torch.tensor(value))
    return other


def forward(network: nn.Module, batch: Tensor) -> Tensor:
    return network(batch)


OTHERS: dict[str, tuple[Callable[[], nn.Module], Tensor, dict[str, Any], str]] = {
    "a weight": (heavier, INPUTS, {}, r"differs in: model parameter '2.weight'\. "),
    "a buffer": (lambda: with_buffer(2.0), INPUTS, {}, "model buffer 'scale'"),
    "a layer more": (lambda: chain(8, 12, 6, 4, last_relu=True), INPUTS, {}, "model structure"),
    "another precision": (lambda: model().double(), INPUTS, {}, "model parameter '0.weight'"),
    "samples": (model, INPUTS.flip(0), {}, r"differs in: calibration data\. "),
    "epsilon": (model, INPUTS, {"epsilon": 0.3}, r"option epsilon \(there 0.2, now 0.3\)"),
    "mode": (model, INPUTS, {"mode": "parallel"}, 'option mode .there "cascade", now "parallel"'),
    "tol": (model, INPUTS, {"tol": 1e-2}, "option tol"),
    "seed": (model, INPUTS, {"seed": 1}, "option seed"),
    "holdout": (model, INPUTS, {"holdout": 0.2}, "option holdout"),
    "targets": (model, INPUTS, {"targets": ["0", "2"]}, "option targets .there None, now 0, 2"),
    "ignore": (model, INPUTS, {"ignore": nn.ReLU}, "option ignore .there none, now torch.nn.modules.activation.ReLU"),
    "forward_fn": (model, INPUTS, {"forward_fn": forward}, "option forward_fn .there None, now .*forward"),
    "device": (model, INPUTS, {"device": "cpu"}, "option device"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_the_folder_of_another_run_is_refused_by_what_differs(tmp_path: Path, other: str) -> None:
    prune(model(), INPUTS, epsilon=0.2, checkpoint_dir=tmp_path)
    make, data, options, message = OTHERS[other]
    before = {path: path.read_bytes() for path in files(tmp_path)}
    with pytest.raises(CheckpointError, match=message):
        prune(make(), data, **{"epsilon": 0.2, **options}, checkpoint_dir=tmp_path)
    assert {path: path.read_bytes() for path in files(tmp_path)} == before


def test_the_folder_of_another_way_of_solving_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its layers would be behind others, and in another metric."""
    monkeypatch.setattr("nettrim.fingerprints._WAY", 1)
    prune(model(), INPUTS, epsilon=0.2, checkpoint_dir=tmp_path)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"way of solving \(there 1, now 2\)"):
        prune(model(), INPUTS, epsilon=0.2, checkpoint_dir=tmp_path)


def test_the_folder_of_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prune(model(), INPUTS, epsilon=0.2, checkpoint_dir=tmp_path)
    monkeypatch.setattr(nettrim, "__version__", "9.9")
    with pytest.raises(CheckpointError, match=r"nettrim version \(there [0-9.]+, now 9.9\)"):
        prune(model(), INPUTS, epsilon=0.2, checkpoint_dir=tmp_path)


def test_what_becomes_of_a_failure_may_change(tmp_path: Path, solves: list[int]) -> None:
    """A layer that cannot be solved ends the call; the next call keeps it dense, and has the layers before it already."""
    asked: dict[str, Any] = {"epsilon": 0.2, "consistency": "paper", "kappa": 1e-3, "max_iter": 200, "checkpoint_dir": tmp_path}
    with pytest.raises(nettrim.InfeasibleError, match="layer '4'"):
        prune(model(), INPUTS, **asked)
    kept = prune(model(), INPUTS, on_failure="keep_dense", **asked)
    assert len(solves) == 4 and state(kept)["resumed"] == 2 and "no weights keep the budget" in kept.report.skipped["4"]
    again = prune(model(), INPUTS, on_failure="keep_dense", **asked)
    assert len(solves) == 4 and same(again, kept) and state(again)["resumed"] == 3
    with pytest.raises(nettrim.InfeasibleError, match="layer '4'"):
        prune(model(), INPUTS, **asked)


# ------------------------------------------------------------------------------------------------------------- the folder


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(CheckpointError, match="holds other files .thesis.tex.*new or empty"):
        prune(model(), INPUTS, epsilon=0.2, checkpoint_dir=tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "mine"


@pytest.mark.parametrize("given", (3, "", b""))
def test_a_folder_that_is_no_path(given: Any) -> None:
    with pytest.raises(ArgumentError, match="checkpoint_dir=.*expected the path of a folder"):
        prune(model(), INPUTS, epsilon=0.2, checkpoint_dir=given)


@pytest.mark.parametrize("below", ("", "deeper/still"))
def test_a_folder_that_cannot_be_made(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be made a folder"):
        prune(model(), INPUTS, epsilon=0.2, checkpoint_dir=tmp_path / "file" / below)


def refusal(folder: Path) -> str:
    """What a call on the folder says against it."""
    try:
        prune(model(), INPUTS, epsilon=0.2, checkpoint_dir=folder)
    except NetTrimError as error:
        return f"{type(error).__name__} {error}"
    return ""


def test_a_second_call_on_the_folder_says_so_and_stops(tmp_path: Path) -> None:
    """In a thread of this process, and in another process, while the first one is at work; and afterwards not."""
    said: dict[str, str] = {}

    def second() -> None:
        said["thread"] = refusal(tmp_path)

    def progress(event: nettrim.ProgressEvent) -> None:
        if event.index != 2:
            return
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        said["process"] = in_fresh_process(refusal, tmp_path)

    first = prune(model(), INPUTS, epsilon=0.2, checkpoint_dir=tmp_path, progress=progress)
    for where in ("thread", "process"):
        assert "CheckpointError" in said[where] and "is in use by another call" in said[where]
    assert same(prune(model(), INPUTS, epsilon=0.2, checkpoint_dir=tmp_path), first)
