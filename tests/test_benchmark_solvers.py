"""The solver benchmark at its tiny size, offline: what each section records, prints and draws, and what it measures with."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from benchmarks import data, solver_agreement, solver_mnist, solver_problems, solver_scaling, solvers
from benchmarks.memory import PeakMemory
from benchmarks.solver_peers import PEER_FILE, PEER_RHO, load_peer
from benchmarks.solver_session import in_a_process
from nettrim.errors import ConvergenceError

# what a checkout of the authors' code offers, answered by least squares
PEER = """
import numpy as np
def net_trim_solver(X, Y, V, epsilon, rho, max_iteration=10000):
    assert X.shape[1] == Y.shape[1] and V.shape == Y.shape and not V.any() and X.dtype == np.float64
    print("0 : 1.000000")
    return np.linalg.lstsq(X.T, Y.T, rcond=None)[0]
"""


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("peer") / PEER_FILE
    path.parent.mkdir()
    path.write_text(PEER)
    return path.parent.parent


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing that a test trains lands in the checkout, or comes from it; one network serves all tests here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "CACHE", tmp_path_factory.mktemp("cache"))
        yield


def invoke(out: Path, *arguments: str) -> Result:
    return CliRunner().invoke(solvers.main, ["--data", "digits", "--out", str(out), *arguments], catch_exceptions=False)


def section(out: Path, name: str, *arguments: str) -> tuple[list[dict[str, Any]], str]:
    """The runs that a section writes at its tiny size, and what it prints."""
    result = invoke(out, "--only", name, *arguments)
    assert result.exit_code == 0, result.output
    content = json.loads(out.read_text())
    assert content["benchmark"] == "solvers" and "commit" in content["environments"][0]
    for run in content["runs"]:
        assert run["settings"]["section"] == name and run["settings"]["seed"] == 0 and run["settings"]["threads"] >= 1
    printed = " ".join(result.output.split())
    assert name in printed and "what was asked for of the full size, which this is not" in printed
    return content["runs"], printed


# --- the sections


def test_layer_one_is_set_against_the_authors_algorithm(tmp_path: Path, peer: Path) -> None:
    out = tmp_path / "results.json"
    runs, printed = section(out, "mnist-layer1", "--peer", str(peer))
    by_case = {run["settings"]["case"]: run for run in runs}
    authors = by_case["authors' code, 10 iterations"]
    assert authors["discrepancy"] < 1 and authors["seconds"] > 0 and "gap" not in authors
    assert by_case["admm as the authors', 10 iterations"]["iterations"] == 10
    relaxed = by_case["relaxed set, tolerance 0.001"]
    assert relaxed["status"] == "optimal" and relaxed["gap"] <= 1e-3
    assert relaxed["discrepancy"] <= relaxed["used"] <= 1 and relaxed["norm"] < authors["norm"]
    penalised = by_case["penalised, tolerance 0.001"]
    assert penalised["status"] == "optimal" and penalised["settings"]["lambda"] > 0
    history = [run for run in runs if "cap" in run["settings"]]
    assert [run["settings"]["cap"] for run in history] in ([20], [20, 60])
    assert all(run["iterations"] <= run["settings"]["cap"] for run in history)
    assert "a budget and the penalty" in printed and "within 1 %" in printed
    assert out.with_name("results-mnist-layer1.png").read_bytes().startswith(b"\x89PNG")


def test_all_samples_are_solved_for_in_memory_mapped_and_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # four processes that only import torch take longer than all of the rest; "wide" below has a process of its own
    monkeypatch.setattr(solver_mnist, "in_a_process", lambda function, *arguments: function(*arguments))
    runs, printed = section(tmp_path / "results.json", "mnist-60000")
    cases = {run["settings"]["case"]: run for run in runs}
    assert set(cases) == {"P = 100, tensor", "P = 400, tensor", "P = 400, memmap", "P = 400, stream"}
    assert all(run["status"] == "optimal" for run in runs)
    norms = [cases[f"P = 400, {kind}"]["norm"] for kind in ("tensor", "memmap", "stream")]
    assert max(norms) <= min(norms) * (1 + 1.01 * solver_mnist.MANY_TOLERANCE)
    assert all(run["extra_bytes"] is None or run["extra_bytes"] >= 0 for run in runs)
    assert "weights apart" in printed


def test_general_solvers_find_the_same_objective(tmp_path: Path) -> None:
    runs, _ = section(tmp_path / "results.json", "cvxpy-sized")
    assert {run["settings"]["case"] for run in runs} == {"nettrim", "Clarabel", "SCS", "OSQP"}
    for kind in ("relaxed-budget", "paper-budget", "linear-budget", "relaxed-penalised"):
        found = {run["settings"]["case"]: run for run in runs if run["settings"]["kind"] == kind}
        assert found["Clarabel"]["status"] == "optimal"
        for run in found.values():
            assert run["objective"] == pytest.approx(found["Clarabel"]["objective"], rel=2e-3)


def test_wide_layers_are_streamed_and_held_against_the_machine(tmp_path: Path) -> None:
    (run,), printed = section(tmp_path / "results.json", "wide")
    assert run["status"] == "optimal" and run["settings"]["N"] == 24
    assert set(run["products"]) == {"float64", "float32"} and run["gram_rate"] > 0 and run["constant"] >= 0
    assert "memory beyond the weights (N² numbers of float64), N = 24" in printed


def test_growth_is_fitted_and_drawn(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    runs, printed = section(out, "growth")
    assert len(runs) == 2 * 6 and {run["settings"]["varied"] for run in runs} == {"P", "N", "M"}
    assert all(run["status"] == "optimal" for run in runs)
    assert "seconds grow like size to the power" in printed
    assert out.with_name("results-growth.png").read_bytes().startswith(b"\x89PNG")


def test_agreement_covers_every_kind_and_structure(tmp_path: Path) -> None:
    (run,), printed = section(tmp_path / "results.json", "agreement")
    programs = run["programs"]
    assert len(programs) == 30 == len({(one["kind"], one["structure"]) for one in programs})
    zero = [one for one in programs if one["structure"] == "zero_optimal"]
    assert all(one["difference"] == 0 for one in zero)
    assert all(one["ours"]["objective"] == 0 for one in zero if one["kind"].endswith("budget"))
    plain = [one for one in programs if one["structure"] == "plain" and not one["kind"].startswith("paper")]
    assert all(abs(one["difference"]) <= solver_agreement.AGREED for one in plain)
    assert "30 programs, ours against Clarabel" in printed


def test_the_full_size_generates_at_least_200_programs() -> None:
    assert solvers.FULL.repeats * len(solver_problems.KINDS) * len(solver_agreement.STRUCTURES) >= 200


# --- the command


def test_every_call_adds_its_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "results.json"
    times = iter(("first", "second"))
    monkeypatch.setattr("benchmarks.solver_session.time.strftime", lambda _: next(times))
    for _ in range(2):
        invoke(out, "--only", "growth")
    started = [run["settings"]["started"] for run in json.loads(out.read_text())["runs"]]
    assert started.count("first") == started.count("second") == 12


def test_a_failed_section_is_recorded_and_the_others_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise ConvergenceError("no end in sight")

    monkeypatch.setitem(solvers.SECTIONS, "wide", fail)
    out = tmp_path / "results.json"
    result = invoke(out, "--only", "wide,growth")
    assert result.exit_code == 1 and "1 of 2 sections failed: wide" in result.output
    runs = json.loads(out.read_text())["runs"]
    assert runs[0]["error"] == "ConvergenceError: no end in sight" and len(runs) == 1 + 12


def test_threads_are_limited_and_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, seen = torch.get_num_threads(), []
    monkeypatch.setitem(solvers.SECTIONS, "growth", lambda session: seen.append((session.threads, torch.get_num_threads())))
    invoke(tmp_path / "results.json", "--only", "growth", "--threads", "2")
    invoke(tmp_path / "results.json", "--only", "growth")
    assert seen == [(2, 2), (before, before)] and torch.get_num_threads() == before


@pytest.mark.parametrize("arguments", [["--only", "mnist"], ["--peer", "."], ["--threads", "0"]])
def test_wrong_options_are_refused(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke(tmp_path / "results.json", *arguments)
    assert result.exit_code == 2 and arguments[0] in result.output


# --- what it measures with


def test_the_authors_solver_is_called_in_their_orientation(peer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    A, Z = solver_problems.correlated_layer(40, 5, 3, 0, torch.float32)
    W, seconds = load_peer(peer)(A, Z, 0.1, PEER_RHO, 7)
    assert W.shape == (3, 5) and W.dtype == torch.float64 and seconds >= 0
    torch.testing.assert_close(A.double() @ W.T, Z.double(), rtol=1e-4, atol=1e-5)
    assert capsys.readouterr().out == ""


def test_a_stream_gives_the_same_rows_each_time_and_fits_its_targets() -> None:
    stream = solver_problems.CorrelatedStream(25, 6, 4, 10, seed=1)
    chunks = list(stream.inputs())
    assert [len(chunk) for chunk in chunks] == [10, 10, 5]
    A, again, Y = torch.cat(chunks), torch.cat(list(stream.inputs())), torch.cat(list(stream.targets()))
    assert torch.equal(A, again) and Y.shape == (25, 4)
    assert not torch.equal(chunks[0], chunks[1])
    solution = torch.linalg.lstsq(A, Y).solution
    torch.testing.assert_close(A @ solution, Y, rtol=1e-3, atol=1e-4)


def test_ill_conditioned_programs_are_that() -> None:
    program = solver_agreement.generate("linear-budget", "ill_conditioned", 0, seed=0)
    singular = np.linalg.svd(program.arrays[0].numpy(), compute_uv=False)
    assert singular[0] / singular[-1] == pytest.approx(solver_agreement.CONDITION, rel=1e-3)


def test_exponents_are_those_of_power_laws() -> None:
    assert solver_scaling.exponent([1, 2, 4, 8], [3 * x**1.5 for x in (1, 2, 4, 8)]) == pytest.approx(1.5)


def allocate(megabytes: int) -> tuple[int | None, float]:
    """Memory that was held for a moment inside the meter; for a process of its own."""
    with PeakMemory() as memory:
        total = float(np.ones(megabytes << 17).sum())
    return memory.extra, total


def test_peak_memory_sees_what_was_freed_again() -> None:
    extra, _ = in_a_process(allocate, 100)
    measured = Path("/proc/self/statm").exists()
    assert (90 << 20 < extra < 130 << 20) if measured else extra is None
