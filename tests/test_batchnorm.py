"""BatchNorm: the program that folds it in, against CVXPY and enumeration, and statistics estimated again."""

import copy

import cvxpy as cp
import numpy as np
import pytest
import torch
from networks import solved_on
from torch import Tensor, nn

from nettrim import ArgumentError, CalibrationError, LayerProgram, calibration, prune, solve
from nettrim.batchnorm import recalibrate
from nettrim.errors import UnsupportedProgramError


def problem(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A, W, and a BatchNorm's scale (of either sign) and shift, with the outputs behind the ReLU."""
    generator = torch.Generator().manual_seed(seed)
    A, W = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((40, 6), (3, 6)))
    scale, shift = torch.tensor([1.5, -0.7, 0.3]).double(), torch.tensor([0.4, -0.2, 1.0]).double()
    return A, W, scale, shift, (A @ W.T * scale + shift).clamp(min=0)


def by_hand(A: Tensor, scale: Tensor, shift: Tensor, Y: Tensor, epsilon: float, paper: bool) -> float:
    """The least ``Σ |s w|`` with ``relu(s z + t)`` near Y, written down from what the network computes, in the layer's own weights."""
    W = cp.Variable((3, 6))
    out = cp.multiply(A.numpy() @ W.T, scale.numpy()[None].repeat(len(A), 0)) + shift.numpy()[None].repeat(len(A), 0)
    on = (Y > 0).numpy()
    excess = [cp.sum_squares(out[on] - Y.numpy()[on])]
    constraints = [out[~on] <= 0] if paper else []
    if not paper:
        excess.append(cp.sum_squares(cp.pos(out[~on])))
    cp_problem = cp.Problem(
        cp.Minimize(cp.sum(cp.multiply(np.abs(scale.numpy())[:, None].repeat(6, 1), cp.abs(W)))), [*constraints, cp.sum(excess) <= epsilon**2]
    )
    cp_problem.solve(solver="CLARABEL")
    return float(cp_problem.value)


@pytest.mark.parametrize("consistency", ("relaxed", "paper"))
def test_a_program_with_a_floor_is_the_one_with_a_batchnorm_in_between(consistency: str) -> None:
    A, W, scale, shift, Y = problem()
    epsilon = 0.3 * float(Y.norm())
    program = LayerProgram(A, Y - shift, epsilon=epsilon, floor=-shift, consistency=consistency)
    expected = by_hand(A, scale, shift, Y, epsilon, consistency == "paper")
    for solver in ("auto", "cvxpy"):
        solution = solve(program, solver, tol=1e-6)
        assert solution.status == "optimal" and solution.objective == pytest.approx(expected, rel=1e-5)
        assert solution.lower_bound <= expected * (1 + 1e-7)
        stored = solution.weights / scale[:, None]
        assert float(((A @ stored.T * scale + shift).clamp(min=0) - Y).norm()) <= epsilon * (1 + 1e-9)
    blocks = solve(program, tol=1e-6, neurons=2) if consistency == "relaxed" else None
    assert blocks is None or blocks.objective == pytest.approx(expected, rel=1e-5)
    assert program.is_feasible(W * scale[:, None]) and program.misfit(W * scale[:, None]) == pytest.approx(0, abs=1e-20)


def test_floors_that_do_not_fit_are_refused_and_so_are_solvers_that_cannot_take_them() -> None:
    A, _, _, shift, Y = problem()
    for options, words in (
        ({"activation": None, "floor": shift}, "floor was given with activation=None"),
        ({"floor": shift[:2]}, r"floor has shape \(2,\)|must match"),
        ({"floor": -shift}, "below the floor"),
        ({"floor": torch.full((3,), float("nan"))}, "floor holds NaN"),
    ):
        targets = Y - shift if "below" not in words else Y - shift - 5
        with pytest.raises((ArgumentError, RuntimeError), match=words):
            LayerProgram(A, targets, epsilon=1.0, **options)
    for solver, options in (("admm", {"epsilon": 1.0}), ("osqp", {"regularization": 1.0})):
        with pytest.raises(UnsupportedProgramError, match="not at a floor of each neuron"):
            solve(LayerProgram(A, Y - shift, floor=-shift, consistency="paper", **options), solver)


