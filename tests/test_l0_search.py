"""The search before a ReLU, whose targets move with the weights; and inputs that are always 0, which it leaves out."""

import pickle

import pytest
import torch
from test_topk_admm import layer

import nettrim
from nettrim import LayerProgram
from nettrim.grams import Gram
from nettrim.patterns import Supports, parse
from nettrim.solvers import support, topk_admm


def correlated(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return layer(P=400, N=30, M=20, seed=seed, relu=True, noise=0.3)


def test_targets_renewed_in_the_search_leave_less(digits_network, monkeypatch):
    """Than targets of the dense weights alone, with as many weights."""
    model, images, _, _ = digits_network
    A = torch.cat([images, torch.ones(len(images), 1)], 1)
    W = torch.cat([model[0].weight, model[0].bias[:, None]], 1).detach()
    free = torch.ones(65).index_fill(0, torch.tensor(64), 0)
    program = LayerProgram(A, (A @ W.T).clamp(min=0), nonzeros=model[0].weight.numel() // 5, l1_weights=free)
    renewed = nettrim.solve(program, initial=W).discrepancy
    monkeypatch.setattr(support, "_RENEWED", 2.0)
    assert renewed < 0.98 * nettrim.solve(program, initial=W).discrepancy


def test_renewed_targets_are_those_of_the_search_s_weights(monkeypatch):
    """``C = TᵀA`` with ``T = Y`` where ``Y > 0`` and ``min(Z, 0)`` elsewhere, of the weights that are not sparse yet."""
    A, Y, W = correlated(0)
    asked = []
    inner = topk_admm._Problem.renewed

    def noted(self, weights, dtype):
        found = inner(self, weights, dtype)
        asked.append((self.true(weights.double()), found * self.column / self.row))
        return found

    monkeypatch.setattr(topk_admm._Problem, "renewed", noted)
    nettrim.solve(LayerProgram(A, Y, nonzeros=120), initial=W)
    assert len(asked) > 10 and int((asked[0][0] != 0).sum()) == W.numel()
    for weights, C in asked[:5]:
        T = torch.where(Y > 0, Y, (A @ weights.T).clamp(max=0))
        torch.testing.assert_close(C, T.T @ A)


@pytest.mark.parametrize("relu", (False, True))
@pytest.mark.parametrize("asked", ({"nonzeros": 60}, {"share": 0.2}, {"nonzeros": 60, "restricted": True}), ids=str)
def test_inputs_that_are_always_0_make_no_difference(relu, asked, monkeypatch):
    A, Y, W = layer(P=200, N=20, M=10, seed=3, relu=relu)
    lit = torch.ones(26, dtype=torch.bool)
    lit[[0, 3, 7, 8, 15, 25]] = False
    wide, start = torch.zeros(200, 26, dtype=A.dtype), torch.ones(10, 26, dtype=A.dtype)
    wide[:, lit], start[:, lit] = A, W
    options = {"penalty": "l0", "epsilon": asked["share"] * float(Y.norm())} if "share" in asked else {"nonzeros": asked["nonzeros"]}
    support = torch.rand(10, 26, generator=torch.Generator().manual_seed(0)) < 0.8 if "restricted" in asked else None
    activation = "relu" if relu else None
    expected = nettrim.solve(LayerProgram(A, Y, activation=activation, support=None if support is None else support[:, lit], **options), initial=W)
    sizes = []
    inner = topk_admm.normalised
    monkeypatch.setattr(topk_admm, "normalised", lambda G, *rest: (sizes.append(len(G)), inner(G, *rest))[1])
    program = LayerProgram(wide, Y, activation=activation, support=support, **options)
    found = nettrim.solve(program, initial=start)
    assert sizes == [20]
    travelled = nettrim.solve(pickle.loads(pickle.dumps(program)), initial=start)  # to a worker
    assert torch.equal(travelled.weights, found.weights) and sizes == [20, 20]
    torch.testing.assert_close(found.weights[:, lit], expected.weights, rtol=1e-6, atol=1e-9)
    assert torch.equal(found.weights[:, lit] != 0, expected.weights != 0)
    assert not bool(found.weights[:, ~lit].any())
    assert found.discrepancy == pytest.approx(expected.discrepancy, rel=1e-6)


@pytest.mark.parametrize("relu", (False, True))
def test_no_weights_where_a_budget_covers_all_that_is_put_out(relu):
    A, Y, W = layer(P=100, N=20, M=5, relu=relu)
    A[:, :5] = 0
    found = nettrim.solve(LayerProgram(A, Y, penalty="l0", epsilon=1.01 * float(Y.norm()), activation="relu" if relu else None), initial=W)
    assert found.weights.shape == W.shape and not bool(found.weights.any())


def test_what_is_not_counted_stays_as_it_was_where_no_row_has_seen_it():
    A, Y, W = layer(P=100, N=20, M=5)
    A[:, [2, 5, 6]] = 0
    found = nettrim.solve(LayerProgram(A, Y, nonzeros=40, activation=None, l1_weights=torch.ones(20).index_fill(0, torch.tensor(5), 0)), initial=W)
    assert torch.equal(found.weights[:, 5], W[:, 5]) and not bool(found.weights[:, [2, 6]].any())
    assert int((found.weights != 0).sum()) == 40 + 5


@pytest.mark.parametrize("share", (0.3, 0.9))
def test_no_worse_than_with_the_targets_of_the_start_alone(share, monkeypatch):
    """Where few weights go, too, and renewals lead astray."""
    for seed in range(6):
        A, Y, W = correlated(seed)
        program = LayerProgram(A, Y, nonzeros=round(share * W.numel()))
        with monkeypatch.context() as patch:
            patch.setattr(topk_admm, "_settle", lambda problem, fit, renewals: fit)
            found = nettrim.solve(program, initial=W).discrepancy
            patch.setattr(support, "_RENEWED", 2.0)
            assert found <= nettrim.solve(program, initial=W).discrepancy


def test_every_pass_over_the_rows_for_new_targets_is_counted(monkeypatch):
    A, Y, W = correlated(0)
    passes = []
    inner = topk_admm._correlations
    monkeypatch.setattr(topk_admm, "_correlations", lambda *given: (passes.append(1), inner(*given))[1])
    solution = nettrim.solve(LayerProgram(A, Y, nonzeros=120), initial=W)
    assert solution.iterations == len(passes) + 2  # and the two searches


def test_scores_beyond_the_range_do_not_take_the_place_of_what_is_not_counted():
    supports = Supports(parse("unstructured"), 2, torch.tensor([True, True, True, False]), None)
    mask = supports.nearest(torch.tensor([[torch.inf, torch.inf, 1.0, 0.0], [torch.inf, 2.0, 1.0, 0.0]]))
    assert mask[:, 3].all() and int(mask.sum()) == 4


def test_those_of_a_pattern_stay():
    A, Y, W = layer(P=200, N=16, M=8, seed=3)
    A[:, 4:8] = 0
    solution = nettrim.solve(LayerProgram(A, Y, nonzeros=64, pattern="2:4", activation=None), initial=W)
    assert parse("2:4").allows(solution.weights != 0) and int((solution.weights != 0).sum()) == 64


def test_the_matrix_of_the_others_is_made_once_and_where_it_pays():
    G = torch.eye(40, dtype=torch.float64)
    assert Gram(G).live() is None
    G[5, 5] = 0
    assert Gram(G).live() is None  # one of forty
    G[6, 6] = G[7, 7] = 0
    gram = Gram(G)
    found = gram.live()
    assert found is not None and found is gram.live()
    assert found[0].tolist() == [*range(5), *range(8, 40)] and torch.equal(found[1].G, torch.eye(37, dtype=torch.float64))
    assert Gram(torch.zeros(4, 4)).live() is None
