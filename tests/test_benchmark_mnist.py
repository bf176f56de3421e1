"""``python -m benchmarks.mnist`` and ``benchmarks.recovery`` at a tiny size, offline: what they write, and that they resume."""

import json
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner, Result

from benchmarks import data, mnist, networks, recovery
from benchmarks.results import Results
from nettrim.errors import ConvergenceError

RECIPE = networks.Recipe("plain", epochs=3)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing that a test fetches or trains lands in the checkout, or comes from it."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(data, "CACHE", folder)
    monkeypatch.delenv("NETTRIM_DATA", raising=False)
    return folder


# --- python -m benchmarks.mnist

TINY = ["--data", "digits", "--samples", "60", "--epsilons", ".1,.3", "--epochs", "60"]


def invoke(command: click.Command, *arguments: str) -> Result:
    """Run a command as the terminal would; exceptions that it does not handle are raised."""
    return CliRunner().invoke(command, list(arguments), catch_exceptions=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Result]:
    """The MNIST protocol at its tiny size, run once for the tests below: results file, cache, what was printed."""
    folder = tmp_path_factory.mktemp("mnist")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "CACHE", folder / "cache")
        result = invoke(mnist.main, *TINY, "--out", str(folder / "results.json"))
    return folder / "results.json", folder / "cache", result


def test_every_combination_is_run_and_recorded(finished: tuple[Path, Path, Result]) -> None:
    out, _, result = finished
    assert result.exit_code == 0, result.output
    content = json.loads(out.read_text())
    runs = content["runs"]
    combinations = {(r["settings"]["mode"], r["settings"]["consistency"], r["settings"]["epsilon"]) for r in runs}
    assert len(runs) == len(combinations) == 8
    here = content["environments"][runs[0]["environment"]]
    assert here["torch"] == torch.__version__ and here["cpus"] >= 1 and "commit" in here
    for run in runs:
        assert run["holds"] and run["guaranteed"] >= run["measured"] > 0
        assert set(run["nonzeros"]) == set(run["sizes"]) == {"0", "2", "4"}
        assert run["density"] == pytest.approx(sum(run["nonzeros"].values()) / (64 * 24 + 24 * 16 + 16 * 10))
        assert 0 < run["density"] < 1
        assert 0.8 < run["dense_accuracy"] <= 1 and 0 <= run["magnitude"]["accuracy"] <= 1
        assert run["settings"]["samples"] == 60 and run["seconds"] > 0 and run["skipped"] == {}
        for layer in run["layers"]:
            assert layer["nonzeros"] == run["nonzeros"][layer["name"]]
            assert layer["discrepancy"] <= layer["epsilon"]


def test_a_larger_budget_keeps_fewer_weights(finished: tuple[Path, Path, Result]) -> None:
    runs = json.loads(finished[0].read_text())["runs"]
    kept = {tuple(r["settings"][k] for k in ("mode", "consistency", "epsilon")): r["density"] for r in runs}
    for mode in ("parallel", "cascade"):
        for consistency in ("relaxed", "paper"):
            assert kept[mode, consistency, 0.3] < kept[mode, consistency, 0.1]


def test_the_figures_are_drawn_and_the_table_is_printed(finished: tuple[Path, Path, Result]) -> None:
    out, _, result = finished
    for suffix in ("accuracy", "modes"):
        assert out.with_name(f"results-{suffix}.png").read_bytes().startswith(b"\x89PNG")
    assert "dense: tiny (plain)" in result.output
    table = invoke(mnist.main, "--table", str(out)).output
    rows = [line for line in table.splitlines() if line.startswith("| tiny")]
    assert len(rows) == 8 and len({line.count("|") for line in rows}) == 1
    assert f"torch {torch.__version__}" in table and "commit" in table and "Dense networks: tiny, plain" in table


