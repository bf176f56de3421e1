"""A layer solved in blocks of neurons is the layer solved at once."""

from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context

import pytest
import torch
from networks import chain, samples
from problems import KINDS, STRUCTURES, random_program, trained_layer, trained_program

from nettrim import ArgumentError, LayerProgram, UnsupportedProgramError, prune, solve

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


class TestNumbersOfNonzeros:
    """Programs that are not convex come apart where every neuron has a number of its own."""

    def layer(self):
        torch.manual_seed(0)
        A = torch.randn(300, 16, dtype=torch.float64) @ torch.randn(16, 16, dtype=torch.float64)
        W = torch.randn(12, 16, dtype=torch.float64)
        return A, A @ W.T

    def test_a_pattern_in_blocks(self):
        A, Y = self.layer()
        whole = LayerProgram(A, Y, nonzeros=96, pattern="2:4", activation=None)
        together, apart = solve(whole), solve(whole, neurons=5)
        assert apart.status == "feasible" and whole.is_feasible(apart.weights)
        assert int((apart.weights != 0).sum()) == 96
        assert apart.objective == pytest.approx(together.objective, rel=0.02)  # another search, as good
        one = solve(LayerProgram(A, Y[:, 5:10], nonzeros=40, pattern="2:4", activation=None))
        assert torch.equal(apart.weights[5:10], one.weights)

    def test_a_support_in_blocks_is_the_support_at_once(self):
        A, Y = self.layer()
        support = torch.rand(12, 16, generator=torch.Generator().manual_seed(1)) < 0.4
        support[3] = False
        program = LayerProgram(A, Y, nonzeros=int(support.sum()), support=support, activation=None)
        together, apart = solve(program), solve(program, neurons=5)
        assert torch.equal(apart.weights != 0, support)
        assert torch.allclose(apart.weights, together.weights, rtol=1e-9, atol=1e-12)

    def test_weighed_errors(self):
        """A diagonal metric scales the neurons' errors; a full one ties them together."""
        A, Y = self.layer()
        diagonal = torch.linspace(1, 3, 12, dtype=torch.float64)
        plain, weighed = (
            solve(LayerProgram(A, Y, nonzeros=96, pattern="2:4", activation=None, metric=metric), neurons=5) for metric in (None, diagonal)
        )
        assert torch.allclose(plain.weights, weighed.weights) and weighed.objective > plain.objective
        with pytest.raises(UnsupportedProgramError, match="its metric weighs the errors of all neurons together"):
            solve(LayerProgram(A, Y, nonzeros=96, pattern="2:4", activation=None, metric=torch.diag(diagonal) + 0.1), neurons=5)

    @pytest.mark.parametrize(
        "options",
        [{"nonzeros": 40}, {"nonzeros": 40, "pattern": "block:2x2"}, {"epsilon": 3.0, "penalty": "l0"}],
        ids=["unstructured", "blocks", "l0 budget"],
    )
    def test_a_number_for_all_is_not_divided(self, options):
        A, Y = self.layer()
        with pytest.raises(UnsupportedProgramError, match="neurons=5: .* its weights are counted over all of them"):
            solve(LayerProgram(A, Y, activation=None, **options), neurons=5)


class TestPrune:
    def test_layers_in_blocks_keep_their_promises(self):
        model, inputs = chain(16, 24, 8), samples(120, 16)
        whole, apart = (prune(model, inputs, epsilon=0.2, penalty="l1", neurons=count) for count in (None, 10))
        assert apart.report.certificate.holds and apart.report.options["neurons"] == 10
        for a, b in zip(whole.report.layers, apart.report.layers, strict=True):
            assert b.objective == pytest.approx(a.objective, rel=5e-3) and b.gap <= 1e-3

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"epsilon": 0.1, "consistency": "paper"}, "the paper's inequalities are met to a share of a budget that all neurons have together"),
            ({"epsilon": 0.1, "penalty": "l0"}, "penalty='l0' was given with neurons=10; expected penalty='l1'"),
            ({"sparsity": 0.5}, "pattern='unstructured' counts weights over all neurons"),
            ({"sparsity": 0.5, "pattern": "block:2x2"}, "pattern='block:2x2' counts weights over all neurons"),
            ({"pattern": "2:4"}, "fidelity='network' weighs the errors of all neurons together"),
            ({"budget": 0.1}, "pattern='unstructured' counts weights over all neurons"),
            ({"epsilon": 0.1, "neurons": 0}, "neurons=0; expected None or a whole number, at least 1"),
        ],
    )
    def test_what_does_not_come_apart(self, options, message):
        with pytest.raises(ArgumentError, match=message):
            prune(chain(16, 24, 8), samples(120, 16), **{"neurons": 10, **options})
