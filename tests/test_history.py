"""What solvers write down on their way: true at every point, in order, bounded, and ending where the solution is."""

import math

import pytest
import torch
from problems import KINDS, trained_program

import nettrim
from nettrim.solvers.base import History

SOLVED_BY = [
    *(("prox_admm", kind) for kind in KINDS),
    ("gram_admm", "linear-budget"),
    ("gram_admm", "linear-penalised"),
    ("admm", "paper-budget"),
    ("admm", "linear-budget"),
]


@pytest.mark.parametrize(("solver", "kind"), SOLVED_BY)
def test_every_point_is_true_and_the_last_is_the_solution(solver, kind):
    program = trained_program(KINDS[kind], 3)
    solution = nettrim.solve(program, solver, tol=1e-4)
    assert solution.status == "optimal"
    history = solution.history
    assert history and all(isinstance(point, nettrim.HistoryPoint) for point in history)
    iterations, seconds = [point.iteration for point in history], [point.seconds for point in history]
    assert iterations == sorted(set(iterations)) and iterations[-1] == solution.iterations
    assert seconds == sorted(seconds) and 0 <= seconds[0] and seconds[-1] <= solution.seconds
    bounds = [point.lower_bound for point in history]
    assert bounds == sorted(bounds) and bounds[-1] == solution.lower_bound
    slack = 1 + 2e-4  # one-sided constraints are met to a tolerance, which may buy a little
    assert all(point.objective * slack >= solution.lower_bound for point in history), "no feasible weights are below a proven bound"
    assert history[-1].gap == pytest.approx(solution.gap, abs=1e-6)


def test_before_there_are_feasible_weights_there_is_no_gap():
    assert nettrim.HistoryPoint(10, 0.1, math.inf, 3.0).gap == math.inf
    assert nettrim.HistoryPoint(10, 0.1, 4.0, 3.0).gap == 0.25


def test_a_long_solve_keeps_few_points():
    history = History()
    for iteration in range(1, 5001):
        history.note(iteration, 1 / iteration, 0.0)
    points = history.points
    assert len(points) <= 64
    assert points[0].iteration == 1 and points[-1].iteration == 5000
    assert [point.iteration for point in points] == sorted({point.iteration for point in points})
    assert max(b.iteration - a.iteration for a, b in zip(points, points[1:], strict=False)) < 1000, "no part of the way is left out"


def test_a_search_for_the_fewest_weights_shows_how_they_fell():
    program = trained_program(KINDS["relaxed-budget"], 3)
    fewest = nettrim.LayerProgram(program.inputs, program.targets, epsilon=program.epsilon, penalty="l0")
    solution = nettrim.solve(fewest, "topk_admm")
    counts = [point.objective for point in solution.history]
    assert counts and counts[-1] == min(counts) == solution.objective == float((solution.weights != 0).sum())
    assert all(point.lower_bound == 0 and point.gap == 1 for point in solution.history)
    assert [point.iteration for point in solution.history] == sorted({point.iteration for point in solution.history})


def test_solvers_that_say_nothing_on_the_way():
    for solver, kind in (("cvxpy", "relaxed-budget"), ("osqp", "paper-penalised")):
        assert nettrim.solve(trained_program(KINDS[kind], 3), solver, tol=1e-3).history == ()


def test_the_history_reaches_the_report_and_its_file(digits_network, tmp_path):
    model, images, _, _ = digits_network
    report = nettrim.prune(model, images, epsilon=0.2, penalty="l1").report
    report.to_json(tmp_path / "report.json")
    again = nettrim.Report.from_json(tmp_path / "report.json")
    for layer, read in zip(report.layers, again.layers, strict=True):
        assert layer.history and read.history == layer.history
        assert layer.history[-1].lower_bound == layer.lower_bound
        assert layer.history[-1].gap <= 1e-3
    wanted = nettrim.prune(model, images, sparsity=0.5).report
    assert all(layer.history == () for layer in wanted.layers)
    assert torch.isfinite(torch.tensor([layer.accumulated for layer in wanted.layers])).all()
