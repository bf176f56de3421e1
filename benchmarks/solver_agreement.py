"""The section ``agreement``: small awkward programs of every kind, ours against CVXPY with Clarabel."""

import itertools
from typing import Any

import numpy as np
import torch

import nettrim
from benchmarks.solver_problems import KINDS, make_program
from benchmarks.solver_session import Session
from nettrim import LayerProgram
from nettrim.errors import NetTrimError

SECTION = "agreement"
AGREED = 1e-4
TOLERANCE = 5e-5  # of each: two objectives a gap of it from one bound lie within AGREED of each other
STRUCTURES = ("plain", "ill_conditioned", "duplicate_columns", "zero_optimal", "dense_only")
CONDITION = 1e8
# ε over ‖Y‖, or λ over the smallest at which 0 is optimal
SHARES = {"zero_optimal": 1.05, "dense_only": 1e-6}
ROUND_OF_SHARES = (0.3, 0.1, 0.05, 0.2)


def generate(kind: str, structure: str, repeat: int, seed: int) -> LayerProgram:
    """A small program, float64, whose dense weights are feasible.

    Structures: ``plain``; ``ill_conditioned``, inputs of condition number 1e8; ``duplicate_columns``; ``zero_optimal``, a
    budget above ``‖Y‖`` or a λ at which nothing is worth its price; ``dense_only``, a budget of 1e-6 ‖Y‖ (or a λ as small), which
    leaves no more than the dense weights.
    """
    rng = np.random.default_rng([seed, repeat, STRUCTURES.index(structure), list(KINDS).index(kind)])
    P, N, M = int(rng.integers(40, 61)), int(rng.integers(8, 13)), int(rng.integers(2, 4))
    A = rng.standard_normal((P, N)) + 0.3
    W = rng.standard_normal((M, N)) * (rng.random((M, N)) < 0.6)
    if structure == "ill_conditioned":
        U, _, Vt = np.linalg.svd(A, full_matrices=False)
        A = np.sqrt(P) * (U * np.logspace(0, -np.log10(CONDITION), N)) @ Vt
    elif structure == "duplicate_columns":
        A[:, 1], A[:, -1] = A[:, 0], A[:, 2]
    share = SHARES.get(structure, ROUND_OF_SHARES[repeat % len(ROUND_OF_SHARES)])
    A_, W_ = torch.from_numpy(A), torch.from_numpy(W)
    return make_program(kind, A_, A_ @ W_.T, share)


def compare(program: LayerProgram) -> dict[str, Any]:
    """Both solutions' status, objective and gap, and the relative difference of the objectives (None without two feasible points)."""
    result: dict[str, Any] = {}
    for name, solver in (("ours", "auto"), ("oracle", "cvxpy")):
        try:
            solution = nettrim.solve(program, solver, tol=TOLERANCE)
        except NetTrimError as error:
            result[name] = {"status": type(error).__name__, "objective": None, "gap": None, "seconds": 0.0, "iterations": 0}
            continue
        result[name] = {
            name: getattr(solution, name) for name in ("status", "objective", "gap", "iterations", "seconds", "solver")
        }
    found, exact = result["ours"], result["oracle"]
    feasible = all(part["status"] in ("optimal", "feasible") for part in (found, exact))
    scale = max(abs(exact["objective"] or 0.0), abs(found["objective"] or 0.0))
    difference = (found["objective"] - exact["objective"]) / scale if feasible and scale > 0 else 0.0 if feasible else None
    return {**result, "difference": difference}


def agreement(session: Session) -> None:
    """Section ``agreement``: every kind and structure; the largest difference, the statuses, and the programs that disagree."""
    found = []
    cases = list(itertools.product(KINDS, STRUCTURES, range(session.sizes.repeats)))
    for kind, structure, repeat in cases:
        with session.doing(f"{SECTION}: {kind}, {structure}, {repeat}"):
            compared = compare(generate(kind, structure, repeat, session.seed))
        found.append({"kind": kind, "structure": structure, "repeat": repeat, **compared})
    run = session.record(SECTION, "all", {"programs": len(found)}, {"programs": found})
    programs = run["programs"]
    rows: list[tuple[object, ...]] = []
    for kind, structure in itertools.product(KINDS, STRUCTURES):
        members = [one for one in programs if (one["kind"], one["structure"]) == (kind, structure)]
        rows.append((f"{kind}, {structure}", len(members), _worst(members), _statuses(members, "ours"), _statuses(members, "oracle")))
    session.table(
        f"{SECTION}: {len(programs)} programs, ours against Clarabel",
        ("program", "number", "largest difference", "ours", "Clarabel"),
        rows,
        "difference of the objectives, relative; statuses at tolerance 5e-5",
    )
    offenders = [one for one in programs if one["difference"] is None or abs(one["difference"]) > AGREED]
    if offenders:
        session.table(
            f"{SECTION}: {len(offenders)} programs that disagree",
            ("program", "repeat", "difference", "our status", "our gap", "Clarabel's status", "its gap"),
            [
                (
                    f"{one['kind']}, {one['structure']}",
                    one["repeat"],
                    one["difference"],
                    *(one[side][key] for side in ("ours", "oracle") for key in ("status", "gap")),
                )
                for one in offenders
            ],
            "a program without two feasible points has no difference",
        )
    session.check(SECTION, "largest difference of objectives", _worst(programs) or 0.0, "≤", AGREED)
    session.check(SECTION, "programs that disagree or have no solution", float(len(offenders)), "≤", 0)
    session.check(SECTION, "programs", float(len(programs)), "≥", 200)


def _worst(members: list[dict[str, Any]]) -> float | None:
    return max((abs(one["difference"]) for one in members if one["difference"] is not None), default=None)


def _statuses(members: list[dict[str, Any]], side: str) -> str:
    names = [one[side]["status"] for one in members]
    return ", ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names))
