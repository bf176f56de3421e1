"""Columns that leave the iterations of prox_admm: the answer is that of the whole program, and what left wrongly comes back."""

import pytest
import torch

import nettrim
from nettrim import rows
from nettrim.duality import best_bound
from nettrim.solvers import working_set
from nettrim.solvers.splitting import start, step
from nettrim.solvers.working_set import WorkingSet


def layer(kind: str = "relaxed", level: str = "epsilon") -> nettrim.LayerProgram:
    """A layer of which only the first inputs matter, 6 of 30."""
    generator = torch.Generator().manual_seed(3)
    A = torch.randn(300, 30, generator=generator, dtype=torch.float64)
    W = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    Y = (A[:, :6] @ W.T).clamp(min=0)
    options = {"epsilon": 0.2 * float(Y.norm())} if level == "epsilon" else {"regularization": 10.0}
    return nettrim.LayerProgram(A, Y, consistency=kind, **options)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Working sets for the small programs of tests too."""
    monkeypatch.setattr(working_set, "_WORK", 0)


@pytest.mark.parametrize("kind", ["relaxed", "paper"])
@pytest.mark.parametrize("level", ["epsilon", "regularization"])
def test_columns_leave_and_the_answer_is_that_of_the_whole_program(small, monkeypatch, kind, level):
    seen = []
    update = WorkingSet.update
    monkeypatch.setattr(WorkingSet, "update", lambda self, s, c: (update(self, s, c), seen.append(int(self._present.sum())))[0])
    program = layer(kind, level)
    solution = nettrim.solve(program, tol=1e-6)
    exact = nettrim.solve(program, "cvxpy")
    assert min(seen) < 20 if kind == "relaxed" else seen == [30] * len(seen)  # hard inequalities keep their columns
    assert solution.weights.shape == (5, 30)
    assert solution.status == "optimal"
    assert solution.objective == pytest.approx(exact.objective, rel=1e-5)
    assert program.discrepancy(solution.weights) == pytest.approx(solution.discrepancy, rel=1e-12)


def test_a_column_comes_back_when_its_multiplier_passes_the_threshold(small):
    program = layer()
    state = start(program, torch.float64, None, 0.1, 1.0)
    for _ in range(40):
        step(program, state)
    columns = WorkingSet(program, state)
    _, correlation = best_bound(program, state.U)
    nothing = torch.zeros_like(correlation)
    part = columns.update(state, nothing)
    present = part.W.shape[1]
    assert present == len(part.columns) == len(part.G) < 30
    assert torch.equal(columns.expand(part.S), state.S)
    # the last column was used by no neuron; a correlation of twice the threshold says that one wants it
    assert not bool(state.S[:, -1].any())
    nothing[2, -1] = 2 * state.level / state.beta
    back = columns.update(part, nothing)
    assert torch.equal(back.columns[:-1], part.columns)
    assert int(back.columns[-1]) == 29
    step(program, back)
    assert float(back.S[2, -1]) != 0


def test_streamed_rows_take_the_same_way(small):
    program = layer()
    A, Y = program.inputs, program.targets
    streamed = nettrim.LayerProgram(lambda: A.split(64), lambda: Y.split(64), epsilon=program.epsilon)
    solution, whole = nettrim.solve(streamed, tol=1e-6), nettrim.solve(program, tol=1e-6)
    assert solution.iterations == whole.iterations
    torch.testing.assert_close(solution.weights, whole.weights, rtol=0, atol=1e-9)


def test_dead_inputs_are_not_looked_at():
    program = layer()
    A = torch.cat([program.inputs, torch.zeros(300, 10, dtype=torch.float64)], 1)
    solution = nettrim.solve(nettrim.LayerProgram(A, program.targets, epsilon=program.epsilon), tol=1e-6)
    without = nettrim.solve(program, tol=1e-6)
    torch.testing.assert_close(solution.weights[:, :30], without.weights, rtol=0, atol=1e-9)
    assert not bool(solution.weights[:, 30:].any())


@pytest.mark.parametrize("pieces", [[1] * 7, [7], [3, 4], [5, 0, 2]])
def test_rows_come_in_batches_of_one_size_however_they_are_streamed(pieces, monkeypatch):
    monkeypatch.setattr(rows, "CHUNK_ELEMENTS", 9)  # two rows of 3 inputs and 1 target at a time
    A, Y = torch.arange(21, dtype=torch.float64).view(7, 3), torch.arange(7, dtype=torch.float64).view(7, 1)
    columns = torch.tensor([0, 2])
    streamed = nettrim.LayerProgram(lambda: A.split(pieces), lambda: Y.split(pieces), epsilon=1.0)
    whole = nettrim.LayerProgram(A, Y, epsilon=1.0)
    for one, other in zip(streamed.row_chunks(columns=columns), whole.row_chunks(columns=columns), strict=True):
        assert one[0] == other[0]
        assert torch.equal(one[1], other[1])
        assert torch.equal(one[1], A[one[0]][:, columns])
        assert torch.equal(one[2], other[2])


def test_targets_come_in_the_same_batches_without_the_inputs(monkeypatch):
    monkeypatch.setattr(rows, "CHUNK_ELEMENTS", 12)
    A, Y = torch.ones(7, 3, dtype=torch.float64), torch.arange(7, dtype=torch.float64).view(7, 1)
    read = []
    streamed = nettrim.LayerProgram(lambda: read.append(1) or A.split(2), lambda: Y.split(2), epsilon=1.0)
    before = len(read)
    for one, other in zip(streamed.target_chunks(torch.float32), streamed.row_chunks(torch.float32), strict=True):
        assert one[0] == other[0]
        assert torch.equal(one[1], other[2])
    assert len(read) == before + 1
