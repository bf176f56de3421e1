"""Numbers at the edge, as properties: whatever the data, a solution keeps what its status says, and prune keeps its promises or refuses by name.

A short profile runs in the suite; ``--hypothesis-profile=nightly`` tries 2,000 examples of each.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, event, given
from hypothesis import strategies as st
from networks import bits, same_bits, state_of
from problems import audit
from torch import nn

import nettrim
from nettrim import LayerProgram, NetTrimError
from nettrim.residual import ONE_SIDED_TOLERANCE

EXPONENTS = st.sampled_from((-30, -20, -8, -3, 0, 0, 0, 3, 8, 20, 30))
SPECIAL = st.sampled_from((math.nan, math.inf, -math.inf))


@st.composite
def matrices(draw: st.DrawFn, rows: int, columns: int) -> np.ndarray:
    """Any structure that data have had: full, of rank 1, with rows all alike, with zeros, denormals and sizes apart."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    made = rng.standard_normal((rows, columns))
    structure = draw(st.sampled_from(("full", "rank 1", "one row", "zeros", "denormal", "sizes apart", "whole numbers")))
    if structure == "rank 1":
        made = np.outer(made[:, 0], made[0])
    elif structure == "one row":
        made[:] = made[0]
    elif structure == "zeros":
        made *= rng.random((rows, columns)) < 0.3
    elif structure == "denormal":
        made *= 5e-324 * 2.0 ** rng.integers(0, 60)
    elif structure == "sizes apart":
        made *= 10.0 ** rng.integers(-8, 9, columns)
    elif structure == "whole numbers":
        made = np.round(made)
    return made if structure == "denormal" else made * 10.0 ** draw(EXPONENTS)


@st.composite
def programs(draw: st.DrawFn) -> dict[str, Any]:
    """What a `LayerProgram` is made of, sizes from 1 on."""
    P, N, M = draw(st.integers(1, 12)), draw(st.integers(1, 5)), draw(st.integers(1, 3))
    A = draw(matrices(P, N))
    activation = draw(st.sampled_from(("relu", None)))
    if draw(st.booleans()):
        Y = draw(matrices(P, M))
    else:
        with np.errstate(all="ignore"):
            Y = A @ draw(matrices(N, M))
    Y = np.maximum(Y, 0.0) if activation else Y
    dtype = draw(st.sampled_from((torch.float64, torch.float32)))
    with np.errstate(all="ignore"):
        norm = float(np.linalg.norm(Y))
    budget = draw(st.booleans())
    level = draw(st.sampled_from((1e-12, 1e-6, 0.01, 0.3, 0.999, 1.0, 1e6)))
    level = level * norm if draw(st.booleans()) and math.isfinite(norm) and norm > 0 else level
    options: dict[str, Any] = {"activation": activation, "epsilon" if budget else "regularization": level}
    if activation:
        options["consistency"] = draw(st.sampled_from(("relaxed", "paper")))
    return {"inputs": torch.from_numpy(A).to(dtype), "targets": torch.from_numpy(Y).to(dtype), **options}


@given(programs())
def test_a_solution_keeps_what_its_status_says(given_: dict[str, Any]) -> None:
    try:
        program = LayerProgram(**given_)
        solution = nettrim.solve(program, tol=1e-3, max_iter=200)
    except NetTrimError as error:
        event(f"refused: {type(error).__name__}")
        return
    event(solution.status)
    assert torch.isfinite(solution.weights).all() or solution.status in ("infeasible", "iteration_limit")  # the only ones may be beyond float32
    assert not math.isnan(solution.objective) and solution.lower_bound >= 0 and math.isfinite(solution.lower_bound)
    if solution.status in ("optimal", "feasible"):
        assert program.is_feasible(solution.weights)
        assert solution.gap <= 1e-3 or solution.status == "feasible"
        slack = 100 * ONE_SIDED_TOLERANCE if program.one_sided else 1e-9
        assert solution.lower_bound <= solution.objective * (1 + slack), "weak duality"
    with np.errstate(all="ignore"):
        found = audit(program, solution.weights)
    if all(math.isfinite(value) and 1e-140 < abs(value) < 1e140 for value in (found.objective, found.discrepancy)):
        size = float(program.targets.double().norm()) + float((program.inputs.double().abs() @ solution.weights.double().abs().T).norm())
        rounding = 0.0 if program.regularization is None else 1e-12 * size * (found.discrepancy + 1e-12 * size)
        assert solution.objective == pytest.approx(found.objective, rel=1e-6, abs=rounding)
        assert solution.discrepancy == pytest.approx(found.discrepancy, rel=1e-6, abs=1e-12 * size)


