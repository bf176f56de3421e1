"""Pruning each layer type against CVXPY, at tiny sizes.

The map from a layer's parameters to its output is built column by column by setting one parameter of the module itself to 1, so nothing here knows of
rows, patches or groups; the program over it is written down in CVXPY as docs/method.md has it.
"""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import cvxpy as cp
import numpy as np
import pytest
import torch
from test_layer_kinds import CONVOLUTIONS, SEVERAL, randomised, to_double
from torch import Tensor, nn

import nettrim
from nettrim import layers
from nettrim.layers import Call

EPSILON = 0.2


def optimum(B: np.ndarray, target: np.ndarray, epsilon: float, *, relu: bool) -> float:
    """``min ‖p‖₁`` with ``F(B p) ≤ ε²``, by Clarabel: ``F`` is the misfit of the relaxed set, or without a ReLU the squared distance."""
    p = cp.Variable(B.shape[1])
    z = B @ p
    on = target > 0 if relu else np.ones(len(target), dtype=bool)
    misfit = [cp.sum_squares(z[on] - target[on])] if on.any() else []
    if not on.all():
        misfit.append(cp.sum_squares(cp.pos(z[~on])))
    problem = cp.Problem(cp.Minimize(cp.norm1(p)), [sum(misfit) <= epsilon**2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        problem.solve(solver=cp.CLARABEL)
    assert problem.status in ("optimal", "optimal_inaccurate")
    return float(problem.value)


def by_parameters(module: nn.Module, x: Tensor, names: list[str]) -> Tensor:
    """The matrix of the map from these parameters to the module's output at ``x``, column by column; all others are 0."""
    probe = copy.deepcopy(module)
    for parameter in probe.parameters():
        parameter.data.zero_()
    columns = []
    for name in names:
        flat = probe.get_parameter(name).data.view(-1)
        for place in range(len(flat)):
            flat[place] = 1.0
            columns.append(probe(x).detach().flatten())
            flat[place] = 0.0
    return torch.stack(columns, 1)


def groups_of(B: Tensor, channels: Tensor, parameters: list[Tensor], groups: int) -> list[tuple[Tensor, Tensor]]:
    """Outputs and columns of each group: a group's parameters are those that reach the outputs of its channels."""
    found = []
    for wanted in torch.arange(int(channels.max()) + 1).chunk(groups):
        rows = torch.isin(channels, wanted)
        found.append((rows, (B[rows] != 0).any(0)))
    assert sum(int(columns.sum()) for _, columns in found) == sum(p.numel() for p in parameters)
    return found


@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_pruning_a_convolution_is_the_program_of_its_own_map(name: str, relu: bool) -> None:
    make, shape = CONVOLUTIONS[name]
    module = randomised(make())
    unbatched = len(shape) == len(module.weight.shape) - 1
    generator = torch.Generator().manual_seed(1)
    size = shape if unbatched else (max(shape[0], 3), *shape[1:])
    x = torch.randn(size, generator=generator, dtype=torch.float64)
    out = module(x).detach()
    names = [key for key, _ in module.named_parameters()]
    B = by_parameters(module, x, names)
    torch.testing.assert_close(B @ torch.cat([module.get_parameter(key).data.flatten() for key in names]), out.flatten())
    target = out.clamp(min=0) if relu else out
    model = nn.Sequential(module, nn.ReLU()) if relu else nn.Sequential(module)
    result = nettrim.prune(model, [x], epsilon=EPSILON, penalty="l1", mode="parallel", holdout=0, tol=1e-5, forward_fn=lambda m, batch: m(batch))
    (report,) = result.report.layers
    assert report.activation == ("relu" if relu else None) and result.report.certificate.holds

    channel = 0 if unbatched else 1
    counts = torch.arange(out.shape[channel]).view([-1 if d == channel else 1 for d in range(out.dim())]).expand_as(out).flatten()
    flat = target.flatten()
    total = 0.0
    for rows, columns in groups_of(B, counts, list(module.parameters()), module.groups):
        # groups share the squared budget by what each has to lose
        share = float(flat[rows].norm() / flat.norm()) if module.groups > 1 else 1.0
        epsilon = EPSILON * float(flat.norm()) * share
        total += optimum(B[rows][:, columns].numpy(), flat[rows].numpy(), epsilon, relu=relu)
    assert report.objective == pytest.approx(total, rel=2e-4)
    assert report.lower_bound <= total * (1 + 1e-4)
    stored = sum(float(parameter.detach().abs().sum()) for parameter in result.model.parameters())
    assert stored == pytest.approx(report.objective, rel=1e-9)
    distance = float(((result.model(x) - target) if relu else result.model(x) - out).detach().norm())
    assert distance <= EPSILON * float(flat.norm()) * (1 + 1e-9)


@pytest.mark.parametrize("name", SEVERAL)
def test_pruning_modules_of_several_matrices_is_the_program_of_each(name: str) -> None:
    make, args = SEVERAL[name]
    module, args = randomised(make()), to_double(args)
    call = Call(args, {}, module(*args))
    common: dict[str, Any] = {"epsilon": EPSILON, "penalty": "l1", "mode": "parallel", "holdout": 0, "tol": 1e-5}
    result = nettrim.prune(nn.ModuleDict({"m": module}), [args], forward_fn=lambda model, batch: model["m"](*batch), **common)
    assert result.report.certificate.holds
    reports = {report.name: report for report in result.report.layers}
    assert len(reports) == len(layers.matrices_of(module))
    for matrix in layers.matrices_of(module):
        A, Z = matrix.input_rows(call).detach(), matrix.output_rows(call).detach()
        report = reports[matrix.name_in("m")]
        distance = EPSILON * float(Z.norm())
        # neuron by neuron they share one budget, so it is one program: vec(Z) = (A ⊗ I) vec(Wᵀ)
        B = torch.kron(A, torch.eye(Z.shape[1], dtype=A.dtype)).numpy()
        wanted = optimum(B, Z.flatten().numpy(), distance, relu=False)
        assert report.objective == pytest.approx(wanted, rel=2e-4), report.name
        assert math.isfinite(report.gap) and report.discrepancy <= distance * (1 + 1e-9)


def test_the_output_projection_of_attention_is_the_program_of_the_modules_own_output() -> None:
    module = randomised(nn.MultiheadAttention(4, 2, batch_first=True))
    x = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    out = module(x, x, x)[0].detach()
    probe = copy.deepcopy(module)
    parameters = [probe.get_parameter(name).data for name in ("out_proj.weight", "out_proj.bias")]
    for parameter in parameters:
        parameter.zero_()
    columns = []
    for flat in (parameter.view(-1) for parameter in parameters):
        for place in range(len(flat)):
            flat[place] = 1.0
            columns.append(probe(x, x, x)[0].detach().flatten())
            flat[place] = 0.0
    wanted = optimum(torch.stack(columns, 1).numpy(), out.flatten().numpy(), EPSILON * float(out.norm()), relu=False)
    options: dict[str, Any] = {"epsilon": EPSILON, "penalty": "l1", "mode": "parallel", "holdout": 0, "tol": 1e-5}
    result = nettrim.prune(nn.ModuleDict({"m": module}), [x], forward_fn=lambda model, batch: model["m"](batch, batch, batch), **options)
    report = next(report for report in result.report.layers if report.name == "m.out_proj")
    assert report.objective == pytest.approx(wanted, rel=2e-4)
