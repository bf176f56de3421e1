"""The network's certificate: bounds computed again by hand, what was measured measured again, and verdicts that can be no."""

import dataclasses
import math
from functools import partial
from typing import Any

import pytest
import torch
from networks import bound_by_hand, chain, end_to_end, promises, samples, solved_on, stages, train
from torch import nn

import nettrim
from nettrim import Certificate, ConvergenceError, LayerReport, NetTrimError, layers
from nettrim.activations import RELU
from nettrim.capture import Seen
from nettrim.certificate import certify, make_promise, stored_discrepancy
from nettrim.observation import Observation
from nettrim.observing import Layer

prune = partial(nettrim.prune, penalty="l1")  # the papers' program

MODES = ("parallel", "cascade")
WIDTHS = (10, 14, 9, 12, 8, 11, 6)


def check_bound(model: nn.Sequential, inputs: torch.Tensor, **options: Any) -> Certificate:
    result = prune(model, inputs, epsilon=0.15, **options)
    certificate = result.report.certificate
    solved, kept_out = solved_on(inputs)
    by_hand = bound_by_hand(stages(model, result.model, solved), promises(result), options["mode"])
    measured, relative = end_to_end(model, result.model, solved)
    assert certificate.measured == pytest.approx(measured, rel=1e-3)
    assert certificate.relative_measured == pytest.approx(relative, rel=1e-3)
    assert certificate.holdout == pytest.approx(end_to_end(model, result.model, kept_out)[1], rel=1e-3)
    assert certificate.guaranteed == pytest.approx(by_hand, rel=1e-4)
    assert by_hand <= certificate.guaranteed
    assert measured <= by_hand
    assert certificate.measured <= certificate.guaranteed
    assert certificate.holds
    assert all(layer.discrepancy <= layer.epsilon for layer in result.report.layers)
    return certificate


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("depth", range(2, 7))
def test_the_bound_holds_on_random_chains(depth: int, mode: str) -> None:
    for seed in range(3):
        consistency = ("relaxed", "relaxed", "paper")[seed]
        model = chain(*WIDTHS[: depth + 1], seed=seed, bias=seed != 1, last_relu=seed == 2)
        check_bound(model, samples(80, WIDTHS[0], seed), mode=mode, consistency=consistency)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("depth", range(2, 7))
def test_the_bound_holds_on_trained_chains(digits: Any, depth: int, mode: str) -> None:
    images, labels = digits
    model = train(chain(64, *[16] * (depth - 1), 10, seed=depth), images[:600], labels[:600])
    check_bound(model, images[:200], mode=mode, consistency="relaxed")


def test_kappa_leaves_a_valid_bound_on_the_papers_set() -> None:
    """With a ReLU at the end, κ tightens the part on Ω alone: the bound must not shrink below the promise."""
    for seed in range(2):
        model, inputs = chain(8, 12, 6, seed=seed, last_relu=True), samples(80, 8, seed)
        result = prune(model, inputs, epsilon=0.2, consistency="paper", kappa=0.5, gamma=1.0)
        found = stages(model, result.model, solved_on(inputs)[0])
        by_hand = bound_by_hand(found, promises(result), "cascade", gamma=1.0)
        certificate = result.report.certificate
        assert certificate.holds and certificate.guaranteed == pytest.approx(by_hand, rel=1e-4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("choice", ({}, {"targets": "0"}))
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32))
def test_rounding_does_not_break_the_bound(dtype: torch.dtype, choice: dict[str, str], mode: str) -> None:
    """One number wide, the bound is nearly met; on subnormal numbers rounding alone would carry the output beyond it."""
    for seed in range(6):
        model = chain(1, 3, 1, seed=seed, bias=False, dtype=dtype)
        with torch.no_grad():
            model[0].weight.abs_()
        inputs = samples(1 + seed % 2, 1, seed).abs() + (0 if seed % 3 else 30)
        inputs *= 1e-6 if dtype == torch.float16 else 1.0
        result = prune(model, inputs, epsilon=0.3, mode=mode, on_failure="keep_dense", **choice)
        assert result.report.certificate.holds, result.report.certificate


