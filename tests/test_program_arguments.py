"""What a layer program may be given in other libraries' types, and what it refuses by name instead of with a raw error or a wrong figure."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from networks import seeded

import nettrim
from nettrim import ArgumentError, LayerProgram


def refused(match: str, *args: object, **options: object) -> None:
    with pytest.raises(ArgumentError, match=match):
        LayerProgram(*args, **options)


def test_refusals_of_levels_that_are_no_numbers():
    A, Y = torch.ones(4, 3), torch.ones(4, 2)
    for value in ("a", "1.0", True, [1.0], torch.ones(2), torch.tensor(True), 1j, np.bool_(True)):
        refused(r"epsilon=.*; expected a finite number at least 0", A, Y, epsilon=value)
        refused(r"regularization=.*; expected a finite number above 0", A, Y, regularization=value)
    for value in (np.float32(0.5), torch.tensor(0.5), Fraction(1, 2)):
        assert LayerProgram(A, Y, epsilon=value).epsilon == 0.5
    for value in (math.nan, math.inf, np.float32("nan")):
        refused(r"l1_weights holds NaN or infinity", A, Y, epsilon=1.0, l1_weights=value)
    for value in (True, "1", [1.0] * 3):
        refused(r"l1_weights is a .*; expected a torch tensor or a numpy array", A, Y, epsilon=1.0, l1_weights=value)
    assert LayerProgram(A, Y, epsilon=1.0, l1_weights=np.float32(2)).norm(torch.ones(2, 3)) == 12


def test_a_support_in_numpy_is_one_and_what_is_none_is_said():
    A, Y = torch.randn(30, 3, generator=seeded(0)), torch.randn(30, 2, generator=seeded(1))
    only = np.array([[True, False, True], [False, True, True]])
    program = LayerProgram(A, Y, nonzeros=4, activation=None, support=only)
    assert not nettrim.solve(program).weights[~torch.from_numpy(only)].any()
    refused(r"support is a list; expected a tensor or a numpy array of bool \(2, 3\)", A, Y, nonzeros=4, activation=None, support=only.tolist())
    refused(r"support is a ndarray of int64 \(2, 3\); expected", A, Y, nonzeros=4, activation=None, support=only.astype(np.int64))
    refused(r"support is a Tensor of torch.bool \(3, 2\); expected .* \(2, 3\)", A, Y, nonzeros=4, activation=None, support=only.T)


def test_metrics_are_inner_products():
    A, Y = torch.ones(4, 3), torch.ones(4, 3)
    flat = torch.randn(3, 2, generator=seeded(0))
    for good in (flat @ flat.T, torch.eye(3), torch.ones(3, 3), torch.tensor([1.0, 2.0, 3.0])):
        assert LayerProgram(A, Y, nonzeros=2, activation=None, metric=good).metric is not None
    swapped = torch.tensor([[1.0, 2.0, 0.0], [2.0, 1.0, 0.0], [0.0, 0.0, 1.0]])  # an eigenvalue of -1
    for bad in (swapped, -torch.eye(3), torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]), torch.zeros(3)):
        refused(r"metric is no inner product; expected a symmetric positive semidefinite matrix", A, Y, nonzeros=2, activation=None, metric=bad)


def test_a_large_metric_of_low_rank_is_none_that_rounding_makes_indefinite():
    """As `prune` makes them: sums of squares of gradients, in float32, of fewer samples than outputs."""
    for seed in range(3):
        low = torch.randn(384, 20, generator=seeded(seed)) * torch.logspace(-3, 3, 20)
        metric = low @ low.T + 1e-6 * torch.eye(384)
        assert LayerProgram(torch.ones(4, 3), torch.ones(4, 384), nonzeros=2, activation=None, metric=metric).metric is not None
