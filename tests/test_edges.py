"""Numbers at the edge, the named ones: each is solved and certified, or refused with the layer's name."""

from __future__ import annotations

import pytest
import torch
from networks import chain, same_bits, samples, state_of
from torch import nn

import nettrim
from nettrim import ArgumentError, ConvergenceError, LayerProgram, NetTrimError


def certified(model: nn.Module, inputs: torch.Tensor, **options: object) -> nettrim.Report:
    result = nettrim.prune(model, inputs, **options)  # type: ignore[arg-type]
    assert result.report.certificate.holds
    found = nettrim.verify(model, result.model, inputs, result.report, masks=result.masks)
    assert found.holds, str(found)
    return result.report


@pytest.mark.parametrize("shape", ((1, 6, 5), (40, 1, 5), (40, 6, 1), (1, 1, 1)))
@pytest.mark.parametrize("goal", ({"epsilon": 0.1}, {"sparsity": 0.5}))
def test_one_row_one_input_one_output(shape: tuple[int, int, int], goal: dict[str, float]) -> None:
    P, N, M = shape
    certified(chain(N, M, 2), samples(P, N), holdout=0.0, **goal)
    program = LayerProgram(samples(P, N), samples(P, M, 3).abs(), epsilon=0.1)
    assert nettrim.solve(program).status in ("optimal", "feasible", "infeasible")


def test_a_million_identical_rows() -> None:
    row = samples(1, 2)
    report = certified(chain(2, 1), row.expand(1_000_000, -1), epsilon=0.1, penalty="l1", holdout=0.0)
    alone = certified(chain(2, 1), row, epsilon=0.1, penalty="l1", holdout=0.0)
    assert report.layers[0].rows == 1_000_000
    assert report.layers[0].objective == pytest.approx(alone.layers[0].objective, rel=2e-3)


def test_a_gram_matrix_of_rank_one() -> None:
    inputs = torch.outer(samples(60, 1)[:, 0], samples(1, 8)[0])
    report = certified(chain(8, 6, 3), inputs, epsilon=0.1, penalty="l1")
    assert all(layer.status == "optimal" for layer in report.layers)


@pytest.mark.parametrize("size", (1e30, 1e-30, 1e15, 1e-15))
def test_very_large_and_very_small_inputs(size: float) -> None:
    model, inputs = chain(8, 6, 3, bias=False, dtype=torch.float64), samples(60, 8).double()
    report = certified(model, inputs * size, epsilon=0.1, penalty="l1", tol=1e-3)
    plain = certified(model, inputs, epsilon=0.1, penalty="l1", tol=1e-3)
    for layer, other in zip(report.layers, plain.layers, strict=True):
        assert layer.status == "optimal" and layer.relative_discrepancy == pytest.approx(other.relative_discrepancy, rel=1e-2)
        assert layer.objective == pytest.approx(other.objective, rel=1e-2)


@pytest.mark.parametrize("size", (1e-30, 1e25))
def test_inputs_whose_squares_float32_does_not_hold(size: float) -> None:
    """What pruning did to the second layer's inputs is seen: it has the cascade's budget, not one of its own."""
    model, inputs = chain(4, 3, 2, bias=False), samples(40, 4) * size
    result = nettrim.prune(model, inputs, epsilon=0.2, penalty="l1", holdout=0.0)
    plain = nettrim.prune(model, samples(40, 4), epsilon=0.2, penalty="l1", holdout=0.0)
    assert result.report.layers[1].epsilon / size == pytest.approx(plain.report.layers[1].epsilon, rel=1e-2)
    assert nettrim.verify(model, result.model, inputs, result.report).holds


def test_denormal_inputs_and_weights() -> None:
    try:
        certified(chain(8, 6, 3, bias=False), samples(60, 8) * 1e-41, epsilon=0.1, penalty="l1")
    except NetTrimError as error:
        assert "0" in str(error)
    model = chain(8, 6, 3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1e-40)
    try:
        certified(model, samples(60, 8), epsilon=0.1, penalty="l1")
    except NetTrimError as error:
        assert "layer '0'" in str(error)


