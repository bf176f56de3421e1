"""Edge cases that must work: what is dead, doubled, scarce, tiny, huge or rounded; and a property over all of them."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import Stage, bound_by_hand, by_name, chain, end_to_end, promises, same_bits, samples, solved_on, stages, state_of
from torch import Tensor, nn

import nettrim
from nettrim import NetTrimError, PruneResult

prune = partial(nettrim.prune, penalty="l1")  # the papers' program

MODES = ("parallel", "cascade")
SETS = ("relaxed", "paper")


def check(model: nn.Sequential, inputs: Tensor, result: PruneResult, mode: str, holdout: float = 0.1, gamma: float = 1.1) -> list[Stage]:
    """Every promise of a chain, computed again from the stored weights; the slack is the rounding of the layers' own dtype."""
    assert result.report.certificate.holds, result.report.certificate.explanation
    dtype = next(model.parameters()).dtype
    solved = solved_on(inputs, holdout)[0].to(dtype)
    found = stages(model, result.model, solved)
    unit = torch.finfo(dtype).eps
    slack = [4 * unit * (float(stage.targets.norm()) + float((stage.dense_inputs.abs() @ stage.weight.abs().T).norm())) for stage in found]
    for stage, rounding in zip(found, slack, strict=True):
        if layer := by_name(result).get(stage.name):
            assert layer.discrepancy <= layer.epsilon
            if dtype not in (torch.float16, torch.bfloat16):  # the streams of a half-precision network differ from those in float64
                assert stage.discrepancy(mode) <= layer.epsilon * (1 + 1e-6) + rounding
    certificate = result.report.certificate
    assert certificate.guaranteed is not None and certificate.measured <= certificate.guaranteed
    if dtype not in (torch.float16, torch.bfloat16):
        measured, _ = end_to_end(model, result.model, solved)
        assert measured == pytest.approx(certificate.measured, rel=1e-4, abs=10 * sum(slack))
        if not result.report.skipped:
            assert measured <= bound_by_hand(found, promises(result), mode, gamma) * (1 + 1e-6) + 10 * sum(slack)
    return found


def dead_inputs(model: nn.Sequential, inputs: Tensor) -> Tensor:
    return inputs * (torch.arange(inputs.shape[1]) % 3 > 0)