def test_a_second_call_repeats_nothing_and_adds_what_is_missing(
    finished: tuple[Path, Path, Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, cache, _ = finished
    monkeypatch.setattr(data, "CACHE", cache)
    copied = tmp_path / "results.json"
    copied.write_bytes(out.read_bytes())
    pruned: list[dict[str, Any]] = []
    measure = mnist.measure

    def counted(trained: networks.Trained, on: data.Dataset, settings: dict[str, Any]) -> dict[str, Any]:
        pruned.append(settings)
        return measure(trained, on, settings)

    monkeypatch.setattr(mnist, "measure", counted)
    assert invoke(mnist.main, *TINY, "--out", str(copied)).exit_code == 0
    assert pruned == [] and copied.read_bytes() == out.read_bytes()
    more = ["--epsilons", ".3,.4", "--modes", "parallel", "--sets", "relaxed"]
    assert invoke(mnist.main, *TINY, *more, "--out", str(copied)).exit_code == 0
    assert [settings["epsilon"] for settings in pruned] == [0.4]
    assert len(json.loads(copied.read_text())["runs"]) == 9


def test_a_failed_run_is_recorded_reported_and_tried_again(
    finished: tuple[Path, Path, Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "CACHE", finished[1])
    one = [
        *TINY,
        "--epsilons",
        ".3",
        "--modes",
        "cascade",
        "--sets",
        "relaxed",
        "--out",
        str(tmp_path / "results.json"),
    ]

    def fail(*_: Any) -> dict[str, Any]:
        raise ConvergenceError("layer '0' did not converge")

    with monkeypatch.context() as patch:
        patch.setattr(mnist, "measure", fail)
        result = invoke(mnist.main, *one)
    assert result.exit_code == 1 and "1 of 1 runs failed" in result.output
    (run,) = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert run["error"] == "ConvergenceError: layer '0' did not converge"
    assert "ConvergenceError" in invoke(mnist.main, "--table", str(tmp_path / "results.json")).output
    assert invoke(mnist.main, *one).exit_code == 0
    (run,) = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert "error" not in run


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--quick", "--full"], "exclude each other"),
        (["--networks", "lenet,vgg"], "'vgg' is not one of"),
        (["--epsilons", ".1,-.2"], "must be positive"),
        (["--epsilons", ".1,nan"], "must be positive"),
        (["--samples", "10.5"], "no list of numbers"),
        (["--data", "digits", "--epochs", "1", "--samples", "5000"], "1397 to train on"),
    ],
)
def test_wrong_options_are_refused_with_the_reason(arguments: list[str], complaint: str, tmp_path: Path) -> None:
    result = invoke(mnist.main, *arguments, "--out", str(tmp_path / "results.json"))
    assert result.exit_code != 0 and complaint in " ".join(result.output.split())


def test_a_file_of_another_kind_is_never_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    for content in ("not JSON", "[]", '{"benchmark": "other", "schema": 1, "environments": [], "runs": []}'):
        out.write_text(content)
        with pytest.raises(click.ClickException, match=r"results.json.*[Mm]ove it away"):
            Results(out, "mnist")
        assert out.read_text() == content


# --- python -m benchmarks.recovery


def test_planted_weights_are_recovered_from_enough_samples_and_not_from_few(tmp_path: Path) -> None:
    out, plot = tmp_path / "recovery.json", tmp_path / "recovery.png"
    arguments = ["--inputs", "40", "--sparsities", "2,3", "--ratios", ".5,6", "--neurons", "4", "--trials", "1"]
    result = invoke(recovery.main, *arguments, "--out", str(out), "--plot", str(plot))
    assert result.exit_code == 0, result.output
    runs = {(r["settings"]["nonzeros"], r["settings"]["samples"]): r for r in json.loads(out.read_text())["runs"]}
    assert len(runs) == 6
    for nonzeros in (2, 3):
        few, several, enough = (runs[key] for key in sorted(runs) if key[0] == nonzeros)
        assert few["success"] < 0.5 and several["success"] == enough["success"] == 1
        assert enough["settings"]["samples"] == recovery.sufficient_samples(40, nonzeros)
        assert enough["statuses"] == ["optimal"] and max(enough["errors"]) < recovery.RECOVERED
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_recovery_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--inputs", "20", "--sparsities", "2", "--ratios", "4", "--neurons", "2", "--trials", "1"]
    arguments += ["--out", str(tmp_path / "recovery.json")]
    assert invoke(recovery.main, *arguments).exit_code == 0
    before = (tmp_path / "recovery.json").read_bytes()

    def never(*_: Any) -> dict[str, Any]:
        raise AssertionError("solved again")

    monkeypatch.setattr(recovery, "recover", never)
    assert invoke(recovery.main, *arguments).exit_code == 0
    assert (tmp_path / "recovery.json").read_bytes() == before


def test_recovery_refuses_more_nonzeros_than_inputs(tmp_path: Path) -> None:
    result = invoke(recovery.main, "--inputs", "5", "--sparsities", "6", "--out", str(tmp_path / "recovery.json"))
    assert result.exit_code == 2 and "cannot have 6 nonzeros" in result.output


def test_planted_weights_have_the_sparsity_asked_for() -> None:
    planted = recovery.plant(30, 4, 6, torch.Generator().manual_seed(0))
    assert planted.shape == (6, 30) and planted.count_nonzero(dim=1).tolist() == [4] * 6
