"""``python -m benchmarks.neighbours`` at a tiny size: every method runs, is judged, tabled, resumed; and what the judge finds out."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn

import nettrim
from benchmarks.data import load
from benchmarks.neighbours import __main__ as command
from benchmarks.neighbours import judge, norms, tables
from benchmarks.neighbours.contract import EpochsError, Method, Outcome, Task, zeros
from benchmarks.neighbours.registry import METHODS, constants
from benchmarks.results import Results
from nettrim import MaskError
from nettrim.errors import ConvergenceError


def invoke(out: Path, *arguments: str) -> Result:
    return CliRunner().invoke(command.main, ["--data", "digits", "--out", str(out), *arguments], catch_exceptions=False)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """All methods, four epochs each."""
    out = tmp_path_factory.mktemp("neighbours") / "results.json"
    return out, invoke(out, "--epochs", "4", "--samples", "300", "--programs", "2")


def test_every_method_is_run_judged_printed_and_drawn(ran: tuple[Path, Result]) -> None:
    out, result = ran
    assert result.exit_code == 0, result.output
    content = json.loads(out.read_text())
    runs = {run["settings"]["method"]: run for run in content["runs"] if run["settings"]["section"] == "methods"}
    assert list(runs) == list(METHODS) and content["benchmark"] == "neighbours"
    for name, run in runs.items():
        whole = run["whole"]
        for key in ("weights", "units", "layers"):
            assert 0 <= run["after"][key] <= run[key] <= whole[key], (name, key)
        assert 0 <= run["accuracy"] <= 1 and run["seconds"] > 0
        assert run["after"]["accuracy"] >= run["accuracy"] - judge.FALL - 1e-9
        assert len(run["after"]["tried"]) == command.DIGITS.halvings
        assert ("auto" in run["after"]) == METHODS[name].auto
        if METHODS[name].auto:
            found = run["after"]["auto"]
            assert found["weights"] <= run["after"]["weights"] and found["accuracy"] >= run["accuracy"] - judge.FALL - 1e-9
            assert len(found["tried"]) == command.DIGITS.auto_halvings
    assert {"each alone", "against the certified optimum"} <= set(line.strip() for line in result.output.splitlines())
    assert out.with_name("results-accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_a_second_call_repeats_nothing(ran: tuple[Path, Result], monkeypatch: pytest.MonkeyPatch) -> None:
    out, _ = ran
    before = out.read_bytes()

    def never(*_: Any) -> Any:
        raise AssertionError("run again")

    monkeypatch.setattr(command, "measure", never)
    monkeypatch.setattr("benchmarks.neighbours.oracle_report.measure", never)
    assert invoke(out, "--epochs", "4", "--samples", "300", "--programs", "2").exit_code == 0
    assert out.read_bytes() == before


def test_tables_are_put_between_the_marks(ran: tuple[Path, Result], tmp_path: Path) -> None:
    out, _ = ran
    page = tmp_path / "page.md"
    page.write_text(f"before\n{tables.MARKS[0]}\nold\n{tables.MARKS[1]}\nafter\n")
    assert invoke(out, "--into", str(page)).exit_code == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    for name in METHODS:
        assert text.count(f"| {name} | ") == 2 + (name in tables.FIGURES)
    assert "mixture" not in text and "Left out" not in text and text.count("; commit ") == 1
    assert "300 training images, 4 epochs in all, seeds 0" in text and "reweighted ℓ1" in text
    once = page.read_bytes()
    invoke(out, "--into", str(page))
    assert page.read_bytes() == once
    page.write_text("no marks")
    result = invoke(out, "--into", str(page))
    assert result.exit_code == 1 and "does not hold the lines" in result.output


def test_a_failed_run_is_recorded_and_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(task: Task) -> Outcome:
        raise ConvergenceError("no end in sight")

    fail.__module__ = norms.__name__  # whose constants are in the settings
    out = tmp_path / "results.json"
    arguments = ("--only", "methods", "--methods", "plain", "--epochs", "4", "--samples", "200")
    with monkeypatch.context() as patch:
        patch.setitem(METHODS, "plain", replace(METHODS["plain"], run=fail))
        result = invoke(out, *arguments)
        assert result.exit_code == 1 and "1 of 1 runs failed" in result.output
        assert json.loads(out.read_text())["runs"][0]["error"] == "ConvergenceError: no end in sight"
    assert invoke(out, *arguments).exit_code == 0
    assert "error" not in json.loads(out.read_text())["runs"][0]


@pytest.mark.parametrize("arguments", [["--only", "mnist"], ["--methods", "best"], ["--samples", "0"], ["--seeds", "0"]])
def test_wrong_options_are_refused(arguments: list[str], tmp_path: Path) -> None:
    result = invoke(tmp_path / "results.json", *arguments)
    assert result.exit_code == 2 and arguments[0] in result.output


# --- the judge and the tables


def test_masks_that_do_not_hold_are_found_out() -> None:
    def lying(task: Task) -> Outcome:
        model = task.fit(task.build(), task.epochs)
        return Outcome(model, {name: torch.zeros_like(mask) for name, mask in zeros(model).items()})

    with pytest.raises(MaskError, match="zeros lost"):
        judge.measure(Method("liar", lying, "criterion"), Task(load("digits"), "dense", 2, 0, samples=200), calibration=50, halvings=(1, 0))


def test_pruning_after_keeps_the_zeros_and_the_accuracy() -> None:
    data = load("digits")
    task = Task(data, "dense", 12, 0, batch=20)
    model = task.trained()
    with torch.no_grad():
        model[0].weight[:12] = 0
    found = judge.prune_after(model, data, task.inputs[:300], 0, (5, 0))
    assert found["units"] <= 12 + 16 and found["weights"] <= judge.sizes(model)["weights"]
    accuracies = [accuracy for density, accuracy in found["tried"] if accuracy == found["accuracy"]]
    assert accuracies or found["weights"] == judge.sizes(model)["weights"]


def test_the_second_search_is_by_the_defaults_and_starts_where_the_first_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    prune = nettrim.prune

    def watched(*arguments: Any, **options: Any) -> Any:
        asked.append(options)
        return prune(*arguments, **options)

    monkeypatch.setattr(nettrim, "prune", watched)
    data = load("digits")
    task = Task(data, "dense", 12, 0, batch=20)
    found = judge.prune_after(task.trained(), data, task.inputs[:300], 0, (3, 2))
    even, auto = asked[:3], asked[3:]
    assert [(each["allocation"], each["fidelity"]) for each in even] == [("uniform", "layer")] * 3
    assert len(auto) == 2 and not any({"allocation", "fidelity"} & set(each) for each in auto)
    passed = [density for density, accuracy in found["tried"] if accuracy == found["accuracy"]]
    assert passed and all(1 - each["sparsity"] < min(passed) for each in auto)
    assert [density for density, _ in found["auto"]["tried"]] == pytest.approx([1 - each["sparsity"] for each in auto])


def test_sizes_of_a_given_network() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0, 2], [3, 4, 5]]))
        model[2].weight.copy_(torch.tensor([[1.0, 0], [2, 0]]))
    assert judge.sizes(model) == {"weights": 7, "units": 1, "layers": 2}
    assert judge.live_units(model) == (1, 2)


def settings(method: str, **changed: Any) -> dict[str, Any]:
    """As the command writes them."""
    protocol = {"data": "mnist", "epochs": 8, "samples": None, "batch": 200, "calibration": 1000, "halvings": 5, "auto_halvings": 4, "seed": 0}
    return {"section": "methods", "method": method, **protocol, "constants": constants(method), **changed}


def test_a_changed_constant_is_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert constants("l1")["norms.L1"] == norms.L1 and constants("l1")["judge.FALL"] == judge.FALL and "norms.L1" not in constants("OICSR")
    assert constants("Bernoulli units")["bernoulli.UNIT_PRICE"] > 0 and constants("DropNeuron li + lo")["dropneuron.LI"] > 0
    results = Results(tmp_path / "results.json", "neighbours")
    results.append(settings("l1"), {"accuracy": 0.9})
    assert tables.current(results.runs) == results.runs and results.find(settings("l1"))
    monkeypatch.setattr(norms, "L1", 7e-5)
    assert tables.current(results.runs) == [] and results.find(settings("l1")) is None


def test_the_tables_are_of_one_protocol() -> None:
    runs = [{"settings": settings("l1", samples=300)}, *[{"settings": settings("l1", seed=seed)} for seed in range(2)]]
    assert tables.current(runs) == runs[1:]
    assert tables.settings_line(runs) == "mnist, all training images, 8 epochs in all, seeds 0, 1."


def test_a_mixture_of_commits_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = Results(tmp_path / "results.json", "neighbours")
    for seed, commit in enumerate(["aaaa", "aaaa", "bbbb"]):
        monkeypatch.setattr("benchmarks.results._git", lambda *arguments, commit=commit: commit if arguments[0] == "rev-parse" else "")
        results.append(settings("l1", seed=seed), {})
    assert tables.where(results.runs[:2], results).endswith("; commit aaaa.") and "\n" not in tables.where(results.runs[:2], results)
    said = tables.where(results.runs, results)
    assert said.startswith("These runs are a mixture of 2 commits") and "commit aaaa." in said and "commit bbbb." in said


@pytest.mark.parametrize("epochs", [7, 9])
def test_another_number_of_epochs_is_found_out(epochs: int) -> None:
    def other(task: Task) -> Outcome:
        return norms.outcome(task.fit(task.build(), epochs))

    with pytest.raises(EpochsError, match=f"trained for {epochs} epochs, expected 8"):
        judge.measure(Method("other", other, "training"), Task(load("digits"), "dense", 8, 0, samples=100, batch=50), calibration=50, halvings=(1, 0))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_the_same_epochs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted by the optimiser's steps, in whichever loop: eight passes and no more, but for trials that are said."""
    taken = 0
    step = torch.optim.Adam.step

    def counted(self: torch.optim.Adam, *arguments: Any, **options: Any) -> Any:
        nonlocal taken
        taken += 1
        return step(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.Adam, "step", counted)
    task = Task(load("digits"), METHODS[name].network, 8, 0, samples=150, batch=40)
    result = METHODS[name].run(task)
    assert task.spent == 8 and len(task.inputs) == 120
    assert taken == 3 * (8 + result.notes.get("trial_epochs", task.retraining) - task.retraining)