@pytest.mark.parametrize("epsilon", (1e-12, 1e6))
@pytest.mark.parametrize("mode", ("cascade", "parallel"))
def test_budgets_of_almost_nothing_and_of_everything(epsilon: float, mode: str) -> None:
    model, inputs = chain(8, 6, 3, dtype=torch.float64), samples(60, 8).double()
    if epsilon == 1e6:
        report = certified(model, inputs, epsilon=epsilon, mode=mode, penalty="l1")
        assert report.density == 0 and all(layer.status == "optimal" for layer in report.layers)
        return
    report = certified(model, inputs, epsilon=epsilon, mode=mode, on_failure="keep_dense")
    assert all(layer.discrepancy <= layer.epsilon for layer in report.layers)
    single = chain(8, 6, 3)
    before = state_of(single)
    try:
        certified(single, inputs.float(), epsilon=epsilon, mode=mode)
    except (ConvergenceError, nettrim.InfeasibleError) as error:
        assert "layer '" in str(error) and same_bits(before, state_of(single))


@pytest.mark.parametrize("activation", ("relu", None))
@pytest.mark.parametrize("epsilon", (0.0, 1e-150))
def test_the_fewest_weights_within_a_budget_of_nothing(epsilon: float, activation: str | None) -> None:
    A = samples(30, 6).double()
    W = torch.zeros(2, 6, dtype=torch.float64)
    W[:, 2] = 1.0
    Y = A @ W.T
    program = LayerProgram(A, Y.clamp(min=0) if activation else Y, epsilon=epsilon, penalty="l0", activation=activation)
    solution = nettrim.solve(program, initial=W)
    assert (solution.status in ("optimal", "feasible")) == program.is_feasible(solution.weights)


@pytest.mark.parametrize("activation", ("relu", None))
def test_inputs_whose_squares_float64_does_not_hold(activation: str | None) -> None:
    A, Y = (torch.tensor([[value]], dtype=torch.float64) for value in (6.67e-316, 1e-4))
    program = LayerProgram(A, Y, epsilon=1e-12, activation=activation)
    solution = nettrim.solve(program)
    assert (solution.status in ("optimal", "feasible")) == program.is_feasible(solution.weights)


def test_an_overflow_of_float16_is_refused_by_name() -> None:
    """Two inputs that are the same: one weight does for both if it may be twice as large, which here is beyond float16."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[6e4, 6e4], [1.0, 1.0]]))
    model, inputs = model.half(), torch.full((30, 2), 0.25).half()
    before = state_of(model)
    with pytest.raises(NetTrimError, match=r"layer '0'.*beyond the range of torch.float16"):
        nettrim.prune(model, inputs, pattern="1:2", holdout=0.0)
    assert same_bits(before, state_of(model))
    kept = nettrim.prune(model, inputs, pattern="1:2", holdout=0.0, on_failure="keep_dense")
    assert "beyond the range" in kept.report.skipped["0"] and same_bits(before, state_of(kept.model))


@pytest.mark.parametrize("value", (float("nan"), float("inf"), float("-inf")))
def test_no_number_at_any_place_of_a_program(value: float) -> None:
    A, Y = samples(6, 3), samples(6, 2).abs()
    bad = torch.tensor(value)
    for name, arguments in (
        ("inputs", {"inputs": A.index_fill(0, torch.tensor([2]), value), "targets": Y, "epsilon": 0.1}),
        ("targets", {"inputs": A, "targets": Y.index_fill(1, torch.tensor([0]), value), "epsilon": 0.1}),
        ("epsilon", {"inputs": A, "targets": Y, "epsilon": value}),
        ("regularization", {"inputs": A, "targets": Y, "regularization": value}),
        ("l1_weights", {"inputs": A, "targets": Y, "epsilon": 0.1, "l1_weights": bad.expand(3)}),
        ("upper", {"inputs": A, "targets": Y, "epsilon": 0.1, "consistency": "paper", "upper": bad.expand(6, 2)}),
    ):
        with pytest.raises(ArgumentError, match=name):
            LayerProgram(**arguments)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="initial"):
        nettrim.solve(LayerProgram(A, Y, epsilon=0.1), initial=bad.expand(2, 3))
    for argument in ("epsilon", "gamma", "kappa", "tol", "bias_weight", "holdout"):
        with pytest.raises(ArgumentError, match=argument):
            nettrim.prune(chain(3, 2), A, **({"epsilon": 0.1} | {argument: value}))  # type: ignore[arg-type]