def test_cancelling_sums_do_not_break_the_bound() -> None:
    """Batches and the program's rows are summed in another order: of inputs near 10,000, weights of mean 0 leave little but rounding."""
    for seed in range(3):
        model, inputs = chain(40, 1, seed=seed), 1e4 + samples(30, 40, seed)
        with torch.no_grad():
            model[0].weight -= model[0].weight.mean()
        assert prune(model, list(inputs.split(7)), epsilon=0.3).report.certificate.holds


def test_kappa_tightens_the_bound_on_the_relaxed_set() -> None:
    model, inputs = chain(8, 12, 6), samples(80, 8)
    bounds = [prune(model, inputs, epsilon=0.2, kappa=kappa).report.certificate.guaranteed for kappa in (1.0, 0.64)]
    assert bounds[1] == pytest.approx(0.8 * bounds[0], rel=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_layers_left_dense_carry_the_error_on(mode: str) -> None:
    model, inputs = chain(8, 12, 9, 5), samples(80, 8)
    result = prune(model, inputs, epsilon=0.1, mode=mode, targets="0")
    norms = [float(torch.linalg.svdvals(model[index].weight.detach().double())[0]) for index in (2, 4)]
    certificate = result.report.certificate
    assert certificate.guaranteed == pytest.approx(result.report.layers[0].epsilon * math.prod(norms), rel=1e-4)
    assert 0 < certificate.measured <= certificate.guaranteed


def test_budgets_of_their_own_bound_a_cascade_directly() -> None:
    model, inputs = chain(8, 12, 9, 5), samples(80, 8)
    result = prune(model, inputs, epsilon={"*": 0.1})
    assert result.report.certificate.guaranteed == pytest.approx(result.report.layers[-1].epsilon, rel=1e-5)
    assert result.report.certificate.measured == pytest.approx(result.report.layers[-1].discrepancy, rel=1e-4)


def test_without_samples_kept_out_there_is_no_audit() -> None:
    result = prune(chain(8, 5), samples(40, 8), epsilon=0.1, holdout=0)
    assert result.report.certificate.holdout is None
    assert result.report.layers[0].rows == 40


@pytest.mark.parametrize("mode", ("cascade", "parallel"))
@pytest.mark.parametrize("choice", ({"epsilon": 0.15}, {"sparsity": 0.5}))
def test_where_rows_are_left_out_the_promise_is_on_all_of_them(mode: str, choice: dict[str, float]) -> None:
    model, inputs = chain(8, 12, 5), samples(800, 8)
    result = prune(model, inputs, **choice, mode=mode, max_rows=200, seed=3)
    x = solved_on(inputs, seed=3)[0]
    found = stages(model, result.model, x)
    certificate = result.report.certificate
    assert certificate.holds and certificate.measured <= certificate.guaranteed
    assert certificate.measured == pytest.approx(end_to_end(model, result.model, x)[0], rel=1e-3)
    for stage, layer in zip(found, result.report.layers, strict=True):
        assert layer.rows == len(x) and layer.density < 1
        assert layer.discrepancy == pytest.approx(stage.discrepancy(mode), rel=1e-3) and layer.discrepancy <= layer.epsilon
        if "epsilon" in choice and (mode == "parallel" or stage is found[0]):
            assert layer.epsilon == pytest.approx(0.15 * float(stage.targets.norm()), rel=1e-5)


def test_too_few_rows_to_keep_the_promise_on_all_of_them_says_so() -> None:
    with pytest.raises(ConvergenceError, match=r"layer '0'.*raise max_rows \(now 5 of 720\)"):
        prune(chain(40, 12, 5), samples(800, 40), epsilon=0.1, max_rows=5)


REPORT = LayerReport("a", (2, 3), 4, 5, 0.8, 1.0, 0.9, 0.1, 0.1, None, 1.0, 1.0, 0.0, "optimal", 1, 0.1, "prox_admm", None, 24, ())
SAME = (torch.ones(4, 2), torch.ones(4, 2))


def test_a_broken_promise_is_named() -> None:
    for discrepancy in (1.1, math.nan, math.inf):
        broken = dataclasses.replace(REPORT, discrepancy=discrepancy)
        certificate = certify((REPORT, dataclasses.replace(broken, name="b")), SAME, None, 1.0, None)
        assert not certificate.holds and certificate.explanation.endswith("broken in b")


def test_an_output_beyond_the_bound_is_said() -> None:
    certificate = certify((REPORT,), (torch.zeros(1, 2), torch.tensor([[3.0, 4.0]])), None, 4.9, None)
    assert certificate.measured == 5 and not certificate.holds and "more than the bound" in certificate.explanation
    assert certify((REPORT,), (torch.zeros(1, 2), torch.tensor([[3.0, 4.0]])), None, 5.0, None).holds


def test_figures_that_are_no_numbers_do_not_hold() -> None:
    assert not certify((REPORT,), (torch.ones(1, 2), torch.tensor([[math.nan, 1.0]])), None, None, "a reason").holds


def test_relative_figures_of_a_silent_network() -> None:
    zero = torch.zeros(3, 2)
    assert certify((REPORT,), (zero, zero), (zero, zero), 0.0, None).holdout == 0
    assert certify((REPORT,), (zero, zero + 1), None, None, "a reason").relative_measured == math.inf


def test_outputs_of_different_shape_are_not_compared() -> None:
    with pytest.raises(NetTrimError, match=r"\(1, 2\).*\(4, 2\)"):
        certify((REPORT,), (torch.ones(4, 2), torch.ones(1, 2)), None, None, "a reason")


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32, torch.float64))
def test_the_discrepancy_is_that_of_the_stored_weights(dtype: torch.dtype) -> None:
    module = nn.Linear(7, 5).to(dtype)
    A = samples(50, 7).to(dtype).double()
    Y = torch.rand(50, 5, dtype=torch.float64)
    ones = torch.cat([A, torch.ones(50, 1, dtype=torch.float64)], 1)
    out = A @ module.weight.detach().double().T + module.bias.detach().double()
    for activation, expected in ((RELU, out.clamp(min=0) - Y), (None, out - Y)):
        given = ones if dtype == torch.float64 else ones.float()
        matrix = layers.only_matrix(module)
        seen = Observation(matrix, None, lambda rows=given: iter([Seen(rows[:, :-1], Y.to(rows))]))
        measured = stored_discrepancy(matrix, Layer("fc", matrix, matrix.as_matrix().to(given), None, activation, False, seen))
        assert measured == pytest.approx(float(expected.norm()), rel=4 * torch.finfo(dtype).eps + 1e-6)


@pytest.mark.parametrize("largest", (0.0, 1.0, 1e3, 1e12))
def test_the_size_of_all_sums_is_known_to_what_the_verifier_allows(largest: float) -> None:
    """Also where a few rows are all of it, as those of a language model's first token, and where each row meets one column alone."""
    torch.manual_seed(0)
    model = nn.Linear(32, 24, bias=False)
    with torch.no_grad():
        model.weight[:, 3::8] *= 1e-3
    A = torch.eye(32).repeat(1500, 1) + torch.randn(48000, 32) * (torch.arange(48000) % 2).unsqueeze(1)
    A[::700] *= largest
    matrix = layers.only_matrix(model)
    seen = Layer("", matrix, matrix.as_matrix(), None, None, False, Observation(matrix, None, lambda: iter([Seen(A, model(A).detach(), None)])))
    exact = A.double().abs() @ matrix.as_matrix().double().abs().T
    assert make_promise(matrix, seen, 0.0, None).sums_norm == pytest.approx(float(exact.norm()), rel=1e-4 if largest <= 1 else 5e-3)