def dead_neurons(model: nn.Sequential, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        model[0].bias[:4] = -100.0
    return inputs


def dead_layer(model: nn.Sequential, inputs: Tensor) -> Tensor:
    """Ω is empty and Y = 0: the budget is 0, and no weight is needed."""
    with torch.no_grad():
        model[0].bias.fill_(-100.0)
    return inputs


def always_active(model: nn.Sequential, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        model[0].bias[:5] = 100.0
    return inputs


def duplicate_columns(model: nn.Sequential, inputs: Tensor) -> Tensor:
    return torch.cat([inputs[:, :5], inputs[:, :5]], 1)


def rank_deficient(model: nn.Sequential, inputs: Tensor) -> Tensor:
    return inputs[:, :2] @ samples(2, 10, 5)


def constant_inputs(model: nn.Sequential, inputs: Tensor) -> Tensor:
    return torch.ones_like(inputs)


def no_inputs(model: nn.Sequential, inputs: Tensor) -> Tensor:
    return torch.zeros_like(inputs)


def zero_weights(model: nn.Sequential, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.zero_()
    return inputs


def few_rows(model: nn.Sequential, inputs: Tensor) -> Tensor:
    return inputs[:5]


def one_sample(model: nn.Sequential, inputs: Tensor) -> Tensor:
    return inputs[:1]


def tiny(model: nn.Sequential, inputs: Tensor) -> Tensor:
    return inputs * 1e-6


def huge(model: nn.Sequential, inputs: Tensor) -> Tensor:
    return inputs * 1e6


def mixed_units(model: nn.Sequential, inputs: Tensor) -> Tensor:
    return inputs * torch.logspace(-3, 3, inputs.shape[1])


CASES: list[Callable[[nn.Sequential, Tensor], Tensor]] = [
    dead_inputs,
    dead_neurons,
    dead_layer,
    always_active,
    duplicate_columns,
    rank_deficient,
    constant_inputs,
    no_inputs,
    zero_weights,
    few_rows,
    one_sample,
    tiny,
    huge,
    mixed_units,
]


@pytest.mark.parametrize("consistency", SETS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_what_must_work(case: Callable[[nn.Sequential, Tensor], Tensor], mode: str, consistency: str) -> None:
    model = chain(10, 12, 6)
    inputs = case(model, samples(60, 10))
    before = state_of(model)
    result = prune(model, inputs, epsilon=0.1, mode=mode, consistency=consistency)
    assert [layer.name for layer in result.report.layers] == ["0", "2"]
    assert all(layer.status in ("optimal", "feasible") and layer.gap <= 0.05 for layer in result.report.layers)
    check(model, inputs, result, mode)
    assert same_bits(state_of(model), before)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_what_must_work_for_the_fewest_weights(case: Callable[[nn.Sequential, Tensor], Tensor], mode: str) -> None:
    model = chain(10, 12, 6)
    inputs = case(model, samples(60, 10))
    before = state_of(model)
    result = nettrim.prune(model, inputs, epsilon=0.3, mode=mode)
    assert result.report.options["penalty"] == "l0"
    assert [layer.name for layer in result.report.layers] == ["0", "2"]
    assert all(layer.status in ("optimal", "feasible") for layer in result.report.layers)
    check(model, inputs, result, mode)
    assert same_bits(state_of(model), before)


def test_dead_inputs_need_no_weights() -> None:
    model = chain(10, 12, 6)
    result = prune(model, dead_inputs(model, samples(60, 10)), epsilon=0.1)
    assert not result.masks["0.weight"][:, ::3].any()


def test_dead_neurons_need_no_weights() -> None:
    model = chain(10, 12, 6)
    inputs = dead_neurons(model, samples(60, 10))
    result = prune(model, inputs, epsilon=0.1, mode="parallel")
    assert not result.masks["0.weight"][:4].any()
    assert not result.masks["2.weight"][:, :4].any()


def test_a_silent_layer_is_emptied() -> None:
    model = chain(10, 12, 6)
    result = prune(model, dead_layer(model, samples(60, 10)), epsilon=0.1)
    layer = by_name(result)["0"]
    assert (layer.nonzeros, layer.epsilon, layer.discrepancy, layer.relative_discrepancy, layer.status) == (0, 0, 0, 0, "optimal")


@pytest.mark.parametrize("consistency", SETS)
@pytest.mark.parametrize("bias", (-3.0, -1.0))
def test_a_silent_layer_behind_a_pruned_one(consistency: str, bias: float) -> None:
    """Ω is empty on disturbed inputs; with the larger bias the pruned inputs may wake the dense weights up."""
    for seed in range(2):
        model, inputs = chain(10, 12, 6, 4, seed=seed), samples(60, 10)
        with torch.no_grad():
            model[2].bias.fill_(bias)
        result = prune(model, inputs, epsilon=0.5, consistency=consistency)
        check(model, inputs, result, "cascade")
        assert consistency == "paper" or by_name(result)["2"].nonzeros == 0 or by_name(result)["2"].epsilon > 0


def test_one_sample_is_fitted_with_few_weights() -> None:
    result = prune(chain(10, 12, 6), samples(1, 10), epsilon=0.1)
    assert all(layer.rows == 1 for layer in result.report.layers)
    assert result.report.certificate.holdout is None
    assert result.report.density < 0.2


@pytest.mark.parametrize("scale", (1e-6, 1e-3, 1e3, 1e6))
def test_units_of_the_inputs_do_not_matter(scale: float) -> None:
    """Without a bias the program is the same one in other units: the same relative figures come out."""
    model = chain(10, 12, 6, bias=False)
    plain, scaled = (prune(model, samples(60, 10) * factor, epsilon=0.1, tol=1e-5) for factor in (1.0, scale))
    for one, other in zip(plain.report.layers, scaled.report.layers, strict=True):
        assert other.objective == pytest.approx(one.objective, rel=1e-3)
        assert other.epsilon == pytest.approx(one.epsilon * scale, rel=1e-3)


@pytest.mark.parametrize("consistency", SETS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float64))
def test_parameters_of_other_dtypes(dtype: torch.dtype, mode: str, consistency: str) -> None:
    model, inputs = chain(10, 12, 6, dtype=dtype), samples(60, 10)
    result = prune(model, inputs, epsilon=0.1, mode=mode, consistency=consistency)
    assert all(parameter.dtype == dtype for parameter in result.model.parameters())
    found = check(model, inputs, result, mode)
    # measured after the cast: by the stored module on the rows that it was given, in its own dtype
    A = solved_on(inputs)[0].to(dtype)
    with torch.no_grad():
        out, dense = (network[1](network[0](A)).double() for network in (result.model, model))
    first = by_name(result)["0"]
    assert first.discrepancy == pytest.approx(float((out - dense).norm()), rel=1e-6)
    assert first.discrepancy == pytest.approx(found[0].discrepancy("parallel"), rel=40 * torch.finfo(dtype).eps)
    assert result.masks["0.weight"].sum() == first.nonzeros < 120


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
@pytest.mark.parametrize("mode", MODES)
def test_a_budget_near_the_rounding_is_kept_or_refused(mode: str, dtype: torch.dtype) -> None:
    """Going down, budgets are kept until rounding the weights costs more than they allow; then the call says so."""
    model, inputs = chain(10, 12, 6, dtype=dtype), samples(60, 10)
    before, refused = state_of(model), False
    for share in (0.03, 0.002, 1e-5):
        try:
            result = prune(model, inputs, epsilon=share, mode=mode)
        except NetTrimError as error:
            refused = True
            assert "layer '" in str(error) and "epsilon" in str(error)
        else:
            check(model, inputs, result, mode)
        assert same_bits(state_of(model), before)
    assert refused


def test_weights_beyond_half_precision_are_refused_by_name() -> None:
    """A tiny input and a large target: what the program wants for it is beyond float16's 65504."""
    model = chain(2, 1, bias=False, dtype=torch.float16)
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[6e4, 6e4]]))
    inputs = torch.tensor([[1e-4, 1e-4]]).repeat(8, 1)
    result = prune(model, inputs, epsilon=0.01, on_failure="keep_dense")
    if result.report.layers:
        check(model, inputs, result, "cascade")
    else:
        assert "beyond the range" in result.report.skipped["0"] and same_bits(state_of(result.model), state_of(model))