def test_a_floor_of_zero_is_no_floor() -> None:
    A, W, *_ = problem()
    Y = (A @ W.T).clamp(min=0)
    found = [solve(LayerProgram(A, Y, epsilon=1.0, floor=floor), tol=1e-6) for floor in (None, torch.zeros(3))]
    assert torch.equal(found[0].weights, found[1].weights) and found[0].lower_bound == found[1].lower_bound


@pytest.mark.parametrize("consistency", ("relaxed", "paper"))
def test_a_pruned_convolution_before_a_batchnorm_has_the_optimum_of_its_program(consistency: str) -> None:
    """End to end against CVXPY on patches that torch itself unfolds; the first two scales are of opposite signs."""
    generator = torch.Generator().manual_seed(4)
    convolution, norm = nn.Conv2d(2, 3, (1, 3), bias=False).double(), nn.BatchNorm2d(3).double()
    for tensor in (convolution.weight.data, norm.running_mean, norm.bias.data):
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    norm.running_var.copy_(torch.tensor([0.5, 2.0, 1.0]))
    norm.weight.data.copy_(torch.tensor([1.3, -0.8, 0.4]))
    model, x = nn.Sequential(convolution, norm, nn.ReLU()).eval(), torch.randn(8, 2, 2, 5, generator=generator).double()
    result = prune(model, x, epsilon=0.3, holdout=0, tol=1e-6, consistency=consistency, penalty="l1")
    A = nn.functional.unfold(x, (1, 3)).transpose(1, 2).flatten(0, 1)
    scale = norm.weight.detach() / (norm.running_var + norm.eps).sqrt()
    shift = norm.bias.detach() - norm.running_mean * scale
    Y = model(x).detach().movedim(1, -1).flatten(0, 2)
    layer = result.report.layers[0]
    expected = by_hand(A, scale, shift, Y, 0.3 * float(Y.norm()), consistency == "paper")
    assert layer.activation == "relu" and layer.objective == pytest.approx(expected, rel=1e-5)
    assert layer.lower_bound <= expected * (1 + 1e-7)
    assert float((result.model(x) - model(x)).detach().norm()) <= 0.3 * float(Y.norm()) * (1 + 1e-9)
    assert result.report.certificate.measured <= result.report.certificate.guaranteed


def network() -> nn.Sequential:
    torch.manual_seed(0)
    convolution, norm = nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4)
    model = nn.Sequential(convolution, norm, nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 3), nn.BatchNorm1d(3))
    model(torch.randn(50, 1, 6, 6))
    return model.eval()


def test_statistics_are_the_average_of_the_batches_own() -> None:
    model, x = network(), torch.randn(60, 1, 6, 6)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    recalibrate(model, calibration.batches([x[:40], x[40:]]), calibration.runner())
    means, variances = [], []
    with torch.no_grad():
        for batch in (x[:40], x[40:]):
            z = model[0](batch)
            means.append(z.mean((0, 2, 3)))
            variances.append(z.var((0, 2, 3)))
    torch.testing.assert_close(model[1].running_mean, (means[0] + means[1]) / 2)
    torch.testing.assert_close(model[1].running_var, (variances[0] + variances[1]) / 2)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"1.running_mean", "1.running_var", "6.running_mean", "6.running_var"}
    assert not any(module.training for module in model.modules()) and model[1].momentum == 0.1


@pytest.mark.parametrize("inplace", (False, True))
def test_after_pruning_the_network_is_measured_with_the_new_statistics(inplace: bool) -> None:
    model, x = network(), torch.randn(80, 1, 6, 6)
    dense = copy.deepcopy(model)
    plain = prune(dense, x, sparsity=0.6, allocation="uniform")
    result = prune(model, x, sparsity=0.6, allocation="uniform", recalibrate_batchnorm=True, inplace=inplace)
    assert (result.model is model) == inplace
    assert result.report.options["recalibrate_batchnorm"] is True
    certificate = result.report.certificate
    assert certificate.holds and certificate.guaranteed is None and "estimated again" in certificate.explanation
    assert plain.report.certificate.guaranteed is not None
    # the same weights and promises, other statistics
    for before, after in zip(plain.report.layers, result.report.layers, strict=True):
        assert (before.discrepancy, before.epsilon) == (after.discrepancy, after.epsilon)
    assert torch.equal(plain.model[0].weight, result.model[0].weight)
    assert not torch.equal(plain.model[1].running_mean, result.model[1].running_mean)
    solved = solved_on(x)[0]
    with torch.no_grad():
        measured = float((result.model.eval()(solved) - dense(solved)).norm())
    assert certificate.measured == pytest.approx(measured, rel=1e-4)


