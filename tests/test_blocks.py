"""A layer solved in blocks of neurons is the layer solved at once."""

from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context

import pytest
import torch
from problems import KINDS, STRUCTURES, random_program, trained_layer, trained_program

from nettrim import ArgumentError, LayerProgram, UnsupportedProgramError, solve

TAKEN = [kind for kind in KINDS.values() if not (kind.one_sided and kind.budget)]
kinds = pytest.mark.parametrize("kind", TAKEN, ids=lambda kind: kind.name)


@kinds
@pytest.mark.parametrize("structure", [*STRUCTURES, "trained"])
def test_blocks_agree_with_the_oracle(kind, structure):
    """One neuron at a time: same optimum, proven; the budget is spent, and kept."""
    program = trained_program(kind, 2) if structure == "trained" else random_program(kind, 1, structure)
    reference = solve(program, "cvxpy", tol=1e-5)
    solution = solve(program, neurons=1)
    assert solution.status == "optimal", f"gap {solution.gap:.1e}"
    assert solution.objective == pytest.approx(reference.objective, rel=2e-4)
    assert solution.lower_bound <= reference.objective * (1 + 2e-5)
    assert program.is_feasible(solution.weights)
    if program.epsilon is not None and solution.objective > 0:
        assert program.misfit(solution.weights) == pytest.approx(program.epsilon**2, rel=1e-3)


@pytest.mark.parametrize("budget", [True, False])
def test_any_division_gives_the_same_optimum(budget):
    program = trained_program(KINDS["relaxed-budget" if budget else "relaxed-penalised"], 1)
    whole = solve(program)
    for neurons in (1, 2, 3, 100):
        assert solve(program, neurons=neurons).objective == pytest.approx(whole.objective, rel=2e-4)
    assert torch.equal(solve(program, neurons=3).weights, whole.weights)  # which is all of them


def threads() -> Executor:
    return ThreadPoolExecutor(2)


def process() -> Executor:
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"))


@pytest.mark.parametrize("pool", [threads, process])
def test_an_executor_gives_the_same_weights(pool):
    program = trained_program(KINDS["relaxed-budget"], 0)
    alone = solve(program, neurons=1)
    with pool() as executor:
        assert torch.equal(solve(program, neurons=1, executor=executor).weights, alone.weights)


@pytest.mark.parametrize("activation", ["relu", None])
def test_a_stream_in_blocks(activation):
    A, _, W = trained_layer(0)
    Y = (A @ W.T).clamp(min=0) if activation else A @ W.T
    options = {"epsilon": 0.1 * float(Y.norm()), "activation": activation}
    whole = solve(LayerProgram(A, Y, **options), neurons=1)
    streamed = solve(LayerProgram(lambda: iter(A.split(17)), lambda: iter(Y.split(17)), **options), neurons=1)
    assert streamed.status == "optimal"
    assert streamed.objective == pytest.approx(whole.objective, rel=2e-4)


def test_a_feasible_start_is_the_answer_of_last_resort():
    program, dense = trained_program(KINDS["relaxed-budget"], 0), trained_layer(0)[2]
    solution = solve(program, neurons=1, max_iter=1, initial=dense)
    assert solution.status in ("optimal", "feasible")
    assert solution.objective <= program.norm(dense)


def test_targets_that_no_weights_meet():
    A, Y = torch.ones(2, 1, dtype=torch.float64), torch.tensor([[1.0, 2.0], [0.0, 0.0]], dtype=torch.float64)
    solution = solve(LayerProgram(A, Y, epsilon=0.1), neurons=1)
    assert solution.status == "iteration_limit" and not LayerProgram(A, Y, epsilon=0.1).is_feasible(solution.weights)
    assert solve(LayerProgram(A, Y, epsilon=0.0), neurons=1).status == "iteration_limit"
    assert solve(LayerProgram(A, 0 * Y, epsilon=0.0), neurons=1).objective == 0


def test_what_blocks_refuse():
    program = trained_program(KINDS["paper-budget"], 0)
    with pytest.raises(UnsupportedProgramError, match="neurons=1: blocks of neurons don't do for a budget program on the paper set"):
        solve(program, neurons=1)
    for neurons in (0, -2):
        with pytest.raises(ArgumentError, match=rf"neurons={neurons}; expected a whole number, at least 1"):
            solve(program, neurons=neurons)
    with pytest.raises(ArgumentError, match="executor was given without neurons"), threads() as executor:
        solve(program, executor=executor)
    with pytest.raises(UnsupportedProgramError, match="'osqp' does not take"):
        solve(trained_program(KINDS["relaxed-budget"], 0), "osqp", neurons=1)