def test_several_seeds_are_a_mean_and_half_a_range() -> None:
    whole = {"weights": 100, "units": 10, "layers": 2}
    pruned = {"units": 4, "layers": 2, "seconds": 1.0}
    runs = [
        {
            "settings": {**settings("l1"), "seed": seed},
            "whole": whole,
            "weights": weights,
            "units": 5,
            "layers": 2,
            "accuracy": accuracy,
            "seconds": 2.0,
            "after": {**pruned, "weights": 10, "accuracy": accuracy - 0.002, "auto": {**pruned, "weights": 6, "accuracy": accuracy - 0.001}},
        }
        for seed, (weights, accuracy) in enumerate([(20, 0.97), (40, 0.98)])
    ]
    assert tables.alone(runs) == [["l1", "penalty", "LeNet-300-100", "30 of 100", "30.0", "5 of 10", "2 of 2", "97.50 ± 0.50", "2", "2"]]
    assert tables.published(runs) == [["l1", tables.FIGURES["l1"], "30 of 100 weights, 50 % of the units dropped, at 97.50 ± 0.50 %"]]
    even, auto = ["97.30 ± 0.50", "10", "10.0", "4", "1.0"], ["97.40 ± 0.50", "6", "6.0", "4", "1.0"]
    assert tables.after(runs) == [["l1", "LeNet-300-100", "97.50 ± 0.50", *even, *auto, "2"]]
    assert {len(row) for row in tables.after(runs)} == {len(tables.AFTER)}