def test_nothing_to_estimate_again_is_an_error_and_so_is_a_batch_of_one_value() -> None:
    with pytest.raises(ArgumentError, match="no BatchNorm with running statistics"):
        prune(nn.Sequential(nn.Linear(3, 2)), torch.randn(20, 3), sparsity=0.5, recalibrate_batchnorm=True)
    with pytest.raises(ArgumentError, match="recalibrate_batchnorm='yes'"):
        prune(network(), torch.randn(20, 1, 6, 6), sparsity=0.5, recalibrate_batchnorm="yes")
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CalibrationError, match="batch 0"):
        recalibrate(model, calibration.batches(torch.randn(1, 1, 6, 6)), calibration.runner())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()) and model[1].momentum == 0.1


@pytest.mark.parametrize("ends", ((0.0, 6.0), (-0.7, 0.4), (0.0, 0.5)))
def test_an_activation_between_two_ends_has_the_optimum_of_its_own_set(ends: tuple[float, float]) -> None:
    """Against CVXPY, written down from what the network computes: a BatchNorm's scale and shift, then ``clamp``."""
    A, W, scale, shift, _ = problem(3)
    low, high = ends
    Y = (A @ W.T * scale + shift).clamp(*ends)
    epsilon = 0.3 * float(Y.norm())
    program = LayerProgram(A, Y - shift, epsilon=epsilon, floor=low - shift, ceiling=high - shift)
    V = cp.Variable((3, 6))
    out = cp.multiply(A.numpy() @ V.T, scale.numpy()[None].repeat(len(A), 0)) + shift.numpy()[None].repeat(len(A), 0)
    at_low, at_high = (Y <= low).numpy(), (Y >= high).numpy()
    inner = ~at_low & ~at_high
    parts = [cp.sum_squares(out[inner] - Y.numpy()[inner]), cp.sum_squares(cp.pos(out[at_low] - low)), cp.sum_squares(cp.pos(high - out[at_high]))]
    size = cp.sum(cp.multiply(np.abs(scale.numpy())[:, None].repeat(6, 1), cp.abs(V)))
    by_cvxpy = cp.Problem(cp.Minimize(size), [sum(parts) <= epsilon**2])
    by_cvxpy.solve(solver="CLARABEL")
    for solver in ("auto", "cvxpy"):
        solution = solve(program, solver, tol=1e-6)
        assert solution.status == "optimal" and solution.objective == pytest.approx(by_cvxpy.value, rel=1e-5)
        assert solution.lower_bound <= by_cvxpy.value * (1 + 1e-7)
        stored = solution.weights / scale[:, None]
        measured = float(((A @ stored.T * scale + shift).clamp(*ends) - Y).norm())
        assert measured == pytest.approx(solution.discrepancy, rel=1e-9) and measured <= epsilon * (1 + 1e-9)
    # never above what the Lipschitz constant alone gives
    plain = LayerProgram(A, A @ W.T * scale, epsilon=epsilon, activation=None)
    assert by_cvxpy.value <= solve(plain, tol=1e-6).objective * (1 + 1e-5)
    penalised = LayerProgram(A, Y - shift, regularization=0.2, floor=low - shift, ceiling=high - shift)
    assert solve(penalised, tol=1e-6).objective == pytest.approx(solve(penalised, "cvxpy", tol=1e-6).objective, rel=1e-5)
    few = solve(LayerProgram(A, Y - shift, epsilon=epsilon, penalty="l0", floor=low - shift, ceiling=high - shift))
    assert few.status == "feasible" and few.discrepancy <= epsilon


def test_ceilings_that_do_not_fit_are_refused() -> None:
    A, _, _, shift, Y = problem()
    for options, words in (
        ({"activation": None}, "ceiling was given with activation=None"),
        ({"consistency": "paper"}, "the papers' set is the ReLU's"),
        ({"ceiling": torch.zeros(3)}, "above its floor"),
        ({"ceiling": torch.full((3,), 1e-3)}, "above the ceiling"),
    ):
        with pytest.raises(ArgumentError, match=words):
            LayerProgram(A, Y, epsilon=1.0, **{"ceiling": torch.full((3,), 1e3), **options})
