"""The solvers that ours is set against: the authors' code, and general solvers behind CVXPY and OSQP."""

import contextlib
import importlib.util
import io
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor

import nettrim
from benchmarks.solver_problems import correlated_layer, make_program
from benchmarks.solver_session import Run, Session, figures
from nettrim.solvers import cvxpy

PEER_FILE = Path("Main NetTrim Solvers") / "NetTrimSolver_np.py"
PEER_RHO = 100.0
SECTION = "cvxpy-sized"
SHARES = {"relaxed-budget": 0.1, "paper-budget": 0.1, "linear-budget": 0.1, "relaxed-penalised": 0.02}
TOLERANCE = 1e-4


def load_peer(folder: Path) -> Callable[[Tensor, Tensor, float, float, int], tuple[Tensor, float]]:
    """The authors' solver from a checkout of their repository (DNNToolBox/Net-Trim on GitHub).

    Returns
    -------
    callable
        ``(A, Y, ε, ρ, iterations)`` to weights (M, N) and the seconds of their call alone. Theirs has samples as columns
        and float64 throughout: both are prepared before the clock starts.

    Raises
    ------
    click.BadParameter
        If the folder does not hold the file.
    """
    path = folder / PEER_FILE
    spec = importlib.util.spec_from_file_location("authors_net_trim", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise click.BadParameter(f"{path} does not exist; expected a checkout of DNNToolBox/Net-Trim.", param_hint="--peer")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def solve(A: Tensor, Y: Tensor, epsilon: float, rho: float, iterations: int) -> tuple[Tensor, float]:
        X_, Y_ = (np.ascontiguousarray(part.double().numpy().T) for part in (A, Y))
        V_ = np.zeros_like(Y_)
        start = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            W = module.net_trim_solver(X_, Y_, V_, epsilon, rho, iterations)
        return torch.from_numpy(np.ascontiguousarray(W.T)), time.perf_counter() - start

    return solve


def cvxpy_sized(session: Session) -> None:
    """Section ``cvxpy-sized``: general solvers on a layer that is small enough for them."""
    P, N, M = session.sizes.oracle
    A, Z = correlated_layer(P, N, M, session.seed)
    rows: list[tuple[object, ...]] = []
    for kind, share in SHARES.items():
        program = make_program(kind, A, Z, share)
        solvers: dict[str, Callable[[], nettrim.Solution]] = {
            "nettrim": lambda p=program: nettrim.solve(p, tol=TOLERANCE),  # type: ignore[misc]
            "Clarabel": lambda p=program: nettrim.solve(p, "cvxpy", tol=TOLERANCE),  # type: ignore[misc]
            "SCS": lambda p=program: cvxpy.run(p, TOLERANCE, 10_000, None, backend="SCS"),  # type: ignore[misc]
        }
        if program.epsilon is None:
            solvers["OSQP"] = lambda p=program: nettrim.solve(p, "osqp", tol=TOLERANCE)  # type: ignore[misc]
        found: dict[str, Run] = {}
        for name, solve in solvers.items():
            with session.doing(f"{SECTION}: {kind}, {name}"):
                run = figures(program, solve())
            found[name] = session.record(SECTION, name, {"kind": kind, "P": P, "N": N, "M": M, "share": share}, run)
        ours, exact = found["nettrim"], found["Clarabel"]
        for name, run in found.items():
            difference = run["objective"] / exact["objective"] - 1
            ratio = run["seconds"] / ours["seconds"]
            rows.append((kind, name, run["seconds"], ratio, run["status"], run["gap"], run["objective"], difference))
        if kind == "relaxed-budget":
            session.check(SECTION, "Clarabel's time / ours", exact["seconds"] / ours["seconds"], "≥", 100)
        different = abs(ours["objective"] / exact["objective"] - 1)
        session.check(SECTION, f"objective against Clarabel's, {kind}", different, "≤", 1e-4)
    session.table(
        f"{SECTION}: N = {N}, M = {M}, P = {P}, float64, our tolerance {TOLERANCE:g}",
        ("program", "solver", "s", "times ours", "status", "gap", "objective", "against Clarabel"),
        rows,
        "gap: proven by the solver's own multipliers; SCS at its own default tolerances",
    )