@st.composite
def networks(draw: st.DrawFn) -> tuple[nn.Sequential, torch.Tensor]:
    """One or two layers, widths from 1 on, in any dtype and of any size, and data for them."""
    dtype = draw(st.sampled_from((torch.float32, torch.float64, torch.float16, torch.bfloat16)))
    widths = draw(st.lists(st.integers(1, 6), min_size=2, max_size=3))
    torch.manual_seed(draw(st.integers(0, 1000)))
    modules: list[nn.Module] = []
    for inputs, outputs in zip(widths, widths[1:], strict=False):
        modules += [nn.Linear(inputs, outputs, bias=draw(st.booleans())), nn.ReLU()]
    model = nn.Sequential(*modules[: None if draw(st.booleans()) else -1]).to(dtype)
    if draw(st.booleans()):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(10.0 ** draw(st.sampled_from((-20, -6, 3, 12))))
    assume(all(torch.isfinite(parameter).all() for parameter in model.parameters()))
    P = draw(st.integers(1, 15))
    data = torch.from_numpy(draw(matrices(P, widths[0]))).to(dtype)
    assume(bool(torch.isfinite(data).all()))
    assume(not bool(data.any()) or float(data.abs().max()) > 1e-150)  # below it float64 has no squares, so no norms (docs/verify.md)
    return model, data


WAYS = ({"penalty": "l1"}, {"penalty": "l1", "consistency": "paper"}, {"penalty": "l0"})


@given(networks(), st.sampled_from((1e-12, 1e-6, 0.05, 0.3, 1.0, 1e6)), st.sampled_from(("cascade", "parallel")), st.sampled_from(WAYS))
def test_prune_keeps_its_promises_or_refuses(network: tuple[nn.Sequential, torch.Tensor], epsilon: float, mode: str, way: dict[str, Any]) -> None:
    model, data = network
    before = state_of(model)
    try:
        result = nettrim.prune(model, data, epsilon=epsilon, mode=mode, max_iter=200, on_failure="keep_dense", holdout=0.2, **way)
    except NetTrimError as error:
        event(f"refused: {type(error).__name__}")
        assert same_bits(before, state_of(model))
        return
    assert same_bits(before, state_of(model))
    report = result.report
    event(f"{len(report.layers)} layers")
    assert report.certificate.holds
    assert all(torch.isfinite(parameter).all() for parameter in result.model.parameters())
    assert all(layer.discrepancy <= layer.epsilon and layer.status in ("optimal", "feasible") for layer in report.layers)
    found = nettrim.verify(model, result.model, data, report, masks=result.masks, bounds=False)
    assert found.holds, str(found)
    again = nettrim.Report.from_dict(report.to_dict())
    assert again.to_dict() == report.to_dict()


@given(networks(), SPECIAL, st.sampled_from(("weight", "bias", "data")), st.integers(0, 10**6))
def test_what_is_no_number_is_refused_by_name(network: tuple[nn.Sequential, torch.Tensor], value: float, where: str, place: int) -> None:
    model, data = network
    layer = model[0]
    assert isinstance(layer, nn.Linear)
    if where == "bias" and layer.bias is None:
        where = "weight"
    target = data if where == "data" else layer.get_parameter(where)
    with torch.no_grad():
        target.view(-1)[place % target.numel()] = value
    before = bits(torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()]))
    with pytest.raises(NetTrimError, match="NaN or infin|infinite value") as caught:
        nettrim.prune(model, data, epsilon=0.1, holdout=0.0)
    assert ("batch 0" if where == "data" else f"0.{where}") in str(caught.value)
    assert torch.equal(before, bits(torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])))