def test_outputs_beyond_half_precision_are_named() -> None:
    with pytest.raises(NetTrimError, match="layer '0'|the network's output"):
        prune(chain(10, 4, dtype=torch.float16), samples(20, 10) * 1e6, epsilon=0.1)


@st.composite
def networks(draw: Any) -> dict[str, Any]:
    widths = draw(st.lists(st.integers(1, 6), min_size=2, max_size=4))
    return {
        "widths": widths,
        "rows": draw(st.integers(1, 20)),
        "seed": draw(st.integers(0, 2**16)),
        "bias": draw(st.booleans()),
        "last_relu": draw(st.booleans()),
        "dtype": draw(st.sampled_from((torch.float16, torch.bfloat16, torch.float32, torch.float64))),
        "scale": draw(st.sampled_from((1e-6, 1e-2, 1.0, 1e2, 1e6))),
        "shift": draw(st.sampled_from((0.0, 1.0, 30.0))),
        "dead": draw(st.sampled_from((None, "inputs", "neurons"))),
        "mode": draw(st.sampled_from(MODES)),
        "consistency": draw(st.sampled_from(SETS)),
        "epsilon": draw(st.sampled_from((0.01, 0.1, 0.5, 1.5))),
        "gamma": draw(st.sampled_from((1.0, 1.1, 4.0))),
        "holdout": draw(st.sampled_from((0.0, 0.1, 0.5))),
    }


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(case=networks())
def test_prune_keeps_its_promises_or_leaves_the_model(case: dict[str, Any]) -> None:
    model = chain(*case["widths"], seed=case["seed"], bias=case["bias"], last_relu=case["last_relu"], dtype=case["dtype"])
    if case["dead"] == "neurons" and case["bias"]:
        with torch.no_grad():
            model[0].bias[::2] = -1e3
    inputs = samples(case["rows"], case["widths"][0], case["seed"]) + case["shift"]
    if case["dead"] == "inputs":
        inputs[:, ::2] = 0
    inputs = inputs * case["scale"]
    before = state_of(model)
    options = {name: case[name] for name in ("mode", "consistency", "epsilon", "gamma", "holdout")}
    try:
        result = prune(model, inputs, **options, max_iter=300)
    except NetTrimError as error:
        assert len(str(error)) > 40
    else:
        solved = solved_on(inputs, case["holdout"])[0].to(case["dtype"])
        assert all(layer.rows == len(solved) for layer in result.report.layers)
        check(model, inputs, result, case["mode"], case["holdout"], case["gamma"])
        certificate = result.report.certificate
        assert certificate.holds and math.isfinite(certificate.measured) and certificate.measured <= certificate.guaranteed
        for layer in result.report.layers:
            assert layer.discrepancy <= layer.epsilon
            assert torch.equal(result.masks[f"{layer.name}.weight"], result.model.get_submodule(layer.name).weight != 0)
    assert same_bits(state_of(model), before)
