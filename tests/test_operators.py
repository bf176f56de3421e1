"""The operator form of convolutions: its products against unfolded rows, its solver against the unfolded form and against CVXPY."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nettrim
from nettrim import layers
from nettrim.errors import ArgumentError, UnsupportedProgramError
from nettrim.layers import Call
from nettrim.observation import Observation
from nettrim.operators import Convolution, of_matrix

KINDS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "1d stride": (lambda: nn.Conv1d(3, 4, 3, stride=2), (9, 3, 11)),
    "2d": (lambda: nn.Conv2d(2, 3, 3, padding=1), (5, 2, 5, 4)),
    "2d no bias, rectangular": (lambda: nn.Conv2d(2, 3, (1, 3), stride=(2, 1), dilation=(1, 2), padding=(1, 2), bias=False), (6, 2, 5, 6)),
    "2d dilation, same, reflect": (lambda: nn.Conv2d(2, 3, 2, dilation=2, padding="same", padding_mode="reflect"), (4, 2, 5, 5)),
    "2d circular": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (4, 2, 4, 5)),
    "2d groups": (lambda: nn.Conv2d(4, 6, 2, groups=2, padding=1), (5, 4, 4, 4)),
    "depthwise": (lambda: nn.Conv2d(3, 3, 3, groups=3, bias=False), (6, 3, 5, 5)),
    "3d": (lambda: nn.Conv3d(2, 3, 2, stride=(1, 2, 1), padding=(0, 1, 0)), (4, 2, 3, 4, 3)),
    "transposed": (lambda: nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1, output_padding=1), (6, 2, 3, 3)),
    "transposed groups": (lambda: nn.ConvTranspose1d(4, 4, 3, stride=2, groups=2, dilation=2), (8, 4, 5)),
}
SETS: dict[str, dict[str, Any]] = {"linear": {"activation": None}, "relaxed": {}, "paper": {"consistency": "paper"}}


def made(name: str) -> tuple[nn.Module, Tensor, list[tuple[Convolution, Tensor, Tensor, Tensor]]]:
    """A module, an input, and of each of its groups: the operator, the unfolded rows, the weights and what they put out."""
    torch.manual_seed(0)
    make, shape = KINDS[name]
    module, x = make().double(), torch.randn(shape, dtype=torch.float64)
    matrix = layers.only_matrix(module)
    call = Call((x,), {}, module(x))
    kept = matrix.kind.inputs(module, matrix.part, call)
    A, Z, W = matrix.input_rows(call), matrix.output_rows(call).detach(), matrix.as_matrix()
    # in batches of different sizes
    groups = [
        (of_matrix(matrix, group, [kept[:1], kept[1:]]), A_, W_, Z_)
        for group, (A_, W_, Z_) in enumerate(zip(*(t.chunk(matrix.groups, d) for t, d in ((A, 1), (W, 0), (Z, 1))), strict=True))
    ]
    return module, x, groups


@pytest.mark.parametrize("name", KINDS)
def test_products_are_those_of_the_unfolded_rows(name: str) -> None:
    _, _, groups = made(name)
    for operator, A, W, Z in groups:
        assert (operator.rows, operator.width) == A.shape
        assert torch.equal(torch.cat(list(operator())), A)
        torch.testing.assert_close(operator.product(W), Z, rtol=0, atol=1e-12)
        D = torch.randn_like(Z)
        torch.testing.assert_close(operator.adjoint(D), D.T @ A, rtol=0, atol=1e-11)
        torch.testing.assert_close(operator.adjoint(D.T.contiguous().T), D.T @ A, rtol=0, atol=1e-11)
        torch.testing.assert_close(operator.squares(torch.float64), A.square().sum(0), rtol=0, atol=1e-11)
        # each is the other's adjoint
        assert float((operator.product(W) * D).sum()) == pytest.approx(float((W * operator.adjoint(D)).sum()), rel=1e-12)


def test_any_number_of_samples_at_a_time_gives_the_same_products(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, ((operator, A, W, Z),) = made("2d")
    monkeypatch.setattr("nettrim.operators._ELEMENTS", 40)
    assert len(list(operator())) == 5
    assert torch.equal(torch.cat(list(operator())), A)
    torch.testing.assert_close(operator.product(W), Z, rtol=0, atol=1e-12)
    torch.testing.assert_close(operator.adjoint(Z), Z.T @ A, rtol=0, atol=1e-11)


@pytest.mark.parametrize("consistency", SETS)
@pytest.mark.parametrize("name", KINDS)
def test_the_operator_form_agrees_with_the_unfolded_one_and_with_cvxpy(name: str, consistency: str) -> None:
    for (operator, A, _, Z), share in zip(made(name)[2], itertools.cycle((0.1, 0.3))):
        options = SETS[consistency]
        Y = Z if consistency == "linear" else Z.clamp(min=0)
        epsilon = share * float(Y.norm())
        solution = nettrim.solve(nettrim.LayerProgram(operator, Y, epsilon=epsilon, **options), "cg_admm", tol=1e-5)
        unfolded = nettrim.LayerProgram(A, Y, epsilon=epsilon, **options)
        reference = nettrim.solve(unfolded, tol=1e-5)
        oracle = nettrim.solve(unfolded, "cvxpy", tol=1e-6)
        assert solution.solver == "cg_admm" and solution.status == reference.status == "optimal"
        # one-sided constraints are met to 2e-5 of the budget, which may buy several times as much
        near = 2e-4 if consistency == "paper" else 3e-5
        assert solution.objective == pytest.approx(oracle.objective, rel=near)
        assert solution.objective == pytest.approx(reference.objective, rel=near)
        assert solution.lower_bound <= oracle.objective * (1 + 1e-5)
        # what it says of itself is what the unfolded program says of its weights
        assert unfolded.is_feasible(solution.weights)
        assert solution.discrepancy == pytest.approx(unfolded.discrepancy(solution.weights), rel=1e-9)


def test_floors_ceilings_and_free_biases() -> None:
    _, _, ((operator, A, _, Z),) = made("2d")
    floor, ceiling = torch.tensor([-0.2, 0.1, 0.0]).double(), torch.tensor([0.3, 0.5, 0.4]).double()
    omega = torch.ones(A.shape[1], dtype=torch.float64)
    omega[-1] = 0
    Y = torch.minimum(torch.maximum(Z, floor), ceiling)
    options: dict[str, Any] = {"epsilon": 0.2 * float(Y.norm()), "floor": floor, "ceiling": ceiling, "l1_weights": omega}
    solution = nettrim.solve(nettrim.LayerProgram(operator, Y, **options), "cg_admm", tol=1e-5)
    oracle = nettrim.solve(nettrim.LayerProgram(A, Y, **options), "cvxpy", tol=1e-6)
    assert solution.status == "optimal" and solution.objective == pytest.approx(oracle.objective, rel=3e-5)


def test_single_precision_is_feasible_as_stored_and_near_the_optimum() -> None:
    _, _, ((operator, A, _, Z),) = made("2d")
    inputs = Convolution([x.float() for x in operator._batches], 3)
    Y = Z.clamp(min=0).float()
    program = nettrim.LayerProgram(inputs, Y, epsilon=0.1 * float(Y.norm()))
    solution = nettrim.solve(program, "cg_admm", tol=1e-3)
    assert solution.weights.dtype == torch.float32 and solution.status == "optimal" and program.is_feasible(solution.weights)
    oracle = nettrim.solve(nettrim.LayerProgram(A, Y.double(), epsilon=0.1 * float(Y.norm())), "cvxpy")
    assert solution.objective == pytest.approx(oracle.objective, rel=1e-3)


def test_a_budget_that_no_weights_keep_is_not_called_kept() -> None:
    _, _, ((operator, _, _, Z),) = made("2d")
    noise = torch.randn(Z.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    solution = nettrim.solve(nettrim.LayerProgram(operator, noise, epsilon=0.01, activation=None), "cg_admm", max_iter=100)
    assert solution.status == "iteration_limit" and solution.violation > 1 and math.isinf(solution.gap)


def test_upper_bounds_count_beside_streams_as_beside_arrays() -> None:
    _, _, ((operator, A, W, Z),) = made("2d")
    Y, V = Z.clamp(min=0), torch.minimum(Z, torch.full_like(Z, 0.05)) + 0.01
    whole = nettrim.LayerProgram(A, Y, epsilon=0.1 * float(Y.norm()), consistency="paper", upper=V)
    for inputs in (operator, lambda: A.split(7)):
        streamed = nettrim.LayerProgram(inputs, Y, epsilon=whole.epsilon, consistency="paper", upper=V)
        zero = torch.zeros_like(W)
        for weights in (W, zero, -W):
            assert streamed.violation(weights) == pytest.approx(whole.violation(weights), rel=1e-12)
        theta = torch.randn_like(Y)
        assert streamed.lower_bound(theta) == pytest.approx(whole.lower_bound(theta), rel=1e-9)
    assert whole.violation(-W) > nettrim.LayerProgram(A, Y, epsilon=whole.epsilon, consistency="paper", upper=V + 10).violation(-W)
    solution = nettrim.solve(nettrim.LayerProgram(operator, Y, epsilon=whole.epsilon, consistency="paper", upper=V), "cg_admm", tol=1e-4)
    assert solution.objective == pytest.approx(nettrim.solve(whole, "cvxpy").objective, rel=1e-3)


# -- in a network


def network() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding="same", padding_mode="reflect"), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 4, 3, stride=2, groups=2), nn.ReLU(), nn.ConvTranspose2d(4, 2, 3, stride=2, output_padding=1),
    ).double().eval()  # fmt: skip
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm2d)
    with torch.no_grad():
        for tensor in (norm.running_mean, norm.weight, norm.bias):
            assert tensor is not None
            tensor.normal_()
        assert norm.running_var is not None
        norm.running_var.uniform_(0.5, 2)
    return model, torch.randn(8, 2, 6, 6, dtype=torch.float64)


@pytest.mark.parametrize("options", [{"mode": "parallel"}, {"mode": "parallel", "consistency": "paper"}])
def test_pruning_on_the_operator_is_pruning_on_the_rows(options: dict[str, Any]) -> None:
    model, x = network()
    before = copy.deepcopy(model.state_dict())
    common: dict[str, Any] = {"epsilon": 0.1, "penalty": "l1", "holdout": 0, **options}
    mine = nettrim.prune(model, x, solver="cg_admm", **common)
    theirs = nettrim.prune(model, x, **common)
    for ours, other in zip(mine.report.layers, theirs.report.layers, strict=True):
        assert (ours.solver, ours.status, ours.rows) == ("cg_admm", "optimal", other.rows)
        assert ours.objective == pytest.approx(other.objective, rel=3e-3)
    assert mine.report.certificate.holds and nettrim.verify(model, mine.model, x, mine.report).holds
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_in_a_cascade_on_the_papers_set_no_patches_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Observation) -> None:
        raise AssertionError("rows were unfolded whole")

    model, x = network()
    monkeypatch.setattr("nettrim.observation.HELD_ELEMENTS", 4_000)
    common: dict[str, Any] = {"epsilon": 0.1, "consistency": "paper", "holdout": 0}
    with monkeypatch.context() as patch:
        patch.setattr(Observation, "_whole", refuse)
        named = nettrim.prune(model, x, solver="cg_admm", **common)
    assert [layer.solver for layer in named.report.layers] == ["cg_admm"] * 3 and named.report.certificate.holds
    # of its own accord only where no other solver takes the program
    chosen = nettrim.prune(model, x, **common)
    assert [layer.solver for layer in chosen.report.layers] == ["cg_admm", "prox_admm", "gram_admm"] and chosen.report.certificate.holds
    with pytest.raises(ArgumentError, match=r"rows are not held; give max_rows, .*or solver='auto'"):
        nettrim.prune(model, x, solver="prox_admm", **common)


def test_inputs_that_are_not_held_either_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = network()
    monkeypatch.setattr("nettrim.observation.HELD_ELEMENTS", 1000)
    with pytest.raises(ArgumentError, match=r"'cg_admm' needs the inputs and outputs of layer '0' in memory.*fewer samples"):
        nettrim.prune(model, list(x.split(3)), epsilon=0.1, solver="cg_admm")


# -- what is refused


def test_layers_that_are_no_convolutions_and_drawn_rows_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))
    x = torch.randn(20, 2, 5)
    with pytest.raises(UnsupportedProgramError, match=r"'cg_admm' does not take .*nettrim.operators.Convolution.*These do: prox_admm"):
        nettrim.prune(model, x, epsilon=0.1, solver="cg_admm")
    with pytest.raises(UnsupportedProgramError, match="'cg_admm' does not take"):
        nettrim.prune(model, x, epsilon=0.1, solver="cg_admm", targets=nn.Conv1d, max_rows=10)
    assert nettrim.prune(model, x, epsilon=0.1, solver="cg_admm", targets=nn.Conv1d).report.layers[0].solver == "cg_admm"


def test_programs_that_it_does_not_take() -> None:
    _, _, ((operator, A, _, Z),) = made("2d")
    with pytest.raises(UnsupportedProgramError, match="takes a budget"):
        nettrim.solve(nettrim.LayerProgram(operator, Z, regularization=1.0, activation=None), "cg_admm")
    with pytest.raises(UnsupportedProgramError, match="all targets in memory"):
        nettrim.solve(nettrim.LayerProgram(operator, lambda: Z.split([len(c) for c in operator()]), epsilon=1.0, activation=None), "cg_admm")
    with pytest.raises(UnsupportedProgramError, match="inputs that are a"):
        nettrim.solve(nettrim.LayerProgram(A, Z, epsilon=1.0, activation=None), "cg_admm")
    # others take the operator as the stream of rows that it is
    assert nettrim.solve(nettrim.LayerProgram(operator, Z, epsilon=0.1 * float(Z.norm()), activation=None)).solver == "gram_admm"


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        (torch.zeros(2, 3), {}, "expected floating-point tensors"),
        (torch.zeros(2, 3, 4, dtype=torch.int64), {}, r"hold torch.int64 \(2, 3, 4\)"),
        (["x"], {}, "hold str"),
        (torch.zeros(2, 3, 4), {"stride": 0}, "got 0; expected a whole number above 0"),
        (torch.zeros(2, 3, 4), {"dilation": (1, 2)}, r"got \(1, 2\); expected a whole number above 0, or one for each of 1"),
        (torch.zeros(2, 3, 1), {}, r"size \(1,\); expected no less than the kernel \(2,\)"),
        ([torch.zeros(2, 3, 4), torch.zeros(2, 2, 4)], {}, "expected 3 channels and 1 dimensions"),
        ([], {}, "hold no sample"),
        (torch.zeros(0, 3, 4), {}, "hold no sample"),
    ],
)
def test_what_is_no_input_of_a_convolution(inputs: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Convolution(inputs, 2, **options)
